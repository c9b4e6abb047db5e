//! Removing labs that were kept, or whose owner was killed.

use std::fmt;
use std::fs;
use std::path::PathBuf;

use anyhow::bail;

use super::process::ProcessId;
use super::record::{self, Record};
use super::{GRACE, join_failures, require_root};
use crate::netns;
use crate::output::joined;

/// What was removed of one lab.
#[derive(Debug)]
pub(super) struct Removed {
    id: String,
    daemons: Vec<i32>,
    namespaces: Vec<String>,
    directory: Option<PathBuf>,
}

impl fmt::Display for Removed {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "removed the lab {}", self.id)?;
        if !self.daemons.is_empty() {
            write!(f, "\n  daemons (pid): {}", joined(&self.daemons, ", "))?;
        }
        if !self.namespaces.is_empty() {
            write!(f, "\n  network namespaces: {}", self.namespaces.join(", "))?;
        }
        if let Some(directory) = &self.directory {
            write!(f, "\n  directory: {}", directory.display())?;
        }
        Ok(())
    }
}

/// The labs that [`down()`] would remove: all but those that still run under their owner.
///
/// # Errors
/// A record cannot be read.
pub(super) fn abandoned() -> anyhow::Result<Vec<String>> {
    let mut abandoned = Vec::new();
    for id in record::ids()? {
        if !Record::load(&id)?.is_in_use() {
            abandoned.push(id);
        }
    }
    Ok(abandoned)
}

/// Removes one lab by its record, and nothing else.
///
/// # Errors
/// There is no such lab, we are not root, or it still runs under its owner; or parts could not be removed: all of
/// them are named, and the record stays for another try.
pub(super) fn down(id: &str) -> anyhow::Result<Removed> {
    if !record::ids()?.iter().any(|known| known == id) {
        bail!("there is no lab {id}");
    }
    require_root()?;
    let record = Record::load(id)?;
    if let (true, Some(owner)) = (record.is_in_use(), record.owner) {
        bail!("the lab {id} runs under process {}; end that one instead", owner.pid());
    }
    let mut removed =
        Removed { id: id.to_owned(), daemons: vec![], namespaces: vec![], directory: None };
    let mut failures = Vec::new();
    end_daemons(&record.daemons, &mut removed, &mut failures);
    for name in record.namespaces.into_iter().filter(|name| netns::exists(name)) {
        match netns::delete(&name) {
            Ok(()) => removed.namespaces.push(name),
            Err(error) => failures.push(error),
        }
    }
    if record.directory.exists() {
        match fs::remove_dir_all(&record.directory) {
            Ok(()) => removed.directory = Some(record.directory),
            Err(error) => failures.push(error.into()),
        }
    }
    if failures.is_empty() {
        failures.extend(Record::delete(id).err());
    }
    join_failures(&format!("removing the lab {id}"), failures)?;
    Ok(removed)
}

fn end_daemons(daemons: &[ProcessId], removed: &mut Removed, failures: &mut Vec<anyhow::Error>) {
    for daemon in daemons {
        match daemon.end(GRACE) {
            Ok(true) => removed.daemons.push(daemon.pid()),
            Ok(false) => {}
            Err(error) => failures.push(error),
        }
    }
}
