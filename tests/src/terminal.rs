//! A program on a terminal of its own, and what a person sees there.

use std::ffi::OsStr;
use std::fs::{File, OpenOptions};
use std::io::{Read, Write};
use std::num::NonZero;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::OpenOptionsExt;
use std::process::{Command, ExitStatus};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;

use anyhow::{Context, Result};
use rustix::fs::OFlags;
use rustix::pty::{OpenptFlags, grantpt, openpt, ptsname, unlockpt};
use rustix::termios::{Winsize, tcsetwinsize};
use vt100::Parser;
use weft_daemon::netns::NetNs;

use crate::{Killed, ended, until};

/// The smallest that programs have to do with.
const ROWS: NonZero<u16> = NonZero::new(24).unwrap();
const COLUMNS: NonZero<u16> = NonZero::new(80).unwrap();

/// A terminal with a program. Dropped, it takes its program along.
#[expect(missing_debug_implementations, reason = "the parser has none")]
pub struct Terminal {
    child: Killed,
    keyboard: File,
    parser: Arc<Mutex<Parser>>,
}

impl Terminal {
    /// Starts a program on it, by a command of which its name and arguments count.
    pub fn start(netns: &NetNs, command: &Command) -> Result<Self> {
        let master = openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC)?;
        grantpt(&master)?;
        unlockpt(&master)?;
        let size =
            Winsize { ws_row: ROWS.get(), ws_col: COLUMNS.get(), ws_xpixel: 0, ws_ypixel: 0 };
        tcsetwinsize(&master, size)?;
        let path = ptsname(&master, Vec::new())?;
        let mut options = OpenOptions::new();
        options.read(true).write(true).custom_flags(OFlags::NOCTTY.bits().cast_signed());
        let slave = options.open(OsStr::from_bytes(path.to_bytes()))?;
        // A program may ask for its controlling terminal, which is to be this one, not the tests'.
        let mut on_it = Command::new("setsid");
        on_it.arg("--ctty").arg(command.get_program()).args(command.get_args());
        on_it.env("TERM", "xterm").stdin(slave.try_clone()?);
        let child = netns.spawn(on_it.stdout(slave.try_clone()?).stderr(slave))?;

        let keyboard = File::from(master);
        let parser = Arc::new(Mutex::new(Parser::new(ROWS, COLUMNS, 0)));
        let (mut output, seen) = (keyboard.try_clone()?, Arc::clone(&parser));
        // Ends with the program, whose end of the line is the last.
        thread::spawn(move || {
            let mut buffer = [0; 4096];
            while let Ok(len @ 1..) = output.read(&mut buffer) {
                seen.lock().unwrap_or_else(PoisonError::into_inner).process(&buffer[..len]);
            }
        });
        Ok(Self { child: Killed(child), keyboard, parser })
    }

    /// What is to be seen now.
    pub fn screen(&self) -> String {
        self.parser.lock().unwrap_or_else(PoisonError::into_inner).screen().contents()
    }

    /// Waits until all of this is to be seen.
    pub fn shows(&self, parts: &[&str]) -> Result<()> {
        let shown = until(&format!("{parts:?} are on the screen"), || {
            let screen = self.screen();
            Ok(parts.iter().all(|part| screen.contains(part)))
        });
        shown.with_context(|| format!("on the screen is:\n{}", self.screen()))
    }

    /// Presses keys.
    pub fn press(&mut self, keys: &str) -> Result<()> {
        Ok(self.keyboard.write_all(keys.as_bytes())?)
    }

    /// Waits until the program has ended.
    pub fn end(mut self) -> Result<ExitStatus> {
        ended(&mut self.child.0)
    }
}
