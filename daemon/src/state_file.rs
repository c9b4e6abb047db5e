//! Files in the state directory that hold what the registry last said: a daemon that starts while
//! the registry is away goes on with it.

use std::fs;
use std::marker::PhantomData;
use std::path::PathBuf;

use anyhow::Context;
use jiff::Timestamp;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use tokio::task::spawn_blocking;
use weft_control::Lease;
use weft_control::file::{self, PRIVATE};
use weft_control::lease::Snapshot;

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

/// A file with one value.
#[derive(Debug)]
pub(crate) struct StateFile<T> {
    path: PathBuf,
    /// What the file has, as far as is known.
    written: Vec<u8>,
    value: PhantomData<T>,
}

impl<T: Serialize + DeserializeOwned> StateFile<T> {
    pub(crate) fn new(path: PathBuf) -> Self {
        Self { path, written: Vec::new(), value: PhantomData }
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

    /// Writes it, unless it is what the file has. A busy disk takes its time, and keeps nobody else waiting.
    ///
    /// # Errors
    /// The directory cannot be written to.
    pub(crate) async fn save(&mut self, value: &T) -> anyhow::Result<()> {
        let text = serde_json::to_vec(value)?;
        if self.written.is_empty() {
            self.written = fs::read(&self.path).unwrap_or_default();
        }
        if text != self.written {
            let path = self.path.clone();
            let write = move || file::replace(&path, &text, PRIVATE).map(|()| text);
            let context = || format!("cannot write {}; see --state-dir", self.path.display());
            self.written = spawn_blocking(write).await?.with_context(context)?;
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
}
