//! The directory registry's files: reading them all, and writing one under the lock.
//!
//! Every write is a temporary file, synced, then renamed, so neither a reader nor a power cut sees
//! half of one. Names that begin with a dot are locks and temporary files.

use std::collections::HashSet;
use std::fs::{self, File};
use std::io::{self, Read};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};

use jiff::Timestamp;
use rustix::fs::{FlockOperation, Mode, OFlags, flock, statfs};
use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::{Map, Value};

use super::RegistryError;
use crate::file::{self, PRIVATE};
use crate::lease::{Expiry, Lease, LeaseAttrs, LeaseKey, NodeRecord, Skipped, Snapshot};

/// No entry is longer; a file that is was not meant for us.
const FILE_LEN_MAX: u64 = 64 * 1024;

/// The key that the registry adds to each value.
const EXPIRES: &str = "Expires";

/// The directory.
#[derive(Debug)]
pub(super) struct Store {
    path: PathBuf,
    /// What earlier scans listed; see [`Store::present`].
    known: Mutex<HashSet<PathBuf>>,
}

/// Everything at one moment, and when the first part of it ends.
#[derive(Debug, Default)]
pub(super) struct Scan {
    pub(super) snapshot: Snapshot,
    pub(super) next_expiry: Option<Timestamp>,
}

impl Store {
    /// Makes the directory if it is missing.
    pub(super) fn open(path: &Path) -> Result<Self, RegistryError> {
        let store = Self { path: path.to_owned(), known: Mutex::default() };
        for dir in [store.subnets(), store.nodes()] {
            fs::create_dir_all(&dir).map_err(|source| failed("make", &dir, source))?;
        }
        let kind = statfs(path).map_err(|error| failed("look at", path, error.into()))?.f_type;
        match not_local(kind) {
            Some(kind) => Err(RegistryError::NotLocal { path: store.path, kind }),
            None => Ok(store),
        }
    }

    pub(super) fn path(&self) -> &Path {
        &self.path
    }

    pub(super) fn config_path(&self) -> PathBuf {
        self.path.join("config")
    }

    pub(super) fn subnets(&self) -> PathBuf {
        self.path.join("subnets")
    }

    pub(super) fn nodes(&self) -> PathBuf {
        self.path.join("weft/nodes")
    }

    /// Reads a whole file; `None` where there is none.
    pub(super) fn read(path: &Path) -> Result<Option<String>, RegistryError> {
        match read_limited(path) {
            Ok(text) => Ok(Some(text)),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(source) => Err(failed("read", path, source)),
        }
    }

    /// Reads everything that is there and has not expired.
    pub(super) fn scan(&self) -> Result<Scan, RegistryError> {
        let now = Timestamp::now();
        let mut scan = Scan::default();
        scan.snapshot.config = Self::read(&self.config_path())?;
        for (name, path) in self.present(&self.subnets())? {
            let lease =
                name.parse::<LeaseKey>().map_err(|error| error.to_string()).and_then(|key| {
                    let (attrs, expires) = load::<LeaseAttrs>(&path)?;
                    Ok((Lease { key, attrs, expires: expiry(expires), revision: 0 }, expires))
                });
            match lease {
                Ok((lease, end)) if scan.lives(end, now) => scan.snapshot.leases.push(lease),
                Ok(_) => {}
                // Removed while we looked: as if it had never been there.
                Err(_) if !path.exists() => {}
                Err(reason) => scan.snapshot.skipped.push(Skipped { name, reason }),
            }
        }
        for (name, path) in self.present(&self.nodes())? {
            let record = load::<NodeRecord>(&path).and_then(|(node, expires)| {
                let named = node.id == name;
                named
                    .then_some((node, expires))
                    .ok_or_else(|| "it is the record of another node id".to_owned())
            });
            match record {
                Ok((node, expires)) if scan.lives(expires, now) => scan.snapshot.nodes.push(node),
                Ok(_) => {}
                Err(_) if !path.exists() => {}
                Err(reason) => scan.snapshot.skipped.push(Skipped { name, reason }),
            }
        }
        scan.snapshot.leases.sort_unstable_by_key(|lease| lease.key);
        scan.snapshot.nodes.sort_unstable_by(|a, b| a.id.cmp(&b.id));
        scan.snapshot.skipped.sort_unstable();
        Ok(scan)
    }

    /// Takes the lock, which every writer of the registry must hold.
    pub(super) fn lock(&self) -> Result<Locked<'_>, RegistryError> {
        let path = self.path.join(".lock");
        let file = File::options().create(true).append(true).open(&path);
        let file = file.map_err(|source| failed("open", &path, source))?;
        flock(&file, FlockOperation::LockExclusive)
            .map_err(|error| failed("lock", &path, error.into()))?;
        Ok(Locked { store: self, _file: file })
    }

    /// As [`entries`], and surely all that was there before and still is: tmpfs leaves out of a long
    /// list a name that is renamed over meanwhile, and a lease being renewed must not look gone.
    fn present(&self, dir: &Path) -> Result<Vec<(String, PathBuf)>, RegistryError> {
        let mut found = entries(dir)?;
        let mut known = self.known.lock().unwrap_or_else(PoisonError::into_inner);
        let listed: HashSet<PathBuf> = found.iter().map(|(_, path)| path.clone()).collect();
        known.retain(|path| path.parent() != Some(dir) || listed.contains(path) || path.exists());
        let left_out =
            known.iter().filter(|path| path.parent() == Some(dir) && !listed.contains(*path));
        found.extend(left_out.filter_map(|path| {
            Some((path.file_name()?.to_string_lossy().into_owned(), path.clone()))
        }));
        known.extend(listed);
        Ok(found)
    }

    fn lease_path(&self, key: &LeaseKey) -> PathBuf {
        self.subnets().join(key.to_string())
    }
}

impl Scan {
    /// Whether something that ends then is still there, and if so, remembers when to look again.
    fn lives(&mut self, expires: Option<Timestamp>, now: Timestamp) -> bool {
        let Some(end) = expires else { return true };
        if end > now {
            self.next_expiry = Some(self.next_expiry.map_or(end, |next| next.min(end)));
        }
        end > now
    }
}

/// The registry, while nobody else may write to it.
#[derive(Debug)]
pub(super) struct Locked<'a> {
    store: &'a Store,
    _file: File,
}

impl Locked<'_> {
    /// The lease as it is, unless it has expired or cannot be read.
    pub(super) fn lease(&self, key: &LeaseKey) -> Option<Lease> {
        let (attrs, expires) = load::<LeaseAttrs>(&self.store.lease_path(key)).ok()?;
        let alive = expires.is_none_or(|end| end > Timestamp::now());
        alive.then_some(Lease { key: *key, attrs, expires: expiry(expires), revision: 0 })
    }

    /// Creates a lease unless a file is there already, even one put there by hand this instant, and
    /// says whether it did. A file that cannot be read is an error: nobody can tell whose it is,
    /// and whoever waits for it to go must hear why.
    pub(super) fn create_lease(&self, lease: &Lease) -> Result<bool, RegistryError> {
        let path = self.store.lease_path(&lease.key);
        if create(&path, &entry(&lease.attrs, end(lease.expires))?)? {
            return Ok(true);
        }
        match load::<LeaseAttrs>(&path) {
            Err(reason) if path.exists() => Err(RegistryError::Unreadable { path, reason }),
            _ => Ok(false),
        }
    }

    pub(super) fn write_lease(&self, lease: &Lease) -> Result<(), RegistryError> {
        replace(&self.store.lease_path(&lease.key), &entry(&lease.attrs, end(lease.expires))?)
    }

    pub(super) fn remove_lease(&self, key: &LeaseKey) -> Result<(), RegistryError> {
        remove(&self.store.lease_path(key))
    }

    pub(super) fn write_node(
        &self,
        node: &NodeRecord,
        end: Timestamp,
    ) -> Result<(), RegistryError> {
        let path = self.store.nodes().join(&node.id);
        if !is_file_name(&node.id) {
            let source = io::Error::other("a node id is letters, digits and dashes");
            return Err(failed("write", &path, source));
        }
        replace(&path, &entry(node, Some(end))?)
    }

    pub(super) fn write_config(&self, text: &str) -> Result<(), RegistryError> {
        replace(&self.store.config_path(), text)
    }

    /// Removes what has expired, so that the directory does not grow for ever.
    pub(super) fn sweep(&self) -> Result<(), RegistryError> {
        let now = Timestamp::now();
        let expired = |end: Option<Timestamp>| end.is_some_and(|end| end <= now);
        for (_, path) in entries(&self.store.subnets())? {
            if load::<LeaseAttrs>(&path).is_ok_and(|(_, end)| expired(end)) {
                remove(&path)?;
            }
        }
        for (_, path) in entries(&self.store.nodes())? {
            if load::<NodeRecord>(&path).is_ok_and(|(_, end)| expired(end)) {
                remove(&path)?;
            }
        }
        Ok(())
    }
}

/// Whether an id can name a file of its own: none hidden, none elsewhere.
fn is_file_name(id: &str) -> bool {
    !id.is_empty() && id.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'-')
}

/// Names and paths of the directory's entries.
fn entries(dir: &Path) -> Result<Vec<(String, PathBuf)>, RegistryError> {
    let mut found = Vec::new();
    for entry in fs::read_dir(dir).map_err(|source| failed("list", dir, source))? {
        let entry = entry.map_err(|source| failed("list", dir, source))?;
        let name = entry.file_name().to_string_lossy().into_owned();
        if !name.starts_with('.') {
            found.push((name, entry.path()));
        }
    }
    Ok(found)
}

/// An entry's value and its end, or why it cannot be read.
fn load<T: DeserializeOwned>(path: &Path) -> Result<(T, Option<Timestamp>), String> {
    let text = read_limited(path).map_err(|error| error.to_string())?;
    let mut fields: Map<String, Value> =
        serde_json::from_str(&text).map_err(|error| format!("not a JSON object: {error}"))?;
    let expires = match fields.remove(EXPIRES) {
        None => None,
        Some(Value::String(text)) => {
            Some(text.parse().map_err(|_| format!("{EXPIRES} is no RFC 3339 time: {text:?}"))?)
        }
        Some(other) => return Err(format!("{EXPIRES} is no RFC 3339 time: {other}")),
    };
    let value = serde_json::from_value(Value::Object(fields)).map_err(|error| error.to_string())?;
    Ok((value, expires))
}

fn expiry(end: Option<Timestamp>) -> Expiry {
    end.map_or(Expiry::Never, Expiry::At)
}

/// What a lease's file says of its end; without one it is a reservation.
fn end(expiry: Expiry) -> Option<Timestamp> {
    match expiry {
        Expiry::At(end) => Some(end),
        Expiry::Never | Expiry::Unknown => None,
    }
}

fn entry(value: &impl Serialize, expires: Option<Timestamp>) -> Result<String, RegistryError> {
    let broken = |error: serde_json::Error| RegistryError::Task(error.to_string());
    let mut value = serde_json::to_value(value).map_err(broken)?;
    if let (Value::Object(fields), Some(end)) = (&mut value, expires) {
        fields.insert(EXPIRES.into(), end.to_string().into());
    }
    Ok(value.to_string())
}

fn read_limited(path: &Path) -> io::Result<String> {
    let mut text = String::new();
    // Without NONBLOCK, opening a FIFO waits for a writer: for ever, and every scan with it.
    let flags = OFlags::RDONLY | OFlags::NONBLOCK | OFlags::CLOEXEC;
    let file = File::from(rustix::fs::open(path, flags, Mode::empty())?);
    if !file.metadata()?.is_file() {
        return Err(io::Error::other("not a file"));
    }
    file.take(FILE_LEN_MAX + 1).read_to_string(&mut text)?;
    if text.len() as u64 > FILE_LEN_MAX {
        return Err(io::Error::other(format!("longer than {FILE_LEN_MAX} bytes")));
    }
    Ok(text)
}

fn replace(path: &Path, text: &str) -> Result<(), RegistryError> {
    file::replace(path, text.as_bytes(), PRIVATE).map_err(|source| failed("write", path, source))
}

fn create(path: &Path, text: &str) -> Result<bool, RegistryError> {
    file::create(path, text.as_bytes(), PRIVATE).map_err(|source| failed("write", path, source))
}

fn remove(path: &Path) -> Result<(), RegistryError> {
    match fs::remove_file(path) {
        Err(source) if source.kind() != io::ErrorKind::NotFound => {
            Err(failed("remove", path, source))
        }
        _ => Ok(()),
    }
}

fn failed(action: &'static str, path: &Path, source: io::Error) -> RegistryError {
    RegistryError::File { action, path: path.to_owned(), source }
}

/// File systems that other hosts may write to, by the magic numbers of statfs(2).
fn not_local(kind: i64) -> Option<&'static str> {
    match kind {
        0x6969 => Some("NFS"),
        0x517b | 0xfe53_4d42 | 0xff53_4d42 => Some("SMB"),
        0x0102_1997 => Some("9p"),
        0x6573_5546 => Some("FUSE"),
        0x00c3_6400 => Some("Ceph"),
        0x5346_414f | 0x6b41_4653 => Some("AFS"),
        0x0116_1970 => Some("GFS2"),
        0x7461_636f => Some("OCFS2"),
        0x0bd0_0bd0 => Some("Lustre"),
        _ => None,
    }
}
