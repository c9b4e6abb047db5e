//! Whom packets go to and come from, by what the registry says. Pure.

use std::collections::{BTreeSet, HashMap, HashSet};
use std::net::IpAddr;

use weft_backends::{BackendKind, Desired, DesiredPeer, some};
use weft_control::lease::{Expiry, Snapshot, by_address};
use weft_control::peers::{Refusal, peers};
use weft_control::{Lease, LeaseKey, keeper};

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
    let mut peers = peers(config, own, former, further, &snapshot.leases);
    let untaken = untaken(kind, own, &snapshot.leases);
    peers.accepted.retain(|lease| !untaken.contains_key(&lease.key));
    peers.refused.retain(|(key, _)| !untaken.contains_key(key));
    let ours = untaken.iter().filter(|(_, lease)| lease.attrs.same_node(&own.attrs));
    let ours = ours.map(|(key, _)| {
        if keeper::is_compatible(config, key) {
            format!("{key} is reserved for this node; restart weftd to take it")
        } else {
            format!("{key} is reserved for this node, and the network config does not allow it")
        }
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
    let weft_nodes = by_address(&snapshot.nodes);
    let desired = peers.accepted.into_iter().map(|lease| {
        let publics: Vec<IpAddr> = lease.attrs.public_addresses().collect();
        let is_weft = publics.iter().any(|ip| weft_nodes.contains_key(ip));
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

/// Reservations that nobody lives by yet: the node goes by another lease, or has not been started. Who has
/// taken one tells of its backend there, but for udp-tun's, as flannel's.
fn untaken<'a>(
    kind: BackendKind,
    own: &Lease,
    leases: &'a [Lease],
) -> HashMap<LeaseKey, &'a Lease> {
    let is_plain = |it: &&Lease| {
        it.expires == Expiry::Never && it.attrs.backend_type.is_empty() && it.key != own.key
    };
    let mut plain = leases.iter().filter(is_plain).peekable();
    if plain.peek().is_none() {
        return HashMap::new();
    }
    let leased = leases.iter().filter(|it| it.expires != Expiry::Never || it.key == own.key);
    let leased: HashSet<IpAddr> = leased.flat_map(|it| it.attrs.public_addresses()).collect();
    let lives_elsewhere = |it: &&Lease| it.attrs.public_addresses().any(|ip| leased.contains(&ip));
    let untaken = plain.filter(|it| kind != BackendKind::UdpTun || lives_elsewhere(it));
    untaken.map(|it| (it.key, it)).collect()
}

#[cfg(test)]
mod tests {
    use weft_control::LeaseAttrs;

    use super::*;

    #[test]
    fn a_reservation_is_taken_where_somebody_lives_by_it() {
        let lease = |key: &str, last: u8, backend: &str, expires: Expiry| Lease {
            key: key.parse().unwrap(),
            attrs: LeaseAttrs {
                public_ip: Some([192, 0, 2, last].into()),
                backend_type: backend.into(),
                ..LeaseAttrs::default()
            },
            expires,
            revision: 0,
        };
        let own = lease("10.3.1.0-24", 1, "", Expiry::Never);
        let leases = [
            own.clone(),
            lease("10.3.2.0-24", 1, "", Expiry::Never),
            lease("10.3.3.0-24", 2, "", Expiry::Unknown),
            lease("10.3.4.0-24", 2, "", Expiry::Never),
            lease("10.3.5.0-24", 3, "", Expiry::Never),
            lease("10.3.6.0-24", 4, "vxlan", Expiry::Never),
        ];
        let of = |kind| {
            let mut found: Vec<String> =
                untaken(kind, &own, &leases).keys().map(LeaseKey::to_string).collect();
            found.sort();
            found
        };
        assert_eq!(of(BackendKind::UdpTun), ["10.3.2.0-24", "10.3.4.0-24"]);
        assert_eq!(of(BackendKind::Vxlan), ["10.3.2.0-24", "10.3.4.0-24", "10.3.5.0-24"]);
    }
}
