//! What iperf3 and sockperf measure in the same place: whether our own load tells the truth.

use std::fs;
use std::os::unix::process::CommandExt;
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, ensure};
use weft_daemon::netns::NetNs;

use crate::is_installed;
use crate::load::CONGESTION;
use crate::topology::{Topology, inner};

/// The port that servers listen on.
const PORT: u16 = 11111;
/// States of a TCP socket that listens, and of a UDP socket (include/net/tcp_states.h).
const WAITING: [&str; 2] = ["0A", "07"];
/// How long a server may take until it listens.
const READY: Duration = Duration::from_secs(5);

/// A figure of ours, and how another program measures it.
#[derive(Debug, Clone, Copy)]
pub struct Check {
    pub what: &'static str,
    pub ours: &'static str,
    pub theirs: &'static str,
    pub program: &'static str,
    /// The file of /proc/net in which its server shows.
    sockets: &'static str,
    server: fn(&str) -> Vec<String>,
    client: fn(&str, seconds: u64) -> Vec<String>,
    read: fn(&str) -> Option<f64>,
}

/// All of them.
pub const CHECKS: [Check; 2] = [
    Check {
        what: "TCP, 1 stream, Gbit/s",
        ours: "tcp1_gbit",
        theirs: "iperf3_tcp1_gbit",
        program: "iperf3",
        sockets: "tcp",
        server: |address| words(&format!("--server --one-off --bind {address} --port {PORT}")),
        client: |address, seconds| {
            words(&format!(
                "--client {address} --port {PORT} --congestion {CONGESTION} --time {seconds} \
                 --omit 1 --json"
            ))
        },
        read: iperf3_gbit,
    },
    Check {
        what: "round trip, idle, median, µs",
        ours: "rtt_p50_us",
        theirs: "sockperf_rtt_p50_us",
        program: "sockperf",
        sockets: "udp",
        server: |address| words(&format!("server -i {address} -p {PORT}")),
        client: |address, seconds| {
            words(&format!("ping-pong -i {address} -p {PORT} -t {seconds} --full-rtt"))
        },
        read: sockperf_median,
    },
];

impl Check {
    /// What the program says; `None` where it is not installed.
    ///
    /// # Errors
    /// It fails, or says something else than a figure.
    pub fn measure(&self, net: &Topology, time: Duration) -> anyhow::Result<Option<f64>> {
        if !is_installed(self.program) {
            return Ok(None);
        }
        let ([from, to], address) = (&net.containers, inner(1).to_string());
        let mut server = Command::new(self.program);
        server.args((self.server)(&address)).process_group(0);
        server.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
        let _server = Server(to.spawn(&mut server)?);
        self.wait_for_server(to)?;
        let line = (self.client)(&address, time.as_secs().max(1));
        let line: Vec<&str> = line.iter().map(String::as_str).collect();
        let text = from.tool(self.program, &line)?;
        (self.read)(&text)
            .map(Some)
            .with_context(|| format!("no figure of {}:\n{text}", self.program))
    }

    fn wait_for_server(&self, netns: &NetNs) -> anyhow::Result<()> {
        let path = format!("/proc/thread-self/net/{}", self.sockets);
        let deadline = Instant::now() + READY;
        while !listens(&netns.run(|| fs::read_to_string(&path))??) {
            ensure!(Instant::now() < deadline, "{} does not begin to listen", self.program);
            thread::sleep(Duration::from_millis(10));
        }
        Ok(())
    }
}

/// Killed when it is no longer needed.
struct Server(Child);

impl Drop for Server {
    fn drop(&mut self) {
        // Both fail only for a process that has ended.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn words(line: &str) -> Vec<String> {
    line.split_whitespace().map(str::to_owned).collect()
}

/// Whether somebody waits at the port: a line of /proc/net is a number, a local address with its port in
/// hexadecimal, a remote one, a state, and more (proc(5)). What is left of connections to the server
/// before has the port, too.
fn listens(text: &str) -> bool {
    let port = format!(":{PORT:04X}");
    text.lines().any(|line| {
        let mut fields = line.split_whitespace().skip(1);
        let is_local = fields.next().is_some_and(|address| address.ends_with(&port));
        is_local && fields.nth(1).is_some_and(|state| WAITING.contains(&state))
    })
}

fn iperf3_gbit(json: &str) -> Option<f64> {
    let value: serde_json::Value = serde_json::from_str(json).ok()?;
    Some(value.pointer("/end/sum_received/bits_per_second")?.as_f64()? / 1e9)
}

/// Of a line `sockperf: ---> percentile 50.000 =   57.144`.
fn sockperf_median(text: &str) -> Option<f64> {
    let line = text.lines().find(|line| line.contains("percentile 50.000"))?;
    line.split('=').nth(1)?.trim().parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn figures_are_found_in_what_the_programs_write() {
        let json = r#"{"end":{"sum_received":{"bits_per_second":2500000000.0}}}"#;
        assert_eq!(iperf3_gbit(json), Some(2.5));
        assert_eq!(iperf3_gbit("{}"), None);
        let text =
            "sockperf: ---> percentile 75.000 = 172.7\nsockperf: ---> percentile 50.000 =   57.1\n";
        assert_eq!(sockperf_median(text), Some(57.1));
    }

    #[test]
    fn a_listening_port_is_the_local_one() {
        let head = "  sl  local_address rem_address   st\n";
        assert!(listens(&format!("{head}   0: 0201A8C0:2B67 00000000:0000 0A")));
        assert!(listens(&format!("{head}   0: 0201A8C0:2B67 00000000:0000 07")));
        assert!(!listens(&format!("{head}   0: 0201A8C0:0016 0201A8C0:2B67 01")));
        let left = format!("{head}   0: 0201A8C0:2B67 0101A8C0:9C40 06");
        assert!(!listens(&left), "TIME_WAIT");
    }
}
