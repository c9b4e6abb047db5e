//! Byte views of IP packets: one check of the lengths, after which no getter can fail.
//!
//! A view proves that the header is whole and that the packet ends where the header says. It reads
//! nothing behind the IP header.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

/// Length of an IPv4 header without options (RFC 791).
pub const IPV4_HEADER_LEN: usize = 20;
/// Length of the fixed IPv6 header (RFC 8200).
pub const IPV6_HEADER_LEN: usize = 40;

/// Protocol numbers that the engine looks at (IANA).
pub mod protocol {
    pub const ICMP: u8 = 1;
    pub const TCP: u8 = 6;
    pub const UDP: u8 = 17;
    pub const ICMPV6: u8 = 58;
}

/// The bytes are no IP packet: too short, an unknown version, or a length field that lies.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Malformed;

/// An IP packet of either version.
#[derive(Debug, Clone, Copy)]
pub enum IpView<'a> {
    V4(Ipv4View<'a>),
    V6(Ipv6View<'a>),
}

impl<'a> IpView<'a> {
    /// Chooses the version by the first nibble.
    ///
    /// # Errors
    /// See [`Ipv4View::check`] and [`Ipv6View::check`].
    pub fn check(packet: &'a [u8]) -> Result<Self, Malformed> {
        match packet.first().map(|byte| byte >> 4) {
            Some(4) => Ipv4View::check(packet).map(Self::V4),
            Some(6) => Ipv6View::check(packet).map(Self::V6),
            _ => Err(Malformed),
        }
    }

    pub fn source(&self) -> IpAddr {
        match self {
            Self::V4(view) => view.source().into(),
            Self::V6(view) => view.source().into(),
        }
    }

    pub fn destination(&self) -> IpAddr {
        match self {
            Self::V4(view) => view.destination().into(),
            Self::V6(view) => view.destination().into(),
        }
    }

    /// Time to live, or hop limit.
    pub fn ttl(&self) -> u8 {
        match self {
            Self::V4(view) => view.ttl(),
            Self::V6(view) => view.hop_limit(),
        }
    }

    /// DSCP and ECN (RFC 2474, RFC 3168).
    pub fn traffic_class(&self) -> u8 {
        match self {
            Self::V4(view) => view.0[1],
            Self::V6(view) => view.0[0] << 4 | view.0[1] >> 4,
        }
    }

    /// A number that all packets of one flow share: of addresses, protocol and, unless the packet
    /// is a fragment, ports.
    pub fn flow_hash(&self) -> u32 {
        let (addresses, number, ports) = match self {
            Self::V4(view) => {
                let is_fragment = be16(view.0, 6) & 0x3fff != 0;
                let ports = view.payload().first_chunk().filter(|_| !is_fragment);
                (&view.0[12..20], view.protocol(), ports)
            }
            Self::V6(view) => (&view.0[8..40], view.next_header(), view.payload().first_chunk()),
        };
        let has_ports = matches!(number, protocol::TCP | protocol::UDP);
        let ports = ports.filter(|_| has_ports).map_or(0, |ports| u32::from_ne_bytes(*ports));
        let words = addresses.chunks_exact(4).filter_map(<[u8]>::first_chunk);
        let words = words.map(|word| u32::from_ne_bytes(*word));
        // Multiplicative hashing (Knuth 6.4); the high bits are the good ones.
        let hash = words
            .chain([ports, number.into()])
            .fold(0u32, |hash, word| (hash.rotate_left(5) ^ word).wrapping_mul(0x9e37_79b1));
        hash ^ hash >> 16
    }

    /// Whether the header is as its sender made it; IPv6 headers carry no checksum.
    pub fn header_is_intact(&self) -> bool {
        match self {
            Self::V4(view) => checksum(view.header()) == 0,
            Self::V6(_) => true,
        }
    }

    /// Whether a router may not cut this packet in pieces (always so in IPv6).
    pub fn dont_fragment(&self) -> bool {
        match self {
            Self::V4(view) => view.dont_fragment(),
            Self::V6(_) => true,
        }
    }
}

/// An IPv4 packet.
#[derive(Debug, Clone, Copy)]
pub struct Ipv4View<'a>(&'a [u8]);

impl<'a> Ipv4View<'a> {
    /// # Errors
    /// The version is not 4, the header is cut short or shorter than 20 bytes, or the total length
    /// is not that of `packet`.
    pub fn check(packet: &'a [u8]) -> Result<Self, Malformed> {
        if packet.len() < IPV4_HEADER_LEN || packet[0] >> 4 != 4 {
            return Err(Malformed);
        }
        let view = Self(packet);
        let header_fits = (IPV4_HEADER_LEN..=packet.len()).contains(&view.header_len());
        let length_is_true = usize::from(be16(packet, 2)) == packet.len();
        (header_fits && length_is_true).then_some(view).ok_or(Malformed)
    }

    pub fn header_len(&self) -> usize {
        usize::from(self.0[0] & 0xf) * 4
    }

    /// The header with its options.
    pub fn header(&self) -> &'a [u8] {
        &self.0[..self.header_len()]
    }

    pub fn payload(&self) -> &'a [u8] {
        &self.0[self.header_len()..]
    }

    pub fn source(&self) -> Ipv4Addr {
        Ipv4Addr::from(array(self.0, 12))
    }

    pub fn destination(&self) -> Ipv4Addr {
        Ipv4Addr::from(array(self.0, 16))
    }

    pub fn ttl(&self) -> u8 {
        self.0[8]
    }

    pub fn protocol(&self) -> u8 {
        self.0[9]
    }

    pub fn dont_fragment(&self) -> bool {
        self.0[6] & 0x40 != 0
    }

    /// Whether this is a whole packet or the first of its fragments.
    pub fn starts_datagram(&self) -> bool {
        be16(self.0, 6) & 0x1fff == 0
    }
}

/// An IPv6 packet.
#[derive(Debug, Clone, Copy)]
pub struct Ipv6View<'a>(&'a [u8]);

impl<'a> Ipv6View<'a> {
    /// # Errors
    /// The version is not 6, the header is cut short, or the payload length is not that of
    /// `packet` (so jumbograms, RFC 2675, are refused too).
    pub fn check(packet: &'a [u8]) -> Result<Self, Malformed> {
        let is_v6 = packet.len() >= IPV6_HEADER_LEN && packet[0] >> 4 == 6;
        let length_is_true =
            is_v6 && usize::from(be16(packet, 4)) + IPV6_HEADER_LEN == packet.len();
        length_is_true.then_some(Self(packet)).ok_or(Malformed)
    }

    /// What follows the fixed header, extension headers included.
    pub fn payload(&self) -> &'a [u8] {
        &self.0[IPV6_HEADER_LEN..]
    }

    pub fn source(&self) -> Ipv6Addr {
        Ipv6Addr::from(array(self.0, 8))
    }

    pub fn destination(&self) -> Ipv6Addr {
        Ipv6Addr::from(array(self.0, 24))
    }

    pub fn hop_limit(&self) -> u8 {
        self.0[7]
    }

    pub fn next_header(&self) -> u8 {
        self.0[6]
    }
}

/// Takes one off the time to live of a packet that a view has checked; IPv4's checksum follows by
/// the difference alone (RFC 1624, equation 3). The caller has seen that it is not zero.
pub fn decrement_ttl(packet: &mut [u8]) {
    if packet[0] >> 4 == 6 {
        packet[7] -= 1;
        return;
    }
    let before = be16(packet, 8);
    let after = before - 0x0100;
    packet[8] -= 1;
    let sum = u32::from(!be16(packet, 10)) + u32::from(!before) + u32::from(after);
    packet[10..12].copy_from_slice(&(!fold(u64::from(sum))).to_be_bytes());
}

/// Puts another traffic class into a packet that a view has checked; IPv4's checksum follows, as
/// in [`decrement_ttl`].
pub(crate) fn set_traffic_class(packet: &mut [u8], class: u8) {
    if packet[0] >> 4 == 6 {
        packet[0] = packet[0] & 0xf0 | class >> 4;
        packet[1] = packet[1] & 0x0f | class << 4;
        return;
    }
    let before = be16(packet, 0);
    packet[1] = class;
    let after = be16(packet, 0);
    let sum = u32::from(!be16(packet, 10)) + u32::from(!before) + u32::from(after);
    packet[10..12].copy_from_slice(&(!fold(u64::from(sum))).to_be_bytes());
}

/// The Internet checksum (RFC 1071). Zero over data that carries its own checksum intact.
pub fn checksum(data: &[u8]) -> u16 {
    !fold(sum(data))
}

/// The checksum of a transport message under its pseudo-header (RFC 9293 3.1, RFC 8200 8.1).
pub fn transport_checksum(
    source: IpAddr,
    destination: IpAddr,
    protocol: u8,
    message: &[u8],
) -> u16 {
    let address = |ip: IpAddr| match ip {
        IpAddr::V4(ip) => sum(&ip.octets()),
        IpAddr::V6(ip) => sum(&ip.octets()),
    };
    let addresses = address(source) + address(destination);
    !fold(addresses + u64::from(protocol) + message.len() as u64 + sum(message))
}

/// The folded sum of the pseudo-header of a transport message of `len` bytes, between these
/// addresses, one behind the other: what the checksum field holds where the rest is left to a
/// device.
pub(crate) fn pseudo_header_sum(addresses: &[u8], protocol: u8, len: usize) -> u16 {
    fold(sum(addresses) + u64::from(protocol) + len as u64)
}

/// The same sum for a message of another length.
pub(crate) fn with_other_length(pseudo_sum: u16, before: usize, after: usize) -> u16 {
    let before = u16::from_be_bytes(length_field(before));
    fold(u64::from(pseudo_sum) + u64::from(!before) + after as u64)
}

/// A length in a header of 16 bits.
pub(crate) fn length_field(len: usize) -> [u8; 2] {
    #[expect(clippy::cast_possible_truncation, reason = "no part of an IP packet is longer")]
    let len = len as u16;
    len.to_be_bytes()
}

/// The sum of 16-bit words is the same in either byte order but for a swap at the end (RFC 1071
/// 2 B), so it runs over larger words in the machine's own.
fn sum(data: &[u8]) -> u64 {
    let words = data.chunks_exact(4);
    let mut rest = [0; 4];
    rest[..words.remainder().len()].copy_from_slice(words.remainder());
    let word =
        |bytes: &[u8]| u64::from(u32::from_ne_bytes([bytes[0], bytes[1], bytes[2], bytes[3]]));
    let total = words.map(word).sum::<u64>() + word(&rest);
    u16::from_be(fold(total)).into()
}

fn fold(mut sum: u64) -> u16 {
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    #[expect(clippy::cast_possible_truncation, reason = "the loop ends at 16 bits")]
    let folded = sum as u16;
    folded
}

pub(crate) fn be16(bytes: &[u8], at: usize) -> u16 {
    u16::from_be_bytes([bytes[at], bytes[at + 1]])
}

fn array<const N: usize>(bytes: &[u8], at: usize) -> [u8; N] {
    let mut out = [0; N];
    out.copy_from_slice(&bytes[at..at + N]);
    out
}

#[cfg(test)]
pub(crate) mod tests {
    use etherparse::PacketBuilder;
    use proptest::prelude::*;

    use super::*;

    /// A UDP packet as etherparse makes it, with a valid checksum everywhere.
    pub(crate) fn udp(source: &str, destination: &str, ttl: u8, payload: &[u8]) -> Vec<u8> {
        let builder = match (source.parse().unwrap(), destination.parse().unwrap()) {
            (IpAddr::V4(from), IpAddr::V4(to)) => {
                PacketBuilder::ipv4(from.octets(), to.octets(), ttl)
            }
            (IpAddr::V6(from), IpAddr::V6(to)) => {
                PacketBuilder::ipv6(from.octets(), to.octets(), ttl)
            }
            _ => panic!("one family"),
        };
        let mut packet = Vec::new();
        builder.udp(4000, 5000).write(&mut packet, payload).unwrap();
        packet
    }

    #[test]
    fn reads_both_families() {
        for (from, to) in [("10.1.2.3", "10.9.8.7"), ("fd00::1", "fd00::2")] {
            let packet = udp(from, to, 7, b"hello");
            let view = IpView::check(&packet).unwrap();
            assert_eq!(view.source().to_string(), from);
            assert_eq!(view.destination().to_string(), to);
            assert_eq!(view.ttl(), 7);
            assert!(view.header_is_intact());
        }
    }

    #[test]
    fn refuses_headers_that_lie() {
        let good = udp("10.1.2.3", "10.9.8.7", 7, b"hello");
        let changed = |at: usize, value: u8| {
            let mut packet = good.clone();
            packet[at] = value;
            IpView::check(&packet).is_err()
        };
        assert!(changed(0, 0x44), "header shorter than 20 bytes");
        assert!(changed(0, 0x4f), "header longer than the packet");
        assert!(changed(0, 0x55), "unknown version");
        assert!(changed(3, good[3] + 1), "total length beyond the end");
        assert!(changed(3, good[3] - 1), "bytes behind the total length");
        assert!(IpView::check(&good[..19]).is_err());
        assert!(IpView::check(&[]).is_err());

        let mut v6 = udp("fd00::1", "fd00::2", 7, b"hello");
        v6[5] += 1;
        assert!(IpView::check(&v6).is_err());
        assert!(IpView::check(&v6[..39]).is_err());
    }

    #[test]
    fn a_changed_header_is_not_intact() {
        let mut packet = udp("10.1.2.3", "10.9.8.7", 7, b"hello");
        packet[12] ^= 1;
        assert!(!IpView::check(&packet).unwrap().header_is_intact());
    }

    #[test]
    fn checksums_equal_etherparse() {
        for (from, to) in [("10.1.2.3", "10.9.8.7"), ("fd00::1", "fd00::2")] {
            let packet = udp(from, to, 7, b"odd");
            let headers = packet.len() - 3 - 8;
            let message = &packet[headers..];
            let (from, to) = (from.parse().unwrap(), to.parse().unwrap());
            assert_eq!(transport_checksum(from, to, 17, message), 0);
        }
    }

    proptest! {
        /// As RFC 1071 has it, word for word.
        #[test]
        fn the_checksum_is_the_sum_of_its_words(
            data in proptest::collection::vec(prop_oneof![any::<u8>(), Just(0xff)], 0..3000),
        ) {
            let mut sum = 0u32;
            for word in data.chunks(2) {
                sum += u32::from(word[0]) << 8 | u32::from(*word.get(1).unwrap_or(&0));
                sum = (sum & 0xffff) + (sum >> 16);
            }
            prop_assert_eq!(u32::from(!checksum(&data)), sum);
        }

        #[test]
        fn arbitrary_bytes_never_panic(mut bytes in proptest::collection::vec(any::<u8>(), 0..128)) {
            if let Ok(view) = IpView::check(&bytes) {
                let _ = (view.source(), view.destination(), view.header_is_intact());
                match view {
                    IpView::V4(view) => { let _ = (view.payload(), view.starts_datagram()); }
                    IpView::V6(view) => { let _ = (view.payload(), view.next_header()); }
                }
                if view.ttl() > 0 {
                    decrement_ttl(&mut bytes);
                }
            }
        }

        /// Also for every value that the checksum can have: `id` walks through all of them.
        #[test]
        fn the_checksum_follows_the_ttl(ttl in 1u8.., id in any::<u16>()) {
            let mut packet = udp("10.1.2.3", "10.9.8.7", ttl, b"x");
            packet[4..6].copy_from_slice(&id.to_be_bytes());
            packet[10..12].fill(0);
            let fresh = checksum(&packet[..20]);
            packet[10..12].copy_from_slice(&fresh.to_be_bytes());
            decrement_ttl(&mut packet);
            let view = Ipv4View::check(&packet).unwrap();
            prop_assert_eq!(view.ttl(), ttl - 1);
            prop_assert_eq!(checksum(view.header()), 0);
        }
    }
}
