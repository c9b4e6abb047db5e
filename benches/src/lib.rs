//! Benchmarks: the engine's pure parts by themselves (`cargo bench`; route tables and packets for
//! that are here), and weft end to end beside what else carries packets (`make bench`; the modules).

pub mod check;
pub mod cpu;
pub mod load;
pub mod naive;
pub mod on_tokio_uring;
pub mod report;
pub mod run;
pub mod subject;
pub mod summary;
pub mod topology;

use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::sync::Arc;

use ipnetwork::{IpNetwork, Ipv4Network};
use weft_engine::offload::segment::Cut;
use weft_engine::offload::{Gso, VirtioNetHdr};
use weft_engine::packet::checksum;
use weft_engine::{EcnMode, Peer, RouteTable};

/// The first address of the overlay, 10.0.0.0; subnets of 256 addresses follow one another.
const OVERLAY: u32 = 0x0a00_0000;
/// Where hosts are, one after the other: 172.16.0.0.
const UNDERLAY: u32 = 0xac10_0000;

/// Whether a program is in the search path.
pub(crate) fn is_installed(program: &str) -> bool {
    let paths = std::env::var_os("PATH").unwrap_or_default();
    std::env::split_paths(&paths).any(|directory| directory.join(program).is_file())
}

/// An address in the subnet of the host with this number.
pub fn inner_address(host: u32) -> Ipv4Addr {
    Ipv4Addr::from_bits(OVERLAY + (host << 8) + 2)
}

/// The underlay address of the host with this number.
pub fn outer_address(host: u32) -> IpAddr {
    Ipv4Addr::from_bits(UNDERLAY + host).into()
}

/// Host 0's routes to `peers` other hosts, a /24 each.
pub fn route_table(peers: u32) -> RouteTable {
    let subnet = |host: u32| -> IpNetwork {
        let base = Ipv4Addr::from_bits(OVERLAY + (host << 8));
        Ipv4Network::new_checked(base, 24).expect("24 is a prefix length").into()
    };
    let peer = |host| Peer {
        endpoint: SocketAddr::new(outer_address(host), 8285),
        outer: vec![outer_address(host)],
        subnets: vec![subnet(host)],
        ecn: EcnMode::Compatibility,
        segments: true,
        traffic: Arc::default(),
    };
    RouteTable::new(&[subnet(0)], (1..=peers).map(peer).collect())
}

/// An IPv4 packet of `len` bytes between two hosts' containers.
pub fn packet(from: u32, to: u32, len: u16) -> Vec<u8> {
    let mut packet = vec![0; usize::from(len)];
    packet[..10].copy_from_slice(&[0x45, 0, 0, 0, 0, 1, 0x40, 0, 62, 17]);
    packet[2..4].copy_from_slice(&len.to_be_bytes());
    packet[12..16].copy_from_slice(&inner_address(from).octets());
    packet[16..20].copy_from_slice(&inner_address(to).octets());
    let sum = checksum(&packet[..20]);
    packet[10..12].copy_from_slice(&sum.to_be_bytes());
    packet
}

/// Payload bytes of a full segment of TCP with a timestamp, at an overlay MTU of 1472.
const SEGMENT_LEN: usize = 1420;

/// A TCP super-packet of `count` segments, as the kernel hands it over.
pub fn super_packet(count: usize) -> (VirtioNetHdr, Vec<u8>) {
    let mut packet = vec![0; 52 + count * SEGMENT_LEN];
    let len = u16::try_from(packet.len()).expect("a packet is below 64 KiB");
    packet[..10].copy_from_slice(&[0x45, 0, 0, 0, 0, 1, 0x40, 0, 62, 6]);
    packet[2..4].copy_from_slice(&len.to_be_bytes());
    packet[12..16].copy_from_slice(&inner_address(1).octets());
    packet[16..20].copy_from_slice(&inner_address(0).octets());
    // Data offset of 32 bytes, ACK; two NOPs and a timestamp (RFC 7323 3.2).
    packet[32..34].copy_from_slice(&[0x80, 0x10]);
    packet[40..44].copy_from_slice(&[1, 1, 8, 10]);
    let header = VirtioNetHdr {
        needs_checksum: true,
        gso: Gso::Tcp4,
        header_len: 52,
        segment_len: 1420,
        checksum_start: 20,
        checksum_offset: 16,
    };
    (header, packet)
}

/// The segments of [`super_packet`].
pub fn segments(count: usize) -> Vec<Vec<u8>> {
    let (header, packet) = super_packet(count);
    let cut = Cut::plan(&header, &packet).ok().flatten().expect("it can be cut");
    let one = |number| {
        let mut out = vec![0; cut.len_of(number)];
        cut.write(&packet, number, &mut out);
        out
    };
    (0..cut.count()).map(one).collect()
}

#[cfg(test)]
mod tests {
    use weft_engine::guard::{Guard, GuardMode, Verdict};

    use super::*;

    #[test]
    fn the_packets_are_ones_that_the_guard_lets_through() {
        let guard = Guard { mode: GuardMode::Strict, mtu: 1472, own: outer_address(0) };
        let verdict = guard.judge(&route_table(9), outer_address(9), &packet(9, 0, 64));
        assert_eq!(verdict, Verdict::Deliver);
    }
}
