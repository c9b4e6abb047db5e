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

/// What a check tells of.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Of {
    Host,
    /// Of a daemon that does not forward yet it is not known, unless it is seen to be wrong.
    Overlay,
}

/// In the order in which one thing stands on another.
const CHECKS: [(&str, Of, Judge); 24] = [
    ("daemon", Of::Host, host::daemon),
    ("registry", Of::Host, registry::registry),
    ("clock", Of::Host, registry::clock),
    ("PublicIP", Of::Host, registry::public_ip),
    ("kernel", Of::Host, host::kernel),
    ("io_uring", Of::Overlay, host::io_uring),
    ("ip_forward", Of::Host, host::ip_forward),
    ("rp_filter", Of::Overlay, host::rp_filter),
    ("br_netfilter", Of::Host, firewall::br_netfilter),
    ("FORWARD", Of::Host, firewall::forward),
    ("rules", Of::Overlay, firewall::rules),
    ("firewalld", Of::Host, firewall::firewalld),
    ("Docker", Of::Overlay, firewall::docker_lets_in),
    ("interface", Of::Overlay, routing::interface),
    ("docker0", Of::Overlay, routing::bridge),
    ("routes", Of::Overlay, routing::stale_routes),
    ("overlap", Of::Overlay, routing::overlap),
    ("MAC", Of::Overlay, mac::mac),
    ("peers", Of::Overlay, peers::peers),
    ("port", Of::Overlay, peers::port),
    ("MTU", Of::Overlay, peers::mtu),
    ("offloads", Of::Overlay, peers::offloads),
    ("conntrack", Of::Host, queues::conntrack),
    ("sockets", Of::Overlay, queues::socket_buffers),
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
    let checks = (1..).zip(CHECKS).map(|(number, (name, of, check))| Numbered {
        number,
        name,
        check: judge(&seen, of, check),
    });
    Ok(Report { pid, node_id, checks: checks.collect() })
}

fn judge(seen: &Seen, of: Of, check: Judge) -> Check {
    let found = check(seen);
    let is_vain = seen.waits() && of == Of::Overlay;
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
