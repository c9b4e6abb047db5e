//! What is desired against what the kernel has, and the changes between them. Pure: it is given
//! both.

use std::collections::HashSet;
use std::hash::Hash;

use ipnetwork::IpNetwork;
use weft_control::lease::contains;

use crate::netlink::{GatewayRoute, KernelRoute, ROUTE_PROTOCOL};

/// What makes the kernel have the desired entries.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Changes<T> {
    /// To be added, or to take the place of what has the same key.
    pub(crate) set: Vec<T>,
    /// Wanted no more.
    pub(crate) remove: Vec<T>,
}

impl<T: Copy + Eq + Hash> Changes<T> {
    /// Of entries with the same key there is one at most.
    pub(crate) fn between<K: Eq + Hash>(desired: &[T], found: &[T], key: impl Fn(&T) -> K) -> Self {
        let there: HashSet<&T> = found.iter().collect();
        let wanted: HashSet<K> = desired.iter().map(&key).collect();
        Self {
            set: desired.iter().filter(|it| !there.contains(it)).copied().collect(),
            remove: found.iter().filter(|it| !wanted.contains(&key(it))).copied().collect(),
        }
    }
}

/// Which routes are one daemon's: another may run beside it.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Territory {
    /// The overlay's.
    pub(crate) networks: Vec<IpNetwork>,
    /// The daemon's own devices, by index.
    pub(crate) links: Vec<u32>,
}

impl Territory {
    /// Whether a route leads into the overlay, or out of one of our devices.
    pub(crate) fn has(&self, route: &KernelRoute) -> bool {
        self.is_by_our_device(route) || self.is_inside(route)
    }

    fn is_inside(&self, route: &KernelRoute) -> bool {
        self.networks.iter().any(|network| contains(*network, route.destination))
    }

    fn is_by_our_device(&self, route: &KernelRoute) -> bool {
        route.link.is_some_and(|link| self.links.contains(&link))
    }

    /// Whether to remove a route that nobody wants: ours, and on a device that is ours whatever leads into
    /// the overlay by a gateway, as flannel leaves it.
    pub(crate) fn owns(&self, route: &KernelRoute) -> bool {
        let is_ours = route.protocol == ROUTE_PROTOCOL && self.has(route);
        let is_there = self.is_by_our_device(route) && self.is_inside(route);
        route.gateway.is_some() && (is_ours || is_there)
    }
}

/// What makes the kernel have the desired routes.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct RouteChanges {
    /// To be added, or to replace ours that leads elsewhere.
    pub(crate) set: Vec<GatewayRoute>,
    /// Ours, and wanted no more.
    pub(crate) remove: Vec<KernelRoute>,
    /// Somebody else's, in the way of a desired one.
    pub(crate) taken: Vec<KernelRoute>,
}

impl RouteChanges {
    /// A route of somebody else that is just the desired one, as flannel leaves them, becomes ours;
    /// one that leads elsewhere stays.
    pub(crate) fn between(
        desired: &[GatewayRoute],
        found: &[KernelRoute],
        territory: &Territory,
    ) -> Self {
        let mut changes = Self::default();
        let mut found: Vec<&KernelRoute> = found.iter().collect();
        found.sort_by_key(|route| route.destination);
        let at = |destination: IpNetwork| {
            let begin = found.partition_point(|route| route.destination < destination);
            found[begin..].iter().take_while(move |route| route.destination == destination)
        };
        for route in desired {
            let same = |found: &KernelRoute| {
                (found.gateway, found.link) == (Some(route.gateway), Some(route.link))
            };
            let is_there =
                at(route.destination).any(|it| same(it) && it.protocol == ROUTE_PROTOCOL);
            let is_in_the_way = |it: &KernelRoute| {
                let is_foreign = it.protocol != ROUTE_PROTOCOL && !territory.owns(it);
                is_foreign && !same(it) && it.precedes_ours()
            };
            let foreign = at(route.destination).find(|it| is_in_the_way(it));
            match foreign {
                Some(foreign) => changes.taken.push(**foreign),
                None if is_there => {}
                None => changes.set.push(*route),
            }
        }
        let wanted: HashSet<IpNetwork> = desired.iter().map(|route| route.destination).collect();
        let stale = found
            .into_iter()
            .filter(|route| territory.owns(route) && !wanted.contains(&route.destination));
        changes.remove = stale.copied().collect();
        changes
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use proptest::prelude::*;

    use super::*;

    const BOOT: u8 = 3;

    fn desired(destination: &str, gateway: &str) -> GatewayRoute {
        let [destination, gateway] = [destination, gateway].map(str::to_owned);
        GatewayRoute {
            destination: destination.parse().unwrap(),
            gateway: gateway.parse().unwrap(),
            link: 2,
            onlink: false,
        }
    }

    fn found(destination: &str, gateway: &str, link: u32, protocol: u8) -> KernelRoute {
        KernelRoute {
            destination: destination.parse().unwrap(),
            gateway: gateway.parse().ok(),
            link: Some(link),
            protocol,
            metric: 0,
        }
    }

    fn territory() -> Territory {
        Territory { networks: vec!["10.3.0.0/16".parse().unwrap()], links: vec![7] }
    }

    fn changes(found: &[KernelRoute]) -> RouteChanges {
        let desired = [desired("10.3.1.0/24", "192.0.2.1"), desired("10.3.2.0/24", "192.0.2.2")];
        RouteChanges::between(&desired, found, &territory())
    }

    #[test]
    fn only_what_differs_is_changed() {
        let right = [
            found("10.3.1.0/24", "192.0.2.1", 2, ROUTE_PROTOCOL),
            found("10.3.2.0/24", "192.0.2.2", 2, ROUTE_PROTOCOL),
            found("0.0.0.0/0", "192.0.2.254", 2, BOOT),
            found("10.3.0.0/16", "", 7, ROUTE_PROTOCOL),
        ];
        assert_eq!(changes(&right), RouteChanges::default());
        let found = [
            found("10.3.1.0/24", "192.0.2.9", 2, ROUTE_PROTOCOL),
            found("10.3.7.0/24", "192.0.2.7", 2, ROUTE_PROTOCOL),
            found("10.3.8.0/24", "192.0.2.8", 2, BOOT),
        ];
        let changes = changes(&found);
        assert_eq!(changes.set.len(), 2);
        assert_eq!(changes.remove, found[1..2]);
        assert!(changes.taken.is_empty());
    }

    #[test]
    fn another_daemons_routes_stay_but_whatever_leads_into_our_device_goes() {
        let found = [
            found("10.9.1.0/24", "192.0.2.9", 2, ROUTE_PROTOCOL),
            found("10.9.2.0/24", "10.9.2.0", 7, ROUTE_PROTOCOL),
        ];
        assert_eq!(changes(&found).remove, found[1..]);
    }

    #[test]
    fn what_flannel_left_on_our_device_goes_and_a_strangers_stays() {
        let found = [
            found("10.3.9.0/24", "10.3.9.0", 7, BOOT),
            found("10.3.9.0/24", "10.3.9.0", 2, BOOT),
            found("203.0.113.0/24", "10.3.9.1", 7, BOOT),
        ];
        assert_eq!(changes(&found).remove, found[..1]);
    }

    #[test]
    fn what_flannel_left_on_our_device_is_in_nobodys_way() {
        let found = [
            found("10.3.1.0/24", "10.3.1.0", 7, BOOT),
            found("10.3.2.0/24", "192.0.2.2", 2, ROUTE_PROTOCOL),
        ];
        let changes = changes(&found);
        assert_eq!(changes.set, [desired("10.3.1.0/24", "192.0.2.1")]);
        assert!(changes.taken.is_empty() && changes.remove.is_empty());
    }

    #[test]
    fn a_strangers_route_behind_ours_is_in_nobodys_way() {
        let behind = KernelRoute { metric: 100, ..found("10.3.1.0/24", "192.0.2.77", 2, BOOT) };
        let changes = changes(&[behind]);
        assert_eq!(changes.set.len(), 2);
        assert!(changes.taken.is_empty() && changes.remove.is_empty());
        let ipv6 = |metric| KernelRoute { metric, ..found("fd00::/64", "fe80::1", 2, BOOT) };
        assert_eq!([1023, 1024, 1025].map(|it| ipv6(it).precedes_ours()), [true, true, false]);
    }

    #[test]
    fn flannels_route_becomes_ours_and_a_strangers_stays() {
        let found = [
            found("10.3.1.0/24", "192.0.2.1", 2, BOOT),
            found("10.3.2.0/24", "192.0.2.77", 2, BOOT),
        ];
        let changes = changes(&found);
        assert_eq!(changes.set, [desired("10.3.1.0/24", "192.0.2.1")]);
        assert_eq!(changes.taken, found[1..]);
        assert!(changes.remove.is_empty());
    }

    proptest! {
        /// Whatever there was of ours: after the changes there are exactly the desired routes.
        #[test]
        fn changes_lead_to_what_is_desired(
            wanted in proptest::collection::btree_map(0u8..20, 1u8..5, 0..10),
            there in proptest::collection::btree_map(0u8..20, 1u8..5, 0..10),
        ) {
            let destination = |number: u8| format!("10.3.{number}.0/24");
            let gateway = |number: u8| format!("192.0.2.{number}");
            let wanted: Vec<GatewayRoute> =
                wanted.iter().map(|(to, via)| desired(&destination(*to), &gateway(*via))).collect();
            let mut kernel: Vec<KernelRoute> = there
                .iter()
                .map(|(to, via)| found(&destination(*to), &gateway(*via), 2, ROUTE_PROTOCOL))
                .collect();
            let changes = RouteChanges::between(&wanted, &kernel, &territory());
            for route in &changes.set {
                kernel.retain(|it| it.destination != route.destination);
                let (to, via) = (route.destination.to_string(), route.gateway.to_string());
                kernel.push(found(&to, &via, 2, ROUTE_PROTOCOL));
            }
            kernel.retain(|it| !changes.remove.contains(it));
            let territory = territory();
            let left = RouteChanges::between(&wanted, &kernel, &territory);
            prop_assert_eq!(left, RouteChanges::default());
            prop_assert_eq!(kernel.len(), wanted.len());
        }

        /// A kernel in which an entry takes the place of another with its key ends up with exactly
        /// the desired entries, whatever it had.
        #[test]
        fn entries_of_one_key_take_each_others_place(
            wanted in proptest::collection::btree_map(0u8..20, 1u8..5, 0..10),
            there in proptest::collection::btree_map(0u8..20, 1u8..5, 0..10),
        ) {
            let entries = |map: &BTreeMap<u8, u8>| map.clone().into_iter().collect::<Vec<_>>();
            let (desired, found) = (entries(&wanted), entries(&there));
            let changes = Changes::between(&desired, &found, |(key, _)| *key);
            let mut kernel = there.clone();
            kernel.extend(changes.set.iter().copied());
            for (key, _) in &changes.remove {
                prop_assert!(kernel.remove(key).is_some());
            }
            prop_assert_eq!(kernel, wanted);
            prop_assert!(changes.set.iter().all(|it| !found.contains(it)));
        }
    }
}
