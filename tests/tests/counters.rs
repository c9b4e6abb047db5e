//! Counters are exact: against what crosses the underlay, and against the TUN device's own.

use anyhow::{Context, Result, ensure};
use serde_json::Value;
use weft_daemon::lab::{Bytes, Lab};
use weft_daemon::netns::NetNs;
use weft_daemon::status::TrafficStatus;
use weft_tests::{bring_up, counter, hosts, link_count, metrics, pings, plain_wire, until};

/// Outer IPv4 and UDP headers.
const OVERHEAD: u64 = 28;

/// Counts datagrams that come in from the underlay, as the kernel sees them there.
fn count_datagrams(netns: &NetNs) -> Result<()> {
    netns.tool("nft", &["add table inet count"])?;
    let chain = "add chain inet count in { type filter hook prerouting priority -300; }";
    netns.tool("nft", &[chain])?;
    netns.tool("nft", &["add rule inet count in iifname eth0 udp dport 8285 counter"])?;
    Ok(())
}

/// Packets, and their bytes from the outer IP header on.
fn counted(netns: &NetNs) -> Result<(u64, u64)> {
    let text = netns.tool("nft", &["-j", "list chain inet count in"])?;
    let answer: Value = serde_json::from_str(&text)?;
    let parts = answer["nftables"].as_array().context("no list")?;
    let rule = parts.iter().find_map(|part| part.get("rule")).context("no rule")?;
    let exprs = rule["expr"].as_array().context("no expressions")?;
    let counter = exprs.iter().find_map(|it| it.get("counter")).context("no counter")?;
    let number = |name: &str| counter[name].as_u64().context("no number");
    Ok((number("packets")?, number("bytes")?))
}

/// Two counts of the same thing, and what it is.
type Counts = Vec<(&'static str, f64, f64)>;

#[expect(clippy::cast_precision_loss, reason = "far below 2^53")]
fn number(count: u64) -> f64 {
    count as f64
}

/// All that counts what crosses from one host to the other.
fn counts(lab: &Lab, from: usize, to: usize) -> Result<Counts> {
    let ours = |host, name| -> Result<f64> { Ok(number(counter(lab, host, name)?)) };
    let device = |host, way, name| -> Result<f64> { Ok(number(link_count(lab, host, way, name)?)) };
    let peer = |host| -> Result<TrafficStatus> {
        let status = lab.status(host)?;
        status.peers.first().and_then(|peer| peer.traffic).context("no traffic")
    };
    let told = metrics(&lab.host(to).netns, 8081)?;
    let of = |name: &str, labels: &str| -> Result<f64> {
        told.get(&format!("{name}{{{labels}}}")).copied().with_context(|| format!("no {name}"))
    };
    let (wire_packets, wire_bytes) = counted(&lab.host(to).netns)?;
    let (wire_packets, wire_bytes) = (number(wire_packets), number(wire_bytes));
    let sent = ours(from, "tun_to_udp_packets")?;
    let sent_bytes = ours(from, "tun_to_udp_bytes")?;
    let (there, here) = (peer(from)?, peer(to)?);
    let written = device(to, "rx", "packets")?;
    let written_bytes = device(to, "rx", "bytes")?;
    let (way, received) = (r#"direction="udp_to_tun""#, r#"device="flannel0",way="receive""#);
    Ok(vec![
        ("packets on the wire", wire_packets, sent),
        ("bytes on the wire", wire_bytes, sent_bytes + number(OVERHEAD) * sent),
        ("packets that came in", ours(to, "udp_to_tun_packets")?, sent),
        ("the device's writes", written, ours(to, "udp_to_tun_writes")?),
        ("the device's bytes", written_bytes, ours(to, "udp_to_tun_bytes")?),
        ("the device's reads", device(from, "tx", "packets")?, ours(from, "tun_to_udp_reads")?),
        ("packets to the peer", number(there.sent_packets), sent),
        ("bytes to the peer", number(there.sent_bytes), sent_bytes),
        ("packets from the peer", number(here.received_packets), sent),
        ("bytes from the peer", number(here.received_bytes), sent_bytes),
        ("weft_packets", of("weft_packets_total", way)?, sent),
        ("weft_device_packets", of("weft_device_packets_total", received)?, written),
        ("weft_device_bytes", of("weft_device_bytes_total", received)?, written_bytes),
        ("weft_input_packets", of("weft_input_packets_total", way)?, sent),
        // Each packet was in one batch, and in one write.
        ("packets of batches", of("weft_batch_packets_sum", way)?, sent),
        ("packets of writes", of("weft_segment_packets_sum", way)?, sent),
        ("batches", of("weft_batch_duration_seconds_count", way)?, ours(to, "udp_to_tun_batches")?),
    ])
}

/// The counts while nothing crosses.
fn settled(lab: &Lab, from: usize, to: usize) -> Result<Counts> {
    let mut last = counts(lab, from, to)?;
    until("nothing crosses for a moment", || {
        let now = counts(lab, from, to)?;
        let rests = now == last;
        last = now;
        Ok(rests)
    })?;
    Ok(last)
}

/// Whether all have counted the same since then. A packet that crosses meanwhile is in some counts
/// and not yet in others, so they are read again.
fn agree(lab: &Lab, from: usize, to: usize, before: &Counts) -> Result<()> {
    until("all counts agree", || {
        for (now, then) in counts(lab, from, to)?.iter().zip(before) {
            let (what, left, right) = (now.0, now.1 - then.1, now.2 - then.2);
            #[expect(clippy::float_cmp, reason = "whole numbers")]
            let same = left == right;
            ensure!(same, "{what}: {left} is not {right}");
            ensure!(left > 0.0, "{what}: nothing was counted");
        }
        Ok(true)
    })
}

#[test]
fn they_agree_with_the_wire_and_with_the_device() -> Result<()> {
    for io in ["--io=uring", "--io=mmsg"] {
        let mut lab = hosts(2)?;
        plain_wire(&lab)?;
        for host in 0..2 {
            count_datagrams(&lab.host(host).netns)?;
        }
        bring_up(&mut lab, &[io, "--healthz-port=8081"])?;
        // What one sends before the other knows it does not arrive.
        pings(&lab)?;
        let both = [(0, 1), (1, 0)];
        let before = both.map(|(from, to)| settled(&lab, from, to));
        for (from, to) in both {
            assert!(lab.transfer(from, to, Bytes(16 << 20))?.intact());
        }
        for ((from, to), before) in both.into_iter().zip(before) {
            agree(&lab, from, to, &before?).with_context(|| format!("{io}, {from} to {to}"))?;
            let ours = |name| counter(&lab, to, name);
            let told = metrics(&lab.host(to).netns, 8081)?;
            let lasted = r#"weft_batch_duration_seconds_sum{direction="udp_to_tun"}"#;
            ensure!(told.get(lasted).is_some_and(|it| *it > 0.0), "no time");
            ensure!(ours("udp_to_tun_super_packets")? > 0, "no super-packet");
            ensure!(ours("udp_to_tun_writes")? < ours("udp_to_tun_packets")?, "nothing joined");
        }
        lab.remove()?;
    }
    Ok(())
}
