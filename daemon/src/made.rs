//! What a daemon makes outside of its state directory, written down there for `weft cleanup`: the
//! kernel's marks tell what is weft's, but not whose of several daemons.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::Context;
use ipnetwork::IpNetwork;
use serde::{Deserialize, Serialize};
use weft_control::NetworkConfig;

use crate::flags::Settings;
use crate::node::{MADE_FILES, NodeFiles};
use crate::state_file::StateFile;

/// One daemon's.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Made {
    /// The overlay's: devices, routes and rules are for one of them.
    pub(crate) networks: Vec<IpNetwork>,
    pub(crate) subnet_file: PathBuf,
    pub(crate) lock: PathBuf,
    pub(crate) socket: PathBuf,
}

impl Made {
    /// Writes down what a daemon is about to make.
    ///
    /// # Errors
    /// The state directory cannot be written to.
    pub(crate) async fn record(
        config: &NetworkConfig,
        settings: &Settings,
        files: &NodeFiles,
    ) -> anyhow::Result<()> {
        StateFile::new(files.made.clone())
            .save(&Self {
                networks: config.networks().collect(),
                subnet_file: full(&settings.subnet_file),
                lock: full(&files.lock),
                socket: full(&files.socket),
            })
            .await
    }

    /// The networks that the daemon with these files was in when it last wrote them, and those that others
    /// are in.
    ///
    /// # Errors
    /// As for [`Made::read_all`].
    pub(crate) fn networks(
        state_dir: &Path,
        files: &NodeFiles,
    ) -> anyhow::Result<(Vec<IpNetwork>, Vec<IpNetwork>)> {
        let (mut ours, mut others) = (Vec::new(), Vec::new());
        for made in Self::read_all(state_dir)? {
            let side = if made.lock == full(&files.lock) { &mut ours } else { &mut others };
            side.extend(made.networks);
        }
        Ok((ours, others))
    }

    /// What all daemons have written down that keep their state in this directory.
    ///
    /// # Errors
    /// It cannot be read.
    pub(crate) fn read_all(state_dir: &Path) -> anyhow::Result<Vec<Self>> {
        let mut all = Vec::new();
        for path in files_of(state_dir, |name| name.starts_with(MADE_FILES))? {
            let (made, _) = StateFile::new(path.clone()).load().with_context(|| {
                format!("{} does not tell what weftd has made; remove it", path.display())
            })?;
            all.push(made);
        }
        Ok(all)
    }
}

/// For whoever reads it elsewhere.
fn full(path: &Path) -> PathBuf {
    std::path::absolute(path).unwrap_or_else(|_| path.to_owned())
}

/// The files in a directory whose names are as wanted; none if there is no such directory.
///
/// # Errors
/// It cannot be read.
pub(crate) fn files_of(
    directory: &Path,
    wanted: impl Fn(&str) -> bool,
) -> anyhow::Result<Vec<PathBuf>> {
    let context = || format!("cannot read {}", directory.display());
    let entries = match fs::read_dir(directory) {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(Vec::new()),
        entries => entries.with_context(context)?,
    };
    let mut paths = Vec::new();
    for entry in entries {
        let entry = entry.with_context(context)?;
        if entry.file_name().to_str().is_some_and(&wanted) {
            paths.push(entry.path());
        }
    }
    paths.sort();
    Ok(paths)
}
