//! The external interface changes under a running daemon: lease, file names, routes, device and
//! sockets follow it, and peers follow the lease.

use std::fs;
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result};
use weft_daemon::lab::{Bytes, EtcdOptions, Lab, LabOptions, Patience, transfer};
use weft_daemon::netns::NetNs;
use weft_daemon::status::Status;
use weft_tests::load::{ends, outage_while};
use weft_tests::{DEADLINE, bring_up, counter, etcd, tells, until};

/// Two seconds are what is promised; the machine is busy with other tests.
const OUTAGE_MAX: Duration = Duration::from_secs(4);
const _: () =
    assert!(DEADLINE.as_millis() > 2 * OUTAGE_MAX.as_millis(), "longer ones are measured");

/// The longest time for which nothing came across while `change` was made.
fn outage(lab: &Lab, change: impl FnOnce() -> Result<()>) -> Result<Duration> {
    outage_while(&ends(lab)?, change)
}

/// The files that carry the daemon's name, in both of its directories.
fn files(lab: &Lab) -> Result<Vec<String>> {
    let host = lab.host(0);
    let mut names = Vec::new();
    for directory in [&host.state_dir, &host.run_dir] {
        for entry in fs::read_dir(directory)? {
            names.push(entry?.file_name().to_string_lossy().into_owned());
        }
    }
    names.retain(|name| !name.starts_with("config-") && !name.starts_with(".new-"));
    names.sort();
    Ok(names)
}

/// The daemon has moved to this address as the same node with the same subnet, and its peer knows.
fn has_moved(lab: &Lab, before: &Status, to: &str) -> Result<()> {
    until(&format!("it is at {to}, and its peer knows"), || {
        let peers = lab.status(1)?.peers;
        Ok(lab.status(0)?.public_ip == to.parse().ok()
            && peers.len() == 1
            && peers[0].public_ip.to_string() == to)
    })?;
    let now = lab.status(0)?;
    assert_eq!((&now.node_id, &now.subnets), (&before.node_id, &before.subnets));
    assert_eq!(now.problems, Vec::<String>::new());
    Ok(())
}

fn assert_short(outage: Duration, what: &str) {
    eprintln!("{what}: nothing came across for {outage:?}");
    assert!(outage <= OUTAGE_MAX, "{what}: nothing came across for {outage:?}");
}

/// What a host with an uplink goes through in its life, in one go. `overhead`: bytes that the backend
/// puts around a packet; `unbroken`: whether nothing is lost where the address stays.
fn follows(backend: &str, members: usize, overhead: u32, unbroken: bool) -> Result<()> {
    let etcd = EtcdOptions { members, ..EtcdOptions::default() };
    let mut lab =
        Lab::new(LabOptions { hosts: 2, backend: backend.into(), etcd, ..LabOptions::default() })?;
    if members > 0 {
        etcd::wait_until_it_serves(&lab)?;
    }
    bring_up(&mut lab, &[])?;
    let before = lab.status(0)?;
    let names = files(&lab)?;
    let host = NetNs::open(lab.host(0).netns.name());

    let moved = outage(&lab, || {
        // The routes go with the last address.
        host.ip(&["address", "del", "10.168.0.94/24", "dev", "eth0"])?;
        host.ip(&["address", "add", "10.168.0.60/24", "dev", "eth0"])?;
        host.ip(&["route", "add", "default", "dev", "eth0"])?;
        until("it is at the other address", || Ok(lab.status(0)?.public_ip != before.public_ip))
    })?;
    assert_short(moved, "another address");
    has_moved(&lab, &before, "10.168.0.60")?;
    until("its files have other names, and none is left of the old ones", || {
        let now = files(&lab)?;
        Ok(now.len() == names.len()
            && now.iter().all(|name| name == "subnet.env" || !names.contains(name)))
    })
    .with_context(|| format!("{names:?}, and now {:?}", files(&lab)))?;

    let mtu = outage(&lab, || {
        host.ip(&["link", "set", "eth0", "mtu", "1400"])?;
        let line = format!("FLANNEL_MTU={}\n", 1400 - overhead);
        until("subnet.env tells the smaller MTU", || {
            Ok(fs::read_to_string(&lab.host(0).subnet_file)?.contains(&line))
        })
    })?;
    assert_short(mtu, "another MTU");
    assert!(!unbroken || mtu.is_zero(), "an MTU that changed cost packets for {mtu:?}");
    assert_eq!(lab.status(0)?.mtu, Some(1400 - overhead));
    assert_eq!(lab.status(0)?.device, before.device);

    // A second card, that the default route moves to.
    let switch = lab.switch()?;
    let peer = ["type", "veth", "peer", "name", "eth1", "netns", host.name()];
    switch.ip(&[&["link", "add", "h1b"], &peer[..]].concat())?;
    switch.ip(&["link", "set", "h1b", "master", "br0", "up"])?;
    let swapped = outage(&lab, || {
        host.ip(&["address", "add", "10.168.0.70/24", "dev", "eth1"])?;
        host.ip(&["link", "set", "eth1", "up"])?;
        host.ip(&["route", "replace", "default", "dev", "eth1"])?;
        until("it is on the other card", || {
            Ok(lab.status(0)?.interface.as_deref() == Some("eth1"))
        })?;
        host.ip(&["link", "set", "eth0", "down"])
    })?;
    assert_short(swapped, "another card");
    has_moved(&lab, &before, "10.168.0.70")?;

    let flapped = outage(&lab, || {
        host.ip(&["link", "set", "eth1", "down"])?;
        tells(&lab, 0, "cannot be followed")?;
        host.ip(&["link", "set", "eth1", "up"])?;
        host.ip(&["route", "add", "default", "dev", "eth1"])
    })?;
    assert_short(flapped, "a link that was down");
    has_moved(&lab, &before, "10.168.0.70")?;
    assert_eq!(lab.status(0)?.offloads, before.offloads);
    assert!(lab.transfer(0, 1, Bytes(8 << 20))?.intact());
    assert!(lab.transfer(1, 0, Bytes(8 << 20))?.intact());
    lab.remove()
}

#[test]
fn udp_tun_follows_its_interface() -> Result<()> {
    follows("udp-tun", 0, 28, false)
}

#[test]
fn host_gw_follows_its_interface_and_the_lease_in_etcd_too() -> Result<()> {
    follows("host-gw", 1, 0, true)
}

#[test]
fn vxlan_follows_its_interface() -> Result<()> {
    follows("vxlan", 0, 50, true)
}

/// Further addresses come and go: peers are told, and nothing is interrupted.
#[test]
fn further_addresses_interrupt_nothing() -> Result<()> {
    let lab = weft_tests::overlay(2)?;
    let host = NetNs::open(lab.host(0).netns.name());
    let node = format!("weft/nodes/{}", lab.status(0)?.node_id);
    let record = lab.registry()?.join(node);
    let lost = outage(&lab, || {
        host.ip(&["address", "add", "10.168.0.61/24", "dev", "eth0"])?;
        until("the record tells the second address", || {
            Ok(fs::read_to_string(&record)?.contains("10.168.0.61"))
        })
    })?;
    assert!(lost.is_zero(), "packets were lost for {lost:?}");
    lab.remove()
}

/// The kernel refuses what is sent from an address that is gone, batch by batch. That is no reason to
/// give up batches.
#[test]
fn an_address_that_is_gone_for_a_moment_costs_no_feature() -> Result<()> {
    let lab = weft_tests::overlay(2)?;
    let host = NetNs::open(lab.host(0).netns.name());
    // That is no way out for an overlay that goes over IPv4.
    host.ip(&["address", "add", "2001:db8::94/64", "dev", "eth0", "nodad"])?;
    host.ip(&["-6", "route", "add", "default", "dev", "eth0"])?;
    let before = lab.status(0)?;
    let [from, to] = [lab.container(0)?, lab.container(1)?];
    let moved = thread::scope(|scope| {
        let moving = scope.spawn(move || {
            transfer(&from.netns, &to.netns, to.address()?, Bytes(512 << 20), &Patience::default())
        });
        until("some of it has moved", || Ok(counter(&lab, 0, "tun_to_udp_packets")? > 1_000))?;
        host.ip(&["address", "del", "10.168.0.94/24", "dev", "eth0"])?;
        until("it is told", || {
            let told = lab.status(0)?.problems;
            Ok(told.iter().any(|it| it.contains("eth0 has no IPv4 address any more")))
        })?;
        until("the kernel refuses it", || Ok(counter(&lab, 0, "tun_to_udp_send_failed")? > 0))?;
        host.ip(&["address", "add", "10.168.0.94/24", "dev", "eth0"])?;
        host.ip(&["route", "add", "default", "dev", "eth0"])?;
        moving.join().expect("the transfer panicked")
    })?;
    assert!(moved.intact());
    assert_eq!(lab.status(0)?.offloads, before.offloads);
    assert_eq!(lab.status(0)?.device, before.device);
    assert_eq!(lab.status(0)?.public_ip, before.public_ip);
    lab.remove()
}
