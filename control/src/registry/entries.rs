//! What a registry of keys and values holds below its prefix, kept entry by entry.

use std::collections::BTreeMap;

use serde::de::DeserializeOwned;

use super::RegistryError;
use crate::lease::{
    Expiry, Lease, LeaseAttrs, LeaseKey, NodeRecord, Skipped, Snapshot, TEXT_LEN_MAX,
    is_fit_to_be_shown,
};

/// The network config, below the prefix.
pub(super) const CONFIG: &str = "config";
/// Leases, by their keys.
pub(super) const SUBNETS: &str = "subnets/";
/// What weft nodes tell each other, by their ids.
pub(super) const NODES: &str = "weft/nodes/";

/// So much of an entry that cannot be read is told.
const QUOTED_LEN: usize = 200;

/// No entry is longer; one that is was not meant for us.
const VALUE_LEN_MAX: usize = 64 * 1024;

/// A prefix as Go's path.Join cleans it, which flannel makes its keys with; a slash follows. That of
/// everything is empty.
pub(super) fn clean(prefix: &str) -> String {
    let root = if prefix.starts_with('/') { "/" } else { "" };
    let parts: Vec<&str> = prefix.split('/').filter(|part| !part.is_empty()).collect();
    if parts.is_empty() { String::new() } else { format!("{root}{}", parts.join("/")) }
}

/// A value as a server is to have it.
pub(super) fn json(value: &impl serde::Serialize) -> Result<String, RegistryError> {
    serde_json::to_string(value).map_err(|error| RegistryError::Task(error.to_string()))
}

/// One entry as a server has it.
#[derive(Debug, Clone, Copy)]
pub(super) struct Entry<'a> {
    pub(super) value: &'a [u8],
    pub(super) expires: Expiry,
    pub(super) revision: u64,
}

/// All entries that mean something to us.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct Entries {
    config: Option<String>,
    leases: BTreeMap<LeaseKey, Lease>,
    nodes: BTreeMap<String, NodeRecord>,
    /// Entries that cannot be read, and why.
    skipped: BTreeMap<String, String>,
}

impl Entries {
    /// Takes in an entry that is new, or other than before. `path` is what follows the prefix and
    /// a slash.
    pub(super) fn put(&mut self, path: &str, entry: Entry<'_>) {
        self.remove(path);
        if let Err(reason) = self.try_put(path, entry) {
            self.skipped.insert(path.to_owned(), brief(&reason));
        }
    }

    fn try_put(&mut self, path: &str, entry: Entry<'_>) -> Result<(), String> {
        if path == CONFIG {
            self.config = Some(String::from_utf8_lossy(entry.value).into_owned());
        } else if let Some(name) = path.strip_prefix(SUBNETS) {
            let key: LeaseKey = name.parse().map_err(|error| format!("{error}"))?;
            let attrs: LeaseAttrs = parse(entry.value)?;
            let Entry { expires, revision, .. } = entry;
            self.leases.insert(key, Lease { key, attrs, expires, revision });
        } else if let Some(id) = path.strip_prefix(NODES) {
            let record: NodeRecord = parse(entry.value)?;
            check_record(&record, id)?;
            self.nodes.insert(record.id.clone(), record);
        }
        Ok(())
    }

    /// Takes in that an entry is gone.
    pub(super) fn remove(&mut self, path: &str) {
        self.skipped.remove(path);
        if path == CONFIG {
            self.config = None;
        } else if let Some(name) = path.strip_prefix(SUBNETS) {
            if let Ok(key) = name.parse() {
                self.leases.remove(&key);
            }
        } else if let Some(id) = path.strip_prefix(NODES) {
            self.nodes.remove(id);
        }
    }

    /// All of it, as the daemon sees it.
    pub(super) fn snapshot(&self) -> Snapshot {
        let skipped = self.skipped.iter();
        Snapshot {
            config: self.config.clone(),
            leases: self.leases.values().cloned().collect(),
            nodes: self.nodes.values().cloned().collect(),
            skipped: skipped
                .map(|(name, reason)| Skipped { name: shown(name), reason: reason.clone() })
                .collect(),
        }
    }
}

/// Whether a record is what the node of this id would write.
pub(super) fn check_record(record: &NodeRecord, id: &str) -> Result<(), &'static str> {
    if record.id != id {
        return Err("it is the record of another node id");
    }
    let mut texts = [&record.id, &record.name, &record.version].into_iter();
    if !texts.all(|text| is_fit_to_be_shown(text)) {
        return Err("its id, name or version is none that is fit to be shown");
    }
    Ok(())
}

/// The name of an entry that is not to be trusted, fit to be shown.
pub(super) fn shown(name: &str) -> String {
    name.chars().take(TEXT_LEN_MAX).flat_map(char::escape_debug).collect()
}

/// Why an entry cannot be read, which may quote all of it, on one line.
pub(super) fn brief(reason: &str) -> String {
    let plain = |letter: char| if letter.is_control() { ' ' } else { letter };
    reason.chars().take(TEXT_LEN_MAX).map(plain).collect()
}

fn parse<T: DeserializeOwned>(value: &[u8]) -> Result<T, String> {
    if value.len() > VALUE_LEN_MAX {
        return Err(format!("longer than {VALUE_LEN_MAX} bytes"));
    }
    serde_json::from_slice(value).map_err(|error| {
        let text: String = String::from_utf8_lossy(value).chars().take(QUOTED_LEN).collect();
        format!("{error} in {text:?}")
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entry(value: &str) -> Entry<'_> {
        Entry { value: value.as_bytes(), expires: Expiry::Unknown, revision: 7 }
    }

    const LEASE: &str = r#"{"PublicIP":"192.0.2.1","PublicIPv6":null}"#;

    #[test]
    fn prefixes_are_cleaned_as_flannel_does() {
        for (given, cleaned) in [
            ("/coreos.com/network", "/coreos.com/network"),
            ("/coreos.com//network/", "/coreos.com/network"),
            ("fleet", "fleet"),
            ("/", ""),
        ] {
            assert_eq!(clean(given), cleaned);
        }
    }

    #[test]
    fn what_is_shown_gives_no_commands() {
        let mut entries = Entries::default();
        let id = "ab".repeat(16);
        let node = format!(
            r#"{{"Id":"{id}","Name":"\u001b[2J","PublicIP":null,"PublicIPv6":null,"Addresses":[],
            "Version":"1","Mtu":1}}"#
        );
        entries.put(&format!("{NODES}{id}"), entry(&node));
        entries.put("subnets/\u{1b}]0;\n", entry(LEASE));
        let found = entries.snapshot();
        assert_eq!((found.nodes.len(), found.leases.len()), (0, 0));
        let names: Vec<_> = found.skipped.iter().map(|it| it.name.as_str()).collect();
        assert_eq!(names, [r"subnets/\u{1b}]0;\n", &format!("{NODES}{id}")]);
        assert!(found.skipped[1].reason.contains("fit to be shown"), "{:?}", found.skipped[1]);
        assert!(!found.skipped[0].reason.contains(char::is_control), "{:?}", found.skipped[0]);
    }

    #[test]
    fn entries_come_change_and_go() {
        let mut entries = Entries::default();
        entries.put("config", entry(r#"{"Network":"10.3.0.0/16"}"#));
        entries.put("subnets/10.3.1.0-24", entry(LEASE));
        entries.put("subnets/10.3.2.0-24", Entry { expires: Expiry::Never, ..entry(LEASE) });
        entries.put("elsewhere", entry("x"));
        let found = entries.snapshot();
        assert_eq!(found.config.as_deref(), Some(r#"{"Network":"10.3.0.0/16"}"#));
        assert_eq!((found.leases[0].expires, found.leases[0].revision), (Expiry::Unknown, 7));
        assert_eq!(found.leases[1].expires, Expiry::Never);
        assert_eq!(found.skipped, []);
        entries.remove("subnets/10.3.1.0-24");
        entries.remove("subnets/10.3.2.0-24");
        entries.remove("config");
        assert_eq!(entries, Entries::default());
    }

    #[test]
    fn what_cannot_be_read_is_named_until_it_is_mended_or_gone() {
        let mut entries = Entries::default();
        let long = format!("{LEASE}{}", " ".repeat(1 << 20));
        for (path, value) in [
            ("subnets/10.3.1.0-24", "garbage"),
            ("subnets/10.3.2.0-24", long.as_str()),
            ("subnets/everything", LEASE),
            ("weft/nodes/ab", r#"{"Id":"cd"}"#),
        ] {
            entries.put(path, entry(value));
            let skipped: Vec<_> = entries.snapshot().skipped;
            assert_eq!((skipped.len(), skipped[0].name.as_str()), (1, path));
            assert!(entries.snapshot().leases.is_empty());
            entries.remove(path);
            assert!(entries.snapshot().skipped.is_empty());
        }
        entries.put("subnets/10.3.1.0-24", entry(LEASE));
        entries.put("subnets/10.3.1.0-24", entry("{"));
        assert!(entries.snapshot().leases.is_empty(), "what it was before is no longer true");
        entries.put("subnets/10.3.1.0-24", entry(LEASE));
        assert_eq!((entries.snapshot().leases.len(), entries.snapshot().skipped.len()), (1, 0));
    }
}
