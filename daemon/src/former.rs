//! What this node made for a Network that is not the overlay's any more: peers' routes would lead there
//! for good, and a device would let in what strangers send.

use anyhow::Context;
use ipnetwork::IpNetwork;
use weft_backends::netlink::{LINK_ALIAS, Netlink, ROUTE_PROTOCOL};

/// Removes devices and routes of weft's in the `former` networks that lie in none of the `kept` ones.
///
/// # Errors
/// The kernel does not tell what there is, or does not remove it.
pub(crate) fn remove(former: &[IpNetwork], kept: &[IpNetwork]) -> anyhow::Result<()> {
    if former.iter().all(|network| kept.contains(network)) {
        return Ok(());
    }
    let netlink = Netlink::open().context("cannot open a netlink socket")?;
    let is_left = |destination: IpNetwork| {
        let lies_in = |network: &IpNetwork| network.contains(destination.network());
        former.iter().any(lies_in) && !kept.iter().any(lies_in)
    };
    for link in netlink.links()? {
        let is_ours = link.alias.as_deref() == Some(LINK_ALIAS);
        if is_ours && link.addresses.iter().any(|address| is_left(address.network)) {
            tracing::info!(device = link.name, "removing the device of a former Network");
            netlink.remove_link(&link)?;
        }
    }
    for network in netlink.blackholes()?.into_iter().filter(|network| is_left(*network)) {
        netlink.remove_blackhole(network)?;
    }
    let mut routes = netlink.routes()?;
    routes.retain(|route| route.protocol == ROUTE_PROTOCOL && is_left(route.destination));
    if routes.is_empty() {
        return Ok(());
    }
    tracing::info!(count = routes.len(), "removing the routes of a former Network");
    let refused = netlink.remove_routes(&routes);
    refused.into_iter().next().map_or(Ok(()), |(_, error)| Err(error.into()))
}
