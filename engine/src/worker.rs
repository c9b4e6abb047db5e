//! The threads of a worker: each sleeps in its [`Io`], then reaps what has happened, then acts.

use std::io;
use std::net::IpAddr;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use arc_swap::ArcSwap;

use crate::ecn::DscpMode;
use crate::features::{Feature, FeatureState, Features};
use crate::guard::Guard;
use crate::icmp::{ICMP_ERROR_LEN_MAX, IcmpError, RateLimit};
use crate::io::{Completion, Direction, Files, Io, Wait};
use crate::routes::RouteTable;
use crate::scheduling::Scheduling;
use crate::stats::{Counter, Distribution, ThreadStats};
use crate::tun::TunQueue;
use crate::udp::UdpSocket;

/// What a thread works with besides its [`Io`].
#[derive(Debug, Clone)]
pub(crate) struct Context {
    pub(crate) tun: Arc<TunQueue>,
    /// The worker's own socket, which also receives.
    pub(crate) udp: Arc<UdpSocket>,
    /// What packets are sent from: flows choose among them.
    pub(crate) sockets: Arc<[UdpSocket]>,
    pub(crate) routes: Arc<ArcSwap<RouteTable>>,
    pub(crate) features: Arc<Features>,
    pub(crate) stats: Arc<ThreadStats>,
    pub(crate) stop: Arc<AtomicBool>,
    pub(crate) guard: Guard,
    /// Our addresses on the TUN, at most one of each family: ICMP errors come from there.
    pub(crate) tunnel_addresses: Vec<IpAddr>,
    /// Bytes that the underlay adds to each packet.
    pub(crate) overhead: u32,
    pub(crate) dscp: DscpMode,
    /// How long to look for more before going to sleep.
    pub(crate) busy_poll: Duration,
}

impl Context {
    /// What a thread of this direction reads from and sends to.
    pub(crate) fn files<'a>(&'a self, direction: Direction, bell: BorrowedFd<'a>) -> Files<'a> {
        match direction {
            Direction::TunToUdp => Files {
                source: self.tun.as_fd(),
                bell,
                sockets: self.sockets.iter().map(AsFd::as_fd).collect(),
            },
            Direction::UdpToTun => Files { source: self.udp.as_fd(), bell, sockets: Vec::new() },
        }
    }

    /// The error about `packet`, unless none may be sent or too many were.
    pub(crate) fn icmp<'a>(
        &self,
        limit: &mut RateLimit,
        error: IcmpError,
        packet: &[u8],
        out: &'a mut [u8; ICMP_ERROR_LEN_MAX],
    ) -> Option<&'a [u8]> {
        let version = packet.first()? >> 4;
        let source = self.tunnel_addresses.iter().find(|ip| ip.is_ipv6() == (version == 6))?;
        let answer = error.about(packet, *source, out)?;
        let allowed = limit.allow(Instant::now());
        self.stats.add(if allowed { Counter::IcmpSent } else { Counter::IcmpLimited }, 1);
        allowed.then_some(answer)
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

/// One direction of a worker.
pub(crate) trait Carry<I> {
    /// Counts the times that packets were found.
    const BATCHES: Counter;
    /// Counts the packets that came in.
    const INPUT: Counter;

    /// Acts on one completion.
    fn act(&mut self, io: &mut I, routes: &RouteTable, completion: Completion);

    /// Hands on what the completions so far have left unfinished.
    fn flush(&mut self, io: &mut I, routes: &RouteTable);
}

/// Carries packets until somebody sets `stop` and rings the bell.
///
/// # Errors
/// The source is gone, or the ring is broken.
pub(crate) fn turn<I: Io, C: Carry<I>>(
    io: &mut I,
    context: &Context,
    carry: &mut C,
) -> io::Result<()> {
    let mut routes = arc_swap::Cache::new(&*context.routes);
    let mut completions = Vec::new();
    let mut scheduling = Scheduling::of_this_thread(Instant::now());
    let mut spin = Spin { budget: context.busy_poll, until: None };
    while !context.stop.load(Ordering::Relaxed) {
        io.submit(spin.wait())?;
        io.reap(&mut completions);
        let mut batch = None;
        if completions.iter().any(|completion| matches!(completion, Completion::Received(_))) {
            context.stats.add(C::BATCHES, 1);
            spin.begin();
            let now = Instant::now();
            if let Some(scheduling) = &mut scheduling {
                scheduling.review(now);
            }
            batch = Some((now, context.stats.get(C::INPUT)));
        }
        let routes: &RouteTable = routes.load();
        for completion in completions.drain(..) {
            carry.act(io, routes, completion);
        }
        carry.flush(io, routes);
        if let Some((begun, before)) = batch {
            let nanos = u64::try_from(begun.elapsed().as_nanos()).unwrap_or(u64::MAX);
            context.stats.record(Distribution::BatchNanos, nanos);
            let packets = context.stats.get(C::INPUT) - before;
            context.stats.record(Distribution::BatchPackets, packets);
        }
    }
    Ok(())
}

/// Looks for packets a while before it sleeps: a wake-up takes longer than a short wait.
struct Spin {
    budget: Duration,
    until: Option<Instant>,
}

impl Spin {
    fn begin(&mut self) {
        if !self.budget.is_zero() {
            self.until = Some(Instant::now() + self.budget);
        }
    }

    fn wait(&mut self) -> Wait {
        if self.until.is_some_and(|until| Instant::now() < until) {
            // Where there are more threads than cores, the one that has packets goes first.
            thread::yield_now();
            return Wait::Look;
        }
        self.until = None;
        Wait::Sleep
    }
}
