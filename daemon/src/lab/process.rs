//! Processes that outlive who started them, told apart from later ones under the same number.

use std::fs;
use std::os::fd::{AsFd, OwnedFd};
use std::time::Duration;

use anyhow::{Context, bail};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};
use serde::{Deserialize, Serialize};

use crate::usage::stat_field;

/// One process, for ever: numbers come again, but not with the same start time.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct ProcessId {
    pid: i32,
    /// Clock ticks since boot, field 22 of /proc/PID/stat (proc(5)).
    started: u64,
}

impl ProcessId {
    /// The process that has this number now.
    pub(super) fn of(pid: u32) -> anyhow::Result<Self> {
        let path = format!("/proc/{pid}/stat");
        let stat = fs::read_to_string(&path).with_context(|| format!("cannot read {path}"))?;
        let started = stat_field(&stat, 22).with_context(|| format!("cannot understand {path}"))?;
        Ok(Self { pid: i32::try_from(pid).context("no process has such a number")?, started })
    }

    /// Its number.
    pub(super) fn pid(self) -> i32 {
        self.pid
    }

    /// Whether it still runs.
    pub(super) fn runs(self) -> bool {
        matches!(self.open(), Ok(Some(process)) if !has_ended(&process, Duration::ZERO))
    }

    /// Ends it: SIGTERM, and SIGKILL where that does nothing within `grace`. Says whether there
    /// was anything to end.
    pub(super) fn end(self, grace: Duration) -> anyhow::Result<bool> {
        let Some(process) = self.open()? else {
            return Ok(false);
        };
        for signal in [Signal::TERM, Signal::KILL] {
            match pidfd_send_signal(&process, signal) {
                Err(Errno::SRCH) => return Ok(true),
                outcome => outcome.with_context(|| format!("cannot end process {}", self.pid))?,
            }
            if has_ended(&process, grace) {
                return Ok(true);
            }
        }
        bail!("process {} does not end", self.pid)
    }

    /// A handle that cannot come to mean another process; none where it is gone.
    fn open(self) -> anyhow::Result<Option<OwnedFd>> {
        let Some(pid) = Pid::from_raw(self.pid) else {
            return Ok(None);
        };
        let process = match pidfd_open(pid, PidfdFlags::empty()) {
            Err(Errno::SRCH) => return Ok(None),
            outcome => outcome.with_context(|| format!("cannot look at process {}", self.pid))?,
        };
        // Looked at after the handle was opened: if it matches, the handle is of this process.
        let matches = Self::of(self.pid.unsigned_abs()).is_ok_and(|now| now == self);
        Ok(matches.then_some(process))
    }
}

/// A pidfd becomes readable when its process ends, reaped or not (pidfd_open(2)).
fn has_ended(process: &OwnedFd, within: Duration) -> bool {
    let timeout = Timespec {
        tv_sec: i64::try_from(within.as_secs()).unwrap_or(i64::MAX),
        tv_nsec: within.subsec_nanos().into(),
    };
    let mut polled = [PollFd::from_borrowed_fd(process.as_fd(), PollFlags::IN)];
    matches!(poll(&mut polled, Some(&timeout)), Ok(1..))
}

#[cfg(test)]
mod tests {
    use std::process::Command;

    use super::*;

    #[test]
    fn ends_the_process_and_none_other_with_its_number() {
        let mut child = Command::new("sleep").arg("60").spawn().unwrap();
        let process = ProcessId::of(child.id()).unwrap();
        let earlier = ProcessId { started: process.started - 1, ..process };
        assert!(!earlier.runs());
        assert!(!earlier.end(Duration::ZERO).unwrap());
        assert!(process.runs());
        assert!(process.end(Duration::from_secs(20)).unwrap());
        assert!(!process.runs());
        child.wait().unwrap();
        assert!(!process.end(Duration::ZERO).unwrap());
    }
}
