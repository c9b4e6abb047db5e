//! DirectRouting: peers on the same link by plain routes, the others through the tunnel; and the
//! change from one to the other.
//!
//! ```text
//!     h1 eth0 ──┐                     10.168.0.94 and .95, on one link;
//!     h2 eth0 ──┼── br0 ── router     the router 10.168.0.1 and 10.169.0.1;
//!     h3 eth0 ──┘                     10.169.0.96, behind the router for the others
//! ```

use std::collections::BTreeSet;
use std::fs;

use anyhow::{Context, Result};
use weft_daemon::lab::{Lab, PingOptions};
use weft_daemon::netns::NetNs;
use weft_tests::load::{ends, loses_nothing_while};
use weft_tests::{all_acquainted, bring_up, hosts_of, tells, until, write_config, write_sysctl};

/// Two hops, both in kernels.
const TTL_DIRECT: u8 = 62;

fn lab(backend: &str) -> Result<Lab> {
    let mut lab = hosts_of(backend, 3)?;
    lab.add_router(&["10.168.0.1/24".parse()?, "10.169.0.1/24".parse()?])?;
    let far = &lab.host(2).netns;
    far.ip(&["address", "flush", "dev", "eth0"])?;
    far.ip(&["address", "add", "10.169.0.96/24", "dev", "eth0"])?;
    for (host, gateway) in [(0, "10.168.0.1"), (1, "10.168.0.1"), (2, "10.169.0.1")] {
        let netns = &lab.host(host).netns;
        netns.ip(&["route", "replace", "default", "via", gateway, "dev", "eth0"])?;
    }
    let kind = if backend == "udp-tun" { "udp" } else { backend };
    let options = format!(r#"{{"Type":"{kind}","DirectRouting":true}}"#);
    write_config(&lab, &format!(r#"{{"Network":"10.42.0.0/16","Backend":{options}}}"#))?;
    Ok(lab)
}

fn read(netns: &NetNs, device: &str, key: &str) -> Result<String> {
    let path = format!("/proc/sys/net/ipv4/conf/{device}/{key}");
    Ok(netns.run(|| fs::read_to_string(&path))??.trim().to_owned())
}

/// Where the route to a host's subnet leads: gateway and device.
fn way(lab: &Lab, from: usize, to: usize) -> Result<Option<(String, String)>> {
    let subnet = lab.status(to)?.subnets[0].to_string();
    let routes = lab.host(from).netns.ip_json(&["route", "show", &subnet, "proto", "119"])?;
    let text = |key: &str| routes[0][key].as_str().map(str::to_owned);
    Ok(text("gateway").zip(text("dev")))
}

fn is_direct(lab: &Lab, from: usize, to: usize) -> Result<bool> {
    let gateway = lab.host(to).address.to_string();
    Ok(way(lab, from, to)? == Some((gateway, "eth0".into())))
}

/// vxlan has a route into its device for each peer; udp-tun one for all.
fn is_tunnelled(lab: &Lab, backend: &str, from: usize, to: usize) -> Result<bool> {
    let base = lab.status(to)?.subnets[0].network().to_string();
    let wanted = (backend == "vxlan").then(|| (base, "flannel.1".to_owned()));
    Ok(way(lab, from, to)? == wanted)
}

/// How many forwarding entries and neighbours lead to peers.
fn entries(netns: &NetNs) -> Result<usize> {
    let fdb = netns.tool("bridge", &["fdb", "show", "dev", "flannel.1"])?;
    let neighbours = netns.ip_json(&["neigh", "show", "dev", "flannel.1", "nud", "permanent"])?;
    Ok(fdb.lines().count() + neighbours.as_array().map_or(0, Vec::len))
}

fn the_same_link_needs_no_tunnel(backend: &str) -> Result<()> {
    let mut lab = lab(backend)?;
    bring_up(&mut lab, &[])?;
    let host = NetNs::open(lab.host(0).netns.name());
    let is_as_at_first = || {
        let exact = backend == "udp-tun" || entries(&host)? == 2;
        Ok(is_direct(&lab, 0, 1)? && is_tunnelled(&lab, backend, 0, 2)? && exact)
    };
    until("one is direct, the other is not", is_as_at_first)?;
    let ways = lab.status(0)?.peers.into_iter().map(|peer| peer.way).collect::<BTreeSet<_>>();
    assert_eq!(ways, BTreeSet::from(["direct".to_owned(), "tunnel".to_owned()]));
    for (from, to) in [(0, 1), (1, 0)] {
        until("a ping crosses two kernels", || {
            let report = lab.ping(from, to, &PingOptions::default())?;
            Ok(report.complete() && report.replies.iter().all(|it| it.ttl == TTL_DIRECT))
        })?;
    }
    for (from, to) in [(0, 2), (2, 0)] {
        until("a ping crosses the router", || {
            Ok(lab.ping(from, to, &PingOptions::default())?.complete())
        })?;
    }

    // The way to the neighbour is by the router now, and then is not any more.
    loses_nothing_while(&ends(&lab)?, || {
        let detour = ["10.168.0.95", "via", "10.168.0.1"];
        host.ip(&[&["route", "add"], &detour[..]].concat())?;
        until("the tunnel is taken", || is_tunnelled(&lab, backend, 0, 1))?;
        host.ip(&[&["route", "del"], &detour[..]].concat())?;
        until("it is direct again", is_as_at_first)
    })?;

    // What a peer sends another way than we do must not be dropped.
    let device = lab.status(0)?.device.context("no device")?;
    write_sysctl(&host, "net/ipv4/conf/all/rp_filter", "1")?;
    // Something that the daemon hears of.
    host.ip(&["address", "add", "192.0.2.1/32", "dev", "lo"])?;
    until("our own device takes it", || Ok(read(&host, &device, "rp_filter")? == "2"))?;
    tells(&lab, 0, "strict reverse path filtering on eth0")?;
    assert_eq!(read(&host, "eth0", "rp_filter")?, "0", "it is not ours to change");

    // Without the option all goes through the tunnel, and nothing is left of the plain route.
    lab.stop_daemon(0)?;
    let config = fs::read_to_string(lab.registry()?.join("config"))?;
    write_config(&lab, &config.replace("true", "false"))?;
    lab.start_daemon(0, &[])?;
    lab.wait_ready(0, weft_tests::DEADLINE)?;
    all_acquainted(&lab)?;
    until("all goes through the tunnel", || {
        Ok(is_tunnelled(&lab, backend, 0, 1)? && is_tunnelled(&lab, backend, 0, 2)?)
    })?;
    lab.remove()
}

#[test]
fn vxlan_takes_the_link_where_it_can() -> Result<()> {
    the_same_link_needs_no_tunnel("vxlan")
}

#[test]
fn udp_tun_takes_the_link_where_it_can() -> Result<()> {
    the_same_link_needs_no_tunnel("udp-tun")
}
