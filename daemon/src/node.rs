//! Who this daemon is: an id that outlives restarts, and a claim that no second daemon on this
//! file system can make.
//!
//! Several daemons may share a state and a run directory (one for each network, say), so the names
//! of their files carry a hash of what tells them apart.

use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::net::IpAddr;
use std::path::{Path, PathBuf};

use anyhow::{Context, bail};
use rustix::fs::{FlockOperation, flock};
use sha2::{Digest, Sha256};

/// This node.
#[derive(Debug)]
pub(crate) struct Node {
    /// 32 hexadecimal digits, made once.
    pub(crate) id: String,
    /// Where the daemon answers for its state.
    pub(crate) socket: PathBuf,
    /// Where it keeps what the registry last said.
    pub(crate) last_known: PathBuf,
    /// Held as long as the daemon runs.
    _lock: File,
}

impl Node {
    /// Claims the identity of (`registry`, `public_ip`) in these directories, made if missing.
    ///
    /// # Errors
    /// Another daemon runs with this identity, or a directory cannot be written to.
    pub(crate) fn claim(
        state_dir: &Path,
        run_dir: &Path,
        registry: &str,
        public_ip: IpAddr,
    ) -> anyhow::Result<Self> {
        for (dir, flag) in [(state_dir, "--state-dir"), (run_dir, "--run-dir")] {
            fs::create_dir_all(dir)
                .with_context(|| format!("cannot make {}; see {flag}", dir.display()))?;
        }
        let mark = mark(&format!("{registry}\n{public_ip}"));
        let lock = run_dir.join(format!("weftd-{mark}.lock"));
        let node = Self {
            id: load_or_make_id(&state_dir.join(format!("node-{mark}")))?,
            socket: run_dir.join(format!("weftd-{mark}.sock")),
            last_known: state_dir.join(format!("last-known-{mark}.json")),
            _lock: take_lock(&lock)?,
        };
        Ok(node)
    }
}

/// Where the network config of a registry is kept, for all daemons that use it.
pub(crate) fn config_path(state_dir: &Path, registry: &str) -> PathBuf {
    state_dir.join(format!("config-{}.json", mark(registry)))
}

/// What tells files of one thing from those of another.
fn mark(text: &str) -> String {
    hex(&Sha256::digest(text)[..6])
}

/// The host's name.
pub(crate) fn host_name() -> String {
    rustix::system::uname().nodename().to_string_lossy().into_owned()
}

fn take_lock(path: &Path) -> anyhow::Result<File> {
    let unusable = || format!("cannot write {}; see --run-dir", path.display());
    let mut lock = File::options()
        .read(true)
        .write(true)
        .create(true)
        .truncate(false)
        .open(path)
        .with_context(unusable)?;
    if flock(&lock, FlockOperation::NonBlockingLockExclusive).is_err() {
        let mut pid = String::new();
        // Only to name the other one; an unreadable number changes nothing.
        let _ = lock.read_to_string(&mut pid);
        bail!(
            "another weftd (pid {}) runs with this registry and public IP; stop it first, or give \
             this one a --run-dir of its own",
            pid.trim()
        );
    }
    lock.set_len(0).with_context(unusable)?;
    writeln!(lock, "{}", std::process::id()).with_context(unusable)?;
    Ok(lock)
}

fn load_or_make_id(path: &Path) -> anyhow::Result<String> {
    let unusable = || format!("cannot use {}; see --state-dir", path.display());
    match File::options().write(true).create_new(true).open(path) {
        Ok(mut file) => {
            let mut random = [0; 16];
            File::open("/dev/urandom")
                .and_then(|mut source| source.read_exact(&mut random))
                .context("cannot read /dev/urandom")?;
            let id = hex(&random);
            file.write_all(id.as_bytes()).and_then(|()| file.sync_all()).with_context(unusable)?;
            Ok(id)
        }
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {
            let id = fs::read_to_string(path).with_context(unusable)?;
            if id.len() == 32 && id.bytes().all(|byte| byte.is_ascii_hexdigit()) {
                return Ok(id);
            }
            // The power went before the id was on disk: nobody has seen it yet.
            fs::remove_file(path).with_context(unusable)?;
            load_or_make_id(path)
        }
        Err(error) => Err(error).with_context(unusable),
    }
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn claim(dir: &Path, public_ip: &str) -> anyhow::Result<Node> {
        let ip = public_ip.parse().unwrap();
        Node::claim(&dir.join("state"), &dir.join("run"), "dir:/r", ip)
    }

    #[test]
    fn the_id_stays_and_each_daemon_has_its_own() {
        let dir = tempfile::tempdir().unwrap();
        let first = claim(dir.path(), "192.0.2.1").unwrap().id;
        assert_eq!(claim(dir.path(), "192.0.2.1").unwrap().id, first);
        assert_ne!(claim(dir.path(), "192.0.2.2").unwrap().id, first);
    }

    #[test]
    fn one_daemon_an_identity() {
        let dir = tempfile::tempdir().unwrap();
        let held = claim(dir.path(), "192.0.2.1").unwrap();
        let refused = claim(dir.path(), "192.0.2.1").unwrap_err().to_string();
        assert!(refused.contains(&format!("pid {}", std::process::id())), "{refused}");
        drop(held);
        claim(dir.path(), "192.0.2.1").unwrap();
    }

    #[test]
    fn an_id_cut_short_by_a_power_cut_is_made_anew() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("node");
        fs::write(&path, "12ab").unwrap();
        assert_eq!(load_or_make_id(&path).unwrap().len(), 32);
    }
}
