//! What is desired against what the kernel has, and the changes between them. Pure: it is given
//! both.

use std::net::IpAddr;

use ipnetwork::IpNetwork;

use crate::netlink::{KernelRoute, ROUTE_PROTOCOL};

/// A route to a peer's subnet by way of a neighbour.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct GatewayRoute {
    pub destination: IpNetwork,
    pub gateway: IpAddr,
    /// The index of the link that the neighbour is on.
    pub link: u32,
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
    /// `link` is the one that all desired routes leave by. A route of somebody else that is just the
    /// desired one, as flannel leaves them, becomes ours; one that leads elsewhere stays.
    pub(crate) fn between(desired: &[GatewayRoute], found: &[KernelRoute], link: u32) -> Self {
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
            let foreign =
                at(route.destination).find(|it| !same(it) && it.protocol != ROUTE_PROTOCOL);
            match foreign {
                Some(foreign) => changes.taken.push((*foreign).clone()),
                None if is_there => {}
                None => changes.set.push(*route),
            }
        }
        let mut wanted: Vec<IpNetwork> = desired.iter().map(|route| route.destination).collect();
        wanted.sort_unstable();
        let stale = found.into_iter().filter(|route| {
            route.protocol == ROUTE_PROTOCOL
                && route.link == Some(link)
                && route.gateway.is_some()
                && wanted.binary_search(&route.destination).is_err()
        });
        changes.remove = stale.cloned().collect();
        changes
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const BOOT: u8 = 3;

    fn desired(destination: &str, gateway: &str) -> GatewayRoute {
        let [destination, gateway] = [destination, gateway].map(str::to_owned);
        GatewayRoute {
            destination: destination.parse().unwrap(),
            gateway: gateway.parse().unwrap(),
            link: 2,
        }
    }

    fn found(destination: &str, gateway: &str, link: u32, protocol: u8) -> KernelRoute {
        KernelRoute {
            destination: destination.parse().unwrap(),
            gateway: gateway.parse().ok(),
            link: Some(link),
            protocol,
        }
    }

    fn changes(found: &[KernelRoute]) -> RouteChanges {
        let desired = [desired("10.3.1.0/24", "192.0.2.1"), desired("10.3.2.0/24", "192.0.2.2")];
        RouteChanges::between(&desired, found, 2)
    }

    #[test]
    fn only_what_differs_is_changed() {
        let right = [
            found("10.3.1.0/24", "192.0.2.1", 2, ROUTE_PROTOCOL),
            found("10.3.2.0/24", "192.0.2.2", 2, ROUTE_PROTOCOL),
            found("0.0.0.0/0", "192.0.2.254", 2, BOOT),
            found("10.9.0.0/16", "", 7, ROUTE_PROTOCOL),
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
            let changes = RouteChanges::between(&wanted, &kernel, 2);
            for route in &changes.set {
                kernel.retain(|it| it.destination != route.destination);
                let (to, via) = (route.destination.to_string(), route.gateway.to_string());
                kernel.push(found(&to, &via, 2, ROUTE_PROTOCOL));
            }
            kernel.retain(|it| !changes.remove.contains(it));
            prop_assert_eq!(RouteChanges::between(&wanted, &kernel, 2), RouteChanges::default());
            prop_assert_eq!(kernel.len(), wanted.len());
        }
    }
}
