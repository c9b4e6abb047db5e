//! Echo requests by the program `ping` of iputils, inside a namespace.

use std::io::ErrorKind;
use std::net::IpAddr;
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, bail};

use crate::netns::{NetNs, apart};

/// How to ping.
#[derive(Debug, Clone)]
pub struct PingOptions {
    /// How many echo requests are sent.
    pub count: u32,
    /// Time between two requests.
    pub interval: Duration,
    /// How long the last answer is waited for; whole seconds.
    pub wait: Duration,
    /// TTL or hop limit of the requests; the system's default where absent.
    pub ttl: Option<u8>,
    /// Bytes of payload; the IPv4 packet is 28 longer, the IPv6 packet 48.
    pub size: Option<u16>,
    /// Forbid fragmentation, on the way and before sending.
    pub df: bool,
}

impl Default for PingOptions {
    fn default() -> Self {
        Self {
            count: 3,
            interval: Duration::from_millis(100),
            wait: Duration::from_secs(1),
            ttl: None,
            size: None,
            df: false,
        }
    }
}

/// What came back.
#[derive(Debug, Clone, PartialEq)]
pub struct PingReport {
    /// Requests sent.
    pub sent: u32,
    /// Requests answered.
    pub received: u32,
    /// The mean round trip time; absent where nothing was answered.
    pub rtt: Option<Duration>,
    /// The answers, in order of arrival.
    pub replies: Vec<Reply>,
    /// Lines that tell of trouble: ICMP errors received, and errors of the own kernel.
    pub errors: Vec<String>,
}

/// One answer.
#[derive(Debug, Clone, PartialEq)]
pub struct Reply {
    /// Which request was answered, counted from 1.
    pub sequence: u32,
    /// TTL or hop limit of the answer as it arrived.
    pub ttl: u8,
    /// The round trip time.
    pub rtt: Duration,
}

impl PingReport {
    /// Whether every request was answered.
    pub fn complete(&self) -> bool {
        self.sent > 0 && self.received == self.sent
    }

    /// Understands what `ping` wrote.
    ///
    /// # Errors
    /// It never began; the error is what it says.
    fn parse(stdout: &str, stderr: &str) -> anyhow::Result<Self> {
        let Some(counts) = stdout.lines().find(|line| line.contains(" packets transmitted, "))
        else {
            bail!("{}", stderr.trim());
        };
        let number_before = |what: &str| {
            let text = counts.split(", ").find_map(|part| part.strip_suffix(what));
            text.and_then(|text| text.parse().ok())
                .with_context(|| format!("it wrote a summary that we do not know: {counts}"))
        };
        let replies: Vec<Reply> = stdout.lines().filter_map(reply).collect();
        let total: Duration = replies.iter().map(|reply| reply.rtt).sum();
        Ok(Self {
            sent: number_before(" packets transmitted")?,
            received: number_before(" received")?,
            rtt: u32::try_from(replies.len()).ok().and_then(|count| total.checked_div(count)),
            replies,
            errors: stdout
                .lines()
                .chain(stderr.lines())
                .filter(|line| is_trouble(line))
                .map(str::to_owned)
                .collect(),
        })
    }
}

/// Pings `address` from inside `netns`. No answer is a report, not an error.
///
/// # Errors
/// The program is missing or refuses to begin.
pub fn ping(netns: &NetNs, address: IpAddr, options: &PingOptions) -> anyhow::Result<PingReport> {
    let mut command = Command::new("ping");
    apart(&mut command).args(arguments(address, options));
    let output = netns.output(&mut command).map_err(|error| match missing(&error) {
        true => error.context("the program `ping` is missing; install iputils-ping"),
        false => error,
    })?;
    let stdout = String::from_utf8_lossy(&output.stdout);
    let stderr = String::from_utf8_lossy(&output.stderr);
    PingReport::parse(&stdout, &stderr)
        .with_context(|| format!("ping of {address} from {}", netns.name()))
}

fn missing(error: &anyhow::Error) -> bool {
    error.root_cause().downcast_ref::<std::io::Error>().map(std::io::Error::kind)
        == Some(ErrorKind::NotFound)
}

fn arguments(address: IpAddr, options: &PingOptions) -> Vec<String> {
    let mut arguments = vec![
        "-n".to_owned(),
        format!("-c{}", options.count),
        format!("-i{}", options.interval.as_secs_f64()),
        format!("-W{}", options.wait.as_secs().max(1)),
    ];
    arguments.extend(options.ttl.map(|ttl| format!("-t{ttl}")));
    arguments.extend(options.size.map(|size| format!("-s{size}")));
    arguments.extend(options.df.then(|| "-Mdo".to_owned()));
    arguments.push(address.to_string());
    arguments
}

/// Understands `64 bytes from 10.42.7.2: icmp_seq=1 ttl=60 time=0.31 ms`.
fn reply(line: &str) -> Option<Reply> {
    let value = |key: &str| line.split(' ').find_map(|word| word.strip_prefix(key));
    let milliseconds: f64 = value("time=")?.parse().ok()?;
    Some(Reply {
        sequence: value("icmp_seq=")?.parse().ok()?,
        ttl: value("ttl=")?.parse().ok()?,
        rtt: Duration::try_from_secs_f64(milliseconds / 1000.0).ok()?,
    })
}

fn is_trouble(line: &str) -> bool {
    ["From ", "ping: ", "wrong data"].iter().any(|start| line.starts_with(start))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn understands_answers() {
        let stdout = "PING 10.42.7.2 (10.42.7.2) 56(84) bytes of data.\n\
            64 bytes from 10.42.7.2: icmp_seq=1 ttl=60 time=0.500 ms\n\
            64 bytes from 10.42.7.2: icmp_seq=3 ttl=60 time=1.50 ms\n\n\
            --- 10.42.7.2 ping statistics ---\n\
            3 packets transmitted, 2 received, 33.3333% packet loss, time 2003ms\n\
            rtt min/avg/max/mdev = 0.500/1.000/1.500/0.500 ms\n";
        let report = PingReport::parse(stdout, "").unwrap();
        assert_eq!((report.sent, report.received), (3, 2));
        assert_eq!(report.rtt, Some(Duration::from_millis(1)));
        let seen: Vec<_> = report.replies.iter().map(|reply| (reply.sequence, reply.ttl)).collect();
        assert_eq!(seen, [(1, 60), (3, 60)]);
        assert!(report.errors.is_empty());
        assert!(!report.complete());
    }

    #[test]
    fn collects_errors_of_routers_and_of_the_own_kernel() {
        let stdout = "PING 10.42.7.2 (10.42.7.2) 1472(1500) bytes of data.\n\
            From 10.42.1.1 icmp_seq=1 Frag needed and DF set (mtu = 1400)\n\n\
            --- 10.42.7.2 ping statistics ---\n\
            2 packets transmitted, 0 received, +2 errors, 100% packet loss, time 1001ms\n\npipe 2\n";
        let stderr = "ping: local error: message too long, mtu=1400\n";
        let report = PingReport::parse(stdout, stderr).unwrap();
        assert_eq!((report.sent, report.received, report.rtt), (2, 0, None));
        assert_eq!(report.errors.len(), 2);
        assert!(report.errors[0].contains("mtu = 1400"), "{:?}", report.errors);
        assert!(report.errors[1].contains("mtu=1400"), "{:?}", report.errors);
    }

    #[test]
    fn a_ping_that_never_began_is_an_error() {
        let error = PingReport::parse("", "ping: connect: Network is unreachable\n").unwrap_err();
        assert_eq!(error.to_string(), "ping: connect: Network is unreachable");
    }

    #[test]
    fn options_become_arguments() {
        let options =
            PingOptions { ttl: Some(1), size: Some(1444), df: true, ..PingOptions::default() };
        let line = arguments("10.42.7.2".parse().unwrap(), &options).join(" ");
        assert_eq!(line, "-n -c3 -i0.1 -W1 -t1 -s1444 -Mdo 10.42.7.2");
    }
}
