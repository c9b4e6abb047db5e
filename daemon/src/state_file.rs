//! Files in the state directory that hold what the registry last said: a daemon that starts while
//! the registry is away goes on with it.

use std::fs;
use std::io;
use std::marker::PhantomData;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, bail};
use jiff::Timestamp;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use tokio::task::{JoinHandle, spawn_blocking};
use tokio::time::timeout;
use weft_control::Lease;
use weft_control::file::{self, PRIVATE};
use weft_control::lease::Snapshot;

use crate::made::files_of;
use crate::node::LAST_KNOWN_FILES;

/// How long anybody waits for a disk that is busy, or hangs.
const PATIENCE: Duration = Duration::from_secs(2);

/// The registry as this node last saw it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct LastKnown {
    /// Our own lease.
    pub(crate) lease: Lease,
    pub(crate) snapshot: Snapshot,
    /// Where this node answers probes.
    #[serde(default)]
    pub(crate) probe_port: Option<u16>,
}

impl LastKnown {
    /// As each node that has lived by a state directory has left it there: the file, what is in it, and since
    /// when.
    ///
    /// # Errors
    /// The directory cannot be read.
    pub(crate) fn read_all(state_dir: &Path) -> anyhow::Result<Vec<(PathBuf, Self, Timestamp)>> {
        let files = files_of(state_dir, |name| name.starts_with(LAST_KNOWN_FILES))?;
        let load = |path: PathBuf| {
            let (known, since) = StateFile::new(path.clone()).load()?;
            Some((path, known, since))
        };
        Ok(files.into_iter().filter_map(load).collect())
    }
}

/// A file with one value.
#[derive(Debug)]
pub(crate) struct StateFile<T> {
    path: PathBuf,
    /// What the file has, as far as is known.
    written: Vec<u8>,
    /// Until it is known what came of it; then the file at this path has that.
    writing: Option<(PathBuf, JoinHandle<io::Result<Vec<u8>>>)>,
    value: PhantomData<T>,
}

impl<T: Serialize + DeserializeOwned> StateFile<T> {
    pub(crate) fn new(path: PathBuf) -> Self {
        Self { path, written: Vec::new(), writing: None, value: PhantomData }
    }

    /// Goes on with a file of another name. What is still being written is waited for first.
    pub(crate) fn move_to(&mut self, path: &Path) {
        if path != self.path {
            let writing = self.writing.take();
            *self = Self { writing, ..Self::new(path.to_owned()) };
        }
    }

    /// What is in it, and since when. A file that cannot be read is as good as none: it is only
    /// ever a help.
    pub(crate) fn load(&self) -> Option<(T, Timestamp)> {
        let text = fs::read(&self.path).ok()?;
        let since = fs::metadata(&self.path).and_then(|found| found.modified()).ok()?;
        let value = serde_json::from_slice(&text).inspect_err(|error| {
            tracing::warn!("cannot use {}: {error}", self.path.display());
        });
        Some((value.ok()?, since.try_into().ok()?))
    }

    /// Writes it, unless it is what the file has. Where the disk does not come round, that goes on by itself,
    /// and nothing else is written before it has ended.
    ///
    /// # Errors
    /// The directory cannot be written to, or not in time.
    pub(crate) async fn save(&mut self, value: &T) -> anyhow::Result<()> {
        let text = serde_json::to_vec(value)?;
        self.end_of_write().await?;
        if text != self.written {
            let (path, is_unknown) = (self.path.clone(), self.written.is_empty());
            let write = spawn_blocking(move || {
                if !is_unknown || fs::read(&path).ok().as_ref() != Some(&text) {
                    file::replace(&path, &text, PRIVATE)?;
                }
                Ok(text)
            });
            self.writing = Some((self.path.clone(), write));
        }
        self.end_of_write().await
    }

    async fn end_of_write(&mut self) -> anyhow::Result<()> {
        let Some((path, write)) = &mut self.writing else { return Ok(()) };
        let (is_this, path) = (*path == self.path, path.display().to_string());
        let Ok(written) = timeout(PATIENCE, write).await else {
            bail!(
                "{path} is still being written after {PATIENCE:?}; does the disk of --state-dir hang?"
            )
        };
        self.writing = None;
        let text = written?.with_context(|| format!("cannot write {path}; see --state-dir"))?;
        if is_this {
            self.written = text;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn what_was_saved_comes_back_and_garbage_does_not() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("state/last-known.json");
        let mut file: StateFile<LastKnown> = StateFile::new(path.clone());
        assert!(file.load().is_none());
        let lease: Lease = serde_json::from_str(
            r#"{"key":"10.3.1.0-24","attrs":{"PublicIP":"192.0.2.1"},"expires":"Never","revision":7}"#,
        )
        .unwrap();
        let known = LastKnown {
            lease: lease.clone(),
            snapshot: Snapshot { leases: vec![lease], ..Snapshot::default() },
            probe_port: Some(4711),
        };
        file.save(&known).await.unwrap();
        assert_eq!(file.load().unwrap().0, known);
        fs::write(&path, "{").unwrap();
        assert!(file.load().is_none());
        file.save(&known).await.unwrap();
        assert!(file.load().is_none(), "what has not changed is not written again");
    }

    /// Whoever has all of the threads that write stands for a disk that hangs.
    #[test]
    fn a_disk_that_hangs_is_not_waited_for() {
        let mut runtime = tokio::runtime::Builder::new_current_thread();
        let runtime = runtime.enable_time().max_blocking_threads(1).build().unwrap();
        let dir = tempfile::tempdir().unwrap();
        let mut file: StateFile<u8> = StateFile::new(dir.path().join("state.json"));
        runtime.block_on(async {
            let (release, hangs) = std::sync::mpsc::channel::<()>();
            spawn_blocking(move || hangs.recv());
            for value in [1, 2] {
                let late = file.save(&value).await.unwrap_err().to_string();
                assert!(late.contains("is still being written after 2s"), "{late}");
            }
            release.send(()).unwrap();
            file.save(&3).await.unwrap();
        });
        assert_eq!(file.load().unwrap().0, 3);
    }
}
