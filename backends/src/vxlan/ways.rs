//! The ways to all peers, each with what it takes in the kernel: decided, not yet made.

use std::collections::{HashMap, HashSet};
use std::hash::Hash;
use std::net::IpAddr;

use ipnetwork::IpNetwork;
use serde_json::Value;
use weft_control::{Lease, LeaseAttrs, LeaseKey};

use super::Vxlan;
use crate::mac::Mac;
use crate::netlink::{FdbEntry, GatewayRoute, Neighbour, NetlinkError};
use crate::{BackendKind, Desired, DesiredPeer, PeerWay, Way, lose_subnets};

/// The way to one subnet through the tunnel.
#[derive(Debug, Clone, Copy)]
pub(super) struct Tunnel {
    pub(super) neighbour: Neighbour,
    pub(super) entry: FdbEntry,
    route: GatewayRoute,
}

/// The ways to all peers.
#[derive(Debug, Default)]
pub(super) struct Ways {
    pub(super) tunnels: Vec<Tunnel>,
    direct: Vec<GatewayRoute>,
    pub(super) problems: Vec<String>,
    pub(super) peers: Vec<PeerWay>,
    /// Who has which base address, and where each device's packets for a MAC go: two that differ would
    /// undo each other's entries.
    bases: HashMap<IpAddr, LeaseKey>,
    macs: HashMap<(u32, Mac), (IpAddr, LeaseKey)>,
}

impl Ways {
    pub(super) fn new(backend: &Vxlan, desired: &Desired) -> Self {
        let mut ways = Self::default();
        for peer in established_first(backend, desired) {
            let (mut subnets, mut way) = (Vec::new(), Way::Direct);
            for subnet in peer.lease.key.networks() {
                match ways.add(backend, peer, subnet) {
                    Ok(Way::Direct) => subnets.push(subnet),
                    Ok(Way::Tunnel) => {
                        subnets.push(subnet);
                        way = Way::Tunnel;
                    }
                    Err(problem) => ways.problems.push(problem),
                }
            }
            let public = peer.lease.attrs.public_addresses().next();
            let public = public.filter(|_| !subnets.is_empty());
            ways.peers.extend(public.map(|public_ip| PeerWay {
                public_ip,
                subnets,
                way,
                traffic: None,
            }));
        }
        ways
    }

    fn add(
        &mut self,
        backend: &Vxlan,
        peer: &DesiredPeer,
        subnet: IpNetwork,
    ) -> Result<Way, String> {
        let Lease { key, attrs, .. } = &peer.lease;
        BackendKind::Vxlan.require(&peer.lease)?;
        if let Some(route) = backend.direct.as_ref().and_then(|direct| direct.route(subnet, attrs))
        {
            self.direct.push(route);
            return Ok(Way::Direct);
        }
        let device = backend
            .devices
            .iter()
            .find(|device| device.carries(subnet.is_ipv6()))
            .ok_or_else(|| format!("no device carries {subnet}"))?;
        let data = if subnet.is_ipv6() { &attrs.backend_v6_data } else { &attrs.backend_data };
        if subnet.is_ipv6() && device.carries(false) && has_two_devices(attrs) {
            return Err(format!(
                "the node of {key} has a device for each family, and we have one for both, {} having \
                 addresses of one family only: give both hosts addresses of the same families, and \
                 start weftd again",
                backend.interface.name
            ));
        }
        let mac = vtep_mac(data.as_ref(), backend.options.vni)
            .map_err(|reason| format!("the node of {key} cannot be sent to: {reason}"))?;
        let destination = attrs.address_of(device.local.is_ipv6()).ok_or_else(|| {
            format!("the node of {key} publishes no address of {}'s family", device.local)
        })?;
        let base = subnet.network();
        let link = device.index;
        let entry = FdbEntry { link, mac, destination };
        self.claim(backend, key, base, entry)?;
        self.tunnels.push(Tunnel {
            neighbour: Neighbour { link, ip: base, mac },
            entry,
            route: GatewayRoute { destination: subnet, gateway: base, link, onlink: true },
        });
        Ok(Way::Tunnel)
    }

    fn claim(
        &mut self,
        backend: &Vxlan,
        key: &LeaseKey,
        base: IpAddr,
        FdbEntry { link, mac, destination }: FdbEntry,
    ) -> Result<(), String> {
        if backend.devices.iter().any(|device| device.mac == mac) {
            return Err(format!("the node of {key} has our own MAC {mac}"));
        }
        let (theirs, other) = *self.macs.entry((link, mac)).or_insert((destination, *key));
        if theirs != destination {
            return Err(format!("the node of {key} has the MAC {mac} of that of {other}"));
        }
        let other = *self.bases.entry(base).or_insert(*key);
        if other != *key {
            return Err(format!("the subnet of {key} begins with the same address as {other}"));
        }
        Ok(())
    }

    /// Those whose part was refused have no way: a route without its neighbour is worse than none.
    pub(super) fn give_up<T: Eq + Hash>(
        &mut self,
        refused: &[(T, NetlinkError)],
        part: impl Fn(&Tunnel) -> T,
    ) {
        let refused: HashSet<&T> = refused.iter().map(|(part, _)| part).collect();
        let lost = self.tunnels.iter().filter(|tunnel| refused.contains(&part(tunnel)));
        let lost = lost.map(|tunnel| tunnel.route.destination).collect();
        self.lose(&lost);
    }

    pub(super) fn lose(&mut self, subnets: &HashSet<IpNetwork>) {
        if subnets.is_empty() {
            return;
        }
        self.tunnels.retain(|tunnel| !subnets.contains(&tunnel.route.destination));
        self.direct.retain(|route| !subnets.contains(&route.destination));
        lose_subnets(&mut self.peers, subnets);
    }

    pub(super) fn routes(&self) -> Vec<GatewayRoute> {
        self.tunnels.iter().map(|tunnel| tunnel.route).chain(self.direct.iter().copied()).collect()
    }
}

/// Those that have their forwarding entry come first, so that nobody takes a MAC from them.
fn established_first<'a>(backend: &Vxlan, desired: &'a Desired) -> Vec<&'a DesiredPeer> {
    let known: HashSet<(Mac, IpAddr)> =
        backend.fdb.iter().map(|entry| (entry.mac, entry.destination)).collect();
    let is_known = |peer: &&DesiredPeer| {
        let attrs = &peer.lease.attrs;
        let data = [&attrs.backend_data, &attrs.backend_v6_data].into_iter().flatten();
        let mut macs = data.filter_map(|data| vtep_mac(Some(data), backend.options.vni).ok());
        macs.any(|mac| attrs.public_addresses().any(|ip| known.contains(&(mac, ip))))
    };
    let (mut first, then): (Vec<_>, Vec<_>) = desired.peers.iter().partition(is_known);
    first.extend(then);
    first
}

/// Whether a node's IPv6 frames go to another device than its IPv4 frames, which one device cannot
/// send to: each takes what bears its own MAC only.
fn has_two_devices(attrs: &LeaseAttrs) -> bool {
    let mac = |data: &Option<Value>| data.as_ref().map(|data| data["VtepMAC"].clone());
    match (mac(&attrs.backend_data), mac(&attrs.backend_v6_data)) {
        (Some(ipv4), Some(ipv6)) => ipv4 != ipv6,
        (None, _) | (_, None) => false,
    }
}

/// The MAC that a lease tells of.
fn vtep_mac(data: Option<&Value>, vni: u32) -> Result<Mac, String> {
    let data = data.ok_or("its lease has no BackendData for that family")?;
    // flannel up to 0.13 writes none, and 0.17 no more than 16 bits of it.
    if let Some(theirs) = data.get("VNI").filter(|theirs| !theirs.is_null()) {
        let theirs = theirs.as_u64().ok_or("its VNI is no number")?;
        if ![vni, vni & 0xffff].map(u64::from).contains(&theirs) {
            return Err(format!(
                "its VNI is {theirs}, ours {vni}; restart it with the same config"
            ));
        }
    }
    let text = data["VtepMAC"].as_str().ok_or("its lease tells no VtepMAC")?;
    let mac = text.parse::<Mac>().map_err(|error| error.to_string())?;
    mac.is_unicast().then_some(mac).ok_or_else(|| format!("{mac} is no device's MAC"))
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn leases_of_flannels_are_read_and_bad_ones_are_told() {
        let mac = |data: Value| vtep_mac(Some(&data), 70_000);
        let good = json!({"VNI": 70_000, "VtepMAC": "c6:d2:32:6f:8f:44"});
        assert_eq!(mac(good).unwrap().to_string(), "c6:d2:32:6f:8f:44");
        assert!(mac(json!({"VNI": 4464, "VtepMAC": "c6:d2:32:6f:8f:44"})).is_ok(), "flannel 0.17");
        assert!(mac(json!({"VtepMAC": "c6:d2:32:6f:8f:44"})).is_ok(), "flannel 0.13");
        for (data, told) in [
            (
                json!({"VNI": 135_536, "VtepMAC": "c6:d2:32:6f:8f:44"}),
                "its VNI is 135536, ours 70000",
            ),
            (json!({"VNI": 2, "VtepMAC": "c6:d2:32:6f:8f:44"}), "its VNI is 2, ours 70000"),
            (json!({"VNI": 70_000, "VtepMAC": "01:00:5e:00:00:01"}), "no device's MAC"),
            (json!({"VNI": 70_000, "VtepMAC": "x"}), "not a MAC address"),
            (json!({"VNI": 70_000}), "no VtepMAC"),
            (json!({"VNI": "70000", "VtepMAC": "c6:d2:32:6f:8f:44"}), "its VNI is no number"),
            (json!("x"), "no VtepMAC"),
        ] {
            assert!(mac(data.clone()).unwrap_err().contains(told), "{data}");
        }
        assert!(vtep_mac(None, 1).is_err());
    }
}
