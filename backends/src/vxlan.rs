//! vxlan: the kernel wraps containers' Ethernet frames into UDP datagrams (RFC 7348), told by us
//! which peer is behind which address. Devices, entries and lease data are flannel's.
//!
//! The device's own address is the base of our subnet. For each peer there are three things, made in
//! this order: the MAC of its base address (else the kernel would ask for it, and nobody answers),
//! where that MAC is, and the route to its subnet by way of the base address. All of it, the device
//! too, stays when the daemon stops: traffic goes on, and the next start finds it right.

use std::collections::{HashMap, HashSet};
use std::fs;
use std::hash::Hash;
use std::net::IpAddr;

use ipnetwork::IpNetwork;
use serde_json::{Value, json};
use sha2::{Digest, Sha256};
use tokio::sync::mpsc;
use weft_control::{ConfigError, Lease, LeaseAttrs, LeaseKey, NetworkConfig};

use crate::direct::{self, Direct};
use crate::ethtool;
use crate::mac::Mac;
use crate::netlink::{
    FdbEntry, GatewayRoute, Link, LinkSettings, Neighbour, Netlink, NetlinkError, VxlanShape,
};
use crate::peer_routes::PeerRoutes;
use crate::reconcile::{Changes, Territory};
use crate::{
    Backend, BackendError, BackendKind, BackendStatus, Basis, Desired, DesiredPeer,
    ExternalInterface, MTU_MIN, Offload, Opened, PeerWay, Report, Started, Way,
};

/// Checksums of inner packets are left to the network card, and some fill in wrong ones.
const TX_CHECKSUM: &str = "tx-checksum-ip-generic";
/// What the wrapping takes: Ethernet, VXLAN, UDP and an IPv4 header.
const OVERHEAD_IPV4: u32 = 50;
/// The same with an IPv6 header.
const OVERHEAD_IPV6: u32 = 70;
/// The largest IP packet.
const MTU_MAX: u32 = 65_535;
/// A VNI has 24 bits.
const VNI_MAX: u32 = (1 << 24) - 1;
/// flannel's, where the config names none.
const DEFAULT_VNI: u32 = 1;
/// Where the config names none (drivers/net/vxlan/vxlan_core.c, vxlan_port).
const KERNEL_PORT: u16 = 8472;
/// More lines of one kind tell an operator nothing.
const LINES_MAX: usize = 20;

/// The vxlan backend.
#[derive(Debug)]
struct Vxlan {
    config: NetworkConfig,
    interface: ExternalInterface,
    options: VxlanOptions,
    netlink: Netlink,
    /// As they were when the kernel was last asked.
    devices: Vec<Device>,
    direct: Option<Direct>,
    routes: PeerRoutes,
    neighbours: Vec<Neighbour>,
    fdb: Vec<FdbEntry>,
    /// Whether what is known of the kernel may be gone by.
    is_known: bool,
    peers: Vec<PeerWay>,
}

/// The `Backend` part of the network config.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct VxlanOptions {
    vni: u32,
    /// The kernel's own (8472) where none is given.
    port: Option<u16>,
    /// Taken for the interface's MTU, where that is not smaller.
    mtu: Option<u32>,
    gbp: bool,
    learning: bool,
    direct_routing: bool,
}

impl VxlanOptions {
    fn read(config: &NetworkConfig) -> Result<Self, ConfigError> {
        let backend = &config.backend;
        Ok(Self {
            vni: backend.number_option("VNI", VNI_MAX)?.unwrap_or(DEFAULT_VNI),
            port: backend.u16_option("Port")?.filter(|port| *port > 0),
            mtu: backend.number_option("MTU", MTU_MAX)?.filter(|mtu| *mtu > 0),
            gbp: backend.bool_option("GBP")?.unwrap_or(false),
            learning: backend.bool_option("Learning")?.unwrap_or(false),
            direct_routing: backend.bool_option("DirectRouting")?.unwrap_or(false),
        })
    }
}

/// A device and what it is for.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Device {
    name: String,
    /// Our address on the underlay.
    local: IpAddr,
    /// The families of containers' packets that it carries.
    ipv4: bool,
    ipv6: bool,
    /// What the kernel made of it; 0 before.
    index: u32,
    /// What it has, or is to have.
    mac: Mac,
}

impl Device {
    fn carries(&self, ipv6: bool) -> bool {
        if ipv6 { self.ipv6 } else { self.ipv4 }
    }

    fn overhead(&self) -> u32 {
        if self.local.is_ipv6() { OVERHEAD_IPV6 } else { OVERHEAD_IPV4 }
    }
}

pub(crate) fn open(
    config: NetworkConfig,
    interface: ExternalInterface,
) -> Result<Opened, BackendError> {
    let options = VxlanOptions::read(&config)?;
    // Nothing here can break by itself: what happens to devices, the daemon hears from the kernel.
    let (_, receiver) = mpsc::unbounded_channel();
    let netlink = Netlink::open().map_err(BackendError::NetlinkSocket)?;
    let backend = Vxlan {
        config,
        interface,
        options,
        netlink,
        devices: Vec::new(),
        direct: options.direct_routing.then(Direct::default),
        routes: PeerRoutes::default(),
        neighbours: Vec::new(),
        fdb: Vec::new(),
        is_known: false,
        peers: Vec::new(),
    };
    Ok((Box::new(backend), receiver))
}

impl Backend for Vxlan {
    fn prepare(&mut self, node_id: &str) -> Result<LeaseAttrs, BackendError> {
        self.devices = devices(&self.config, &self.interface, self.options.vni, node_id)?;
        self.mtu()?;
        self.look_after_devices(None)?;
        Ok(self.attrs())
    }

    fn start(&mut self, lease: &Lease) -> Result<Started, BackendError> {
        self.is_known = false;
        self.look_after_devices(Some(lease))?;
        let device = self.devices.first().map(|device| device.name.clone()).unwrap_or_default();
        Ok(Started { device, mtu: self.mtu()? })
    }

    fn reconcile(&mut self, desired: &Desired, basis: Basis) -> Report {
        let mut report = Report::default();
        let basis = if self.is_known { basis } else { Basis::Kernel };
        if let Err(error) = self.bring_about(desired, basis, &mut report) {
            // Half of it may be done.
            self.is_known = false;
            report.failures.push(error.to_string());
        }
        report.neighbours_of = self.devices.iter().map(|device| device.index).collect();
        report
    }

    fn stop(&mut self) {}

    fn give_up(&mut self, offload: Offload) -> Option<&'static str> {
        if offload != Offload::Checksum {
            return None;
        }
        let mut was_on = false;
        for device in &self.devices {
            was_on |= ethtool::switch_off(&device.name, TX_CHECKSUM);
        }
        was_on.then_some(TX_CHECKSUM)
    }

    fn status(&self) -> BackendStatus {
        BackendStatus { peers: self.peers.clone(), ..BackendStatus::default() }
    }
}

impl Vxlan {
    /// What containers may send: the least that one of the devices carries.
    fn mtu(&self) -> Result<u32, BackendError> {
        let mtu = self.devices.iter().map(|device| self.mtu_of(device)).min().unwrap_or(0);
        if mtu < MTU_MIN {
            let interface = self.interface.name.clone();
            return Err(BackendError::MtuTooSmall { interface, mtu: self.interface.mtu });
        }
        Ok(mtu)
    }

    fn mtu_of(&self, device: &Device) -> u32 {
        let external = self.options.mtu.unwrap_or(MTU_MAX).min(self.interface.mtu);
        external.saturating_sub(device.overhead())
    }

    fn attrs(&self) -> LeaseAttrs {
        let data = |ipv6: bool| {
            let device = self.devices.iter().find(|device| device.carries(ipv6))?;
            Some(json!({"VNI": self.options.vni, "VtepMAC": device.mac.to_string()}))
        };
        LeaseAttrs {
            public_ip: self.interface.public_ipv4,
            public_ipv6: self.interface.public_ipv6,
            backend_type: BackendKind::Vxlan.to_string(),
            backend_data: data(false),
            backend_v6_data: data(true),
        }
    }

    /// Makes each device what it should be, with our address under this lease, and notes the MAC that
    /// it has then. Says whether anything had to be done.
    fn look_after_devices(&mut self, lease: Option<&Lease>) -> Result<bool, BackendError> {
        let mut changed = false;
        let links = self.netlink.links()?;
        for number in 0..self.devices.len() {
            changed |= self.make_or_adopt(&self.devices[number], &links)?;
        }
        // Read anew: somebody may have given a new device another MAC already.
        let links = self.netlink.links()?;
        for number in 0..self.devices.len() {
            let device = &self.devices[number];
            let link = named(&links, &device.name)?;
            let mtu = Some(self.mtu_of(device));
            changed |= self.netlink.claim_link(link, LinkSettings { mtu, queue_len: None })?;
            if let Some(lease) = lease {
                changed |= self.set_addresses(device, link, lease)?;
            }
            set_sysctls(device, self.options.direct_routing);
            let device = &mut self.devices[number];
            if let Some(mac) = link.mac
                && device.index == link.index
                && device.mac != mac
            {
                tracing::warn!(
                    device = device.name,
                    "somebody changed the MAC of the device from {} to {mac}; the lease follows",
                    device.mac
                );
            }
            (device.index, device.mac) = (link.index, link.mac.unwrap_or(device.mac));
        }
        Ok(changed)
    }

    /// Says whether it had to be made.
    fn make_or_adopt(&self, device: &Device, links: &[Link]) -> Result<bool, BackendError> {
        let wanted = VxlanShape {
            vni: self.options.vni,
            underlay: Some(self.interface.index),
            local: Some(device.local),
            port: self.options.port,
            learning: self.options.learning,
            gbp: self.options.gbp,
            others: Vec::new(),
        };
        let there = links.iter().find(|link| link.name == device.name);
        match there.map(|link| (link, &link.vxlan)) {
            None => {}
            Some((link, None)) => {
                let kind = link.kind.clone().unwrap_or_else(|| "network card".into());
                return Err(BackendError::DeviceTaken { device: device.name.clone(), kind });
            }
            Some((link, Some(shape))) => match shape.difference(&wanted) {
                None => return Ok(false),
                Some(difference) => {
                    tracing::warn!(
                        device = device.name,
                        "already exists with incompatible configuration: {difference}; recreating \
                         device"
                    );
                    self.netlink.remove_link(link)?;
                }
            },
        }
        if let Some(other) = links.iter().find(|link| is_rival(link, &wanted, &device.name)) {
            return Err(BackendError::VniTaken {
                vni: self.options.vni,
                device: other.name.clone(),
            });
        }
        self.netlink.add_vxlan(&device.name, &wanted, device.mac, self.mtu_of(device))?;
        tracing::info!(device = device.name, mac = %device.mac, "made the device");
        Ok(true)
    }

    /// The base of each of our subnets, and no other address of the overlay.
    fn set_addresses(
        &self,
        device: &Device,
        link: &Link,
        lease: &Lease,
    ) -> Result<bool, BackendError> {
        let bases = lease.key.networks().filter(|subnet| device.carries(subnet.is_ipv6()));
        let wanted: Vec<IpNetwork> =
            bases.map(|subnet| IpNetwork::from(subnet.network())).collect();
        let mut changed = false;
        for address in &wanted {
            changed |= self.netlink.set_address(link, *address)?;
        }
        for found in link.addresses.iter().filter(|found| !wanted.contains(&found.network)) {
            let ip = found.network.ip();
            if self.config.families().any(|family| family.network.contains(ip)) {
                self.netlink.remove_address(link, found.network)?;
                changed = true;
            }
        }
        Ok(changed)
    }

    fn bring_about(
        &mut self,
        desired: &Desired,
        basis: Basis,
        report: &mut Report,
    ) -> Result<(), BackendError> {
        if basis == Basis::Kernel {
            let before = self.attrs();
            report.changed = self.look_after_devices(Some(&desired.lease))?;
            let now = self.attrs();
            report.changed |= now != before;
            report.attrs = Some(now);
            let links: Vec<u32> = self.devices.iter().map(|device| device.index).collect();
            self.neighbours = self.netlink.neighbours(&links)?;
            self.fdb = self.netlink.fdb(&links)?;
        }
        if let Some(direct) = &mut self.direct {
            direct.look(&self.netlink, desired, basis);
            report.problems.extend(direct::strict_filter(&self.interface.name));
        }
        let ways = Ways::new(self, desired);
        self.set(ways, basis, report)
    }

    /// New state first, in an order in which no packet finds half of it; what is old goes after.
    fn set(
        &mut self,
        mut ways: Ways,
        basis: Basis,
        report: &mut Report,
    ) -> Result<(), BackendError> {
        let neighbours = ways.tunnels.iter().map(|tunnel| tunnel.neighbour).collect::<Vec<_>>();
        // A peer's device that carries both families has one entry for both.
        let entries: HashSet<FdbEntry> = ways.tunnels.iter().map(|tunnel| tunnel.entry).collect();
        let entries: Vec<FdbEntry> = entries.into_iter().collect();
        let neighbours = Changes::between(&neighbours, &self.neighbours, |it| (it.link, it.ip));
        let fdb = Changes::between(&entries, &self.fdb, |it| *it);

        let refused = self.netlink.set_neighbours(&neighbours.set);
        report.changed |= refused.len() < neighbours.set.len();
        ways.give_up(&refused, |tunnel| tunnel.neighbour);
        tell(report, refused.iter().map(|(_, error)| error.to_string()));
        let refused_fdb = self.netlink.set_fdb(&fdb.set);
        report.changed |= refused_fdb.len() < fdb.set.len();
        ways.give_up(&refused_fdb, |tunnel| tunnel.entry);
        tell(report, refused_fdb.iter().map(|(_, error)| error.to_string()));

        let territory = Territory {
            networks: self.config.families().map(|family| family.network).collect(),
            links: self.devices.iter().map(|device| device.index).collect(),
        };
        let routes = ways.routes();
        let outcome = self.routes.reconcile(&self.netlink, &routes, &territory, basis)?;
        report.changed |= outcome.changed;
        tell(report, outcome.problems);
        ways.lose(&outcome.refused.iter().map(|(route, _)| route.destination).collect());
        tell(report, outcome.refused.iter().map(|(_, error)| error.to_string()));

        let left_fdb = self.netlink.remove_fdb(&fdb.remove);
        let left = self.netlink.remove_neighbours(&neighbours.remove);
        let removed = fdb.remove.len() + neighbours.remove.len();
        report.changed |= left_fdb.len() + left.len() < removed;
        tell(report, left.iter().map(|(_, error)| error.to_string()));
        tell(report, left_fdb.iter().map(|(_, error)| error.to_string()));
        remember(&mut self.neighbours, &neighbours, &refused, &left, |it| (it.link, it.ip));
        remember(&mut self.fdb, &fdb, &refused_fdb, &left_fdb, |it| (it.link, it.mac));
        self.is_known = true;
        tell(report, ways.problems);
        self.peers = ways.peers;
        Ok(())
    }
}

/// The way to one subnet through the tunnel.
#[derive(Debug, Clone, Copy)]
struct Tunnel {
    neighbour: Neighbour,
    entry: FdbEntry,
    route: GatewayRoute,
}

/// The ways to all peers.
#[derive(Debug, Default)]
struct Ways {
    tunnels: Vec<Tunnel>,
    direct: Vec<GatewayRoute>,
    problems: Vec<String>,
    peers: Vec<PeerWay>,
    /// Who has which base address and which MAC: two with the same would undo each other's entries.
    bases: HashMap<IpAddr, LeaseKey>,
    macs: HashMap<Mac, LeaseKey>,
}

impl Ways {
    fn new(backend: &Vxlan, desired: &Desired) -> Self {
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
            ways.peers.extend(public.map(|public_ip| PeerWay { public_ip, subnets, way }));
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
        if attrs.backend_type != "vxlan" {
            let kind = if attrs.backend_type.is_empty() { "udp" } else { &attrs.backend_type };
            return Err(format!("the node of {key} is of the backend {kind}, not vxlan"));
        }
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
        let mac = vtep_mac(data.as_ref(), backend.options.vni)
            .map_err(|reason| format!("the node of {key} cannot be sent to: {reason}"))?;
        let destination = attrs.public_addresses().find(|ip| same_family(*ip, device.local));
        let destination = destination.ok_or_else(|| {
            format!("the node of {key} publishes no address of {}'s family", device.local)
        })?;
        let base = subnet.network();
        self.claim(backend, key, base, mac)?;
        let link = device.index;
        self.tunnels.push(Tunnel {
            neighbour: Neighbour { link, ip: base, mac },
            entry: FdbEntry { link, mac, destination },
            route: GatewayRoute { destination: subnet, gateway: base, link, onlink: true },
        });
        Ok(Way::Tunnel)
    }

    fn claim(
        &mut self,
        backend: &Vxlan,
        key: &LeaseKey,
        base: IpAddr,
        mac: Mac,
    ) -> Result<(), String> {
        if backend.devices.iter().any(|device| device.mac == mac) {
            return Err(format!("the node of {key} has our own MAC {mac}"));
        }
        let other = *self.macs.entry(mac).or_insert(*key);
        if other != *key {
            return Err(format!("the node of {key} has the MAC {mac} of that of {other}"));
        }
        let other = *self.bases.entry(base).or_insert(*key);
        if other != *key {
            return Err(format!("the subnet of {key} begins with the same address as {other}"));
        }
        Ok(())
    }

    /// Those whose part was refused have no way: a route without its neighbour is worse than none.
    fn give_up<T: Eq + Hash>(
        &mut self,
        refused: &[(T, NetlinkError)],
        part: impl Fn(&Tunnel) -> T,
    ) {
        let refused: HashSet<&T> = refused.iter().map(|(part, _)| part).collect();
        let lost = self.tunnels.iter().filter(|tunnel| refused.contains(&part(tunnel)));
        let lost = lost.map(|tunnel| tunnel.route.destination).collect();
        self.lose(&lost);
    }

    fn lose(&mut self, subnets: &HashSet<IpNetwork>) {
        if subnets.is_empty() {
            return;
        }
        self.tunnels.retain(|tunnel| !subnets.contains(&tunnel.route.destination));
        self.direct.retain(|route| !subnets.contains(&route.destination));
        for peer in &mut self.peers {
            peer.subnets.retain(|subnet| !subnets.contains(subnet));
        }
        self.peers.retain(|peer| !peer.subnets.is_empty());
    }

    fn routes(&self) -> Vec<GatewayRoute> {
        self.tunnels.iter().map(|tunnel| tunnel.route).chain(self.direct.iter().copied()).collect()
    }
}

/// The devices of an overlay: one for each family, over the underlay of the same family, as
/// flannel's. Where the interface has one family only, one device carries both.
fn devices(
    config: &NetworkConfig,
    interface: &ExternalInterface,
    vni: u32,
    node_id: &str,
) -> Result<Vec<Device>, BackendError> {
    let (ipv4, ipv6) = (interface.ipv4.map(IpAddr::V4), interface.ipv6.map(IpAddr::V6));
    let mut devices: Vec<Device> = Vec::new();
    for family in config.families() {
        let is_ipv6 = family.network.is_ipv6();
        let local = if is_ipv6 { ipv6.or(ipv4) } else { ipv4.or(ipv6) };
        let local =
            local.ok_or_else(|| BackendError::NoAddress { interface: interface.name.clone() })?;
        if let Some(device) = devices.iter_mut().find(|device| device.local == local) {
            device.ipv6 = true;
            continue;
        }
        let name = format!("flannel{}.{vni}", if is_ipv6 { "-v6" } else { "" });
        let mac = derived_mac(node_id, &name);
        devices.push(Device { name, local, ipv4: !is_ipv6, ipv6: is_ipv6, index: 0, mac });
    }
    Ok(devices)
}

/// The same after a reboot, so that the lease stays the same too: of a node and a device's name, in
/// which the VNI is. Locally administered, and of no group.
fn derived_mac(node_id: &str, device: &str) -> Mac {
    let hash = Sha256::digest(format!("{node_id}\n{device}"));
    let [a, b, c, d, e, f, ..] = <[u8; 32]>::from(hash);
    Mac([(a & 0xfe) | 0x02, b, c, d, e, f])
}

/// Whether the kernel would not have both, or could not tell their packets apart.
fn is_rival(link: &Link, wanted: &VxlanShape, name: &str) -> bool {
    let family = |shape: &VxlanShape| shape.local.is_some_and(|ip| ip.is_ipv6());
    link.name != name
        && link.vxlan.as_ref().is_some_and(|shape| {
            shape.vni == wanted.vni
                && shape.port == wanted.port.or(Some(KERNEL_PORT))
                && family(shape) == family(wanted)
        })
}

fn named<'a>(links: &'a [Link], name: &str) -> Result<&'a Link, BackendError> {
    let found = links.iter().find(|link| link.name == name);
    found.ok_or_else(|| BackendError::DeviceGone(name.to_owned()))
}

/// Nobody is to give the device addresses and routes by router advertisements.
fn set_sysctls(device: &Device, direct_routing: bool) {
    let path = format!("/proc/sys/net/ipv6/conf/{}/accept_ra", device.name);
    if fs::read_to_string(&path).is_ok_and(|value| value.trim() != "0") {
        // As flannel: without it weft works as well.
        let _ = fs::write(&path, "0");
    }
    if direct_routing {
        direct::loosen_filter(&device.name);
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

/// The MAC that a lease tells of.
fn vtep_mac(data: Option<&Value>, vni: u32) -> Result<Mac, String> {
    let data = data.ok_or("its lease has no BackendData for that family")?;
    let theirs = data["VNI"].as_u64().ok_or("its lease tells no VNI")?;
    // flannel 0.17 writes no more than 16 bits of it.
    if theirs & 0xffff != u64::from(vni) & 0xffff {
        return Err(format!("its VNI is {theirs}, ours {vni}; restart it with the same config"));
    }
    let text = data["VtepMAC"].as_str().ok_or("its lease tells no VtepMAC")?;
    let mac = text.parse::<Mac>().map_err(|error| error.to_string())?;
    mac.is_unicast().then_some(mac).ok_or_else(|| format!("{mac} is no device's MAC"))
}

fn same_family(a: IpAddr, b: IpAddr) -> bool {
    a.is_ipv6() == b.is_ipv6()
}

/// Puts lines into the report, but no thousands of them.
fn tell(report: &mut Report, lines: impl IntoIterator<Item = String>) {
    let mut lines = lines.into_iter();
    report.problems.extend(lines.by_ref().take(LINES_MAX));
    if let Some(next) = lines.next() {
        report.problems.push(format!("{next}; and {} more like that", lines.count()));
    }
}

/// What is known of the kernel's entries after changes, but for those that it refused to make and
/// those that it left.
fn remember<T: Copy + Eq + Hash, K: Eq + Hash>(
    known: &mut Vec<T>,
    changes: &Changes<T>,
    refused: &[(T, NetlinkError)],
    left: &[(T, NetlinkError)],
    key: impl Fn(&T) -> K,
) {
    let refused: HashSet<T> = refused.iter().map(|(it, _)| *it).collect();
    let left: HashSet<T> = left.iter().map(|(it, _)| *it).collect();
    let set = || changes.set.iter().filter(|it| !refused.contains(it));
    let replaced: HashSet<K> = set().map(&key).collect();
    let removed: HashSet<&T> = changes.remove.iter().filter(|it| !left.contains(it)).collect();
    known.retain(|it| !replaced.contains(&key(it)) && !removed.contains(it));
    known.extend(set().copied());
}

#[cfg(test)]
mod tests {
    use super::*;

    fn interface(ipv4: Option<&str>, ipv6: Option<&str>) -> ExternalInterface {
        let (ipv4, ipv6) = (ipv4.map(|ip| ip.parse().unwrap()), ipv6.map(|ip| ip.parse().unwrap()));
        ExternalInterface {
            name: "eth0".into(),
            index: 2,
            mtu: 1500,
            ipv4,
            ipv6,
            public_ipv4: ipv4,
            public_ipv6: ipv6,
            other_addresses: Vec::new(),
        }
    }

    fn config(families: &str) -> NetworkConfig {
        format!(r#"{{{families},"IPv6Network":"fd00:42::/48","Network":"10.42.0.0/16"}}"#)
            .parse()
            .unwrap()
    }

    fn names(families: &str, interface: &ExternalInterface) -> Vec<(String, IpAddr, bool, bool)> {
        let devices = devices(&config(families), interface, 7, "a").unwrap();
        devices.into_iter().map(|it| (it.name, it.local, it.ipv4, it.ipv6)).collect()
    }

    #[test]
    fn each_family_has_its_device_unless_the_underlay_has_one_only() {
        let [v4, v6]: [IpAddr; 2] = ["192.0.2.1", "2001:db8::1"].map(|ip| ip.parse().unwrap());
        let both = interface(Some("192.0.2.1"), Some("2001:db8::1"));
        let dual = r#""EnableIPv6":true"#;
        assert_eq!(
            names(dual, &both),
            [("flannel.7".into(), v4, true, false), ("flannel-v6.7".into(), v6, false, true)]
        );
        let only_v6 = interface(None, Some("2001:db8::1"));
        assert_eq!(names(dual, &only_v6), [("flannel.7".into(), v6, true, true)]);
        let only_v4 = interface(Some("192.0.2.1"), None);
        let inner_v6 = r#""EnableIPv4":false,"EnableIPv6":true"#;
        assert_eq!(names(inner_v6, &only_v4), [("flannel-v6.7".into(), v4, false, true)]);
    }

    #[test]
    fn the_mac_is_of_the_node_and_the_vni() {
        let mac = derived_mac("a", "flannel.1");
        assert_eq!(mac, derived_mac("a", "flannel.1"));
        assert_ne!(mac, derived_mac("b", "flannel.1"));
        assert_ne!(mac, derived_mac("a", "flannel.2"));
        for node in ["a", "b", "c", "d", "e", "f", "g", "h"] {
            let mac = derived_mac(node, "flannel.1");
            assert!(mac.is_unicast() && mac.0[0] & 2 == 2, "{mac}");
        }
    }

    #[test]
    fn leases_of_flannels_are_read_and_bad_ones_are_told() {
        let mac = |data: Value| vtep_mac(Some(&data), 70_000);
        let good = json!({"VNI": 70_000, "VtepMAC": "c6:d2:32:6f:8f:44"});
        assert_eq!(mac(good).unwrap().to_string(), "c6:d2:32:6f:8f:44");
        assert!(mac(json!({"VNI": 4464, "VtepMAC": "c6:d2:32:6f:8f:44"})).is_ok(), "flannel 0.17");
        for (data, told) in [
            (json!({"VNI": 2, "VtepMAC": "c6:d2:32:6f:8f:44"}), "its VNI is 2, ours 70000"),
            (json!({"VNI": 70_000, "VtepMAC": "01:00:5e:00:00:01"}), "no device's MAC"),
            (json!({"VNI": 70_000, "VtepMAC": "x"}), "not a MAC address"),
            (json!({"VNI": 70_000}), "no VtepMAC"),
            (json!("x"), "no VNI"),
        ] {
            assert!(mac(data.clone()).unwrap_err().contains(told), "{data}");
        }
        assert!(vtep_mac(None, 1).is_err());
    }

    #[test]
    fn options_are_flannels() {
        let read = |options: &str| {
            let text = format!(r#"{{"Network":"10.42.0.0/16","Backend":{options}}}"#);
            VxlanOptions::read(&text.parse().unwrap())
        };
        let defaults = VxlanOptions {
            vni: 1,
            port: None,
            mtu: None,
            gbp: false,
            learning: false,
            direct_routing: false,
        };
        assert_eq!(read(r#"{"Type":"vxlan"}"#), Ok(defaults));
        assert_eq!(read(r#"{"Type":"vxlan","Port":0,"MTU":0}"#), Ok(defaults));
        let all = r#"{"Type":"vxlan","VNI":9,"Port":4789,"MTU":1400,"GBP":true,"Learning":true,
            "DirectRouting":true}"#;
        let given = VxlanOptions {
            vni: 9,
            port: Some(4789),
            mtu: Some(1400),
            gbp: true,
            learning: true,
            direct_routing: true,
        };
        assert_eq!(read(all), Ok(given));
        for bad in [r#"{"VNI":16777216}"#, r#"{"VNI":"1"}"#, r#"{"GBP":1}"#, r#"{"MTU":-1}"#] {
            assert!(read(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn what_was_refused_or_left_is_known_to_be_so() {
        let entry = |mac: u8, to: &str| FdbEntry {
            link: 1,
            mac: Mac([2, 0, 0, 0, 0, mac]),
            destination: to.parse().unwrap(),
        };
        let refusal = || {
            let netlink = Netlink::open().unwrap();
            netlink.remove_link(&Link { index: u32::MAX, ..Link::default() }).unwrap_err()
        };
        let mut known = vec![entry(1, "192.0.2.1"), entry(2, "192.0.2.2"), entry(3, "192.0.2.3")];
        let changes = Changes {
            set: vec![entry(1, "192.0.2.9"), entry(4, "192.0.2.4")],
            remove: vec![entry(2, "192.0.2.2"), entry(3, "192.0.2.3")],
        };
        let refused = [(entry(4, "192.0.2.4"), refusal())];
        let left = [(entry(3, "192.0.2.3"), refusal())];
        remember(&mut known, &changes, &refused, &left, |it| (it.link, it.mac));
        assert_eq!(known, [entry(3, "192.0.2.3"), entry(1, "192.0.2.9")]);
    }
}
