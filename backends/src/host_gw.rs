//! host-gw: the kernel routes packets to a peer's subnet by way of the peer's own address, which must
//! be on the same link. Nothing is wrapped, so nothing is lost of the MTU.
//!
//! Routes stay when the daemon stops: traffic goes on, and the next start finds them right.

use std::collections::HashSet;
use std::net::IpAddr;

use ipnetwork::IpNetwork;
use tokio::sync::mpsc;
use weft_control::{Lease, LeaseAttrs, NetworkConfig};

use crate::netlink::{GatewayRoute, Netlink};
use crate::peer_routes::PeerRoutes;
use crate::reconcile::Territory;
use crate::{
    Backend, BackendError, BackendKind, BackendStatus, Basis, Desired, DesiredPeer,
    ExternalInterface, Opened, PeerWay, Report, Started, Way,
};

/// The host-gw backend.
#[derive(Debug)]
struct HostGw {
    interface: ExternalInterface,
    /// The overlay's.
    networks: Vec<IpNetwork>,
    netlink: Netlink,
    routes: PeerRoutes,
    peers: Vec<PeerWay>,
}

pub(crate) fn open(
    config: &NetworkConfig,
    interface: ExternalInterface,
) -> Result<Opened, BackendError> {
    if config.ipv6.is_some() && interface.ipv6.is_none() {
        return Err(BackendError::NoIpv6 { interface: interface.name });
    }
    // Nothing here can break by itself: what happens to routes, the daemon hears from the kernel.
    let (_, receiver) = mpsc::unbounded_channel();
    let netlink = Netlink::open().map_err(BackendError::NetlinkSocket)?;
    let networks = config.families().map(|family| family.network).collect();
    let routes = PeerRoutes::default();
    Ok((Box::new(HostGw { interface, networks, netlink, routes, peers: Vec::new() }), receiver))
}

impl Backend for HostGw {
    fn prepare(&mut self, _: &str) -> Result<LeaseAttrs, BackendError> {
        let ExternalInterface { ipv4, ipv6, public_ipv4, public_ipv6, .. } = self.interface;
        if ipv4 != public_ipv4 || ipv6 != public_ipv6 {
            return Err(BackendError::Nat { interface: self.interface.name.clone() });
        }
        Ok(LeaseAttrs {
            public_ip: public_ipv4,
            public_ipv6,
            backend_type: BackendKind::HostGw.to_string(),
            backend_data: None,
            backend_v6_data: None,
        })
    }

    fn start(&mut self, _: &Lease) -> Result<Started, BackendError> {
        let device = self.interface.name.clone();
        Ok(Started { device, other_devices: Vec::new(), mtu: self.interface.mtu })
    }

    fn reconcile(&mut self, desired: &Desired, basis: Basis) -> Report {
        let mut report = Report::default();
        self.peers.clear();
        let (mut routes, mut problems) = (Vec::new(), Vec::new());
        for peer in &desired.peers {
            match self.routes_to(peer) {
                Ok(found) => {
                    let subnets = found.iter().map(|route| route.destination).collect();
                    let way =
                        |public_ip| PeerWay { public_ip, subnets, way: Way::Direct, traffic: None };
                    self.peers.extend(found.first().map(|route| way(route.gateway)));
                    routes.extend(found);
                }
                Err(problem) => problems.push(problem),
            }
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
        for peer in &mut self.peers {
            peer.subnets.retain(|subnet| !refused.contains(subnet));
        }
        self.peers.retain(|peer| !peer.subnets.is_empty());
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
    /// One for each of the peer's subnets.
    fn routes_to(&self, peer: &DesiredPeer) -> Result<Vec<GatewayRoute>, String> {
        let Lease { key, attrs, .. } = &peer.lease;
        if attrs.backend_type != BackendKind::HostGw.to_string() {
            let kind = if attrs.backend_type.is_empty() { "udp" } else { &attrs.backend_type };
            return Err(format!("the node of {key} is of the backend {kind}, not host-gw"));
        }
        let publics: Vec<IpAddr> = attrs.public_addresses().collect();
        let route = |destination: IpNetwork| {
            let gateway = publics.iter().find(|ip| ip.is_ipv6() == destination.is_ipv6());
            // The kernel has IPv4 routes by way of IPv6 addresses, but not the other way round.
            let gateway = gateway.or(publics.iter().find(|ip| ip.is_ipv6()));
            let gateway = *gateway.ok_or_else(|| {
                format!("the node of {key} publishes no address of {destination}'s family")
            })?;
            Ok(GatewayRoute { destination, gateway, link: self.interface.index, onlink: false })
        };
        key.networks().map(route).collect()
    }
}
