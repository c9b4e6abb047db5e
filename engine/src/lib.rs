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
mod traffic;
mod tun;
mod tun_to_udp;
mod udp;
mod udp_to_tun;
mod worker;

use std::fmt;
use std::fs::File;
use std::io::Write;
use std::net::{IpAddr, SocketAddr};
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use arc_swap::ArcSwap;
use crossbeam::channel::{self, Sender};

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
use io::Io;
use io::mmsg::Mmsg;
use io::uring::{self, Ring};
use stats::LaneStats;
use tun_to_udp::TunToUdp;
use udp::UdpSocket;
use udp_to_tun::UdpToTun;
use worker::{Context, Lane, LaneOn};

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
    fn directions_a_thread(&self) -> usize {
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
        let mut handle = EngineHandle {
            io: self.io,
            features: Arc::clone(&self.features),
            routes: Arc::new(ArcSwap::from_pointee(routes)),
            former: Vec::new(),
            stats: Vec::new(),
            stop: Arc::new(AtomicBool::new(false)),
            threads: Vec::new(),
        };
        let (started, outcomes) = channel::bounded(2 * self.config.workers);
        for (number, (tun, udp)) in
            self.device.into_queues().into_iter().zip(self.sockets).enumerate()
        {
            let (tun, udp) = (Arc::new(tun), Arc::new(udp));
            let sockets = if self.sources.is_empty() {
                Arc::from([udp.try_clone().map_err(EngineError::Thread)?])
            } else {
                Arc::clone(&self.sources)
            };
            let contexts = Direction::BOTH.map(|direction| {
                let stats = Arc::new(LaneStats::default());
                handle.stats.push((direction, Arc::clone(&stats)));
                Context {
                    direction,
                    tun: Arc::clone(&tun),
                    udp: Arc::clone(&udp),
                    sockets: Arc::clone(&sockets),
                    features: Arc::clone(&self.features),
                    routes: Arc::clone(&handle.routes),
                    stats,
                    guard: Guard {
                        mode: self.config.guard,
                        mtu: self.config.mtu.into(),
                        own: self.config.listen.ip(),
                    },
                    tunnel_addresses: self.config.tunnel_addresses.clone(),
                    overhead: overhead(self.config.listen.ip()),
                    dscp: self.config.tuning.dscp,
                }
            });
            for contexts in contexts.chunks(self.config.tuning.directions_a_thread()) {
                let job = Job {
                    contexts: contexts.to_vec(),
                    io: self.io,
                    busy_poll: self.config.tuning.busy_poll,
                    stop: Arc::clone(&handle.stop),
                    started: started.clone(),
                    on_failure: Arc::clone(&on_failure),
                };
                handle.threads.push(job.spawn(number)?);
            }
        }
        drop(started);
        for _ in &handle.threads {
            let outcome =
                outcomes.recv().unwrap_or_else(|_| Err(std::io::Error::other("it panicked")));
            outcome.map_err(EngineError::Io)?;
        }
        Ok(handle)
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
            tracing::info!("packets go by recvmmsg and sendmsg, since {error}");
            Ok(IoKind::Mmsg)
        }
    }
}

/// A running engine. Dropping it stops the workers and closes the device.
pub struct EngineHandle {
    io: IoKind,
    features: Arc<Features>,
    routes: Arc<ArcSwap<RouteTable>>,
    /// Tables that threads may still go by: none of them is to spend its time on freeing one.
    former: Vec<Arc<RouteTable>>,
    stats: Vec<(Direction, Arc<LaneStats>)>,
    stop: Arc<AtomicBool>,
    threads: Vec<Running>,
}

impl fmt::Debug for EngineHandle {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("EngineHandle").field("threads", &self.threads.len()).finish_non_exhaustive()
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

impl Drop for EngineHandle {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        for thread in &self.threads {
            // An eventfd refuses only when its count is full, and then the thread is awake.
            let _ = (&thread.bell).write(&1u64.to_ne_bytes());
        }
        for thread in &mut self.threads {
            if let Some(join) = thread.join.take() {
                // A panic has been reported by the thread itself: see `Job::run`.
                let _ = join.join();
            }
        }
    }
}

/// A thread of a worker.
struct Running {
    join: Option<JoinHandle<()>>,
    bell: File,
}

/// Everything that a thread needs to begin.
struct Job {
    contexts: Vec<Context>,
    io: IoKind,
    busy_poll: Duration,
    stop: Arc<AtomicBool>,
    started: Sender<std::io::Result<()>>,
    on_failure: OnFailure,
}

impl Job {
    fn spawn(self, number: usize) -> Result<Running, EngineError> {
        let bell = sys::eventfd().map_err(EngineError::Thread)?;
        let thread_bell = bell.try_clone().map_err(EngineError::Thread)?;
        let name = match &self.contexts[..] {
            [one] => format!("{}-{number}", one.direction.name()),
            _ => format!("both_ways-{number}"),
        };
        let join = thread::Builder::new()
            .name(name)
            .spawn(move || self.run(&thread_bell))
            .map_err(EngineError::Thread)?;
        Ok(Running { join: Some(join), bell: bell.into() })
    }

    fn run(self, bell: &OwnedFd) {
        let name = thread::current().name().unwrap_or("engine").to_owned();
        let mut watch = DeathWatch { on_failure: self.on_failure, reason: None };
        // Made here, since only the thread that makes a ring may use it.
        let lanes = self.contexts.into_iter().map(|context| {
            let files = context.files(bell.as_fd());
            Ok(match self.io {
                IoKind::Uring => lane(Ring::new(context.direction, &files)?, context),
                IoKind::Mmsg => lane(Mmsg::new(context.direction, &files)?, context),
            })
        });
        let mut lanes = match lanes.collect::<std::io::Result<Vec<_>>>() {
            Ok(lanes) => lanes,
            Err(error) => return drop(self.started.send(Err(error))),
        };
        let started = self.started;
        drop(started.send(Ok(())));
        // Or who waits for all to start would not hear of one that ends before.
        drop(started);
        watch.reason = Some(format!("{name} panicked"));
        let ended = worker::run(&mut lanes, bell.as_fd(), &self.stop, self.busy_poll);
        watch.reason = ended.err().map(|error| format!("{name} stopped: {error}"));
    }
}

/// One direction of a worker, ready to carry packets.
fn lane(io: impl Io + 'static, context: Context) -> Box<dyn Lane> {
    match context.direction {
        Direction::TunToUdp => Box::new(LaneOn::new(io, TunToUdp::new(context.clone()), context)),
        Direction::UdpToTun => Box::new(LaneOn::new(io, UdpToTun::new(context.clone()), context)),
    }
}

/// Reports how a thread ended, a panic too, unless it was asked to.
struct DeathWatch {
    on_failure: OnFailure,
    reason: Option<String>,
}

impl Drop for DeathWatch {
    fn drop(&mut self) {
        if let Some(reason) = self.reason.take() {
            (self.on_failure)(reason);
        }
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
