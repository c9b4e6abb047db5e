//! Datagrams to one peer that share a send: equal lengths one behind the other, the last one
//! perhaps shorter, as UDP_SEGMENT wants them (udp(7)).

use std::net::SocketAddr;
use std::ops::Range;

use crate::buffers::BufferId;

/// Segments that every kernel with UDP_SEGMENT takes (UDP_MAX_SEGMENTS; twice as many since 6.9).
const SEGMENTS_MAX: usize = 64;
/// Bytes that a UDP datagram over IPv4 holds; the whole send is checked against it.
const BYTES_MAX: usize = 65_507;

/// Datagrams to one peer that lie one behind the other in a buffer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Transmit {
    pub(crate) outer: Outer,
    pub(crate) packets: Range<usize>,
    /// Bytes of each of them; the last one may have fewer.
    pub(crate) segment_len: usize,
}

/// What stands around packets on the underlay.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Outer {
    pub(crate) peer: SocketAddr,
    /// The number of the socket to send from.
    pub(crate) socket: usize,
    /// DSCP and ECN (RFC 2474, RFC 3168).
    pub(crate) traffic_class: u8,
    /// Whether several packets may share a send.
    pub(crate) segments: bool,
}

/// A send that is being filled.
#[derive(Debug)]
pub(crate) struct Batch {
    pub(crate) buffer: BufferId,
    outer: Outer,
    /// Bytes of the first datagram, and so of all but the last.
    segment_len: usize,
    /// Bytes of all of them.
    len: usize,
    count: usize,
}

impl Batch {
    /// An empty one, for datagrams of `segment_len` bytes or one shorter.
    pub(crate) fn new(buffer: BufferId, outer: Outer, segment_len: usize) -> Self {
        Self { buffer, outer, segment_len, len: 0, count: 0 }
    }

    /// Whether a datagram of `len` bytes, in this outer header, may be the next one.
    pub(crate) fn takes(&self, outer: &Outer, len: usize) -> bool {
        let ended_by_a_shorter_one = self.len < self.count * self.segment_len;
        let has_room = self.count < SEGMENTS_MAX && self.len + len <= BYTES_MAX;
        let may_join = outer.segments && self.outer == *outer;
        may_join && len <= self.segment_len && !ended_by_a_shorter_one && has_room
    }

    /// The place of the next datagram, which [`Self::takes`] has allowed.
    pub(crate) fn reserve(&mut self, len: usize) -> Range<usize> {
        let start = self.len;
        self.len += len;
        self.count += 1;
        start..self.len
    }

    /// The whole of it, to be sent.
    pub(crate) fn finish(self) -> (BufferId, Transmit) {
        let Self { buffer, outer, segment_len, len, .. } = self;
        (buffer, Transmit { outer, packets: 0..len, segment_len })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn batch(segment_len: usize) -> Batch {
        Batch::new(BufferId::new(0), peer(1), segment_len)
    }

    fn peer(last: u8) -> Outer {
        let peer = ([192, 0, 2, last], 8285).into();
        Outer { peer, socket: 0, traffic_class: 0, segments: true }
    }

    #[test]
    fn equal_lengths_to_one_peer_and_one_shorter_at_the_end() {
        let mut batch = batch(100);
        assert_eq!(batch.reserve(100), 0..100);
        assert!(batch.takes(&peer(1), 100));
        assert!(!batch.takes(&peer(2), 100));
        assert!(!batch.takes(&Outer { traffic_class: 3, ..peer(1) }, 100));
        assert!(!batch.takes(&Outer { socket: 1, ..peer(1) }, 100));
        assert!(!batch.takes(&peer(1), 101));
        assert!(batch.takes(&peer(1), 99));
        assert_eq!(batch.reserve(99), 100..199);
        assert!(!batch.takes(&peer(1), 99));
        assert!(!batch.takes(&peer(1), 1));
    }

    #[test]
    fn a_peer_that_gets_each_alone() {
        let alone = Outer { segments: false, ..peer(1) };
        let mut batch = Batch::new(BufferId::new(0), alone, 100);
        batch.reserve(100);
        assert!(!batch.takes(&alone, 100));
    }

    #[test]
    fn ends_at_the_kernels_limits() {
        let mut small = batch(20);
        while small.takes(&peer(1), 20) {
            small.reserve(20);
        }
        assert_eq!(small.len, 64 * 20);
        let mut large = batch(1472);
        while large.takes(&peer(1), 1472) {
            large.reserve(1472);
        }
        assert_eq!(large.len, 44 * 1472);
    }
}
