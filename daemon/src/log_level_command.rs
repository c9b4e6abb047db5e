//! `weft log-level`: what the daemons of this host log, while they run.

use std::io::Write;

use clap::Args;

use crate::directories::Directories;
use crate::flags;
use crate::socket::{self, Request};

/// Show the levels that the daemons of this host log by, or change them until they end.
#[derive(Debug, Args)]
pub struct LogLevelArgs {
    /// As weftd's --log-level: off, error, warn, info, debug or trace; for single modules
    /// MODULE=LEVEL, separated by commas.
    #[arg(value_parser = flags::log_level)]
    levels: Option<String>,
}

/// Asks each daemon, and writes what it logs by from now on.
///
/// # Errors
/// No daemon runs, or one does not answer.
pub fn run(
    arguments: &LogLevelArgs,
    directories: &Directories,
    out: &mut dyn Write,
) -> anyhow::Result<()> {
    let request = Request::LogLevel { levels: arguments.levels.clone() };
    let answers = socket::ask_all::<String>(&directories.run_dir, &request)?;
    answers.given.iter().try_for_each(|levels| writeln!(out, "{levels}"))?;
    answers.complete()
}
