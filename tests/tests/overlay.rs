//! Containers reach each other across hosts: pings, large packets, hops, transfers.

use std::thread;

use anyhow::Result;
use weft_daemon::lab::{Bytes, Patience, PingOptions, ping, transfer};
use weft_tests::{base, bring_up, counter, dual_stack, hosts, overlay, reaches};

/// Two hops in the kernels, two in the engines: what flannel shows.
const TTL_ACROSS: u8 = 60;
/// The MTU of the lab's wire less the outer IPv4 and UDP headers.
const MTU: u16 = 1500 - 28;
/// IPv4 and ICMP headers of an echo request.
const PING_HEADERS: u16 = 28;

#[test]
fn all_pairs_ping_with_flannels_ttl() -> Result<()> {
    let lab = overlay(3)?;
    for from in 0..3 {
        for to in (0..3).filter(|to| *to != from) {
            let report = lab.ping(from, to, &PingOptions::default())?;
            assert!(report.complete(), "{from} to {to}: {report:?}");
            assert!(report.replies.iter().all(|reply| reply.ttl == TTL_ACROSS), "{report:?}");
        }
    }
    lab.remove()
}

#[test]
fn the_largest_packet_passes_uncut_and_no_larger_one() -> Result<()> {
    let lab = overlay(2)?;
    let of_size = |size| PingOptions { size: Some(size), df: true, ..PingOptions::default() };
    let largest = lab.ping(0, 1, &of_size(MTU - PING_HEADERS))?;
    assert!(largest.complete(), "{largest:?}");
    let larger = lab.ping(0, 1, &of_size(MTU - PING_HEADERS + 1))?;
    assert_eq!(larger.received, 0);
    assert!(larger.errors.iter().any(|line| line.contains("1472")), "{larger:?}");
    lab.remove()
}

/// The first hop is the kernel of c1's host, the second its engine, the third the other engine.
#[test]
fn a_packet_out_of_hops_is_told_by_the_engine_that_dropped_it() -> Result<()> {
    let lab = overlay(2)?;
    for (ttl, teller) in [(2, 0), (3, 1)] {
        let report = lab.ping(0, 1, &PingOptions { ttl: Some(ttl), ..PingOptions::default() })?;
        assert_eq!(report.received, 0);
        let told = format!("From {} ", base(&lab, teller)?);
        assert!(
            report.errors.iter().any(|line| line.contains(&told) && line.contains("exceeded")),
            "ttl {ttl}, {told}: {report:?}"
        );
    }
    assert!(counter(&lab, 0, "tun_to_udp_ttl_expired")? > 0);
    assert!(counter(&lab, 1, "udp_to_tun_ttl_expired")? > 0);
    lab.remove()
}

#[test]
fn a_destination_that_nobody_has_is_unreachable() -> Result<()> {
    let lab = overlay(2)?;
    let leased: Vec<_> = (0..2).map(|host| base(&lab, host)).collect::<Result<_>>()?;
    let nobody = ["10.42.0.9", "10.42.255.9"].map(|text| text.parse().unwrap());
    let nobody = nobody.iter().find(|ip: &&std::net::IpAddr| {
        !leased
            .iter()
            .any(|base| base.to_string().rsplit_once('.') == ip.to_string().rsplit_once('.'))
    });
    let report = ping(&lab.container(0)?.netns, *nobody.unwrap(), &PingOptions::default())?;
    let told = format!("From {} ", base(&lab, 0)?);
    assert!(
        report.errors.iter().any(|line| line.contains(&told) && line.contains("Unreachable")),
        "{report:?}"
    );
    lab.remove()
}

#[test]
fn transfers_keep_their_hash_in_both_directions_at_once() -> Result<()> {
    let lab = overlay(2)?;
    let amount = Bytes(64 << 20);
    let (there, back) = thread::scope(|scope| {
        let there = scope.spawn(|| lab.transfer(0, 1, amount));
        let back = lab.transfer(1, 0, amount);
        (there.join().unwrap(), back)
    });
    for transfer in [there?, back?] {
        assert_eq!(transfer.bytes, amount.0);
        assert!(transfer.intact(), "{transfer:?}");
    }
    // What the engines dropped of it would have been resent; say so if it was much.
    for host in 0..2 {
        let moved = counter(&lab, host, "tun_to_udp_packets")?;
        assert!(moved > 64 << 20 >> 11, "the engine moved {moved} packets only");
        for super_packets in ["tun_to_udp_super_packets", "udp_to_tun_super_packets"] {
            assert!(counter(&lab, host, super_packets)? > 0, "{super_packets}");
        }
        assert_eq!(counter(&lab, host, "udp_to_tun_malformed")?, 0);
        assert_eq!(counter(&lab, host, "udp_to_tun_foreign_source")?, 0);
    }
    lab.remove()
}

#[test]
fn both_families_cross_an_ipv4_underlay() -> Result<()> {
    let mut lab = hosts(2)?;
    dual_stack(&lab)?;
    bring_up(&mut lab, &[])?;
    let [from, to] = [lab.container(0)?, lab.container(1)?];
    assert_eq!(to.addresses.len(), 2);
    reaches(&lab, 0, 1)?;
    for address in &to.addresses {
        let how = PingOptions::default();
        let report = ping(&from.netns, address.ip(), &how)?;
        assert!(report.replies.iter().all(|reply| reply.ttl == TTL_ACROSS), "{report:?}");
        let expired = ping(&from.netns, address.ip(), &PingOptions { ttl: Some(3), ..how })?;
        assert!(expired.errors.iter().any(|line| line.contains("exceeded")), "{expired:?}");
        let moved =
            transfer(&from.netns, &to.netns, address.ip(), Bytes(8 << 20), &Patience::default())?;
        assert!(moved.intact(), "{moved:?}");
    }
    lab.remove()
}
