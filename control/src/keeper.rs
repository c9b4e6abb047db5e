//! How this node comes to a lease: plans made from the registry's newest snapshot. Pure; the
//! caller does the reading and writing, and plans again when the registry changed meanwhile.

mod held;

use std::net::IpAddr;

use ipnetwork::IpNetwork;

use crate::allocate::{is_allowed, pick_subnet};
use crate::config::{FOUR_SUBNETS_BITS, NetworkConfig};
use crate::lease::{Expiry, Lease, LeaseAttrs, LeaseKey, NodeRecord, overlap};

pub use self::held::{KnownEnd, Own, check_own, renew_in, ttl};

/// Who we are in the registry: a lease is ours by its public address.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Identity {
    /// What tells us from another node with the same address.
    pub node_id: String,
    pub attrs: LeaseAttrs,
}

/// Another node that lives with our public address. Its lease is not ours to take up, whatever the
/// address says.
pub fn claimant<'a>(identity: &Identity, nodes: &'a [NodeRecord]) -> Option<&'a NodeRecord> {
    let ours: Vec<IpAddr> = identity.attrs.public_addresses().collect();
    nodes
        .iter()
        .filter(|node| node.id != identity.node_id)
        .find(|node| node.public_addresses().any(|ip| ours.contains(&ip)))
}

/// The next step towards a lease.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Plan {
    /// This one is ours and fits: write our attributes to it, with a fresh TTL unless it is a
    /// reservation.
    Reuse(Lease),
    /// This one is ours, but not to be used any more: the config does not allow it, another node had part
    /// of it before, or there is a reservation. Remove it, and plan again.
    Remove(Lease),
    /// Nobody has this: create it.
    Create(LeaseKey),
    /// The subnet of the last run has a lease that cannot be read. Another subnet would cost the
    /// containers their addresses.
    Unreadable(LeaseKey),
    OutOfSubnets,
}

/// flannel's order: the lease that is ours, then the subnet of the last run, then any. A subnet that
/// somebody else holds is never taken. Of several that are ours, those that can be used come first, and
/// of these a reservation, for which the others are given up, or the last run's. `unreadable` leases are
/// somebody's.
pub fn plan(
    config: &NetworkConfig,
    identity: &Identity,
    previous: &LeaseKey,
    leases: &[Lease],
    unreadable: &[LeaseKey],
    rng: &mut fastrand::Rng,
) -> Plan {
    let fits =
        |lease: &Lease| is_compatible(config, &lease.key) && !came_second(config, lease, leases);
    let is_ours = |it: &&Lease| is_ours(it, identity, previous) && !is_set_aside(config, it);
    let ours = || leases.iter().filter(is_ours);
    let rank = |it: &&Lease| (!fits(it), it.expires != Expiry::Never, it.key != *previous);
    if let Some(best) = ours().min_by_key(rank) {
        let is_reserved = best.expires == Expiry::Never;
        let superseded = ours().find(|it| is_reserved && it.expires != Expiry::Never);
        return match superseded.filter(|_| fits(best)) {
            Some(lease) => Plan::Remove(lease.clone()),
            None if fits(best) => Plan::Reuse(best.clone()),
            None => Plan::Remove(best.clone()),
        };
    }
    let keys = leases.iter().map(|lease| lease.key).chain(unreadable.iter().copied());
    let counts = |net: &IpNetwork| !is_too_large(config, *net);
    let taken: Vec<IpNetwork> = keys.flat_map(|key| key.networks()).filter(counts).collect();
    let mut key = LeaseKey::default();
    for family in config.families() {
        let mut former = previous.networks();
        let former = former.find(|net| net.is_ipv6() == family.network.is_ipv6());
        // By family, so that a node whose overlay gains IPv6 keeps its IPv4 subnet.
        let former = former.filter(|net| is_allowed(&family, *net));
        let has_former = |key: &&LeaseKey| {
            former.is_some_and(|net| is_in_the_way(Some(config), key, &net.into()))
        };
        if let Some(key) = unreadable.iter().find(has_former) {
            return Plan::Unreadable(*key);
        }
        let former = former.filter(|net| !taken.iter().any(|other| overlap(*net, *other)));
        match former.or_else(|| pick_subnet(&family, &taken, rng)) {
            Some(IpNetwork::V4(net)) => key.ipv4 = Some(net),
            Some(IpNetwork::V6(net)) => key.ipv6 = Some(net),
            None => return Plan::OutOfSubnets,
        }
    }
    Plan::Create(key)
}

/// By the address; and by the subnet of the last run and what the backend has published there, should
/// the address be another one since then. With vxlan that is our device's MAC, which nobody else has.
fn is_ours(lease: &Lease, identity: &Identity, previous: &LeaseKey) -> bool {
    let (theirs, ours) = (&lease.attrs, &identity.attrs);
    let data = |attrs: &LeaseAttrs| (attrs.backend_data.clone(), attrs.backend_v6_data.clone());
    let was_ours =
        lease.key == *previous && data(ours) != (None, None) && data(ours) == data(theirs);
    theirs.same_node(ours) || was_ours
}

/// Whether a reservation is outside of the range that subnets are given out of: an operator made it, and
/// may mend the config.
fn is_set_aside(config: &NetworkConfig, lease: &Lease) -> bool {
    lease.expires == Expiry::Never && !is_in_range(config, &lease.key)
}

/// Whether the config would give out the subnets of those families that it has.
pub fn is_in_range(config: &NetworkConfig, key: &LeaseKey) -> bool {
    key.networks().all(|subnet| {
        let family = config.family(subnet.is_ipv6());
        family.is_none_or(|family| is_allowed(&family, subnet))
    })
}

/// Reservations for this node that it cannot take up.
pub fn set_aside<'a>(
    config: &'a NetworkConfig,
    identity: &'a Identity,
    leases: &'a [Lease],
) -> impl Iterator<Item = &'a Lease> {
    let ours = leases.iter().filter(|it| it.attrs.same_node(&identity.attrs));
    ours.filter(|it| is_set_aside(config, it))
}

/// Whether to give a lease of ours back: another node's has part of it, and was there before. The
/// registry compares whole keys, so in an overlay of both families two nodes that choose at the same
/// time may share a subnet of one family.
pub fn came_second(config: &NetworkConfig, own: &Lease, leases: &[Lease]) -> bool {
    leases.iter().any(|other| {
        other.key != own.key
            && !other.attrs.same_node(&own.attrs)
            && other.revision < own.revision
            && is_in_the_way(Some(config), &other.key, &own.key)
    })
}

/// Whether a lease keeps another node from these subnets; where there is no config, any that has part of them.
pub fn is_in_the_way(config: Option<&NetworkConfig>, other: &LeaseKey, key: &LeaseKey) -> bool {
    let counts = |net: &IpNetwork| config.is_none_or(|config| !is_too_large(config, *net));
    let mut theirs = other.networks().filter(counts);
    theirs.any(|theirs| key.networks().any(|ours| overlap(ours, theirs)))
}

/// Whether no config with this Network gives out so much of it. Left over from another Network, or somebody's
/// mistake, it has all nodes' subnets in it, and nobody would get any.
fn is_too_large(config: &NetworkConfig, subnet: IpNetwork) -> bool {
    let family = config.family(subnet.is_ipv6());
    family.is_some_and(|it| subnet.prefix() < it.network.prefix() + FOUR_SUBNETS_BITS)
}

/// Whether the config would give out just this: the families that it has, each in range.
pub fn is_compatible(config: &NetworkConfig, key: &LeaseKey) -> bool {
    let allowed = |ipv6: bool, subnet: Option<IpNetwork>| match (config.family(ipv6), subnet) {
        (Some(family), Some(subnet)) => is_allowed(&family, subnet),
        (None, None) => true,
        (Some(_), None) | (None, Some(_)) => false,
    };
    allowed(false, key.ipv4.map(IpNetwork::V4)) && allowed(true, key.ipv6.map(IpNetwork::V6))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn config() -> NetworkConfig {
        r#"{"Network":"10.3.0.0/16","SubnetMin":"10.3.1.0","SubnetMax":"10.3.25.0"}"#
            .parse()
            .unwrap()
    }

    fn dual_stack() -> NetworkConfig {
        r#"{"EnableIPv6":true,"Network":"10.3.0.0/16","IPv6Network":"fd00::/48"}"#.parse().unwrap()
    }

    fn lease(key: &str, public_ip: &str) -> Lease {
        let attrs =
            LeaseAttrs { public_ip: Some(public_ip.parse().unwrap()), ..LeaseAttrs::default() };
        Lease { key: key.parse().unwrap(), attrs, expires: Expiry::Never, revision: 0 }
    }

    fn next(previous: &str, leases: &[Lease]) -> Plan {
        let identity =
            Identity { node_id: "a".into(), attrs: lease("10.3.1.0-24", "192.0.2.9").attrs };
        let previous = LeaseKey::new(previous.parse().ok(), None);
        plan(&config(), &identity, &previous, leases, &[], &mut fastrand::Rng::with_seed(7))
    }

    #[test]
    fn the_lease_with_our_address_comes_first() {
        let ours = lease("10.3.4.0-24", "192.0.2.9");
        let leases = [lease("10.3.3.0-24", "192.0.2.1"), ours.clone()];
        assert_eq!(next("10.3.7.0/24", &leases), Plan::Reuse(ours));
        let mut outside = lease("10.4.0.0-24", "192.0.2.9");
        outside.expires = Expiry::Unknown;
        assert_eq!(next("", std::slice::from_ref(&outside)), Plan::Remove(outside));
    }

    #[test]
    fn of_several_leases_with_our_address_a_reservation_comes_first() {
        let mut leased = lease("10.3.4.0-24", "192.0.2.9");
        leased.expires = Expiry::Unknown;
        let reserved = lease("10.3.9.0-24", "192.0.2.9");
        let mut outside = lease("10.3.0.0-24", "192.0.2.9");
        outside.expires = Expiry::Unknown;
        let leases = [outside.clone(), leased.clone(), reserved.clone()];
        assert_eq!(next("", &leases), Plan::Remove(outside.clone()));
        assert_eq!(next("", &leases[1..]), Plan::Remove(leased.clone()));
        assert_eq!(next("", &leases[2..]), Plan::Reuse(reserved));
        assert_eq!(next("", &leases[..2]), Plan::Reuse(leased.clone()));
        assert_eq!(next("", &leases[..1]), Plan::Remove(outside));
        let mut another = lease("10.3.7.0-24", "192.0.2.9");
        another.expires = Expiry::Unknown;
        let two = [leased.clone(), another.clone()];
        assert_eq!(next("10.3.4.0/24", &two), Plan::Reuse(leased));
        assert_eq!(next("10.3.7.0/24", &two), Plan::Reuse(another));
    }

    #[test]
    fn a_reservation_outlives_a_config_that_does_not_allow_it() {
        let reserved = lease("10.3.0.0-24", "192.0.2.9");
        let plan = next("10.3.0.0/24", std::slice::from_ref(&reserved));
        assert!(matches!(&plan, Plan::Create(key) if !key.overlaps(&reserved.key)), "{plan:?}");
        let mut leased = lease("10.3.7.0-24", "192.0.2.9");
        leased.expires = Expiry::Unknown;
        assert_eq!(next("", &[reserved, leased.clone()]), Plan::Reuse(leased));
    }

    #[test]
    fn the_lease_of_our_vxlan_device_is_ours_at_another_address() {
        let data = serde_json::json!({"VNI": 1, "VtepMAC": "c6:d2:32:6f:8f:44"});
        let mut former = lease("10.3.4.0-24", "192.0.2.1");
        former.attrs.backend_data = Some(data.clone());
        let mut attrs = lease("10.3.1.0-24", "192.0.2.9").attrs;
        attrs.backend_data = Some(data);
        let identity = Identity { node_id: "a".into(), attrs };
        let plan = |previous: &str, leases: &[Lease]| {
            let previous = LeaseKey::new(previous.parse().ok(), None);
            plan(&config(), &identity, &previous, leases, &[], &mut fastrand::Rng::with_seed(7))
        };
        assert_eq!(plan("10.3.4.0/24", std::slice::from_ref(&former)), Plan::Reuse(former.clone()));
        assert!(matches!(plan("10.3.5.0/24", std::slice::from_ref(&former)), Plan::Create(_)));
        former.attrs.backend_data = None;
        assert!(matches!(plan("10.3.4.0/24", &[former]), Plan::Create(_)));
    }

    #[test]
    fn a_lease_that_another_node_had_part_of_before_is_given_back() {
        let mut ours = lease("10.3.4.0-24&fd00:0:0:4::-64", "192.0.2.9");
        ours.revision = 8;
        let mut first = lease("10.3.4.0-24&fd00:0:0:5::-64", "192.0.2.1");
        first.revision = 7;
        let identity = Identity { node_id: "a".into(), attrs: ours.attrs.clone() };
        let mut rng = fastrand::Rng::with_seed(7);
        let mut leases = [ours.clone(), first];
        let mut next = |leases: &[Lease]| {
            plan(&dual_stack(), &identity, &LeaseKey::default(), leases, &[], &mut rng)
        };
        assert_eq!(next(&leases), Plan::Remove(ours.clone()));
        // One of ours, from before the overlay had IPv6, is no rival.
        leases[1] = lease("10.3.4.0-24", "192.0.2.9");
        assert_eq!(next(&leases), Plan::Reuse(ours));
    }

    #[test]
    fn then_the_subnet_of_the_last_run_unless_somebody_has_it() {
        let created = |plan| {
            let Plan::Create(key) = plan else { panic!("{plan:?}") };
            key.to_string()
        };
        assert_eq!(created(next("10.3.7.0/24", &[])), "10.3.7.0-24");
        let taken = lease("10.3.7.0-24", "192.0.2.1");
        assert_ne!(created(next("10.3.7.0/24", &[taken])), "10.3.7.0-24", "never stolen");
        assert_ne!(created(next("10.4.1.0/24", &[])), "10.4.1.0-24", "outside");
        assert_ne!(created(next("10.3.7.0/25", &[])), "10.3.7.0-25", "other length");
    }

    #[test]
    fn a_lease_that_cannot_be_read_is_somebodys() {
        let identity =
            Identity { node_id: "a".into(), attrs: lease("10.3.1.0-24", "192.0.2.9").attrs };
        let next = |previous: &str, unreadable: &str| {
            let previous = LeaseKey::new(previous.parse().ok(), None);
            let unreadable = [unreadable.parse().unwrap()];
            let mut rng = fastrand::Rng::with_seed(7);
            plan(&config(), &identity, &previous, &[], &unreadable, &mut rng)
        };
        let key = "10.3.7.0-24";
        assert_eq!(next("10.3.7.0/24", key), Plan::Unreadable(key.parse().unwrap()));
        assert_eq!(next("10.3.8.0/24", key), Plan::Create("10.3.8.0-24".parse().unwrap()));
        assert_eq!(next("", "10.3.0.0-18"), Plan::OutOfSubnets);
    }

    #[test]
    fn a_full_network_is_said_so() {
        assert_eq!(next("", &[lease("10.3.0.0-18", "192.0.2.1")]), Plan::OutOfSubnets);
        // No node has so much.
        assert!(matches!(next("", &[lease("10.3.0.0-17", "192.0.2.1")]), Plan::Create(_)));
    }

    #[test]
    fn dual_stack_asks_for_both() {
        let identity = Identity { node_id: "a".into(), attrs: LeaseAttrs::default() };
        let v4_only = LeaseKey::new("10.3.7.0/24".parse().ok(), None);
        let mut rng = fastrand::Rng::with_seed(7);
        let Plan::Create(key) = plan(&dual_stack(), &identity, &v4_only, &[], &[], &mut rng) else {
            panic!()
        };
        assert_eq!(key.ipv4, v4_only.ipv4);
        assert!(key.ipv6.is_some());
    }

    #[test]
    fn another_node_with_our_address_is_found_by_its_id() {
        let attrs = lease("10.3.1.0-24", "192.0.2.9").attrs;
        let identity = Identity { node_id: "a".into(), attrs };
        let node = |id: &str, ip: &str| NodeRecord {
            id: id.into(),
            name: "host".into(),
            public_ip: ip.parse().ok(),
            public_ipv6: None,
            addresses: Vec::new(),
            version: "0".into(),
            mtu: 1472,
            probe_port: None,
        };
        let nodes = [node("a", "192.0.2.9"), node("b", "192.0.2.8"), node("c", "192.0.2.9")];
        assert_eq!(claimant(&identity, &nodes).map(|node| node.id.as_str()), Some("c"));
        assert_eq!(claimant(&identity, &nodes[..2]), None);
    }

    /// A registry as all of them are: each write is conditional on the state that was seen.
    #[derive(Debug, Default)]
    struct Model {
        leases: Vec<Lease>,
        revision: u64,
    }

    impl Model {
        fn write(&mut self, key: LeaseKey, attrs: &LeaseAttrs) -> Lease {
            self.leases.retain(|lease| lease.key != key);
            self.revision += 1;
            let (attrs, revision) = (attrs.clone(), self.revision);
            self.leases.push(Lease { key, attrs, expires: Expiry::Unknown, revision });
            self.leases[self.leases.len() - 1].clone()
        }

        fn is_as_seen(&self, seen: &Lease) -> bool {
            self.leases.iter().any(|it| (it.key, it.revision) == (seen.key, seen.revision))
        }
    }

    /// A node: what it last saw of the registry, which may be long ago, and the lease it believes in.
    #[derive(Debug)]
    struct Keeper {
        identity: Identity,
        seen: Vec<Lease>,
        held: Option<Lease>,
    }

    impl Keeper {
        /// One look and one act with something of others in between, but never less known than what
        /// it wrote itself: the daemon lists before each plan.
        fn act(&mut self, config: &NetworkConfig, model: &mut Model, rng: &mut fastrand::Rng) {
            let revision = model.revision;
            self.decide(config, model, rng);
            if model.revision != revision {
                self.seen.clone_from(&model.leases);
            }
        }

        fn decide(&mut self, config: &NetworkConfig, model: &mut Model, rng: &mut fastrand::Rng) {
            let former = self.held.take();
            match former.as_ref().map(|held| check_own(held, &[], &self.seen)) {
                Some(Own::Held(lease)) => {
                    let renew = model.is_as_seen(&lease);
                    self.held = Some(if renew {
                        model.write(lease.key, &self.identity.attrs)
                    } else {
                        lease
                    });
                }
                None | Some(Own::Missing | Own::TakenBy(_)) => {
                    let ipv4 = former.and_then(|lease| lease.key.ipv4);
                    let previous = LeaseKey::new(ipv4, None);
                    match plan(config, &self.identity, &previous, &self.seen, &[], rng) {
                        Plan::Reuse(seen) if model.is_as_seen(&seen) => {
                            self.held = Some(model.write(seen.key, &self.identity.attrs));
                        }
                        Plan::Create(key) if !model.leases.iter().any(|it| it.key == key) => {
                            let created = model.write(key, &self.identity.attrs);
                            if came_second(config, &created, &model.leases) {
                                model.leases.retain(|lease| *lease != created);
                            } else {
                                self.held = Some(created);
                            }
                        }
                        Plan::Remove(seen) if model.is_as_seen(&seen) => {
                            model.leases.retain(|lease| lease.key != seen.key);
                        }
                        Plan::Reuse(_)
                        | Plan::Create(_)
                        | Plan::Remove(_)
                        | Plan::Unreadable(_)
                        | Plan::OutOfSubnets => {}
                    }
                }
            }
        }
    }

    proptest! {
        /// Nodes that look and act in any order, with leases that expire and others that an operator
        /// gives away: no write of a keeper ever takes what another has, and in the end each has
        /// a lease of its own.
        #[test]
        fn keepers_never_share_a_subnet(
            events in proptest::collection::vec((0u8..4, 0usize..4), 0..200),
            seed in any::<u64>(),
            is_dual in any::<bool>(),
        ) {
            let ipv4 = r#""Network":"10.3.0.0/16","SubnetMin":"10.3.1.0","SubnetMax":"10.3.8.0""#;
            let ipv6 = if is_dual {
                r#","EnableIPv6":true,"IPv6Network":"fd00::/48","IPv6SubnetMin":"fd00:0:0:1::",
                    "IPv6SubnetMax":"fd00:0:0:8::""#
            } else {
                ""
            };
            let config: NetworkConfig = format!("{{{ipv4}{ipv6}}}").parse().unwrap();
            let mut rng = fastrand::Rng::with_seed(seed);
            let mut model = Model::default();
            let mut keepers: Vec<Keeper> = (0..4_u8)
                .map(|number| Keeper {
                    identity: Identity {
                        node_id: number.to_string(),
                        attrs: lease("10.3.1.0-24", &format!("192.0.2.{number}")).attrs,
                    },
                    seen: Vec::new(),
                    held: None,
                })
                .collect();
            let stranger = lease("10.3.1.0-24", "192.0.2.200").attrs;
            for (what, number) in events {
                let before = model.leases.clone();
                match what {
                    0 => keepers[number].seen.clone_from(&model.leases),
                    1 => keepers[number].act(&config, &mut model, &mut rng),
                    2 if number < model.leases.len() => drop(model.leases.remove(number)),
                    3 if number == 0 && !model.leases.is_empty() => {
                        model.write(model.leases[0].key, &stranger);
                    }
                    _ => {}
                }
                if what == 1 {
                    // Whose it was before a keeper's write, it still is, or nobody's.
                    for old in &before {
                        let now = model.leases.iter().find(|lease| lease.key == old.key);
                        prop_assert!(now.is_none_or(|now| now.attrs.same_node(&old.attrs)));
                    }
                }
            }
            // The stranger's leases run out, and everybody looks before acting for a while.
            model.leases.retain(|lease| !lease.attrs.same_node(&stranger));
            for _ in 0..4 {
                for keeper in &mut keepers {
                    keeper.seen.clone_from(&model.leases);
                    keeper.act(&config, &mut model, &mut rng);
                }
            }
            for keeper in &keepers {
                let held = keeper.held.as_ref().expect("there is room for all");
                let ours: Vec<_> =
                    model.leases.iter().filter(|it| it.attrs.same_node(&held.attrs)).collect();
                prop_assert_eq!(ours.len(), 1);
                prop_assert_eq!(ours[0].key, held.key);
                let overlapping = model.leases.iter().filter(|it| it.key.overlaps(&held.key));
                prop_assert_eq!(overlapping.count(), 1);
            }
        }
    }
}
