//! `weft status`: what the daemons of this host say of themselves.

use std::io::Write;
use std::process::ExitCode;

use clap::Args;

use crate::directories::Directories;
use crate::output::Output;
use crate::status::{self, Status};

/// Show what the daemons of this host do: lease, peers, what is wrong.
///
/// Exit status: 0 if all that run forward and have nothing to complain of, else 1.
#[derive(Debug, Args)]
pub struct StatusArgs {
    /// How it is written; json is an array with one object a daemon.
    #[arg(short, long, value_enum, default_value_t)]
    output: Output,
}

/// Asks each daemon and writes the answers.
///
/// # Errors
/// No daemon answers.
pub fn run(
    arguments: &StatusArgs,
    directories: &Directories,
    out: &mut dyn Write,
) -> anyhow::Result<ExitCode> {
    let daemons = status::read_all(&directories.run_dir)?;
    match arguments.output {
        Output::Json => writeln!(out, "{}", serde_json::to_string_pretty(&daemons)?)?,
        Output::Table => {
            for daemon in &daemons {
                write_text(daemon, out)?;
            }
        }
    }
    let is_well = |daemon: &Status| daemon.state == "forwarding" && daemon.problems.is_empty();
    Ok(if daemons.iter().all(is_well) { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

fn write_text(daemon: &Status, out: &mut dyn Write) -> std::io::Result<()> {
    let subnets: Vec<String> = daemon.subnets.iter().map(ToString::to_string).collect();
    writeln!(out, "weftd {} (pid {}): {}", daemon.version, daemon.pid, daemon.state)?;
    writeln!(out, "  subnet  {}", subnets.join(", "))?;
    writeln!(out, "  peers   {}", daemon.peers.len())?;
    daemon.problems.iter().try_for_each(|problem| writeln!(out, "  {problem}"))
}
