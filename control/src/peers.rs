//! Whom packets go to and come from: everybody else's leases, but for those that could take over traffic.
//! Pure.

use std::collections::{BTreeMap, BTreeSet, HashSet};
use std::net::IpAddr;

use ipnetwork::IpNetwork;

use crate::config::NetworkConfig;
use crate::lease::{Expiry, Lease, LeaseAttrs, LeaseKey, contains};

/// The leases that may be forwarded to, and those that must not.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Peers {
    pub accepted: Vec<Lease>,
    pub refused: Vec<(LeaseKey, Refusal)>,
}

/// Why a lease is not forwarded to.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Refusal {
    #[error("it lies outside of the Network {0}")]
    OutsideNetwork(IpNetwork),
    #[error("the network config has no network of its family")]
    FamilyOff,
    #[error("it overlaps our own subnet")]
    OverlapsOurs,
    #[error("it names no address to send to")]
    NoAddress,
    #[error("packets cannot be sent to its address {0}")]
    UnusableAddress(IpAddr),
    #[error("its address {0} lies inside the overlay itself")]
    AddressInsideOverlay(IpAddr),
    #[error("it has our own address {0}: a second lease of this node, or a node with our address")]
    OurAddress(IpAddr),
    #[error("the lease {other} has {subnet} too; remove one of them")]
    Overlaps { subnet: IpNetwork, other: LeaseKey },
}

/// Sorts everybody else's leases; our own is in neither list, nor as it was `former`ly. `further`: what else
/// this host is reached by.
pub fn peers(
    config: &NetworkConfig,
    own: &Lease,
    former: &[LeaseAttrs],
    further: &[IpAddr],
    leases: &[Lease],
) -> Peers {
    let ours: HashSet<IpAddr> =
        own.attrs.public_addresses().chain(further.iter().copied()).collect();
    let mut peers = Peers::default();
    let is_ours = |lease: &Lease| lease.key == own.key && lease.is_of(&own.attrs, former);
    for lease in leases.iter().filter(|lease| !is_ours(lease)) {
        match refusal(config, own, &ours, lease) {
            Some(refusal) => peers.refused.push((lease.key, refusal)),
            None => peers.accepted.push(lease.clone()),
        }
    }
    refuse_overlaps(config, &mut peers);
    peers
}

/// Of leases that share addresses one stays, since packets cannot go both ways: those come first whose subnets
/// are as large as those that are given out, then larger ones, of equal ones the first key's. So nobody takes
/// over a part of another node's subnet, nobody has all others refused, and who is refused refuses nobody.
/// One node may have both.
fn refuse_overlaps(config: &NetworkConfig, peers: &mut Peers) {
    let is_usual = |subnet: IpNetwork| {
        config.family(subnet.is_ipv6()).is_some_and(|family| family.subnet_len == subnet.prefix())
    };
    let leases = &peers.accepted;
    let mut order: Vec<usize> = (0..leases.len()).collect();
    order.sort_by_cached_key(|at| {
        let subnets = leases[*at].key.networks();
        let lens: Vec<_> = subnets.map(|it| (!is_usual(it), it.prefix())).collect();
        (lens.iter().any(|(unusual, _)| *unusual), lens, leases[*at].key)
    });
    let mut taken = Taken::default();
    let mut lost: BTreeMap<usize, Refusal> = BTreeMap::new();
    for at in order {
        let Lease { key, attrs, .. } = &leases[at];
        let shared = key.networks().flat_map(|ours| {
            let others = taken.sharing(ours).map(move |(theirs, other)| (theirs, &leases[other]));
            let others = others
                .filter(move |(theirs, other)| *theirs == ours || !other.attrs.same_node(attrs));
            // What both have is the smaller one.
            others.map(move |(theirs, other)| {
                (if theirs.prefix() > ours.prefix() { theirs } else { ours }, other.key)
            })
        });
        if let Some((subnet, other)) = shared.min() {
            lost.insert(at, Refusal::Overlaps { subnet, other });
        } else {
            key.networks().for_each(|subnet| taken.add(subnet, at));
        }
    }
    let mut number = 0..;
    peers.accepted.retain(|lease| {
        let refusal = number.next().and_then(|number| lost.remove(&number));
        let is_accepted = refusal.is_none();
        peers.refused.extend(refusal.map(|refusal| (lease.key, refusal)));
        is_accepted
    });
}

/// Subnets that are somebody's, with the number of the lease.
#[derive(Debug, Default)]
struct Taken {
    subnets: BTreeMap<IpNetwork, usize>,
    /// The lengths that occur: few, as a rule.
    lens: BTreeSet<u8>,
}

impl Taken {
    fn add(&mut self, subnet: IpNetwork, lease: usize) {
        self.subnets.insert(subnet, lease);
        self.lens.insert(subnet.prefix());
    }

    /// Those around a subnet, and those in it.
    fn sharing(&self, subnet: IpNetwork) -> impl Iterator<Item = (IpNetwork, usize)> {
        let around = self.lens.range(..subnet.prefix()).filter_map(move |len| {
            let wide = IpNetwork::new(subnet.network(), *len).ok()?;
            let wide = IpNetwork::new(wide.network(), *len).ok()?;
            Some((wide, *self.subnets.get(&wide)?))
        });
        let within = self.subnets.range(subnet..).map(|(theirs, lease)| (*theirs, *lease));
        around.chain(within.take_while(move |(theirs, _)| contains(subnet, *theirs)))
    }
}

fn refusal(
    config: &NetworkConfig,
    own: &Lease,
    ours: &HashSet<IpAddr>,
    lease: &Lease,
) -> Option<Refusal> {
    for subnet in lease.key.networks() {
        let Some(family) = config.family(subnet.is_ipv6()) else {
            return Some(Refusal::FamilyOff);
        };
        if !contains(family.network, subnet) {
            return Some(Refusal::OutsideNetwork(family.network));
        }
    }
    if lease.key.overlaps(&own.key) {
        return Some(Refusal::OverlapsOurs);
    }
    let addresses: Vec<IpAddr> = lease.attrs.public_addresses().collect();
    if addresses.is_empty() {
        return Some(Refusal::NoAddress);
    }
    for address in addresses {
        // ::ffff:127.0.0.1 is 127.0.0.1 to whoever sends to it.
        let address = address.to_canonical();
        if ours.contains(&address) {
            return Some(Refusal::OurAddress(address));
        }
        if is_unusable(address) {
            return Some(Refusal::UnusableAddress(address));
        }
        if config.networks().any(|network| network.contains(address)) {
            return Some(Refusal::AddressInsideOverlay(address));
        }
    }
    None
}

/// Reservations that nobody lives by yet: the node has another lease, or `tells_backend` says that it would
/// have told of its backend there. `own`: the lease that this node lives by.
pub fn untaken<'a>(
    own: Option<&LeaseKey>,
    tells_backend: bool,
    leases: &'a [Lease],
) -> BTreeMap<LeaseKey, &'a Lease> {
    let is_own = |lease: &Lease| own == Some(&lease.key);
    let is_plain = |it: &&Lease| {
        it.expires == Expiry::Never && it.attrs.backend_type.is_empty() && !is_own(it)
    };
    let mut plain = leases.iter().filter(is_plain).peekable();
    if plain.peek().is_none() {
        return BTreeMap::new();
    }
    let leased = leases.iter().filter(|it| it.expires != Expiry::Never || is_own(it));
    let leased: HashSet<IpAddr> = leased.flat_map(|it| it.attrs.public_addresses()).collect();
    let has_another = |it: &&Lease| it.attrs.public_addresses().any(|ip| leased.contains(&ip));
    let untaken = plain.filter(|it| tells_backend || has_another(it));
    untaken.map(|it| (it.key, it)).collect()
}

/// Whether nobody can be sent to by this address.
pub fn is_unusable(address: IpAddr) -> bool {
    let broadcast = matches!(address, IpAddr::V4(ip) if ip.is_broadcast());
    broadcast || address.is_unspecified() || address.is_multicast() || address.is_loopback()
}

#[cfg(test)]
mod tests {
    use std::net::Ipv4Addr;

    use ipnetwork::Ipv4Network;
    use proptest::prelude::*;

    use super::*;

    fn key(text: &str) -> LeaseKey {
        text.parse().unwrap()
    }

    fn lease(key: &str, public_ip: &str) -> Lease {
        let attrs = LeaseAttrs { public_ip: public_ip.parse().ok(), ..LeaseAttrs::default() };
        Lease { key: key.parse().unwrap(), attrs, expires: Expiry::Never, revision: 0 }
    }

    #[test]
    fn a_reservation_is_taken_where_somebody_lives_by_it() {
        let own = lease("10.3.1.0-24", "192.0.2.1");
        let mut ends = lease("10.3.3.0-24", "192.0.2.2");
        ends.expires = Expiry::Unknown;
        let mut told = lease("10.3.6.0-24", "192.0.2.4");
        told.attrs.backend_type = "vxlan".into();
        let leases = [
            own.clone(),
            lease("10.3.2.0-24", "192.0.2.1"),
            ends,
            lease("10.3.4.0-24", "192.0.2.2"),
            lease("10.3.5.0-24", "192.0.2.3"),
            told,
        ];
        let untaken = |own: Option<&LeaseKey>, tells_backend| {
            let found = untaken(own, tells_backend, &leases);
            found.keys().map(LeaseKey::to_string).collect::<Vec<_>>()
        };
        assert_eq!(untaken(Some(&own.key), false), ["10.3.2.0-24", "10.3.4.0-24"]);
        assert_eq!(untaken(Some(&own.key), true), ["10.3.2.0-24", "10.3.4.0-24", "10.3.5.0-24"]);
        assert_eq!(untaken(None, false), ["10.3.4.0-24"]);
    }

    #[test]
    fn the_registry_is_not_trusted() {
        let config: NetworkConfig = r#"{"Network":"10.3.0.0/16"}"#.parse().unwrap();
        let own = lease("10.3.4.0-24", "192.0.2.9");
        let refused = |key: &str, public_ip: &str| {
            let found = peers(&config, &own, &[], &[], &[own.clone(), lease(key, public_ip)]);
            assert_eq!(found.accepted.len() + found.refused.len(), 1);
            found.refused.into_iter().next().map(|(_, why)| why)
        };
        let ip = |text: &str| text.parse::<IpAddr>().unwrap();
        assert_eq!(refused("10.3.5.0-24", "192.0.2.1"), None);
        assert!(matches!(refused("10.4.5.0-24", "192.0.2.1"), Some(Refusal::OutsideNetwork(_))));
        assert!(matches!(refused("0.0.0.0-1", "192.0.2.1"), Some(Refusal::OutsideNetwork(_))));
        assert_eq!(refused("10.3.4.128-25", "192.0.2.1"), Some(Refusal::OverlapsOurs));
        assert_eq!(refused("10.3.0.0-16", "192.0.2.1"), Some(Refusal::OverlapsOurs));
        assert_eq!(refused("10.3.5.0-24&fd00::-64", "192.0.2.1"), Some(Refusal::FamilyOff));
        assert_eq!(refused("10.3.5.0-24", ""), Some(Refusal::NoAddress));
        assert_eq!(
            refused("10.3.5.0-24", "127.0.0.1"),
            Some(Refusal::UnusableAddress(ip("127.0.0.1")))
        );
        assert_eq!(refused("10.3.4.0-24", "192.0.2.1"), Some(Refusal::OverlapsOurs));
        let mut mapped = lease("10.3.5.0-24", "");
        mapped.attrs.public_ipv6 = "::ffff:10.3.9.9".parse().ok();
        assert_eq!(peers(&config, &own, &[], &[], &[mapped]).accepted, []);
        assert_eq!(
            refused("10.3.5.0-24", "10.3.9.9"),
            Some(Refusal::AddressInsideOverlay(ip("10.3.9.9")))
        );
        assert_eq!(refused("10.3.5.0-24", "192.0.2.9"), Some(Refusal::OurAddress(ip("192.0.2.9"))));
        let other = [lease("10.3.5.0-24", "192.0.2.8")];
        assert_eq!(peers(&config, &own, &[], &[ip("192.0.2.8")], &other).accepted, []);
    }

    #[test]
    fn our_lease_is_ours_also_while_it_tells_a_former_address() {
        let config: NetworkConfig = r#"{"Network":"10.3.0.0/16"}"#.parse().unwrap();
        let [own, before, first] =
            ["192.0.2.9", "192.0.2.8", "192.0.2.7"].map(|ip| lease("10.3.4.0-24", ip));
        let sorted = |told: &Lease, former: &[LeaseAttrs]| {
            peers(&config, &own, former, &[], std::slice::from_ref(told))
        };
        let former = [first.attrs.clone(), before.attrs.clone()];
        assert_eq!(sorted(&before, &former), Peers::default());
        assert_eq!(sorted(&first, &former), Peers::default());
        assert_eq!(sorted(&before, &[]).refused, [(own.key, Refusal::OverlapsOurs)]);
    }

    #[test]
    fn of_two_that_share_a_subnet_one_is_forwarded_to() {
        let config = r#"{"EnableIPv6":true,"Network":"10.3.0.0/16","IPv6Network":"fd00::/48"}"#;
        let config: NetworkConfig = config.parse().unwrap();
        let own = lease("10.3.4.0-24&fd00:0:0:4::-64", "192.0.2.4");
        let mut leases = [
            lease("10.3.1.0-24&fd00:0:0:1::-64", "192.0.2.1"),
            lease("10.3.1.0-24&fd00:0:0:2::-64", "192.0.2.2"),
            lease("10.3.3.0-24&fd00:0:0:3::-64", "192.0.2.3"),
        ];
        for _ in 0..2 {
            let found = peers(&config, &own, &[], &[], &leases);
            let keys: Vec<LeaseKey> = found.accepted.iter().map(|lease| lease.key).collect();
            assert_eq!(keys.len(), 2);
            assert!(keys.contains(&key("10.3.1.0-24&fd00:0:0:1::-64")));
            let told: Vec<String> =
                found.refused.iter().map(|(key, why)| format!("{key}: {why}")).collect();
            assert_eq!(
                told,
                ["10.3.1.0-24&fd00:0:0:2::-64: the lease 10.3.1.0-24&fd00:0:0:1::-64 has \
                  10.3.1.0/24 too; remove one of them"]
            );
            leases.reverse();
        }
    }

    #[test]
    fn nobody_takes_a_part_of_anothers_subnet_or_has_all_others_refused() {
        let config: NetworkConfig = r#"{"Network":"10.3.0.0/16"}"#.parse().unwrap();
        let own = lease("10.3.4.0-24", "192.0.2.4");
        let leases = [
            lease("10.3.1.0-24", "192.0.2.1"),
            lease("10.3.1.64-26", "192.0.2.66"),
            lease("10.3.1.128-26", "192.0.2.1"),
            lease("10.3.2.0-24", "192.0.2.2"),
            lease("10.3.2.0-23", "192.0.2.66"),
            // Inside of one that is refused itself.
            lease("10.3.3.0-25", "192.0.2.3"),
            lease("10.3.8.0-22", "192.0.2.8"),
            lease("10.3.9.0-25", "192.0.2.9"),
        ];
        let found = peers(&config, &own, &[], &[], &leases);
        let accepted: Vec<String> = found.accepted.iter().map(|it| it.key.to_string()).collect();
        let wanted = ["10.3.1.0-24", "10.3.1.128-26", "10.3.2.0-24", "10.3.3.0-25", "10.3.8.0-22"];
        assert_eq!(accepted, wanted);
        let told: Vec<String> =
            found.refused.iter().map(|(key, why)| format!("{key}: {why}")).collect();
        let too = |lease: &str, other: &str, subnet: &str| {
            format!("{lease}: the lease {other} has {subnet} too; remove one of them")
        };
        assert_eq!(
            told,
            [
                too("10.3.1.64-26", "10.3.1.0-24", "10.3.1.64/26"),
                too("10.3.2.0-23", "10.3.2.0-24", "10.3.2.0/24"),
                too("10.3.9.0-25", "10.3.8.0-22", "10.3.9.0/25"),
            ]
        );
    }

    proptest! {
        /// Whom we forward to is a function of the config and the leases: not of their order, of what
        /// was there before, or of how it became so.
        #[test]
        fn peers_depend_on_nothing_but_the_leases(
            entries in proptest::collection::vec((0u8..12, 0u8..8, 23u8..=25), 0..12),
            order in any::<u64>(),
        ) {
            let config: NetworkConfig = r#"{"Network":"10.3.0.0/16"}"#.parse().unwrap();
            let own = lease("10.3.4.0-24", "192.0.2.4");
            let entry = |(subnet, owner, len): (u8, u8, u8)| {
                let base = Ipv4Network::new(Ipv4Addr::new(10, 3, subnet, 0), len).unwrap();
                lease(&format!("{}-{len}", base.network()), &format!("192.0.2.{owner}"))
            };
            // A registry has one lease of a key.
            let leases: BTreeMap<_, _> =
                entries.into_iter().map(entry).map(|lease| (lease.key, lease)).collect();
            let mut leases: Vec<Lease> = leases.into_values().collect();
            let found = peers(&config, &own, &[], &[], &leases);
            for peer in &found.accepted {
                prop_assert!(!peer.key.overlaps(&own.key) && !peer.attrs.same_node(&own.attrs));
            }
            let ours = leases.iter().filter(|it| it.key == own.key && it.attrs == own.attrs).count();
            prop_assert_eq!(found.accepted.len() + found.refused.len() + ours, leases.len());
            fastrand::Rng::with_seed(order).shuffle(&mut leases);
            let again = peers(&config, &own, &[], &[], &leases);
            let names = |found: &Peers| {
                let mut names: Vec<String> =
                    found.accepted.iter().map(|it| format!("{} {:?}", it.key, it.attrs)).collect();
                names.extend(found.refused.iter().map(|(key, why)| format!("{key}: {why}")));
                names.sort();
                names
            };
            prop_assert_eq!(names(&again), names(&found));
        }
    }
}
