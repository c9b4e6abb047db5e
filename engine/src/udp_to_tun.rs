//! From peers to the containers.

use std::io::{self, IoSlice};
use std::net::IpAddr;
use std::os::fd::BorrowedFd;
use std::time::Instant;

use crate::ecn;
use crate::features::Feature;
use crate::guard::Verdict;
use crate::icmp::{ICMP_ERROR_LEN_MAX, IcmpError, RateLimit};
use crate::io::{Completion, Direction, Io, Received};
use crate::offload::coalesce::{Run, Segment};
use crate::offload::segment::Cut;
use crate::offload::{VirtioNetHdr, WHOLE};
use crate::packet::{IpView, decrement_ttl};
use crate::routes::{RouteTable, Target};
use crate::stats::{Counter, Distribution};
use crate::traffic::{Amount, Tally};
use crate::worker::{Carry, Context};

/// Carries packets from peers to the containers.
#[derive(Debug)]
pub(crate) struct UdpToTun {
    context: Context,
    limit: RateLimit,
    tally: Tally,
    /// Packets that the next one may join.
    run: Run,
}

impl UdpToTun {
    pub(crate) fn new(context: Context) -> Self {
        let limit = RateLimit::new(Instant::now());
        Self { context, limit, tally: Tally::new(Direction::UdpToTun), run: Run::default() }
    }

    fn received(&mut self, io: &mut impl Io, routes: &RouteTable, received: &Received) {
        let Received { buffer, packets, segment_len, sender, traffic_class } = received;
        let datagrams = packets.len().div_ceil(*segment_len.max(&1)).max(1);
        self.context.stats.add(Counter::UdpToTunDatagrams, datagrams as u64);
        let (mut start, mut peer, mut amount) = (packets.start, None, Amount::default());
        // Once at least, so that an empty datagram is counted too.
        loop {
            let at = start..(start + segment_len.max(&1)).min(packets.end);
            start = at.end;
            let packet = io.packet_mut(buffer, &at);
            if self.admit(routes, *sender, *traffic_class, packet) {
                // What the kernel joined is one flow's.
                if amount.packets == 0 {
                    let view = IpView::check(packet).ok();
                    peer = view.and_then(|it| routes.sender_number(it.source()));
                }
                amount.packets += 1;
                amount.bytes += packet.len() as u64;
                self.deliver(packet);
            }
            if start >= packets.end {
                break;
            }
        }
        self.tally.add(routes, peer, amount);
    }

    /// Whether a datagram is to be delivered; if so, its time to live has dropped.
    fn admit(
        &mut self,
        routes: &RouteTable,
        sender: Option<IpAddr>,
        traffic_class: u8,
        bytes: &mut [u8],
    ) -> bool {
        let verdict = match sender {
            Some(sender) => self.context.guard.judge(routes, sender, bytes),
            None => Verdict::UnknownSender,
        };
        let counter = match verdict {
            Verdict::Deliver if ecn::carry_over(traffic_class, bytes) => {
                decrement_ttl(bytes);
                return true;
            }
            Verdict::Deliver => Counter::UdpToTunCongestion,
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

    /// Joins a packet to the open run, or begins a new one with it.
    fn deliver(&mut self, packet: &[u8]) {
        let is_joined = |is_udp| self.context.features.has(feature(is_udp));
        let segment = Segment::parse_where(packet, is_joined);
        if segment.is_some_and(|segment| self.run.join(&segment, packet)) {
            return;
        }
        self.write_run();
        match segment {
            Some(segment) => self.run.begin(&segment, packet),
            None => {
                write_one(&self.context, packet);
            }
        }
    }

    /// Hands the open run to the kernel, if there is one.
    fn write_run(&mut self) {
        let (count, feature) = (self.run.count(), feature(self.run.is_udp()));
        let Some(bytes) = self.run.finish() else { return };
        match self.context.tun.write(&[IoSlice::new(bytes)]) {
            Ok(()) => {
                count_written(&self.context, bytes.len() - VirtioNetHdr::LEN, count);
                if count > 1 {
                    self.context.stats.add(Counter::UdpToTunSuperPackets, 1);
                }
            }
            Err(_) if count == 1 => self.context.stats.add(Counter::UdpToTunWriteFailed, 1),
            Err(refusal) => write_apart(&self.context, bytes, feature, count, &refusal),
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
        let Some(answer) = self.context.icmp(error, packet, &mut out) else { return };
        // A refused error is a lost packet like another; senders cope.
        if self.context.may_tell(&mut self.limit)
            && self.context.udp.send(answer, peer.endpoint).is_ok()
        {
            self.context.stats.add(Counter::IcmpSent, 1);
        }
    }
}

impl<I: Io> Carry<I> for UdpToTun {
    const BATCHES: Counter = Counter::UdpToTunBatches;
    const INPUT: Counter = Counter::UdpToTunDatagrams;

    fn act(&mut self, io: &mut I, routes: &RouteTable, completion: Completion) {
        match completion {
            Completion::Received(received) => {
                self.received(io, routes, &received);
                io.recycle(received.buffer);
            }
            Completion::Sent(_) | Completion::Woken => {}
        }
    }

    fn flush(&mut self, _io: &mut I, routes: &RouteTable) {
        self.write_run();
        self.tally.settle(routes);
    }

    fn full_socket(&self) -> Option<BorrowedFd<'_>> {
        None
    }
}

/// What lets a packet be joined with others.
fn feature(is_udp: bool) -> Feature {
    if is_udp { Feature::UdpCoalesce } else { Feature::TcpCoalesce }
}

/// Says whether the kernel took it.
fn write_one(context: &Context, packet: &[u8]) -> bool {
    let is_written = context.tun.write(&[IoSlice::new(&WHOLE), IoSlice::new(packet)]).is_ok();
    if is_written {
        count_written(context, packet.len(), 1);
    } else {
        context.stats.add(Counter::UdpToTunWriteFailed, 1);
    }
    is_written
}

/// Writes packets one by one that the kernel refuses as one. Where it takes the first, it was the
/// joining that it refused (EINVAL, virtio_net_hdr_to_skb() in include/linux/virtio_net.h), and the
/// engine gives that up; a device that is down, or no memory, passes.
fn write_apart(
    context: &Context,
    bytes: &[u8],
    feature: Feature,
    count: usize,
    refusal: &io::Error,
) {
    let packet = &bytes[VirtioNetHdr::LEN..];
    let cut = VirtioNetHdr::parse(bytes).and_then(|it| Cut::plan(&it, packet).ok().flatten());
    // What was joined can be cut; should that ever fail, the packets are counted.
    let Some(cut) = cut else {
        return context.stats.add(Counter::UdpToTunWriteFailed, count as u64);
    };
    context.stats.add(Counter::UdpToTunCoalesceRefused, 1);
    let mut one = vec![0; cut.len_of(0)];
    for number in 0..cut.count() {
        let len = cut.len_of(number);
        cut.write(packet, number, &mut one[..len]);
        let is_written = write_one(context, &one[..len]);
        if number == 0 && is_written && refusal.raw_os_error() == Some(libc::EINVAL) {
            context.fall(feature, refusal);
        }
    }
}

fn count_written(context: &Context, bytes: usize, packets: usize) {
    context.stats.add(Counter::UdpToTunWrites, 1);
    context.stats.add(Counter::UdpToTunPackets, packets as u64);
    context.stats.record(Distribution::SegmentPackets, packets as u64);
    context.stats.add(Counter::UdpToTunBytes, bytes as u64);
}
