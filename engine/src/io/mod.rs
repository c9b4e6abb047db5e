//! Packet input and output in batches. One implementation so far: [`uring`].

#[expect(unsafe_code, reason = "the fence: memory shared with the kernel")]
pub(crate) mod uring;

use std::io;
use std::net::IpAddr;
use std::ops::Range;

use crate::buffers::BufferId;

/// Which way a thread carries packets.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Direction {
    /// From the containers to a peer.
    TunToUdp,
    /// From a peer to the containers.
    UdpToTun,
}

/// Something that happened while the thread waited.
#[derive(Debug)]
pub(crate) enum Completion {
    /// A packet came in.
    Received(Received),
    /// A buffer went out to a peer, or could not; it is ours again.
    Sent(Sent),
    /// A write to the TUN ended.
    Written(Written),
    /// Somebody rang the wake-up bell.
    Woken,
}

/// A buffer that went out, or could not.
#[derive(Debug)]
pub(crate) struct Sent {
    pub(crate) buffer: BufferId,
    /// Where in the buffer the packets are.
    pub(crate) packets: Range<usize>,
    /// Bytes of each packet; the last one may have fewer.
    pub(crate) segment_len: usize,
    pub(crate) result: io::Result<()>,
}

/// A write to the TUN that ended. Its buffer is still the ring's.
#[derive(Debug)]
pub(crate) struct Written {
    /// Packets in it, and their bytes as one.
    pub(crate) packets: usize,
    pub(crate) len: usize,
    pub(crate) result: io::Result<()>,
}

/// A packet that came in.
#[derive(Debug)]
pub(crate) struct Received {
    pub(crate) buffer: BufferId,
    /// Where in the buffer the packet is, or several, one behind the other.
    pub(crate) packet: Range<usize>,
    /// Bytes of each of them; the last one may have fewer.
    pub(crate) segment_len: usize,
    /// Who sent it; `None` from the TUN.
    pub(crate) sender: Option<IpAddr>,
}
