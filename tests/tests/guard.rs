//! What a host lets in: packets sent straight at weftd's port, by a peer and by a stranger, with
//! every field a lie in turn. Nothing of it comes out; the same packet made valid does.

use std::net::{IpAddr, SocketAddr, UdpSocket};
use std::time::Duration;

use anyhow::{Context, Result, bail};
use weft_daemon::lab::Lab;
use weft_tests::{base, bring_up, counter, dual_stack, hosts, overlay, udp_packet, until};

const WEFT_PORT: u16 = 8285;
const PORT: u16 = 9999;

/// Everything that arrives in the first host's container.
struct Ear(UdpSocket);

impl Ear {
    fn open(lab: &Lab) -> Result<Self> {
        Self::at(lab, lab.container(0)?.address()?)
    }

    fn at(lab: &Lab, address: IpAddr) -> Result<Self> {
        let container = lab.container(0)?;
        let address = SocketAddr::new(address, PORT);
        let socket = container.netns.run(|| UdpSocket::bind(address))??;
        socket.set_read_timeout(Some(Duration::from_secs(10)))?;
        Ok(Self(socket))
    }

    fn next(&self) -> Result<Vec<u8>> {
        let mut bytes = [0; 2048];
        let len = self.0.recv(&mut bytes).context("nothing came out")?;
        Ok(bytes[..len].to_vec())
    }
}

/// Sends bytes to the first host's weftd from another host's underlay address.
fn inject(lab: &Lab, from: usize, datagram: &[u8]) -> Result<()> {
    let to = SocketAddr::new(lab.host(0).address, WEFT_PORT);
    let sent =
        lab.host(from).netns.run(|| UdpSocket::bind("0.0.0.0:0")?.send_to(datagram, to))??;
    if sent != datagram.len() {
        bail!("only {sent} bytes went out");
    }
    Ok(())
}

/// Injects, and waits for the first host to count it under this name.
fn is_counted(lab: &Lab, from: usize, datagram: &[u8], name: &str) -> Result<()> {
    let before = counter(lab, 0, name)?;
    inject(lab, from, datagram)?;
    until(&format!("{name} counts {datagram:02x?}"), || Ok(counter(lab, 0, name)? > before))
}

/// Two hosts with a daemon and a container each, and a third one on the link without.
fn two_and_a_stranger(flags: &[&str]) -> Result<Lab> {
    let mut lab = hosts(3)?;
    for host in 0..2 {
        lab.start_daemon(host, flags)?;
    }
    for host in 0..2 {
        lab.wait_ready(host, weft_tests::DEADLINE)?;
        lab.attach_container(host)?;
    }
    until("the two know each other", || Ok(lab.status(0)?.peers.len() == 1))?;
    Ok(lab)
}

fn ip(text: &str) -> IpAddr {
    text.parse().expect("an address")
}

#[test]
fn nothing_invalid_comes_out_and_the_valid_does() -> Result<()> {
    let lab = two_and_a_stranger(&[])?;
    let (us, them) = (lab.container(0)?.address()?, lab.container(1)?.address()?);
    let (peer, stranger) = (1, 2);
    let packet = |from, to| udp_packet(from, to, PORT, 60, b"injected");
    let good = packet(them, us)?;
    let changed = |at: usize, value: u8| {
        let mut bytes = good.clone();
        bytes[at] = value;
        bytes
    };
    let ear = Ear::open(&lab)?;

    is_counted(&lab, stranger, &good, "udp_to_tun_unknown_sender")?;
    for source in [us, ip("8.8.8.8"), lab.host(0).address, lab.host(2).address, ip("10.42.0.1")] {
        is_counted(&lab, peer, &packet(source, us)?, "udp_to_tun_foreign_source")?;
    }
    for to in [them, lab.host(0).address, ip("224.0.0.1"), ip("255.255.255.255"), ip("127.0.0.1")] {
        is_counted(&lab, peer, &packet(them, to)?, "udp_to_tun_foreign_destination")?;
    }
    let v6 = udp_packet(ip("fd00::1"), ip("fd00::2"), PORT, 60, b"injected")?;
    is_counted(&lab, peer, &v6, "udp_to_tun_foreign_destination")?;
    for malformed in [
        good[..1].to_vec(),
        good[..19].to_vec(),
        good[..good.len() - 1].to_vec(),
        [&good[..], b"x"].concat(),
        changed(0, 0x4f),
        changed(0, 0x44),
        changed(0, 0x55),
        changed(3, 0xff),
        changed(10, !good[10]),
        v6[..39].to_vec(),
        b"A".repeat(40),
    ] {
        is_counted(&lab, peer, &malformed, "udp_to_tun_malformed")?;
    }
    let oversized = udp_packet(them, us, PORT, 60, &[7; 1473 - 28])?;
    is_counted(&lab, peer, &oversized, "udp_to_tun_oversized")?;
    is_counted(&lab, peer, &b"A".repeat(20_000), "udp_to_tun_oversized")?;
    for ttl in [0, 1] {
        let expired = udp_packet(them, us, PORT, ttl, b"injected")?;
        is_counted(&lab, peer, &expired, "udp_to_tun_ttl_expired")?;
    }

    // Had any of the above come out, it would be heard before this.
    inject(&lab, peer, &udp_packet(them, us, PORT, 60, b"valid")?)?;
    assert_eq!(ear.next()?, b"valid");
    // A process of the peer's host may use the host's own address.
    inject(&lab, peer, &udp_packet(lab.host(1).address, us, PORT, 60, b"host")?)?;
    assert_eq!(ear.next()?, b"host");
    lab.remove()
}

#[test]
fn nothing_invalid_of_ipv6_comes_out_and_the_valid_does() -> Result<()> {
    let mut lab = hosts(2)?;
    dual_stack(&lab)?;
    bring_up(&mut lab, &[])?;
    let address = |host: usize| -> Result<IpAddr> {
        let mut addresses = lab.container(host)?.addresses.iter().map(|net| net.ip());
        addresses.find(IpAddr::is_ipv6).context("the container has no IPv6 address")
    };
    let (us, them) = (address(0)?, address(1)?);
    let packet = |from, to, hops| udp_packet(from, to, PORT, hops, b"injected");
    let good = packet(them, us, 60)?;
    let ear = Ear::at(&lab, us)?;

    for source in [us, ip("2001:db8::1"), ip("fd00:42:0:ffff::1"), ip("::1"), ip("fe80::1")] {
        is_counted(&lab, 1, &packet(source, us, 60)?, "udp_to_tun_foreign_source")?;
    }
    for to in [them, ip("fd00:168::94"), ip("ff02::1"), ip("::1"), ip("fe80::1")] {
        is_counted(&lab, 1, &packet(them, to, 60)?, "udp_to_tun_foreign_destination")?;
    }
    let mut longer = good.clone();
    longer[5] += 1;
    for malformed in [&good[..39], &good[..good.len() - 1], &longer] {
        is_counted(&lab, 1, malformed, "udp_to_tun_malformed")?;
    }
    for hops in [0, 1] {
        is_counted(&lab, 1, &packet(them, us, hops)?, "udp_to_tun_ttl_expired")?;
    }

    // Had any of the above come out, it would be heard before this.
    inject(&lab, 1, &udp_packet(them, us, PORT, 60, b"valid")?)?;
    assert_eq!(ear.next()?, b"valid");
    lab.remove()
}

/// Who is on the link may route to us what claims to come from a peer's container.
#[test]
fn what_comes_unwrapped_does_not_pass_for_a_containers() -> Result<()> {
    let lab = two_and_a_stranger(&[])?;
    let (us, them) = (lab.container(0)?.address()?, lab.container(1)?.address()?);
    let ear = Ear::open(&lab)?;
    let stranger = &lab.host(2).netns;
    stranger.ip(&["address", "add", &format!("{them}/32"), "dev", "lo"])?;
    stranger.ip(&["route", "add", &format!("{us}/32"), "via", &lab.host(0).address.to_string()])?;
    let send = |from: IpAddr, text: &[u8]| -> Result<usize> {
        let to = SocketAddr::new(us, PORT);
        Ok(stranger.run(|| UdpSocket::bind((from, 0))?.send_to(text, to))??)
    };
    let dropped = || -> Result<bool> {
        let rules = lab.host(0).netns.tool("iptables", &["-vxnL", "FLANNEL-FWD"])?;
        let drops = rules.lines().filter(|line| line.contains(" DROP "));
        Ok(drops.filter_map(|line| line.split_whitespace().next()).any(|packets| packets != "0"))
    };
    assert!(!dropped()?);
    send(them, b"forged")?;
    until("it is dropped", dropped)?;
    // As itself it may, as by flannel.
    send(lab.host(2).address, b"honest")?;
    assert_eq!(ear.next()?, b"honest");
    lab.remove()
}

/// By the default route they would leave as they are.
#[test]
fn no_packet_leaves_in_clear_while_weftd_is_away() -> Result<()> {
    let mut lab = hosts(2)?;
    bring_up(&mut lab, &[])?;
    let them = lab.container(1)?.address()?.to_string();
    let gateway = lab.host(1).address.to_string();
    lab.host(0).netns.ip(&["route", "replace", "default", "via", &gateway])?;
    lab.host(0).netns.ip(&["route", "get", &them])?;
    lab.stop_daemon(0)?;
    assert!(lab.host(0).netns.ip(&["route", "get", &them]).is_err());
    lab.host(0).netns.ip(&["route", "get", "192.0.2.1"])?;
    lab.start_daemon(0, &[])?;
    lab.wait_ready(0, weft_tests::DEADLINE)?;
    weft_tests::reaches(&lab, 0, 1)?;
    lab.remove()
}

#[test]
fn a_peer_may_be_given_another_address() -> Result<()> {
    let mut lab = hosts(3)?;
    let source = format!("{}={}", lab.host(1).address, lab.host(2).address);
    for host in 0..2 {
        lab.start_daemon(host, &["--peer-source", &source])?;
    }
    for host in 0..2 {
        lab.wait_ready(host, weft_tests::DEADLINE)?;
        lab.attach_container(host)?;
    }
    until("the two know each other", || Ok(lab.status(0)?.peers.len() == 1))?;
    let ear = Ear::open(&lab)?;
    let (us, them) = (lab.container(0)?.address()?, lab.container(1)?.address()?);
    inject(&lab, 2, &udp_packet(them, us, PORT, 60, b"valid")?)?;
    assert_eq!(ear.next()?, b"valid");
    lab.remove()
}

/// What each mode lets in, and what it still does not: see docs/security.md.
#[test]
fn the_guard_loosens_by_flag() -> Result<()> {
    for mode in ["peer", "off"] {
        let lab = two_and_a_stranger(&["--guard", mode])?;
        let (peer, stranger) = (1, 2);
        let (us, them) = (lab.container(0)?.address()?, lab.container(1)?.address()?);
        let packet = |from, to| udp_packet(from, to, PORT, 60, b"injected");
        let ear = Ear::open(&lab)?;
        let sender = if mode == "peer" { peer } else { stranger };

        for own in [us, base(&lab, 0)?, lab.host(0).address] {
            is_counted(&lab, sender, &packet(own, us)?, "udp_to_tun_foreign_source")?;
        }
        if mode == "peer" {
            for source in [them, ip("8.8.8.8")] {
                is_counted(&lab, stranger, &packet(source, us)?, "udp_to_tun_unknown_sender")?;
            }
            is_counted(&lab, peer, &packet(them, them)?, "udp_to_tun_foreign_destination")?;
        }

        // Had any of the above come out, it would be heard before this.
        inject(&lab, sender, &udp_packet(ip("8.8.8.8"), us, PORT, 60, b"foreign")?)?;
        assert_eq!(ear.next()?, b"foreign", "{mode}");
        lab.remove()?;
    }
    Ok(())
}

/// What a node sends from besides its public address is published, and let in.
#[test]
fn a_nodes_further_addresses_are_its_own() -> Result<()> {
    let mut lab = hosts(2)?;
    lab.host(1).netns.ip(&["address", "add", "10.168.0.250/24", "dev", "eth0"])?;
    bring_up(&mut lab, &[])?;
    let ear = Ear::open(&lab)?;
    let (us, them) = (lab.container(0)?.address()?, lab.container(1)?.address()?);
    let packet = udp_packet(them, us, PORT, 60, b"other address")?;
    let to = SocketAddr::new(lab.host(0).address, WEFT_PORT);
    // The record that tells of the address comes after the lease.
    ear.0.set_read_timeout(Some(Duration::from_millis(100)))?;
    until("it is let in", || {
        lab.host(1).netns.run(|| UdpSocket::bind("10.168.0.250:0")?.send_to(&packet, to))??;
        Ok(ear.next()? == b"other address")
    })?;
    lab.remove()
}

#[test]
fn what_it_makes_bears_its_mark() -> Result<()> {
    let lab = overlay(2)?;
    let routes = lab.host(0).netns.ip_json(&["route", "show", "proto", "119"])?;
    // Into the device, and for when that is away.
    assert_eq!(routes.as_array().map(Vec::len), Some(2), "{routes}");
    let links = lab.host(0).netns.ip_json(&["link", "show", "flannel0"])?;
    assert_eq!(links[0]["ifalias"], "weft");
    lab.remove()
}
