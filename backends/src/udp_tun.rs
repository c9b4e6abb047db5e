//! udp-tun: containers' packets go through a TUN device into UDP datagrams and back, moved by
//! weft's own engine. The wire format is flannel's `udp` backend's: one packet, one datagram,
//! nothing in front.
//!
//! The device carries the whole overlay: its address is the base of our subnet, and one route for
//! each Network leads into it. Which peer a packet goes to is the engine's business.

use std::collections::{BTreeSet, HashMap, HashSet};
use std::fs;
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;

use ipnetwork::IpNetwork;
use tokio::sync::mpsc::{self, UnboundedSender};
use weft_control::{ConfigError, Lease, LeaseAttrs, LeaseKey, NetworkConfig};
use weft_engine::{
    EcnMode, Engine, EngineConfig, EngineError, EngineHandle, Feature, Peer, RouteTable, Traffic,
    overhead,
};

use crate::direct::{Direct, loosen_filter, strict_filter};
use crate::netlink::{Link, LinkSettings, Netlink, ROUTE_PROTOCOL};
use crate::peer_routes::PeerRoutes;
use crate::reconcile::Territory;
use crate::{
    Backend, BackendError, BackendKind, BackendStatus, Basis, Desired, DesiredPeer,
    ExternalInterface, GivenUp, Offload, Opened, Options, PeerWay, Report, Started, Towards, Way,
    mtu_min, vxlan,
};

/// The name that flannel's device has; the kernel puts the next free number.
const DEVICE: &str = "flannel%d";
/// flannel's port, where the config names none.
pub(crate) const DEFAULT_PORT: u16 = 8285;
/// As many packets may wait in each queue of the device for the engine. flannel's 500 lose bursts; each may
/// be of 64 KiB, which no socket's limit holds back any more.
const QUEUE_LEN: u32 = 2_000;
/// Peers that packets are cut for one by one, while others get them as the kernel cuts them. With more, it is
/// not theirs.
const APART_MAX: usize = 8;

/// The udp-tun backend.
#[derive(Debug)]
struct UdpTun {
    config: NetworkConfig,
    /// The port of every node of the overlay: a lease does not tell it.
    port: u16,
    interface: ExternalInterface,
    options: Options,
    netlink: Netlink,
    losses: UnboundedSender<String>,
    /// Where peers on the same link are routed to directly.
    direct: Option<Direct>,
    routes: PeerRoutes,
    running: Option<Running>,
    /// Of each peer, for as long as it is one.
    traffic: HashMap<LeaseKey, Arc<Traffic>>,
    /// Peers by their public addresses that get each packet in a send of its own.
    apart: BTreeSet<IpAddr>,
}

#[derive(Debug)]
struct Running {
    /// Until it is known who the peers are: senders would be told that there are none.
    opened: Option<Engine>,
    engine: Option<EngineHandle>,
    device: String,
    peers: Vec<PeerWay>,
    /// What the engine's routes were made of.
    published: Option<Desired>,
    /// They are to be made again all the same.
    is_stale: bool,
}

/// What the network config says of the backend.
#[derive(Debug, Clone, Copy)]
pub(crate) struct UdpTunOptions {
    port: u16,
    direct_routing: bool,
}

impl UdpTunOptions {
    pub(crate) fn read(config: &NetworkConfig) -> Result<Self, ConfigError> {
        let backend = &config.backend;
        let port = backend.u16_option("Port")?.filter(|port| *port > 0);
        Ok(Self {
            port: port.unwrap_or(DEFAULT_PORT),
            direct_routing: backend.bool_option("DirectRouting")?.unwrap_or(false),
        })
    }
}

pub(crate) fn open(
    config: NetworkConfig,
    interface: ExternalInterface,
    options: Options,
) -> Result<Opened, BackendError> {
    let UdpTunOptions { port, direct_routing } = UdpTunOptions::read(&config)?;
    let (losses, receiver) = mpsc::unbounded_channel();
    let netlink = Netlink::open().map_err(BackendError::NetlinkSocket)?;
    let backend = UdpTun {
        config,
        port,
        interface,
        options,
        netlink,
        losses,
        direct: direct_routing.then(Direct::default),
        routes: PeerRoutes::default(),
        running: None,
        traffic: HashMap::new(),
        apart: BTreeSet::new(),
    };
    Ok((Box::new(backend), receiver))
}

impl Backend for UdpTun {
    fn prepare(&mut self, _: &str) -> Result<LeaseAttrs, BackendError> {
        self.mtu(self.underlay()?)?;
        Ok(LeaseAttrs {
            public_ip: self.interface.public_ipv4,
            public_ipv6: self.interface.public_ipv6,
            // flannel's udp backend names neither itself nor any data.
            backend_type: String::new(),
            backend_data: None,
            backend_v6_data: None,
        })
    }

    fn start(&mut self, lease: &Lease) -> Result<Started, BackendError> {
        self.refuse_taken_routes()?;
        let underlay = self.underlay()?;
        let mtu = self.mtu(underlay)?;
        let engine = Engine::open(EngineConfig {
            device: DEVICE.into(),
            mtu,
            workers: self.options.workers,
            listen: SocketAddr::new(underlay, self.port),
            guard: self.options.guard,
            tunnel_addresses: tunnel_addresses(lease).collect(),
            tuning: self.options.tuning.clone(),
        })?;
        let device = engine.device().to_owned();
        let networks: Vec<IpNetwork> = self.config.networks().collect();
        vxlan::remove_stale(&self.netlink, &mut self.netlink.links()?, &networks, &[])?;
        self.configure(&device, lease)?;
        if let Err(error) = accept_own_address(&device) {
            tracing::warn!(
                "cannot set {}: {error}; containers will not see weft's ICMP errors (make \
                 /proc/sys/net writable for weftd)",
                accept_local(&device)
            );
        }
        self.running = Some(Running {
            opened: Some(engine),
            engine: None,
            device: device.clone(),
            peers: Vec::new(),
            published: None,
            is_stale: false,
        });
        Ok(Started { device, other_devices: Vec::new(), mtu: mtu.into() })
    }

    fn reconcile(&mut self, desired: &Desired, basis: Basis) -> Report {
        let mut report = Report::default();
        let Ok(underlay) = self.underlay() else {
            return report;
        };
        let Some(running) = &self.running else { return report };
        let basis = if running.published.is_none() { Basis::Kernel } else { basis };
        if basis == Basis::Kernel {
            match self.configure(&running.device, &desired.lease) {
                Ok(changed) => report.changed = changed,
                Err(error) => {
                    if matches!(error, BackendError::DeviceGone(_)) {
                        lose(&self.losses, error.to_string());
                    }
                    report.failures.push(error.to_string());
                }
            }
        }
        let direct = self.route_directly(desired, basis, &mut report);
        let peers = self.engine_peers(desired, underlay, &mut report);
        self.apart.retain(|it| peers.iter().any(|peer| peer.endpoint.ip() == *it));
        if let Err(error) = self.publish_changes(peers, desired, &direct) {
            report.failures.push(error.to_string());
            lose(&self.losses, error.to_string());
        }
        report
    }

    fn stop(&mut self) {
        self.running = None;
        self.apart.clear();
    }

    fn give_up(&mut self, offload: Offload, towards: Towards) -> Option<GivenUp> {
        if offload != Offload::Segmentation {
            return None;
        }
        let name = Feature::UdpSegment.name();
        let running = self.running.as_mut()?;
        if let Towards::One(peer) = towards
            && (self.apart.len() < APART_MAX || self.apart.contains(&peer))
        {
            if !self.apart.insert(peer) {
                return None;
            }
            running.is_stale = true;
            let desired = running.published.clone()?;
            // What fails is tried again, and told, with the next one.
            self.reconcile(&desired, Basis::Memory);
            let cure = format!(
                "see what receives there, and `ethtool -k {}`; start weftd here again when that is \
                 mended",
                self.interface.name
            );
            return Some(GivenUp { what: name.into(), towards: Some(peer), cure });
        }
        running.engine.as_ref()?.give_up(Feature::UdpSegment).then(|| GivenUp {
            what: name.into(),
            towards: None,
            cure: format!(
                "see `ethtool -k {}`, and start weftd again when that is mended",
                self.interface.name
            ),
        })
    }

    fn status(&self) -> BackendStatus {
        let Some(running) = &self.running else {
            return BackendStatus::default();
        };
        let engine = running.engine.as_ref().map(EngineHandle::meter);
        BackendStatus { peers: running.peers.clone(), engine }
    }
}

impl Running {
    /// Has the engine go by these routes; the first time, from then on.
    ///
    /// # Errors
    /// It did not start.
    fn publish(
        &mut self,
        routes: RouteTable,
        losses: &UnboundedSender<String>,
    ) -> Result<(), EngineError> {
        if let Some(engine) = &mut self.engine {
            engine.publish(routes);
        } else if let Some(engine) = self.opened.take() {
            let losses = losses.clone();
            let on_failure = Arc::new(move |reason| lose(&losses, reason));
            self.engine = Some(engine.start(routes, on_failure)?);
        }
        Ok(())
    }
}

fn lose(losses: &UnboundedSender<String>, reason: String) {
    // Nobody listens any more only when the daemon is on its way out.
    let _ = losses.send(reason);
}

impl UdpTun {
    /// Our address on the underlay. Both families of inner packets go over IPv4, unless there is
    /// only IPv6.
    fn underlay(&self) -> Result<IpAddr, BackendError> {
        let ipv4 = self.interface.ipv4.map(IpAddr::V4);
        // Sockets do not say which link they would mean.
        let ipv6 = self.interface.ipv6.filter(|ip| !ip.is_unicast_link_local());
        ipv4.or(ipv6.map(IpAddr::V6))
            .ok_or_else(|| BackendError::NoAddress { interface: self.interface.name.clone() })
    }

    fn mtu(&self, underlay: IpAddr) -> Result<u16, BackendError> {
        let external = self.interface.mtu;
        let mtu = external.saturating_sub(overhead(underlay));
        let least = mtu_min(&self.config);
        if mtu < least {
            let interface = self.interface.name.clone();
            return Err(BackendError::MtuTooSmall { interface, mtu: external, least });
        }
        // A loopback-like interface may carry more than an IP packet can hold.
        Ok(u16::try_from(mtu).unwrap_or(u16::MAX - 28))
    }

    /// Plain routes to peers on the same link, and to which subnets there are some. The engine keeps
    /// its own for all: it goes by them when it judges who may send.
    fn route_directly(
        &mut self,
        desired: &Desired,
        basis: Basis,
        report: &mut Report,
    ) -> HashSet<IpNetwork> {
        let mut routes = Vec::new();
        if let Some(direct) = &mut self.direct {
            direct.look(&self.netlink, desired.public_addresses(), basis);
            report.problems.extend(strict_filter(&self.interface.name));
            for Lease { key, attrs, .. } in desired.peers.iter().map(|peer| &peer.lease) {
                routes.extend(key.networks().filter_map(|subnet| direct.route(subnet, attrs)));
            }
        }
        let networks = self.config.networks().collect();
        let territory = Territory { networks, links: Vec::new() };
        let mut direct: HashSet<IpNetwork> = routes.iter().map(|route| route.destination).collect();
        match self.routes.reconcile(&self.netlink, &routes, &territory, basis) {
            Ok(outcome) => {
                report.changed |= outcome.changed;
                report.tell(outcome.problems);
                for (route, _) in &outcome.refused {
                    direct.remove(&route.destination);
                }
                report.tell(outcome.refused.iter().map(|(_, error)| error.to_string()));
            }
            Err(error) => report.failures.push(error.to_string()),
        }
        direct
    }

    fn refuse_taken_routes(&self) -> Result<(), BackendError> {
        let routes = self.netlink.routes()?;
        let links = self.netlink.links()?;
        for network in self.config.networks() {
            let taken = routes.iter().find(|route| {
                let is_foreign = route.protocol != ROUTE_PROTOCOL;
                route.destination == network && is_foreign && route.precedes_ours()
            });
            if let Some(route) = taken {
                let link = links.iter().find(|link| Some(link.index) == route.link);
                let elsewhere = match (link, route.gateway) {
                    (Some(link), _) => link.name.clone(),
                    (None, Some(gateway)) => gateway.to_string(),
                    (None, None) => "somewhere else".into(),
                };
                return Err(BackendError::RouteTaken { network, elsewhere });
            }
        }
        Ok(())
    }

    /// Address, route, queue length and sysctls of our device. Says whether anything had to be done.
    fn configure(&self, device: &str, lease: &Lease) -> Result<bool, BackendError> {
        let link = self.link(device)?;
        let mtu = Some(self.mtu(self.underlay()?)?.into());
        let settings = LinkSettings { mtu, queue_len: Some(QUEUE_LEN) };
        let mut changed = self.netlink.claim_link(&link, settings)?;
        // Where it cannot be, the start has told.
        changed |= accept_own_address(device).unwrap_or(false);
        if self.direct.is_some() {
            loosen_filter(device);
        }
        for address in tunnel_addresses(lease) {
            changed |= self.netlink.set_address(&link, IpNetwork::from(address))?;
        }
        let routes = self.netlink.routes()?;
        for network in self.config.networks() {
            let is_there = routes.iter().any(|route| {
                (route.destination, route.link) == (network, Some(link.index))
                    && route.protocol == ROUTE_PROTOCOL
            });
            if !is_there {
                self.netlink.set_route(network, &link)?;
                changed = true;
            }
        }
        Ok(changed)
    }

    /// As the engine has them, with what it counted of each so far.
    fn engine_peers(
        &mut self,
        desired: &Desired,
        underlay: IpAddr,
        report: &mut Report,
    ) -> Vec<Peer> {
        let (mut peers, mut problems) = (Vec::new(), Vec::new());
        let known = std::mem::take(&mut self.traffic);
        for desired in &desired.peers {
            if let Err(problem) = BackendKind::UdpTun.require(&desired.lease) {
                problems.push(problem);
                continue;
            }
            let key = desired.lease.key;
            let traffic = known.get(&key).map(Arc::clone).unwrap_or_default();
            self.traffic.insert(key, Arc::clone(&traffic));
            match self.peer(desired, underlay, traffic) {
                Some(peer) => peers.push(peer),
                None => problems.push(format!(
                    "the node of {key} publishes no address of {underlay}'s family, so nothing can \
                     be sent to it"
                )),
            }
        }
        report.tell(problems);
        peers
    }

    /// `None` where the peer has no address of our underlay's family.
    fn peer(&self, desired: &DesiredPeer, underlay: IpAddr, traffic: Arc<Traffic>) -> Option<Peer> {
        let endpoint = desired.lease.attrs.address_of(underlay.is_ipv6())?;
        Some(Peer {
            endpoint: SocketAddr::new(endpoint, self.port),
            outer: desired.addresses().collect(),
            subnets: desired.lease.key.networks().collect(),
            // flannel would lose the marks.
            ecn: if desired.is_weft { EcnMode::Normal } else { EcnMode::Compatibility },
            segments: !self.apart.contains(&endpoint),
            traffic,
        })
    }

    /// Has the engine go by other routes only where there is something new.
    fn publish_changes(
        &mut self,
        peers: Vec<Peer>,
        desired: &Desired,
        direct: &HashSet<IpNetwork>,
    ) -> Result<(), EngineError> {
        let Some(running) = &mut self.running else { return Ok(()) };
        running.peers = peers.iter().map(|peer| way_to(peer, direct)).collect();
        if !running.is_stale && running.published.as_ref() == Some(desired) {
            return Ok(());
        }
        running.published = Some(desired.clone());
        running.is_stale = false;
        let local: Vec<IpNetwork> = desired.lease.key.networks().collect();
        running.publish(RouteTable::new(&local, peers), &self.losses)
    }

    fn link(&self, device: &str) -> Result<Link, BackendError> {
        // Twice: where links come and go meanwhile, a list may lack one that is there (netlink(7),
        // NLM_F_DUMP_INTR), and all stops for a device that is gone.
        for _ in 0..2 {
            let mut links = self.netlink.links()?.into_iter();
            if let Some(link) = links.find(|link| link.name == device) {
                return Ok(link);
            }
        }
        Err(BackendError::DeviceGone(device.to_owned()))
    }
}

/// Our addresses on the device: the base of each of our subnets, as flannel's.
fn tunnel_addresses(lease: &Lease) -> impl Iterator<Item = IpAddr> {
    lease.key.networks().map(|subnet| subnet.network())
}

/// The engine's ICMP errors come out of the device with the device's own address as source, which
/// the kernel drops as martian unless this is set (ip-sysctl.rst, accept_local). Says whether it was not.
fn accept_own_address(device: &str) -> io::Result<bool> {
    let path = accept_local(device);
    let is_set = fs::read_to_string(&path)?.trim() == "1";
    if !is_set {
        fs::write(&path, "1")?;
    }
    Ok(!is_set)
}

fn accept_local(device: &str) -> String {
    format!("/proc/sys/net/ipv4/conf/{device}/accept_local")
}

fn way_to(peer: &Peer, direct: &HashSet<IpNetwork>) -> PeerWay {
    let is_direct = peer.subnets.iter().all(|subnet| direct.contains(subnet));
    let way = if is_direct { Way::Direct } else { Way::Tunnel };
    PeerWay {
        public_ip: peer.endpoint.ip(),
        subnets: peer.subnets.clone(),
        way,
        traffic: Some(Arc::clone(&peer.traffic)),
    }
}
