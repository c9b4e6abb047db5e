//! From peers to the containers.

use std::io::{self, IoSlice};
use std::net::IpAddr;
use std::ops::Range;
use std::time::Instant;

use crate::buffers::BufferId;
use crate::ecn;
use crate::features::Feature;
use crate::guard::Verdict;
use crate::icmp::{ICMP_ERROR_LEN_MAX, IcmpError, RateLimit};
use crate::io::{Completion, Io, Received};
use crate::offload::coalesce::{PACKETS_MAX, Run, Segment};
use crate::packet::{IpView, decrement_ttl};
use crate::routes::{RouteTable, Target};
use crate::stats::Counter;
use crate::worker::{Carry, Context};

/// Payloads shorter than this are copied together: below it the kernel's walk over many pieces
/// costs more than the copy.
const GATHER_MIN: usize = 512;
/// The most that such payloads come to.
const COPIED_MAX: usize = PACKETS_MAX * GATHER_MIN;
/// Pieces of a write: the virtio header, the run's headers, and the payloads.
const PIECES_MAX: usize = 2 + PACKETS_MAX;

/// Carries packets from peers to the containers.
#[derive(Debug)]
pub(crate) struct UdpToTun {
    context: Context,
    limit: RateLimit,
    /// Buffers that hold packets which are not written yet.
    held: Vec<BufferId>,
    /// Packets that the next one may join, and where they are.
    run: Option<Run>,
    parts: Vec<Part>,
    copied: Box<[u8]>,
}

/// A packet in one of the buffers held.
#[derive(Debug)]
struct Part {
    /// The buffer's place in `held`.
    buffer: usize,
    at: Range<usize>,
}

impl UdpToTun {
    pub(crate) fn new(context: Context) -> Self {
        Self {
            context,
            limit: RateLimit::new(Instant::now()),
            held: Vec::new(),
            run: None,
            parts: Vec::with_capacity(PACKETS_MAX),
            copied: vec![0; COPIED_MAX].into_boxed_slice(),
        }
    }

    fn received(&mut self, io: &mut impl Io, routes: &RouteTable, received: Received) {
        let Received { buffer, packets, segment_len, sender, traffic_class } = received;
        let place = self.held.len();
        self.held.push(buffer);
        let mut start = packets.start;
        // Once at least, so that an empty datagram is counted too.
        loop {
            let at = start..(start + segment_len.max(1)).min(packets.end);
            start = at.end;
            let bytes = io.packet_mut(&self.held[place], &at);
            if self.admit(routes, sender, traffic_class, bytes) {
                self.deliver(io, Part { buffer: place, at });
            }
            if start >= packets.end {
                break;
            }
        }
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
    fn deliver(&mut self, io: &impl Io, part: Part) {
        let packet = part.bytes(io, &self.held);
        let segment = Segment::parse(packet).filter(|it| self.context.features.has(feature(it)));
        let joined = match (&mut self.run, &segment) {
            (Some(run), Some(segment)) => run.join(segment, packet),
            _ => false,
        };
        if joined {
            return self.parts.push(part);
        }
        self.write_run(io);
        match segment {
            Some(segment) => {
                self.run = Some(Run::new(segment, packet));
                self.parts.push(part);
            }
            None => self.write_one(packet),
        }
    }

    /// Hands the open run to the kernel, if there is one.
    fn write_run(&mut self, io: &impl Io) {
        let Some(mut run) = self.run.take() else { return };
        let written = if run.count() > 1 { self.write_joined(io, &mut run) } else { Ok(false) };
        if !matches!(written, Ok(true)) {
            let before = self.context.stats.get(Counter::UdpToTunPackets);
            for part in &self.parts {
                self.write_one(part.bytes(io, &self.held));
            }
            // Where the kernel takes them one by one, it was the joining that it refused.
            let any_taken = self.context.stats.get(Counter::UdpToTunPackets) > before;
            if let Err(error) = written
                && any_taken
            {
                self.context.stats.add(Counter::UdpToTunCoalesceRefused, 1);
                self.context.fall(feature(run.last()), &error);
            }
        }
        self.parts.clear();
    }

    /// `false` is for no attempt, never for a failure.
    fn write_joined(&mut self, io: &impl Io, run: &mut Run) -> io::Result<bool> {
        let (packets, len, segment_len) = (run.count(), run.byte_len(), run.segment_len());
        let (virtio_header, headers) = run.finish();
        let payloads = self.parts.iter().map(|it| &it.bytes(io, &self.held)[headers.len()..]);
        let mut pieces = [IoSlice::new(&[]); PIECES_MAX];
        pieces[0] = IoSlice::new(&virtio_header);
        pieces[1] = IoSlice::new(headers);
        let mut count = 2;
        if segment_len < GATHER_MIN {
            let mut copied = 0;
            for payload in payloads {
                self.copied[copied..copied + payload.len()].copy_from_slice(payload);
                copied += payload.len();
            }
            pieces[2] = IoSlice::new(&self.copied[..copied]);
            count = 3;
        } else {
            for payload in payloads {
                pieces[count] = IoSlice::new(payload);
                count += 1;
            }
        }
        self.context.tun.write_vectored(&pieces[..count])?;
        self.context.stats.add(Counter::UdpToTunSuperPackets, 1);
        self.count_written(packets, len);
        Ok(true)
    }

    fn write_one(&self, packet: &[u8]) {
        match self.context.tun.write(packet) {
            Ok(()) => self.count_written(1, packet.len()),
            Err(_) => self.context.stats.add(Counter::UdpToTunWriteFailed, 1),
        }
    }

    fn count_written(&self, packets: usize, bytes: usize) {
        self.context.stats.add(Counter::UdpToTunPackets, packets as u64);
        self.context.stats.add(Counter::UdpToTunBytes, bytes as u64);
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

impl<I: Io> Carry<I> for UdpToTun {
    const BATCHES: Counter = Counter::UdpToTunBatches;

    fn act(&mut self, io: &mut I, routes: &RouteTable, completion: Completion) {
        match completion {
            Completion::Received(received) => self.received(io, routes, received),
            Completion::Sent(_) | Completion::Woken => {}
        }
    }

    fn flush(&mut self, io: &mut I, _routes: &RouteTable) {
        self.write_run(io);
        for buffer in self.held.drain(..) {
            io.recycle(buffer);
        }
    }
}

impl Part {
    fn bytes<'a>(&self, io: &'a impl Io, held: &[BufferId]) -> &'a [u8] {
        io.packet(&held[self.buffer], &self.at)
    }
}

/// What lets this packet be joined with others.
fn feature(segment: &Segment) -> Feature {
    if segment.is_udp() { Feature::UdpCoalesce } else { Feature::TcpCoalesce }
}
