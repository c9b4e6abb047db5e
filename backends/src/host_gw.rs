//! host-gw: the kernel routes packets to a peer's subnet by way of the peer's own address, which must
//! be on the same link. Nothing is wrapped, so nothing is lost of the MTU.
//!
//! Routes stay when the daemon stops: traffic goes on, and the next start finds them right.

use std::net::IpAddr;

use ipnetwork::IpNetwork;
use tokio::sync::mpsc;
use weft_control::{Lease, LeaseAttrs};

use crate::netlink::Netlink;
use crate::reconcile::{GatewayRoute, RouteChanges};
use crate::{
    Backend, BackendError, BackendKind, BackendStatus, Desired, DesiredPeer, ExternalInterface,
    Opened, PeerWay, Report, Started, Way,
};

/// The host-gw backend.
#[derive(Debug)]
struct HostGw {
    interface: ExternalInterface,
    netlink: Netlink,
    peers: Vec<PeerWay>,
}

pub(crate) fn open(interface: ExternalInterface) -> Result<Opened, BackendError> {
    // Nothing here can break by itself: what happens to routes, the daemon hears from the kernel.
    let (_, receiver) = mpsc::unbounded_channel();
    let netlink = Netlink::open().map_err(BackendError::NetlinkSocket)?;
    Ok((Box::new(HostGw { interface, netlink, peers: Vec::new() }), receiver))
}

impl Backend for HostGw {
    fn prepare(&mut self) -> Result<LeaseAttrs, BackendError> {
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
        Ok(Started { device: self.interface.name.clone(), mtu: self.interface.mtu })
    }

    fn reconcile(&mut self, desired: &Desired) -> Report {
        let mut report = Report::default();
        let link = self.interface.index;
        self.peers.clear();
        let mut routes = Vec::new();
        for peer in &desired.peers {
            match self.routes(peer) {
                Ok(found) => {
                    let subnets = found.iter().map(|route| route.destination).collect();
                    let way = |public_ip| PeerWay { public_ip, subnets, way: Way::Direct };
                    self.peers.extend(found.first().map(|route| way(route.gateway)));
                    routes.extend(found);
                }
                Err(problem) => report.problems.push(problem),
            }
        }
        let found = match self.netlink.routes() {
            Ok(found) => found,
            Err(error) => {
                report.problems.push(error.to_string());
                return report;
            }
        };
        let changes = RouteChanges::between(&routes, &found, link);
        report.problems.extend(changes.taken.iter().map(|route| {
            format!(
                "the route to {} is somebody else's and leads elsewhere; remove it (`ip route del \
                 {}`), and weft's takes its place",
                route.destination, route.destination
            )
        }));
        let name = &self.interface.name;
        let refused = self.netlink.set_gateway_routes(&changes.set, name);
        // What is refused is refused each time: it is no repair.
        report.changed = refused.len() < changes.set.len() || !changes.remove.is_empty();
        for (route, error) in refused {
            for peer in &mut self.peers {
                peer.subnets.retain(|subnet| *subnet != route.destination);
            }
            report.problems.push(format!(
                "{error}; the node {} must be on the same link as {name} for host-gw",
                route.gateway
            ));
        }
        self.peers.retain(|peer| !peer.subnets.is_empty());
        for error in self.netlink.remove_routes(&changes.remove) {
            report.problems.push(error.to_string());
        }
        report
    }

    fn stop(&mut self) {}

    fn status(&self) -> BackendStatus {
        BackendStatus { peers: self.peers.clone(), ..BackendStatus::default() }
    }
}

impl HostGw {
    /// One for each of the peer's subnets.
    fn routes(&self, peer: &DesiredPeer) -> Result<Vec<GatewayRoute>, String> {
        let Lease { key, attrs, .. } = &peer.lease;
        if attrs.backend_type != BackendKind::HostGw.to_string() {
            let kind = if attrs.backend_type.is_empty() { "udp" } else { &attrs.backend_type };
            return Err(format!("the node of {key} is of the backend {kind}, not host-gw"));
        }
        let publics: Vec<IpAddr> = attrs.public_addresses().collect();
        let route = |destination: IpNetwork| {
            let gateway = publics.iter().find(|ip| ip.is_ipv6() == destination.is_ipv6());
            let gateway = *gateway.ok_or_else(|| {
                format!("the node of {key} publishes no address of {destination}'s family")
            })?;
            Ok(GatewayRoute { destination, gateway, link: self.interface.index })
        };
        key.networks().map(route).collect()
    }
}
