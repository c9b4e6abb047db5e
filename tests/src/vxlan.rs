//! vxlan as it shows in a host: what `ip` and `bridge` tell of devices, neighbours, forwarding entries
//! and routes, and what leases say there must be.

use std::collections::BTreeSet;
use std::fs;
use std::path::PathBuf;

use anyhow::{Context, Result};
use ipnetwork::IpNetwork;
use serde_json::{Value, json};
use weft_daemon::lab::{Lab, PingOptions};
use weft_daemon::netns::NetNs;

use crate::until;

/// Two hops, both in kernels.
const TTL_ACROSS: u8 = 62;

/// What `bridge -json` answers; nothing is an empty list.
pub fn bridge_json(netns: &NetNs, arguments: &[&str]) -> Result<Value> {
    let text = netns.tool("bridge", &[&["-json"], arguments].concat())?;
    Ok(serde_json::from_str(if text.is_empty() { "[]" } else { &text })?)
}

/// The elements of a list.
pub fn list(value: &Value) -> Result<&Vec<Value>> {
    value.as_array().context("no list")
}

/// A device, as `ip -details` tells of it.
pub fn link(netns: &NetNs, device: &str) -> Result<Value> {
    let links = netns.ip_json(&["-details", "link", "show", device])?;
    links.get(0).cloned().with_context(|| format!("no {device}"))
}

/// All that leads out of a device, a line each.
pub fn objects(netns: &NetNs, device: &str) -> Result<BTreeSet<String>> {
    let mut lines = BTreeSet::new();
    for family in ["-4", "-6"] {
        let found = netns.ip_json(&[family, "route", "show", "dev", device])?;
        for route in list(&found)?.iter().filter(|route| !route["gateway"].is_null()) {
            let (to, via, by) = (&route["dst"], &route["gateway"], &route["protocol"]);
            lines.insert(format!("route {to} via {via} proto {by} {}", route["flags"]));
        }
    }
    let found = netns.ip_json(&["neigh", "show", "dev", device, "nud", "permanent"])?;
    for neighbour in list(&found)? {
        lines.insert(format!("neighbour {} {}", neighbour["dst"], neighbour["lladdr"]));
    }
    for entry in list(&bridge_json(netns, &["fdb", "show", "dev", device])?)? {
        let (flags, state) = (&entry["flags"], &entry["state"]);
        lines.insert(format!("fdb {} {} {flags} {state}", entry["mac"], entry["dst"]));
    }
    Ok(lines)
}

/// What there must be for a peer's subnet.
pub fn wanted(subnet: IpNetwork, mac: &str, public_ip: &str) -> [String; 3] {
    let base = subnet.network();
    [
        format!(r#"route "{subnet}" via "{base}" proto "119" ["onlink"]"#),
        format!(r#"neighbour "{base}" "{mac}""#),
        format!(r#"fdb "{mac}" "{public_ip}" ["self"] "permanent""#),
    ]
}

/// Where the directory registry has the lease of a subnet.
pub fn lease_file(lab: &Lab, subnet: IpNetwork) -> Result<PathBuf> {
    Ok(lab.registry()?.join(format!("subnets/{}-{}", subnet.network(), subnet.prefix())))
}

/// Without what the directory registry adds: when it ends.
pub fn lease(lab: &Lab, subnet: IpNetwork) -> Result<Value> {
    let mut lease: Value = serde_json::from_slice(&fs::read(lease_file(lab, subnet)?)?)?;
    lease.as_object_mut().context("no object")?.remove("Expires");
    Ok(lease)
}

/// Writes a lease of vxlan into the directory registry.
pub fn write_lease(lab: &Lab, key: &str, public_ip: &str, mac: &str) -> Result<()> {
    let data = json!({"VNI": 1, "VtepMAC": mac});
    let lease = json!({"PublicIP": public_ip, "PublicIPv6": null, "BackendType": "vxlan",
        "BackendData": data});
    let subnets = lab.registry()?.join("subnets");
    fs::create_dir_all(&subnets)?;
    // Whole at once, as a registry's writers do.
    let new = lab.registry()?.join(format!("new-{key}"));
    fs::write(&new, lease.to_string())?;
    Ok(fs::rename(new, subnets.join(key))?)
}

/// Waits until all that leads out of flannel.1 is this.
pub fn are(netns: &NetNs, wanted: &BTreeSet<String>) -> Result<()> {
    until("everything is as it should be", || Ok(objects(netns, "flannel.1")? == *wanted))
        .with_context(|| format!("{:#?}, not {wanted:#?}", objects(netns, "flannel.1")))
}

/// Waits until two hosts' containers reach each other, by two kernels and nothing else.
pub fn ping_both_ways(lab: &Lab, one: usize, other: usize) -> Result<()> {
    for (from, to) in [(one, other), (other, one)] {
        until(&format!("{from} reaches {to}"), || {
            let report = lab.ping(from, to, &PingOptions::default())?;
            Ok(report.complete() && report.replies.iter().all(|reply| reply.ttl == TTL_ACROSS))
        })?;
    }
    Ok(())
}
