//! The directory registry's files: reading them all, and writing one under the lock.
//!
//! Every write is a temporary file, synced, then renamed, so neither a reader nor a power cut sees
//! half of one. Names that begin with a dot are locks and temporary files.

use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};

use jiff::Timestamp;
use rustix::fs::{FlockOperation, flock, statfs};
use serde::Serialize;
use serde_json::Value;

use super::RegistryError;
use super::entries::{CONFIG, NODES, SUBNETS, brief, check_record, shown};
use super::files::{EXPIRES, Files, Loaded, load, read_limited};
use crate::file::{self, PRIVATE};
use crate::lease::{Expiry, Lease, LeaseAttrs, LeaseKey, NodeRecord, Skipped, Snapshot};

/// The directory.
#[derive(Debug)]
pub(super) struct Store {
    path: PathBuf,
    leases: Files<LeaseAttrs>,
    nodes: Files<NodeRecord>,
}

/// Everything at one moment, and when the first part of it ends.
#[derive(Debug, Default)]
pub(super) struct Scan {
    pub(super) snapshot: Snapshot,
    pub(super) next_expiry: Option<Timestamp>,
}

impl Store {
    pub(super) fn open(path: &Path) -> Result<Self, RegistryError> {
        let kind = statfs(path).map_err(|error| failed("look at", path, error.into()))?.f_type;
        let store = Self::at(path);
        match not_local(kind) {
            Some(kind) => Err(RegistryError::NotLocal { path: store.path, kind }),
            None => Ok(store),
        }
    }

    /// Makes what is missing of its directories.
    pub(super) fn make(path: &Path) -> Result<Self, RegistryError> {
        let store = Self::at(path);
        make_directory(store.subnets())?;
        make_directory(store.nodes())?;
        Self::open(path)
    }

    fn at(path: &Path) -> Self {
        let leases = Files::new(path.join(SUBNETS));
        let nodes = Files::new(path.join(NODES));
        Self { path: path.to_owned(), leases, nodes }
    }

    pub(super) fn path(&self) -> &Path {
        &self.path
    }

    pub(super) fn config_path(&self) -> PathBuf {
        self.path.join(CONFIG)
    }

    pub(super) fn subnets(&self) -> &Path {
        self.leases.directory()
    }

    pub(super) fn nodes(&self) -> &Path {
        self.nodes.directory()
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
        for (name, loaded) in self.leases.look()? {
            let key = name.parse::<LeaseKey>().map_err(|error| error.to_string());
            match key.and_then(|key| Ok((key, loaded?))) {
                Ok((key, (attrs, end))) if scan.lives(end, now) => {
                    let expires = expiry(end);
                    scan.snapshot.leases.push(Lease { key, attrs, expires, revision: 0 });
                }
                Ok(_) => {}
                Err(reason) => scan.skip(SUBNETS, &name, &reason),
            }
        }
        for (name, loaded) in self.look_at_nodes()? {
            let checked = loaded.and_then(|(node, end)| {
                check_record(&node, &name)?;
                Ok((node, end))
            });
            match checked {
                Ok((node, end)) if scan.lives(end, now) => scan.snapshot.nodes.push(node),
                Ok(_) => {}
                Err(reason) => scan.skip(NODES, &name, &reason),
            }
        }
        scan.snapshot.leases.sort_unstable_by_key(|lease| lease.key);
        scan.snapshot.nodes.sort_unstable_by(|a, b| a.id.cmp(&b.id));
        scan.snapshot.skipped.sort_unstable();
        Ok(scan)
    }

    /// Where their directory alone is missing, there are none.
    fn look_at_nodes(&self) -> Result<Vec<(String, Loaded<NodeRecord>)>, RegistryError> {
        match self.nodes.look() {
            Err(_) if !self.nodes().exists() && self.subnets().exists() => Ok(Vec::new()),
            found => found,
        }
    }

    /// Takes the lock, which every writer of the registry must hold.
    pub(super) fn lock(&self) -> Result<Locked<'_>, RegistryError> {
        let path = self.path.join(".lock");
        let file = file::open_private(&path).map_err(|source| failed("open", &path, source))?;
        flock(&file, FlockOperation::LockExclusive)
            .map_err(|error| failed("lock", &path, error.into()))?;
        Ok(Locked { store: self, _file: file })
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

    fn skip(&mut self, directory: &str, name: &str, reason: &str) {
        let name = format!("{directory}{}", shown(name));
        self.snapshot.skipped.push(Skipped { name, reason: brief(reason) });
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
        if create(&path, &entry(&lease.attrs, lease.expires.end())?)? {
            return Ok(true);
        }
        match load::<LeaseAttrs>(&path) {
            Err(reason) if path.exists() => Err(RegistryError::Unreadable { path, reason }),
            _ => Ok(false),
        }
    }

    pub(super) fn write_lease(&self, lease: &Lease) -> Result<(), RegistryError> {
        replace(&self.store.lease_path(&lease.key), &entry(&lease.attrs, lease.expires.end())?)
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
        make_directory(self.store.nodes())?;
        replace(&path, &entry(node, Some(end))?)
    }

    pub(super) fn write_config(&self, text: &str) -> Result<(), RegistryError> {
        replace(&self.store.config_path(), text)
    }

    /// Removes what has expired, so that the directory does not grow for ever.
    pub(super) fn sweep(&self) -> Result<(), RegistryError> {
        let Store { leases, nodes, .. } = self.store;
        remove_expired(leases.directory(), leases.look()?)?;
        remove_expired(nodes.directory(), self.store.look_at_nodes()?)
    }
}

fn remove_expired<T>(
    directory: &Path,
    files: Vec<(String, Loaded<T>)>,
) -> Result<(), RegistryError> {
    let now = Timestamp::now();
    for (name, loaded) in files {
        if loaded.is_ok_and(|(_, end)| end.is_some_and(|end| end <= now)) {
            remove(&directory.join(name))?;
        }
    }
    Ok(())
}

fn make_directory(path: &Path) -> Result<(), RegistryError> {
    fs::create_dir_all(path).map_err(|source| failed("make", path, source))
}

/// Whether an id can name a file of its own: none hidden, none elsewhere.
fn is_file_name(id: &str) -> bool {
    !id.is_empty() && id.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'-')
}

fn expiry(end: Option<Timestamp>) -> Expiry {
    end.map_or(Expiry::Never, Expiry::At)
}

fn entry(value: &impl Serialize, expires: Option<Timestamp>) -> Result<String, RegistryError> {
    let broken = |error: serde_json::Error| RegistryError::Task(error.to_string());
    let mut value = serde_json::to_value(value).map_err(broken)?;
    if let (Value::Object(fields), Some(end)) = (&mut value, expires) {
        fields.insert(EXPIRES.into(), end.to_string().into());
    }
    Ok(value.to_string())
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

pub(super) fn failed(action: &'static str, path: &Path, source: io::Error) -> RegistryError {
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
