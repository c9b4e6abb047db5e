//! Two hosts on one cable, a container behind each: all that a benchmark needs of a network.
//!
//! ```text
//!   c1 eth0 ── docker0 h1 eth0 ──────── eth0 h2 docker0 ── eth0 c2
//!   10.77.1.2     10.77.1.1 192.168.77.1    .2 10.77.2.1     10.77.2.2
//! ```

use std::fs;
use std::net::{IpAddr, Ipv4Addr};
use std::process::Command;

use anyhow::{Context, bail, ensure};
use serde::{Deserialize, Serialize};
use weft_daemon::netns::NetNs;

/// The MTU of the cable.
pub const WIRE_MTU: u16 = 1500;

/// How packets cross the cable.
#[derive(
    Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize, clap::ValueEnum,
)]
#[serde(rename_all = "kebab-case")]
pub enum Mode {
    /// Each alone, as between plain network cards without any offload for segments.
    Wire,
    /// As `wire`, and the receiver joins them (GRO), as drivers of network cards do.
    WireGro,
    /// Super-packets whole: what two containers on one machine get.
    Offload,
}

impl Mode {
    pub const ALL: [Self; 3] = [Self::Wire, Self::WireGro, Self::Offload];

    pub const fn name(self) -> &'static str {
        match self {
            Self::Wire => "wire",
            Self::WireGro => "wire-gro",
            Self::Offload => "offload",
        }
    }

    /// What ethtool is told, and what it must answer then.
    fn features(self) -> &'static [(&'static str, &'static str)] {
        const SEGMENTATION: [(&str, &str); 3] =
            [("tso", "off"), ("gso", "off"), ("tx-udp-segmentation", "off")];
        const WIRE: [(&str, &str); 4] =
            [SEGMENTATION[0], SEGMENTATION[1], SEGMENTATION[2], ("gro", "off")];
        const WIRE_GRO: [(&str, &str); 4] =
            [SEGMENTATION[0], SEGMENTATION[1], SEGMENTATION[2], ("gro", "on")];
        match self {
            Self::Wire => &WIRE,
            Self::WireGro => &WIRE_GRO,
            Self::Offload => &[],
        }
    }
}

/// The network, removed when dropped.
#[derive(Debug)]
pub struct Topology {
    pub hosts: [NetNs; 2],
    pub containers: [NetNs; 2],
}

impl Topology {
    /// Everything but what carries packets between the hosts' subnets.
    ///
    /// # Errors
    /// We are not root, or iproute2 or ethtool is missing.
    pub fn new(mode: Mode) -> anyhow::Result<Self> {
        let id: String = (0..6).map(|_| fastrand::lowercase()).collect();
        let make = |name: &str| NetNs::create(format!("weft-bench-{id}-{name}"));
        let it = Self { hosts: [make("h1")?, make("h2")?], containers: [make("c1")?, make("c2")?] };
        let [h1, h2] = &it.hosts;
        let far = ["peer", "name", "eth0", "netns", h2.name()];
        h1.ip(&[&["link", "add", "eth0", "type", "veth"], &far[..]].concat())?;
        for side in [0, 1] {
            it.build(side)?;
            set_features(&it.hosts[side], mode)?;
        }
        Ok(it)
    }

    fn build(&self, side: usize) -> anyhow::Result<()> {
        let (host, container) = (&self.hosts[side], &self.containers[side]);
        let forward = || fs::write("/proc/sys/net/ipv4/ip_forward", "1");
        host.run(forward)?.context("cannot make the host forward")?;
        for netns in [host, container] {
            netns.ip(&["link", "set", "lo", "up"])?;
        }
        host.ip(&["address", "add", &format!("{}/24", outer(side)), "dev", "eth0"])?;
        host.ip(&["link", "set", "eth0", "up"])?;
        host.ip(&["route", "add", "default", "dev", "eth0"])?;
        host.ip(&["link", "add", "docker0", "type", "bridge"])?;
        host.ip(&["address", "add", &format!("{}/24", gateway(side)), "dev", "docker0"])?;
        host.ip(&["link", "set", "docker0", "up"])?;
        let far = ["peer", "name", "eth0", "netns", container.name()];
        host.ip(&[&["link", "add", "c", "type", "veth"], &far[..]].concat())?;
        host.ip(&["link", "set", "c", "master", "docker0", "up"])?;
        container.ip(&["address", "add", &format!("{}/24", inner(side)), "dev", "eth0"])?;
        container.ip(&["link", "set", "eth0", "up"])?;
        container.ip(&["route", "add", "default", "via", &gateway(side).to_string()])
    }

    /// Gives containers the MTU that whatever carries their packets leaves.
    ///
    /// # Errors
    /// The kernel refuses it.
    pub fn set_mtu(&self, mtu: u16) -> anyhow::Result<()> {
        let mtu = mtu.to_string();
        for side in [0, 1] {
            self.containers[side].ip(&["link", "set", "eth0", "mtu", &mtu])?;
            for device in ["c", "docker0"] {
                self.hosts[side].ip(&["link", "set", device, "mtu", &mtu])?;
            }
        }
        Ok(())
    }
}

/// A host's address on the cable.
pub fn outer(side: usize) -> IpAddr {
    Ipv4Addr::new(192, 168, 77, number(side)).into()
}

/// The subnet of a host's containers.
pub fn subnet(side: usize) -> String {
    format!("10.77.{}.0/24", number(side))
}

/// A container's address.
pub fn inner(side: usize) -> IpAddr {
    Ipv4Addr::new(10, 77, number(side), 2).into()
}

fn gateway(side: usize) -> Ipv4Addr {
    Ipv4Addr::new(10, 77, number(side), 1)
}

fn number(side: usize) -> u8 {
    if side == 0 { 1 } else { 2 }
}

/// A mode that could not be set would be measured as another one: it is an error.
fn set_features(host: &NetNs, mode: Mode) -> anyhow::Result<()> {
    let wanted = mode.features();
    if wanted.is_empty() {
        return Ok(());
    }
    let words: Vec<&str> = wanted.iter().flat_map(|(name, value)| [*name, *value]).collect();
    ethtool(host, &[&["-K", "eth0"], &words[..]].concat())?;
    let answer = ethtool(host, &["-k", "eth0"])?;
    for (long, value) in [
        ("tcp-segmentation-offload", wanted[0].1),
        ("generic-segmentation-offload", wanted[1].1),
        ("tx-udp-segmentation", wanted[2].1),
        ("generic-receive-offload", wanted[3].1),
    ] {
        let line = answer.lines().find(|line| line.trim().starts_with(long));
        let line = line.with_context(|| format!("ethtool does not tell of {long}"))?;
        ensure!(
            line.contains(&format!(": {value}")),
            "the mode {} cannot be set: {line}",
            mode.name()
        );
    }
    Ok(())
}

fn ethtool(host: &NetNs, arguments: &[&str]) -> anyhow::Result<String> {
    let output = host.output(Command::new("ethtool").args(arguments))?;
    if !output.status.success() {
        bail!(
            "`ethtool {}`: {}",
            arguments.join(" "),
            String::from_utf8_lossy(&output.stderr).trim()
        );
    }
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}
