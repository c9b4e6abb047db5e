//! weftd: parses the command line, runs the daemon, and turns its end into an exit status.

use std::process::ExitCode;
use std::time::Duration;

use anyhow::Context;
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use tokio::signal::unix::{SignalKind, signal};
use weft_daemon::flags::{self, Flags};
use weft_daemon::log::Log;
use weft_daemon::run::run;

/// The exit status for a command line that is wrong, as clap's and the shell's.
const MISUSE: u8 = 2;
/// Files that may be open at once, where the limit can be raised so far: each worker has up to 28, and
/// flannel's units leave systemd's 1024.
const FILES: u64 = 65_536;
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
    raise_file_limit();
    match daemon(flags, log) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            tracing::error!("{error:#}");
            ExitCode::FAILURE
        }
    }
}

/// Where that is refused, a host of many cores will say what it lacks.
fn raise_file_limit() {
    let Rlimit { current, maximum } = getrlimit(Resource::Nofile);
    let wanted = maximum.map_or(FILES, |maximum| maximum.min(FILES));
    if current.is_some_and(|current| current < wanted) {
        let _ = setrlimit(Resource::Nofile, Rlimit { current: Some(wanted), maximum });
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
        let mut hangup = signal(SignalKind::hangup())?;
        let shutdown = async move {
            loop {
                tokio::select! {
                    _ = terminate.recv() => return,
                    _ = interrupt.recv() => return,
                    _ = hangup.recv() => tracing::info!(
                        "SIGHUP changes nothing: the network config is followed by itself, and flags \
                         take a restart"
                    ),
                }
            }
        };
        run(flags, log, shutdown).await
    });
    runtime.shutdown_timeout(LAST_WORK);
    outcome
}
