//! Whom packets go to and come from, by what the registry says. Pure.

use std::collections::{BTreeSet, HashMap, HashSet};
use std::net::IpAddr;

use weft_backends::{Desired, DesiredPeer, some};
use weft_control::lease::Snapshot;
use weft_control::peers::{Refusal, peers};

use super::turn::Turn;
use crate::flags::Settings;

/// Everybody whose lease can be trusted, with the addresses they may send from; and who else
/// there is, with the reason.
pub(super) fn desired(
    settings: &Settings,
    snapshot: &Snapshot,
    turn: &Turn,
) -> (Desired, BTreeSet<String>) {
    let further = &turn.interface.other_addresses;
    let peers = peers(
        &turn.tenure.config,
        &turn.tenure.lease,
        &turn.tenure.former,
        further,
        &snapshot.leases,
    );
    let mut others: HashMap<IpAddr, Vec<IpAddr>> = HashMap::new();
    let mut weft_nodes: HashSet<IpAddr> = HashSet::new();
    for record in &snapshot.nodes {
        for public in record.public_addresses() {
            weft_nodes.insert(public);
            others.entry(public).or_default().extend(&record.addresses);
        }
    }
    for (public, address) in &settings.peer_sources {
        others.entry(*public).or_default().push(*address);
    }
    let desired = peers.accepted.into_iter().map(|lease| {
        let publics: Vec<IpAddr> = lease.attrs.public_addresses().collect();
        let is_weft = publics.iter().any(|ip| weft_nodes.contains(ip));
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
    (desired, some(refused).into_iter().chain(some(skipped)).collect())
}
