//! A new operator breaks things, one a test, and learns within fifteen seconds what it is.

use std::fs;
use std::net::UdpSocket;
use std::process::Command;
use std::sync::atomic::AtomicBool;
use std::sync::atomic::Ordering::Relaxed;
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use weft_control::LeaseKey;
use weft_daemon::lab::{Bytes, Lab, PingOptions};
use weft_daemon::status::ProbeStatus;
use weft_tests::doctor::{Check, finds, finds_within};
use weft_tests::{
    DEADLINE, bring_up, counter, etcd, hosts, hosts_of, measures, overlay, plain_wire, program,
    subnet, tells, until, until_within, write_sysctl,
};

/// How long a break may go unnamed.
const NAMED_WITHIN: Duration = Duration::from_secs(15);

/// Waits until doctor on the first host names it, in what it saw or in the cure.
fn named(lab: &Lab, name: &str, verdict: &str, text: &str) -> Result<Check> {
    finds_within(NAMED_WITHIN, lab, 0, name, verdict, text)
}

/// Waits until the first host's probes of the other have found that all is well.
fn probed(lab: &Lab) -> Result<()> {
    until("the peer is probed", || {
        let probe = lab.status(0)?.peers.first().context("no peer")?.probe.clone();
        Ok(probe.reachable == Some(true) && probe.path_mtu == lab.status(0)?.mtu)
    })
}

fn pair() -> Result<Lab> {
    let mut lab = hosts(2)?;
    bring_up(&mut lab, &["--healthz-port=8081"])?;
    probed(&lab)?;
    Ok(lab)
}

/// Drops what the switch forwards and this expression of nft matches.
fn drop_on_the_wire(lab: &Lab, what: &str) -> Result<()> {
    let switch = lab.switch()?;
    switch.tool("nft", &["add table bridge wire"])?;
    let chain = "add chain bridge wire forward { type filter hook forward priority 0; }";
    switch.tool("nft", &[chain])?;
    switch.tool("nft", &[&format!("add rule bridge wire forward {what} drop")]).map(drop)
}

#[test]
fn a_peer_that_is_down() -> Result<()> {
    let lab = pair()?;
    lab.switch()?.ip(&["link", "set", "h2", "down"])?;
    named(&lab, "peers", "FAIL", "10.168.0.95")?;
    let probe = &lab.status(0)?.peers[0].probe;
    assert_eq!((probe.reachable, probe.fault.as_deref()), (Some(false), Some("silent")));
    let (unreachable, silent) = ("weft_peers_unreachable", "weft_peers_faulty{fault=\"silent\"}");
    for name in [unreachable, silent] {
        measures(&lab, 0, name, 1)?;
    }
    lab.switch()?.ip(&["link", "set", "h2", "up"])?;
    probed(&lab)?;
    for name in [unreachable, silent] {
        measures(&lab, 0, name, 0)?;
    }
    lab.remove()
}

#[test]
fn a_peer_whose_daemon_has_ended() -> Result<()> {
    let mut lab = pair()?;
    lab.kill_daemon(1)?;
    named(&lab, "peers", "FAIL", "ssh 10.168.0.95 systemctl start weftd")?;
    lab.start_daemon(1, &[])?;
    probed(&lab)?;
    lab.remove()
}

/// Where the kernel moves the packets, it goes on answering pings: no offload is to blame.
#[test]
fn a_peer_whose_daemon_has_ended_though_its_kernel_answers() -> Result<()> {
    for backend in ["vxlan", "host-gw"] {
        let mut lab = hosts_of(backend, 2)?;
        bring_up(&mut lab, &[])?;
        probed(&lab)?;
        lab.kill_daemon(1)?;
        named(&lab, "peers", "FAIL", "ssh 10.168.0.95 systemctl start weftd")?;
        let status = lab.status(0)?;
        ensure!(status.peers[0].probe.fault.as_deref() == Some("no-daemon"), "{status:?}");
        ensure!(status.problems.is_empty(), "{status:?}");
        lab.start_daemon(1, &[])?;
        probed(&lab)?;
        lab.remove()?;
    }
    Ok(())
}

#[test]
fn a_port_that_is_blocked() -> Result<()> {
    let lab = pair()?;
    let peer = &lab.host(1).netns;
    let rule = ["INPUT", "-p", "udp", "--dport", "8285", "-j", "DROP"];
    peer.tool("iptables-nft", &[&["-I"], &rule[..]].concat())?;
    // Of another port, the peer says that nothing listens there.
    let other = lab.host(0).netns.run(|| UdpSocket::bind("10.168.0.94:0"))??;
    let ended = AtomicBool::new(false);
    let found = thread::scope(|scope| {
        scope.spawn(|| {
            while !ended.load(Relaxed) {
                let _ = other.send_to(b"?", "10.168.0.95:9");
                thread::sleep(Duration::from_millis(100));
            }
        });
        let found = named(&lab, "port", "FAIL", "10.168.0.95");
        ended.store(true, Relaxed);
        found
    })?;
    ensure!(found.cure.contains("--dport 8285 -j ACCEPT"), "{found:?}");
    peer.tool("iptables-nft", &[&["-D"], &rule[..]].concat())?;
    probed(&lab)?;
    lab.remove()
}

#[test]
fn a_route_that_swallows_packets() -> Result<()> {
    let lab = pair()?;
    let host = &lab.host(0).netns;
    let blackhole = ["blackhole", &subnet(&lab, 1)?.to_string(), "metric", "5"].map(str::to_owned);
    let route = |what: &str| {
        let blackhole = blackhole.iter().map(String::as_str);
        host.ip(&["route", what].into_iter().chain(blackhole).collect::<Vec<_>>())
    };
    route("add")?;
    named(&lab, "routes", "FAIL", "the kernel discards packets for the peer's")?;
    route("del")?;
    probed(&lab)?;
    lab.remove()
}

#[test]
fn rules_that_are_flushed() -> Result<()> {
    let lab = pair()?;
    lab.host(0).netns.tool("iptables-nft", &["-F"])?;
    named(&lab, "rules", "WARN", "put back")?;
    lab.remove()
}

#[test]
fn a_path_that_swallows_large_packets() -> Result<()> {
    let lab = overlay(2)?;
    // As on a real wire: what is cut is cut before it.
    plain_wire(&lab)?;
    probed(&lab)?;
    drop_on_the_wire(&lab, "ether type ip ip protocol udp ip length > 1440")?;
    let found = named(&lab, "MTU", "FAIL", "more than 1400 bytes get lost")?;
    ensure!(found.cure.starts_with("ip link set eth0 mtu 1428"), "{found:?}");
    lab.switch()?.tool("nft", &["delete table bridge wire"])?;
    probed(&lab)?;
    lab.remove()
}

#[test]
fn an_offload_that_loses_what_it_cuts() -> Result<()> {
    let lab = pair()?;
    ensure!(lab.status(0)?.offloads["udp-segment"] == "on");
    // Nothing that a wire carries is larger; what an offload has yet to cut is.
    drop_on_the_wire(&lab, "ether type ip ip protocol udp meta length > 1600")?;
    named(&lab, "offloads", "WARN", "udp-segment is given up")?;
    ensure!(lab.status(0)?.offloads["udp-segment"] == "lossy");
    // Both directions have to find it out by themselves.
    until("large packets get through again", || {
        let ping = PingOptions { size: Some(1400), ..PingOptions::default() };
        Ok(lab.ping(0, 1, &ping)?.complete())
    })?;
    until("without it the path is whole", || Ok(lab.status(0)?.peers[0].probe.fault.is_none()))?;
    lab.remove()
}

/// One host loses what the others get.
#[test]
fn a_host_that_loses_what_is_cut_slows_down_nobody_else() -> Result<()> {
    let mut lab = overlay(3)?;
    let wholly = |host: usize| -> Result<bool> {
        let status = lab.status(host)?;
        let is_whole = |probe: &ProbeStatus| probe.fault.is_none() && probe.path_mtu == status.mtu;
        Ok(status.peers.iter().all(|peer| is_whole(&peer.probe)))
    };
    for host in 0..3 {
        until("all get all", || wholly(host))?;
    }
    drop_on_the_wire(
        &lab,
        "ether type ip ip daddr 10.168.0.96 ip protocol udp meta length > 1600",
    )?;
    let towards = "udp-segment towards 10.168.0.96 is given up";
    for host in 0..2 {
        tells(&lab, host, towards)?;
        until("without it the path is whole", || wholly(host))?;
        ensure!(lab.status(host)?.offloads["udp-segment"] == "on");
    }
    let sends = |host: usize| counter(&lab, host, "tun_to_udp_sends");
    let packets = |host: usize| counter(&lab, host, "tun_to_udp_packets");
    for (to, share) in [(2, 1..2), (1, 5..100)] {
        let before = (sends(0)?, packets(0)?);
        lab.transfer(0, to, Bytes(4 << 20))?;
        let (sends, packets) = (sends(0)? - before.0, packets(0)? - before.1);
        ensure!(share.contains(&(packets / sends)), "{packets} packets in {sends} sends to {to}");
    }
    let lease = LeaseKey::from(subnet(&lab, 2)?).to_string();
    lab.kill_daemon(2)?;
    fs::remove_file(lab.registry()?.join("subnets").join(lease))?;
    until("nothing is said of who is gone", || {
        Ok(!lab.status(0)?.problems.iter().any(|it| it.starts_with(towards)))
    })?;
    lab.remove()
}

#[test]
fn a_checksum_offload_that_loses_udp() -> Result<()> {
    let mut lab = hosts_of("vxlan", 2)?;
    bring_up(&mut lab, &[])?;
    probed(&lab)?;
    // Behind UDP, VXLAN and Ethernet: the protocol in the inner IPv4 header.
    drop_on_the_wire(&lab, "ether type ip udp dport 8472 @th,312,8 17")?;
    named(&lab, "offloads", "WARN", "tx-checksum-ip-generic")?;
    until("the device does without", || {
        let listed = lab.host(0).netns.tool("ethtool", &["-k", "flannel.1"])?;
        Ok(listed.contains("tx-checksum-ip-generic: off"))
    })?;
    let is_told = |status: weft_daemon::status::Status| {
        status.problems.iter().any(|it| it.starts_with("tx-checksum-ip-generic is given up"))
    };
    until("status says so", || lab.status(0).map(is_told))?;
    lab.remove()
}

#[test]
fn etcd_that_is_gone() -> Result<()> {
    let mut lab = etcd::hosts(1, 1)?;
    bring_up(&mut lab, &["--healthz-port=8081"])?;
    measures(&lab, 0, "weft_registry_readable", 1)?;
    lab.etcd(0).kill()?;
    named(&lab, "registry", "FAIL", "endpoint health")?;
    measures(&lab, 0, "weft_registry_readable", 0)?;
    ensure!(lab.status(0)?.state == "forwarding");
    lab.remove()
}

#[test]
fn an_address_that_two_nodes_have() -> Result<()> {
    let mut lab = etcd::hosts(2, 1)?;
    bring_up(&mut lab, &[])?;
    // No subnet that nodes are given.
    let second = r#"{"PublicIP":"10.168.0.94","BackendType":"vxlan"}"#;
    etcd::put(&lab, "subnets/10.42.0.0-24", second)?;
    named(&lab, "PublicIP", "FAIL", "10.168.0.94")?;
    // A second node waits, and says for what.
    let second = lab.add_host()?;
    lab.start_daemon(second, &["--iface=eth0", "--public-ip=10.168.0.94"])?;
    finds(&lab, second, "daemon", "FAIL", "lives with our public address")?;
    lab.remove()
}

#[test]
fn an_interface_that_leads_elsewhere() -> Result<()> {
    let mut lab = hosts(2)?;
    let netns = &lab.host(0).netns;
    netns.ip(&["link", "add", "elsewhere", "type", "bridge"])?;
    netns.ip(&["address", "add", "172.30.0.1/24", "dev", "elsewhere"])?;
    netns.ip(&["link", "set", "elsewhere", "up"])?;
    lab.start_daemon(0, &["--iface=elsewhere"])?;
    lab.start_daemon(1, &[])?;
    lab.wait_ready(0, DEADLINE)?;
    lab.wait_ready(1, DEADLINE)?;
    named(&lab, "interface", "FAIL", "weftd --iface eth0")?;
    lab.remove()
}

#[test]
fn a_host_that_does_not_forward() -> Result<()> {
    let lab = overlay(1)?;
    let netns = &lab.host(0).netns;
    write_sysctl(netns, "net/ipv4/ip_forward", "0")?;
    named(&lab, "ip_forward", "FAIL", "sysctl -w net.ipv4.ip_forward=1")?;
    lab.remove()
}

#[test]
fn a_mac_that_somebody_changes() -> Result<()> {
    let mut lab = hosts_of("vxlan", 1)?;
    bring_up(&mut lab, &[])?;
    lab.host(0).netns.ip(&["link", "set", "flannel.1", "address", "02:00:00:00:00:07"])?;
    let is_named = || -> Result<bool> {
        let changes = lab.status(0)?.changes;
        Ok(changes.iter().any(|line| line.text.contains("changed the MAC of the device")))
    };
    until_within(NAMED_WITHIN, "status names the change", is_named)?;
    finds(&lab, 0, "MAC", "OK", "the MAC of the lease, 02:00:00:00:00:07")?;
    lab.remove()
}

#[test]
fn an_operator_probes_a_peer_at_once() -> Result<()> {
    let mut lab = pair()?;
    let ping = |lab: &Lab, peer: &str| -> Result<(bool, String)> {
        let host = lab.host(0);
        let mut weft = Command::new(program("weft")?);
        weft.args(["ping-peer", peer, "-c", "1", "--run-dir"]).arg(&host.run_dir);
        let output = host.netns.output(&mut weft)?;
        Ok((output.status.success(), String::from_utf8([output.stdout, output.stderr].concat())?))
    };
    let base = lab.status(1)?.subnets[0].network().to_string();
    let name = lab.status(0)?.peers[0].name.clone().context("a peer of weft's has a name")?;
    for peer in ["10.168.0.95", &base, &name] {
        let (well, told) = ping(&lab, peer)?;
        ensure!(well && told.contains("1: 1472 bytes, ") && told.contains(" ms\n"), "{told}");
    }
    let (well, told) = ping(&lab, "192.0.2.1")?;
    ensure!(!well && told.contains("no such peer answers probes"), "{told}");
    lab.kill_daemon(1)?;
    let (well, told) = ping(&lab, &base)?;
    ensure!(!well && told.contains("no answer"), "{told}");
    lab.remove()
}
