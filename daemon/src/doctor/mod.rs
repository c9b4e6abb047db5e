//! `weft doctor`: what keeps this host's part of the overlay from working, and how to mend it.
//!
//! First everything is seen (`seen.rs`), then each check judges what was seen and touches nothing.

mod check;
mod firewall;
mod host;
mod mac;
mod peers;
mod queues;
mod registry;
mod routing;
mod seen;

use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use clap::Args;
use serde::Serialize;

use self::check::{Check, Verdict};
use self::seen::{Absent, Daemon, Fallback, Seen};
use crate::directories::Directories;
use crate::flags::RegistryFlags;
use crate::output::Output;
use crate::socket::{self, Answered, Request};
use crate::status::Status;

/// Judges what was seen; `None` is that only a daemon could tell.
type Judge = fn(&Seen) -> Option<Check>;

/// In the order in which one thing stands on another.
const CHECKS: [(&str, Judge); 24] = [
    ("daemon", host::daemon),
    ("registry", registry::registry),
    ("clock", registry::clock),
    ("PublicIP", registry::public_ip),
    ("kernel", host::kernel),
    ("io_uring", host::io_uring),
    ("ip_forward", host::ip_forward),
    ("rp_filter", host::rp_filter),
    ("br_netfilter", firewall::br_netfilter),
    ("FORWARD", firewall::forward),
    ("rules", firewall::rules),
    ("firewalld", firewall::firewalld),
    ("Docker", firewall::docker_lets_in),
    ("interface", routing::interface),
    ("docker0", routing::bridge),
    ("routes", routing::stale_routes),
    ("overlap", routing::overlap),
    ("MAC", mac::mac),
    ("peers", peers::peers),
    ("port", peers::port),
    ("MTU", peers::mtu),
    ("offloads", peers::offloads),
    ("conntrack", queues::conntrack),
    ("sockets", queues::socket_buffers),
];

/// What is known only where a daemon forwards: of one that waits, that nothing is seen to be wrong says nothing.
const OF_FORWARDING: [&str; 13] = [
    "io_uring",
    "rp_filter",
    "rules",
    "Docker",
    "interface",
    "docker0",
    "routes",
    "overlap",
    "MAC",
    "peers",
    "port",
    "MTU",
    "offloads",
];

/// Look for what keeps this host's part of the overlay from working, and say how to mend it.
///
/// Exit status: 0 if no check fails, warnings or not; 1 if any does. Needs root. The daemon's flags
/// are read from its process; those below count while none runs.
#[derive(Debug, Args)]
pub struct DoctorArgs {
    /// How it is written; json is an array with one object a daemon.
    #[arg(short, long, value_enum, default_value_t)]
    output: Output,
    /// subnet.env, while no daemon tells where it is.
    #[arg(short = 'f', value_name = "FILE", default_value = "/run/flannel/subnet.env")]
    subnet_file: PathBuf,
    #[command(flatten)]
    registry: RegistryFlags,
}

/// All checks of one daemon.
#[derive(Debug, Serialize)]
struct Report {
    pid: Option<u32>,
    node_id: Option<String>,
    checks: Vec<Numbered>,
}

#[derive(Debug, Serialize)]
struct Numbered {
    number: usize,
    name: &'static str,
    #[serde(flatten)]
    check: Check,
}

/// Looks, judges and writes.
///
/// # Errors
/// The flags make no sense, or netlink is not to be had.
pub fn run(
    arguments: &DoctorArgs,
    directories: &Directories,
    out: &mut dyn Write,
) -> anyhow::Result<ExitCode> {
    let fallback = Fallback {
        registry: arguments.registry.settings()?,
        is_named: arguments.registry.name_any(),
        subnet_file: arguments.subnet_file.clone(),
        state_dir: directories.state_dir.clone(),
    };
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let mut reports = Vec::new();
    for daemon in daemons(&directories.run_dir) {
        reports.push(runtime.block_on(examine(daemon, &fallback))?);
    }
    // What waits for etcd has nothing more to say.
    runtime.shutdown_background();
    match arguments.output {
        Output::Json => writeln!(out, "{}", serde_json::to_string_pretty(&reports)?)?,
        Output::Table => reports.iter().try_for_each(|report| report.write(reports.len(), out))?,
    }
    let checks = reports.iter().flat_map(|report| &report.checks);
    let worst = checks.map(|it| it.check.verdict).max();
    Ok(if worst == Some(Verdict::Fail) { ExitCode::FAILURE } else { ExitCode::SUCCESS })
}

/// Every daemon that answers, and what is known of those that do not.
fn daemons(run_dir: &Path) -> Vec<Result<Daemon, Absent>> {
    let look = |(socket, answer): Answered<Status>| match answer {
        Ok(status) => Ok(Daemon::look(&socket, status)),
        Err(error) => Err(Absent::silent(&socket, &error)),
    };
    match socket::ask_each(run_dir, &Request::Status) {
        Ok(answers) => answers.into_iter().map(look).collect(),
        Err(error) => vec![Err(Absent::none(&error))],
    }
}

async fn examine(daemon: Result<Daemon, Absent>, fallback: &Fallback) -> anyhow::Result<Report> {
    let there = daemon.as_ref().ok();
    let pid = there.map(|daemon| daemon.pid.unwrap_or(daemon.status.pid));
    let node_id = there.map(|daemon| daemon.status.node_id.clone());
    let seen = Seen::look(daemon, fallback).await?;
    let checks = (1..).zip(CHECKS).map(|(number, (name, check))| Numbered {
        number,
        name,
        check: judge(&seen, name, check),
    });
    Ok(Report { pid, node_id, checks: checks.collect() })
}

fn judge(seen: &Seen, name: &str, check: Judge) -> Check {
    let found = check(seen);
    let is_vain = seen.waits() && OF_FORWARDING.contains(&name);
    let found = found.filter(|it| !is_vain || it.verdict != Verdict::Ok);
    found.unwrap_or_else(|| Check {
        verdict: Verdict::Warn,
        seen: seen.unknown().into(),
        // What it waits for is the first check's.
        cure: (!seen.waits()).then(|| seen.cure_of_silence()),
    })
}

/// "6.18.3-generic" is 6.18.
fn version(text: &str) -> Option<(u32, u32)> {
    let mut parts = text.split(['.', '-']).map(|part| part.parse().ok());
    Some((parts.next()??, parts.next()??))
}

impl Report {
    fn write(&self, reports: usize, out: &mut dyn Write) -> std::io::Result<()> {
        if let (Some(pid), 2..) = (self.pid, reports) {
            writeln!(out, "weftd (pid {pid}):")?;
        }
        for Numbered { number, name, check } in &self.checks {
            writeln!(out, "{number}. {} {name}: {}", check.verdict, check.seen)?;
            if let Some(cure) = &check.cure {
                writeln!(out, "   {cure}")?;
            }
        }
        Ok(())
    }
}
