//! What a lab made, on disk, so that `weft lab down` finds it again when whoever made it is gone.

use std::fs;
use std::io::ErrorKind;
use std::path::{Path, PathBuf};

use anyhow::{Context, bail};
use serde::{Deserialize, Serialize};
use weft_control::file;

use super::process::ProcessId;

/// Where the records are, one file a lab.
const DIRECTORY: &str = "/run/weft-lab";

/// One lab's belongings. Each is entered before it is made, or, where that cannot be, at once.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct Record {
    /// The lab.
    pub(super) id: String,
    /// Who removes the lab while it runs; nobody where it was kept.
    pub(super) owner: Option<ProcessId>,
    /// Its files.
    pub(super) directory: PathBuf,
    /// Its network namespaces.
    pub(super) namespaces: Vec<String>,
    /// Its daemons.
    pub(super) daemons: Vec<ProcessId>,
}

impl Record {
    /// How the names of the lab's namespaces begin.
    pub(super) fn namespace_prefix(id: &str) -> String {
        format!("weft-{id}-")
    }

    /// How the name of the lab's directory begins.
    pub(super) fn directory_prefix(id: &str) -> String {
        format!("weft-lab-{id}-")
    }

    /// Writes the record, in place of the one before.
    pub(super) fn save(&self) -> anyhow::Result<()> {
        let path = path(&self.id);
        let text = serde_json::to_vec_pretty(self)?;
        file::replace(&path, &text, file::PUBLIC)
            .with_context(|| format!("cannot write {}", path.display()))
    }

    /// Reads the record of one lab.
    pub(super) fn load(id: &str) -> anyhow::Result<Self> {
        let path = path(id);
        let text = fs::read(&path).with_context(|| format!("cannot read {}", path.display()))?;
        let record: Self = serde_json::from_slice(&text)
            .with_context(|| format!("{} is damaged", path.display()))?;
        record.check(id).with_context(|| format!("{} is damaged", path.display()))?;
        Ok(record)
    }

    /// Whether the one who would remove the lab is still there to do it.
    pub(super) fn is_in_use(&self) -> bool {
        self.owner.is_some_and(ProcessId::runs)
    }

    /// Forgets the lab.
    pub(super) fn delete(id: &str) -> anyhow::Result<()> {
        let path = path(id);
        fs::remove_file(&path).with_context(|| format!("cannot remove {}", path.display()))
    }

    /// A record leads to removals, so it must name nothing but what labs are made of.
    fn check(&self, id: &str) -> anyhow::Result<()> {
        let prefix = Self::namespace_prefix(id);
        if let Some(foreign) = self.namespaces.iter().find(|name| !name.starts_with(&prefix)) {
            bail!("the namespace {foreign} is not one of the lab {id}");
        }
        let name = self.directory.file_name().unwrap_or_default().to_string_lossy();
        if !name.starts_with(&Self::directory_prefix(id)) {
            bail!("the directory {} is not one of the lab {id}", self.directory.display());
        }
        Ok(())
    }
}

/// The ids of all labs that have a record, sorted.
pub(super) fn ids() -> anyhow::Result<Vec<String>> {
    let entries = match fs::read_dir(DIRECTORY) {
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(Vec::new()),
        outcome => outcome.with_context(|| format!("cannot read {DIRECTORY}"))?,
    };
    let names = entries.filter_map(|entry| entry.ok()?.file_name().into_string().ok());
    let mut ids: Vec<_> =
        names.filter_map(|name| Some(name.strip_suffix(".json")?.to_owned())).collect();
    ids.sort();
    Ok(ids)
}

fn path(id: &str) -> PathBuf {
    Path::new(DIRECTORY).join(format!("{id}.json"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_record_may_name_only_its_own() {
        let record = |namespace: &str, directory: &str| Record {
            id: "abc".into(),
            owner: None,
            directory: directory.into(),
            namespaces: vec![namespace.into()],
            daemons: Vec::new(),
        };
        assert!(record("weft-abc-h1", "/tmp/weft-lab-abc-x").check("abc").is_ok());
        assert!(record("other", "/tmp/weft-lab-abc-x").check("abc").is_err());
        assert!(record("weft-abc-h1", "/tmp").check("abc").is_err());
        assert!(record("weft-abc-h1", "/tmp/weft-lab-abc-x/..").check("abc").is_err());
    }
}
