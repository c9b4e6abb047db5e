//! `weft status`: what the daemons of this host say of themselves.

use std::collections::BTreeMap;
use std::io::{self, Write};
use std::process::ExitCode;

use clap::Args;
use comfy_table::{Table, presets};
use jiff::{SignedDuration, Timestamp};

use crate::directories::Directories;
use crate::output::{Output, float, joined, short};
use crate::socket::{self, Request};
use crate::status::{PeerStatus, ProbeStatus, Status, TrafficStatus};

/// What stands where there is nothing to say.
const NONE: &str = "-";

/// Show what the daemons of this host do: lease, peers, what is wrong.
///
/// Exit status: 0 if all that run forward and nothing is wrong with them, else 1; peers that are not
/// reached, which may be down, show in the table only.
#[derive(Debug, Args)]
pub struct StatusArgs {
    /// How it is written; json is an array with one object a daemon.
    #[arg(short, long, value_enum, default_value_t)]
    output: Output,
}

/// Asks each daemon and writes the answers.
///
/// # Errors
/// No daemon runs, or one does not answer.
pub fn run(
    arguments: &StatusArgs,
    directories: &Directories,
    out: &mut dyn Write,
) -> anyhow::Result<ExitCode> {
    let answers = socket::ask_all::<Status>(&directories.run_dir, &Request::Status)?;
    let daemons = &answers.given;
    match arguments.output {
        Output::Json => writeln!(out, "{}", serde_json::to_string_pretty(daemons)?)?,
        Output::Table => {
            for (number, daemon) in daemons.iter().enumerate() {
                if number > 0 {
                    writeln!(out)?;
                }
                write_text(daemon, Timestamp::now(), out)?;
            }
        }
    }
    answers.complete()?;
    let is_well = daemons.iter().all(|daemon| daemon.ready && daemon.problems.is_empty());
    Ok(if is_well { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

/// For people.
///
/// # Errors
/// `out` cannot be written to.
pub(crate) fn write_text(daemon: &Status, now: Timestamp, out: &mut dyn Write) -> io::Result<()> {
    writeln!(
        out,
        "weftd {}, pid {}, up {}: {}",
        daemon.version,
        daemon.pid,
        ago(daemon.started, now),
        daemon.state
    )?;
    for (name, value) in facts(daemon, now) {
        if let Some(value) = value {
            writeln!(out, "  {name:<10} {value}")?;
        }
    }
    for problem in &daemon.problems {
        writeln!(out, "  {:<10} {problem}", "problem")?;
    }
    if !daemon.peers.is_empty() {
        writeln!(out, "\n{}", peers(&daemon.peers))?;
    }
    if !daemon.changes.is_empty() {
        writeln!(out, "\nLast changes")?;
    }
    for line in &daemon.changes {
        writeln!(out, "  {:>8} ago  {:<5} {}", ago(line.at, now), line.level, line.text)?;
    }
    Ok(())
}

type Fact = (&'static str, Option<String>);

fn facts(daemon: &Status, now: Timestamp) -> [Fact; 10] {
    let known = |text: &str| (!text.is_empty()).then(|| text.to_owned());
    let because = |value: Option<String>, why: &Option<String>| {
        let why = why.as_ref().map(|why| format!(" ({why})")).unwrap_or_default();
        value.map(|value| value + &why)
    };
    [
        ("node", known(&daemon.node_id)),
        ("registry", known(&daemon.registry).map(|registry| registry + &answered(daemon, now))),
        ("lease", lease(daemon, now)),
        ("backend", backend(daemon)),
        ("interface", because(interface(daemon), &daemon.interface_why)),
        ("MTU", because(daemon.mtu.map(|mtu| mtu.to_string()), &daemon.mtu_why)),
        ("I/O", daemon.io.clone()),
        ("offloads", offloads(&daemon.offloads)),
        ("firewall", firewall(daemon)),
        ("repairs", daemon.mtu.map(|_| daemon.repairs.to_string())),
    ]
}

fn answered(daemon: &Status, now: Timestamp) -> String {
    let state = if daemon.registry_readable { "" } else { "AWAY; " };
    match daemon.registry_answered {
        Some(at) => format!(" ({state}answered {} ago)", ago(at, now)),
        None => " (has not answered yet)".into(),
    }
}

fn lease(daemon: &Status, now: Timestamp) -> Option<String> {
    let since = daemon.lease_since?;
    let subnets = joined(&daemon.subnets, " and ");
    let end = match daemon.lease_expires {
        Some(end) if end < now => format!("expired {} ago", ago(end, now)),
        Some(end) => format!("expires in {}", length(end.duration_since(now))),
        None if daemon.lease_reserved => "reserved".into(),
        None => "its end is not known".into(),
    };
    Some(format!("{subnets}, held for {}, {end}", ago(since, now)))
}

fn backend(daemon: &Status) -> Option<String> {
    let device = daemon.device.as_ref().map(|name| format!(", device {name}"));
    Some(daemon.backend.clone()? + &device.unwrap_or_default())
}

fn interface(daemon: &Status) -> Option<String> {
    let public = daemon.public_ip.map(|ip| format!(", public address {ip}"));
    Some(daemon.interface.clone()? + &public.unwrap_or_default())
}

fn offloads(offloads: &BTreeMap<String, String>) -> Option<String> {
    let words: Vec<String> =
        offloads.iter().map(|(name, state)| format!("{name} {state}")).collect();
    (!words.is_empty()).then(|| words.join(", "))
}

fn firewall(daemon: &Status) -> Option<String> {
    let state = if daemon.firewall_in_place? { "in place" } else { "NOT in place" };
    let by = daemon.firewall.as_ref().map(|by| format!("{by}: ")).unwrap_or_default();
    Some(format!("{by}{state}, put back {} times", daemon.firewall_repairs))
}

fn peers(peers: &[PeerStatus]) -> Table {
    let mut table = Table::new();
    table.load_preset(presets::NOTHING);
    table.set_header([
        "peer", "address", "subnets", "way", "sent", "received", "version", "answers", "RTT",
        "loss",
    ]);
    for peer in peers {
        let name = peer.name.as_deref().unwrap_or(NONE);
        let version = peer.version.as_deref().unwrap_or(NONE);
        let [answers, rtt, loss] = probe(&peer.probe);
        let (address, subnets) = (peer.public_ip.to_string(), joined(&peer.subnets, " "));
        let bytes = |of: fn(&TrafficStatus) -> u64| {
            peer.traffic.as_ref().map_or_else(|| NONE.into(), |it| short(float(of(it))) + "B")
        };
        let (sent, received) = (bytes(|it| it.sent_bytes), bytes(|it| it.received_bytes));
        let row =
            [name, &address, &subnets, &peer.way, &sent, &received, version, &answers, &rtt, &loss];
        table.add_row(row);
    }
    table
}

/// Whether a peer answers, how fast, and how many probes were lost.
fn probe(probe: &ProbeStatus) -> [String; 3] {
    let answers = match (probe.reachable, &probe.fault) {
        (Some(true), None) => "yes".into(),
        (Some(true), Some(fault)) => format!("yes, {fault}"),
        (Some(false), Some(fault)) => format!("NO: {fault}"),
        (Some(false), None) => "NO".into(),
        (None, _) => NONE.into(),
    };
    let rtt = probe.rtt_us.map(|us| format!("{}.{:03} ms", us / 1_000, us % 1_000));
    let loss = probe.loss_percent.map(|percent| format!("{percent} %"));
    [answers, rtt.unwrap_or_else(|| NONE.into()), loss.unwrap_or_else(|| NONE.into())]
}

/// How long `then` is over.
pub(crate) fn ago(then: Timestamp, now: Timestamp) -> String {
    length(now.duration_since(then))
}

/// In the two largest units that it has.
fn length(duration: SignedDuration) -> String {
    let seconds = duration.as_secs().max(0);
    match seconds {
        0..60 => format!("{seconds}s"),
        60..3600 => format!("{}m{}s", seconds / 60, seconds % 60),
        3600..86_400 => format!("{}h{}m", seconds / 3600, seconds / 60 % 60),
        _ => format!("{}d{}h", seconds / 86_400, seconds / 3600 % 24),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lengths_are_short() {
        let written = |seconds| length(SignedDuration::from_secs(seconds));
        assert_eq!(written(-5), "0s");
        assert_eq!(written(59), "59s");
        assert_eq!(written(3_599), "59m59s");
        assert_eq!(written(86_399), "23h59m");
        assert_eq!(written(90_000), "1d1h");
    }

    #[test]
    fn a_daemon_that_waits_says_what_for() {
        let mut daemon = Status {
            version: "1.2.3".into(),
            pid: 7,
            state: "waiting for the network config: there is none".into(),
            registry: "etcd".into(),
            registry_readable: true,
            registry_answered: Some(Timestamp::UNIX_EPOCH),
            ..Status::default()
        };
        let written = |daemon: &Status| {
            let mut text = Vec::new();
            write_text(daemon, Timestamp::UNIX_EPOCH, &mut text).unwrap();
            String::from_utf8(text).unwrap()
        };
        let wanted = "weftd 1.2.3, pid 7, up 0s: waiting for the network config: there is none\n  \
                      registry   etcd (answered 0s ago)\n";
        assert_eq!(written(&daemon), wanted);
        (daemon.registry_readable, daemon.registry_answered) = (false, None);
        assert!(written(&daemon).ends_with("registry   etcd (has not answered yet)\n"));
    }

    #[test]
    fn a_lease_says_how_long_it_lasts() {
        let now = Timestamp::UNIX_EPOCH;
        let written = |expires: Option<i64>, lease_reserved| {
            let daemon = Status {
                lease_since: Some(now),
                lease_expires: expires.map(|seconds| now + SignedDuration::from_secs(seconds)),
                lease_reserved,
                ..Status::default()
            };
            lease(&daemon, now).unwrap()
        };
        assert_eq!(written(Some(90), false), ", held for 0s, expires in 1m30s");
        assert_eq!(written(Some(-90), false), ", held for 0s, expired 1m30s ago");
        assert_eq!(written(None, true), ", held for 0s, reserved");
        assert_eq!(written(None, false), ", held for 0s, its end is not known");
    }
}
