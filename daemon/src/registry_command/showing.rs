//! A registry's leases as people and programs read them.

use std::collections::{BTreeMap, HashMap};
use std::net::IpAddr;
use std::time::Duration;

use comfy_table::{Table, presets};
use jiff::SignedDuration;
use serde_json::{Value, json};
use weft_control::lease::{Expiry, NodeRecord, Snapshot, by_address};
use weft_control::{Lease, LeaseAttrs, LeaseKey};

use crate::output::joined;

/// The subnets of a lease, for people.
pub(super) fn shown(key: LeaseKey) -> String {
    joined(key.networks(), ", ")
}

/// What has come, changed and gone.
pub(super) fn changes<'a>(
    before: &'a BTreeMap<LeaseKey, LeaseAttrs>,
    now: &'a BTreeMap<LeaseKey, LeaseAttrs>,
) -> Vec<(&'static str, LeaseKey, &'a LeaseAttrs)> {
    let come = now.iter().filter_map(|(key, attrs)| match before.get(key) {
        None => Some(("added", *key, attrs)),
        Some(former) if former != attrs => Some(("changed", *key, attrs)),
        Some(_) => None,
    });
    let gone = before.iter().filter(|(key, _)| !now.contains_key(key));
    come.chain(gone.map(|(key, attrs)| ("removed", *key, attrs))).collect()
}

pub(super) fn addresses(attrs: &LeaseAttrs) -> String {
    joined(attrs.public_addresses(), ", ")
}

pub(super) fn owner(lease: &Lease) -> String {
    addresses(&lease.attrs)
}

/// The weft node that lives and has a lease.
fn node_with<'a>(lease: &Lease, nodes: &HashMap<IpAddr, &'a NodeRecord>) -> Option<&'a NodeRecord> {
    lease.attrs.public_addresses().find_map(|ip| nodes.get(&ip).copied())
}

pub(super) fn as_table(snapshot: &Snapshot, left: &BTreeMap<LeaseKey, Option<Duration>>) -> Table {
    let mut table = Table::new();
    table.load_preset(presets::UTF8_HORIZONTAL_ONLY);
    table.set_header(["subnet", "public IP", "backend", "weft node", "expires in"]);
    let nodes = by_address(&snapshot.nodes);
    for lease in &snapshot.leases {
        let backend = match lease.attrs.backend_type.as_str() {
            "" => "udp",
            name => name,
        };
        let node = node_with(lease, &nodes);
        let start_of = |id: &str| id.chars().take(8).collect::<String>();
        let node = node.map(|node| format!("{} ({})", node.name, start_of(&node.id)));
        let left = match (lease.expires, left.get(&lease.key).copied().flatten()) {
            (Expiry::Never, _) => "never (reserved)".to_owned(),
            (_, Some(left)) => {
                format!("{:#}", SignedDuration::from_secs(left.as_secs().cast_signed()))
            }
            (_, None) => "-".to_owned(),
        };
        let node = node.unwrap_or_else(|| "-".to_owned());
        table.add_row([shown(lease.key), owner(lease), backend.to_owned(), node, left]);
    }
    table
}

pub(super) fn as_json(snapshot: &Snapshot, left: &BTreeMap<LeaseKey, Option<Duration>>) -> Value {
    let nodes = by_address(&snapshot.nodes);
    let lease = |lease: &Lease| {
        let node = node_with(lease, &nodes);
        json!({
            "subnet": lease.key,
            "value": lease.attrs,
            "reservation": lease.expires == Expiry::Never,
            "ttl": left.get(&lease.key).copied().flatten().map(|left| left.as_secs()),
            "node": node.map(|node| json!({ "id": node.id, "name": node.name })),
        })
    };
    json!({
        "config": snapshot.config,
        "leases": snapshot.leases.iter().map(lease).collect::<Vec<_>>(),
        "skipped": snapshot.skipped,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Whoever may write to the registry chooses its name.
    #[test]
    fn a_node_id_of_any_letters_is_shown() {
        let id = "aäääää".to_owned();
        let lease = Lease {
            key: "10.3.1.0-24".parse().unwrap(),
            attrs: LeaseAttrs { public_ip: Some([192, 0, 2, 1].into()), ..LeaseAttrs::default() },
            expires: Expiry::Never,
            revision: 0,
        };
        let node: NodeRecord = serde_json::from_value(json!({
            "Id": id, "Name": "h1", "PublicIP": "192.0.2.1", "Addresses": [], "Version": "1",
            "Mtu": 1472,
        }))
        .unwrap();
        let snapshot = Snapshot { leases: vec![lease], nodes: vec![node], ..Snapshot::default() };
        let table = as_table(&snapshot, &BTreeMap::new()).to_string();
        assert!(table.contains("h1 (aäääää)"), "{table}");
    }

    #[test]
    fn changes_are_told_apart() {
        let attrs = |last: u8| LeaseAttrs {
            public_ip: Some([192, 0, 2, last].into()),
            ..LeaseAttrs::default()
        };
        let map = |leases: &[(&str, u8)]| {
            leases.iter().map(|(key, last)| (key.parse().unwrap(), attrs(*last))).collect()
        };
        let before = map(&[("10.3.1.0-24", 1), ("10.3.2.0-24", 2), ("10.3.3.0-24", 3)]);
        let now = map(&[("10.3.1.0-24", 1), ("10.3.2.0-24", 9), ("10.3.4.0-24", 4)]);
        let told: Vec<String> = changes(&before, &now)
            .into_iter()
            .map(|(change, key, attrs)| format!("{change} {key} {}", addresses(attrs)))
            .collect();
        assert_eq!(
            told,
            [
                "changed 10.3.2.0-24 192.0.2.9",
                "added 10.3.4.0-24 192.0.2.4",
                "removed 10.3.3.0-24 192.0.2.3"
            ]
        );
    }
}
