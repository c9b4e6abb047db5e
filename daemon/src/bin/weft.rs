//! weft, the operator's command.

use std::io;
use std::process::ExitCode;

use clap::{CommandFactory, Parser, Subcommand};
use weft_daemon::bundle::{self, BundleArgs};
use weft_daemon::cleanup::{self, CleanupArgs};
use weft_daemon::cni::{self, CniArgs};
use weft_daemon::directories::Directories;
use weft_daemon::docker_opts::{self, DockerOptsArgs};
use weft_daemon::doctor::{self, DoctorArgs};
use weft_daemon::generate::{self, GenerateArgs};
use weft_daemon::lab::{self, LabArgs};
use weft_daemon::log_level_command::{self, LogLevelArgs};
use weft_daemon::output::{Plain, is_closed, plain};
use weft_daemon::ping_peer::{self, PingPeerArgs};
use weft_daemon::registry_command::{self, RegistryArgs};
use weft_daemon::status_command::{self, StatusArgs};
use weft_daemon::top::{self, TopArgs};
use weft_daemon::trace::{self, TraceArgs};

/// What a shell reports of a program that SIGPIPE ended, as it ends most.
const PIPE_CLOSED: u8 = 128 + 13;

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

fn main() -> ExitCode {
    let Cli { directories, command } = Cli::parse();
    let out = &mut Plain::new(io::stdout().lock());
    let done = |()| ExitCode::SUCCESS;
    let outcome = match command {
        Command::Status(arguments) => status_command::run(&arguments, &directories, out),
        Command::Doctor(arguments) => doctor::run(&arguments, &directories, out),
        Command::PingPeer(arguments) => ping_peer::run(&arguments, &directories, out),
        Command::Top(arguments) => top::run(&arguments, &directories, out).map(done),
        Command::Trace(arguments) => trace::run(&arguments, &directories, out),
        Command::LogLevel(arguments) => {
            log_level_command::run(&arguments, &directories, out).map(done)
        }
        Command::SupportBundle(arguments) => bundle::run(&arguments, &directories, out).map(done),
        Command::Generate(arguments) => generate::run(&arguments, Cli::command()).map(done),
        Command::Lab(arguments) => lab::run(&arguments, out),
        Command::Registry(arguments) => {
            registry_command::run(&arguments, &directories, out).map(done)
        }
        Command::DockerOpts(arguments) => docker_opts::run(&arguments).map(done),
        Command::Cni(arguments) => cni::run(&arguments, out).map(done),
        Command::Cleanup(arguments) => cleanup::run(&arguments, &directories, out),
    };
    outcome.unwrap_or_else(|error| {
        if is_closed(&error) {
            return ExitCode::from(PIPE_CLOSED);
        }
        eprintln!("weft: {}", plain(&format!("{error:#}")));
        ExitCode::FAILURE
    })
}
