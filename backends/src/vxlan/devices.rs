//! The devices: one for each family of the underlay in use, made, adopted, and kept as they should be.

use std::fs;
use std::net::IpAddr;

use ipnetwork::IpNetwork;
use sha2::{Digest, Sha256};
use weft_control::{ConfigError, Lease, NetworkConfig};

use super::{MTU_MAX, Vxlan};
use crate::direct;
use crate::mac::Mac;
use crate::netlink::{LINK_ALIAS, Link, LinkSettings, Netlink, VxlanShape};
use crate::{BackendError, ExternalInterface, mtu_min};

/// What the wrapping takes: Ethernet, VXLAN, UDP and an IPv4 header.
const OVERHEAD_IPV4: u32 = 50;
/// The same with an IPv6 header.
const OVERHEAD_IPV6: u32 = 70;
/// Where the config names none (drivers/net/vxlan/vxlan_core.c, vxlan_port).
pub(crate) const KERNEL_PORT: u16 = 8472;

/// Where the kernel tells the port that it takes where none is named.
const KERNEL_PORT_FILE: &str = "/sys/module/vxlan/parameters/udp_port";

/// Bytes of a link's name (IFNAMSIZ in linux/if.h, with a byte of zero).
const LINK_NAME_LEN_MAX: usize = 15;

/// A device and what it is for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Device {
    pub(super) name: String,
    /// Our address on the underlay.
    pub(super) local: IpAddr,
    /// The families of containers' packets that it carries.
    ipv4: bool,
    ipv6: bool,
    /// What the kernel made of it; 0 before.
    pub(super) index: u32,
    /// What it has, or is to have.
    pub(super) mac: Mac,
}

impl Device {
    pub(super) fn carries(&self, ipv6: bool) -> bool {
        if ipv6 { self.ipv6 } else { self.ipv4 }
    }

    fn overhead(&self) -> u32 {
        if self.local.is_ipv6() { OVERHEAD_IPV6 } else { OVERHEAD_IPV4 }
    }
}

impl Vxlan {
    /// What containers may send: the least that one of the devices carries.
    pub(super) fn mtu(&self) -> Result<u32, BackendError> {
        let mtu = self.devices.iter().map(|device| self.mtu_of(device)).min().unwrap_or(0);
        let least = mtu_min(&self.config);
        if mtu >= least {
            return Ok(mtu);
        }
        let interface = self.interface.name.clone();
        Err(match self.options.mtu {
            Some(mtu) if mtu < self.interface.mtu => BackendError::MtuOption { mtu, least },
            _ => BackendError::MtuTooSmall { interface, mtu: self.interface.mtu, least },
        })
    }

    fn mtu_of(&self, device: &Device) -> u32 {
        let external = self.options.mtu.unwrap_or(MTU_MAX).min(self.interface.mtu);
        external.saturating_sub(device.overhead())
    }

    /// Makes each device what it should be, with our address under this lease, and notes the MAC that
    /// it has then. Says whether anything had to be done.
    pub(super) fn look_after_devices(
        &mut self,
        lease: Option<&Lease>,
    ) -> Result<bool, BackendError> {
        let mut changed = false;
        let mut links = self.netlink.links()?;
        let names: Vec<&str> = self.devices.iter().map(|device| device.name.as_str()).collect();
        let networks: Vec<IpNetwork> = self.config.networks().collect();
        remove_stale(&self.netlink, &mut links, &networks, &names)?;
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
            port: self.options.port.or_else(kernel_port),
            learning: self.options.learning,
            gbp: self.options.gbp,
            others: Vec::new(),
        };
        if let Some(other) = links.iter().find(|link| self.is_rival(link, &wanted)) {
            return Err(BackendError::VniTaken {
                vni: self.options.vni,
                device: other.name.clone(),
            });
        }
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
        self.netlink.add_vxlan(&device.name, &wanted, device.mac, self.mtu_of(device))?;
        tracing::info!(device = device.name, mac = %device.mac, "made the device");
        Ok(true)
    }

    /// Whether it is another's, and the kernel would not have both, or could not tell their packets
    /// apart.
    fn is_rival(&self, link: &Link, wanted: &VxlanShape) -> bool {
        let family = |shape: &VxlanShape| shape.local.is_some_and(|ip| ip.is_ipv6());
        self.devices.iter().all(|device| device.name != link.name)
            && link.vxlan.as_ref().is_some_and(|shape| {
                shape.vni == wanted.vni
                    && shape.port == wanted.port.or(Some(KERNEL_PORT))
                    && family(shape) == family(wanted)
            })
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
            if self.config.networks().any(|network| network.contains(ip)) {
                self.netlink.remove_address(link, found.network)?;
                changed = true;
            }
        }
        Ok(changed)
    }
}

/// Removes the devices of this overlay but those in use. Where the VNI, the backend, or a family has changed,
/// they would go on letting in what strangers send.
pub(crate) fn remove_stale(
    netlink: &Netlink,
    links: &mut Vec<Link>,
    networks: &[IpNetwork],
    in_use: &[&str],
) -> Result<(), BackendError> {
    let is_stale = |link: &mut Link| {
        let mut ips = link.addresses.iter().map(|address| address.network.ip());
        link.vxlan.is_some()
            && link.alias.as_deref() == Some(LINK_ALIAS)
            && !in_use.contains(&link.name.as_str())
            && ips.any(|ip| networks.iter().any(|network| network.contains(ip)))
    };
    for link in links.extract_if(.., is_stale) {
        tracing::info!(device = link.name, "removing a device that is no longer in use");
        netlink.remove_link(&link)?;
    }
    Ok(())
}

/// The devices of an overlay: one for each family, over the underlay of the same family, as
/// flannel's. Where the interface has one family only, one device carries both.
pub(super) fn devices(
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
        let name = device_name(vni, is_ipv6);
        if name.len() > LINK_NAME_LEN_MAX {
            let (key, number) = ("VNI", vni.into());
            let max = if is_ipv6 { 9_999 } else { 9_999_999 };
            return Err(ConfigError::OptionTooLarge { key, number, max }.into());
        }
        let mac = derived_mac(node_id, &name);
        devices.push(Device { name, local, ipv4: !is_ipv6, ipv6: is_ipv6, index: 0, mac });
    }
    Ok(devices)
}

/// flannel's.
fn device_name(vni: u32, ipv6: bool) -> String {
    format!("flannel{}.{vni}", if ipv6 { "-v6" } else { "" })
}

/// The same after a reboot, so that the lease stays the same too: of a node and a device's name, in
/// which the VNI is. Locally administered, and of no group.
fn derived_mac(node_id: &str, device: &str) -> Mac {
    let hash = Sha256::digest(format!("{node_id}\n{device}"));
    let [a, b, c, d, e, f, ..] = <[u8; 32]>::from(hash);
    Mac([(a & 0xfe) | 0x02, b, c, d, e, f])
}

/// `None` before there is any VXLAN device, where the kernel has loaded a module for them.
fn kernel_port() -> Option<u16> {
    fs::read_to_string(KERNEL_PORT_FILE).ok()?.trim().parse().ok()
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
            link_local: None,
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
    fn a_vni_whose_device_could_have_no_name_is_refused() {
        let both = interface(Some("192.0.2.1"), Some("2001:db8::1"));
        let made = |families, vni| devices(&config(families), &both, vni, "a").map(|it| it.len());
        let dual = r#""EnableIPv6":true"#;
        assert_eq!(made(dual, 9_999).unwrap(), 2);
        let error = made(dual, 10_000).unwrap_err().to_string();
        assert!(error.contains("VNI must be at most 9999, not 10000"), "{error}");
        let ipv4 = r#""EnableIPv6":false"#;
        assert_eq!(made(ipv4, 9_999_999).unwrap(), 1);
        assert!(made(ipv4, 10_000_000).is_err());
    }

    /// Where it comes from decides what to change, and whether waiting helps.
    #[test]
    fn an_mtu_that_leaves_no_room_is_told_with_its_origin() {
        let prepared = |options: &str, mtu: u32, families: &str| {
            let backend = format!(r#""Backend":{{"Type":"vxlan"{options}}},{families}"#);
            let mut external = interface(Some("192.0.2.1"), None);
            external.mtu = mtu;
            let (mut backend, _) = super::super::open(config(&backend), external).unwrap();
            backend.prepare("a").unwrap_err()
        };
        let dual = r#""EnableIPv6":true"#;
        let ipv4 = r#""EnableIPv6":false"#;
        let error = prepared(r#","MTU":100"#, 1500, ipv4);
        assert!(matches!(error, BackendError::MtuOption { mtu: 100, least: 68 }), "{error}");
        assert!(!error.is_final());
        let error = prepared(r#","MTU":9000"#, 100, ipv4);
        assert!(matches!(error, BackendError::MtuTooSmall { mtu: 100, least: 68, .. }), "{error}");
        let error = prepared("", 1320, dual);
        assert!(matches!(error, BackendError::MtuTooSmall { least: 1280, .. }), "{error}");
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
}
