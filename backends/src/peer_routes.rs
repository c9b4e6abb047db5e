//! The routes to peers' subnets by way of neighbours, kept what they should be.

use std::collections::HashSet;

use ipnetwork::IpNetwork;

use crate::Basis;
use crate::netlink::{GatewayRoute, KernelRoute, Netlink, NetlinkError, ROUTE_PROTOCOL, metric};
use crate::reconcile::{RouteChanges, Territory};

/// One daemon's routes.
#[derive(Debug, Default)]
pub(crate) struct PeerRoutes {
    /// What the kernel has in our territory, as far as we know.
    known: Option<Vec<KernelRoute>>,
}

/// What came of a reconciliation.
#[derive(Debug, Default)]
pub(crate) struct Outcome {
    /// Whether the kernel's routes are others now.
    pub(crate) changed: bool,
    pub(crate) refused: Vec<(GatewayRoute, NetlinkError)>,
    pub(crate) problems: Vec<String>,
}

impl PeerRoutes {
    /// Makes the kernel have these routes, new ones first, and none of ours besides.
    ///
    /// # Errors
    /// The kernel does not tell of its routes.
    pub(crate) fn reconcile(
        &mut self,
        netlink: &Netlink,
        desired: &[GatewayRoute],
        territory: &Territory,
        basis: Basis,
    ) -> Result<Outcome, NetlinkError> {
        let known = self.known.take().filter(|_| basis == Basis::Memory);
        let mut known = known.map_or_else(|| netlink.routes(), Ok)?;
        known.retain(|route| territory.has(route));
        let mut changes = RouteChanges::between(desired, &known, territory);
        let mut outcome = Outcome::default();
        outcome.problems.extend(changes.taken.iter().map(|route| {
            format!(
                "the route to {} is somebody else's and leads elsewhere; remove it (`ip route del \
                 {}`), and weft's takes its place",
                route.destination, route.destination
            )
        }));
        outcome.refused = netlink.set_gateway_routes(&changes.set);
        let refused: HashSet<IpNetwork> =
            outcome.refused.iter().map(|(route, _)| route.destination).collect();
        changes.set.retain(|route| !refused.contains(&route.destination));
        // What we have there leads to where the subnet was before.
        let is_former = |it: &&KernelRoute| refused.contains(&it.destination) && territory.owns(it);
        changes.remove.extend(known.iter().filter(is_former));
        for (route, error) in netlink.remove_routes(&changes.remove) {
            changes.remove.retain(|removed| *removed != route);
            outcome.problems.push(error.to_string());
        }
        // What is refused is refused each time: it is no repair.
        outcome.changed = !changes.set.is_empty() || !changes.remove.is_empty();
        remember(&mut known, &changes);
        self.known = Some(known);
        Ok(outcome)
    }
}

fn remember(known: &mut Vec<KernelRoute>, made: &RouteChanges) {
    let replaced: HashSet<IpNetwork> = made.set.iter().map(|route| route.destination).collect();
    let removed: HashSet<&KernelRoute> = made.remove.iter().collect();
    known.retain(|it| !replaced.contains(&it.destination) && !removed.contains(it));
    known.extend(made.set.iter().map(|route| KernelRoute {
        destination: route.destination,
        gateway: Some(route.gateway),
        link: Some(route.link),
        protocol: ROUTE_PROTOCOL,
        metric: metric(route.destination),
    }));
}
