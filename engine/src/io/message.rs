//! What sendmsg(2) and recvmsg(2) carry beside the packets: addresses and control messages, laid
//! out as cmsg(3) has them.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::ptr;

use io_uring::types::RecvMsgOut;
use socket2::SockAddr;

use super::Received;
use crate::batch::{Outer, Transmit};
use crate::buffers::BufferId;
use crate::sys;

/// Bytes of payload that a UDP datagram, or several received as one, has at most.
pub(crate) const DATAGRAM_LEN_MAX: usize = 65_535;
/// Room for the address of whoever sent a datagram.
pub(crate) const SENDER_LEN: usize = size_of::<libc::sockaddr_in6>();
/// Room for what comes with a datagram: UDP_GRO and the traffic class.
pub(crate) const CONTROL_LEN: usize = 2 * size_of::<Control>();
/// Room in front of a datagram that io_uring has received for `io_uring_recvmsg_out`, the sender's
/// address and the control messages.
pub(crate) const DATAGRAM_HEADROOM: usize = RECVMSG_OUT_LEN + SENDER_LEN + CONTROL_LEN;
const RECVMSG_OUT_LEN: usize = 16;

/// One control message whose value has at most eight bytes.
#[repr(C)]
#[derive(Clone, Copy)]
struct Control {
    header: libc::cmsghdr,
    value: [u8; 8],
}

const HEADER_LEN: usize = size_of::<libc::cmsghdr>();
const _: () = assert!(size_of::<Control>() == 24, "CMSG_SPACE of up to eight bytes");

impl Control {
    fn new<const N: usize>(level: libc::c_int, kind: libc::c_int, bytes: [u8; N]) -> Self {
        let mut value = [0; 8];
        value[..N].copy_from_slice(&bytes);
        let header = libc::cmsghdr { cmsg_len: HEADER_LEN + N, cmsg_level: level, cmsg_type: kind };
        Self { header, value }
    }

    /// How the kernel is to cut a send (UDP_SEGMENT, udp(7)).
    #[expect(clippy::cast_possible_truncation, reason = "a segment is an IP packet")]
    fn segment(len: usize) -> Self {
        Self::new(libc::SOL_UDP, libc::UDP_SEGMENT, (len as u16).to_ne_bytes())
    }

    /// How the outer header is marked (IP_TOS, ip(7); IPV6_TCLASS, RFC 3542 6.5).
    fn traffic_class(class: u8, is_v6: bool) -> Self {
        let (level, kind) = if is_v6 {
            (libc::IPPROTO_IPV6, libc::IPV6_TCLASS)
        } else {
            (libc::IPPROTO_IP, libc::IP_TOS)
        };
        Self::new(level, kind, libc::c_int::from(class).to_ne_bytes())
    }
}

/// Everything that a send needs to have in memory while it runs, but the packets.
pub(crate) struct SendMessage {
    header: libc::msghdr,
    part: libc::iovec,
    peer: SockAddr,
    control: [Control; 2],
}

impl SendMessage {
    pub(crate) fn new() -> Self {
        Self {
            header: sys::empty_msghdr(),
            part: libc::iovec { iov_base: ptr::null_mut(), iov_len: 0 },
            peer: SockAddr::from(std::net::SocketAddr::from(([0; 4], 0))),
            control: [Control::new(0, 0, []); 2],
        }
    }

    /// The message that sends the packets, which begin at `start`. It points into `self` and to
    /// the packets, so it is good until either moves.
    pub(crate) fn fill(&mut self, start: *mut u8, transmit: &Transmit) -> *const libc::msghdr {
        let Outer { peer, traffic_class, .. } = transmit.outer;
        self.peer = peer.into();
        self.part = libc::iovec { iov_base: start.cast(), iov_len: transmit.packets.len() };
        let mut controls = 0;
        // One packet goes without: there is nothing to cut, and nothing that could be refused.
        if transmit.packets.len() > transmit.segment_len {
            self.control[controls] = Control::segment(transmit.segment_len);
            controls += 1;
        }
        if traffic_class != 0 {
            self.control[controls] = Control::traffic_class(traffic_class, peer.is_ipv6());
            controls += 1;
        }
        self.header.msg_name = self.peer.as_ptr().cast_mut().cast();
        self.header.msg_namelen = self.peer.len();
        self.header.msg_iov = &raw mut self.part;
        self.header.msg_iovlen = 1;
        self.header.msg_control =
            if controls == 0 { ptr::null_mut() } else { self.control.as_mut_ptr().cast() };
        self.header.msg_controllen = controls * size_of::<Control>();
        &raw const self.header
    }
}

/// Reads a sockaddr_in or sockaddr_in6 (ip(7), ipv6(7)).
pub(crate) fn sender(name: &[u8]) -> Option<IpAddr> {
    let family = u16::from_ne_bytes(*name.first_chunk()?);
    let address = match i32::from(family) {
        libc::AF_INET => IpAddr::V4(Ipv4Addr::from(*name.get(4..)?.first_chunk::<4>()?)),
        libc::AF_INET6 => IpAddr::V6(Ipv6Addr::from(*name.get(8..)?.first_chunk::<16>()?)),
        _ => return None,
    };
    Some(address.to_canonical())
}

/// What control messages tell of a datagram.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct Marks {
    /// Bytes of each datagram but the last, where the kernel has joined several (UDP_GRO, udp(7)).
    pub(crate) segment_len: Option<usize>,
    /// IP_TOS comes as one byte, IPV6_TCLASS as an int.
    pub(crate) traffic_class: u8,
}

impl Marks {
    /// Reads them one behind the other, to the end or to the first that makes no sense.
    pub(crate) fn parse(mut control: &[u8]) -> Self {
        let mut marks = Self::default();
        while let Some((level, kind, value, rest)) = split_first(control) {
            let number = match value {
                [byte] => i32::from(*byte),
                _ => value.first_chunk().map_or(0, |bytes| i32::from_ne_bytes(*bytes)),
            };
            match (level, kind) {
                (libc::SOL_UDP, libc::UDP_GRO) => {
                    marks.segment_len = usize::try_from(number).ok().filter(|len| *len > 0);
                }
                (libc::IPPROTO_IP, libc::IP_TOS) | (libc::IPPROTO_IPV6, libc::IPV6_TCLASS) => {
                    marks.traffic_class = u8::try_from(number).unwrap_or(0);
                }
                _ => {}
            }
            control = rest;
        }
        marks
    }
}

/// Level, type and value of the first message, and what lies behind it.
fn split_first(control: &[u8]) -> Option<(libc::c_int, libc::c_int, &[u8], &[u8])> {
    let len = usize::from_ne_bytes(*control.first_chunk()?);
    let level = i32::from_ne_bytes(*control.get(8..)?.first_chunk()?);
    let kind = i32::from_ne_bytes(*control.get(12..)?.first_chunk()?);
    let value = control.get(HEADER_LEN..len)?;
    let rest = control.get(len.next_multiple_of(size_of::<usize>())..).unwrap_or(&[]);
    Some((level, kind, value, rest))
}

const _: () = assert!(HEADER_LEN == 16 && size_of::<usize>() == 8, "a 64-bit machine");

/// What io_uring has received into a buffer; receives are shaped by `shape`.
pub(crate) fn from_udp(buffer: BufferId, bytes: &[u8], shape: &libc::msghdr) -> Received {
    let message = RecvMsgOut::parse(bytes, shape).ok();
    let sender = message.as_ref().and_then(|message| sender(message.name_data()));
    let marks = message.map(|it| Marks::parse(it.control_data())).unwrap_or_default();
    let packets = DATAGRAM_HEADROOM.min(bytes.len())..bytes.len();
    Received {
        buffer,
        segment_len: marks.segment_len.unwrap_or(packets.len()),
        packets,
        sender,
        traffic_class: marks.traffic_class,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn bytes<const N: usize>(level: i32, kind: i32, value: [u8; N]) -> Vec<u8> {
        let mut bytes = (HEADER_LEN + N).to_ne_bytes().to_vec();
        bytes.extend(level.to_ne_bytes());
        bytes.extend(kind.to_ne_bytes());
        bytes.extend(value);
        bytes.resize(bytes.len().next_multiple_of(8), 0);
        bytes
    }

    #[test]
    fn marks_are_read_in_any_order_and_odd_bytes_are_not() {
        let gro = bytes(libc::SOL_UDP, libc::UDP_GRO, 1472i32.to_ne_bytes());
        let tos = bytes(libc::IPPROTO_IP, libc::IP_TOS, [0x2e << 2 | 1]);
        let class = bytes(libc::IPPROTO_IPV6, libc::IPV6_TCLASS, 3i32.to_ne_bytes());
        let marks = |parts: &[&[u8]]| Marks::parse(&parts.concat());
        let both = Marks { segment_len: Some(1472), traffic_class: 0xb9 };
        assert_eq!(marks(&[&gro, &tos]), both);
        assert_eq!(marks(&[&tos, &gro]), both);
        assert_eq!(marks(&[&class]).traffic_class, 3);
        assert_eq!(marks(&[]), Marks::default());
        assert_eq!(marks(&[&gro[..15]]), Marks::default());
        assert_eq!(marks(&[&[0xff; 40]]), Marks::default());
        assert_eq!(marks(&[&[0; 40]]), Marks::default());
    }

    #[test]
    fn senders_of_both_families() {
        for text in ["192.0.2.7:8285", "[2001:db8::7]:8285"] {
            let address: std::net::SocketAddr = text.parse().unwrap();
            let raw = SockAddr::from(address);
            let mut name = [0; SENDER_LEN];
            match address {
                std::net::SocketAddr::V4(v4) => name[4..8].copy_from_slice(&v4.ip().octets()),
                std::net::SocketAddr::V6(v6) => name[8..24].copy_from_slice(&v6.ip().octets()),
            }
            name[..2].copy_from_slice(&raw.family().to_ne_bytes());
            assert_eq!(sender(&name), Some(address.ip()));
        }
        assert_eq!(sender(&[]), None);
        assert_eq!(sender(&[0; SENDER_LEN]), None);
    }
}
