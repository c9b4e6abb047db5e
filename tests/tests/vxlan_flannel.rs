//! vxlan beside flannel: a node of flannel's as a peer, and what flannel left on a host.

use std::fs;

use anyhow::{Context, Result};
use ipnetwork::IpNetwork;
use serde_json::{Value, json};
use weft_daemon::lab::{Bytes, Lab};
use weft_daemon::netns::NetNs;
use weft_tests::vxlan::{are, lease, link, ping_both_ways, wanted, write_lease};
use weft_tests::{DEADLINE, hosts_of, until, write_config};

/// Where a hand-made flannel node is: no weftd runs on it.
const FLANNEL: usize = 1;
const FLANNEL_MAC: &str = "c6:d2:32:6f:8f:44";
const FLANNEL_SUBNET: &str = "10.42.77.0";

/// A node as flannel leaves it, made by `ip` and `bridge` alone.
fn make_flannel(lab: &mut Lab) -> Result<()> {
    let host = NetNs::open(lab.host(FLANNEL).netns.name());
    let address = lab.host(FLANNEL).address.to_string();
    make_flannel_device(&host, FLANNEL_MAC, &address, "8472")?;
    host.ip(&["address", "add", &format!("{FLANNEL_SUBNET}/32"), "dev", "flannel.1"])?;
    write_lease(lab, &format!("{FLANNEL_SUBNET}-24"), &address, FLANNEL_MAC)?;
    let env = "FLANNEL_NETWORK=10.42.0.0/16\nFLANNEL_SUBNET=10.42.77.1/24\nFLANNEL_MTU=1450\n\
               FLANNEL_IPMASQ=false\n";
    fs::write(&lab.host(FLANNEL).subnet_file, env)?;
    lab.attach_container(FLANNEL)?;
    Ok(())
}

fn make_flannel_device(host: &NetNs, mac: &str, local: &str, port: &str) -> Result<()> {
    let what = ["link", "add", "flannel.1", "address", mac, "mtu", "1450", "type", "vxlan"];
    let how = ["id", "1", "dev", "eth0", "local", local, "dstport", port, "nolearning"];
    host.ip(&[&what[..], &how].concat())?;
    host.ip(&["link", "set", "flannel.1", "up"])
}

/// What flannel adds for a peer.
fn add_peer(host: &NetNs, subnet: &str, base: &str, mac: &str, public_ip: &str) -> Result<()> {
    let device = ["dev", "flannel.1"];
    host.ip(
        &[&["neigh", "replace", base, "lladdr", mac, "nud", "permanent"], &device[..]].concat()
    )?;
    let fdb = ["fdb", "replace", mac, "dst", public_ip];
    host.tool("bridge", &[&fdb[..], &device, &["self", "permanent"]].concat())?;
    host.ip(&[&["route", "replace", subnet, "via", base, "onlink"], &device[..]].concat())
}

#[test]
fn a_flannel_node_is_a_peer_like_any_other_and_may_move() -> Result<()> {
    let mut lab = hosts_of("vxlan", 2)?;
    write_config(&lab, r#"{"Network":"10.42.0.0/16","Backend":{"Type":"vxlan"}}"#)?;
    make_flannel(&mut lab)?;
    lab.start_daemon(0, &[])?;
    lab.wait_ready(0, DEADLINE)?;
    lab.attach_container(0)?;
    let (host, far) =
        (NetNs::open(lab.host(0).netns.name()), NetNs::open(lab.host(FLANNEL).netns.name()));
    let subnet = lab.status(0)?.subnets[0];
    let data = lease(&lab, subnet)?["BackendData"].clone();
    add_peer(
        &far,
        &subnet.to_string(),
        &subnet.network().to_string(),
        data["VtepMAC"].as_str().context("no MAC")?,
        &lab.host(0).address.to_string(),
    )?;
    let theirs: IpNetwork = "10.42.77.0/24".parse()?;
    let address = lab.host(FLANNEL).address.to_string();
    are(&host, &wanted(theirs, FLANNEL_MAC, &address).into())?;
    ping_both_ways(&lab, 0, FLANNEL)?;
    assert!(lab.transfer(0, FLANNEL, Bytes(4 << 20))?.intact());
    assert!(lab.transfer(FLANNEL, 0, Bytes(4 << 20))?.intact());

    // It moves to another address, and once more while nobody watches.
    let key = format!("{FLANNEL_SUBNET}-24");
    for (number, moved) in ["10.168.0.195", "10.168.0.196"].into_iter().enumerate() {
        if number == 1 {
            lab.stop_daemon(0)?;
        }
        far.ip(&["address", "flush", "dev", "eth0"])?;
        far.ip(&["address", "add", &format!("{moved}/24"), "dev", "eth0"])?;
        far.ip(&["link", "set", "flannel.1", "type", "vxlan", "local", moved])?;
        write_lease(&lab, &key, moved, FLANNEL_MAC)?;
        if number == 1 {
            lab.start_daemon(0, &[])?;
            lab.wait_ready(0, DEADLINE)?;
        }
        are(&host, &wanted(theirs, FLANNEL_MAC, moved).into())?;
        ping_both_ways(&lab, 0, FLANNEL)?;
    }
    lab.remove()
}

#[test]
fn what_flannel_left_is_taken_over() -> Result<()> {
    let mut lab = hosts_of("vxlan", 2)?;
    write_config(
        &lab,
        r#"{"Network":"10.42.0.0/16","SubnetMax":"10.42.76.0","Backend":{"Type":"vxlan"}}"#,
    )?;
    make_flannel(&mut lab)?;
    let host = NetNs::open(lab.host(0).netns.name());
    let own_mac = "c6:00:00:00:00:01";
    make_flannel_device(&host, own_mac, &lab.host(0).address.to_string(), "8472")?;
    let far = lab.host(FLANNEL).address.to_string();
    add_peer(&host, "10.42.77.0/24", FLANNEL_SUBNET, FLANNEL_MAC, &far)?;
    add_peer(&host, "10.42.88.0/24", "10.42.88.0", "c6:00:00:00:00:88", "10.168.0.188")?;
    let index = link(&host, "flannel.1")?["ifindex"].clone();
    lab.start_daemon(0, &[])?;
    lab.wait_ready(0, DEADLINE)?;
    are(&host, &wanted("10.42.77.0/24".parse()?, FLANNEL_MAC, &far).into())?;
    let device = link(&host, "flannel.1")?;
    assert_eq!(
        json!([device["ifindex"], device["address"], device["ifalias"]]),
        json!([index, own_mac, "weft"])
    );
    let subnet = lab.status(0)?.subnets[0];
    assert_eq!(lease(&lab, subnet)?["BackendData"]["VtepMAC"], own_mac);

    // One that will not do is made anew.
    lab.stop_daemon(0)?;
    host.ip(&["link", "del", "flannel.1"])?;
    make_flannel_device(&host, own_mac, &lab.host(0).address.to_string(), "4789")?;
    write_config(
        &lab,
        r#"{"Network":"10.42.0.0/16","SubnetMax":"10.42.76.0","Backend":{"Type":"vxlan","Port":8472}}"#,
    )?;
    lab.start_daemon(0, &[])?;
    lab.wait_ready(0, DEADLINE)?;
    are(&host, &wanted("10.42.77.0/24".parse()?, FLANNEL_MAC, &far).into())?;
    let told = "already exists with incompatible configuration: port 4789 instead of 8472; \
                recreating device";
    assert!(fs::read_to_string(&lab.host(0).log)?.contains(told));

    // A stranger's that has the name is left alone, and told of.
    lab.stop_daemon(0)?;
    host.ip(&["link", "del", "flannel.1"])?;
    host.ip(&["link", "add", "flannel.1", "type", "bridge"])?;
    let strangers = link(&host, "flannel.1")?;
    lab.start_daemon(0, &[])?;
    until("it is told", || {
        let log = fs::read_to_string(&lab.host(0).log)?;
        Ok(log.contains("the name flannel.1, which the VXLAN device needs, is that of a bridge"))
    })?;
    let device = link(&host, "flannel.1")?;
    let kind = |device: &Value| device["linkinfo"]["info_kind"].clone();
    assert_eq!((&device["ifindex"], kind(&device)), (&strangers["ifindex"], kind(&strangers)));
    lab.remove()
}
