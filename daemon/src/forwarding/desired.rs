//! Whom packets go to and come from, by what the registry says. Pure.

use std::borrow::Cow;
use std::collections::{BTreeSet, HashMap};
use std::net::IpAddr;

use weft_backends::{BackendKind, Desired, DesiredPeer, some};
use weft_control::lease::{Expiry, Snapshot, by_address};
use weft_control::peers::{Refusal, peers, untaken};
use weft_control::{Lease, LeaseAttrs, keeper};

use super::turn::{Tenure, Turn};
use crate::flags::Settings;

/// Everybody whose lease can be trusted, with the addresses they may send from; and who else
/// there is, with the reason.
pub(super) fn desired(
    settings: &Settings,
    kind: BackendKind,
    snapshot: &Snapshot,
    turn: &Turn,
) -> (Desired, BTreeSet<String>) {
    let Tenure { config, lease: own, former, .. } = &turn.tenure;
    let further = &turn.interface.other_addresses;
    let weft_nodes = by_address(&snapshot.nodes);
    let is_weft =
        |attrs: &LeaseAttrs| attrs.public_addresses().any(|ip| weft_nodes.contains_key(&ip));
    // udp-tun's nodes tell nothing of their backend in the lease, and flannel's may live by either of two.
    let is_udp = kind == BackendKind::UdpTun;
    let mut untaken = untaken(Some(&own.key), !is_udp, &snapshot.leases);
    untaken.retain(|_, it| !is_udp || it.attrs.same_node(&own.attrs) || is_weft(&it.attrs));
    let leases: Cow<'_, [Lease]> = if untaken.is_empty() {
        Cow::Borrowed(&snapshot.leases)
    } else {
        let lived_by = snapshot.leases.iter().filter(|it| !untaken.contains_key(&it.key));
        Cow::Owned(lived_by.cloned().collect())
    };
    let peers = peers(config, own, former, further, &leases);
    let ours = untaken.iter().filter(|(_, lease)| lease.attrs.same_node(&own.attrs));
    let ours = ours.map(|(key, _)| {
        let cure = if !keeper::is_compatible(config, key) {
            ", and the network config does not allow it".into()
        } else if own.expires == Expiry::Never {
            format!(", as is {}, by which it lives; release one of them", own.key)
        } else {
            "; restart weftd to take it".to_owned()
        };
        format!("{key} is reserved for this node{cure}")
    });
    let mut others: HashMap<IpAddr, Vec<IpAddr>> = HashMap::new();
    for record in &snapshot.nodes {
        for public in record.public_addresses() {
            others.entry(public).or_default().extend(&record.addresses);
        }
    }
    for (public, address) in &settings.peer_sources {
        others.entry(*public).or_default().push(*address);
    }
    let desired = peers.accepted.into_iter().map(|lease| {
        let publics: Vec<IpAddr> = lease.attrs.public_addresses().collect();
        let is_weft = is_weft(&lease.attrs);
        let other_addresses =
            publics.iter().filter_map(|ip| others.get(ip)).flatten().copied().collect();
        DesiredPeer { lease, other_addresses, is_weft }
    });
    let desired = Desired { lease: turn.tenure.lease.clone(), peers: desired.collect() };
    // A lease that has just been claimed may be told before the claim has ended.
    let is_told =
        |why: &Refusal| turn.tenure.lost.is_none() || !matches!(why, Refusal::OurAddress(_));
    let refused = peers.refused.iter().filter(|(_, why)| is_told(why));
    let refused = refused.map(|(key, why)| format!("lease {key} refused: {why}"));
    let skipped =
        snapshot.skipped.iter().map(|it| format!("entry {} skipped: {}", it.name, it.reason));
    (desired, some(refused).into_iter().chain(some(skipped)).chain(ours).collect())
}
