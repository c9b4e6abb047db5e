//! The two threads of a worker: each sleeps in its ring, then reaps what has happened, then acts.

use std::io;
use std::net::{IpAddr, SocketAddr};
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

use arc_swap::ArcSwap;

use crate::batch::Batch;
use crate::buffers::BufferId;
use crate::guard::{Guard, Verdict};
use crate::icmp::{ICMP_ERROR_LEN_MAX, IcmpError, RateLimit};
use crate::io::uring::Ring;
use crate::io::{Completion, Received, Sent, Written};
use crate::offload::VirtioNetHdr;
use crate::offload::coalesce::Run;
use crate::offload::segment::{Cut, finish_checksum};
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

/// One direction of a worker.
trait Carry {
    /// Counts the times that packets were found.
    const BATCHES: Counter;

    /// Acts on one completion.
    fn act(&mut self, ring: &mut Ring, routes: &RouteTable, completion: Completion);

    /// Hands on what the completions so far have left unfinished.
    fn flush(&mut self, ring: &mut Ring);
}

/// Carries packets until somebody sets `stop` and rings the bell.
///
/// # Errors
/// The source is gone, or the ring is broken.
fn turn<C: Carry>(ring: &mut Ring, context: &Context, mut carry: C) -> io::Result<()> {
    let mut routes = arc_swap::Cache::new(&*context.routes);
    let mut completions = Vec::with_capacity(Ring::completions_max());
    while !context.stop.load(Ordering::Relaxed) {
        ring.submit_and_wait()?;
        ring.reap(&mut completions)?;
        if completions.iter().any(|completion| matches!(completion, Completion::Received(_))) {
            context.stats.add(C::BATCHES, 1);
        }
        let routes: &RouteTable = routes.load();
        for completion in completions.drain(..) {
            carry.act(ring, routes, completion);
        }
        carry.flush(ring);
    }
    Ok(())
}

/// Carries packets from the containers to their peers.
#[derive(Debug)]
pub(crate) struct TunToUdp {
    context: Context,
    limit: RateLimit,
    /// The send that the next packet may join.
    batch: Option<Batch>,
    /// Whether the kernel has not yet refused to segment.
    segments: bool,
}

impl TunToUdp {
    pub(crate) fn new(context: Context) -> Self {
        Self { context, limit: RateLimit::new(Instant::now()), batch: None, segments: true }
    }

    /// # Errors
    /// See [`turn`].
    pub(crate) fn run(self, ring: &mut Ring) -> io::Result<()> {
        let context = self.context.clone();
        turn(ring, &context, self)
    }

    fn received(&mut self, ring: &mut Ring, routes: &RouteTable, received: &Received) {
        let Received { buffer, packet, .. } = received;
        let Some(header) = VirtioNetHdr::parse(ring.packet(buffer, packet)) else {
            return self.context.stats.add(Counter::TunToUdpMalformed, 1);
        };
        let at = packet.start + VirtioNetHdr::LEN..packet.end;
        let bytes = ring.packet_mut(buffer, &at);
        let peer = match forward(routes, bytes) {
            Forward::To(peer) => peer,
            Forward::Drop(counter, icmp) => {
                self.context.stats.add(counter, 1);
                if let Some(error) = icmp {
                    self.answer(error, bytes);
                }
                return;
            }
        };
        decrement_ttl(bytes);
        match Cut::plan(&header, bytes) {
            Ok(None) if finish_checksum(&header, bytes).is_ok() => {
                self.append(ring, (buffer, &at), peer.endpoint, at.len(), |packet, out| {
                    out.copy_from_slice(packet);
                });
            }
            Ok(Some(cut)) => {
                self.context.stats.add(Counter::TunToUdpSuperPackets, 1);
                for number in 0..cut.count() {
                    let len = cut.len_of(number);
                    self.append(ring, (buffer, &at), peer.endpoint, len, |packet, out| {
                        cut.write(packet, number, out);
                    });
                }
            }
            Ok(None) | Err(_) => self.context.stats.add(Counter::TunToUdpMalformed, 1),
        }
    }

    /// Has `write` make a datagram of `len` bytes out of a received packet, in the open batch or
    /// in a new one.
    fn append(
        &mut self,
        ring: &mut Ring,
        packet: (&BufferId, &Range<usize>),
        peer: SocketAddr,
        len: usize,
        write: impl FnOnce(&[u8], &mut [u8]),
    ) {
        let joins = self.batch.as_ref().is_some_and(|it| self.segments && it.takes(peer, len));
        if !joins {
            self.flush(ring);
            self.batch = ring.take_buffer().map(|buffer| Batch::new(buffer, peer, len));
        }
        let Some(batch) = &mut self.batch else {
            return self.context.stats.add(Counter::TunToUdpFull, 1);
        };
        let at = batch.reserve(len);
        let (from, out) = ring.two_packets(packet, (&batch.buffer, &at));
        write(from, out);
    }

    fn sent(&mut self, ring: &Ring, routes: &RouteTable, sent: &Sent) {
        let packets = ring.packet(&sent.buffer, &sent.packets);
        let several = packets.len() > sent.segment_len;
        let count = packets.len().div_ceil(sent.segment_len.max(1)) as u64;
        let error = match &sent.result {
            Ok(()) => return self.count_sent(packets.len(), count),
            Err(error) => error.raw_os_error(),
        };
        match error {
            // One of them is too large for the path, or the kernel cannot cut: one by one, each
            // has its own answer.
            Some(libc::EMSGSIZE | libc::EINVAL | libc::EIO) if several => {
                self.context.stats.add(Counter::TunToUdpSegmentRefused, 1);
                if error != Some(libc::EMSGSIZE) && std::mem::take(&mut self.segments) {
                    tracing::warn!(
                        "the kernel refuses UDP_SEGMENT ({}); packets go out one by one",
                        io::Error::from_raw_os_error(error.unwrap_or_default())
                    );
                }
                packets.chunks(sent.segment_len).for_each(|packet| self.send_one(routes, packet));
            }
            Some(libc::EMSGSIZE) => self.too_big(routes, packets),
            Some(libc::EAGAIN | libc::ENOBUFS) => {
                self.context.stats.add(Counter::TunToUdpFull, count);
            }
            _ => self.context.stats.add(Counter::TunToUdpSendFailed, count),
        }
    }

    fn count_sent(&self, bytes: usize, packets: u64) {
        self.context.stats.add(Counter::TunToUdpSends, 1);
        self.context.stats.add(Counter::TunToUdpPackets, packets);
        self.context.stats.add(Counter::TunToUdpBytes, bytes as u64);
    }

    fn send_one(&mut self, routes: &RouteTable, packet: &[u8]) {
        let Some(peer) = peer_of(routes, packet) else {
            return self.context.stats.add(Counter::TunToUdpNoRoute, 1);
        };
        match self.context.udp.send(packet, peer.endpoint) {
            Ok(_) => self.count_sent(packet.len(), 1),
            Err(error) if error.raw_os_error() == Some(libc::EMSGSIZE) => {
                self.too_big(routes, packet);
            }
            Err(_) => self.context.stats.add(Counter::TunToUdpSendFailed, 1),
        }
    }

    /// The path to the peer is smaller than our MTU. A sender that forbids fragments is told what
    /// fits; for others the outer packet is cut, as the kernel would do with the inner one.
    fn too_big(&mut self, routes: &RouteTable, packet: &[u8]) {
        let (stats, udp) = (&self.context.stats, &self.context.udp);
        let (Ok(view), Some(peer)) = (IpView::check(packet), peer_of(routes, packet)) else {
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

impl Carry for TunToUdp {
    const BATCHES: Counter = Counter::TunToUdpBatches;

    fn act(&mut self, ring: &mut Ring, routes: &RouteTable, completion: Completion) {
        match completion {
            Completion::Received(received) => {
                self.received(ring, routes, &received);
                ring.recycle(received.buffer);
            }
            Completion::Sent(sent) => {
                self.sent(ring, routes, &sent);
                ring.recycle(sent.buffer);
            }
            Completion::Written(_) | Completion::Woken => {}
        }
    }

    fn flush(&mut self, ring: &mut Ring) {
        if let Some(Batch { buffer, peer, segment_len, len, .. }) = self.batch.take() {
            ring.send_to(buffer, 0..len, segment_len, peer);
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

/// Where a packet goes by the routes as they are now.
fn peer_of<'a>(routes: &'a RouteTable, packet: &[u8]) -> Option<&'a Peer> {
    match routes.lookup(IpView::check(packet).ok()?.destination())? {
        Target::Peer(peer) => Some(peer),
        Target::Local => None,
    }
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
    pub(crate) fn run(self, ring: &mut Ring) -> io::Result<()> {
        let context = self.context.clone();
        turn(ring, &context, self)
    }

    fn received(&mut self, ring: &mut Ring, routes: &RouteTable, received: &Received) {
        let Received { buffer, packet, segment_len, sender } = received;
        let mut open: Option<(usize, Run)> = None;
        let mut start = packet.start;
        // Once at least, so that an empty datagram is counted too.
        loop {
            let end = (start + segment_len.max(&1)).min(packet.end);
            let bytes = ring.packet_mut(buffer, &(start..end));
            if self.admit(routes, *sender, bytes) {
                let begin = open.as_ref().map_or(start, |(begin, _)| *begin);
                let area = ring.packet_mut(buffer, &(begin..end));
                let joined = open.as_mut().is_some_and(|(_, run)| run.join(area, start - begin));
                if !joined {
                    let run = Run::new(&area[start - begin..]);
                    write_run(ring, buffer, open.replace((start, run)));
                }
            }
            start = end;
            if start >= packet.end {
                break;
            }
        }
        write_run(ring, buffer, open);
    }

    /// Whether a datagram is to be delivered; if so, its time to live has dropped.
    fn admit(&mut self, routes: &RouteTable, sender: Option<IpAddr>, bytes: &mut [u8]) -> bool {
        let verdict = match sender {
            Some(sender) => self.context.guard.judge(routes, sender, bytes),
            None => Verdict::UnknownSender,
        };
        let counter = match verdict {
            Verdict::Deliver => {
                decrement_ttl(bytes);
                return true;
            }
            Verdict::TtlExpired => {
                self.time_exceeded(routes, bytes);
                Counter::UdpToTunTtlExpired
            }
            Verdict::Malformed => Counter::UdpToTunMalformed,
            Verdict::Oversized => Counter::UdpToTunOversized,
            Verdict::UnknownSender => Counter::UdpToTunUnknownSender,
            Verdict::ForeignSource => Counter::UdpToTunForeignSource,
            Verdict::ForeignDestination => Counter::UdpToTunForeignDestination,
        };
        self.context.stats.add(counter, 1);
        false
    }

    fn written(&self, written: &Written) {
        let stats = &self.context.stats;
        if written.result.is_err() {
            return stats.add(Counter::UdpToTunWriteFailed, written.packets as u64);
        }
        stats.add(Counter::UdpToTunPackets, written.packets as u64);
        stats.add(Counter::UdpToTunBytes, written.len as u64);
        if written.packets > 1 {
            stats.add(Counter::UdpToTunSuperPackets, 1);
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

impl Carry for UdpToTun {
    const BATCHES: Counter = Counter::UdpToTunBatches;

    fn act(&mut self, ring: &mut Ring, routes: &RouteTable, completion: Completion) {
        match completion {
            Completion::Received(received) => {
                self.received(ring, routes, &received);
                ring.recycle(received.buffer);
            }
            Completion::Written(written) => self.written(&written),
            Completion::Sent(_) | Completion::Woken => {}
        }
    }

    fn flush(&mut self, _ring: &mut Ring) {}
}

/// Queues a run that is complete, where there is one: the run and where it begins.
fn write_run(ring: &mut Ring, buffer: &BufferId, run: Option<(usize, Run)>) {
    let Some((start, run)) = run else { return };
    let at = start..start + run.byte_len();
    let header = run.finish(ring.packet_mut(buffer, &at));
    ring.write(buffer, at, header, run.count());
}
