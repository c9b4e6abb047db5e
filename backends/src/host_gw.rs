//! host-gw: the kernel routes packets to a peer's subnet by way of the peer's own address, which must
//! be on the same link. Nothing is wrapped, so nothing is lost of the MTU.
//!
//! The kernel has IPv4 routes by way of IPv6 addresses, but not the other way round. A node that has no
//! IPv6 address which others know publishes its link-local one in its lease.
//!
//! Routes stay when the daemon stops: traffic goes on, and the next start finds them right.

use std::collections::HashSet;
use std::net::{IpAddr, Ipv6Addr};

use ipnetwork::IpNetwork;
use serde_json::json;
use tokio::sync::mpsc;
use weft_control::{Lease, LeaseAttrs, NetworkConfig};

use crate::direct::Direct;
use crate::netlink::{GatewayRoute, Netlink};
use crate::peer_routes::PeerRoutes;
use crate::reconcile::Territory;
use crate::vxlan;
use crate::{
    Backend, BackendError, BackendKind, BackendStatus, Basis, Desired, DesiredPeer,
    ExternalInterface, Opened, PeerWay, Report, Started, Way, lose_subnets,
};

/// What BackendV6Data tells.
const LINK_LOCAL: &str = "LinkLocal";

/// The host-gw backend.
#[derive(Debug)]
struct HostGw {
    interface: ExternalInterface,
    /// The overlay's.
    networks: Vec<IpNetwork>,
    netlink: Netlink,
    routes: PeerRoutes,
    /// Who is on the link, of those whose IPv6 route could not tell.
    neighbours: Direct,
    peers: Vec<PeerWay>,
}

pub(crate) fn open(
    config: &NetworkConfig,
    interface: ExternalInterface,
) -> Result<Opened, BackendError> {
    if config.ipv6.is_some() && interface.ipv6.or(interface.link_local).is_none() {
        return Err(BackendError::NoIpv6 { interface: interface.name });
    }
    // Nothing here can break by itself: what happens to routes, the daemon hears from the kernel.
    let (_, receiver) = mpsc::unbounded_channel();
    let netlink = Netlink::open().map_err(BackendError::NetlinkSocket)?;
    let networks = config.networks().collect();
    let host_gw = HostGw {
        interface,
        networks,
        netlink,
        routes: PeerRoutes::default(),
        neighbours: Direct::default(),
        peers: Vec::new(),
    };
    Ok((Box::new(host_gw), receiver))
}

impl Backend for HostGw {
    fn prepare(&mut self, _: &str) -> Result<LeaseAttrs, BackendError> {
        let ExternalInterface { ipv4, ipv6, public_ipv4, public_ipv6, link_local, .. } =
            self.interface;
        if ipv4 != public_ipv4 || ipv6 != public_ipv6 {
            return Err(BackendError::Nat { interface: self.interface.name.clone() });
        }
        // flannel's leases say no more than these.
        let is_told = ipv6.is_none() && self.networks.iter().any(IpNetwork::is_ipv6);
        let data = |ip: Ipv6Addr| json!({ LINK_LOCAL: ip });
        Ok(LeaseAttrs {
            public_ip: public_ipv4,
            public_ipv6,
            backend_type: BackendKind::HostGw.to_string(),
            backend_data: None,
            backend_v6_data: link_local.filter(|_| is_told).map(data),
        })
    }

    fn start(&mut self, _: &Lease) -> Result<Started, BackendError> {
        vxlan::remove_stale(&self.netlink, &mut self.netlink.links()?, &self.networks, &[])?;
        let device = self.interface.name.clone();
        Ok(Started { device, other_devices: Vec::new(), mtu: self.interface.mtu })
    }

    fn reconcile(&mut self, desired: &Desired, basis: Basis) -> Report {
        let mut report = Report::default();
        self.peers.clear();
        let doubtful = desired
            .peers
            .iter()
            .filter(|peer| peer.lease.key.ipv6.is_some() && self.is_doubtful(&peer.lease.attrs));
        let addresses = doubtful.flat_map(DesiredPeer::addresses).collect();
        self.neighbours.look(&self.netlink, addresses, basis);
        let (mut routes, mut problems) = (Vec::new(), Vec::new());
        for peer in &desired.peers {
            let mut found = Vec::new();
            for destination in peer.lease.key.networks() {
                match self.route_to(destination, peer) {
                    Ok(route) => found.push(route),
                    Err(problem) => problems.push(problem),
                }
            }
            self.peers.extend(way_to(&peer.lease.attrs, &found));
            routes.extend(found);
        }
        report.tell(problems);
        let territory = Territory { networks: self.networks.clone(), links: Vec::new() };
        let outcome = match self.routes.reconcile(&self.netlink, &routes, &territory, basis) {
            Ok(outcome) => outcome,
            Err(error) => {
                report.failures.push(error.to_string());
                return report;
            }
        };
        report.changed = outcome.changed;
        report.tell(outcome.problems);
        let refused: HashSet<IpNetwork> =
            outcome.refused.iter().map(|(route, _)| route.destination).collect();
        lose_subnets(&mut self.peers, &refused);
        report.tell(outcome.refused.iter().map(|(route, error)| {
            format!(
                "{error}; the node {} must be on the same link as {} for host-gw",
                route.gateway, self.interface.name
            )
        }));
        report
    }

    fn stop(&mut self) {}

    fn status(&self) -> BackendStatus {
        BackendStatus { peers: self.peers.clone(), ..BackendStatus::default() }
    }
}

impl HostGw {
    /// To one of the subnets of a lease.
    fn route_to(&self, destination: IpNetwork, peer: &DesiredPeer) -> Result<GatewayRoute, String> {
        let Lease { key, attrs, .. } = &peer.lease;
        BackendKind::HostGw.require(&peer.lease)?;
        let link = self.interface.index;
        if destination.is_ipv6() && self.is_doubtful(attrs) {
            let gateway = IpAddr::V6(self.neighbour(peer)?);
            return Ok(GatewayRoute { destination, gateway, link, onlink: true });
        }
        let same = attrs.address_of(destination.is_ipv6());
        let gateway = same.or_else(|| attrs.address_of(true));
        let gateway = gateway.ok_or_else(|| {
            format!("the node of {key} publishes no address of {destination}'s family")
        })?;
        Ok(GatewayRoute { destination, gateway, link, onlink: false })
    }

    /// Whether the kernel cannot say of the node's IPv6 address that it is on our link.
    fn is_doubtful(&self, attrs: &LeaseAttrs) -> bool {
        self.interface.ipv6.is_none() || attrs.public_ipv6.is_none()
    }

    /// The IPv6 address of a doubtful one.
    fn neighbour(&self, peer: &DesiredPeer) -> Result<Ipv6Addr, String> {
        let (Lease { key, attrs, .. }, name) = (&peer.lease, &self.interface.name);
        let ours = Some(self.interface.index);
        if !peer.addresses().any(|ip| self.neighbours.link(ip) == ours) {
            return Err(format!(
                "the node of {key} must be on the same link as {name} for host-gw"
            ));
        }
        attrs.public_ipv6.or_else(|| link_local(attrs)).ok_or_else(|| {
            format!(
                "the node of {key} publishes no IPv6 address, and no {LINK_LOCAL} one either, as weft \
                 does; give it one"
            )
        })
    }
}

/// What a lease tells, if it can be believed.
fn link_local(attrs: &LeaseAttrs) -> Option<Ipv6Addr> {
    let ip: Ipv6Addr = attrs.backend_v6_data.as_ref()?[LINK_LOCAL].as_str()?.parse().ok()?;
    ip.is_unicast_link_local().then_some(ip)
}

/// What the status says of the node with these routes.
fn way_to(attrs: &LeaseAttrs, routes: &[GatewayRoute]) -> Option<PeerWay> {
    let gateway = routes.first()?.gateway;
    // A link-local address tells nobody who that is.
    let is_public = attrs.public_addresses().any(|ip| ip == gateway);
    let public_ip = if is_public { gateway } else { attrs.public_addresses().next()? };
    let subnets = routes.iter().map(|route| route.destination).collect();
    Some(PeerWay { public_ip, subnets, way: Way::Direct, traffic: None })
}
