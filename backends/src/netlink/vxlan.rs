//! VXLAN devices: what one is made of, and making one.

use std::net::IpAddr;

use rtnetlink::LinkVxlan;
use rtnetlink::packet_route::link::InfoVxlan;

use super::{Netlink, NetlinkError};
use crate::mac::Mac;

/// What of a VXLAN device stays as it was made.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct VxlanShape {
    pub vni: u32,
    /// The index of the link that its packets leave by.
    pub underlay: Option<u32>,
    /// The address that its packets come from.
    pub local: Option<IpAddr>,
    /// The port of all nodes; where none is wanted, whatever the kernel takes.
    pub port: Option<u16>,
    /// Takes the senders of packets for where their MACs are.
    pub learning: bool,
    /// Group policy: packets carry their mark.
    pub gbp: bool,
    /// What neither flannel nor weft ever sets, by the names of `ip link`.
    pub others: Vec<&'static str>,
}

impl VxlanShape {
    pub(super) fn of(infos: &[InfoVxlan]) -> Self {
        let mut shape = Self::default();
        for info in infos {
            shape.take(info);
        }
        shape
    }

    #[expect(
        clippy::wildcard_enum_match_arm,
        reason = "the kernel's list of options grows, and the others make no difference"
    )]
    fn take(&mut self, info: &InfoVxlan) {
        match info {
            InfoVxlan::Id(vni) => self.vni = *vni,
            InfoVxlan::Link(index) => self.underlay = Some(*index),
            InfoVxlan::Local(ip) => self.local = Some(IpAddr::V4(*ip)),
            InfoVxlan::Local6(ip) => self.local = Some(IpAddr::V6(*ip)),
            InfoVxlan::Port(port) => self.port = Some(*port),
            InfoVxlan::Learning(learning) => self.learning = *learning,
            InfoVxlan::Gbp => self.gbp = true,
            InfoVxlan::Group(_) | InfoVxlan::Group6(_) => self.others.push("group"),
            InfoVxlan::Gpe => self.others.push("gpe"),
            InfoVxlan::CollectMetadata(true) => self.others.push("external"),
            InfoVxlan::Vnifilter(true) => self.others.push("vnifilter"),
            InfoVxlan::Proxy(true) => self.others.push("proxy"),
            InfoVxlan::Rsc(true) => self.others.push("rsc"),
            InfoVxlan::L2Miss(true) => self.others.push("l2miss"),
            InfoVxlan::L3Miss(true) => self.others.push("l3miss"),
            _ => {}
        }
    }

    /// In what a device that is there differs from the one that is wanted, for a log line; nothing
    /// where it will do.
    pub fn difference(&self, wanted: &Self) -> Option<String> {
        let port = wanted.port.or(self.port);
        let is = |ip: Option<IpAddr>| ip.map_or("none".into(), |ip| ip.to_string());
        let number = |it: Option<u32>| it.map_or("none".into(), |index| index.to_string());
        let on = |it: bool| if it { "on" } else { "off" }.to_owned();
        let mut all = Vec::new();
        let mut compare = |what: &str, found: String, wanted: String| {
            if found != wanted {
                all.push(format!("{what} {found} instead of {wanted}"));
            }
        };
        compare("VNI", self.vni.to_string(), wanted.vni.to_string());
        compare("underlying interface", number(self.underlay), number(wanted.underlay));
        compare("local address", is(self.local), is(wanted.local));
        compare("port", number(self.port.map(u32::from)), number(port.map(u32::from)));
        compare("learning", on(self.learning), on(wanted.learning));
        compare("GBP", on(self.gbp), on(wanted.gbp));
        compare("options", format!("[{}]", self.others.join(" ")), "[]".into());
        (!all.is_empty()).then(|| all.join(", "))
    }
}

impl Netlink {
    /// Makes a VXLAN device and brings it up.
    pub fn add_vxlan(
        &self,
        name: &str,
        shape: &VxlanShape,
        mac: Mac,
        mtu: u32,
    ) -> Result<(), NetlinkError> {
        let VxlanShape { vni, underlay, local, port, learning, gbp, .. } = shape;
        let text = local.map_or(String::new(), |ip| format!(" local {ip}"));
        let command = format!("link add {name} address {mac} mtu {mtu} type vxlan id {vni}{text}");
        let mut device =
            LinkVxlan::new(name, *vni).learning(*learning).address(mac.0.to_vec()).mtu(mtu).up();
        if let Some(index) = underlay {
            device = device.dev(*index);
        }
        device = match local {
            Some(IpAddr::V4(ip)) => device.local(*ip),
            Some(IpAddr::V6(ip)) => device.local6(*ip),
            None => device,
        };
        if let Some(port) = port {
            device = device.port(*port);
        }
        if *gbp {
            device = device.gbp();
        }
        self.call(&command, self.handle.link().add(device.build()).execute())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_differs_is_told_and_the_kernels_own_port_is_any() {
        let wanted = VxlanShape {
            vni: 1,
            underlay: Some(2),
            local: "192.0.2.1".parse().ok(),
            ..VxlanShape::default()
        };
        let found = VxlanShape { port: Some(8472), ..wanted.clone() };
        assert_eq!(found.difference(&wanted), None);
        let other = VxlanShape { port: Some(4789), ..wanted.clone() };
        let told = "port 8472 instead of 4789";
        assert_eq!(found.difference(&other).as_deref(), Some(told));
        let strange = VxlanShape {
            local: "192.0.2.9".parse().ok(),
            learning: true,
            others: vec!["group", "proxy"],
            ..found.clone()
        };
        assert_eq!(
            strange.difference(&wanted).as_deref(),
            Some(
                "local address 192.0.2.9 instead of 192.0.2.1, learning on instead of off, options \
                 [group proxy] instead of []"
            )
        );
    }
}
