//! Two hosts on one cable, a container behind each: all that a benchmark needs of a network.
//!
//! ```text
//!   c1 eth0 ── docker0 h1 eth0 ──────── eth0 h2 docker0 ── eth0 c2
//!   10.77.1.2     10.77.1.1 192.168.77.1    .2 10.77.2.1     10.77.2.2
//! ```

use std::fs;
use std::net::{IpAddr, Ipv4Addr};
use std::sync::{Mutex, PoisonError};

use anyhow::{Context, ensure};
use ipnetwork::Ipv4Network;
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

    /// Whether the receiving host joins packets that cross alone; `None` where they do not.
    const fn gro(self) -> Option<&'static str> {
        match self {
            Self::Wire => Some("off"),
            Self::WireGro => Some("on"),
            Self::Offload => None,
        }
    }
}

/// The network, removed when dropped.
#[derive(Debug)]
pub struct Topology {
    pub mode: Mode,
    pub hosts: [NetNs; 2],
    pub containers: [NetNs; 2],
    /// What was run in them to set things up, line by line.
    commands: Mutex<Vec<String>>,
}

impl Topology {
    /// Everything but what carries packets between the hosts' subnets.
    ///
    /// # Errors
    /// We are not root, or iproute2 or ethtool is missing.
    pub fn new(mode: Mode) -> anyhow::Result<Self> {
        let id: String = (0..6).map(|_| fastrand::lowercase()).collect();
        let make = |name: &str| NetNs::create(format!("weft-bench-{id}-{name}"));
        let it = Self {
            mode,
            hosts: [make("h1")?, make("h2")?],
            containers: [make("c1")?, make("c2")?],
            commands: Mutex::default(),
        };
        let [h1, h2] = &it.hosts;
        it.command(h1, &format!("ip link add eth0 type veth peer name eth0 netns {}", h2.name()))?;
        for side in [0, 1] {
            it.build(side)?;
            it.set_features(&it.hosts[side])?;
        }
        Ok(it)
    }

    fn build(&self, side: usize) -> anyhow::Result<()> {
        let (host, container) = (&self.hosts[side], &self.containers[side]);
        let forward = || fs::write("/proc/sys/net/ipv4/ip_forward", "1");
        host.run(forward)?.context("cannot make the host forward")?;
        self.note(host, "sysctl -w net.ipv4.ip_forward=1");
        for netns in [host, container] {
            self.command(netns, "ip link set lo up")?;
        }
        self.command(host, &format!("ip address add {}/24 dev eth0", outer(side)))?;
        self.command(host, "ip link set eth0 up")?;
        self.command(host, "ip route add default dev eth0")?;
        self.command(host, "ip link add docker0 type bridge")?;
        self.command(host, &format!("ip address add {}/24 dev docker0", gateway(side)))?;
        self.command(host, "ip link set docker0 up")?;
        let far = container.name();
        self.command(host, &format!("ip link add c type veth peer name eth0 netns {far}"))?;
        self.command(host, "ip link set c master docker0 up")?;
        self.command(container, &format!("ip address add {}/24 dev eth0", inner(side)))?;
        self.command(container, "ip link set eth0 up")?;
        self.command(container, &format!("ip route add default via {}", gateway(side)))
    }

    /// A mode that could not be set would be measured as another one: it is an error.
    fn set_features(&self, host: &NetNs) -> anyhow::Result<()> {
        let Some(gro) = self.mode.gro() else { return Ok(()) };
        for (feature, value) in [
            ("tcp-segmentation-offload", "off"),
            ("generic-segmentation-offload", "off"),
            ("tx-udp-segmentation", "off"),
            ("generic-receive-offload", gro),
        ] {
            self.command(host, &format!("ethtool -K eth0 {feature} {value}"))?;
            let answer = host.tool("ethtool", &["-k", "eth0"])?;
            let line = answer.lines().find(|line| line.trim().starts_with(feature));
            let line = line.with_context(|| format!("ethtool does not tell of {feature}"))?;
            ensure!(
                line.contains(&format!(": {value}")),
                "the mode {} cannot be set: {line}",
                self.mode.name()
            );
        }
        Ok(())
    }

    /// Gives containers the MTU that whatever carries their packets leaves.
    ///
    /// # Errors
    /// The kernel refuses it.
    pub fn set_mtu(&self, mtu: u16) -> anyhow::Result<()> {
        for side in [0, 1] {
            self.command(&self.containers[side], &format!("ip link set eth0 mtu {mtu}"))?;
            for device in ["c", "docker0"] {
                self.command(&self.hosts[side], &format!("ip link set {device} mtu {mtu}"))?;
            }
        }
        Ok(())
    }

    /// Runs a command, of words without spaces, in one of the namespaces, and notes it.
    ///
    /// # Errors
    /// As [`NetNs::tool`].
    pub fn command(&self, netns: &NetNs, line: &str) -> anyhow::Result<()> {
        self.note(netns, line);
        let mut words = line.split_whitespace();
        let program = words.next().context("an empty command")?;
        netns.tool(program, &words.collect::<Vec<_>>()).map(drop)
    }

    /// Notes a command that is run in a namespace.
    pub fn note(&self, netns: &NetNs, line: &str) {
        let (common, short) = netns.name().rsplit_once('-').unwrap_or_default();
        let line = line.replace(&format!("{common}-"), "");
        self.lock().push(format!("{short}# {line}"));
    }

    /// What was noted since the last call.
    pub fn take_commands(&self) -> Vec<String> {
        std::mem::take(&mut *self.lock())
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Vec<String>> {
        self.commands.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What the first host has put on the cable.
    ///
    /// # Errors
    /// /proc is not what proc(5) says.
    pub fn carried(&self) -> anyhow::Result<Carried> {
        let text = self.hosts[0].run(|| fs::read_to_string("/proc/thread-self/net/dev"))??;
        Carried::parse(&text).context("/proc/net/dev does not tell of eth0")
    }
}

/// Bytes and packets that a host has sent, Ethernet headers included.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Carried {
    pub bytes: u64,
    pub packets: u64,
}

impl Carried {
    /// The largest packet that may cross alone.
    pub const LEN_MAX: f64 = WIRE_MTU as f64 + 14.0;

    /// Bytes of a packet, on the average, since `before`.
    pub fn mean_since(self, before: Self) -> f64 {
        (self.bytes - before.bytes) as f64 / (self.packets - before.packets).max(1) as f64
    }

    /// Of eth0: its line has eight fields of what was received first (proc(5)).
    fn parse(text: &str) -> Option<Self> {
        let fields = text.lines().find_map(|line| line.trim().strip_prefix("eth0:"))?;
        let fields: Vec<u64> = fields.split_whitespace().map_while(|it| it.parse().ok()).collect();
        Some(Self { bytes: *fields.get(8)?, packets: *fields.get(9)? })
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

/// How many addresses are scattered over: 64 for each of 65,000 routes.
pub const SCATTERED: u32 = 65_000 * 64;

/// One of the addresses of the second container that no route but its host's own tells apart.
pub fn scattered(number: u32) -> Ipv4Addr {
    Ipv4Addr::from_bits(scattered_network().network().to_bits() + number % SCATTERED)
}

/// The network of all of them.
pub fn scattered_network() -> Ipv4Network {
    Ipv4Network::new_checked(Ipv4Addr::new(10, 128, 0, 0), 10).expect("10 is a prefix length")
}

fn gateway(side: usize) -> Ipv4Addr {
    Ipv4Addr::new(10, 77, number(side), 1)
}

fn number(side: usize) -> u8 {
    if side == 0 { 1 } else { 2 }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_sent_is_read_where_proc_5_has_it() {
        let head = "Inter-|   Receive  |  Transmit\n face |bytes packets errs|bytes packets\n";
        let text = format!(
            "{head}    lo: 1 1 0 0 0 0 0 0 1 1 0 0 0 0 0 0\n  \
            eth0: 11 12 0 0 0 0 0 0 3028 2 0 0 0 0 0 0\n"
        );
        let carried = Carried::parse(&text).unwrap();
        assert_eq!(carried, Carried { bytes: 3028, packets: 2 });
        let before = Carried { bytes: 1514, packets: 1 };
        assert!((carried.mean_since(before) - Carried::LEN_MAX).abs() < 0.1);
        assert_eq!(Carried::parse(head), None);
    }
}
