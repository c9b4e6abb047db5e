//! The ICMP errors that the engine, being a router, owes the sender of a packet that it drops.

use std::net::IpAddr;
use std::time::{Duration, Instant};

use crate::packet::{
    IPV4_HEADER_LEN, IPV6_HEADER_LEN, IpView, Ipv4View, Ipv6View, checksum, length_field, protocol,
    transport_checksum,
};

/// No error is longer: RFC 1812 4.3.2.3 for IPv4, the minimum MTU (RFC 4443 2.4) for IPv6.
pub const ICMP_ERROR_LEN_MAX: usize = 1280;
const ICMPV4_ERROR_LEN_MAX: usize = 576;
const ICMP_HEADER_LEN: usize = 8;
/// As the kernel's own (`net.ipv4.ip_default_ttl`).
const TTL: u8 = 64;

const _: () = assert!(ICMPV4_ERROR_LEN_MAX <= ICMP_ERROR_LEN_MAX);

/// Why a packet was dropped.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum IcmpError {
    /// No peer has a subnet with this destination.
    Unreachable,
    /// The time to live ran out here.
    TimeExceeded,
    /// The path to the peer carries inner packets of at most `mtu` bytes.
    TooBig { mtu: u32 },
}

impl IcmpError {
    /// Type and code in ICMP (RFC 792, RFC 1191).
    fn v4(self) -> (u8, u8) {
        match self {
            Self::Unreachable => (3, 0),
            Self::TooBig { .. } => (3, 4),
            Self::TimeExceeded => (11, 0),
        }
    }

    /// Type and code in ICMPv6 (RFC 4443).
    fn v6(self) -> (u8, u8) {
        match self {
            Self::Unreachable => (1, 0),
            Self::TooBig { .. } => (2, 0),
            Self::TimeExceeded => (3, 0),
        }
    }

    /// The last four bytes of the ICMP header: IPv4 has 16 bits for the MTU, IPv6 has 32.
    fn rest(self) -> [u8; 4] {
        match self {
            Self::TooBig { mtu } => mtu.to_be_bytes(),
            Self::Unreachable | Self::TimeExceeded => [0; 4],
        }
    }

    /// Writes the error about `packet`, from `source` to the packet's sender, to the start of
    /// `out`, and returns it. `None` where no error may be sent (RFC 1122 3.2.2, RFC 4443 2.4 e):
    /// about an ICMP error, a later fragment, to or from other than a single host, or where
    /// `source` is of the other family.
    pub fn about<'a>(
        self,
        packet: &[u8],
        source: IpAddr,
        out: &'a mut [u8; ICMP_ERROR_LEN_MAX],
    ) -> Option<&'a [u8]> {
        let view = IpView::check(packet).ok()?;
        if !is_one_host(view.source()) || !is_one_host(view.destination()) {
            return None;
        }
        match (view, source) {
            (IpView::V4(view), IpAddr::V4(_)) if may_answer_v4(&view) => {
                let quote = &packet
                    [..packet.len().min(ICMPV4_ERROR_LEN_MAX - IPV4_HEADER_LEN - ICMP_HEADER_LEN)];
                let message = self.message(self.v4(), quote, &mut out[IPV4_HEADER_LEN..]);
                let sum = checksum(&out[IPV4_HEADER_LEN..][..message]);
                out[IPV4_HEADER_LEN + 2..][..2].copy_from_slice(&sum.to_be_bytes());
                Some(write_ipv4(source, view.source().into(), message, out))
            }
            (IpView::V6(view), IpAddr::V6(_)) if may_answer_v6(&view) => {
                let quote = &packet
                    [..packet.len().min(ICMP_ERROR_LEN_MAX - IPV6_HEADER_LEN - ICMP_HEADER_LEN)];
                let message = self.message(self.v6(), quote, &mut out[IPV6_HEADER_LEN..]);
                let sum = transport_checksum(
                    source,
                    view.source().into(),
                    protocol::ICMPV6,
                    &out[IPV6_HEADER_LEN..][..message],
                );
                out[IPV6_HEADER_LEN + 2..][..2].copy_from_slice(&sum.to_be_bytes());
                Some(write_ipv6(source, view.source().into(), message, out))
            }
            _ => None,
        }
    }

    /// Header with an empty checksum, then the quote; returns their length.
    fn message(self, (kind, code): (u8, u8), quote: &[u8], out: &mut [u8]) -> usize {
        out[..4].copy_from_slice(&[kind, code, 0, 0]);
        out[4..ICMP_HEADER_LEN].copy_from_slice(&self.rest());
        out[ICMP_HEADER_LEN..][..quote.len()].copy_from_slice(quote);
        ICMP_HEADER_LEN + quote.len()
    }
}

fn write_ipv4(source: IpAddr, to: IpAddr, message: usize, out: &mut [u8]) -> &[u8] {
    let total = IPV4_HEADER_LEN + message;
    // DSCP CS6, internetwork control, as routers mark their errors (RFC 1812 4.3.2.5).
    out[..IPV4_HEADER_LEN].fill(0);
    out[..2].copy_from_slice(&[0x45, 0xc0]);
    out[8..10].copy_from_slice(&[TTL, protocol::ICMP]);
    out[2..4].copy_from_slice(&length_field(total));
    copy_address(source, &mut out[12..]);
    copy_address(to, &mut out[16..]);
    let sum = checksum(&out[..IPV4_HEADER_LEN]);
    out[10..12].copy_from_slice(&sum.to_be_bytes());
    &out[..total]
}

fn write_ipv6(source: IpAddr, to: IpAddr, message: usize, out: &mut [u8]) -> &[u8] {
    out[..8].copy_from_slice(&[0x60, 0, 0, 0, 0, 0, protocol::ICMPV6, TTL]);
    out[4..6].copy_from_slice(&length_field(message));
    copy_address(source, &mut out[8..]);
    copy_address(to, &mut out[24..]);
    &out[..IPV6_HEADER_LEN + message]
}

fn copy_address(address: IpAddr, out: &mut [u8]) {
    match address {
        IpAddr::V4(ip) => out[..4].copy_from_slice(&ip.octets()),
        IpAddr::V6(ip) => out[..16].copy_from_slice(&ip.octets()),
    }
}

fn is_one_host(address: IpAddr) -> bool {
    let broadcast = matches!(address, IpAddr::V4(ip) if ip.is_broadcast());
    !(broadcast || address.is_multicast() || address.is_unspecified() || address.is_loopback())
}

fn may_answer_v4(view: &Ipv4View<'_>) -> bool {
    // Echo, timestamp and their answers are no errors; everything unknown counts as one.
    let is_icmp_error = view.protocol() == protocol::ICMP
        && !matches!(view.payload().first(), Some(0 | 8 | 13 | 14));
    view.starts_datagram() && !is_icmp_error
}

fn may_answer_v6(view: &Ipv6View<'_>) -> bool {
    // Errors have the high bit of the type clear (RFC 4443 2.1). Behind extension headers an
    // error is not recognised; the rate limit bounds what that can cause.
    let is_icmp_error = view.next_header() == protocol::ICMPV6
        && view.payload().first().is_none_or(|kind| kind & 0x80 == 0);
    !is_icmp_error
}

/// Lets `BURST` errors through at once and `PER_SECOND` in the long run (RFC 4443 2.4 f asks for
/// a limit; the kernel's own default is of this order).
#[derive(Debug)]
pub struct RateLimit {
    /// The moment at which the bucket was, or will be, empty.
    empty_at: Instant,
}

/// A limit for each sender, as far as the last bits of their addresses tell them apart: none has to wait
/// for all the others' errors.
#[derive(Debug)]
pub(crate) struct RateLimits([RateLimit; Self::COUNT]);

impl RateLimits {
    const COUNT: usize = 64;

    pub(crate) fn new(now: Instant) -> Self {
        Self(std::array::from_fn(|_| RateLimit::new(now)))
    }

    pub(crate) fn of(&mut self, sender: IpAddr) -> &mut RateLimit {
        let last = match sender {
            IpAddr::V4(ip) => ip.octets()[3],
            IpAddr::V6(ip) => ip.octets()[15],
        };
        &mut self.0[usize::from(last) % Self::COUNT]
    }
}

impl RateLimit {
    const BURST: u32 = 50;
    const PER_SECOND: u32 = 100;
    const INTERVAL: Duration = Duration::from_millis(1000 / Self::PER_SECOND as u64);

    pub fn new(now: Instant) -> Self {
        let full = Self::INTERVAL * Self::BURST;
        Self { empty_at: now.checked_sub(full).unwrap_or(now) }
    }

    /// Whether one more error may be sent now.
    pub fn allow(&mut self, now: Instant) -> bool {
        let oldest = now.checked_sub(Self::INTERVAL * Self::BURST).unwrap_or(self.empty_at);
        let next = self.empty_at.max(oldest) + Self::INTERVAL;
        let allowed = next <= now;
        if allowed {
            self.empty_at = next;
        }
        allowed
    }
}

#[cfg(test)]
mod tests {
    use etherparse::{Icmpv4Type, Icmpv6Type, SlicedPacket, TransportSlice};

    use super::*;
    use crate::packet::tests::udp;

    fn about(error: IcmpError, packet: &[u8], source: &str) -> Option<Vec<u8>> {
        let mut out = [0xaa; ICMP_ERROR_LEN_MAX];
        error.about(packet, source.parse().unwrap(), &mut out).map(<[u8]>::to_vec)
    }

    #[test]
    fn v4_errors_parse_and_their_checksums_hold() {
        let packet = udp("10.42.1.2", "10.42.9.9", 1, &[7; 1000]);
        for (error, wanted) in [
            (IcmpError::Unreachable, (3, 0, [0, 0, 0, 0])),
            (IcmpError::TimeExceeded, (11, 0, [0, 0, 0, 0])),
            (IcmpError::TooBig { mtu: 1372 }, (3, 4, [0, 0, 0x05, 0x5c])),
        ] {
            let answer = about(error, &packet, "10.42.1.0").unwrap();
            assert_eq!(answer.len(), 576);
            let view = IpView::check(&answer).unwrap();
            assert!(view.header_is_intact());
            assert_eq!(view.source().to_string(), "10.42.1.0");
            assert_eq!(view.destination().to_string(), "10.42.1.2");
            assert_eq!(checksum(&answer[20..]), 0);
            assert_eq!((answer[20], answer[21], answer[24..28].try_into().unwrap()), wanted);
            assert_eq!(answer[28..], packet[..548]);
            let sliced = SlicedPacket::from_ip(&answer).unwrap();
            let Some(TransportSlice::Icmpv4(icmp)) = sliced.transport else { panic!("icmp") };
            assert!(!matches!(icmp.icmp_type(), Icmpv4Type::Unknown { .. }));
        }
    }

    #[test]
    fn v6_errors_parse_and_their_checksums_hold() {
        let packet = udp("fd00:1::2", "fd00:9::9", 1, &[7; 1400]);
        let answer = about(IcmpError::TooBig { mtu: 1400 }, &packet, "fd00:1::").unwrap();
        assert_eq!(answer.len(), 1280);
        let (from, to) = ("fd00:1::".parse().unwrap(), "fd00:1::2".parse().unwrap());
        assert_eq!(transport_checksum(from, to, protocol::ICMPV6, &answer[40..]), 0);
        let sliced = SlicedPacket::from_ip(&answer).unwrap();
        let Some(TransportSlice::Icmpv6(icmp)) = sliced.transport else { panic!("icmpv6") };
        assert_eq!(icmp.icmp_type(), Icmpv6Type::PacketTooBig { mtu: 1400 });
    }

    #[test]
    fn silence_where_an_error_would_harm() {
        let good = udp("10.42.1.2", "10.42.9.9", 9, b"x");
        let changed = |at: usize, value: u8| {
            let mut packet = good.clone();
            packet[at] = value;
            about(IcmpError::Unreachable, &packet, "10.42.1.0")
        };
        assert!(changed(8, 9).is_some());
        assert!(changed(7, 1).is_none(), "a later fragment");
        assert!(changed(16, 224).is_none(), "to a group");
        assert!(changed(12, 127).is_none(), "from loopback");
        assert!(about(IcmpError::Unreachable, &good, "fd00::1").is_none(), "other family");

        let time_exceeded = about(IcmpError::TimeExceeded, &good, "10.42.1.0").unwrap();
        assert!(about(IcmpError::Unreachable, &time_exceeded, "10.42.1.0").is_none());
        let mut echo = good.clone();
        (echo[9], echo[20]) = (protocol::ICMP, 8);
        assert!(about(IcmpError::Unreachable, &echo, "10.42.1.0").is_some(), "echo is no error");
    }

    #[test]
    fn the_rate_is_limited() {
        let start = Instant::now();
        let mut limit = RateLimit::new(start);
        let mut sent = |millis: u64| {
            let now = start + Duration::from_millis(millis);
            (0..1000).filter(|_| limit.allow(now)).count()
        };
        assert_eq!(sent(0), 50);
        assert_eq!(sent(0), 0);
        assert_eq!(sent(100), 10);
        assert_eq!(sent(1_000_000), 50, "a long silence saves up one burst, not more");
    }
}
