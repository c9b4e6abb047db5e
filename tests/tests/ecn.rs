//! A congestion mark that a router makes on the underlay reaches the container, and a packet whose
//! sender would not understand it is dropped (RFC 6040).

use std::io::{ErrorKind, Read};
use std::net::{IpAddr, SocketAddr, UdpSocket};
use std::time::Duration;

use anyhow::Result;
use socket2::{SockRef, Socket};
use weft_daemon::lab::Lab;
use weft_tests::{counter, overlay, until};

/// Of the field's four values (RFC 3168 5).
const ECT_0: u32 = 0b10;
const CE: u8 = 0b11;

/// Sends one datagram with this traffic class from the first container to the second.
fn send(lab: &Lab, traffic_class: u32) -> Result<()> {
    let (near, far) = (lab.container(0)?, lab.container(1)?);
    let socket = near.netns.run(|| UdpSocket::bind("0.0.0.0:0"))??;
    SockRef::from(&socket).set_tos_v4(traffic_class)?;
    socket.send_to(b"marked", SocketAddr::new(far.address()?, 9999))?;
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
