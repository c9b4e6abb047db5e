//! From the containers to their peers.

use std::collections::VecDeque;
use std::io::{self, IoSlice};
use std::net::IpAddr;
use std::ops::Range;
use std::os::fd::{AsFd, BorrowedFd};
use std::time::{Duration, Instant};

use crate::batch::{Batch, Outer, Transmit};
use crate::buffers::BufferId;
use crate::ecn;
use crate::features::Feature;
use crate::icmp::{ICMP_ERROR_LEN_MAX, IcmpError, RateLimit, RateLimits};
use crate::io::{Completion, Direction, Io, Received, Sent};
use crate::offload::segment::{Cut, finish_checksum};
use crate::offload::{VirtioNetHdr, WHOLE};
use crate::packet::{IpView, decrement_ttl};
use crate::routes::{Peer, RouteTable, Target};
use crate::stats::{Counter, Distribution};
use crate::sys;
use crate::traffic::{Amount, Tally};
use crate::worker::{Carry, Context};

/// No IPv6 link may be smaller (RFC 8200 5), so no sender can be asked for less.
const IPV6_MTU_MIN: u32 = 1280;
/// How long sends wait for room in a full socket. Meanwhile packets queue in the TUN device.
const STALL_MAX: Duration = Duration::from_millis(100);
/// A thread that waits for room tries again after 5 ms; one that is later than this had no core.
const AWAY: Duration = Duration::from_millis(20);

/// Carries packets from the containers to their peers.
#[derive(Debug)]
pub(crate) struct TunToUdp {
    context: Context,
    limit: RateLimit,
    /// Of packets that are too big: who does not hear of one hangs.
    limits_of_too_big: RateLimits,
    tally: Tally,
    /// The send that the next packet may join.
    batch: Option<Batch>,
    /// Sends that the [`Io`] has.
    under_way: usize,
    /// Sends that found the socket full, none of which another has overtaken.
    stalled: VecDeque<Sent>,
    /// Until when they may wait, and when they were last tried.
    stalled_until: Instant,
    tried: Instant,
}

impl TunToUdp {
    pub(crate) fn new(context: Context) -> Self {
        let now = Instant::now();
        Self {
            context,
            limit: RateLimit::new(now),
            limits_of_too_big: RateLimits::new(now),
            tally: Tally::new(Direction::TunToUdp),
            batch: None,
            under_way: 0,
            stalled: VecDeque::new(),
            stalled_until: now,
            tried: now,
        }
    }

    fn received(&mut self, io: &mut impl Io, routes: &RouteTable, received: &Received) {
        let Received { buffer, packets, .. } = received;
        self.context.stats.add(Counter::TunToUdpReads, 1);
        let Some(header) = VirtioNetHdr::parse(io.packet(buffer, packets)) else {
            return self.context.stats.add(Counter::TunToUdpMalformed, 1);
        };
        let at = packets.start + VirtioNetHdr::LEN..packets.end;
        let bytes = io.packet_mut(buffer, &at);
        let outer = match self.forward(routes, bytes) {
            Forward::To(outer) => outer,
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
                self.append(io, routes, (buffer, &at), outer, at.len(), |packet, out| {
                    out.copy_from_slice(packet);
                });
            }
            // The kernel hands over none that is larger; with many headers in front, which it does not
            // count, each would cost its own copy, an error and a look for the path's MTU.
            Ok(Some(cut)) if cut.len_of(0) <= self.context.guard.mtu => {
                self.context.stats.add(Counter::TunToUdpSuperPackets, 1);
                for number in 0..cut.count() {
                    let len = cut.len_of(number);
                    self.append(io, routes, (buffer, &at), outer, len, |packet, out| {
                        cut.write(packet, number, out);
                    });
                }
            }
            _ => self.context.stats.add(Counter::TunToUdpMalformed, 1),
        }
    }

    /// What becomes of a packet from the TUN.
    fn forward(&self, routes: &RouteTable, packet: &[u8]) -> Forward {
        let Ok(view) = IpView::check(packet) else {
            return Forward::Drop(Counter::TunToUdpMalformed, None);
        };
        let Some(Target::Peer(peer)) = routes.lookup(view.destination()) else {
            return Forward::Drop(Counter::TunToUdpNoRoute, Some(IcmpError::Unreachable));
        };
        if view.ttl() <= 1 {
            return Forward::Drop(Counter::TunToUdpTtlExpired, Some(IcmpError::TimeExceeded));
        }
        Forward::To(self.outer(peer, &view))
    }

    fn outer(&self, peer: &Peer, view: &IpView<'_>) -> Outer {
        let Context { sockets, dscp, .. } = &self.context;
        let socket = if sockets.len() > 1 { view.flow_hash() as usize % sockets.len() } else { 0 };
        let traffic_class = ecn::outer(view.traffic_class(), peer.ecn, *dscp);
        Outer { peer: peer.endpoint, socket, traffic_class, segments: peer.segments }
    }

    /// Has `write` make a datagram of `len` bytes out of a received packet, in the open batch or
    /// in a new one.
    fn append(
        &mut self,
        io: &mut impl Io,
        routes: &RouteTable,
        packet: (&BufferId, &Range<usize>),
        outer: Outer,
        len: usize,
        write: impl FnOnce(&[u8], &mut [u8]),
    ) {
        let joins = self.batch.as_ref().is_some_and(|batch| batch.takes(&outer, len))
            && self.context.features.has(Feature::UdpSegment);
        if !joins {
            self.send_batch(io, routes);
            self.batch = io.take_buffer().map(|buffer| Batch::new(buffer, outer, len));
        }
        let Some(batch) = &mut self.batch else {
            return self.context.stats.add(Counter::TunToUdpFull, 1);
        };
        let at = batch.reserve(len);
        let (from, out) = io.two_packets(packet, (&batch.buffer, &at));
        write(from, out);
    }

    fn send_batch(&mut self, io: &mut impl Io, routes: &RouteTable) {
        let Some(batch) = self.batch.take() else { return };
        let (buffer, transmit) = batch.finish();
        // A peer that gets each packet alone gets them by this way only, so that their order stays.
        let may_wait = self.context.features.has(Feature::UdpSegment) || self.under_way > 0;
        if transmit.outer.segments && may_wait {
            self.under_way += 1;
            return io.send(buffer, transmit);
        }
        // One datagram a send: a few super-packets would use up all buffers before the kernel is asked.
        let result = if self.stalled.is_empty() {
            let packets = io.packet(&buffer, &transmit.packets);
            sys::send(&self.context.sockets[transmit.outer.socket], packets, &transmit)
        } else {
            Err(io::ErrorKind::WouldBlock.into())
        };
        self.sent(io, routes, Sent { buffer, transmit, result });
    }

    /// What came of a send. A send that finds its socket full waits, and with it those behind; but if
    /// one behind it, from the same socket, got through, or may go out in another way now, it is lost
    /// rather than late: no flow is ever reordered.
    fn sent(&mut self, io: &mut impl Io, routes: &RouteTable, sent: Sent) {
        if sent.result.as_ref().is_err_and(|error| error.kind() == io::ErrorKind::WouldBlock) {
            return self.stall(sent);
        }
        if sent.result.as_ref().err().is_none_or(is_sent_again) {
            self.drop_overtaken(io, sent.transmit.outer.socket);
        }
        let packets = io.packet(&sent.buffer, &sent.transmit.packets);
        self.finish(routes, packets, &sent.transmit, sent.result);
        io.recycle(sent.buffer);
    }

    fn stall(&mut self, sent: Sent) {
        if self.stalled.is_empty() {
            self.context.stats.add(Counter::TunToUdpStalls, 1);
            self.tried = Instant::now();
            self.stalled_until = self.tried + STALL_MAX;
        }
        self.stalled.push_back(sent);
    }

    /// A flow always leaves from the same socket, so those of other sockets may go on waiting.
    fn drop_overtaken(&mut self, io: &mut impl Io, socket: usize) {
        while let Some(sent) = take_of(socket, &mut self.stalled) {
            self.context.stats.add(Counter::TunToUdpOvertaken, count(&sent.transmit));
            io.recycle(sent.buffer);
        }
    }

    /// Sends again, in order, what found the socket full, until it is full again; after too long a
    /// wait, what finds it full is lost. To have had no core, as in a virtual machine that was paused, is
    /// not to have waited: nothing has left the socket meanwhile.
    fn send_stalled(&mut self, io: &mut impl Io, routes: &RouteTable) {
        if self.stalled.is_empty() {
            return;
        }
        let now = Instant::now();
        let was_away = now - std::mem::replace(&mut self.tried, now) > AWAY;
        while let Some(sent) = self.stalled.pop_front() {
            let Sent { buffer, transmit, .. } = &sent;
            let packets = io.packet(buffer, &transmit.packets);
            let result = sys::send(&self.context.sockets[transmit.outer.socket], packets, transmit);
            let full = result.as_ref().is_err_and(|it| it.kind() == io::ErrorKind::WouldBlock);
            if full && (was_away || now < self.stalled_until) {
                return self.stalled.push_front(sent);
            }
            self.finish(routes, packets, transmit, result);
            io.recycle(sent.buffer);
        }
    }

    /// Counts a send, or does what its error asks for.
    fn finish(
        &mut self,
        routes: &RouteTable,
        packets: &[u8],
        transmit: &Transmit,
        result: io::Result<()>,
    ) {
        let several = packets.len() > transmit.segment_len;
        let Err(error) = result else {
            return self.count_sent(routes, packets, transmit);
        };
        match error.raw_os_error() {
            _ if several && is_sent_again(&error) => {
                self.send_apart(routes, packets, transmit, &error);
            }
            Some(libc::EMSGSIZE) => self.too_big(routes, packets, &transmit.outer),
            Some(libc::EAGAIN | libc::ENOBUFS) => {
                self.context.stats.add(Counter::TunToUdpFull, count(transmit));
            }
            _ => self.context.stats.add(Counter::TunToUdpSendFailed, count(transmit)),
        }
    }

    /// All in one send go to one host; should several peers live there, the first one's.
    fn count_sent(&mut self, routes: &RouteTable, packets: &[u8], transmit: &Transmit) {
        let amount = Amount { packets: count(transmit), bytes: packets.len() as u64 };
        self.context.stats.add(Counter::TunToUdpSends, 1);
        self.context.stats.add(Counter::TunToUdpPackets, amount.packets);
        self.context.stats.record(Distribution::SegmentPackets, amount.packets);
        self.context.stats.add(Counter::TunToUdpBytes, amount.bytes);
        let first = &packets[..transmit.segment_len.min(packets.len())];
        let view = IpView::check(first).ok();
        let peer = view.and_then(|it| routes.peer_number(it.destination()));
        self.tally.add(routes, peer, amount);
    }

    /// Sends packets one by one that the kernel refuses together: one of them is too large for the path,
    /// or the kernel cannot cut. Each has its own answer then; but a sender is told once of all that are
    /// too large.
    fn send_apart(
        &mut self,
        routes: &RouteTable,
        packets: &[u8],
        transmit: &Transmit,
        refusal: &io::Error,
    ) {
        self.context.stats.add(Counter::TunToUdpSegmentRefused, 1);
        let mut told: Option<(IpAddr, usize)> = None;
        for (number, packet) in packets.chunks(transmit.segment_len).enumerate() {
            let len = packet.len();
            let view = IpView::check(packet).ok().filter(IpView::dont_fragment);
            let sender = view.map(|view| view.source());
            if told.is_some_and(|(to, too_big)| sender == Some(to) && len >= too_big) {
                self.context.stats.add(Counter::TunToUdpTooBig, 1);
                continue;
            }
            let one = Transmit { packets: 0..len, segment_len: len, ..transmit.clone() };
            let result = sys::send(&self.context.sockets[one.outer.socket], packet, &one);
            // By the first one, which is as large as any: the last may fit where the others do not.
            let passes = number == 0 && result.is_ok();
            let before = self.context.stats.get(Counter::TunToUdpTooBig);
            self.finish(routes, packet, &one, result);
            if self.context.stats.get(Counter::TunToUdpTooBig) > before {
                told = sender.map(|sender| (sender, len));
            }
            if passes
                && refusal.raw_os_error() != Some(libc::EMSGSIZE)
                && self.send_rest(routes, &packets[len..], transmit)
            {
                return;
            }
        }
    }

    /// Sends together the rest of what was refused together, now that the first one has passed alone, and
    /// says whether that has an answer. The kernel cannot cut if it is refused again: the refusal before may
    /// be from when the path was smaller, since one that is too large says EINVAL, too, until Linux 6.14.
    fn send_rest(&mut self, routes: &RouteTable, packets: &[u8], transmit: &Transmit) -> bool {
        if packets.len() <= transmit.segment_len {
            return false;
        }
        let rest = Transmit { packets: 0..packets.len(), ..transmit.clone() };
        let result = sys::send(&self.context.sockets[rest.outer.socket], packets, &rest);
        match result {
            Err(error) if is_sent_again(&error) => {
                if error.raw_os_error() != Some(libc::EMSGSIZE) && self.fits_path(&rest) {
                    self.context.fall(Feature::UdpSegment, &error);
                }
                false
            }
            result => {
                self.finish(routes, packets, &rest, result);
                true
            }
        }
    }

    fn fits_path(&self, transmit: &Transmit) -> bool {
        let path = self.context.udp.path_mtu(transmit.outer.peer);
        path.is_ok_and(|path| {
            transmit.segment_len <= path.saturating_sub(self.context.overhead) as usize
        })
    }

    /// The path to the peer is smaller than our MTU. A sender that forbids fragments is told what
    /// fits; for others the outer packet is cut, as the kernel would do with the inner one.
    fn too_big(&mut self, routes: &RouteTable, packet: &[u8], outer: &Outer) {
        let (stats, udp) = (&self.context.stats, &self.context.udp);
        let (Ok(view), Some(peer)) = (IpView::check(packet), peer_of(routes, packet)) else {
            return stats.add(Counter::TunToUdpNoRoute, 1);
        };
        let is_ipv6 = matches!(view, IpView::V6(_));
        if !view.dont_fragment() || is_ipv6 && packet.len() <= IPV6_MTU_MIN as usize {
            return self.send_fragmented(routes, packet, outer);
        }
        // Before the path is asked for, which costs five system calls: who takes no notice of errors would
        // slow down all others.
        if !self.context.may_tell(self.limits_of_too_big.of(view.source())) {
            return stats.add(Counter::TunToUdpTooBig, 1);
        }
        let Ok(path) = udp.path_mtu(peer.endpoint) else {
            return stats.add(Counter::TunToUdpSendFailed, 1);
        };
        let fitting = path.saturating_sub(self.context.overhead);
        let mtu = if is_ipv6 { fitting.max(IPV6_MTU_MIN) } else { fitting };
        if packet.len() <= mtu as usize {
            return self.send_fragmented(routes, packet, outer);
        }
        stats.add(Counter::TunToUdpTooBig, 1);
        let mut out = [0; ICMP_ERROR_LEN_MAX];
        if let Some(answer) = self.context.icmp(IcmpError::TooBig { mtu }, packet, &mut out) {
            self.tell(answer);
        }
    }

    fn send_fragmented(&mut self, routes: &RouteTable, packet: &[u8], outer: &Outer) {
        let stats = &self.context.stats;
        match self.context.sockets[outer.socket].send_fragmented(packet, outer) {
            Ok(()) => {
                stats.add(Counter::TunToUdpFragmented, 1);
                let segment_len = packet.len();
                let outer = *outer;
                self.count_sent(
                    routes,
                    packet,
                    &Transmit { outer, packets: 0..segment_len, segment_len },
                );
            }
            Err(error) => stats.add(
                match error.raw_os_error() {
                    Some(libc::EAGAIN | libc::ENOBUFS) => Counter::TunToUdpFull,
                    _ => Counter::TunToUdpSendFailed,
                },
                1,
            ),
        }
    }

    fn answer(&mut self, error: IcmpError, packet: &[u8]) {
        let mut out = [0; ICMP_ERROR_LEN_MAX];
        let Some(answer) = self.context.icmp(error, packet, &mut out) else { return };
        if self.context.may_tell(&mut self.limit) {
            self.tell(answer);
        }
    }

    /// Back to a container: through the TUN, on which the backend has allowed our own address as
    /// a source (accept_local).
    fn tell(&self, answer: &[u8]) {
        // A refused error is a lost packet like another; senders cope.
        if self.context.tun.write(&[IoSlice::new(&WHOLE), IoSlice::new(answer)]).is_ok() {
            self.context.stats.add(Counter::IcmpSent, 1);
        }
    }
}

impl<I: Io> Carry<I> for TunToUdp {
    const BATCHES: Counter = Counter::TunToUdpBatches;
    const INPUT: Counter = Counter::TunToUdpReads;

    fn act(&mut self, io: &mut I, routes: &RouteTable, completion: Completion) {
        match completion {
            Completion::Received(received) => {
                self.received(io, routes, &received);
                io.recycle(received.buffer);
            }
            Completion::Sent(sent) => {
                self.under_way -= 1;
                self.sent(io, routes, sent);
            }
            Completion::Woken => {}
        }
    }

    fn flush(&mut self, io: &mut I, routes: &RouteTable) {
        self.send_stalled(io, routes);
        self.send_batch(io, routes);
        self.tally.settle(routes);
    }

    fn full_socket(&self) -> Option<BorrowedFd<'_>> {
        let first = self.stalled.front()?;
        Some(self.context.sockets[first.transmit.outer.socket].as_fd())
    }
}

/// What becomes of a packet from the TUN.
enum Forward {
    To(Outer),
    Drop(Counter, Option<IcmpError>),
}

/// Where a packet goes by the routes as they are now.
fn peer_of<'a>(routes: &'a RouteTable, packet: &[u8]) -> Option<&'a Peer> {
    match routes.lookup(IpView::check(packet).ok()?.destination())? {
        Target::Peer(peer) => Some(peer),
        Target::Local => None,
    }
}

/// Whether packets that the kernel refuses together are sent one by one, or in fragments.
fn is_sent_again(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::EMSGSIZE | libc::EINVAL | libc::EIO))
}

/// Takes out the first send from a socket; the others keep their order.
fn take_of(socket: usize, sends: &mut VecDeque<Sent>) -> Option<Sent> {
    let at = sends.iter().position(|sent| sent.transmit.outer.socket == socket)?;
    sends.remove(at)
}

/// Packets in a send.
fn count(transmit: &Transmit) -> u64 {
    transmit.packets.len().div_ceil(transmit.segment_len.max(1)) as u64
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_overtaken_is_of_one_socket_and_the_rest_stays_in_order() {
        let sent = |(number, socket)| Sent {
            buffer: BufferId::new(number),
            transmit: Transmit {
                outer: Outer {
                    peer: ([192, 0, 2, 1], 8285).into(),
                    socket,
                    traffic_class: 0,
                    segments: true,
                },
                packets: 0..100,
                segment_len: 100,
            },
            result: Err(io::ErrorKind::WouldBlock.into()),
        };
        let mut sends: VecDeque<Sent> = [(0, 3), (1, 9), (2, 3), (3, 5)].map(sent).into();
        let taken: Vec<u16> =
            std::iter::from_fn(|| take_of(3, &mut sends)).map(|it| it.buffer.index()).collect();
        assert_eq!(taken, [0, 2]);
        let left: Vec<u16> = sends.iter().map(|it| it.buffer.index()).collect();
        assert_eq!(left, [1, 3]);
    }
}
