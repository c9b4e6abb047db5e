//! vxlan: the kernel wraps containers' Ethernet frames into UDP datagrams (RFC 7348), told by us
//! which peer is behind which address. Devices, entries and lease data are flannel's.
//!
//! The device's own address is the base of our subnet. For each peer there are three things, made in
//! this order: where its MAC is, that this is the MAC of its base address (else the kernel would ask
//! for it, and nobody answers), and the route to its subnet by way of the base address. All of it, the device
//! too, stays when the daemon stops: traffic goes on, and the next start finds it right.

mod devices;
mod ways;

use std::collections::HashSet;
use std::hash::Hash;

use serde_json::json;
use tokio::sync::mpsc;
use weft_control::{ConfigError, Lease, LeaseAttrs, NetworkConfig};

use crate::direct::{self, Direct};
use crate::ethtool;
use crate::netlink::{FdbEntry, Neighbour, Netlink, NetlinkError};
use crate::peer_routes::PeerRoutes;
use crate::reconcile::{Changes, Territory};
use crate::{
    Backend, BackendError, BackendKind, BackendStatus, Basis, Desired, ExternalInterface, GivenUp,
    Offload, Opened, PeerWay, Report, Started, Towards,
};
use devices::{Device, devices};
use ways::Ways;

pub(crate) use devices::{KERNEL_PORT, remove_stale};

/// Checksums of inner packets are left to the network card, and some fill in wrong ones.
const TX_CHECKSUM: &str = "tx-checksum-ip-generic";
/// The largest IP packet.
const MTU_MAX: u32 = 65_535;
/// A VNI has 24 bits.
const VNI_MAX: u32 = (1 << 24) - 1;
/// flannel's, where the config names none.
const DEFAULT_VNI: u32 = 1;

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
pub(crate) struct VxlanOptions {
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
    pub(crate) fn read(config: &NetworkConfig) -> Result<Self, ConfigError> {
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
        let mut names = self.devices.iter().map(|device| device.name.clone());
        let device = names.next().unwrap_or_default();
        Ok(Started { device, other_devices: names.collect(), mtu: self.mtu()? })
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

    fn give_up(&mut self, offload: Offload, _: Towards) -> Option<GivenUp> {
        if offload != Offload::Checksum {
            return None;
        }
        let devices = self.devices.iter().map(|device| device.name.as_str());
        let off: Vec<&str> = devices.filter(|it| ethtool::switch_off(it, TX_CHECKSUM)).collect();
        let commands: Vec<String> =
            off.into_iter().map(|it| format!("`ethtool -K {it} {TX_CHECKSUM} on`")).collect();
        let cure = format!("{} when that is mended", commands.join(" and "));
        (!commands.is_empty()).then(|| GivenUp { what: TX_CHECKSUM.into(), towards: None, cure })
    }

    fn status(&self) -> BackendStatus {
        BackendStatus { peers: self.peers.clone(), ..BackendStatus::default() }
    }
}

impl Vxlan {
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
            direct.look(&self.netlink, desired.public_addresses(), basis);
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

        let refused_fdb = self.netlink.set_fdb(&fdb.set);
        report.changed |= refused_fdb.len() < fdb.set.len();
        ways.give_up(&refused_fdb, |tunnel| tunnel.entry);
        report.tell(refused_fdb.iter().map(|(_, error)| error.to_string()));
        let refused = self.netlink.set_neighbours(&neighbours.set);
        report.changed |= refused.len() < neighbours.set.len();
        ways.give_up(&refused, |tunnel| tunnel.neighbour);
        report.tell(refused.iter().map(|(_, error)| error.to_string()));

        let territory = Territory {
            networks: self.config.networks().collect(),
            links: self.devices.iter().map(|device| device.index).collect(),
        };
        let routes = ways.routes();
        let outcome = self.routes.reconcile(&self.netlink, &routes, &territory, basis)?;
        report.changed |= outcome.changed;
        report.tell(outcome.problems);
        ways.lose(&outcome.refused.iter().map(|(route, _)| route.destination).collect());
        report.tell(outcome.refused.iter().map(|(_, error)| error.to_string()));

        let left_fdb = self.netlink.remove_fdb(&fdb.remove);
        let left = self.netlink.remove_neighbours(&neighbours.remove);
        let removed = fdb.remove.len() + neighbours.remove.len();
        report.changed |= left_fdb.len() + left.len() < removed;
        report.tell(left.iter().map(|(_, error)| error.to_string()));
        report.tell(left_fdb.iter().map(|(_, error)| error.to_string()));
        remember(&mut self.neighbours, &neighbours, &refused, &left, |it| (it.link, it.ip));
        remember(&mut self.fdb, &fdb, &refused_fdb, &left_fdb, |it| (it.link, it.mac));
        self.is_known = true;
        report.tell(ways.problems);
        self.peers = ways.peers;
        Ok(())
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
    use crate::mac::Mac;
    use crate::netlink::Link;

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
