//! Neighbours of one flow into one super-packet: the headers of the first, then everybody's payload.
//!
//! Only what [`super::segment`] would undo is joined, by the rules of the kernel's own receive
//! offload (net/ipv4/tcp_offload.c, udp_offload.c): same flow, same headers but for the sequence,
//! the id and PSH, contiguous sequence, equal lengths but for the last. The inner checksum is
//! verified first, since the kernel trusts that of a super-packet.

use super::{Gso, VirtioNetHdr, WHOLE};
use crate::packet::{
    IPV4_HEADER_LEN, IPV6_HEADER_LEN, IpView, be16, checksum, length_field, protocol,
    pseudo_header_sum, transport_checksum,
};

/// Packets in one run: what the kernel cuts a UDP super-packet into at most (UDP_MAX_SEGMENTS
/// before Linux 6.9), and more than 64 KiB hold of TCP's usual segments.
pub const PACKETS_MAX: usize = 64;
/// No IP packet is longer.
const PACKET_LEN_MAX: usize = 65_535;
/// IPv6 and TCP with all its options.
const HEADERS_LEN_MAX: usize = IPV6_HEADER_LEN + 60;

/// TCP header without options (RFC 9293 3.1), and what of its flags a joined segment may have.
const TCP_HEADER_LEN: usize = 20;
const PSH: u8 = 0x08;
const ACK: u8 = 0x10;
/// The UDP header (RFC 768).
const UDP_HEADER_LEN: usize = 8;

/// A packet that may be joined with others: all that a run must know of it.
#[derive(Debug, Clone, Copy)]
pub struct Segment {
    transport: Transport,
    ip_header_len: usize,
    headers_len: usize,
    payload_len: usize,
    /// IPv4's id; 0 for IPv6.
    id: u16,
    /// Whether the id means nothing, since nobody may cut the packet (RFC 6864 4.1).
    is_atomic: bool,
    /// TCP's; 0 for UDP.
    sequence: u32,
    push: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Transport {
    Tcp,
    Udp,
}

/// Packets that become one write: the headers of the first, then everybody's payload, copied
/// together. One long copy by the kernel follows, from memory aligned as its own is: that comes
/// cheaper than a gathered write of many short ones.
#[derive(Debug)]
pub struct Run {
    bytes: Box<[u8]>,
    /// Where in `bytes` the payload begins; in front of it is room for the headers.
    payload_at: usize,
    /// The last packet so far; `None` while there is none.
    last: Option<Segment>,
    /// Payload bytes of the first packet, and so of all but the last.
    segment_len: usize,
    /// Payload bytes of all packets.
    payload_len: usize,
    count: usize,
    push: bool,
}

/// What the kernel's own buffers are aligned to at least. On some machines a copy between places
/// that differ by less than 32 bytes, modulo the page, takes ten times as long.
const ALIGN: usize = 64;
const HEADROOM: usize = (VirtioNetHdr::LEN + HEADERS_LEN_MAX).next_multiple_of(ALIGN);

impl Segment {
    /// `None` where the packet is none, or must not be joined with others: IP options or fragments,
    /// TCP flags other than ACK and PSH, no payload, no checksum or a wrong one.
    pub fn parse(packet: &[u8]) -> Option<Self> {
        Self::parse_where(packet, |_| true)
    }

    /// The same, where `is_wanted` says so of UDP (true) or TCP: others' checksums need no time.
    pub fn parse_where(packet: &[u8], is_wanted: impl FnOnce(bool) -> bool) -> Option<Self> {
        let view = IpView::check(packet).ok()?;
        let (ip_header_len, number, id, is_atomic) = match &view {
            IpView::V4(view) => {
                let plain = view.header_len() == IPV4_HEADER_LEN && be16(packet, 6) & 0x3fff == 0;
                let id = be16(packet, 4);
                (plain.then_some(IPV4_HEADER_LEN)?, view.protocol(), id, view.dont_fragment())
            }
            IpView::V6(view) => (IPV6_HEADER_LEN, view.next_header(), 0, true),
        };
        let message = &packet[ip_header_len..];
        let (transport, header_len) = match number {
            protocol::TCP => (Transport::Tcp, joinable_tcp(message)?),
            protocol::UDP => (Transport::Udp, joinable_udp(message)?),
            _ => return None,
        };
        let payload_len = message.len().checked_sub(header_len).filter(|len| *len > 0)?;
        if !is_wanted(transport == Transport::Udp) {
            return None;
        }
        if transport_checksum(view.source(), view.destination(), number, message) != 0 {
            return None;
        }
        let is_tcp = transport == Transport::Tcp;
        let word = [message[4], message[5], message[6], message[7]];
        Some(Self {
            transport,
            ip_header_len,
            headers_len: ip_header_len + header_len,
            payload_len,
            id,
            is_atomic,
            sequence: if is_tcp { u32::from_be_bytes(word) } else { 0 },
            push: is_tcp && message[13] & PSH != 0,
        })
    }

    /// Whether this is UDP, and not TCP.
    pub fn is_udp(&self) -> bool {
        self.transport == Transport::Udp
    }

    /// Whether `next`, in `packet`, continues this one in a run with these headers.
    fn continues_in(&self, next: &Self, headers: &[u8], packet: &[u8]) -> bool {
        let (ip, end) = (self.ip_header_len, self.headers_len);
        let same = |range: std::ops::Range<usize>| headers[range.clone()] == packet[range];
        let same_shape = next.transport == self.transport
            && (next.ip_header_len, next.headers_len) == (ip, end)
            && self.precedes(next);
        same_shape
            && match ip {
                IPV6_HEADER_LEN => same(0..4) && same(6..IPV6_HEADER_LEN),
                // All but length, id and checksum.
                _ => same(0..2) && same(6..10) && same(12..IPV4_HEADER_LEN),
            }
            && same(ip..ip + 4)
            && match self.transport {
                Transport::Udp => true,
                // Acknowledgement and data offset; window; urgent pointer and options.
                Transport::Tcp => {
                    same(ip + 8..ip + 13) && same(ip + 14..ip + 16) && same(ip + 18..end)
                }
            }
    }

    /// Whether `next` comes right behind this one.
    fn precedes(&self, next: &Self) -> bool {
        let follows = next.id == self.id.wrapping_add(1);
        match self.transport {
            // Senders whose packets are all atomic may number none of them.
            Transport::Udp => follows || (self.is_atomic && next.id == self.id),
            Transport::Tcp => {
                #[expect(clippy::cast_possible_truncation, reason = "a payload is below 64 KiB")]
                let sequence = self.sequence.wrapping_add(self.payload_len as u32);
                let is_v6 = self.ip_header_len == IPV6_HEADER_LEN;
                next.sequence == sequence && (is_v6 || follows)
            }
        }
    }
}

/// Length of the header, where it is that of a segment that may be joined.
fn joinable_tcp(tcp: &[u8]) -> Option<usize> {
    let header_len = usize::from(tcp.get(12)? >> 4) * 4;
    let joinable = (TCP_HEADER_LEN..=tcp.len()).contains(&header_len) && tcp[13] & !PSH == ACK;
    joinable.then_some(header_len)
}

/// As [`joinable_tcp`]: a length that is true, and a checksum at all.
fn joinable_udp(udp: &[u8]) -> Option<usize> {
    let joinable =
        udp.len() > UDP_HEADER_LEN && usize::from(be16(udp, 4)) == udp.len() && be16(udp, 6) != 0;
    joinable.then_some(UDP_HEADER_LEN)
}

impl Default for Run {
    fn default() -> Self {
        let bytes = vec![0; ALIGN + HEADROOM + PACKET_LEN_MAX].into_boxed_slice();
        Self {
            payload_at: bytes.as_ptr().align_offset(ALIGN).min(ALIGN) + HEADROOM,
            bytes,
            last: None,
            segment_len: 0,
            payload_len: 0,
            count: 0,
            push: false,
        }
    }
}

impl Run {
    /// Packets in it.
    pub fn count(&self) -> usize {
        self.count
    }

    /// What the kernel must be able to take for this run to be more than one packet.
    pub fn is_udp(&self) -> bool {
        self.last.is_some_and(|last| last.is_udp())
    }

    /// Forgets all packets and begins with this one.
    pub fn begin(&mut self, segment: &Segment, packet: &[u8]) {
        let headers = self.payload_at - segment.headers_len;
        self.bytes[headers..headers + packet.len()].copy_from_slice(packet);
        self.last = Some(*segment);
        self.segment_len = segment.payload_len;
        self.payload_len = segment.payload_len;
        self.count = 1;
        self.push = segment.push;
    }

    /// Joins this packet, if it continues the run; if not, nothing changes.
    pub fn join(&mut self, segment: &Segment, packet: &[u8]) -> bool {
        let Some(last) = self.last else { return false };
        let is_ended = self.push
            || last.payload_len < self.segment_len
            || self.count == PACKETS_MAX
            || last.headers_len + self.payload_len + segment.payload_len > PACKET_LEN_MAX;
        let headers = &self.bytes[self.payload_at - last.headers_len..self.payload_at];
        if is_ended
            || segment.payload_len > self.segment_len
            || !last.continues_in(segment, headers, packet)
        {
            return false;
        }
        let end = self.payload_at + self.payload_len;
        let payload = &packet[segment.headers_len..];
        self.bytes[end..end + payload.len()].copy_from_slice(payload);
        self.push = segment.push;
        self.last = Some(*segment);
        self.payload_len += payload.len();
        self.count += 1;
        true
    }

    /// What to write: a virtio header and a packet. A packet that nothing has joined stays as it
    /// is, for the kernel to verify. The run is empty then; `None` if it was before.
    pub fn finish(&mut self) -> Option<&[u8]> {
        let last = self.last.take()?;
        let start = self.payload_at - last.headers_len;
        let header =
            if self.count == 1 { WHOLE } else { self.make_headers(&last, start).to_bytes() };
        self.count = 0;
        let begin = start - VirtioNetHdr::LEN;
        self.bytes[begin..start].copy_from_slice(&header);
        Some(&self.bytes[begin..self.payload_at + self.payload_len])
    }

    /// Makes the headers, which begin at `at`, those of the whole run.
    fn make_headers(&mut self, last: &Segment, at: usize) -> VirtioNetHdr {
        let (start, end) = (last.ip_header_len, last.headers_len);
        let len = end + self.payload_len;
        let headers = &mut self.bytes[at..at + end];
        let is_v6 = start == IPV6_HEADER_LEN;
        if is_v6 {
            headers[4..6].copy_from_slice(&length_field(len - IPV6_HEADER_LEN));
        } else {
            headers[2..4].copy_from_slice(&length_field(len));
            headers[10..12].fill(0);
            let sum = checksum(&headers[..IPV4_HEADER_LEN]);
            headers[10..12].copy_from_slice(&sum.to_be_bytes());
        }
        let (number, checksum_offset) = match last.transport {
            Transport::Tcp => (protocol::TCP, 16),
            Transport::Udp => (protocol::UDP, 6),
        };
        match last.transport {
            Transport::Tcp if self.push => headers[start + 13] |= PSH,
            Transport::Tcp => {}
            Transport::Udp => headers[start + 4..][..2].copy_from_slice(&length_field(len - start)),
        }
        let addresses = if is_v6 { 8..IPV6_HEADER_LEN } else { 12..IPV4_HEADER_LEN };
        let sum = pseudo_header_sum(&headers[addresses], number, len - start);
        headers[start + checksum_offset..][..2].copy_from_slice(&sum.to_be_bytes());
        let field = |len| u16::from_be_bytes(length_field(len));
        VirtioNetHdr {
            needs_checksum: true,
            gso: match (last.transport, is_v6) {
                (Transport::Tcp, false) => Gso::Tcp4,
                (Transport::Tcp, true) => Gso::Tcp6,
                (Transport::Udp, _) => Gso::Udp,
            },
            header_len: field(end),
            segment_len: field(self.segment_len),
            checksum_start: field(start),
            checksum_offset: field(checksum_offset),
        }
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
        udp: bool,
        port: u16,
        sequence: u32,
        id: u16,
        dont_fragment: bool,
        len: usize,
        flags: u8,
        window: u16,
        /// Bytes of TCP options, a multiple of four.
        options: usize,
        traffic_class: u8,
    }

    const PLAIN: Shape = Shape {
        ipv6: false,
        udp: false,
        port: 4000,
        sequence: 1000,
        id: 7,
        dont_fragment: true,
        len: 100,
        flags: ACK,
        window: 500,
        options: 12,
        traffic_class: 0,
    };

    fn packet(it: Shape) -> Vec<u8> {
        let ip = if it.ipv6 {
            PacketBuilder::ipv6([0xfd; 16], [0xfe; 16], 62)
        } else {
            PacketBuilder::ipv4([10, 42, 1, 2], [10, 42, 2, 2], 62)
        };
        let mut packet = Vec::new();
        let payload: Vec<u8> =
            (0..it.len).map(|at| u8::try_from((at * 7 + it.len) % 256).unwrap()).collect();
        if it.udp {
            ip.udp(it.port, 80).write(&mut packet, &payload).unwrap();
        } else {
            let tcp = ip.tcp(it.port, 80, it.sequence, it.window).options_raw(&vec![1; it.options]);
            tcp.unwrap().write(&mut packet, &payload).unwrap();
        }
        let (start, number, field) = match (it.ipv6, it.udp) {
            (ipv6, true) => (if ipv6 { 40 } else { 20 }, protocol::UDP, 6),
            (ipv6, false) => (if ipv6 { 40 } else { 20 }, protocol::TCP, 16),
        };
        if !it.udp {
            packet[start + 13] = it.flags;
        }
        if it.ipv6 {
            packet[0] |= it.traffic_class >> 4;
            packet[1] |= it.traffic_class << 4;
        } else {
            packet[1] = it.traffic_class;
            packet[4..6].copy_from_slice(&it.id.to_be_bytes());
            packet[6] = if it.dont_fragment { 0x40 } else { 0 };
            packet[10..12].fill(0);
            let sum = checksum(&packet[..20]);
            packet[10..12].copy_from_slice(&sum.to_be_bytes());
        }
        packet[start + field..][..2].fill(0);
        let view = IpView::check(&packet).unwrap();
        let sum = transport_checksum(view.source(), view.destination(), number, &packet[start..]);
        packet[start + field..][..2].copy_from_slice(&sum.to_be_bytes());
        packet
    }

    struct Write {
        count: usize,
        header: [u8; VirtioNetHdr::LEN],
        packet: Vec<u8>,
    }

    impl Write {
        fn take(run: &mut Run) -> Option<Self> {
            let count = run.count();
            let bytes = run.finish()?;
            let (header, packet) = bytes.split_first_chunk().unwrap();
            Some(Self { count, header: *header, packet: packet.to_vec() })
        }
    }

    /// What the worker does: packets in a row, joined where they may be, and written.
    fn coalesce(packets: &[Vec<u8>]) -> Vec<Write> {
        let (mut run, mut writes) = (Run::default(), Vec::new());
        for packet in packets {
            let segment = Segment::parse(packet);
            if segment.is_some_and(|segment| run.join(&segment, packet)) {
                continue;
            }
            writes.extend(Write::take(&mut run));
            match segment {
                Some(segment) => run.begin(&segment, packet),
                None => writes.push(Write { count: 1, header: WHOLE, packet: packet.clone() }),
            }
        }
        writes.extend(Write::take(&mut run));
        writes
    }

    /// What the kernel would make of a write again.
    fn segments(it: &Write) -> Vec<Vec<u8>> {
        let header = VirtioNetHdr::parse(&it.header).unwrap();
        let Some(cut) = Cut::plan(&header, &it.packet).unwrap() else {
            return vec![it.packet.clone()];
        };
        (0..cut.count())
            .map(|number| {
                let mut out = vec![0; cut.len_of(number)];
                cut.write(&it.packet, number, &mut out);
                out
            })
            .collect()
    }

    /// Mostly what continues the packet before, sometimes not.
    fn flows() -> impl Strategy<Value = Vec<Vec<u8>>> {
        let step = (0u8..20, prop_oneof![4 => Just(101usize), 1 => 0usize..120], any::<bool>());
        let base = (any::<(bool, bool, u32, u16)>(), 0usize..=10);
        (base, proptest::collection::vec(step, 1..100)).prop_map(
            |(((ipv6, udp, mut sequence, mut id), words), steps)| {
                let mut packets = Vec::new();
                for (oddity, len, push) in steps {
                    let mut it =
                        Shape { ipv6, udp, sequence, id, len, options: words * 4, ..PLAIN };
                    match oddity {
                        0 => it.port = 4001,
                        1 => it.sequence = it.sequence.wrapping_add(1),
                        2 => it.flags = 0x19,
                        3 => it.window = 501,
                        4 => it.id = it.id.wrapping_add(7),
                        6 => it.traffic_class = 3,
                        7 => it.dont_fragment = false,
                        8 => it.options = 40 - it.options,
                        9.. if push && oddity > 16 => it.flags = ACK | PSH,
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
            prop_assert!(writes.iter().all(|write| write.count <= PACKETS_MAX));
            let again: Vec<_> = writes.iter().flat_map(segments).collect();
            prop_assert_eq!(again, packets);
        }

        #[test]
        fn arbitrary_bytes_never_panic(
            first in proptest::collection::vec(any::<u8>(), 0..120),
            second in proptest::collection::vec(any::<u8>(), 0..120),
        ) {
            if let (Some(one), Some(two)) = (Segment::parse(&first), Segment::parse(&second)) {
                let mut run = Run::default();
                run.begin(&one, &first);
                run.join(&two, &second);
                prop_assert!(run.finish().is_some() && run.finish().is_none());
            }
        }
    }

    #[test]
    fn a_flow_becomes_one_write() {
        for (ipv6, udp) in [(false, false), (true, false), (false, true), (true, true)] {
            let shape = |number: u16, len, flags| Shape {
                ipv6,
                udp,
                sequence: 1000 + u32::from(number) * 1400,
                id: 7 + number,
                len,
                flags,
                ..PLAIN
            };
            let mut packets: Vec<_> = (0..20).map(|n| packet(shape(n, 1400, ACK))).collect();
            packets.push(packet(shape(20, 300, ACK | PSH)));
            let writes = coalesce(&packets);
            assert_eq!(writes.len(), 1, "IPv6 {ipv6}, UDP {udp}");
            assert_eq!(writes[0].count, 21);
            assert!(IpView::check(&writes[0].packet).unwrap().header_is_intact());
        }
    }

    /// Linux numbers none of the packets of an unconnected UDP socket.
    #[test]
    fn datagrams_that_nobody_may_cut_need_no_ids() {
        let datagram = |dont_fragment| packet(Shape { udp: true, id: 0, dont_fragment, ..PLAIN });
        assert_eq!(coalesce(&[datagram(true), datagram(true), datagram(true)]).len(), 1);
        assert_eq!(coalesce(&[datagram(false), datagram(false)]).len(), 2);
    }

    #[test]
    fn a_datagram_without_checksum_is_left_alone() {
        let mut datagram = packet(Shape { udp: true, id: 0, ..PLAIN });
        datagram[26..28].fill(0);
        assert!(Segment::parse(&datagram).is_none());
    }

    #[test]
    fn a_wrong_checksum_is_left_to_the_kernel() {
        let next = Shape { sequence: PLAIN.sequence + 100, id: 8, ..PLAIN };
        let mut packets = [packet(PLAIN), packet(next)];
        let last = packets[1].len() - 1;
        packets[1][last] ^= 1;
        let writes = coalesce(&packets);
        assert_eq!(writes.len(), 2);
        assert!(writes.iter().all(|write| write.count == 1 && write.header == WHOLE));
    }
}
