//! One super-packet into the packets that a kernel without offloads would have sent.
//!
//! Lengths, IP ids, sequence numbers, flags and checksums follow the kernel's own segmentation
//! (net/ipv4/tcp_offload.c, udp_offload.c, net/ipv4/af_inet.c).

use super::{Gso, VirtioNetHdr};
use crate::packet::{
    IPV6_HEADER_LEN, IpView, Malformed, be16, checksum, length_field, with_other_length,
};

/// Lengths of the fixed transport headers.
const TCP_HEADER_LEN: usize = 20;
const UDP_HEADER_LEN: usize = 8;
/// Packets of one super-packet at most. No kernel's TCP needs as many, which sends no fewer than 36 bytes
/// at a time (TCP_MIN_SND_MSS in include/net/tcp.h, less timestamps); but whoever has a raw socket in a
/// container can ask for a packet a byte, and would use up all buffers.
const SEGMENTS_MAX: usize = 2048;

/// TCP flags that are not the same on each segment (RFC 9293 3.1, RFC 3168 6.1.2).
const FIN: u8 = 0x01;
const PSH: u8 = 0x08;
const CWR: u8 = 0x80;

/// Computes the checksum that the kernel has left to the device. A packet whose header asks for
/// none stays as it is.
///
/// # Errors
/// The header points outside of the packet, or into its IP header, which nobody may change behind the
/// host's firewall.
pub fn finish_checksum(header: &VirtioNetHdr, packet: &mut [u8]) -> Result<(), Malformed> {
    if !header.needs_checksum {
        return Ok(());
    }
    let start = usize::from(header.checksum_start);
    let at = start + usize::from(header.checksum_offset);
    let ip_header_len = match packet.first() {
        Some(first) if first >> 4 == 4 => usize::from(first & 0xf) * 4,
        _ => IPV6_HEADER_LEN,
    };
    if start < ip_header_len || at + 2 > packet.len() {
        return Err(Malformed);
    }
    // The field holds the pseudo-header's sum already, so it takes part.
    let sum = never_zero(checksum(&packet[start..]));
    packet[at..at + 2].copy_from_slice(&sum.to_be_bytes());
    Ok(())
}

/// How a super-packet is cut.
#[derive(Debug, Clone, Copy)]
pub struct Cut {
    transport: Transport,
    /// The pseudo-header's sum, for the length of the whole. It is the kernel's: with a routing header, its
    /// destination is not the one that the IPv6 header names now (RFC 8200 8.1).
    pseudo_sum: u16,
    /// Where the transport header begins.
    transport_start: usize,
    /// Where the payload begins.
    payload_start: usize,
    /// Payload bytes of each segment but the last, which may have fewer.
    segment_len: usize,
    payload_len: usize,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Transport {
    Tcp,
    Udp,
}

impl Transport {
    fn checksum_offset(self) -> usize {
        match self {
            Self::Tcp => 16,
            Self::Udp => 6,
        }
    }
}

impl Cut {
    /// Plans the cut of a packet that its view has checked; `None` where it is to go whole.
    ///
    /// # Errors
    /// The header contradicts the packet, or asks for a kind of cut that nobody has offered.
    pub fn plan(header: &VirtioNetHdr, packet: &[u8]) -> Result<Option<Self>, Malformed> {
        let (transport, ipv6) = match header.gso {
            Gso::None => return Ok(None),
            Gso::Tcp4 => (Transport::Tcp, Some(false)),
            Gso::Tcp6 => (Transport::Tcp, Some(true)),
            Gso::Udp => (Transport::Udp, None),
            Gso::Unknown(_) => return Err(Malformed),
        };
        let view = IpView::check(packet)?;
        let transport_start = usize::from(header.checksum_start);
        // Between the headers of IPv6 and of its transport there may be others.
        let (is_v6, follows) = match &view {
            IpView::V4(view) => (false, transport_start == view.header_len()),
            IpView::V6(_) => (true, transport_start >= IPV6_HEADER_LEN),
        };
        let payload_start = match transport {
            _ if !header.needs_checksum || !follows => None,
            Transport::Udp => Some(transport_start + UDP_HEADER_LEN),
            Transport::Tcp => tcp_payload_start(packet, transport_start),
        };
        let payload_start =
            payload_start.filter(|start| *start <= packet.len()).ok_or(Malformed)?;
        let payload_len = packet.len() - payload_start;
        let family_is_right = ipv6.is_none_or(|ipv6| ipv6 == is_v6);
        if !family_is_right || header.segment_len == 0 || payload_len == 0 {
            return Err(Malformed);
        }
        let cut = Self {
            transport,
            pseudo_sum: be16(packet, transport_start + transport.checksum_offset()),
            transport_start,
            payload_start,
            segment_len: header.segment_len.into(),
            payload_len,
        };
        if cut.count() <= SEGMENTS_MAX { Ok(Some(cut)) } else { Err(Malformed) }
    }

    /// How many packets come of it, at least one.
    pub fn count(&self) -> usize {
        self.payload_len.div_ceil(self.segment_len)
    }

    /// Length of the packet with this number, counted from 0.
    pub fn len_of(&self, number: usize) -> usize {
        self.payload_start + self.payload_of(number).len()
    }

    /// Writes the packet with this number, counted from 0, to `out`, which has just its length.
    pub fn write(&self, packet: &[u8], number: usize, out: &mut [u8]) {
        let payload = self.payload_of(number);
        out[..self.payload_start].copy_from_slice(&packet[..self.payload_start]);
        out[self.payload_start..].copy_from_slice(&packet[self.payload_start..][payload.clone()]);
        let len = out.len() - self.transport_start;
        match self.transport {
            Transport::Tcp => self.adapt_tcp(out, number, payload.start),
            Transport::Udp => {
                out[self.transport_start + 4..][..2].copy_from_slice(&length_field(len));
            }
        }
        adapt_ip(out, number);
        let whole = self.payload_start + self.payload_len - self.transport_start;
        let pseudo_sum = with_other_length(self.pseudo_sum, whole, len);
        let field = self.transport_start + self.transport.checksum_offset();
        out[field..field + 2].copy_from_slice(&pseudo_sum.to_be_bytes());
        let sum = checksum(&out[self.transport_start..]);
        let sum = if self.transport == Transport::Udp { never_zero(sum) } else { sum };
        out[field..field + 2].copy_from_slice(&sum.to_be_bytes());
    }

    fn payload_of(&self, number: usize) -> std::ops::Range<usize> {
        let start = number * self.segment_len;
        start..(start + self.segment_len).min(self.payload_len)
    }

    fn adapt_tcp(&self, out: &mut [u8], number: usize, payload_start: usize) {
        let tcp = &mut out[self.transport_start..];
        let sequence = u32::from_be_bytes([tcp[4], tcp[5], tcp[6], tcp[7]]);
        #[expect(clippy::cast_possible_truncation, reason = "a super-packet is below 64 KiB")]
        let sequence = sequence.wrapping_add(payload_start as u32);
        tcp[4..8].copy_from_slice(&sequence.to_be_bytes());
        if number > 0 {
            tcp[13] &= !CWR;
        }
        if number + 1 < self.count() {
            tcp[13] &= !(FIN | PSH);
        }
    }
}

/// Behind the options, which the data offset tells; the virtio header's own length lies on
/// forwarded packets.
fn tcp_payload_start(packet: &[u8], start: usize) -> Option<usize> {
    let len = usize::from(packet.get(start + 12)? >> 4) * 4;
    (len >= TCP_HEADER_LEN).then_some(start + len)
}

/// Length, id and header checksum of a segment; IPv6 has only the first.
fn adapt_ip(out: &mut [u8], number: usize) {
    if out[0] >> 4 == 6 {
        let len = length_field(out.len() - IPV6_HEADER_LEN);
        out[4..6].copy_from_slice(&len);
        return;
    }
    let len = length_field(out.len());
    out[2..4].copy_from_slice(&len);
    #[expect(clippy::cast_possible_truncation, reason = "a super-packet has far fewer segments")]
    let id = u16::from_be_bytes([out[4], out[5]]).wrapping_add(number as u16);
    out[4..6].copy_from_slice(&id.to_be_bytes());
    out[10..12].fill(0);
    let header_len = usize::from(out[0] & 0xf) * 4;
    let sum = checksum(&out[..header_len]);
    out[10..12].copy_from_slice(&sum.to_be_bytes());
}

/// In UDP a checksum of zero says that there is none (RFC 768); elsewhere both zeros mean the same,
/// and the kernel's skb_checksum_help() does not tell them apart.
fn never_zero(sum: u16) -> u16 {
    if sum == 0 { 0xffff } else { sum }
}

#[cfg(test)]
mod tests {
    use etherparse::{NetSlice, PacketBuilder, SlicedPacket, TransportSlice};
    use proptest::prelude::*;

    use super::*;
    use crate::packet::{protocol, transport_checksum};

    #[derive(Debug, Clone)]
    struct Super {
        ipv6: bool,
        tcp: bool,
        options: Vec<u8>,
        payload: Vec<u8>,
        segment_len: u16,
        id: u16,
        sequence: u32,
        flags: u8,
    }

    fn super_packets() -> impl Strategy<Value = Super> {
        (
            any::<bool>(),
            any::<bool>(),
            0usize..=10,
            proptest::collection::vec(any::<u8>(), 1..9000),
            1u16..1500,
            any::<(u16, u32, u8)>(),
        )
            .prop_map(
                |(ipv6, tcp, words, mut payload, segment_len, (id, sequence, flags))| {
                    payload.truncate(SEGMENTS_MAX * usize::from(segment_len));
                    Super {
                        ipv6,
                        tcp,
                        options: vec![1; words * 4],
                        payload,
                        segment_len,
                        id,
                        sequence,
                        flags,
                    }
                },
            )
    }

    /// The packet as the kernel hands it over: the checksum field holds the pseudo-header's sum.
    fn build(it: &Super) -> (VirtioNetHdr, Vec<u8>) {
        let ip = if it.ipv6 {
            PacketBuilder::ipv6([0xfd; 16], [0xfe; 16], 62)
        } else {
            PacketBuilder::ipv4([10, 42, 1, 2], [10, 42, 2, 2], 62)
        };
        let mut packet = Vec::new();
        if it.tcp {
            let tcp = ip.tcp(40_000, 80, it.sequence, 1000).ack(7).options_raw(&it.options);
            tcp.unwrap().write(&mut packet, &it.payload).unwrap();
        } else {
            ip.udp(40_000, 53).write(&mut packet, &it.payload).unwrap();
        }
        let start = if it.ipv6 { 40 } else { 20 };
        let offset = if it.tcp { 16 } else { 6 };
        if it.tcp {
            packet[start + 13] = it.flags;
        }
        if !it.ipv6 {
            packet[4..6].copy_from_slice(&it.id.to_be_bytes());
            packet[10..12].fill(0);
            let sum = checksum(&packet[..20]);
            packet[10..12].copy_from_slice(&sum.to_be_bytes());
        }
        packet[start + offset..][..2].fill(0);
        let view = IpView::check(&packet).unwrap();
        let number = if it.tcp { protocol::TCP } else { protocol::UDP };
        // Only the pseudo-header: the sum over the message, taken out of the whole.
        let whole =
            !transport_checksum(view.source(), view.destination(), number, &packet[start..]);
        let message = !checksum(&packet[start..]);
        let pseudo = u32::from(whole) + u32::from(!message);
        let pseudo = u16::try_from((pseudo & 0xffff) + (pseudo >> 16)).unwrap();
        packet[start + offset..][..2].copy_from_slice(&pseudo.to_be_bytes());
        let header = VirtioNetHdr {
            needs_checksum: true,
            gso: match (it.tcp, it.ipv6) {
                (true, false) => Gso::Tcp4,
                (true, true) => Gso::Tcp6,
                (false, _) => Gso::Udp,
            },
            header_len: 0,
            segment_len: it.segment_len,
            checksum_start: u16::try_from(start).unwrap(),
            checksum_offset: u16::try_from(offset).unwrap(),
        };
        (header, packet)
    }

    /// Every checksum of a packet, by etherparse.
    fn is_valid(packet: &[u8]) -> bool {
        let sliced = SlicedPacket::from_ip(packet).unwrap();
        let header_holds = match sliced.net.as_ref().unwrap() {
            NetSlice::Ipv4(ip) => {
                let header = ip.header().to_header();
                header.header_checksum == header.calc_header_checksum()
            }
            NetSlice::Ipv6(_) => true,
            other => panic!("{other:?}"),
        };
        let view = IpView::check(packet).unwrap();
        let (number, start) = match (view, sliced.transport.as_ref().unwrap()) {
            (view, TransportSlice::Tcp(_)) => (protocol::TCP, start_of(&view)),
            (view, TransportSlice::Udp(_)) => (protocol::UDP, start_of(&view)),
            (_, other) => panic!("{other:?}"),
        };
        let sum = transport_checksum(view.source(), view.destination(), number, &packet[start..]);
        header_holds && sum == 0
    }

    fn start_of(view: &IpView<'_>) -> usize {
        match view {
            IpView::V4(view) => view.header_len(),
            IpView::V6(_) => 40,
        }
    }

    proptest! {
        #[test]
        fn segments_are_packets_that_carry_the_same_bytes(it in super_packets()) {
            let (header, packet) = build(&it);
            let cut = Cut::plan(&header, &packet).unwrap().unwrap();
            let mut payload = Vec::new();
            for number in 0..cut.count() {
                let mut out = vec![0xee; cut.len_of(number)];
                cut.write(&packet, number, &mut out);
                prop_assert!(is_valid(&out));
                if !it.ipv6 {
                    let id = u16::from_be_bytes([out[4], out[5]]);
                    prop_assert_eq!(id, it.id.wrapping_add(u16::try_from(number).unwrap()));
                }
                let sliced = SlicedPacket::from_ip(&out).unwrap();
                let transport = sliced.transport.unwrap();
                let carried = match transport {
                    TransportSlice::Tcp(tcp) => {
                        let sent = u32::try_from(payload.len()).unwrap();
                        prop_assert_eq!(tcp.sequence_number(), it.sequence.wrapping_add(sent));
                        let first = number == 0;
                        let last = number + 1 == cut.count();
                        let keep = |flag, here: bool| if here { it.flags & flag } else { 0 };
                        let wanted = it.flags & !(FIN | PSH | CWR)
                            | keep(FIN | PSH, last) | keep(CWR, first);
                        prop_assert_eq!(tcp.slice()[13], wanted);
                        prop_assert_eq!(tcp.options(), &it.options[..]);
                        tcp.payload().to_vec()
                    }
                    TransportSlice::Udp(udp) => udp.payload().to_vec(),
                    TransportSlice::Icmpv4(_) | TransportSlice::Icmpv6(_) => unreachable!(),
                };
                let full = carried.len() == usize::from(it.segment_len);
                prop_assert!(full || number + 1 == cut.count());
                payload.extend(carried);
            }
            prop_assert_eq!(payload, it.payload);
        }

        #[test]
        fn the_pseudo_header_is_the_one_that_the_kernel_has_summed(it in super_packets()) {
            let (header, mut packet) = build(&it);
            // As a routing header leaves it: the destination that counts is the last one.
            let at = if it.ipv6 { 24..40 } else { 16..20 };
            let last = packet[at.clone()].to_vec();
            packet[at.clone()].fill(0x7e);
            let cut = Cut::plan(&header, &packet).unwrap().unwrap();
            for number in 0..cut.count() {
                let mut out = vec![0xee; cut.len_of(number)];
                cut.write(&packet, number, &mut out);
                out[at.clone()].copy_from_slice(&last);
                let start = usize::from(header.checksum_start);
                let view = IpView::check(&out).unwrap();
                let proto = if it.tcp { protocol::TCP } else { protocol::UDP };
                let (source, destination) = (view.source(), view.destination());
                prop_assert_eq!(transport_checksum(source, destination, proto, &out[start..]), 0);
            }
        }

        #[test]
        fn a_checksum_left_to_us_is_finished(it in super_packets()) {
            let (header, mut packet) = build(&it);
            finish_checksum(&header, &mut packet).unwrap();
            prop_assert!(is_valid(&packet));
        }

        #[test]
        fn arbitrary_headers_never_panic(
            bytes in any::<[u8; VirtioNetHdr::LEN]>(), it in super_packets(), len in 0usize..100,
        ) {
            let header = VirtioNetHdr::parse(&bytes).unwrap();
            let (_, mut packet) = build(&it);
            packet.truncate(len);
            let _ = finish_checksum(&header, &mut packet);
            let (_, packet) = build(&it);
            if let Ok(Some(cut)) = Cut::plan(&header, &packet) {
                let last = cut.count() - 1;
                cut.write(&packet, last, &mut vec![0; cut.len_of(last)]);
            }
        }
    }

    #[test]
    fn nobody_has_one_packet_cut_into_too_many_or_with_headers_of_his_choice() {
        let wanted = |payload: usize, start: u16| {
            let it = Super {
                ipv6: false,
                tcp: true,
                options: Vec::new(),
                payload: vec![0; payload],
                segment_len: 1,
                id: 0,
                sequence: 0,
                flags: 0,
            };
            let (mut header, packet) = build(&it);
            header.checksum_start = start;
            Cut::plan(&header, &packet).map(|cut| cut.map(|it| it.count()))
        };
        assert_eq!(wanted(SEGMENTS_MAX, 20), Ok(Some(SEGMENTS_MAX)));
        assert_eq!(wanted(SEGMENTS_MAX + 1, 20), Err(Malformed));
        assert_eq!(wanted(SEGMENTS_MAX, 24), Err(Malformed));
    }

    /// Behind the firewall that has let it pass, a packet keeps its addresses.
    #[test]
    fn a_checksum_is_written_behind_the_ip_header_only() {
        for (ipv6, starts) in [(false, [0, 12, 19]), (true, [8, 20, 39])] {
            let it = Super {
                ipv6,
                tcp: false,
                options: Vec::new(),
                payload: vec![1; 20],
                segment_len: 1,
                id: 0,
                sequence: 0,
                flags: 0,
            };
            let (header, packet) = build(&it);
            for checksum_start in starts {
                let header = VirtioNetHdr { checksum_start, checksum_offset: 2, ..header };
                let mut same = packet.clone();
                assert_eq!(finish_checksum(&header, &mut same), Err(Malformed));
                assert_eq!(same, packet);
            }
        }
    }

    #[test]
    fn what_asks_for_nothing_stays_whole() {
        let packet = crate::packet::tests::udp("10.42.1.2", "10.42.2.2", 9, b"x");
        let header = VirtioNetHdr::parse(&super::super::WHOLE).unwrap();
        assert!(Cut::plan(&header, &packet).unwrap().is_none());
        let mut same = packet.clone();
        finish_checksum(&header, &mut same).unwrap();
        assert_eq!(same, packet);
        let unknown = VirtioNetHdr { gso: Gso::Unknown(3), ..header };
        assert!(Cut::plan(&unknown, &packet).is_err());
    }
}
