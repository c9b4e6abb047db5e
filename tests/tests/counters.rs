//! Counters are exact: against what crosses the underlay, and against the TUN device's own.

use std::fmt::Debug;

use anyhow::{Context, Result, bail, ensure};
use serde_json::Value;
use weft_daemon::lab::{Bytes, Lab};
use weft_daemon::netns::NetNs;
use weft_daemon::status::TrafficStatus;
use weft_tests::{bring_up, counter, hosts, metrics, plain_wire, until};

/// Outer IPv4 and UDP headers.
const OVERHEAD: u64 = 28;
/// Probes come in pairs each ten seconds.
const TRIES: usize = 20;

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

/// A number that the kernel keeps of the overlay's device.
fn link(lab: &Lab, host: usize, way: &str, name: &str) -> Result<u64> {
    let device = lab.status(host)?.device.context("no device")?;
    let links = lab.host(host).netns.ip_json(&["-s", "link", "show", "dev", &device])?;
    links[0]["stats64"][way][name].as_u64().with_context(|| format!("no {way} {name}: {links}"))
}

/// Holds what was read between two of the daemons' probes against each other: when one of them has
/// crossed meanwhile, it is read again.
fn between_probes(lab: &Lab, check: impl Fn() -> Result<()>) -> Result<()> {
    let crossed = || -> Result<Vec<u64>> {
        let names = ["tun_to_udp_packets", "udp_to_tun_packets"];
        let all = (0..2).flat_map(|host| names.map(|name| (host, name)));
        all.map(|(host, name)| counter(lab, host, name)).collect()
    };
    for _ in 0..TRIES {
        let before = crossed()?;
        let outcome = check();
        if outcome.is_ok() || crossed()? == before {
            return outcome;
        }
    }
    bail!("packets never cease to cross")
}

fn same<T: PartialEq + Debug>(left: T, right: T, what: &str) -> Result<()> {
    ensure!(left == right, "{what}: {left:?} is not {right:?}");
    Ok(())
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
        for (from, to) in [(0, 1), (1, 0)] {
            assert!(lab.transfer(from, to, Bytes(16 << 20))?.intact());
        }
        for (from, to) in [(0, 1), (1, 0)] {
            between_probes(&lab, || agree(&lab, from, to)).with_context(|| io.to_owned())?;
        }
        lab.remove()?;
    }
    Ok(())
}

/// Whether all that counts what crossed from one host to the other comes to the same.
fn agree(lab: &Lab, from: usize, to: usize) -> Result<()> {
    let ours = |host, name| counter(lab, host, name);
    // What was last sent may still be under way.
    until("all that was sent has come in", || {
        Ok(ours(from, "tun_to_udp_packets")? == ours(to, "udp_to_tun_packets")?)
    })?;
    let (packets, bytes) = counted(&lab.host(to).netns)?;
    let sent = ours(from, "tun_to_udp_packets")?;
    same(packets, sent, "packets on the wire")?;
    same(bytes, ours(from, "tun_to_udp_bytes")? + OVERHEAD * sent, "bytes on the wire")?;

    same(link(lab, to, "rx", "packets")?, ours(to, "udp_to_tun_writes")?, "the device's writes")?;
    same(link(lab, to, "rx", "bytes")?, ours(to, "udp_to_tun_bytes")?, "the device's bytes")?;
    same(link(lab, from, "tx", "packets")?, ours(from, "tun_to_udp_reads")?, "reads")?;
    let peer = |host| -> Result<TrafficStatus> {
        let status = lab.status(host)?;
        status.peers.first().and_then(|peer| peer.traffic).context("no traffic")
    };
    let (there, here) = (peer(from)?, peer(to)?);
    let wanted = (sent, ours(from, "tun_to_udp_bytes")?);
    same((there.sent_packets, there.sent_bytes), wanted, "what the peer was sent")?;
    same((here.received_packets, here.received_bytes), wanted, "what came from the peer")?;
    let told = metrics(&lab.host(to).netns, 8081)?;
    let of = |name: &str| told.get(name).copied().with_context(|| format!("no {name}"));
    #[expect(clippy::cast_precision_loss, reason = "far below 2^53")]
    let number = |count: u64| count as f64;
    let direction = r#"{direction="udp_to_tun"}"#;
    same(of(&format!("weft_packets_total{direction}"))?, number(packets), "weft_packets")?;
    for name in ["packets", "bytes"] {
        let labels = r#"{device="flannel0",way="receive"}"#;
        let told = of(&format!("weft_device_{name}_total{labels}"))?;
        same(told, number(link(lab, to, "rx", name)?), name)?;
    }
    // Each packet was in one batch, and in one write.
    let input = of(&format!("weft_input_packets_total{direction}"))?;
    same(of(&format!("weft_batch_packets_sum{direction}"))?, input, "batches' packets")?;
    let written = of(&format!("weft_segment_packets_sum{direction}"))?;
    same(written, number(packets), "writes' packets")?;
    let batches = number(ours(to, "udp_to_tun_batches")?);
    same(of(&format!("weft_batch_duration_seconds_count{direction}"))?, batches, "batches")?;
    ensure!(of(&format!("weft_batch_duration_seconds_sum{direction}"))? > 0.0, "no time");

    ensure!(ours(to, "udp_to_tun_super_packets")? > 0, "no super-packet");
    ensure!(ours(to, "udp_to_tun_writes")? < ours(to, "udp_to_tun_packets")?, "nothing joined");
    Ok(())
}
