//! `weft lab` and what follows it on the command line.

use std::io::Write;
use std::process::ExitCode;

use anyhow::Context;
use clap::{Args, Subcommand};

use super::down::{abandoned, down};
use super::run::run_lab;
use super::transfer::MAX_TRANSFER;
use super::{Bytes, Cancel, Cancelled};

/// Bring up hosts in network namespaces, a weftd on each, and move traffic between all of them.
///
/// Needs root. Exit status: 0 if all pairs passed, 1 if any failed, 130 after Ctrl-C, 143 after
/// SIGTERM. Everything is removed at the end in each of these cases.
#[derive(Debug, Args)]
#[command(args_conflicts_with_subcommands = true)]
pub struct LabArgs {
    /// The backend that carries the traffic.
    #[arg(long, default_value = "udp-tun", value_parser = ["udp-tun", "udp", "vxlan", "host-gw"])]
    pub(super) backend: String,
    /// Where leases are kept: in a directory, or in an etcd of one member.
    #[arg(long, default_value = "directory", value_parser = ["directory", "etcd"])]
    pub(super) registry: String,
    /// How many hosts.
    #[arg(long, default_value_t = 3, value_parser = clap::value_parser!(u8).range(2..=32))]
    pub(super) hosts: u8,
    /// How much each transfer moves, such as 64MiB; at most 1GiB.
    #[arg(long, default_value = "64MiB", value_parser = parse_bytes)]
    pub(super) bytes: Bytes,
    /// Leave the lab up, and say how to enter it and how to remove it.
    #[arg(long)]
    pub(super) keep: bool,
    #[command(subcommand)]
    command: Option<LabCommand>,
}

#[derive(Debug, Subcommand)]
enum LabCommand {
    /// Remove labs that were kept, and nothing else.
    Down {
        /// The one lab to remove; all that were kept, if absent.
        id: Option<String>,
    },
}

/// Runs a lab, or removes those that were kept: results go to `out`, progress and reasons to stderr.
///
/// # Errors
/// The lab cannot be made or removed.
pub fn run(arguments: &LabArgs, out: &mut dyn Write) -> anyhow::Result<ExitCode> {
    if let Some(LabCommand::Down { id }) = &arguments.command {
        return remove(id.clone(), out);
    }
    let cancel = Cancel::on_signals().context("cannot listen to signals")?;
    let outcome = run_lab(arguments, &cancel, out);
    if let Err(Cancelled { signal }) = cancel.check() {
        // What a shell reports of a program that a signal ended.
        let code = u8::try_from(128 + signal).unwrap_or(u8::MAX);
        eprintln!("weft: interrupted");
        return Ok(ExitCode::from(code));
    }
    let failed = outcome?;
    if failed.is_empty() {
        return Ok(ExitCode::SUCCESS);
    }
    eprintln!("failed pairs: {}", failed.join(", "));
    Ok(ExitCode::FAILURE)
}

fn remove(id: Option<String>, out: &mut dyn Write) -> anyhow::Result<ExitCode> {
    let ids = match id {
        Some(id) => vec![id],
        None => abandoned()?,
    };
    if ids.is_empty() {
        writeln!(out, "there is no kept lab")?;
    }
    let mut status = ExitCode::SUCCESS;
    for id in ids {
        match down(&id) {
            Ok(removed) => writeln!(out, "{removed}")?,
            Err(error) => {
                eprintln!("weft: {error:#}");
                status = ExitCode::FAILURE;
            }
        }
    }
    Ok(status)
}

fn parse_bytes(text: &str) -> Result<Bytes, String> {
    let bytes: Bytes = text.parse().map_err(|error| format!("{error}"))?;
    if bytes > MAX_TRANSFER {
        return Err(format!("at most {MAX_TRANSFER}"));
    }
    Ok(bytes)
}
