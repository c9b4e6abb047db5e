//! Programs that the lab started in its namespaces: weftd, etcd.

use std::env;
use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use rustix::process::{Pid, Signal, kill_process};

use super::GRACE;
use super::process::ProcessId;
use crate::netns::{NetNs, apart};

/// How often a process is asked whether it has ended.
const POLL: Duration = Duration::from_millis(5);

/// A running program; whoever drops it without stopping it leaves it running.
#[derive(Debug)]
pub(super) struct RunningChild {
    child: Child,
    id: ProcessId,
    name: String,
}

impl RunningChild {
    /// Starts a program in `netns`, its output going to the end of the file `log`.
    pub(super) fn start(netns: &NetNs, log: &Path, mut command: Command) -> anyhow::Result<Self> {
        let open = || File::options().create(true).append(true).open(log);
        let context = || format!("cannot write {}", log.display());
        let (out, err) = (open().with_context(context)?, open().with_context(context)?);
        let name = Path::new(command.get_program()).file_name().unwrap_or_default();
        let name = name.to_string_lossy().into_owned();
        let child = netns.spawn(apart(&mut command).stdout(out).stderr(err))?;
        let id = ProcessId::of(child.id())?;
        Ok(Self { child, id, name })
    }

    /// Which process it is.
    pub(super) fn id(&self) -> ProcessId {
        self.id
    }

    /// How it ended, if it has.
    pub(super) fn ended(&mut self) -> anyhow::Result<Option<ExitStatus>> {
        self.child.try_wait().with_context(|| format!("cannot wait for {}", self.id.pid()))
    }

    /// Asks it to stop.
    pub(super) fn terminate(&mut self) -> anyhow::Result<()> {
        self.signal(Signal::TERM)
    }

    /// Waits until `deadline` for it to stop, and kills it then.
    ///
    /// # Errors
    /// It had to be killed.
    pub(super) fn wait(mut self, deadline: Instant) -> anyhow::Result<ExitStatus> {
        while Instant::now() < deadline {
            if let Some(status) = self.ended()? {
                return Ok(status);
            }
            thread::sleep(POLL);
        }
        let (pid, name) = (self.id.pid(), self.name.clone());
        self.kill()?;
        bail!("a {name} (pid {pid}) did not stop within {} s and was killed", GRACE.as_secs())
    }

    /// Kills it and waits for its end.
    pub(super) fn kill(mut self) -> anyhow::Result<()> {
        self.signal(Signal::KILL)?;
        self.child.wait().with_context(|| format!("cannot wait for {}", self.id.pid()))?;
        Ok(())
    }

    pub(super) fn signal(&mut self, signal: Signal) -> anyhow::Result<()> {
        if self.ended()?.is_some() {
            return Ok(());
        }
        // Not waited for yet, so the number is still its own.
        kill_process(Pid::from_child(&self.child), signal)
            .with_context(|| format!("cannot signal {} (pid {})", self.name, self.id.pid()))
    }
}

/// `weftd`, or the usual one, with these arguments. The lab says what a daemon does.
pub(super) fn weftd(weftd: Option<&Path>, arguments: &[String]) -> anyhow::Result<Command> {
    let mut command = Command::new(weftd.map_or_else(program, |path| Ok(path.to_owned()))?);
    forget_settings(command.args(arguments));
    for (name, value) in env::vars_os() {
        let text = name.to_string_lossy();
        // What is meant for the lab's daemons: LAB_WEFT_IO=mmsg is their WEFT_IO.
        if let Some(theirs) = text.strip_prefix("LAB_WEFT_") {
            command.env(format!("WEFT_{theirs}"), value);
        }
    }
    Ok(command)
}

/// Has a command know nothing of what its caller has set for a daemon of the caller's own.
pub fn forget_settings(command: &mut Command) {
    for (name, _) in env::vars_os() {
        let text = name.to_string_lossy();
        if text.starts_with("FLANNELD_") || text.starts_with("WEFT_") || text == "NOTIFY_SOCKET" {
            command.env_remove(&name);
        }
    }
}

/// The last `count` lines of a log; what cannot be read says so.
pub(super) fn last_lines(log: &Path, count: usize) -> String {
    match fs::read(log) {
        Ok(text) => {
            let text = String::from_utf8_lossy(&text);
            let lines: Vec<_> = text.lines().collect();
            lines[lines.len().saturating_sub(count)..].join("\n")
        }
        Err(error) => format!("(cannot read {}: {error})", log.display()),
    }
}

/// The weftd to run: `$WEFTD`, or the one that was built beside this program. Test programs are
/// one directory further down.
fn program() -> anyhow::Result<PathBuf> {
    if let Some(path) = env::var_os("WEFTD") {
        return Ok(path.into());
    }
    let this = env::current_exe().context("cannot find this program's own path")?;
    let beside = this.parent().map(|directory| directory.join("weftd"));
    let above = this.parent().and_then(Path::parent).map(|directory| directory.join("weftd"));
    let candidates = [beside, above];
    let found = candidates.into_iter().flatten().find(|path| path.is_file());
    found.with_context(|| {
        format!("no weftd beside {}; build it, or name one in $WEFTD", this.display())
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_last_lines_of_a_log() {
        let dir = tempfile::tempdir().unwrap();
        let log = dir.path().join("log");
        assert!(last_lines(&log, 2).contains("cannot read"));
        fs::write(&log, "one\ntwo\nthree\n").unwrap();
        assert_eq!(last_lines(&log, 2), "two\nthree");
        assert_eq!(last_lines(&log, 9), "one\ntwo\nthree");
    }
}
