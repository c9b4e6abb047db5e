//! weft's data plane: moves packets between a TUN device and UDP sockets.
//!
//! Each worker has one queue of the TUN device and one socket, served by two threads, one a
//! direction, or by one that polls both ([`Tuning::busy_poll`]). Each direction owns its buffers, its
//! counters and its way to do input and output: an io_uring, or plain system calls where there is
//! none. The published [`RouteTable`] is all that they share, read once per batch.
//!
//! **tun_to_udp.** The kernel routes a container's packet into the TUN device, many of one flow as
//! one super-packet → a read puts it into a buffer, behind its virtio header → [`packet::IpView`]
//! checks it → one lookup of the destination → time to live left? it drops by one →
//! [`offload::segment`] cuts it → packets of one length to one peer lie one behind the other and
//! share a send (UDP_SEGMENT); each datagram holds nothing but one packet (flannel's wire format) →
//! the buffer goes back when the send has completed.
//!
//! **udp_to_tun.** A receive puts a datagram into a buffer, or many of one length one behind the
//! other (UDP_GRO) → [`guard::Guard`] judges each by its sender and its bytes → [`ecn`] carries a
//! congestion mark over → time to live left? it drops by one → [`offload::coalesce`] joins
//! neighbours of one flow → one write each to the TUN device, which hands them to the kernel's
//! routing → the buffer goes back.
//!
//! Besides the kernel's copies between its packets and our buffers, the payload is copied once each
//! way: by the cut, and, where a packet may be joined with others, into the run. What is dropped on
//! the way has a counter by reason; senders get the ICMP errors that a router owes them ([`icmp`]).

mod batch;
mod buffers;
pub mod ecn;
pub mod features;
pub mod guard;
pub mod icmp;
mod io;
mod meter;
pub mod offload;
pub mod packet;
pub mod routes;
mod scheduling;
pub mod stats;
#[expect(unsafe_code, reason = "the fence: system calls that no crate wraps safely")]
mod sys;
mod thread;
mod traffic;
mod tun;
mod tun_to_udp;
mod udp;
mod udp_to_tun;
mod worker;

use std::fmt;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use arc_swap::ArcSwap;

pub use ecn::{DscpMode, EcnMode};
pub use features::{Feature, FeatureState};
pub use guard::GuardMode;
pub use io::Direction;
pub use meter::EngineMeter;
pub use routes::{Peer, RouteTable};
pub use stats::{BUCKETS, Counter, Distribution, Histogram};
pub use traffic::{Amount, Traffic};
pub use udp::SOCKET_BUFFER_LEN;
// For the benchmarks, which compare forwarders on one and the same device.
#[doc(hidden)]
pub use tun::{TunDevice, TunQueue};

use features::Features;
use guard::Guard;
use io::uring;
use stats::LaneStats;
use thread::Threads;
use udp::UdpSocket;
use worker::Context;

/// What an engine is made of.
#[derive(Debug, Clone)]
pub struct EngineConfig {
    /// Name of the TUN device; one `%d` stands for the next free number.
    pub device: String,
    /// The largest inner packet, in bytes; the MTU of the device.
    pub mtu: u16,
    /// Queues of the device and sockets; 2 threads each, or 1 that polls. At least 1.
    pub workers: usize,
    /// Address and port of the sockets.
    pub listen: SocketAddr,
    pub guard: GuardMode,
    /// Our addresses on the device, at most one of each family: ICMP errors come from there.
    pub tunnel_addresses: Vec<IpAddr>,
    pub tuning: Tuning,
}

/// How an engine goes about it. The default is right for most hosts.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Tuning {
    /// The way to do input and output; `None` for the best that is to be had.
    pub io: Option<IoKind>,
    /// Features not to be used.
    pub off: Vec<Feature>,
    pub source_port: SourcePort,
    /// How long a thread looks for more packets before it sleeps. Anything but zero costs a core
    /// a worker while packets come, for shorter round trips.
    pub busy_poll: Duration,
    pub dscp: DscpMode,
}

impl Tuning {
    /// Busy polling, one thread carries both: it costs one core a worker, and packets do not wait until
    /// the other direction's thread gives way. Otherwise each has its own, which sleeps sooner.
    pub(crate) fn directions_a_thread(&self) -> usize {
        if self.busy_poll.is_zero() { 1 } else { 2 }
    }
}

impl Default for Tuning {
    fn default() -> Self {
        Self {
            io: None,
            off: Vec::new(),
            source_port: SourcePort::Flow,
            busy_poll: Duration::ZERO,
            dscp: DscpMode::Clear,
        }
    }
}

/// A way to do input and output.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum IoKind {
    /// io_uring: many packets a system call.
    Uring,
    /// recvmmsg(2) and its like, which every kernel has and every sandbox allows.
    Mmsg,
}

impl IoKind {
    /// The name in flags, logs and status.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Uring => "uring",
            Self::Mmsg => "mmsg",
        }
    }
}

/// Which port datagrams are sent from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SourcePort {
    /// One of several, the same for all packets of a flow, so that a peer's cores share the work.
    Flow,
    /// The port that we listen on, for firewalls that let nothing else through.
    Fixed,
}

/// Why an engine did not come up.
#[derive(Debug, thiserror::Error)]
pub enum EngineError {
    #[error("cannot use io_uring: {0}; --io auto does without")]
    Ring(#[source] std::io::Error),
    #[error("cannot prepare a worker thread for packets: {0}")]
    Io(#[source] std::io::Error),
    #[error("cannot make the TUN device {name}: {source}{}", device_hint(source))]
    Device { name: String, source: std::io::Error },
    /// Somebody has deleted it, most likely.
    #[error("cannot bring up the TUN device {name} that was just made: {source}")]
    BringUp { name: String, source: std::io::Error },
    #[error("cannot listen on UDP {address}: {source}{}", listen_hint(source))]
    Listen { address: SocketAddr, source: std::io::Error },
    #[error("cannot start a worker thread: {0}")]
    Thread(#[source] std::io::Error),
}

/// Told, from the thread that died, why packets no longer move. The device being deleted is the
/// usual reason.
pub type OnFailure = Arc<dyn Fn(String) + Send + Sync>;

/// A device and sockets that are open, with nothing moving yet.
#[derive(Debug)]
pub struct Engine {
    config: EngineConfig,
    io: IoKind,
    features: Arc<Features>,
    device: TunDevice,
    sockets: Vec<UdpSocket>,
    /// Empty where each worker sends from its own.
    sources: Arc<[UdpSocket]>,
}

impl Engine {
    /// Opens the sockets and makes the device, up and with its MTU.
    ///
    /// # Errors
    /// The port is taken, the privilege is missing, or io_uring was asked for and is not to be had.
    /// Nothing is left behind.
    pub fn open(config: EngineConfig) -> Result<Self, EngineError> {
        let features = Features::without(&config.tuning.off);
        let address = config.listen;
        let listen_error = |source| EngineError::Listen { address, source };
        let sockets = UdpSocket::bind_group(address, config.workers, &features);
        let sockets = sockets.map_err(listen_error)?;
        let sources = match config.tuning.source_port {
            SourcePort::Flow => UdpSocket::bind_sources(address.ip()).map_err(listen_error)?,
            SourcePort::Fixed => Arc::new([]),
        };
        let device_error = |source| EngineError::Device { name: config.device.clone(), source };
        let device = TunDevice::open(&config.device, config.workers, &features);
        let device = device.map_err(device_error)?;
        let io = choose_io(config.tuning.io, &device)?;
        device
            .bring_up(config.mtu)
            .map_err(|source| EngineError::BringUp { name: device.name().to_owned(), source })?;
        Ok(Self { config, io, features: Arc::new(features), device, sockets, sources })
    }

    /// The name that the device got.
    pub fn device(&self) -> &str {
        self.device.name()
    }

    /// Starts the workers.
    ///
    /// # Errors
    /// A thread or its ring could not be made. Everything is stopped and closed again.
    pub fn start(
        self,
        routes: RouteTable,
        on_failure: OnFailure,
    ) -> Result<EngineHandle, EngineError> {
        tracing::debug!(features = ?self.features, config = ?self.config, "engine starts");
        let Self { config, mut io, features, device, sockets, sources } = self;
        let routes = Arc::new(ArcSwap::from_pointee(routes));
        let (mut stats, mut contexts) = (Vec::new(), Vec::new());
        for (tun, udp) in device.into_queues().into_iter().zip(sockets) {
            let sockets = if sources.is_empty() {
                Arc::from([udp.try_clone().map_err(EngineError::Thread)?])
            } else {
                Arc::clone(&sources)
            };
            let (tun, udp) = (Arc::new(tun), Arc::new(udp));
            let worker = Direction::BOTH.map(|direction| Context {
                direction,
                tun: Arc::clone(&tun),
                udp: Arc::clone(&udp),
                sockets: Arc::clone(&sockets),
                features: Arc::clone(&features),
                routes: Arc::clone(&routes),
                stats: Arc::default(),
                guard: Guard {
                    mode: config.guard,
                    mtu: config.mtu.into(),
                    own: config.listen.ip(),
                },
                tunnel_addresses: config.tunnel_addresses.clone(),
                overhead: overhead(config.listen.ip()),
                dscp: config.tuning.dscp,
            });
            stats.extend(worker.iter().map(|it| (it.direction, Arc::clone(&it.stats))));
            contexts.push(worker);
        }
        let threads = match Threads::start(io, &contexts, &config.tuning, &on_failure) {
            // Of several rings the last may be one too many, by the memlock limit, where the first was not.
            Err(EngineError::Io(error)) if io == IoKind::Uring && config.tuning.io.is_none() => {
                tell_of_mmsg(&error);
                io = IoKind::Mmsg;
                Threads::start(io, &contexts, &config.tuning, &on_failure)?
            }
            started => started?,
        };
        Ok(EngineHandle { io, features, routes, former: Vec::new(), stats, threads })
    }
}

/// Bytes of IP and UDP headers around each inner packet on an underlay of this family.
pub const fn overhead(underlay: IpAddr) -> u32 {
    match underlay {
        IpAddr::V4(_) => 20 + 8,
        IpAddr::V6(_) => 40 + 8,
    }
}

/// The way to do input and output: the one asked for, else the best. The device must be down.
fn choose_io(wish: Option<IoKind>, device: &TunDevice) -> Result<IoKind, EngineError> {
    let probe = || match uring::probe() {
        Ok(()) if !device.reads_without_waiting() => Err(std::io::Error::other(
            "this kernel's io_uring cannot wait for the TUN device: weft needs Linux 6.4",
        )),
        probed => probed,
    };
    let probed = match wish {
        Some(IoKind::Mmsg) => None,
        Some(IoKind::Uring) | None => Some(probe()),
    };
    match probed {
        None => Ok(IoKind::Mmsg),
        Some(Ok(())) => Ok(IoKind::Uring),
        Some(Err(error)) if wish.is_some() => Err(EngineError::Ring(error)),
        Some(Err(error)) => {
            tell_of_mmsg(&error);
            Ok(IoKind::Mmsg)
        }
    }
}

fn tell_of_mmsg(why: &std::io::Error) {
    tracing::info!("packets go by recvmmsg and sendmsg, since {why}");
}

/// A running engine. Dropping it stops the workers and closes the device.
pub struct EngineHandle {
    io: IoKind,
    features: Arc<Features>,
    routes: Arc<ArcSwap<RouteTable>>,
    /// Tables that threads may still go by: none of them is to spend its time on freeing one.
    former: Vec<Arc<RouteTable>>,
    stats: Vec<(Direction, Arc<LaneStats>)>,
    threads: Threads,
}

impl fmt::Debug for EngineHandle {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("EngineHandle").field("threads", &self.threads).finish_non_exhaustive()
    }
}

impl EngineHandle {
    /// Replaces the routes; the next batch of every worker uses the new ones.
    pub fn publish(&mut self, routes: RouteTable) {
        self.former.push(self.routes.swap(Arc::new(routes)));
        self.former.retain(|table| Arc::strong_count(table) > 1);
    }

    /// Does without a feature that loses packets from now on; says whether it was in use.
    pub fn give_up(&self, feature: Feature) -> bool {
        self.features.fall(feature, FeatureState::Lossy)
    }

    /// What can be read of it at any time, from any thread.
    pub fn meter(&self) -> EngineMeter {
        EngineMeter::new(self.io, Arc::clone(&self.features), self.stats.clone().into())
    }
}

fn device_hint(error: &std::io::Error) -> &'static str {
    match error.raw_os_error() {
        Some(libc::EPERM | libc::EACCES) => {
            "; weftd needs CAP_NET_ADMIN: run it as root, or grant the capability"
        }
        Some(libc::ENOENT | libc::ENODEV) => {
            "; load the module with `modprobe tun` and see that /dev/net/tun exists"
        }
        Some(libc::EBUSY) => "; another process uses a device of this name",
        _ => "",
    }
}

fn listen_hint(error: &std::io::Error) -> &'static str {
    match error.raw_os_error() {
        Some(libc::EADDRINUSE) => {
            "; another weftd or flanneld has it: stop that one, or set another Port in the \
             Backend part of the network config, which every node must share"
        }
        Some(libc::EADDRNOTAVAIL) => "; no interface has this address: see --iface",
        _ => "",
    }
}
