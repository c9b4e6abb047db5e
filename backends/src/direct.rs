//! DirectRouting: a peer on the same link is sent packets as they are, by a plain route; the others
//! through the tunnel.

use std::collections::{HashMap, HashSet};
use std::fs;
use std::net::IpAddr;

use ipnetwork::IpNetwork;
use weft_control::LeaseAttrs;

use crate::Basis;
use crate::netlink::{GatewayRoute, Netlink};

/// Whom packets reach without a router, as the kernel routes now.
#[derive(Debug, Default)]
pub(crate) struct Direct {
    /// By address: the link it is on, if it is.
    links: HashMap<IpAddr, Option<u32>>,
}

impl Direct {
    /// Looks where these addresses are; those that it knows already only if the kernel is to be asked.
    pub(crate) fn look(&mut self, netlink: &Netlink, wanted: HashSet<IpAddr>, basis: Basis) {
        self.links.retain(|ip, _| basis == Basis::Memory && wanted.contains(ip));
        let unknown: Vec<IpAddr> =
            wanted.into_iter().filter(|ip| !self.links.contains_key(ip)).collect();
        self.links.extend(netlink.links_of(&unknown));
    }

    /// The link that an address is on.
    pub(crate) fn link(&self, ip: IpAddr) -> Option<u32> {
        *self.links.get(&ip)?
    }

    /// The plain route to a subnet of the node that published this, if it is on a link.
    pub(crate) fn route(&self, destination: IpNetwork, attrs: &LeaseAttrs) -> Option<GatewayRoute> {
        let gateway = attrs.address_of(destination.is_ipv6())?;
        let link = self.link(gateway)?;
        Some(GatewayRoute { destination, gateway, link, onlink: false })
    }
}

/// A peer may send directly what we would answer through the tunnel, and the other way round: both
/// choose by themselves. Strict filtering drops such packets (ip-sysctl.rst, rp_filter). On our own
/// device we make it loose.
pub(crate) fn loosen_filter(device: &str) {
    if is_strict(device)
        && let Err(error) = fs::write(path(device), "2")
    {
        tracing::warn!(
            "cannot set {} to 2: {error}; packets of peers that are routed directly are lost when \
             they come through the tunnel (make /proc/sys/net writable for weftd)",
            path(device)
        );
    }
}

/// What to tell of the filter on an interface that is not ours to change.
pub(crate) fn strict_filter(interface: &str) -> Option<String> {
    is_strict(interface).then(|| {
        format!(
            "strict reverse path filtering on {interface} drops what peers send directly while we \
             reach them through the tunnel, as DirectRouting may have it; make it loose: `sysctl \
             -w net.ipv4.conf.{interface}.rp_filter=2`"
        )
    })
}

/// The stricter of the device's and everybody's counts, and loose (2) beats strict (1).
fn is_strict(device: &str) -> bool {
    let read = |device: &str| fs::read_to_string(path(device)).ok()?.trim().parse::<u8>().ok();
    read(device).max(read("all")) == Some(1)
}

fn path(device: &str) -> String {
    format!("/proc/sys/net/ipv4/conf/{device}/rp_filter")
}
