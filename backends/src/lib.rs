//! Ways to carry overlay packets between hosts: one trait, one module for each way.

mod direct;
mod ethtool;
mod host_gw;
mod kernel_events;
mod mac;
pub mod netlink;
mod peer_routes;
mod reconcile;
mod udp_tun;
mod vxlan;

use std::collections::HashSet;
use std::fmt;
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::sync::Arc;

use ipnetwork::IpNetwork;
use tokio::sync::mpsc::UnboundedReceiver;
use weft_control::config::BackendConfig;
use weft_control::lease::addresses;
use weft_control::{ConfigError, Lease, LeaseAttrs, NetworkConfig};
use weft_engine::EngineError;

pub use kernel_events::KernelEvents;
pub use mac::{BadMac, Mac};
pub use weft_engine::packet::checksum;
pub use weft_engine::{
    BUCKETS, Counter, Direction, Distribution, DscpMode, EngineMeter, Feature, FeatureState,
    GuardMode, Histogram, IoKind, SOCKET_BUFFER_LEN, SourcePort, Traffic, Tuning,
};

/// The smallest MTU of a link with IPv4 (RFC 791), and with IPv6 (RFC 8200).
const IPV4_MTU_MIN: u32 = 68;
const IPV6_MTU_MIN: u32 = 1280;
/// More problems of one kind tell an operator nothing.
const PROBLEMS_MAX: usize = 20;

/// One way to carry overlay packets between hosts.
///
/// All calls may block for as long as the kernel takes, so they do not belong on an async thread.
pub trait Backend: Send + fmt::Debug {
    /// Makes or adopts what the lease tells of, and says what goes into the lease. `node_id` is what
    /// stays the same over restarts and reboots.
    ///
    /// # Errors
    /// The interface does not serve, or the kernel refuses something.
    fn prepare(&mut self, node_id: &str) -> Result<LeaseAttrs, BackendError>;

    /// Brings the overlay up under this lease; it must be down. After an error nothing is left
    /// behind.
    ///
    /// # Errors
    /// What stands in the way; see [`BackendError::is_final`].
    fn start(&mut self, lease: &Lease) -> Result<Started, BackendError>;

    /// Makes forwarding what `desired` says. Idempotent: lease events, the kernel's events and the
    /// slow timer all end here.
    fn reconcile(&mut self, desired: &Desired, basis: Basis) -> Report;

    /// Ends what moves packets in this process; [`Self::start`] may follow. What the kernel moves
    /// them by stays: the next start adopts it.
    fn stop(&mut self);

    /// Does without an offload that loses packets on the way to a peer, or to all: says which that was
    /// and how to have it again, or nothing if there is nothing to do without.
    fn give_up(&mut self, offload: Offload, towards: Towards) -> Option<GivenUp> {
        let _ = (offload, towards);
        None
    }

    /// What the backend does now.
    fn status(&self) -> BackendStatus;
}

/// The least that containers' packets may have to be.
fn mtu_min(config: &NetworkConfig) -> u32 {
    if config.ipv6.is_some() { IPV6_MTU_MIN } else { IPV4_MTU_MIN }
}

/// What a network card or the kernel does for packets, and may do wrong.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Offload {
    /// Cutting large packets.
    Segmentation,
    /// Filling in checksums.
    Checksum,
}

/// To whom an offload loses packets.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Towards {
    /// To this one, while others get theirs; by its public address.
    One(IpAddr),
    /// To all, as far as is known, and to this one.
    All(IpAddr),
}

/// An offload that a backend does without.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct GivenUp {
    /// Its name.
    pub what: String,
    /// The one peer that it is given up towards, if not all.
    pub towards: Option<IpAddr>,
    /// How to have it again.
    pub cure: String,
}

/// The backends by name.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum BackendKind {
    UdpTun,
    Vxlan,
    HostGw,
}

impl BackendKind {
    /// Reads a `Type` of the network config. `udp` is flannel's name for the wire format that
    /// udp-tun speaks.
    pub fn from_config(name: &str) -> Option<Self> {
        match name {
            "udp" | "udp-tun" => Some(Self::UdpTun),
            "vxlan" => Some(Self::Vxlan),
            "host-gw" => Some(Self::HostGw),
            _ => None,
        }
    }

    /// Whether a lease is of a node with this backend. flannel's udp writes no type.
    pub fn is_of(self, attrs: &LeaseAttrs) -> bool {
        let name = if attrs.backend_type.is_empty() { "udp" } else { &attrs.backend_type };
        Self::from_config(name) == Some(self)
    }

    /// # Errors
    /// The lease is of a node with another backend; the text says which.
    fn require(self, lease: &Lease) -> Result<(), String> {
        if self.is_of(&lease.attrs) {
            return Ok(());
        }
        let other = match lease.attrs.backend_type.as_str() {
            "" => Self::UdpTun.to_string(),
            name => Self::from_config(name).map_or_else(|| name.to_owned(), |it| it.to_string()),
        };
        let at = lease.attrs.public_addresses().next().map(|ip| format!(" at {ip}"));
        Err(format!(
            "the node of {}{} is of the backend {other}, not {self}; a node takes up another one when its \
             daemon starts again",
            lease.key,
            at.unwrap_or_default()
        ))
    }

    /// The UDP port that its packets go to, where they go to one: the configured or its own.
    pub fn port(self, config: Option<&BackendConfig>) -> Option<u16> {
        let own = match self {
            Self::UdpTun => udp_tun::DEFAULT_PORT,
            Self::Vxlan => vxlan::KERNEL_PORT,
            Self::HostGw => return None,
        };
        let configured = config.and_then(|it| it.u16_option("Port").ok().flatten());
        configured.filter(|port| *port != 0).or(Some(own))
    }
}

impl fmt::Display for BackendKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::UdpTun => "udp-tun",
            Self::Vxlan => "vxlan",
            Self::HostGw => "host-gw",
        })
    }
}

/// The operator's choices that backends follow.
#[derive(Debug, Clone, PartialEq)]
pub struct Options {
    pub guard: GuardMode,
    /// Workers of the packet engine, at least 1.
    pub workers: usize,
    /// How the packet engine goes about it.
    pub tuning: Tuning,
}

/// A backend, and the reasons why packets no longer move, which [`Backend::stop`] and [`Backend::start`]
/// mend.
pub type Opened = (Box<dyn Backend>, UnboundedReceiver<String>);

/// Makes the backend of this kind. Nothing in the kernel changes yet.
///
/// # Errors
/// An option of the config is wrong, or netlink is not to be had.
pub fn open(
    kind: BackendKind,
    config: &NetworkConfig,
    interface: &ExternalInterface,
    options: Options,
) -> Result<Opened, BackendError> {
    match kind {
        BackendKind::UdpTun => udp_tun::open(config.clone(), interface.clone(), options),
        BackendKind::Vxlan => vxlan::open(config.clone(), interface.clone()),
        BackendKind::HostGw => host_gw::open(config, interface.clone()),
    }
}

/// Whether the backend of this kind could begin by its options in the config, whatever the host.
///
/// # Errors
/// One of them is wrong.
pub fn check_options(kind: BackendKind, config: &NetworkConfig) -> Result<(), BackendError> {
    match kind {
        BackendKind::UdpTun => udp_tun::UdpTunOptions::read(config).map(drop)?,
        BackendKind::Vxlan => vxlan::VxlanOptions::read(config).map(drop)?,
        BackendKind::HostGw => {}
    }
    Ok(())
}

/// The interface that overlay traffic leaves by, and the addresses that other nodes know us by.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ExternalInterface {
    pub name: String,
    pub index: u32,
    /// Bytes of an IP packet.
    pub mtu: u32,
    /// The interface's own address, which sockets are bound to.
    pub ipv4: Option<Ipv4Addr>,
    /// As `ipv4`.
    pub ipv6: Option<Ipv6Addr>,
    /// The address that other nodes send to; differs from `ipv4` behind address translation.
    pub public_ipv4: Option<Ipv4Addr>,
    /// As `public_ipv4`.
    pub public_ipv6: Option<Ipv6Addr>,
    /// Every other global address of the interface: packets may leave with one of them.
    pub other_addresses: Vec<IpAddr>,
    /// The IPv6 address that nodes on the link reach us by, where we have no other one.
    pub link_local: Option<Ipv6Addr>,
}

impl ExternalInterface {
    /// Its own addresses, IPv4 first.
    pub fn addresses(&self) -> impl Iterator<Item = IpAddr> + use<> {
        addresses(self.ipv4, self.ipv6)
    }

    /// Those that other nodes send to, IPv4 first.
    pub fn public_addresses(&self) -> impl Iterator<Item = IpAddr> + use<> {
        addresses(self.public_ipv4, self.public_ipv6)
    }
}

impl fmt::Display for ExternalInterface {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.name)?;
        for ip in self.addresses() {
            write!(f, " {ip}")?;
        }
        write!(f, " MTU {}", self.mtu)
    }
}

/// What came up.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Started {
    /// The overlay device.
    pub device: String,
    /// The device of the other family, where each has one.
    pub other_devices: Vec<String>,
    /// The largest packet that containers may send, in bytes.
    pub mtu: u32,
}

/// What forwarding should be.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Desired {
    pub lease: Lease,
    pub peers: Vec<DesiredPeer>,
}

impl Desired {
    /// Those of all peers.
    pub fn public_addresses(&self) -> HashSet<IpAddr> {
        self.peers.iter().flat_map(|peer| peer.lease.attrs.public_addresses()).collect()
    }
}

/// A peer that packets should go to and come from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DesiredPeer {
    pub lease: Lease,
    /// Where its packets may come from, besides its public addresses.
    pub other_addresses: Vec<IpAddr>,
    /// Whether it is a weft node, by its record in the registry.
    pub is_weft: bool,
}

impl DesiredPeer {
    /// Where its packets may come from.
    pub(crate) fn addresses(&self) -> impl Iterator<Item = IpAddr> {
        self.lease.attrs.public_addresses().chain(self.other_addresses.iter().copied())
    }
}

/// What a reconciliation goes by.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Basis {
    /// What the kernel has: somebody may have changed it.
    Kernel,
    /// What it had when it was last asked, and what was done since; asking a kernel with thousands
    /// of routes takes its time. Without such a memory it is asked.
    Memory,
}

/// What a reconciliation came to.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Report {
    /// Whether something in the kernel was not as it should be, and was changed.
    pub changed: bool,
    /// What the lease must say, where the kernel has a part in that.
    pub attrs: Option<LeaseAttrs>,
    /// The links whose neighbours are ours; see [`KernelEvents::hear_neighbours_of`].
    pub neighbours_of: Vec<u32>,
    /// What could not be done, one line each, with the object and the cure.
    pub problems: Vec<String>,
    /// The same, where it concerns all peers: our device, its addresses, or the routes as a whole.
    pub failures: Vec<String>,
}

impl Report {
    /// Takes in problems of one kind.
    pub(crate) fn tell(&mut self, problems: impl IntoIterator<Item = String>) {
        self.problems.extend(some(problems));
    }
}

/// Of problems of one kind the first ones, and how many more there are: thousands tell nobody anything.
pub fn some(problems: impl IntoIterator<Item = String>) -> Vec<String> {
    let mut problems: Vec<String> = problems.into_iter().collect();
    // The same ones each time, or each time there would be news.
    problems.sort();
    problems.dedup();
    let more = problems.len().saturating_sub(PROBLEMS_MAX);
    problems.truncate(PROBLEMS_MAX);
    if let Some(last) = problems.last_mut().filter(|_| more > 0) {
        *last += &format!("; and {more} more like that");
    }
    problems
}

/// What a backend does at one moment.
#[derive(Debug, Clone, Default)]
pub struct BackendStatus {
    /// The peers that packets go to.
    pub peers: Vec<PeerWay>,
    /// The packet engine, where it carries the packets; a new one with each [`Backend::start`].
    pub engine: Option<EngineMeter>,
}

/// How packets go to one peer.
#[derive(Debug, Clone)]
pub struct PeerWay {
    /// Where they are sent.
    pub public_ip: IpAddr,
    /// What lies there.
    pub subnets: Vec<IpNetwork>,
    pub way: Way,
    /// What was carried, where the packet engine does it; else only the kernel knows.
    pub traffic: Option<Arc<Traffic>>,
}

/// Has no way lead to these subnets any more; one to nowhere is none.
fn lose_subnets(ways: &mut Vec<PeerWay>, subnets: &HashSet<IpNetwork>) {
    for way in &mut *ways {
        way.subnets.retain(|subnet| !subnets.contains(subnet));
    }
    ways.retain(|way| !way.subnets.is_empty());
}

/// Whether packets are wrapped.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Way {
    Tunnel,
    /// Routed as they are.
    Direct,
}

impl Way {
    /// The name in status and metrics.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Tunnel => "tunnel",
            Self::Direct => "direct",
        }
    }
}

/// Why a backend cannot work.
#[derive(Debug, thiserror::Error)]
pub enum BackendError {
    #[error("the backend's options in the network config: {0}")]
    Options(#[from] ConfigError),
    #[error(
        "the interface {interface} has no address that the backend can send from: give it an IPv4 \
         or a global IPv6 address, or choose another one with --iface"
    )]
    NoAddress { interface: String },
    #[error(
        "host-gw needs an IPv6 address on {interface} for an overlay with IPv6, a link-local one at \
         least, since the kernel has no IPv6 routes by way of IPv4 addresses: enable IPv6 there \
         (`sysctl -w net.ipv6.conf.{interface}.disable_ipv6=0`), or leave it out of the network \
         config, or use another backend"
    )]
    NoIpv6 { interface: String },
    #[error(
        "your PublicIP differs from interface IP, meaning that probably you're on a NAT, which is not \
         supported by host-gw backend: leave out --public-ip, or give the address of {interface}"
    )]
    Nat { interface: String },
    #[error(
        "the MTU of the interface {interface}, {mtu}, leaves no room for containers' packets of \
         {least} bytes: raise it, or choose another interface with --iface"
    )]
    MtuTooSmall { interface: String, mtu: u32, least: u32 },
    #[error(
        "MTU in the network config, {mtu}, leaves no room for containers' packets of {least} bytes: \
         raise it, or leave it out for the interface's"
    )]
    MtuOption { mtu: u32, least: u32 },
    #[error(
        "the route to {network}, which is the overlay's Network, already leads to {elsewhere}; \
         remove that route (`ip route del {network}`), or choose another Network"
    )]
    RouteTaken { network: IpNetwork, elsewhere: String },
    #[error("there is no device {0} any more: somebody removed or renamed it")]
    DeviceGone(String),
    #[error(
        "the name {device}, which the VXLAN device needs, is that of a {kind}; remove or rename that \
         one"
    )]
    DeviceTaken { device: String, kind: String },
    #[error(
        "the device {device} has the VNI {vni} on the same port; remove it (`ip link del {device}`), \
         or choose another VNI in the network config"
    )]
    VniTaken { vni: u32, device: String },
    #[error("cannot speak to the kernel's netlink: {0}")]
    NetlinkSocket(#[source] io::Error),
    #[error(transparent)]
    Netlink(#[from] netlink::NetlinkError),
    #[error(transparent)]
    Engine(#[from] EngineError),
}

impl BackendError {
    /// Whether trying again is in vain until the operator has changed something outside the
    /// registry: a port that is taken, a privilege that is missing.
    pub fn is_final(&self) -> bool {
        match self {
            Self::NoAddress { .. }
            | Self::NoIpv6 { .. }
            | Self::Nat { .. }
            | Self::MtuTooSmall { .. }
            | Self::NetlinkSocket(_) => true,
            // The interface had it a moment ago; it is about to get another, or this one for good.
            Self::Engine(EngineError::Listen { source, .. }) => {
                source.kind() != io::ErrorKind::AddrNotAvailable
            }
            Self::Engine(EngineError::BringUp { .. }) => false,
            Self::Engine(_) => true,
            Self::Options(_)
            | Self::MtuOption { .. }
            | Self::RouteTaken { .. }
            | Self::DeviceGone(_)
            | Self::DeviceTaken { .. }
            | Self::VniTaken { .. }
            | Self::Netlink(_) => false,
        }
    }
}
