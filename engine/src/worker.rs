//! The two threads of a worker: each sleeps in its ring, then reaps what has happened, then acts.

use std::io;
use std::net::IpAddr;
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

use arc_swap::ArcSwap;

use crate::buffers::BufferId;
use crate::guard::{Guard, Verdict};
use crate::icmp::{ICMP_ERROR_LEN_MAX, IcmpError, RateLimit};
use crate::io::uring::Ring;
use crate::io::{Completion, Received};
use crate::packet::{IpView, decrement_ttl};
use crate::routes::{Peer, RouteTable, Target};
use crate::stats::{Counter, ThreadStats};
use crate::tun::TunQueue;
use crate::udp::UdpSocket;

/// No IPv6 link may be smaller (RFC 8200 5), so no sender can be asked for less.
const IPV6_MTU_MIN: u32 = 1280;

/// What a thread works with besides its ring.
#[derive(Debug, Clone)]
pub(crate) struct Context {
    pub(crate) tun: Arc<TunQueue>,
    pub(crate) udp: Arc<UdpSocket>,
    pub(crate) routes: Arc<ArcSwap<RouteTable>>,
    pub(crate) stats: Arc<ThreadStats>,
    pub(crate) stop: Arc<AtomicBool>,
    pub(crate) guard: Guard,
    /// Our addresses on the TUN, at most one of each family: ICMP errors come from there.
    pub(crate) tunnel_addresses: Vec<IpAddr>,
    /// Bytes that the underlay adds to each packet.
    pub(crate) overhead: u32,
}

impl Context {
    /// The error about `packet`, unless none may be sent or too many were.
    fn icmp<'a>(
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
}

/// Runs `act` on every completion until somebody sets `stop` and rings the bell.
///
/// # Errors
/// The source is gone, or the ring is broken.
fn turn(
    ring: &mut Ring,
    context: &Context,
    batches: Counter,
    mut act: impl FnMut(&mut Ring, &RouteTable, Completion),
) -> io::Result<()> {
    let mut routes = arc_swap::Cache::new(&*context.routes);
    let mut completions = Vec::with_capacity(Ring::completions_max());
    while !context.stop.load(Ordering::Relaxed) {
        ring.submit_and_wait()?;
        ring.reap(&mut completions)?;
        if completions.iter().any(|completion| matches!(completion, Completion::Received(_))) {
            context.stats.add(batches, 1);
        }
        let routes: &RouteTable = routes.load();
        for completion in completions.drain(..) {
            act(ring, routes, completion);
        }
    }
    Ok(())
}

/// Carries packets from the containers to their peers.
#[derive(Debug)]
pub(crate) struct TunToUdp {
    context: Context,
    limit: RateLimit,
}

impl TunToUdp {
    pub(crate) fn new(context: Context) -> Self {
        Self { context, limit: RateLimit::new(Instant::now()) }
    }

    /// # Errors
    /// See [`turn`].
    pub(crate) fn run(mut self, ring: &mut Ring) -> io::Result<()> {
        let context = self.context.clone();
        turn(
            ring,
            &context,
            Counter::TunToUdpBatches,
            |ring, routes, completion| match completion {
                Completion::Received(received) => self.received(ring, routes, received),
                Completion::Sent { buffer, packet, result } => {
                    self.sent(ring, routes, &buffer, &packet, &result);
                    ring.recycle(buffer);
                }
                Completion::Woken => {}
            },
        )
    }

    fn received(&mut self, ring: &mut Ring, routes: &RouteTable, received: Received) {
        let Received { buffer, packet, .. } = received;
        let bytes = ring.packet_mut(&buffer, &packet);
        match forward(routes, bytes) {
            Forward::To(peer) => {
                decrement_ttl(bytes);
                return ring.send_to(buffer, packet, peer.endpoint);
            }
            Forward::Drop(counter, icmp) => {
                self.context.stats.add(counter, 1);
                if let Some(error) = icmp {
                    self.answer(error, ring.packet(&buffer, &packet));
                }
            }
        }
        ring.recycle(buffer);
    }

    fn sent(
        &mut self,
        ring: &Ring,
        routes: &RouteTable,
        buffer: &BufferId,
        packet: &Range<usize>,
        result: &io::Result<usize>,
    ) {
        let stats = &self.context.stats;
        let Err(error) = result else {
            stats.add(Counter::TunToUdpPackets, 1);
            stats.add(Counter::TunToUdpBytes, packet.len() as u64);
            return;
        };
        match error.raw_os_error() {
            Some(libc::EMSGSIZE) => self.too_big(routes, ring.packet(buffer, packet)),
            Some(libc::EAGAIN | libc::ENOBUFS) => stats.add(Counter::TunToUdpFull, 1),
            _ => stats.add(Counter::TunToUdpSendFailed, 1),
        }
    }

    /// The path to the peer is smaller than our MTU. A sender that forbids fragments is told what
    /// fits; for others the outer packet is cut, as the kernel would do with the inner one.
    fn too_big(&mut self, routes: &RouteTable, packet: &[u8]) {
        let stats = &self.context.stats;
        let (Ok(view), udp) = (IpView::check(packet), &self.context.udp) else {
            return;
        };
        let Some(Target::Peer(peer)) = routes.lookup(view.destination()) else {
            return stats.add(Counter::TunToUdpNoRoute, 1);
        };
        let Ok(path) = udp.path_mtu(peer.endpoint) else {
            return stats.add(Counter::TunToUdpSendFailed, 1);
        };
        let fitting = path.saturating_sub(self.context.overhead);
        let mtu = if matches!(view, IpView::V6(_)) { fitting.max(IPV6_MTU_MIN) } else { fitting };
        if view.dont_fragment() && packet.len() > mtu as usize {
            stats.add(Counter::TunToUdpTooBig, 1);
            self.answer(IcmpError::TooBig { mtu }, packet);
        } else if udp.send_fragmented(packet, peer.endpoint).is_ok() {
            stats.add(Counter::TunToUdpFragmented, 1);
        } else {
            stats.add(Counter::TunToUdpSendFailed, 1);
        }
    }

    /// Back to a container: through the TUN, on which the backend has allowed our own address as
    /// a source (accept_local).
    fn answer(&mut self, error: IcmpError, packet: &[u8]) {
        let mut out = [0; ICMP_ERROR_LEN_MAX];
        if let Some(answer) = self.context.icmp(&mut self.limit, error, packet, &mut out) {
            // A refused error is a lost packet like another; senders cope.
            let _ = self.context.tun.write(answer);
        }
    }
}

/// What becomes of a packet from the TUN.
enum Forward<'a> {
    To(&'a Peer),
    Drop(Counter, Option<IcmpError>),
}

fn forward<'a>(routes: &'a RouteTable, packet: &[u8]) -> Forward<'a> {
    let Ok(view) = IpView::check(packet) else {
        return Forward::Drop(Counter::TunToUdpMalformed, None);
    };
    let Some(Target::Peer(peer)) = routes.lookup(view.destination()) else {
        return Forward::Drop(Counter::TunToUdpNoRoute, Some(IcmpError::Unreachable));
    };
    if view.ttl() <= 1 {
        return Forward::Drop(Counter::TunToUdpTtlExpired, Some(IcmpError::TimeExceeded));
    }
    Forward::To(peer)
}

/// Carries packets from peers to the containers.
#[derive(Debug)]
pub(crate) struct UdpToTun {
    context: Context,
    limit: RateLimit,
}

impl UdpToTun {
    pub(crate) fn new(context: Context) -> Self {
        Self { context, limit: RateLimit::new(Instant::now()) }
    }

    /// # Errors
    /// See [`turn`].
    pub(crate) fn run(mut self, ring: &mut Ring) -> io::Result<()> {
        let context = self.context.clone();
        turn(
            ring,
            &context,
            Counter::UdpToTunBatches,
            |ring, routes, completion| match completion {
                Completion::Received(received) => self.received(ring, routes, received),
                Completion::Sent { buffer, packet, result } => {
                    self.written(&packet, &result);
                    ring.recycle(buffer);
                }
                Completion::Woken => {}
            },
        )
    }

    fn received(&mut self, ring: &mut Ring, routes: &RouteTable, received: Received) {
        let Received { buffer, packet, sender, cut } = received;
        let bytes = ring.packet_mut(&buffer, &packet);
        let verdict = match sender {
            Some(sender) => self.context.guard.judge(routes, sender, bytes, cut),
            None => Verdict::UnknownSender,
        };
        let counter = match verdict {
            Verdict::Deliver => {
                decrement_ttl(bytes);
                return ring.write(buffer, packet);
            }
            Verdict::TtlExpired => {
                self.time_exceeded(routes, ring.packet(&buffer, &packet));
                Counter::UdpToTunTtlExpired
            }
            Verdict::Malformed => Counter::UdpToTunMalformed,
            Verdict::Oversized => Counter::UdpToTunOversized,
            Verdict::UnknownSender => Counter::UdpToTunUnknownSender,
            Verdict::ForeignSource => Counter::UdpToTunForeignSource,
            Verdict::ForeignDestination => Counter::UdpToTunForeignDestination,
        };
        self.context.stats.add(counter, 1);
        ring.recycle(buffer);
    }

    fn written(&self, packet: &Range<usize>, result: &io::Result<usize>) {
        let stats = &self.context.stats;
        if result.is_ok() {
            stats.add(Counter::UdpToTunPackets, 1);
            stats.add(Counter::UdpToTunBytes, packet.len() as u64);
        } else {
            stats.add(Counter::UdpToTunWriteFailed, 1);
        }
    }

    /// Back over the network, to whoever has the inner source.
    fn time_exceeded(&mut self, routes: &RouteTable, packet: &[u8]) {
        let Ok(view) = IpView::check(packet) else {
            return;
        };
        let Some(Target::Peer(peer)) = routes.lookup(view.source()) else {
            return;
        };
        let mut out = [0; ICMP_ERROR_LEN_MAX];
        let error = IcmpError::TimeExceeded;
        if let Some(answer) = self.context.icmp(&mut self.limit, error, packet, &mut out) {
            // A refused error is a lost packet like another; senders cope.
            let _ = self.context.udp.send(answer, peer.endpoint);
        }
    }
}
