//! Packet input and output in batches, in two ways that do the same: [`uring`] and [`mmsg`].

mod burst;
pub(crate) mod message;
pub(crate) mod mmsg;
#[cfg(test)]
mod tests;
#[expect(unsafe_code, reason = "the fence: memory shared with the kernel")]
pub(crate) mod uring;

use std::io;
use std::net::IpAddr;
use std::ops::Range;
use std::os::fd::BorrowedFd;

use crate::batch::Transmit;
use crate::buffers::BufferId;
use crate::offload::VirtioNetHdr;
use message::DATAGRAM_LEN_MAX;

/// Buffers that input comes in, each with room for the largest: enough for a large batch of small
/// packets. See [`Window`] for large ones.
const RECEIVE_BUFFERS: u16 = 128;
/// Bytes of input taken at once, or little more: about what stays in a core's own cache until it has
/// been carried on.
const WINDOW_LEN: usize = 256 << 10;
/// Packets that a window has room for at least, however large.
const WINDOW_MIN: u16 = 4;
/// Buffers that datagrams to peers go out from. A super-packet of 64 KiB fills one and begins the
/// next, and may leave an unfinished one behind. Memory that is never touched costs nothing.
const SEND_BUFFERS: u16 = 2 * RECEIVE_BUFFERS + 1;
/// The largest super-packet: its length is a 16-bit field of its IP header.
const SUPER_PACKET_LEN_MAX: usize = 65_535;

/// Where packets of one direction come from and go to.
///
/// A buffer is in one place at a time: empty and waiting for input, free, with the caller as a
/// [`BufferId`], or in a send.
pub(crate) trait Io {
    /// Hands everything queued to the kernel and looks for input.
    ///
    /// # Errors
    /// The source is gone, or the kernel refuses to go on; nothing more will come of it.
    fn submit(&mut self, wait: Wait) -> io::Result<()>;

    /// Hands over what has happened, in order.
    fn reap(&mut self, out: &mut Vec<Completion>);

    /// Bytes in a buffer.
    fn packet(&self, buffer: &BufferId, at: &Range<usize>) -> &[u8];

    /// As [`Self::packet`], to be changed.
    fn packet_mut(&mut self, buffer: &BufferId, at: &Range<usize>) -> &mut [u8];

    /// Bytes in two buffers, the second ones to be changed.
    fn two_packets(
        &mut self,
        from: (&BufferId, &Range<usize>),
        to: (&BufferId, &Range<usize>),
    ) -> (&[u8], &mut [u8]);

    /// A free buffer to send from; `None` while all are in sends.
    fn take_buffer(&mut self) -> Option<BufferId>;

    /// Queues a send. The buffer comes back as [`Completion::Sent`], in the order of the sends.
    fn send(&mut self, buffer: BufferId, transmit: Transmit);

    /// Gives a buffer back to where it came from: input, or the free ones.
    fn recycle(&mut self, buffer: BufferId);
}

/// Whether to sleep where there is nothing to do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Wait {
    /// Until something happens.
    Sleep,
    /// Not at all.
    Look,
}

/// Which way packets are carried.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Direction {
    /// From the containers to a peer.
    TunToUdp,
    /// From a peer to the containers.
    UdpToTun,
}

impl Direction {
    /// All there are.
    pub const BOTH: [Self; 2] = [Self::TunToUdp, Self::UdpToTun];

    /// The name in counters and metrics.
    pub const fn name(self) -> &'static str {
        match self {
            Self::TunToUdp => "tun_to_udp",
            Self::UdpToTun => "udp_to_tun",
        }
    }

    /// Bytes of the largest input.
    fn input_len_max(self) -> usize {
        match self {
            Self::TunToUdp => VirtioNetHdr::LEN + SUPER_PACKET_LEN_MAX,
            Self::UdpToTun => DATAGRAM_LEN_MAX,
        }
    }

    /// How many buffers there are to send from; as long as those for input.
    fn send_buffers(self) -> u16 {
        match self {
            Self::TunToUdp => SEND_BUFFERS,
            Self::UdpToTun => 0,
        }
    }
}

/// How many buffers to offer for input at a time: many for small packets, so that a system call
/// yields a large batch; few for large ones, so that they are still in the cache when they are
/// carried on.
#[derive(Debug)]
struct Window {
    packets: u16,
}

impl Window {
    fn new() -> Self {
        Self { packets: RECEIVE_BUFFERS }
    }

    /// Adapts to the size of what just came in.
    fn adapt(&mut self, done: &[Completion]) {
        let received = done.iter().filter_map(|completion| match completion {
            Completion::Received(received) => Some(received.packets.len()),
            Completion::Sent(_) | Completion::Woken => None,
        });
        let (packets, bytes) = received.fold((0, 0), |(count, sum), len| (count + 1, sum + len));
        if let Some(len) = bytes.checked_div(packets) {
            let fitting = u16::try_from(WINDOW_LEN / len.max(1)).unwrap_or(u16::MAX);
            self.packets = fitting.clamp(WINDOW_MIN, RECEIVE_BUFFERS);
        }
    }
}

/// The files that an [`Io`] works on. They must be open until its [`Io`] is made, which holds
/// references of its own.
#[derive(Debug, Clone)]
pub(crate) struct Files<'a> {
    /// A TUN queue or a UDP socket, by the direction.
    pub(crate) source: BorrowedFd<'a>,
    /// An eventfd that somebody rings to wake the thread.
    pub(crate) bell: BorrowedFd<'a>,
    /// What [`crate::batch::Outer::socket`] chooses among; none where only the other way is sent.
    pub(crate) sockets: Vec<BorrowedFd<'a>>,
}

/// Something that happened since the last time.
#[derive(Debug)]
pub(crate) enum Completion {
    /// Packets came in.
    Received(Received),
    /// A buffer went out to a peer, or could not; it is ours again.
    Sent(Sent),
    /// Somebody rang the bell.
    Woken,
}

/// Packets that came in, one behind the other.
#[derive(Debug)]
pub(crate) struct Received {
    pub(crate) buffer: BufferId,
    pub(crate) packets: Range<usize>,
    /// Bytes of each of them; the last one may have fewer.
    pub(crate) segment_len: usize,
    /// Who sent them; `None` from the TUN, or where the kernel does not say.
    pub(crate) sender: Option<IpAddr>,
    /// Of the outer header; 0 from the TUN.
    pub(crate) traffic_class: u8,
}

impl Received {
    /// One packet from the TUN.
    fn from_tun(buffer: BufferId, len: usize) -> Self {
        Self { buffer, packets: 0..len, segment_len: len, sender: None, traffic_class: 0 }
    }
}

/// A buffer that went out, or could not.
#[derive(Debug)]
pub(crate) struct Sent {
    pub(crate) buffer: BufferId,
    pub(crate) transmit: Transmit,
    pub(crate) result: io::Result<()>,
}
