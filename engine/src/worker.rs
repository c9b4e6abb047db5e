//! The threads of a worker: each sleeps until there is something to do, then reaps what has happened,
//! then acts.

use std::array;
use std::io;
use std::net::IpAddr;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use arc_swap::ArcSwap;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;

use crate::ecn::DscpMode;
use crate::features::{Feature, FeatureState, Features};
use crate::guard::Guard;
use crate::icmp::{ICMP_ERROR_LEN_MAX, IcmpError, RateLimit};
use crate::io::{Completion, Direction, Files, Io, Wait};
use crate::routes::RouteTable;
use crate::scheduling::Scheduling;
use crate::stats::{Counter, Distribution, LaneStats};
use crate::tun::TunQueue;
use crate::udp::UdpSocket;

/// How long to wait at a time for room in a send buffer, since poll(2) tells of it only when half of
/// it is free: at 100 Mbit/s, room for 40 packets.
const ROOM_WAIT: Timespec = Timespec { tv_sec: 0, tv_nsec: 5_000_000 };

/// What packets of one direction are carried with, besides an [`Io`].
#[derive(Debug, Clone)]
pub(crate) struct Context {
    pub(crate) direction: Direction,
    pub(crate) tun: Arc<TunQueue>,
    /// The worker's own socket, which also receives.
    pub(crate) udp: Arc<UdpSocket>,
    /// What packets are sent from: flows choose among them.
    pub(crate) sockets: Arc<[UdpSocket]>,
    pub(crate) routes: Arc<ArcSwap<RouteTable>>,
    pub(crate) features: Arc<Features>,
    pub(crate) stats: Arc<LaneStats>,
    pub(crate) guard: Guard,
    /// Our addresses on the TUN, at most one of each family: ICMP errors come from there.
    pub(crate) tunnel_addresses: Vec<IpAddr>,
    /// Bytes that the underlay adds to each packet.
    pub(crate) overhead: u32,
    pub(crate) dscp: DscpMode,
}

impl Context {
    /// What packets come from.
    fn source(&self) -> BorrowedFd<'_> {
        match self.direction {
            Direction::TunToUdp => self.tun.as_fd(),
            Direction::UdpToTun => self.udp.as_fd(),
        }
    }

    /// What packets come from and are sent to.
    pub(crate) fn files<'a>(&'a self, bell: BorrowedFd<'a>) -> Files<'a> {
        let sockets = match self.direction {
            Direction::TunToUdp => self.sockets.iter().map(AsFd::as_fd).collect(),
            Direction::UdpToTun => Vec::new(),
        };
        Files { source: self.source(), bell, sockets }
    }

    /// The error about `packet`, unless none may be sent.
    pub(crate) fn icmp<'a>(
        &self,
        error: IcmpError,
        packet: &[u8],
        out: &'a mut [u8; ICMP_ERROR_LEN_MAX],
    ) -> Option<&'a [u8]> {
        let version = packet.first()? >> 4;
        let source = self.tunnel_addresses.iter().find(|ip| ip.is_ipv6() == (version == 6))?;
        error.about(packet, *source, out)
    }

    /// Whether one more error may be sent now; one that may not is counted.
    pub(crate) fn may_tell(&self, limit: &mut RateLimit) -> bool {
        let allowed = limit.allow(Instant::now());
        if !allowed {
            self.stats.add(Counter::IcmpLimited, 1);
        }
        allowed
    }

    /// Gives a feature up because the kernel refused it, and says so once.
    pub(crate) fn fall(&self, feature: Feature, refusal: &io::Error) {
        if self.features.fall(feature, FeatureState::Refused) {
            tracing::warn!(
                "the kernel refuses {name} ({refusal}); going on without it (--offload \
                 {name}=off says so from the start)",
                name = feature.name()
            );
        }
    }
}

/// What becomes of the packets of one direction.
pub(crate) trait Carry<I> {
    /// Counts the times that packets were found.
    const BATCHES: Counter;
    /// Counts the packets that came in.
    const INPUT: Counter;

    /// Acts on one completion.
    fn act(&mut self, io: &mut I, routes: &RouteTable, completion: Completion);

    /// Hands on what the completions so far have left unfinished, as far as there is room for it.
    fn flush(&mut self, io: &mut I, routes: &RouteTable);

    /// The full socket that [`Self::flush`] has to be tried again on before any more is taken.
    fn full_socket(&self) -> Option<BorrowedFd<'_>>;
}

/// One direction of a worker at work.
pub(crate) trait Lane {
    /// Carries what there is; says when it was done with it, if packets came in.
    ///
    /// # Errors
    /// The source is gone, or the ring is broken.
    fn turn(&mut self, wait: Wait) -> io::Result<Option<Instant>>;

    /// What has to happen before there is something to carry.
    fn awaits(&self) -> Event<'_>;
}

/// What a lane waits for.
pub(crate) enum Event<'a> {
    Packets(BorrowedFd<'a>),
    Room(BorrowedFd<'a>),
}

/// A lane with one kind of [`Io`].
pub(crate) struct LaneOn<I, C> {
    io: I,
    carry: C,
    context: Context,
    routes: arc_swap::Cache<Arc<ArcSwap<RouteTable>>, Arc<RouteTable>>,
    completions: Vec<Completion>,
}

impl<I: Io, C: Carry<I>> LaneOn<I, C> {
    pub(crate) fn new(io: I, carry: C, context: Context) -> Self {
        let routes = arc_swap::Cache::new(Arc::clone(&context.routes));
        Self { io, carry, context, routes, completions: Vec::new() }
    }
}

impl<I: Io, C: Carry<I>> Lane for LaneOn<I, C> {
    fn turn(&mut self, wait: Wait) -> io::Result<Option<Instant>> {
        let Self { io, carry, context, routes, completions } = self;
        if carry.full_socket().is_some() {
            carry.flush(io, routes.load());
        }
        if carry.full_socket().is_some() {
            return Ok(None);
        }
        io.submit(wait).map_err(|error| context.direction.cannot_take(&error))?;
        io.reap(completions);
        let routes: &RouteTable = routes.load();
        let mut batch = None;
        if completions.iter().any(|completion| matches!(completion, Completion::Received(_))) {
            context.stats.add(C::BATCHES, 1);
            batch = Some((Instant::now(), context.stats.get(C::INPUT)));
        }
        for completion in completions.drain(..) {
            carry.act(io, routes, completion);
        }
        carry.flush(io, routes);
        Ok(batch.map(|(begun, before)| {
            let ended = Instant::now();
            let nanos = u64::try_from((ended - begun).as_nanos()).unwrap_or(u64::MAX);
            context.stats.record(Distribution::BatchNanos, nanos);
            let packets = context.stats.get(C::INPUT) - before;
            context.stats.record(Distribution::BatchPackets, packets);
            ended
        }))
    }

    fn awaits(&self) -> Event<'_> {
        match self.carry.full_socket() {
            Some(socket) => Event::Room(socket),
            None => Event::Packets(self.context.source()),
        }
    }
}

impl Direction {
    /// Says where packets no longer come from.
    fn cannot_take(self, error: &io::Error) -> io::Error {
        let source = match self {
            Self::TunToUdp => "cannot read the TUN device",
            Self::UdpToTun => "cannot receive from the UDP socket",
        };
        io::Error::new(error.kind(), format!("{source}: {error}"))
    }
}

/// Carries packets until somebody sets `stop` and rings the bell; before each sleep, looks for more
/// for as long as `busy_poll`.
///
/// # Errors
/// As [`Lane::turn`].
pub(crate) fn run(
    lanes: &mut [Box<dyn Lane>],
    bell: BorrowedFd<'_>,
    stop: &AtomicBool,
    busy_poll: Duration,
) -> io::Result<()> {
    let mut scheduling = Scheduling::of_this_thread(Instant::now());
    let mut spin = Spin { budget: busy_poll, until: None };
    let mut found = None;
    while !stop.load(Ordering::Relaxed) {
        let mut wait = spin.wait(found.is_none());
        let sleeps_in_its_io =
            matches!(&*lanes, [lane] if matches!(lane.awaits(), Event::Packets(_)));
        if wait == Wait::Sleep && !sleeps_in_its_io {
            // What was found may have left sends, which go out with the next look.
            if found.is_none() {
                sleep(lanes, bell)?;
            }
            wait = Wait::Look;
        }
        found = None;
        for lane in &mut *lanes {
            found = lane.turn(wait)?.or(found);
        }
        if let Some(now) = found {
            spin.begin(now);
            if let Some(scheduling) = &mut scheduling {
                scheduling.review(now);
            }
        }
    }
    Ok(())
}

/// Sleeps until a lane has something to do or the bell rings.
fn sleep(lanes: &[Box<dyn Lane>], bell: BorrowedFd<'_>) -> io::Result<()> {
    // The bell, also in the place of a lane that there is not.
    let mut files: [_; 1 + Direction::BOTH.len()] =
        array::from_fn(|_| PollFd::from_borrowed_fd(bell, PollFlags::IN));
    let mut timeout = None;
    for (file, lane) in files[1..].iter_mut().zip(lanes) {
        *file = match lane.awaits() {
            Event::Packets(source) => PollFd::from_borrowed_fd(source, PollFlags::IN),
            Event::Room(socket) => {
                timeout = Some(&ROOM_WAIT);
                PollFd::from_borrowed_fd(socket, PollFlags::OUT)
            }
        };
    }
    match poll(&mut files, timeout) {
        Ok(_) | Err(Errno::INTR) => Ok(()),
        Err(error) => Err(error.into()),
    }
}

/// Looks for packets a while before it sleeps: a wake-up takes longer than a short wait.
struct Spin {
    budget: Duration,
    until: Option<Instant>,
}

impl Spin {
    fn begin(&mut self, now: Instant) {
        if !self.budget.is_zero() {
            self.until = Some(now + self.budget);
        }
    }

    /// Whether to go to sleep; `in_vain` says whether the last look found nothing.
    fn wait(&mut self, in_vain: bool) -> Wait {
        if self.until.is_some_and(|until| Instant::now() < until) {
            // Where there are more threads than cores, the one that has packets goes first.
            if in_vain {
                thread::yield_now();
            }
            return Wait::Look;
        }
        self.until = None;
        Wait::Sleep
    }
}
