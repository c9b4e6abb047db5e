//! weft, the operator's command.

use std::io::{self, Write};
use std::process::ExitCode;

use anyhow::Context;
use clap::{Args, CommandFactory, Parser, Subcommand};
use weft_daemon::bundle::{self, BundleArgs};
use weft_daemon::cleanup::{self, CleanupArgs};
use weft_daemon::cni::{self, CniArgs};
use weft_daemon::directories::Directories;
use weft_daemon::docker_opts::{self, DockerOptsArgs};
use weft_daemon::doctor::{self, DoctorArgs};
use weft_daemon::generate::{self, GenerateArgs};
use weft_daemon::lab::{self, Bytes, Cancel, Cancelled, EtcdOptions, MAX_TRANSFER, RunOptions};
use weft_daemon::log_level_command::{self, LogLevelArgs};
use weft_daemon::output::{Plain, plain};
use weft_daemon::ping_peer::{self, PingPeerArgs};
use weft_daemon::registry_command::{self, RegistryArgs};
use weft_daemon::status_command::{self, StatusArgs};
use weft_daemon::top::{self, TopArgs};
use weft_daemon::trace::{self, TraceArgs};

/// The operator's command of weft, an overlay network for containers.
#[derive(Debug, Parser)]
#[command(name = "weft", version, arg_required_else_help = true)]
struct Cli {
    #[command(flatten)]
    directories: Directories,
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    Status(StatusArgs),
    Doctor(DoctorArgs),
    PingPeer(PingPeerArgs),
    Top(TopArgs),
    Trace(TraceArgs),
    LogLevel(LogLevelArgs),
    SupportBundle(BundleArgs),
    Lab(LabArgs),
    Registry(RegistryArgs),
    DockerOpts(DockerOptsArgs),
    Cni(CniArgs),
    Cleanup(CleanupArgs),
    #[command(hide = true)]
    Generate(GenerateArgs),
}

/// Bring up hosts in network namespaces, a weftd on each, and move traffic between all of them.
///
/// Needs root. Exit status: 0 if all pairs passed, 1 if any failed, 130 after Ctrl-C, 143 after
/// SIGTERM. Everything is removed at the end in each of these cases.
#[derive(Debug, Args)]
#[command(args_conflicts_with_subcommands = true)]
struct LabArgs {
    /// The backend that carries the traffic.
    #[arg(long, default_value = "udp-tun", value_parser = ["udp-tun", "udp", "vxlan", "host-gw"])]
    backend: String,
    /// Where leases are kept: in a directory, or in an etcd of one member.
    #[arg(long, default_value = "directory", value_parser = ["directory", "etcd"])]
    registry: String,
    /// How many hosts.
    #[arg(long, default_value_t = 3, value_parser = clap::value_parser!(u8).range(2..=32))]
    hosts: u8,
    /// How much each transfer moves, such as 64MiB; at most 1GiB.
    #[arg(long, default_value = "64MiB", value_parser = parse_bytes)]
    bytes: Bytes,
    /// Leave the lab up, and say how to enter it and how to remove it.
    #[arg(long)]
    keep: bool,
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

fn main() -> ExitCode {
    let Cli { directories, command } = Cli::parse();
    let out = &mut Plain::new(io::stdout().lock());
    let outcome = match command {
        Command::Status(arguments) => status_command::run(&arguments, &directories, out),
        Command::Doctor(arguments) => doctor::run(&arguments, &directories, out),
        Command::PingPeer(arguments) => ping_peer::run(&arguments, &directories, out),
        Command::Top(arguments) => {
            top::run(&arguments, &directories, &mut io::stdout().lock()).map(|()| ExitCode::SUCCESS)
        }
        Command::Trace(arguments) => trace::run(&arguments, &directories, out),
        Command::LogLevel(arguments) => {
            log_level_command::run(&arguments, &directories, out).map(|()| ExitCode::SUCCESS)
        }
        Command::SupportBundle(arguments) => {
            bundle::run(&arguments, &directories, out).map(|()| ExitCode::SUCCESS)
        }
        Command::Generate(arguments) => {
            generate::run(&arguments, Cli::command()).map(|()| ExitCode::SUCCESS)
        }
        Command::Lab(LabArgs { command: Some(LabCommand::Down { id }), .. }) => down(id),
        Command::Lab(arguments) => run_lab(&arguments),
        Command::Registry(arguments) => {
            registry_command::run(&arguments, &directories, out).map(|()| ExitCode::SUCCESS)
        }
        Command::DockerOpts(arguments) => docker_opts::run(&arguments).map(|()| ExitCode::SUCCESS),
        Command::Cni(arguments) => cni::run(&arguments, out).map(|()| ExitCode::SUCCESS),
        Command::Cleanup(arguments) => cleanup::run(&arguments, &directories, out),
    };
    outcome.unwrap_or_else(|error| {
        eprintln!("weft: {}", plain(&format!("{error:#}")));
        ExitCode::FAILURE
    })
}

fn run_lab(arguments: &LabArgs) -> anyhow::Result<ExitCode> {
    let cancel = Cancel::on_signals().context("cannot listen to signals")?;
    let options = RunOptions {
        backend: arguments.backend.clone(),
        etcd: EtcdOptions {
            members: usize::from(arguments.registry == "etcd"),
            ..EtcdOptions::default()
        },
        hosts: arguments.hosts.into(),
        bytes: arguments.bytes,
        keep: arguments.keep,
    };
    let outcome = lab::run(&options, &cancel, &mut io::stdout().lock());
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

fn down(id: Option<String>) -> anyhow::Result<ExitCode> {
    let ids = match id {
        Some(id) => vec![id],
        None => lab::abandoned()?,
    };
    let mut out = io::stdout().lock();
    if ids.is_empty() {
        writeln!(out, "there is no kept lab")?;
    }
    let mut status = ExitCode::SUCCESS;
    for id in ids {
        match lab::down(&id) {
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
