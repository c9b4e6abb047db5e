//! The external interface changes under a running daemon: lease, file names, routes, device and
//! sockets follow it, and peers follow the lease.

use std::fs;
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use weft_daemon::lab::{Bytes, EtcdOptions, Lab, LabOptions, Patience, transfer};
use weft_daemon::netns::NetNs;
use weft_daemon::status::Status;
use weft_tests::load::{ends, outage_while};
use weft_tests::{DEADLINE, bring_up, counter, etcd, logs, tells, until};

/// What is promised. On a machine that is busy with other tests one change may take longer; not each
/// of several.
const OUTAGE_MAX: Duration = Duration::from_secs(2);
const ATTEMPTS: u8 = 3;
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

/// Makes a change anew, by the number of the attempt, until the outage is as short as promised. Returns
/// that attempt and its outage.
fn short_outage(
    lab: &Lab,
    what: &str,
    mut change: impl FnMut(u8) -> Result<()>,
) -> Result<(u8, Duration)> {
    for attempt in 0..ATTEMPTS {
        let outage = outage(lab, || change(attempt))?;
        eprintln!("{what}: nothing came across for {outage:?}");
        ensure!(outage <= 2 * OUTAGE_MAX, "{what}: nothing came across for {outage:?}");
        if outage <= OUTAGE_MAX {
            return Ok((attempt, outage));
        }
    }
    bail!("{what}: nothing came across for more than {OUTAGE_MAX:?}, {ATTEMPTS} times in a row")
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

    let (attempt, _) = short_outage(&lab, "another address", |attempt| {
        let address = format!("10.168.0.{}", 60 + attempt);
        // The routes go with the last address.
        host.ip(&["-4", "address", "flush", "dev", "eth0"])?;
        host.ip(&["address", "add", &format!("{address}/24"), "dev", "eth0"])?;
        host.ip(&["route", "add", "default", "dev", "eth0"])?;
        until("it is at the other address", || Ok(lab.status(0)?.public_ip == address.parse().ok()))
    })?;
    has_moved(&lab, &before, &format!("10.168.0.{}", 60 + attempt))?;
    until("its files have other names, and none is left of the old ones", || {
        let now = files(&lab)?;
        Ok(now.len() == names.len()
            && now.iter().all(|name| name == "subnet.env" || !names.contains(name)))
    })
    .with_context(|| format!("{names:?}, and now {:?}", files(&lab)))?;

    let (attempt, lost) = short_outage(&lab, "another MTU", |attempt| {
        let mtu = 1400 - u32::from(attempt);
        host.ip(&["link", "set", "eth0", "mtu", &mtu.to_string()])?;
        let line = format!("FLANNEL_MTU={}\n", mtu - overhead);
        until("subnet.env tells the smaller MTU", || {
            Ok(fs::read_to_string(&lab.host(0).subnet_file)?.contains(&line))
        })
    })?;
    let at_once = attempt == 0 && lost.is_zero();
    assert!(!unbroken || at_once, "an MTU that changed cost packets for {lost:?}");
    assert_eq!(lab.status(0)?.mtu, Some(1400 - u32::from(attempt) - overhead));
    assert_eq!(lab.status(0)?.device, before.device);

    // Another card, that the default route moves to.
    let switch = lab.switch()?;
    let card = |number: u8| (format!("eth{number}"), format!("10.168.0.{}", 70 + number));
    let (attempt, _) = short_outage(&lab, "another card", |attempt| {
        let ((former, _), (next, address)) = (card(attempt), card(attempt + 1));
        let (port, peer) = (format!("h1-{next}"), ["type", "veth", "peer", "name", &next]);
        switch.ip(&[&["link", "add", &port], &peer[..], &["netns", host.name()]].concat())?;
        switch.ip(&["link", "set", &port, "master", "br0", "up"])?;
        host.ip(&["address", "add", &format!("{address}/24"), "dev", &next])?;
        host.ip(&["link", "set", &next, "up"])?;
        host.ip(&["route", "replace", "default", "dev", &next])?;
        until("it is on the other card", || Ok(lab.status(0)?.interface.as_ref() == Some(&next)))?;
        host.ip(&["link", "set", &former, "down"])
    })?;
    let (card, address) = card(attempt + 1);
    has_moved(&lab, &before, &address)?;

    short_outage(&lab, "a link that was down", |_| {
        host.ip(&["link", "set", &card, "down"])?;
        tells(&lab, 0, &format!("cannot be followed ({card} is down"))?;
        host.ip(&["link", "set", &card, "up"])?;
        host.ip(&["route", "add", "default", "dev", &card])
    })?;
    has_moved(&lab, &before, &address)?;
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
    // As by DHCP; the one that comes is permanent, as a virtual router's.
    let leased = ["10.168.0.94/24", "dev", "eth0", "valid_lft", "3600", "preferred_lft", "3600"];
    host.ip(&[&["address", "change"], &leased[..]].concat())?;
    let lost = outage(&lab, || {
        for (what, is_told) in [("add", true), ("del", false)] {
            host.ip(&["address", what, "10.168.0.61/24", "dev", "eth0"])?;
            until(&format!("the record follows the second address's {what}"), || {
                Ok(fs::read_to_string(&record)?.contains("10.168.0.61") == is_told)
            })?;
        }
        Ok(())
    })?;
    assert!(lost.is_zero(), "packets were lost for {lost:?}");
    assert_eq!(lab.status(0)?.public_ip, Some("10.168.0.94".parse()?));
    lab.remove()
}

/// Two hosts, the first of which has no daemon any more; how that was, and at which address.
fn with_one_stopped() -> Result<(Lab, Status, String)> {
    let mut lab = weft_tests::overlay(2)?;
    let before = lab.status(0)?;
    lab.stop_daemon(0)?;
    let own = format!("{}/24", lab.host(0).address);
    Ok((lab, before, own))
}

/// A host's own address may be DHCP's, and a further one, such as a virtual router's, set by hand.
#[test]
fn a_start_stays_at_the_address_that_the_node_is_known_by() -> Result<()> {
    let (mut lab, before, own) = with_one_stopped()?;
    let host = NetNs::open(lab.host(0).netns.name());
    let lifetimes = ["valid_lft", "3600", "preferred_lft", "3600"];
    host.ip(&[&["address", "change", &own, "dev", "eth0"], &lifetimes[..]].concat())?;
    host.ip(&["address", "add", "10.168.0.200/24", "dev", "eth0"])?;
    lab.start_daemon(0, &[])?;
    lab.wait_ready(0, DEADLINE)?;
    has_moved(&lab, &before, &lab.host(0).address.to_string())?;
    lab.remove()
}

/// As where router advertisements, or a static address, are faster than DHCP.
#[test]
fn a_start_waits_for_the_address_that_the_node_is_known_by() -> Result<()> {
    for early in ["fd00:168::94/64", "169.254.7.7/16", "10.168.0.250/24"] {
        let (mut lab, before, own) = with_one_stopped()?;
        let host = NetNs::open(lab.host(0).netns.name());
        host.ip(&["address", "del", &own, "dev", "eth0"])?;
        host.ip(&["address", "add", early, "dev", "eth0", "nodad"])?;
        lab.start_daemon(0, &["--iface=eth0"])?;
        logs(
            &lab,
            0,
            "waiting a minute for 10.168.0.94, by which other nodes know this one: eth0 has not got it yet",
        )?;
        host.ip(&["address", "add", &own, "dev", "eth0"])?;
        lab.wait_ready(0, DEADLINE)?;
        has_moved(&lab, &before, &lab.host(0).address.to_string())?;
        lab.remove()?;
    }
    Ok(())
}

/// Addresses and routes stay where a cable is pulled, or where the interface is named and set down.
#[test]
fn a_link_that_carries_nothing_is_told() -> Result<()> {
    let mut lab = weft_tests::hosts(1)?;
    lab.start_daemon(0, &["--iface=eth0"])?;
    lab.wait_ready(0, DEADLINE)?;
    let (host, switch) = (NetNs::open(lab.host(0).netns.name()), lab.switch()?);
    for (netns, link, told) in
        [(switch, "h1", "eth0 has no carrier"), (&host, "eth0", "eth0 is down")]
    {
        netns.ip(&["link", "set", link, "down"])?;
        tells(&lab, 0, told)?;
        netns.ip(&["link", "set", link, "up"])?;
        until("it is told no more", || Ok(lab.status(0)?.problems.is_empty()))?;
    }
    lab.remove()
}

/// As of DHCP's address, beside that of a virtual router, which is there all along and leaves some day.
#[test]
fn an_address_that_is_gone_for_a_moment_is_waited_for() -> Result<()> {
    // On a busy machine the moment may be too long.
    for _ in 0..3 {
        if a_moment_is_waited_for()? {
            return Ok(());
        }
    }
    bail!("the further address was taken each time")
}

fn a_moment_is_waited_for() -> Result<bool> {
    let lab = weft_tests::overlay(2)?;
    let host = NetNs::open(lab.host(0).netns.name());
    host.ip(&["address", "add", "10.168.0.61/32", "dev", "eth0"])?;
    let record = lab.registry()?.join(format!("weft/nodes/{}", lab.status(0)?.node_id));
    until("weft knows of it", || Ok(fs::read_to_string(&record)?.contains("10.168.0.61")))?;
    let public_ip = || Ok::<_, anyhow::Error>(lab.status(0)?.public_ip.map(|ip| ip.to_string()));
    host.ip(&["address", "del", "10.168.0.94/24", "dev", "eth0"])?;
    tells(&lab, 0, "its address may be back in a moment; else 10.168.0.61 is next")?;
    host.ip(&["address", "add", "10.168.0.94/24", "dev", "eth0"])?;
    until("all is well", || Ok(lab.status(0)?.problems.is_empty()))?;
    if public_ip()?.as_deref() != Some("10.168.0.94") {
        return Ok(false);
    }
    host.ip(&["address", "del", "10.168.0.94/24", "dev", "eth0"])?;
    until("it goes on at the other one", || Ok(public_ip()?.as_deref() == Some("10.168.0.61")))?;
    lab.remove()?;
    Ok(true)
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
