//! Nodes come, go, die and race: who has which subnet, and where packets go meanwhile.

use std::fs;
use std::net::UdpSocket;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use ipnetwork::IpNetwork;
use weft_daemon::lab::{Lab, LabOptions, PingOptions};
use weft_tests::load::{ends, loses_nothing_while};
use weft_tests::{
    DEADLINE, SUBNETS_KEPT_FREE, all_acquainted, bring_up, counter, free_subnet, has_device, hosts,
    log, logs, overlay, pings, subnet, tells, until, vxlan, write_config, write_sysctl,
};

/// The file of a host's lease.
fn lease_file(lab: &Lab, host: usize) -> Result<PathBuf> {
    vxlan::lease_file(lab, subnet(lab, host)?)
}

#[test]
fn a_fourth_host_joins_while_traffic_flows() -> Result<()> {
    let mut lab = overlay(3)?;
    loses_nothing_while(&ends(&lab)?, || {
        let fourth = lab.add_host()?;
        lab.start_daemon(fourth, &[])?;
        lab.wait_ready(fourth, DEADLINE)?;
        lab.attach_container(fourth)?;
        all_acquainted(&lab)?;
        for host in 0..3 {
            assert!(lab.ping(host, fourth, &PingOptions::default())?.complete());
            assert!(lab.ping(fourth, host, &PingOptions::default())?.complete());
        }
        Ok(())
    })?;
    lab.remove()
}

#[test]
fn a_lease_that_disappears_takes_its_route_along() -> Result<()> {
    let mut lab = overlay(2)?;
    assert!(lab.ping(0, 1, &PingOptions::default())?.complete());
    let lease = lease_file(&lab, 1)?;
    lab.kill_daemon(1)?;
    fs::remove_file(lease)?;
    until("the peer is gone", || Ok(lab.status(0)?.peers.is_empty()))?;
    let report = lab.ping(0, 1, &PingOptions::default())?;
    assert_eq!(report.received, 0);
    assert!(report.errors.iter().any(|line| line.contains("Unreachable")), "{report:?}");
    lab.remove()
}

/// Both remember the same subnet from an earlier life, and start in one instant.
#[test]
fn two_that_race_for_one_subnet_get_two() -> Result<()> {
    let mut lab = hosts(2)?;
    for host in 0..2 {
        let env = "FLANNEL_NETWORK=10.42.0.0/16\nFLANNEL_SUBNET=10.42.7.1/24\n";
        fs::write(&lab.host(host).subnet_file, env)?;
    }
    for host in 0..2 {
        lab.start_daemon(host, &[])?;
    }
    for host in 0..2 {
        lab.wait_ready(host, DEADLINE)?;
    }
    let (first, second) = (subnet(&lab, 0)?, subnet(&lab, 1)?);
    assert_ne!(first, second);
    let wanted: IpNetwork = "10.42.7.0/24".parse()?;
    assert!([first, second].contains(&wanted), "neither {first} nor {second} is {wanted}");
    all_acquainted(&lab)?;
    lab.remove()
}

#[test]
fn a_killed_daemon_comes_back_with_its_subnet() -> Result<()> {
    let mut lab = overlay(2)?;
    let before = subnet(&lab, 0)?;
    for by_force in [true, false] {
        if by_force {
            lab.kill_daemon(0)?;
        } else {
            assert!(lab.stop_daemon(0)?.success());
        }
        until("the device goes with the daemon", || {
            Ok(!has_device(&lab.host(0).netns, "flannel0")?)
        })?;
        assert!(lease_file(&lab, 1)?.exists(), "leases outlive their daemons");
        lab.start_daemon(0, &[])?;
        lab.wait_ready(0, DEADLINE)?;
        assert_eq!(subnet(&lab, 0)?, before);
        all_acquainted(&lab)?;
        assert!(lab.ping(0, 1, &PingOptions::default())?.complete());
        assert!(lab.ping(1, 0, &PingOptions::default())?.complete());
    }
    lab.remove()
}

#[test]
fn an_own_lease_that_is_deleted_is_claimed_again() -> Result<()> {
    let lab = overlay(2)?;
    let (before, file) = (subnet(&lab, 0)?, lease_file(&lab, 0)?);
    fs::remove_file(&file)?;
    until("the lease is there again", || Ok(file.exists()))?;
    assert_eq!(subnet(&lab, 0)?, before);
    all_acquainted(&lab)?;
    assert!(lab.ping(0, 1, &PingOptions::default())?.complete());
    lab.remove()
}

/// Another node lives with our address, so that a lost lease stays lost for now.
#[test]
fn while_a_lost_lease_is_claimed_all_else_goes_on() -> Result<()> {
    let mut lab =
        Lab::new(LabOptions { hosts: 2, backend: "host-gw".into(), ..LabOptions::default() })?;
    write_config(&lab, SUBNETS_KEPT_FREE)?;
    bring_up(&mut lab, &[])?;
    let (before, file) = (subnet(&lab, 0)?, lease_file(&lab, 0)?);
    let address = lab.host(0).address;
    let twin = lab.registry()?.join("weft/nodes/ab");
    let record = format!(
        r#"{{"Id":"ab","Name":"twin","PublicIP":"{address}","PublicIPv6":null,"Addresses":[],"Version":"0","Mtu":1500}}"#
    );
    fs::write(&twin, record)?;
    tells(&lab, 0, "lives with our public address")?;
    fs::remove_file(&file)?;
    until("it waits", || Ok(lab.status(0)?.state.contains("waiting until that node is gone")))?;
    assert!(!lab.status(0)?.ready);

    let netns = &lab.host(0).netns;
    let has_route = || -> Result<bool> {
        let routes = netns.ip_json(&["route", "show", "10.42.200.0/24", "proto", "119"])?;
        Ok(routes[0]["gateway"] == "10.168.0.200")
    };
    let lease = r#"{"PublicIP":"10.168.0.200","PublicIPv6":null,"BackendType":"host-gw"}"#;
    fs::write(lab.registry()?.join("subnets/10.42.200.0-24"), lease)?;
    until("a new peer has its route", has_route)?;
    netns.ip(&["route", "del", "10.42.200.0/24"])?;
    until("the route is back", has_route)?;
    assert!(!file.exists(), "the twin lives still");

    fs::remove_file(twin)?;
    until("the lease is there again", || Ok(file.exists()))?;
    lab.wait_ready(0, DEADLINE)?;
    assert_eq!(subnet(&lab, 0)?, before);
    until("the peer knows it again", || Ok(lab.status(1)?.peers.len() == 2))?;
    pings(&lab)?;
    lab.remove()
}

/// Somebody else's lease stands where ours was: the subnet is theirs, and we take another one.
#[test]
fn a_subnet_given_away_is_not_fought_over() -> Result<()> {
    let mut lab = hosts(1)?;
    lab.start_daemon(0, &[])?;
    lab.wait_ready(0, DEADLINE)?;
    let before = subnet(&lab, 0)?;
    let file = lease_file(&lab, 0)?;
    fs::write(&file, r#"{"PublicIP":"10.168.0.77","PublicIPv6":null}"#)?;
    until("another subnet is taken", || {
        let status = lab.status(0)?;
        Ok(!status.subnets.contains(&before) && status.peers.len() == 1)
    })?;
    assert!(fs::read_to_string(&file)?.contains("10.168.0.77"));
    let env = fs::read_to_string(&lab.host(0).subnet_file)?;
    until("subnet.env tells it", || {
        let first = subnet(&lab, 0)?.network().to_string();
        let gateway = first.strip_suffix('0').context("a /24")?.to_owned() + "1/24";
        Ok(fs::read_to_string(&lab.host(0).subnet_file)?.contains(&gateway))
    })
    .context(env)?;
    lab.remove()
}

#[test]
fn a_deleted_device_comes_back() -> Result<()> {
    let lab = overlay(2)?;
    let netns = &lab.host(0).netns;
    let answered =
        || Ok(lab.ping(0, 1, &PingOptions { count: 1, ..PingOptions::default() })?.complete());
    netns.ip(&["link", "del", "flannel0"])?;
    until("traffic flows over a new device", answered)?;
    assert!(lab.ping(1, 0, &PingOptions::default())?.complete());
    lab.remove()
}

/// It would pass for a path that swallows large packets.
#[test]
fn an_mtu_that_somebody_changes_is_put_right() -> Result<()> {
    let lab = overlay(2)?;
    let netns = &lab.host(0).netns;
    netns.ip(&["link", "set", "flannel0", "mtu", "1300"])?;
    let link = || netns.tool("ip", &["link", "show", "flannel0"]);
    until("it is as before", || Ok(link()?.contains("mtu 1472")))?;
    lab.remove()
}

/// Containers that send while it starts: who is told that there is no way gives up.
#[test]
fn before_the_peers_are_known_nobody_is_told_that_there_are_none() -> Result<()> {
    let mut lab = overlay(2)?;
    lab.stop_daemon(0)?;
    let (from, to) = (lab.container(0)?, lab.container(1)?.address()?);
    let socket = from.netns.run(|| UdpSocket::bind("0.0.0.0:0"))??;
    let over = AtomicBool::new(false);
    thread::scope(|scope| {
        scope.spawn(|| {
            while !over.load(Ordering::Relaxed) {
                // Refused while there is no device, and so no way.
                let _ = socket.send_to(b"are you there", (to, 9));
                thread::sleep(Duration::from_millis(1));
            }
        });
        let started = lab.start_daemon(0, &["--ip-masq"]);
        let ready = started.and_then(|()| lab.wait_ready(0, DEADLINE));
        over.store(true, Ordering::Relaxed);
        ready
    })?;
    assert!(counter(&lab, 0, "tun_to_udp_packets")? > 0);
    assert_eq!(counter(&lab, 0, "icmp_sent")?, 0);
    lab.remove()
}

/// Another program that takes it away each time must not have the daemon do nothing but make it anew.
#[test]
fn a_device_that_is_deleted_again_and_again_comes_back_more_and_more_slowly() -> Result<()> {
    let lab = overlay(1)?;
    let netns = &lab.host(0).netns;
    let begun = Instant::now();
    while begun.elapsed() < Duration::from_secs(6) {
        // Refused while it is not there.
        let _ = netns.ip(&["link", "del", "flannel0"]);
    }
    let broken = log(&lab, 0)?.matches("forwarding broke").count();
    // The least that the pauses come to: 50 ms, 100, 200, 400, 800, 1.6 s, 2.5 s. While it starts, there
    // are others.
    assert!((1..=8).contains(&broken), "{broken}");
    until("it is there again", || has_device(netns, "flannel0"))
        .with_context(|| log(&lab, 0).unwrap_or_default())?;
    lab.remove()
}

#[test]
fn who_waits_for_a_lease_goes_by_another_config() -> Result<()> {
    let mut lab = hosts(2)?;
    let config = |max: u8| {
        format!(
            r#"{{"Network":"10.42.0.0/16","SubnetMin":"10.42.5.0","SubnetMax":"10.42.{max}.0"}}"#
        )
    };
    write_config(&lab, &config(5))?;
    lab.start_daemon(0, &[])?;
    lab.wait_ready(0, DEADLINE)?;
    lab.start_daemon(1, &[])?;
    logs(&lab, 1, "out of subnets")?;
    write_config(&lab, &config(6))?;
    lab.wait_ready(1, DEADLINE)?;
    assert_eq!(subnet(&lab, 1)?.to_string(), "10.42.6.0/24");
    all_acquainted(&lab)?;
    lab.remove()
}

/// Where the overlay gets another backend, vxlan's device would go on letting in what strangers send, past
/// the guard of the next one. A node that has the former one still is told of.
#[test]
fn the_device_of_a_former_backend_goes() -> Result<()> {
    let mut lab = hosts(2)?;
    bring_up(&mut lab, &["--backend=vxlan"])?;
    for backend in ["udp-tun", "host-gw"] {
        lab.stop_daemon(0)?;
        let netns = &lab.host(0).netns;
        if !has_device(netns, "flannel.1")? {
            netns.ip(&[
                "link",
                "add",
                "flannel.1",
                "type",
                "vxlan",
                "id",
                "1",
                "dstport",
                "8472",
            ])?;
            netns.ip(&["link", "set", "flannel.1", "alias", "weft"])?;
            let base = format!("{}/32", subnet(&lab, 1)?.network());
            netns.ip(&["address", "add", &base, "dev", "flannel.1"])?;
        }
        lab.start_daemon(0, &[&format!("--backend={backend}")])?;
        lab.wait_ready(0, DEADLINE)?;
        assert!(!has_device(&lab.host(0).netns, "flannel.1")?, "{backend}");
        tells(&lab, 0, &format!("is of the backend vxlan, not {backend}"))?;
        assert!(lab.status(0)?.peers.is_empty());
    }
    lab.remove()
}

/// The registry is not trusted: what could take over traffic is refused, and said.
#[test]
fn hostile_leases_are_refused_by_name() -> Result<()> {
    let mut lab = hosts(2)?;
    write_config(&lab, SUBNETS_KEPT_FREE)?;
    bring_up(&mut lab, &[])?;
    let ours = subnet(&lab, 0)?;
    // The half that no container of the lab is in: to others it is a lease like any other, and the
    // longest prefix wins.
    let upper_half = ours.network().to_string().replace(".0", ".128");
    let inside_ours = format!("{upper_half}-25");
    for (name, text) in [
        ("0.0.0.0-1", r#"{"PublicIP":"10.168.0.77","PublicIPv6":null}"#),
        (inside_ours.as_str(), r#"{"PublicIP":"10.168.0.77","PublicIPv6":null}"#),
        ("10.42.254.0-24", r#"{"PublicIP":"10.42.9.9","PublicIPv6":null}"#),
        ("10.42.255.0-24", r#"{"PublicIP":"127.0.0.1","PublicIPv6":null}"#),
        ("10.42.253.0-24", "{"),
    ] {
        fs::write(lab.registry()?.join("subnets").join(name), text)?;
        tells(&lab, 0, name)?;
    }
    assert_eq!(lab.status(0)?.peers.len(), 1);
    assert!(lab.ping(0, 1, &PingOptions::default())?.complete());
    lab.remove()
}

/// A reboot takes subnet.env away, and the lease of a host that is off for long ends.
#[test]
fn a_host_that_was_off_for_long_gets_its_subnet_again() -> Result<()> {
    let mut lab = hosts(1)?;
    lab.start_daemon(0, &[])?;
    lab.wait_ready(0, DEADLINE)?;
    let before = subnet(&lab, 0)?;
    let lease = lease_file(&lab, 0)?;
    lab.stop_daemon(0)?;
    fs::remove_file(lease)?;
    fs::remove_file(&lab.host(0).subnet_file)?;
    lab.start_daemon(0, &[])?;
    lab.wait_ready(0, DEADLINE)?;
    assert_eq!(subnet(&lab, 0)?, before);
    lab.remove()
}

/// Left over from a larger Network, or somebody's mistake.
#[test]
fn a_lease_of_the_whole_network_keeps_nobody_from_a_subnet() -> Result<()> {
    let mut lab = hosts(1)?;
    write_config(&lab, r#"{"Network":"10.42.0.0/16"}"#)?;
    let subnets = lab.registry()?.join("subnets");
    fs::create_dir_all(&subnets)?;
    fs::write(subnets.join("10.42.0.0-16"), r#"{"PublicIP":"192.0.2.1"}"#)?;
    fs::write(subnets.join("10.0.0.0-8"), "{")?;
    lab.start_daemon(0, &[])?;
    lab.wait_ready(0, DEADLINE)?;
    tells(&lab, 0, "10.42.0.0-16")?;
    lab.remove()
}

/// Its peers cannot know, and it says so.
#[test]
fn a_host_that_moves_while_the_registry_is_away_tells_it() -> Result<()> {
    let lab = overlay(2)?;
    let (there, away) = (lab.registry()?, lab.registry()?.with_extension("away"));
    fs::rename(&there, &away)?;
    until("it is noticed", || Ok(!lab.status(0)?.registry_readable))?;
    let host = &lab.host(0).netns;
    host.ip(&["-4", "address", "flush", "dev", "eth0"])?;
    host.ip(&["address", "add", "10.168.0.60/24", "dev", "eth0"])?;
    host.ip(&["route", "add", "default", "dev", "eth0"])?;
    tells(&lab, 0, "the registry tells peers what this node was before")?;
    fs::rename(&away, &there)?;
    until("peers know", || {
        Ok(lab.status(0)?.problems.is_empty()
            && lab.status(1)?.peers.iter().any(|it| it.public_ip.to_string() == "10.168.0.60"))
    })?;
    lab.remove()
}

/// A container's bridge that is left from another subnet, and a lease of this host's under an address that it
/// has besides.
#[test]
fn what_of_this_host_is_in_the_way_is_told() -> Result<()> {
    let mut lab = hosts(2)?;
    write_config(&lab, SUBNETS_KEPT_FREE)?;
    bring_up(&mut lab, &[])?;
    let host = &lab.host(0).netns;
    host.ip(&["link", "add", "left", "type", "bridge"])?;
    host.ip(&["address", "add", "10.42.200.1/24", "dev", "left"])?;
    tells(&lab, 0, "left has the address 10.42.200.1, which lies in the Network")?;
    host.ip(&["link", "del", "left"])?;
    write_sysctl(host, "net/ipv4/ip_forward", "0")?;
    host.ip(&["link", "add", "left", "type", "bridge"])?;
    tells(&lab, 0, "forwards no ipv4 packets that come in by flannel0")?;
    write_sysctl(host, "net/ipv4/ip_forward", "1")?;
    host.ip(&["link", "del", "left"])?;
    host.ip(&["address", "add", "10.168.0.61/24", "dev", "eth0"])?;
    let former = lab.registry()?.join("subnets/10.42.250.0-24");
    fs::write(&former, r#"{"PublicIP":"10.168.0.61","PublicIPv6":null}"#)?;
    tells(&lab, 0, "lease 10.42.250.0-24 refused: it has our own address 10.168.0.61")?;
    assert_eq!(lab.status(0)?.peers.len(), 1);
    fs::remove_file(former)?;
    until("there is nothing to tell", || Ok(lab.status(0)?.problems.is_empty()))?;
    lab.remove()
}

/// A registry that is away changes nothing for those that know each other.
#[test]
fn traffic_flows_while_the_registry_is_away() -> Result<()> {
    let lab = overlay(2)?;
    let (there, away) = (lab.registry()?, lab.registry()?.with_extension("away"));
    fs::rename(&there, &away)?;
    until("it is noticed", || Ok(!lab.status(0)?.registry_readable))?;
    let long =
        PingOptions { count: 20, interval: Duration::from_millis(100), ..PingOptions::default() };
    assert!(lab.ping(0, 1, &long)?.complete());
    assert_eq!(lab.status(0)?.peers.len(), 1);
    fs::rename(&away, &there)?;
    let lease = r#"{"PublicIP":"10.168.0.77","PublicIPv6":null}"#;
    let name = free_subnet(&lab)?.to_string().replace('/', "-");
    fs::write(there.join("subnets").join(name), lease)?;
    until("it is read again", || Ok(lab.status(0)?.peers.len() == 2))?;
    lab.remove()
}
