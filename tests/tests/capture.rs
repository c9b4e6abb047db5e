//! What leaves the socket and what comes out of the TUN device, packet by packet: each is whole,
//! and every checksum in it is right, computed by somebody else's code.

use std::io::{ErrorKind, Read};
use std::net::IpAddr;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use etherparse::{Ipv4HeaderSlice, NetSlice, SlicedPacket, TransportSlice};
use weft_benches::subject::Running;
use weft_benches::topology::{Mode, Topology, inner, outer};
use weft_daemon::lab::{Bytes, Patience, transfer};
use weft_daemon::netns::NetNs;

/// What a packet of TCP says of its place in the stream.
#[derive(Debug, Clone, Copy)]
struct Place {
    id: u16,
    sequence: u32,
    len: usize,
}

/// Checks every packet from one address to another that a namespace sees; says how many there were.
fn check_all(
    netns: &NetNs,
    (from, to): (IpAddr, IpAddr),
    done: &AtomicBool,
    mut check: impl FnMut(&[u8]) -> Result<()>,
) -> Result<usize> {
    let mut socket = weft_tests::capture(netns)?;
    socket.set_read_timeout(Some(Duration::from_millis(200)))?;
    let (mut bytes, mut count) = (vec![0; 66_000], 0);
    loop {
        match socket.read(&mut bytes) {
            Ok(len) => {
                let header = Ipv4HeaderSlice::from_slice(&bytes[..len])?;
                let ends = (header.source_addr().into(), header.destination_addr().into());
                if ends == (from, to) {
                    check(&bytes[..len]).with_context(|| format!("{:02x?}", &bytes[..len]))?;
                    count += 1;
                }
            }
            Err(error) if error.kind() == ErrorKind::WouldBlock => {
                if done.load(Ordering::Relaxed) {
                    return Ok(count);
                }
            }
            Err(error) => return Err(error.into()),
        }
    }
}

/// A packet of the overlay, right in every field; where it is in its stream, if it is TCP's. What else
/// there is are the daemons' probes.
fn inner_place(packet: &[u8]) -> Result<Option<Place>> {
    let sliced = SlicedPacket::from_ip(packet)?;
    let Some(NetSlice::Ipv4(ip)) = &sliced.net else { bail!("not IPv4") };
    let header = ip.header().to_header();
    ensure!(header.calc_header_checksum() == header.header_checksum, "IPv4 checksum");
    ensure!(usize::from(header.total_len) == packet.len(), "length");
    let (sum, found, place) = match &sliced.transport {
        Some(TransportSlice::Tcp(tcp)) => {
            let place = Place {
                id: header.identification,
                sequence: tcp.sequence_number(),
                len: tcp.payload().len(),
            };
            let sum = tcp.to_header().calc_checksum_ipv4(&header, tcp.payload())?;
            (sum, tcp.checksum(), Some(place))
        }
        Some(TransportSlice::Udp(udp)) => {
            let sum = udp.to_header().calc_checksum_ipv4(&header, udp.payload())?;
            (sum, udp.checksum(), None)
        }
        Some(TransportSlice::Icmpv4(icmp)) => {
            (icmp.icmp_type().calc_checksum(icmp.payload()), icmp.checksum(), None)
        }
        other => bail!("neither TCP nor a probe: {other:?}"),
    };
    // Linux writes zero, one packet in 65,536, as its other form: CSUM_MANGLED_0 in
    // skb_checksum_help() (net/core/dev.c) makes no difference between UDP and TCP. Receivers see
    // none either.
    let zeros = (sum, found) == (0, 0xffff);
    ensure!(sum == found || zeros, "transport checksum {found:04x}, not {sum:04x}");
    Ok(place)
}

/// The packet in a datagram whose own checksums are right.
fn datagram_content(packet: &[u8]) -> Result<Vec<u8>> {
    let sliced = SlicedPacket::from_ip(packet)?;
    let Some(NetSlice::Ipv4(ip)) = &sliced.net else { bail!("not IPv4") };
    let header = ip.header().to_header();
    ensure!(header.calc_header_checksum() == header.header_checksum, "outer IPv4 checksum");
    let Some(TransportSlice::Udp(udp)) = &sliced.transport else { bail!("not UDP") };
    ensure!(udp.destination_port() == 8285, "port {}", udp.destination_port());
    let sum = udp.to_header().calc_checksum_ipv4(&header, udp.payload())?;
    ensure!(sum == udp.checksum(), "outer UDP checksum {:04x}, not {sum:04x}", udp.checksum());
    Ok(udp.payload().to_vec())
}

/// Has the stream's packets checked on the wire and in the second container.
fn every_packet_is_right(net: &Topology) -> Result<()> {
    let done = AtomicBool::new(false);
    let mut last: Option<Place> = None;
    let steps = AtomicUsize::new(0);
    let on_the_wire = |packet: &[u8]| {
        let Some(place) = inner_place(&datagram_content(packet)?)? else { return Ok(()) };
        // Data that follows data, and is no retransmission, has the next id.
        if let Some(before) = last.filter(|it| it.len > 0 && place.len > 0) {
            let follows = place.sequence.wrapping_sub(before.sequence);
            if usize::try_from(follows)? == before.len {
                ensure!(place.id == before.id.wrapping_add(1), "{place:?} behind {before:?}");
                steps.fetch_add(1, Ordering::Relaxed);
            }
        }
        last = Some(place);
        Ok(())
    };
    let behind_the_tun = |packet: &[u8]| inner_place(packet).map(drop);
    let [wire, container] = thread::scope(|scope| {
        let (host, container) = (&net.hosts[1], &net.containers[1]);
        let (outside, inside) = ((outer(0), outer(1)), (inner(0), inner(1)));
        let done = &done;
        let wire = scope.spawn(move || check_all(host, outside, done, on_the_wire));
        let container = scope.spawn(move || check_all(container, inside, done, behind_the_tun));
        let [from, to] = &net.containers;
        let moved = transfer(from, to, inner(1), Bytes(16 << 20), &Patience::default());
        done.store(true, Ordering::Relaxed);
        let counts = [wire, container].map(|it| it.join().expect("a capture panicked"));
        ensure!(moved?.intact(), "the bytes are others");
        anyhow::Ok(counts)
    })?;
    // The capture's queue may overflow; what it shows is right all the same.
    let (wire, container) = (wire?, container?);
    ensure!(wire > 2000 && container > 2000, "only {wire} and {container} packets were seen");
    let steps = steps.into_inner();
    ensure!(steps > 1000, "only {steps} in a row");
    Ok(())
}

#[test]
fn every_checksum_is_right_on_the_wire_and_behind_the_tun() -> Result<()> {
    let net = Topology::new(Mode::Wire)?;
    // Nobody leaves a checksum to a device, or a cut.
    for (netns, device) in [(&net.hosts[0], "eth0"), (&net.hosts[1], "c")] {
        netns.tool("ethtool", &["-K", device, "tso", "off", "gso", "off", "tx", "off"])?;
    }
    for flags in [&["--io=uring"][..], &["--io=mmsg"], &["--offload=udp-segment=off,tun-tso=off"]] {
        let running = Running::weft_with(&net, flags)?;
        every_packet_is_right(&net).with_context(|| format!("{flags:?}"))?;
        drop(running);
    }
    Ok(())
}
