//! Counters and distributions: plain numbers, one writer each, summed by whoever reads.

use std::sync::atomic::{AtomicU64, Ordering};

use crossbeam::utils::CachePadded;

/// Declares the counters once: variants, names and count cannot drift apart.
macro_rules! counters {
    ($($(#[doc = $doc:literal])+ $variant:ident => $name:literal,)+) => {
        /// What is counted. Names begin with the direction.
        #[derive(Debug, Clone, Copy, PartialEq, Eq)]
        pub enum Counter { $($(#[doc = $doc])+ $variant,)+ }

        impl Counter {
            pub const ALL: &[Self] = &[$(Self::$variant,)+];

            /// The name in status and metrics.
            pub const fn name(self) -> &'static str {
                match self { $(Self::$variant => $name,)+ }
            }
        }
    };
}

counters! {
    /// Packets that the TUN device handed over; a super-packet is one.
    TunToUdpReads => "tun_to_udp_reads",
    /// Packets sent to peers.
    TunToUdpPackets => "tun_to_udp_packets",
    /// Their bytes, without the outer headers.
    TunToUdpBytes => "tun_to_udp_bytes",
    /// System-side sends that carried them; packets / sends is what UDP_SEGMENT saves.
    TunToUdpSends => "tun_to_udp_sends",
    /// Super-packets among what the TUN device handed over; each became several packets.
    TunToUdpSuperPackets => "tun_to_udp_super_packets",
    /// Sends that the kernel refused to segment, and that went out packet by packet.
    TunToUdpSegmentRefused => "tun_to_udp_segment_refused",
    /// Times that packets were found; packets / batches is the batch size.
    TunToUdpBatches => "tun_to_udp_batches",
    /// Dropped: not a well-formed IP packet.
    TunToUdpMalformed => "tun_to_udp_malformed",
    /// Dropped: no peer has the destination.
    TunToUdpNoRoute => "tun_to_udp_no_route",
    /// Dropped: the time to live ran out.
    TunToUdpTtlExpired => "tun_to_udp_ttl_expired",
    /// Dropped: larger than the path to the peer allows.
    TunToUdpTooBig => "tun_to_udp_too_big",
    /// Sent in outer fragments, the path being smaller and the inner packet's sender not minding.
    TunToUdpFragmented => "tun_to_udp_fragmented",
    /// Times that sends found the socket's send buffer full, and had to wait or were dropped.
    TunToUdpStalls => "tun_to_udp_stalls",
    /// Dropped: the socket's send buffer or the device's queue stayed full, or no buffer was left to
    /// send from.
    TunToUdpFull => "tun_to_udp_full",
    /// Dropped: found the socket's send buffer full, and the send behind it found room.
    TunToUdpOvertaken => "tun_to_udp_overtaken",
    /// Dropped: the kernel refused the send for another reason (no route to the peer, say).
    TunToUdpSendFailed => "tun_to_udp_send_failed",
    /// Datagrams that came in, whatever became of them.
    UdpToTunDatagrams => "udp_to_tun_datagrams",
    /// Packets written to the TUN device.
    UdpToTunPackets => "udp_to_tun_packets",
    /// Their bytes, those of a super-packet with one set of headers.
    UdpToTunBytes => "udp_to_tun_bytes",
    /// Writes that carried them; packets / writes is what coalescing saves.
    UdpToTunWrites => "udp_to_tun_writes",
    /// Writes that carried several packets of one flow as one.
    UdpToTunSuperPackets => "udp_to_tun_super_packets",
    /// Writes of several packets as one that the kernel refused, and that went packet by packet.
    UdpToTunCoalesceRefused => "udp_to_tun_coalesce_refused",
    /// Times that datagrams were found.
    UdpToTunBatches => "udp_to_tun_batches",
    /// Dropped: not a well-formed IP packet.
    UdpToTunMalformed => "udp_to_tun_malformed",
    /// Dropped: larger than the overlay's MTU.
    UdpToTunOversized => "udp_to_tun_oversized",
    /// Dropped by the guard: the outer sender is no peer.
    UdpToTunUnknownSender => "udp_to_tun_unknown_sender",
    /// Dropped by the guard: the inner source is not the sender's.
    UdpToTunForeignSource => "udp_to_tun_foreign_source",
    /// Dropped by the guard: the inner destination is not ours.
    UdpToTunForeignDestination => "udp_to_tun_foreign_destination",
    /// Dropped: the time to live ran out.
    UdpToTunTtlExpired => "udp_to_tun_ttl_expired",
    /// Dropped: marked as congested on the way, and the sender would not understand (RFC 6040).
    UdpToTunCongestion => "udp_to_tun_congestion",
    /// Dropped: the kernel refused the write (the device is down, say).
    UdpToTunWriteFailed => "udp_to_tun_write_failed",
    /// ICMP errors sent.
    IcmpSent => "icmp_sent",
    /// ICMP errors owed but held back by the rate limit.
    IcmpLimited => "icmp_limited",
}

/// What is measured of each batch.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Distribution {
    /// Packets that were found at once; of the TUN device, a super-packet is one.
    BatchPackets,
    /// Packets that one send, or one write to the TUN device, carried.
    SegmentPackets,
    /// Nanoseconds from waking up until all that had come in was handed on.
    BatchNanos,
}

impl Distribution {
    pub const ALL: [Self; 3] = [Self::BatchPackets, Self::SegmentPackets, Self::BatchNanos];
}

/// Buckets of a histogram: number n holds values up to 2^n that no smaller one holds, the last one
/// all that are larger.
pub const BUCKETS: usize = 32;

/// How many values fell into which bucket, and what they add up to.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Histogram {
    pub buckets: [u64; BUCKETS],
    pub sum: u64,
}

fn bucket(value: u64) -> usize {
    ((u64::BITS - value.saturating_sub(1).leading_zeros()) as usize).min(BUCKETS - 1)
}

/// A cell that only one thread writes.
#[derive(Debug)]
struct Cell(AtomicU64);

impl Cell {
    /// A load and a store, not a locked addition: there is one writer.
    fn add(&self, amount: u64) {
        self.0.store(self.get().wrapping_add(amount), Ordering::Relaxed);
    }

    fn get(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}

/// The counters and distributions of one direction of a worker. Only its thread adds to them.
#[derive(Debug)]
pub struct LaneStats {
    counters: CachePadded<[Cell; Counter::ALL.len()]>,
    /// The buckets of each distribution, and behind them the sum.
    distributions: CachePadded<[[Cell; BUCKETS + 1]; Distribution::ALL.len()]>,
}

impl Default for LaneStats {
    fn default() -> Self {
        let counters = [const { Cell(AtomicU64::new(0)) }; Counter::ALL.len()];
        let distributions =
            [const { [const { Cell(AtomicU64::new(0)) }; BUCKETS + 1] }; Distribution::ALL.len()];
        Self {
            counters: CachePadded::new(counters),
            distributions: CachePadded::new(distributions),
        }
    }
}

impl LaneStats {
    pub fn add(&self, counter: Counter, amount: u64) {
        self.counters[counter as usize].add(amount);
    }

    pub fn get(&self, counter: Counter) -> u64 {
        self.counters[counter as usize].get()
    }

    pub fn record(&self, distribution: Distribution, value: u64) {
        let cells = &self.distributions[distribution as usize];
        cells[bucket(value)].add(1);
        cells[BUCKETS].add(value);
    }

    /// Adds what was recorded to `sum`.
    pub fn add_to(&self, sum: &mut Histogram, distribution: Distribution) {
        let cells = &self.distributions[distribution as usize];
        for (total, cell) in sum.buckets.iter_mut().zip(cells) {
            *total += cell.get();
        }
        sum.sum = sum.sum.wrapping_add(cells[BUCKETS].get());
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use super::*;

    #[test]
    fn counts_each_by_itself() {
        let stats = LaneStats::default();
        stats.add(Counter::IcmpSent, 2);
        stats.add(Counter::IcmpSent, 3);
        assert_eq!(stats.get(Counter::IcmpSent), 5);
        assert_eq!(stats.get(Counter::IcmpLimited), 0);
    }

    #[test]
    fn a_value_falls_into_the_first_bucket_that_holds_it() {
        let stats = LaneStats::default();
        let values = [0, 1, 2, 3, 4, 5, 1 << 30, (1 << 30) + 1, u64::MAX >> 1];
        for value in values {
            stats.record(Distribution::BatchNanos, value);
        }
        let mut sum = Histogram::default();
        stats.add_to(&mut sum, Distribution::BatchNanos);
        stats.add_to(&mut sum, Distribution::BatchPackets);
        let mut wanted = Histogram { sum: values.iter().sum(), ..Histogram::default() };
        for (bucket, count) in [(0, 2), (1, 1), (2, 2), (3, 1), (30, 1), (31, 2)] {
            wanted.buckets[bucket] = count;
        }
        assert_eq!(sum, wanted);
    }

    #[test]
    fn names_are_unique() {
        let names: HashSet<_> = Counter::ALL.iter().map(|counter| counter.name()).collect();
        assert_eq!(names.len(), Counter::ALL.len());
    }
}
