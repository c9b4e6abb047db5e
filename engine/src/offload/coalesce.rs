//! Neighbours of one TCP flow into one super-packet, in place: the payloads of the later ones move
//! up behind the first one's.
//!
//! Only what [`super::segment`] would undo exactly is joined, by the rules of the kernel's own
//! receive offload (net/ipv4/tcp_offload.c): same flow, same headers but for the sequence, the id
//! and PSH, contiguous sequence, equal lengths but for the last. The inner checksum is verified
//! first, since the kernel trusts that of a super-packet.

use std::net::IpAddr;

use super::{Gso, VirtioNetHdr, WHOLE};
use crate::packet::{
    IPV4_HEADER_LEN, IPV6_HEADER_LEN, IpView, be16, checksum, length_field, protocol,
    pseudo_header_sum, transport_checksum,
};

/// TCP header without options (RFC 9293 3.1), and what of its flags a joined segment may have.
const TCP_HEADER_LEN: usize = 20;
const PSH: u8 = 0x08;
const ACK: u8 = 0x10;
/// No IP packet is longer.
const PACKET_LEN_MAX: usize = 65_535;

/// Packets that become one write. It begins as one packet; the caller keeps the bytes.
#[derive(Debug)]
pub struct Run {
    /// Bytes of the packet so far.
    len: usize,
    /// Packets in it.
    count: usize,
    /// What the next one must look like; `None` once no other may join.
    open: Option<Segment>,
    /// Payload bytes of the first packet, and so of all but the last.
    segment_len: usize,
}

/// A TCP segment that may be joined with others.
#[derive(Debug, Clone, Copy)]
struct Segment {
    ip_header_len: usize,
    headers_len: usize,
    payload_len: usize,
    /// IPv4's id; 0 for IPv6.
    id: u16,
    sequence: u32,
    push: bool,
}

impl Run {
    /// A run of one packet, which its view has checked.
    pub fn new(packet: &[u8]) -> Self {
        let segment = Segment::parse(packet);
        Self {
            len: packet.len(),
            count: 1,
            open: segment.filter(|segment| !segment.push),
            segment_len: segment.map_or(0, |segment| segment.payload_len),
        }
    }

    /// Bytes of the packet so far.
    pub fn byte_len(&self) -> usize {
        self.len
    }

    /// Packets in it, at least one.
    pub fn count(&self) -> usize {
        self.count
    }

    /// Joins the packet that lies at `at` in `area`, at the beginning of which this run lies. Says
    /// whether it did; if not, nothing has changed.
    pub fn join(&mut self, area: &mut [u8], at: usize) -> bool {
        let Some(first) = self.open else { return false };
        let (ours, next) = area.split_at(at);
        let Some(segment) = Segment::parse(next) else { return false };
        if !first.is_followed_by(ours, &segment, next)
            || segment.payload_len > self.segment_len
            || self.len + segment.payload_len > PACKET_LEN_MAX
        {
            return false;
        }
        let payload = at + segment.headers_len;
        area.copy_within(payload..payload + segment.payload_len, self.len);
        self.len += segment.payload_len;
        self.count += 1;
        if segment.push {
            area[first.ip_header_len + 13] |= PSH;
        }
        let ends_here = segment.push || segment.payload_len < self.segment_len;
        self.open = (!ends_here).then_some(Segment {
            id: segment.id,
            sequence: segment.sequence,
            payload_len: segment.payload_len,
            ..first
        });
        true
    }

    /// Makes the headers those of the whole run, of which `packet` holds just the bytes, and
    /// returns the virtio header to stand in front. A packet that nothing has joined stays as it
    /// is, for the kernel to verify.
    pub fn finish(&self, packet: &mut [u8]) -> [u8; VirtioNetHdr::LEN] {
        if self.count == 1 {
            return WHOLE;
        }
        let is_v6 = packet[0] >> 4 == 6;
        let start = if is_v6 { IPV6_HEADER_LEN } else { IPV4_HEADER_LEN };
        if is_v6 {
            packet[4..6].copy_from_slice(&length_field(self.len - IPV6_HEADER_LEN));
        } else {
            packet[2..4].copy_from_slice(&length_field(self.len));
            packet[10..12].fill(0);
            let sum = checksum(&packet[..IPV4_HEADER_LEN]);
            packet[10..12].copy_from_slice(&sum.to_be_bytes());
        }
        let (source, destination) = addresses(packet, is_v6);
        let sum = pseudo_header_sum(source, destination, protocol::TCP, self.len - start);
        packet[start + 16..start + 18].copy_from_slice(&sum.to_be_bytes());
        let headers_len = start + usize::from(packet[start + 12] >> 4) * 4;
        VirtioNetHdr {
            needs_checksum: true,
            gso: if is_v6 { Gso::Tcp6 } else { Gso::Tcp4 },
            header_len: u16::from_be_bytes(length_field(headers_len)),
            segment_len: u16::from_be_bytes(length_field(self.segment_len)),
            checksum_start: u16::from_be_bytes(length_field(start)),
            checksum_offset: 16,
        }
        .to_bytes()
    }
}

impl Segment {
    /// `None` where the packet is none, or must not be joined with others: IP options or fragments,
    /// flags other than ACK and PSH, no payload, a wrong checksum.
    fn parse(packet: &[u8]) -> Option<Self> {
        let view = IpView::check(packet).ok()?;
        let (ip_header_len, next, id) = match &view {
            IpView::V4(view) => {
                let plain = view.header_len() == IPV4_HEADER_LEN && be16(packet, 6) & 0x3fff == 0;
                (plain.then_some(IPV4_HEADER_LEN)?, view.protocol(), be16(packet, 4))
            }
            IpView::V6(view) => (IPV6_HEADER_LEN, view.next_header(), 0),
        };
        let tcp = &packet[ip_header_len..];
        if next != protocol::TCP || tcp.len() < TCP_HEADER_LEN {
            return None;
        }
        let tcp_header_len = usize::from(tcp[12] >> 4) * 4;
        let payload_len = tcp.len().checked_sub(tcp_header_len)?;
        let joinable = tcp_header_len >= TCP_HEADER_LEN && payload_len > 0 && tcp[13] & !PSH == ACK;
        let (source, destination) = (view.source(), view.destination());
        if !joinable || transport_checksum(source, destination, protocol::TCP, tcp) != 0 {
            return None;
        }
        Some(Self {
            ip_header_len,
            headers_len: ip_header_len + tcp_header_len,
            payload_len,
            id,
            sequence: u32::from_be_bytes([tcp[4], tcp[5], tcp[6], tcp[7]]),
            push: tcp[13] & PSH != 0,
        })
    }

    /// Whether `next`, in the packet `theirs`, continues this one, the headers of which are those
    /// of the packet `ours`.
    fn is_followed_by(&self, ours: &[u8], next: &Self, theirs: &[u8]) -> bool {
        let is_v6 = self.ip_header_len == IPV6_HEADER_LEN;
        #[expect(clippy::cast_possible_truncation, reason = "a payload is below 64 KiB")]
        let sequence = self.sequence.wrapping_add(self.payload_len as u32);
        let in_order = next.sequence == sequence && (is_v6 || next.id == self.id.wrapping_add(1));
        let same = |range: std::ops::Range<usize>| ours[range.clone()] == theirs[range];
        let same_ip = if is_v6 {
            same(0..4) && same(6..IPV6_HEADER_LEN)
        } else {
            // All but length, id and checksum.
            same(0..2) && same(6..10) && same(12..IPV4_HEADER_LEN)
        };
        let tcp = self.ip_header_len;
        in_order
            && next.headers_len == self.headers_len
            && ours[0] >> 4 == theirs[0] >> 4
            && same_ip
            // Ports; acknowledgement and data offset; window; urgent pointer and options.
            && same(tcp..tcp + 4)
            && same(tcp + 8..tcp + 13)
            && same(tcp + 14..tcp + 16)
            && same(tcp + 18..self.headers_len)
    }
}

fn addresses(packet: &[u8], is_v6: bool) -> (IpAddr, IpAddr) {
    fn array<const N: usize>(bytes: &[u8]) -> [u8; N] {
        let mut out = [0; N];
        out.copy_from_slice(&bytes[..N]);
        out
    }
    if is_v6 {
        (array::<16>(&packet[8..]).into(), array::<16>(&packet[24..]).into())
    } else {
        (array::<4>(&packet[12..]).into(), array::<4>(&packet[16..]).into())
    }
}

#[cfg(test)]
mod tests {
    use etherparse::PacketBuilder;
    use proptest::prelude::*;

    use super::super::segment::Cut;
    use super::*;

    #[derive(Debug, Clone, Copy)]
    struct Shape {
        ipv6: bool,
        port: u16,
        sequence: u32,
        id: u16,
        len: usize,
        flags: u8,
        window: u16,
    }

    fn packet(it: Shape) -> Vec<u8> {
        let ip = if it.ipv6 {
            PacketBuilder::ipv6([0xfd; 16], [0xfe; 16], 62)
        } else {
            PacketBuilder::ipv4([10, 42, 1, 2], [10, 42, 2, 2], 62)
        };
        let mut packet = Vec::new();
        let payload: Vec<u8> =
            (0..it.len).map(|at| u8::try_from((at * 7 + it.len) % 256).unwrap()).collect();
        let tcp = ip.tcp(it.port, 80, it.sequence, it.window);
        tcp.write(&mut packet, &payload).unwrap();
        let start = if it.ipv6 { 40 } else { 20 };
        packet[start + 13] = it.flags;
        if !it.ipv6 {
            packet[4..6].copy_from_slice(&it.id.to_be_bytes());
            packet[10..12].fill(0);
            let sum = checksum(&packet[..20]);
            packet[10..12].copy_from_slice(&sum.to_be_bytes());
        }
        packet[start + 16..start + 18].fill(0);
        let (source, destination) = addresses(&packet, it.ipv6);
        let sum = transport_checksum(source, destination, protocol::TCP, &packet[start..]);
        packet[start + 16..start + 18].copy_from_slice(&sum.to_be_bytes());
        packet
    }

    /// What the worker does: packets one behind the other, joined where they may be, and written.
    fn coalesce(packets: &[Vec<u8>]) -> Vec<(usize, [u8; VirtioNetHdr::LEN], Vec<u8>)> {
        let mut area = packets.concat();
        let (mut out, mut run, mut at) = (Vec::new(), None::<(usize, Run)>, 0);
        for packet in packets {
            let end = at + packet.len();
            let joined = match &mut run {
                Some((start, run)) => run.join(&mut area[*start..end], at - *start),
                None => false,
            };
            if !joined {
                out.extend(run.replace((at, Run::new(&area[at..end]))));
            }
            at = end;
        }
        out.extend(run);
        out.into_iter()
            .map(|(start, run)| {
                let packet = &mut area[start..start + run.byte_len()];
                (run.count(), run.finish(packet), packet.to_vec())
            })
            .collect()
    }

    /// What the kernel would make of a write again.
    fn segments(header: &[u8; VirtioNetHdr::LEN], packet: &[u8]) -> Vec<Vec<u8>> {
        let header = VirtioNetHdr::parse(header).unwrap();
        let Some(cut) = Cut::plan(&header, packet).unwrap() else { return vec![packet.to_vec()] };
        (0..cut.count())
            .map(|number| {
                let mut out = vec![0; cut.len_of(number)];
                cut.write(packet, number, &mut out);
                out
            })
            .collect()
    }

    /// Mostly what continues the packet before, sometimes not.
    fn flows() -> impl Strategy<Value = Vec<Vec<u8>>> {
        let step = (0u8..12, prop_oneof![4 => Just(100usize), 1 => 0usize..120], any::<bool>());
        (any::<(bool, u32, u16)>(), proptest::collection::vec(step, 1..30)).prop_map(
            |((ipv6, mut sequence, mut id), steps)| {
                let mut packets = Vec::new();
                for (oddity, len, push) in steps {
                    let mut it = Shape {
                        ipv6,
                        port: 4000,
                        sequence,
                        id,
                        len,
                        flags: if push && oddity > 8 { ACK | PSH } else { ACK },
                        window: 500,
                    };
                    match oddity {
                        0 => it.port = 4001,
                        1 => it.sequence = it.sequence.wrapping_add(1),
                        2 => it.flags = 0x19,
                        3 => it.window = 501,
                        4 => it.id = it.id.wrapping_add(7),
                        _ => {}
                    }
                    let mut bytes = packet(it);
                    if oddity == 5 {
                        let last = bytes.len() - 1;
                        bytes[last] ^= 1;
                    }
                    packets.push(bytes);
                    sequence = it.sequence.wrapping_add(u32::try_from(len).unwrap());
                    id = it.id.wrapping_add(1);
                }
                packets
            },
        )
    }

    proptest! {
        #[test]
        fn cutting_undoes_joining(packets in flows()) {
            let writes = coalesce(&packets);
            let again: Vec<_> =
                writes.iter().flat_map(|(_, header, packet)| segments(header, packet)).collect();
            prop_assert_eq!(again, packets);
        }

        #[test]
        fn arbitrary_bytes_never_panic(
            first in proptest::collection::vec(any::<u8>(), 1..80),
            second in proptest::collection::vec(any::<u8>(), 1..80),
        ) {
            let mut area = [&first[..], &second].concat();
            let mut run = Run::new(&first);
            run.join(&mut area, first.len());
            run.finish(&mut area[..run.byte_len()]);
        }
    }

    #[test]
    fn a_flow_becomes_one_write() {
        for ipv6 in [false, true] {
            let shape = |number: u32, len, flags| Shape {
                ipv6,
                port: 4000,
                sequence: 1000 + number * 1400,
                id: 7 + u16::try_from(number).unwrap(),
                len,
                flags,
                window: 500,
            };
            let mut packets: Vec<_> = (0..20).map(|n| packet(shape(n, 1400, ACK))).collect();
            packets.push(packet(shape(20, 300, ACK | PSH)));
            let writes = coalesce(&packets);
            assert_eq!(writes.len(), 1);
            assert_eq!(writes[0].0, 21);
            let view = IpView::check(&writes[0].2).unwrap();
            assert!(view.header_is_intact());
        }
    }

    #[test]
    fn a_wrong_checksum_is_left_to_the_kernel() {
        let shape = |sequence, id| Shape {
            ipv6: false,
            port: 4000,
            sequence,
            id,
            len: 100,
            flags: ACK,
            window: 500,
        };
        let mut packets = [packet(shape(0, 0)), packet(shape(100, 1))];
        packets[1][139] ^= 1;
        let writes = coalesce(&packets);
        assert_eq!(writes.len(), 2);
        assert!(writes.iter().all(|(count, header, _)| *count == 1 && *header == WHOLE));
    }
}
