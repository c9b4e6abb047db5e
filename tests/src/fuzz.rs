//! What must hold for any bytes at all. Fuzzers look for bytes for which it does not
//! (`make fuzz TARGET=…`); what they have found interesting is replayed by `make test`.

use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;

use weft_engine::ecn::carry_over;
use weft_engine::guard::{Guard, Verdict};
use weft_engine::icmp::{ICMP_ERROR_LEN_MAX, IcmpError};
use weft_engine::offload::VirtioNetHdr;
use weft_engine::offload::coalesce::{Run, Segment};
use weft_engine::offload::segment::{Cut, finish_checksum};
use weft_engine::packet::{IpView, decrement_ttl};
use weft_engine::{EcnMode, GuardMode, Peer, RouteTable};

/// One thing to hold, by its name.
pub type Target = (&'static str, fn(&[u8]));

/// All of them.
pub const TARGETS: [Target; 4] =
    [("views", views), ("segment", segment), ("coalesce", coalesce), ("receive", receive)];

/// Views of a packet: no getter fails, and what the engine changes stays a packet.
pub fn views(bytes: &[u8]) {
    let Ok(view) = IpView::check(bytes) else { return };
    let (intact, class) = (view.header_is_intact(), view.traffic_class());
    view.flow_hash();
    view.dont_fragment();
    let mut out = [0; ICMP_ERROR_LEN_MAX];
    for source in ["10.0.0.1", "fd00::1"] {
        let source: IpAddr = source.parse().expect("an address");
        for error in [IcmpError::TimeExceeded, IcmpError::TooBig { mtu: 1280 }] {
            if let Some(answer) = error.about(bytes, source, &mut out) {
                let answer = IpView::check(answer).expect("an error is a packet");
                assert!(answer.header_is_intact() && answer.destination() == view.source());
            }
        }
    }
    let mut packet = bytes.to_vec();
    if view.ttl() > 0 {
        decrement_ttl(&mut packet);
        let after = IpView::check(&packet).expect("still a packet");
        assert_eq!((after.ttl(), after.header_is_intact()), (view.ttl() - 1, intact));
    }
    if carry_over(3, &mut packet) {
        let after = IpView::check(&packet).expect("still a packet");
        assert_eq!((after.traffic_class(), after.header_is_intact()), (class | 3, intact));
    }
}

/// A virtio header and a packet: what is cut are packets, and together they carry the payload.
pub fn segment(bytes: &[u8]) {
    let Some(header) = VirtioNetHdr::parse(bytes) else { return };
    let mut packet = bytes[VirtioNetHdr::LEN..].to_vec();
    if IpView::check(&packet).is_err() {
        return;
    }
    if let Ok(Some(cut)) = Cut::plan(&header, &packet) {
        // A kernel asks for no segments of a byte; a thousand prove as much as many.
        let written = cut.count().min(1000);
        let mut segments = (0..written).map(|number| {
            let mut out = vec![0; cut.len_of(number)];
            cut.write(&packet, number, &mut out);
            let view = IpView::check(&out).expect("a segment is a packet");
            assert!(view.header_is_intact());
            out
        });
        // Each but the last carries as much as the header says.
        let first = segments.next().expect("there is one at least");
        let each = if written > 1 { usize::from(header.segment_len) } else { 0 };
        let headers = first.len() - each;
        let payload = segments.fold(first[headers..].to_vec(), |mut payload, segment| {
            payload.extend_from_slice(&segment[headers..]);
            payload
        });
        assert!(packet[headers..].starts_with(&payload));
        assert!(written < cut.count() || headers + payload.len() == packet.len());
    }
    let len = packet.len();
    let _ = finish_checksum(&header, &mut packet);
    assert_eq!(packet.len(), len);
}

/// Packets, each behind its length: cutting undoes joining, but for ids that mean nothing.
pub fn coalesce(bytes: &[u8]) {
    let (mut run, mut written, mut packets) = (Run::default(), Vec::new(), Vec::new());
    for packet in split(bytes) {
        let segment = Segment::parse(packet);
        if !segment.is_some_and(|segment| run.join(&segment, packet)) {
            written.extend(run.finish().map(<[u8]>::to_vec));
            let Some(segment) = segment else { continue };
            run.begin(&segment, packet);
        }
        packets.push(comparable(packet));
    }
    written.extend(run.finish().map(<[u8]>::to_vec));
    let again: Vec<Vec<u8>> = written.iter().flat_map(|write| cut(write)).collect();
    assert_eq!(again, packets);
}

/// Datagrams, each behind its length, from a peer: what is delivered was allowed.
pub fn receive(bytes: &[u8]) {
    let address = |text: &str| text.parse().expect("an address");
    let peer = Peer {
        endpoint: SocketAddr::new(address("192.0.2.2"), 8285),
        outer: Vec::new(),
        subnets: vec!["10.42.2.0/24".parse().expect("a subnet")],
        ecn: EcnMode::Normal,
        segments: true,
        traffic: Arc::default(),
    };
    let ours = "10.42.1.0/24".parse().expect("a subnet");
    let routes = RouteTable::new(&[ours], vec![peer]);
    let guard = Guard { mode: GuardMode::Strict, mtu: 1472, own: address("192.0.2.1") };
    for datagram in split(bytes) {
        let mut packet = datagram.to_vec();
        assert_ne!(guard.judge(&routes, address("192.0.2.9"), &packet), Verdict::Deliver);
        if guard.judge(&routes, address("192.0.2.2"), &packet) == Verdict::Deliver {
            let view = IpView::check(&packet).expect("delivered, so a packet");
            assert!(ours.contains(view.destination()) && !ours.contains(view.source()));
            assert!(packet.len() <= 1472 && view.ttl() > 1);
            if carry_over(datagram.len().to_le_bytes()[0], &mut packet) {
                decrement_ttl(&mut packet);
                assert!(IpView::check(&packet).is_ok_and(|view| view.header_is_intact()));
            }
        }
    }
}

/// Pieces, each behind its length in two bytes; the last one is what is left.
fn split(mut bytes: &[u8]) -> impl Iterator<Item = &[u8]> {
    std::iter::from_fn(move || {
        let (len, rest) = bytes.split_first_chunk::<2>()?;
        let (piece, rest) = rest.split_at(rest.len().min(u16::from_be_bytes(*len).into()));
        bytes = rest;
        Some(piece)
    })
}

fn cut(write: &[u8]) -> Vec<Vec<u8>> {
    let header = VirtioNetHdr::parse(write).expect("each write has a header");
    let packet = &write[VirtioNetHdr::LEN..];
    let Some(cut) = Cut::plan(&header, packet).expect("what was joined can be cut") else {
        return vec![comparable(packet)];
    };
    let one = |number| {
        let mut out = vec![0; cut.len_of(number)];
        cut.write(packet, number, &mut out);
        comparable(&out)
    };
    (0..cut.count()).map(one).collect()
}

/// Without the id and its checksum, where nobody may cut the packet (RFC 6864 4.1), and without
/// IPv4's checksum, which the kernel verifies before anything is joined.
fn comparable(packet: &[u8]) -> Vec<u8> {
    let mut packet = packet.to_vec();
    if packet[0] >> 4 == 4 {
        packet[10..12].fill(0);
        if packet[9] == 17 && packet[6] & 0x40 != 0 {
            packet[4..6].fill(0);
        }
    }
    packet
}
