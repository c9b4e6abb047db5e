//! weftd: parses the command line, runs the daemon, and turns its end into an exit status.

use std::process::ExitCode;
use std::time::Duration;

use anyhow::Context;
use tokio::signal::unix::{SignalKind, signal};
use weft_daemon::flags::{self, Flags};
use weft_daemon::log::Log;
use weft_daemon::run::run;

/// The exit status for a command line that is wrong, as clap's and the shell's.
const MISUSE: u8 = 2;
/// How long work on other threads may hold up the end of the process.
const LAST_WORK: Duration = Duration::from_secs(1);

fn main() -> ExitCode {
    let flags = match flags::parse(std::env::args_os(), |name| std::env::var_os(name)) {
        Ok(flags) => flags,
        // Help and version: to stdout, with status 0.
        Err(answer) if answer.exit_code() == 0 => answer.exit(),
        Err(mistake) => {
            eprintln!("weftd: {}", flags::one_line(&mistake));
            return ExitCode::from(MISUSE);
        }
    };
    let log = Log::start(&flags.logging);
    match daemon(flags, log) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            tracing::error!("{error:#}");
            ExitCode::FAILURE
        }
    }
}

fn daemon(flags: Flags, log: Log) -> anyhow::Result<()> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .context("cannot start the runtime")?;
    let outcome = runtime.block_on(async {
        let mut terminate = signal(SignalKind::terminate())?;
        let mut interrupt = signal(SignalKind::interrupt())?;
        let shutdown = async move {
            tokio::select! {
                _ = terminate.recv() => {}
                _ = interrupt.recv() => {}
            }
        };
        run(flags, log, shutdown).await
    });
    runtime.shutdown_timeout(LAST_WORK);
    outcome
}
