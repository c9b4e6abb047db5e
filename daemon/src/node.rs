//! Who this daemon is: an id that outlives restarts, and a claim that no second daemon on this
//! file system can make.
//!
//! Several daemons may share a state and a run directory (one for each network, say), so the names
//! of their files carry a hash of what tells them apart.

use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::net::IpAddr;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use anyhow::{Context, bail};
use rustix::fs::{FlockOperation, flock};
use sha2::{Digest, Sha256};
use weft_control::file;

/// This node.
#[derive(Debug)]
pub(crate) struct Node {
    /// 32 hexadecimal digits, made once.
    pub(crate) id: String,
    pub(crate) files: NodeFiles,
    /// Held as long as the daemon runs.
    lock: File,
}

/// The files of the daemon that uses one registry under one public address.
#[derive(Debug)]
pub(crate) struct NodeFiles {
    id: PathBuf,
    pub(crate) lock: PathBuf,
    /// Where it answers for its state.
    pub(crate) socket: PathBuf,
    /// Where it keeps what the registry last said.
    pub(crate) last_known: PathBuf,
    /// Where it keeps what it has made elsewhere.
    pub(crate) made: PathBuf,
}

/// What the names of files in the state directory begin with.
pub(crate) const STATE_FILES: [&str; 4] = [ID_FILES, LAST_KNOWN_FILES, MADE_FILES, CONFIG_FILES];
const ID_FILES: &str = "node-";
pub(crate) const LAST_KNOWN_FILES: &str = "last-known-";
pub(crate) const MADE_FILES: &str = "made-";
pub(crate) const CONFIG_FILES: &str = "config-";
/// The same in the run directory.
pub(crate) const RUN_FILES: &str = "weftd-";

impl NodeFiles {
    /// In these directories.
    pub(crate) fn of(state_dir: &Path, run_dir: &Path, registry: &str, public_ip: IpAddr) -> Self {
        let mark = mark(&format!("{registry}\n{public_ip}"));
        Self {
            id: state_dir.join(format!("{ID_FILES}{mark}")),
            lock: run_dir.join(format!("{RUN_FILES}{mark}.lock")),
            socket: run_dir.join(format!("{RUN_FILES}{mark}.sock")),
            last_known: state_dir.join(format!("{LAST_KNOWN_FILES}{mark}.json")),
            made: state_dir.join(format!("{MADE_FILES}{mark}.json")),
        }
    }

    fn make_directories(&self) -> anyhow::Result<()> {
        for (file, flag) in [(&self.id, "--state-dir"), (&self.lock, "--run-dir")] {
            let dir = file.parent().unwrap_or(Path::new("."));
            fs::create_dir_all(dir)
                .with_context(|| format!("cannot make {}; see {flag}", dir.display()))?;
        }
        Ok(())
    }
}

impl Node {
    /// Claims the identity that these files stand for; their directories are made if missing.
    ///
    /// # Errors
    /// Another daemon runs with this identity, or a directory cannot be written to.
    pub(crate) fn claim(files: NodeFiles) -> anyhow::Result<Self> {
        files.make_directories()?;
        let lock = take_lock(&files.lock)?;
        let id = load_or_make_id(&files.id)?;
        Ok(Self { id, files, lock })
    }

    /// Goes on as the same node under another public address, and so by files of other names. No file
    /// of the state directory needs room for that: a full disk keeps no node from moving.
    ///
    /// # Errors
    /// Another daemon runs with that identity, or the run directory cannot be written to; the old names
    /// then stand.
    pub(crate) fn move_to(&mut self, files: NodeFiles) -> anyhow::Result<()> {
        files.make_directories()?;
        let lock = take_lock(&files.lock)?;
        let old = std::mem::replace(&mut self.files, files);
        // Held until its file is gone.
        let _former = std::mem::replace(&mut self.lock, lock);
        for (outcome, path) in [
            (fs::rename(&old.id, &self.files.id), &old.id),
            (fs::rename(&old.last_known, &self.files.last_known), &old.last_known),
            (fs::rename(&old.made, &self.files.made), &old.made),
            (fs::remove_file(&old.lock), &old.lock),
        ] {
            if let Err(error) = outcome
                && error.kind() != io::ErrorKind::NotFound
            {
                tracing::warn!("cannot move or remove {}: {error}", path.display());
            }
        }
        Ok(())
    }
}

/// Where the network config of a registry is kept, for all daemons that use it.
pub(crate) fn config_path(state_dir: &Path, registry: &str) -> PathBuf {
    state_dir.join(format!("{CONFIG_FILES}{}.json", mark(registry)))
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
    let mut lock = file::open_private(path).with_context(unusable)?;
    if let Err(pid) = hold(&mut lock) {
        bail!("another weftd (pid {pid}) runs with this registry and public IP; stop it first");
    }
    // Whoever held it may have removed it between our two steps: then it keeps nobody out.
    if !is_at(&lock, path).with_context(unusable)? {
        return take_lock(path);
    }
    lock.set_len(0).with_context(unusable)?;
    writeln!(lock, "{}", std::process::id()).with_context(unusable)?;
    Ok(lock)
}

/// Keeps a daemon with this lock file from starting, as long as what is returned lives; `None` if
/// there is no such file.
///
/// # Errors
/// One runs, or the file cannot be read.
pub(crate) fn keep_out(path: &Path) -> anyhow::Result<Option<File>> {
    let mut lock = match File::open(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        opened => opened.with_context(|| format!("cannot read {}", path.display()))?,
    };
    if let Err(pid) = hold(&mut lock) {
        bail!("weftd runs (pid {pid}); stop it first");
    }
    Ok(Some(lock))
}

/// The error is the process id of the daemon that has it.
fn hold(lock: &mut File) -> Result<(), String> {
    if flock(&*lock, FlockOperation::NonBlockingLockExclusive).is_ok() {
        return Ok(());
    }
    let mut pid = String::new();
    // Only to name the other one; an unreadable number changes nothing.
    let _ = lock.read_to_string(&mut pid);
    Err(pid.trim().to_owned())
}

/// Whether the path still leads to this file.
fn is_at(file: &File, path: &Path) -> io::Result<bool> {
    let ours = file.metadata()?;
    match fs::metadata(path) {
        Ok(found) => Ok((found.dev(), found.ino()) == (ours.dev(), ours.ino())),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(false),
        Err(error) => Err(error),
    }
}

fn load_or_make_id(path: &Path) -> anyhow::Result<String> {
    let unusable = || format!("cannot use {}; see --state-dir", path.display());
    match fs::read_to_string(path) {
        Ok(id) if id.len() == 32 && id.bytes().all(|byte| byte.is_ascii_hexdigit()) => {
            return Ok(id);
        }
        Ok(_) => {
            tracing::warn!("{} holds no node id; this is another node now", path.display());
        }
        Err(error) if error.kind() == io::ErrorKind::NotFound => {}
        Err(error) => return Err(error).with_context(unusable),
    }
    let mut random = [0; 16];
    File::open("/dev/urandom")
        .and_then(|mut source| source.read_exact(&mut random))
        .context("cannot read /dev/urandom")?;
    let id = hex(&random);
    file::replace(path, id.as_bytes(), file::PRIVATE).with_context(unusable)?;
    Ok(id)
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn files(dir: &Path, public_ip: &str) -> NodeFiles {
        NodeFiles::of(&dir.join("state"), &dir.join("run"), "dir:/r", public_ip.parse().unwrap())
    }

    fn claim(dir: &Path, public_ip: &str) -> anyhow::Result<Node> {
        Node::claim(files(dir, public_ip))
    }

    fn names(dir: &Path) -> Vec<String> {
        let entries = ["state", "run"].map(|name| fs::read_dir(dir.join(name)).unwrap());
        let entries = entries.into_iter().flatten();
        let mut names: Vec<String> =
            entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
        names.sort();
        names
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
    fn another_address_is_another_name_for_the_same_node() {
        let dir = tempfile::tempdir().unwrap();
        let mut node = claim(dir.path(), "192.0.2.1").unwrap();
        let id = node.id.clone();
        fs::write(&node.files.last_known, "known").unwrap();
        let neighbour = claim(dir.path(), "192.0.2.3").unwrap();
        node.move_to(files(dir.path(), "192.0.2.3")).unwrap_err();
        claim(dir.path(), "192.0.2.1").unwrap_err();
        drop(neighbour);
        for address in ["192.0.2.3", "192.0.2.2"] {
            node.move_to(files(dir.path(), address)).unwrap();
            assert_eq!(fs::read_to_string(&node.files.last_known).unwrap(), "known");
        }
        assert_eq!(names(dir.path()).len(), 3, "nothing of the old names is left");
        claim(dir.path(), "192.0.2.2").unwrap_err();
        drop(node);
        assert_eq!(claim(dir.path(), "192.0.2.2").unwrap().id, id);
    }

    #[test]
    fn a_file_that_cannot_be_moved_keeps_no_node_where_it_was() {
        let dir = tempfile::tempdir().unwrap();
        let mut node = claim(dir.path(), "192.0.2.1").unwrap();
        let moved = files(dir.path(), "192.0.2.2");
        fs::create_dir(&moved.id).unwrap();
        node.move_to(moved).unwrap();
        claim(dir.path(), "192.0.2.1").unwrap();
        let refused = claim(dir.path(), "192.0.2.2").unwrap_err().to_string();
        assert!(refused.contains("another weftd"), "{refused}");
    }

    #[test]
    fn an_id_cut_short_by_a_power_cut_is_made_anew() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("node");
        fs::write(&path, "12ab").unwrap();
        assert_eq!(load_or_make_id(&path).unwrap().len(), 32);
    }
}
