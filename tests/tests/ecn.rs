//! A congestion mark that a router makes on the underlay reaches the container, and a packet whose
//! sender would not understand it is dropped (RFC 6040). Nodes that would lose it get packets that cannot
//! be marked. And what else the traffic class says outside.

use std::fs;
use std::io::{ErrorKind, Read};
use std::net::{IpAddr, SocketAddr, UdpSocket};
use std::time::Duration;

use anyhow::{Context, Result, anyhow};
use socket2::{SockRef, Socket};
use weft_daemon::lab::Lab;
use weft_daemon::netns::NetNs;
use weft_tests::{SUBNETS_KEPT_FREE, bring_up, counter, hosts, overlay, until, write_config};

/// Of the field's four values (RFC 3168 5).
const ECT_0: u32 = 0b10;
const CE: u8 = 0b11;

/// Sends one datagram with this traffic class from the first container to the second.
fn send(lab: &Lab, traffic_class: u32) -> Result<()> {
    send_to(lab, lab.container(1)?.address()?, traffic_class, b"marked")
}

/// Sends one datagram with this traffic class from the first container.
fn send_to(lab: &Lab, to: IpAddr, traffic_class: u32, payload: &[u8]) -> Result<()> {
    let near = lab.container(0)?;
    let socket = near.netns.run(|| UdpSocket::bind("0.0.0.0:0"))??;
    SockRef::from(&socket).set_tos_v4(traffic_class)?;
    socket.send_to(payload, SocketAddr::new(to, 9999))?;
    Ok(())
}

/// The ECN field of the next packet from this address, if one comes soon.
fn next_field(mut capture: &Socket, from: IpAddr) -> Result<Option<u8>> {
    let IpAddr::V4(from) = from else { panic!("the lab is IPv4") };
    let mut packet = [0; 2048];
    loop {
        match capture.read(&mut packet) {
            Ok(len) if len >= 20 && packet[12..16] == from.octets() => {
                return Ok(Some(packet[1] & CE));
            }
            Ok(_) => {}
            Err(error) if error.kind() == ErrorKind::WouldBlock => return Ok(None),
            Err(error) => return Err(error.into()),
        }
    }
}

/// AF21 (RFC 2597), above the two bits of the ECN field.
const AF21: u32 = 18 << 2;

/// What the outer header says of a packet that may be marked, towards a weft node and towards a flannel
/// node, which has a lease and no record.
#[test]
fn the_outer_traffic_class_goes_by_the_peer_and_the_flag() -> Result<()> {
    for (flag, dscp) in [("--dscp=clear", "cs0"), ("--dscp=copy", "af21")] {
        let mut lab = hosts(2)?;
        write_config(&lab, SUBNETS_KEPT_FREE)?;
        bring_up(&mut lab, &[flag])?;
        let flannel = lab.add_host()?;
        let lease = format!(r#"{{"PublicIP":"{}"}}"#, lab.host(flannel).address);
        fs::write(lab.registry()?.join("subnets/10.42.200.0-24"), lease)?;
        until("both peers are known, and one by its record", || {
            let peers = lab.status(0)?.peers;
            Ok(peers.len() == 2 && peers.iter().filter(|peer| peer.version.is_some()).count() == 1)
        })?;
        let weft = lab.container(1)?.address()?;
        for (node, to, ecn) in [(1, weft, "ect0"), (flannel, [10, 42, 200, 9].into(), "not-ect")] {
            let netns = &lab.host(node).netns;
            count_outer(netns, &format!("ip ecn {ecn} ip dscp {dscp}"))?;
            send_to(&lab, to, AF21 | ECT_0, &[0; PAYLOAD_LEN])?;
            until("the packet comes", || Ok(counted(netns)?[0] == 1))?;
            assert_eq!(counted(netns)?[1], 1, "to host {node}: not {ecn} and {dscp}, by {flag}");
        }
        lab.remove()?;
    }
    Ok(())
}

/// By which the packet is known among the daemons' probes; and that with the outer UDP header, and the
/// inner headers.
const PAYLOAD_LEN: usize = 333;
const OUTER_LEN: usize = 8 + 20 + 8 + PAYLOAD_LEN;

/// Counts such packets at their arrival on the underlay, and those of them with this outer header.
fn count_outer(netns: &NetNs, header: &str) -> Result<()> {
    netns.tool("nft", &["add table ip outer"])?;
    netns.tool("nft", &["add chain ip outer in { type filter hook prerouting priority -300; }"])?;
    for matches in ["", header] {
        let rule =
            format!("add rule ip outer in udp dport 8285 udp length {OUTER_LEN} {matches} counter");
        netns.tool("nft", &[&rule])?;
    }
    Ok(())
}

fn counted(netns: &NetNs) -> Result<[u64; 2]> {
    let listed = netns.tool("nft", &["list chain ip outer in"])?;
    let counts = listed.split("counter packets ").skip(1);
    let counts = counts.map(|rest| Ok(rest.split(' ').next().context("no count")?.parse()?));
    let counts: Vec<u64> = counts.collect::<Result<_>>()?;
    counts.try_into().map_err(|_| anyhow!("{listed}"))
}

#[test]
fn marks_cross_the_tunnel() -> Result<()> {
    let lab = overlay(2)?;
    let router = &lab.host(1).netns;
    router.tool("nft", &["add table ip router"])?;
    let chain = "add chain ip router in { type filter hook prerouting priority -300; }";
    router.tool("nft", &[chain])?;
    router.tool("nft", &["add rule ip router in udp dport 8285 ip ecn ect0 counter"])?;
    router.tool("nft", &["add rule ip router in udp dport 8285 ip ecn set ce"])?;

    let capture = weft_tests::capture(&lab.container(1)?.netns)?;
    capture.set_read_timeout(Some(Duration::from_millis(100)))?;
    let from = lab.container(0)?.address()?;

    // The peer counts as weft's from its first record on.
    until("a packet that can be marked shows that outside", || {
        send(&lab, ECT_0)?;
        let field = next_field(&capture, from)?;
        let rules = router.tool("nft", &["list chain ip router in"])?;
        Ok(field == Some(CE) && !rules.contains("packets 0 "))
    })?;
    until("all that was sent so far has come", || Ok(next_field(&capture, from)?.is_none()))?;
    // The daemons' own probes are dropped and counted, too.
    let before = counter(&lab, 1, "udp_to_tun_congestion")?;
    send(&lab, 0)?;
    until("a packet that cannot be marked is dropped", || {
        Ok(counter(&lab, 1, "udp_to_tun_congestion")? > before)
    })?;
    send(&lab, ECT_0)?;
    let mut next = None;
    until("the packet behind it comes", || {
        next = next_field(&capture, from)?;
        Ok(next.is_some())
    })?;
    assert_eq!(next, Some(CE), "an unmarked packet came through");
    lab.remove()
}
