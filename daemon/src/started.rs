//! What a running daemon was started with.

use std::ffi::{OsStr, OsString};
use std::fs;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use anyhow::ensure;

use crate::flags::{self, Settings};

/// What the flags of a process come to, from its command line and its environment (`proc_pid_cmdline(5)`).
///
/// # Errors
/// They cannot be read, which only root and its own user may, or are none of weftd's; or their files are not
/// ours, as those of a daemon in a container.
pub(crate) fn settings(pid: u32) -> anyhow::Result<Settings> {
    let root = |path: PathBuf| fs::metadata(path).map(|found| (found.dev(), found.ino()));
    // A password of ours must not go where somebody in a container says.
    ensure!(
        root(of(pid, "root"))? == root("/".into())?,
        "its files are in another root directory than ours, as in a container"
    );
    let words = |file: &str| -> anyhow::Result<Vec<OsString>> {
        let text = fs::read(of(pid, file))?;
        let text = text.strip_suffix(b"\0").unwrap_or(&text);
        Ok(text.split(|byte| *byte == 0).map(|word| OsStr::from_bytes(word).to_owned()).collect())
    };
    let (command, variables) = (words("cmdline")?, words("environ")?);
    // It has ended, and nobody has waited for it yet.
    ensure!(command.iter().any(|word| !word.is_empty()), "this process has no command line");
    let variable = |name: &str| {
        let value = |entry: &OsString| {
            let rest = entry.as_bytes().strip_prefix(name.as_bytes())?.strip_prefix(b"=")?;
            Some(OsStr::from_bytes(rest).to_owned())
        };
        variables.iter().find_map(value)
    };
    Ok(flags::parse(command, variable)?.settings()?)
}

/// Whether a process lives in another network namespace than we do; only root sees others'.
pub(crate) fn is_elsewhere(pid: u32) -> bool {
    let namespace = |path: PathBuf| fs::read_link(path).ok();
    namespace(of(pid, "ns/net"))
        .is_some_and(|its| Some(its) != namespace("/proc/self/ns/net".into()))
}

fn of(pid: u32, file: &str) -> PathBuf {
    Path::new("/proc").join(pid.to_string()).join(file)
}
