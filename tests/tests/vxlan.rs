//! vxlan: devices, neighbours, forwarding entries and routes, exact, kept, and unbroken while the daemon
//! is away.

use std::collections::BTreeSet;
use std::fs;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use ipnetwork::IpNetwork;
use rustix::process::Signal;
use serde_json::{Value, json};
use weft_daemon::lab::{Bytes, Lab};
use weft_daemon::netns::NetNs;
use weft_daemon::status;
use weft_tests::load::loses_nothing_over_restarts;
use weft_tests::vxlan::{
    are, bridge_json, lease, lease_file, link, list, objects, ping_both_ways, wanted, write_lease,
};
use weft_tests::{
    DEADLINE, SUBNETS_KEPT_FREE, Weftd, bring_up, doctor, dual_stack, hosts_of, reaches, tells,
    until, write_config,
};

/// What is promised of a repair, which a busy machine may keep once in several times.
const REPAIRED_WITHIN: Duration = Duration::from_secs(1);

/// On a busy machine the daemon rests for five seconds before it looks again.
const HEARD_WITHIN: Duration = Duration::from_secs(6);

fn lab(hosts: usize) -> Result<Lab> {
    hosts_of("vxlan", hosts)
}

/// What the leases of all others say there must be on a host.
fn all_wanted(lab: &Lab, host: usize) -> Result<BTreeSet<String>> {
    let mut all = BTreeSet::new();
    for other in (0..lab.hosts()).filter(|other| *other != host) {
        let subnet = lab.status(other)?.subnets[0];
        let lease = lease(lab, subnet)?;
        let mac = lease["BackendData"]["VtepMAC"].as_str().context("no MAC")?;
        all.extend(wanted(subnet, mac, lease["PublicIP"].as_str().context("no address")?));
    }
    Ok(all)
}

fn are_as_wanted(lab: &Lab, host: usize) -> Result<()> {
    let netns = &lab.host(host).netns;
    until("everything is as the leases say", || {
        Ok(objects(netns, "flannel.1")? == all_wanted(lab, host)?)
    })
    .with_context(|| {
        format!("{:#?}, not {:#?}", objects(netns, "flannel.1"), all_wanted(lab, host))
    })
}

/// The kernel lists what it learned of paths among the routes.
#[test]
fn a_path_mtu_is_taken_for_no_route() -> Result<()> {
    let mut lab = lab(2)?;
    bring_up(&mut lab, &[])?;
    let subnet = lab.status(1)?.subnets[0].to_string();
    let change = ["route", "change", &subnet, "dev", "docker0", "mtu", "lock", "1200"];
    lab.host(1).netns.ip(&change)?;
    let (netns, there) = (NetNs::open(lab.host(0).netns.name()), lab.container(1)?.address()?);
    until("the kernel has learned it", || {
        // What is too large gets no answer.
        let size = ["-c", "1", "-W", "1", "-M", "do", "-s", "1300", &there.to_string()];
        let _ = netns.tool("ping", &size);
        Ok(netns.tool("ip", &["route", "show", "cache"])?.contains(&there.to_string()))
    })?;
    for number in 0..3 {
        let looks = lab.status(0)?.reconciliations;
        netns.ip(&["link", "add", &format!("more{number}"), "type", "bridge"])?;
        until("weftd looks again", || Ok(lab.status(0)?.reconciliations > looks + 1))?;
    }
    assert_eq!(lab.status(0)?.repairs, 0);
    doctor::finds(&lab, 0, "routes", "OK", "")?;
    assert!(netns.tool("ip", &["route", "show", "cache"])?.contains(&there.to_string()));
    lab.remove()
}

#[test]
fn each_peer_has_its_entries_and_the_lease_is_flannels() -> Result<()> {
    let mut lab = lab(3)?;
    bring_up(&mut lab, &[])?;
    for host in 0..3 {
        are_as_wanted(&lab, host)?;
        let site = lab.host(host);
        assert!(fs::read_to_string(&site.subnet_file)?.contains("FLANNEL_MTU=1450\n"));
        let device = link(&site.netns, "flannel.1")?;
        let data = &device["linkinfo"]["info_data"];
        let subnet = lab.status(host)?.subnets[0];
        assert_eq!(
            json!([device["mtu"], device["ifalias"], device["linkinfo"]["info_kind"]]),
            json!([1450, "weft", "vxlan"])
        );
        assert_eq!(
            json!([data["id"], data["link"], data["local"], data["port"], data["learning"]]),
            json!([1, "eth0", site.address.to_string(), 8472, false]),
            "{data}"
        );
        let addresses = site.netns.ip_json(&["-4", "address", "show", "dev", "flannel.1"])?;
        let addresses = list(&addresses[0]["addr_info"])?;
        assert_eq!(addresses.len(), 1);
        assert_eq!(addresses[0]["local"], subnet.network().to_string());
        assert_eq!(addresses[0]["prefixlen"], 32);
        let mac = &device["address"];
        let text = format!(
            r#"{{"PublicIP":"{}","PublicIPv6":null,"BackendType":"vxlan","BackendData":{{"VNI":1,"VtepMAC":{mac}}}}}"#,
            site.address
        );
        assert_eq!(lease(&lab, subnet)?.to_string(), text);
    }
    ping_both_ways(&lab, 0, 2)?;
    assert!(lab.transfer(0, 2, Bytes(8 << 20))?.intact());
    // A node that leaves takes its entries along.
    let gone = lab.status(2)?.subnets[0];
    lab.kill_daemon(2)?;
    fs::remove_file(lease_file(&lab, gone)?)?;
    let left: BTreeSet<String> = {
        let subnet = lab.status(1)?.subnets[0];
        let mac = lease(&lab, subnet)?["BackendData"]["VtepMAC"].as_str().unwrap().to_owned();
        wanted(subnet, &mac, &lab.host(1).address.to_string()).into()
    };
    are(&lab.host(0).netns, &left)?;
    lab.remove()
}

#[test]
fn both_families_have_their_devices() -> Result<()> {
    let mut lab = lab(2)?;
    dual_stack(&lab)?;
    bring_up(&mut lab, &[])?;
    let site = lab.host(0);
    assert!(fs::read_to_string(&site.subnet_file)?.contains("FLANNEL_MTU=1430\n"));
    let device = link(&site.netns, "flannel-v6.1")?;
    assert_eq!((&device["mtu"], &device["ifalias"]), (&1430.into(), &"weft".into()));
    let data = &device["linkinfo"]["info_data"];
    assert_eq!((&data["id"], &data["local6"]), (&1.into(), &"fd00:168::94".into()), "{data}");
    let [ipv4, ipv6] = lab.status(1)?.subnets[..] else { bail!("two subnets") };
    let name = format!("subnets/{}-24&{}-64", ipv4.network(), ipv6.network());
    let lease: Value = serde_json::from_slice(&fs::read(lab.registry()?.join(name))?)?;
    let mac = lease["BackendV6Data"]["VtepMAC"].as_str().context("no MAC")?;
    assert_ne!(lease["BackendData"]["VtepMAC"], mac);
    let wanted = BTreeSet::from(wanted(ipv6, mac, "fd00:168::95"));
    let has_its_entries = || {
        until("the device for IPv6 has its entries", || {
            Ok(objects(&site.netns, "flannel-v6.1")? == wanted)
        })
        .with_context(|| format!("{:?}, not {wanted:?}", objects(&site.netns, "flannel-v6.1")))
    };
    has_its_entries()?;
    let (subnet, base) = (ipv6.to_string(), ipv6.network().to_string());
    let fdb = ["fdb", "del", mac, "dev", "flannel-v6.1", "dst", "fd00:168::95"];
    for (program, meddling) in [
        ("ip", &["-6", "route", "del", &subnet][..]),
        ("ip", &["-6", "neigh", "del", &base, "dev", "flannel-v6.1"]),
        ("bridge", &fdb),
        ("ip", &["link", "del", "flannel-v6.1"]),
    ] {
        site.netns.tool(program, meddling)?;
        has_its_entries()?;
    }
    reaches(&lab, 0, 1)?;
    lab.remove()
}

/// One at a time, and all at once. What others have beside it stays.
#[test]
fn entries_that_somebody_removes_come_back() -> Result<()> {
    let mut lab = lab(2)?;
    bring_up(&mut lab, &[])?;
    are_as_wanted(&lab, 0)?;
    let host = NetNs::open(lab.host(0).netns.name());
    let subnet = lab.status(1)?.subnets[0];
    let (subnet, base) = (subnet.to_string(), subnet.network().to_string());
    let own = format!("{}/32", lab.status(0)?.subnets[0].network());
    let far = lab.host(1).address.to_string();
    let mac = link(&lab.host(1).netns, "flannel.1")?["address"].as_str().unwrap().to_owned();

    let others = |host: &NetNs| -> Result<Vec<Value>> {
        let neighbours = host.ip_json(&["neigh", "show", "dev", "vx9", "nud", "permanent"])?;
        let routes = host.ip_json(&["route", "show", "dev", "vx9"])?;
        Ok(vec![neighbours, routes, bridge_json(host, &["fdb", "show", "dev", "vx9"])?])
    };
    host.ip(&["link", "add", "vx9", "type", "vxlan", "id", "9", "dstport", "4789", "dev", "eth0"])?;
    host.ip(&["link", "set", "vx9", "up"])?;
    host.ip(&["neigh", "add", "192.0.2.9", "lladdr", "02:00:00:00:00:09", "dev", "vx9"])?;
    host.ip(&["route", "add", "192.0.2.0/24", "dev", "vx9"])?;
    let dst = ["dev", "vx9", "dst", "10.168.0.9"];
    host.tool("bridge", &[&["fdb", "append", "02:00:00:00:00:09"], &dst[..]].concat())?;
    let before = others(&host)?;

    let has_own = || {
        let addresses = host.ip_json(&["-4", "address", "show", "dev", "flannel.1"])?;
        Ok(addresses[0]["addr_info"][0]["local"] == own.trim_end_matches("/32"))
    };
    let mut quickest = DEADLINE;
    let mut comes_back = |program: &str, meddling: &[&str]| -> Result<()> {
        host.tool(program, meddling)?;
        let meddled = Instant::now();
        are_as_wanted(&lab, 0)?;
        quickest = quickest.min(meddled.elapsed());
        Ok(())
    };
    let fdb = ["fdb", "del", &mac, "dev", "flannel.1", "dst", &far];
    comes_back("ip", &["route", "del", &subnet])?;
    let astray = ["route", "replace", &subnet, "via", "10.42.250.0", "dev", "flannel.1", "onlink"];
    comes_back("ip", &astray)?;
    comes_back("ip", &["neigh", "del", &base, "dev", "flannel.1"])?;
    comes_back("bridge", &fdb)?;
    let elsewhere = ["fdb", "replace", &mac, "dev", "flannel.1", "dst", "10.168.0.200"];
    comes_back("bridge", &elsewhere)?;
    assert!(quickest < REPAIRED_WITHIN, "{quickest:?}");
    host.ip(&["address", "del", &own, "dev", "flannel.1"])?;
    until("the address is back", has_own)?;
    host.ip(&["route", "del", &subnet])?;
    host.ip(&["neigh", "flush", "dev", "flannel.1", "nud", "permanent"])?;
    host.tool("bridge", &fdb)?;
    host.ip(&["address", "flush", "dev", "flannel.1"])?;
    are_as_wanted(&lab, 0)?;
    until("the address is back", has_own)?;
    ping_both_ways(&lab, 0, 1)?;
    assert_eq!(others(&host)?, before, "what is not ours stays");

    // What changes there does not even wake the daemon.
    let seen = || -> Result<u64> { Ok(lab.status(0)?.reconciliations) };
    let (mut count, mut since) = (seen()?, Instant::now());
    until("what was done has been heard of", || {
        let now = seen()?;
        if now != count {
            (count, since) = (now, Instant::now());
        }
        Ok(since.elapsed() > HEARD_WITHIN)
    })?;
    let begun = Instant::now();
    while begun.elapsed() < Duration::from_secs(2) {
        host.ip(&["neigh", "replace", "192.0.2.8", "lladdr", "02:00:00:00:00:08", "dev", "vx9"])?;
        host.ip(&["neigh", "del", "192.0.2.8", "dev", "vx9"])?;
    }
    let now = seen()?;
    assert!(now <= count + 1, "more than by the slow timer: {count} became {now}");
    let log = fs::read_to_string(&lab.host(0).log)?;
    assert!(log.contains("somebody changed links or routes of weft's"), "{log}");
    lab.remove()
}

#[test]
fn a_device_that_somebody_changes_is_put_right_or_followed() -> Result<()> {
    let mut lab = lab(2)?;
    bring_up(&mut lab, &[])?;
    are_as_wanted(&lab, 0)?;
    let host = NetNs::open(lab.host(0).netns.name());
    let mac = || -> Result<String> {
        Ok(link(&host, "flannel.1")?["address"].as_str().context("no MAC")?.to_owned())
    };
    let first = mac()?;
    for meddling in [
        &["link", "set", "flannel.1", "down"][..],
        &["link", "set", "flannel.1", "mtu", "1300"],
        &["link", "del", "flannel.1"],
    ] {
        host.ip(meddling)?;
        until(&format!("it is right after {meddling:?}"), || {
            let device = link(&host, "flannel.1")?;
            let is_up = list(&device["flags"])?.contains(&"UP".into());
            Ok(is_up && device["mtu"] == 1450 && device["ifalias"] == "weft")
        })?;
        are_as_wanted(&lab, 0)?;
        ping_both_ways(&lab, 0, 1)?;
    }
    assert_eq!(mac()?, first, "a new device has the MAC of the old one");
    // As systemd's MACAddressPolicy does.
    let other = "02:00:00:00:00:77";
    host.ip(&["link", "set", "flannel.1", "address", other])?;
    let subnet = lab.status(0)?.subnets[0];
    until("the lease follows", || Ok(lease(&lab, subnet)?["BackendData"]["VtepMAC"] == other))?;
    are_as_wanted(&lab, 1)?;
    ping_both_ways(&lab, 0, 1)?;
    assert_eq!(mac()?, other);
    lab.remove()
}

#[test]
fn a_restart_loses_nothing_and_cleans_up_what_is_gone() -> Result<()> {
    let mut lab = lab(2)?;
    write_config(&lab, SUBNETS_KEPT_FREE)?;
    bring_up(&mut lab, &[])?;
    are_as_wanted(&lab, 0)?;
    let subnet = lab.status(0)?.subnets[0];
    let host = NetNs::open(lab.host(0).netns.name());
    let state = |lab: &Lab| -> Result<Value> {
        let device = link(&host, "flannel.1")?;
        Ok(json!([device["ifindex"], device["address"], lease(lab, subnet)?]))
    };
    let before = state(&lab)?;
    // Of a node that has left meanwhile.
    let leave_behind = || {
        let device = ["dev", "flannel.1"];
        let mac = "02:00:00:00:00:fa";
        host.ip(&[&["neigh", "add", "10.42.250.0", "lladdr", mac], &device[..]].concat())?;
        let fdb = ["fdb", "append", mac, "dst", "10.168.0.250"];
        host.tool("bridge", &[&fdb[..], &device].concat())?;
        let via = ["route", "add", "10.42.250.0/24", "via", "10.42.250.0", "onlink"];
        host.ip(&[&via[..], &device, &["proto", "119"]].concat())
    };
    loses_nothing_over_restarts(&mut lab, || objects(&host, "flannel.1"), leave_behind)?;
    assert_eq!(state(&lab)?, before, "device, MAC and lease are the same");
    lab.remove()
}

#[test]
fn two_hundred_leases_that_change_at_once_are_followed() -> Result<()> {
    let mut lab = lab(1)?;
    let range = r#""SubnetMin":"10.42.250.0","SubnetMax":"10.42.252.0""#;
    write_config(&lab, &format!(r#"{{"Network":"10.42.0.0/16",{range}}}"#))?;
    let write = |lab: &Lab, round: u8| -> Result<BTreeSet<String>> {
        let mut all = BTreeSet::new();
        for number in 1..=200 {
            let mac = format!("02:00:00:00:{round:02x}:{number:02x}");
            let public_ip = format!("10.16{round}.1.{number}");
            write_lease(lab, &format!("10.42.{number}.0-24"), &public_ip, &mac)?;
            all.extend(wanted(format!("10.42.{number}.0/24").parse()?, &mac, &public_ip));
        }
        Ok(all)
    };
    let host = NetNs::open(lab.host(0).netns.name());
    let first = write(&lab, 1)?;
    lab.start_daemon(0, &[])?;
    lab.wait_ready(0, DEADLINE)?;
    are(&host, &first)?;
    are(&host, &write(&lab, 2)?)?;
    for number in 1..=200 {
        fs::remove_file(lab.registry()?.join(format!("subnets/10.42.{number}.0-24")))?;
    }
    are(&host, &BTreeSet::new())?;
    let log = fs::read_to_string(&lab.host(0).log)?;
    assert!(!log.contains("somebody changed"), "what the registry says is no repair: {log}");
    lab.remove()
}

/// By the MAC of its device: a lease of its own for the new address would be refused for its sake.
#[test]
fn a_node_keeps_its_lease_where_its_public_address_changes() -> Result<()> {
    let mut lab = lab(2)?;
    bring_up(&mut lab, &[])?;
    let before = lab.status(0)?.subnets;
    lab.stop_daemon(0)?;
    // As behind an address translator: the interface goes on with its own.
    lab.host(0).netns.ip(&["address", "add", "10.168.0.201/32", "dev", "lo"])?;
    lab.start_daemon(0, &["--iface=eth0", "--public-ip=10.168.0.201"])?;
    until("it has its lease again", || Ok(lab.status(0)?.subnets == before))?;
    assert_eq!(lease(&lab, before[0])?["PublicIP"], "10.168.0.201");
    assert_eq!(fs::read_dir(lab.registry()?.join("subnets"))?.count(), 2);
    are_as_wanted(&lab, 1)?;
    ping_both_ways(&lab, 0, 1)?;
    lab.remove()
}

/// Leases that would undo each other's entries, or ours, are told; the others go on.
#[test]
fn leases_that_cannot_be_served_are_told() -> Result<()> {
    let mut lab = lab(2)?;
    bring_up(&mut lab, &[])?;
    let own = link(&lab.host(0).netns, "flannel.1")?["address"].as_str().unwrap().to_owned();
    let theirs = link(&lab.host(1).netns, "flannel.1")?["address"].as_str().unwrap().to_owned();
    let before = all_wanted(&lab, 0)?;
    let range = |number: u8| format!("10.42.{number}.0-25");
    // Beyond both leases, which are /24 of the same network.
    let taken: Vec<IpNetwork> = vec![lab.status(0)?.subnets[0], lab.status(1)?.subnets[0]];
    let is_free = |number: &u8| !taken.iter().any(|it| it.contains([10, 42, *number, 1].into()));
    let free: Vec<u8> = (1..=250).filter(is_free).collect();
    write_lease(&lab, &range(free[0]), "10.168.0.201", &own)?;
    write_lease(&lab, &range(free[1]), "10.168.0.202", "01:00:5e:00:00:01")?;
    write_lease(&lab, &range(free[2]), "10.168.0.203", "02:00:00:00:00:03")?;
    write_lease(&lab, &range(free[3]), "10.168.0.204", "02:00:00:00:00:03")?;
    // Whoever was there first keeps it, whatever comes first in the registry.
    write_lease(&lab, &range(free[5]), "10.168.0.206", &theirs)?;
    // One node may have two.
    let other = lab.host(1).address.to_string();
    write_lease(&lab, &range(free[6]), &other, &theirs)?;
    let host_gw = r#"{"PublicIP":"10.168.0.205","BackendType":"host-gw"}"#;
    fs::write(lab.registry()?.join(format!("subnets/{}", range(free[4]))), host_gw)?;
    for told in [
        format!("the node of {} has our own MAC {own}", range(free[0])),
        format!("the node of {} cannot be sent to: 01:00:5e:00:00:01", range(free[1])),
        format!("the node of {} has the MAC 02:00:00:00:00:03 of that of", range(free[3])),
        format!(
            "the node of {} at 10.168.0.205 is of the backend host-gw, not vxlan",
            range(free[4])
        ),
        format!("the node of {} has the MAC {theirs} of that of", range(free[5])),
    ] {
        tells(&lab, 0, &told)?;
    }
    let subnet = |number: usize| format!("10.42.{}.0/25", free[number]).parse::<IpNetwork>();
    let mut wanted_now = BTreeSet::from(wanted(subnet(2)?, "02:00:00:00:00:03", "10.168.0.203"));
    wanted_now.extend(wanted(subnet(6)?, &theirs, &other));
    wanted_now.extend(before);
    are(&lab.host(0).netns, &wanted_now)?;
    ping_both_ways(&lab, 0, 1)?;
    lab.remove()
}

/// Beside the lab's daemons, which are vxlan's, others with a Network of their own. `way` is where
/// their route to a subnet leads, given its base and the host that has it.
fn two_daemons(backend: &str, way: impl Fn(&str, &str) -> [String; 2]) -> Result<()> {
    let mut lab = lab(2)?;
    bring_up(&mut lab, &[])?;
    let registry = lab.registry()?.with_file_name("second-registry");
    fs::create_dir_all(&registry)?;
    let config = format!(r#"{{"Network":"10.43.0.0/16","Backend":{backend}}}"#);
    fs::write(registry.join("config"), config)?;
    let start = |lab: &Lab, host: usize| -> Result<Weftd> {
        let site = lab.host(host);
        let second = site.run_dir.with_file_name("second");
        fs::create_dir_all(&second)?;
        let arguments = [
            format!("--registry=dir:{}", registry.display()),
            format!("--state-dir={}", second.join("state").display()),
            format!("--run-dir={}", second.join("run").display()),
            format!("--subnet-file={}", second.join("subnet.env").display()),
        ];
        let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
        Weftd::start(&site.netns, &second.join("log"), &arguments)
    };
    let second = |lab: &Lab, host: usize| {
        status::read(&lab.host(host).run_dir.with_file_name("second").join("run"))
    };
    let [first, other] = [start(&lab, 0)?, start(&lab, 1)?];
    let host = NetNs::open(lab.host(0).netns.name());
    until("the second overlay is up", || {
        Ok(second(&lab, 0)?.peers.len() == 1 && !second(&lab, 1)?.subnets.is_empty())
    })?;
    let theirs = second(&lab, 1)?.subnets[0];
    let [via, device] = way(&theirs.network().to_string(), &lab.host(1).address.to_string());
    let has_both = |lab: &Lab| {
        let routes = host.ip_json(&["route", "show", &theirs.to_string(), "proto", "119"])?;
        let is_there = routes[0]["gateway"] == via.as_str() && routes[0]["dev"] == device.as_str();
        Ok(is_there && objects(&host, "flannel.1")? == all_wanted(lab, 0)?)
    };
    until("both have their routes", || has_both(&lab))?;
    ping_both_ways(&lab, 0, 1)?;

    // Each looks at the kernel anew when it starts.
    let log = first.log()?;
    assert!(first.end(Signal::TERM)?.success());
    let first = start(&lab, 0)?;
    until("the second overlay is up again", || Ok(second(&lab, 0)?.peers.len() == 1))?;
    assert!(has_both(&lab)?);
    lab.kill_daemon(0)?;
    lab.start_daemon(0, &[])?;
    lab.wait_ready(0, DEADLINE)?;
    assert!(has_both(&lab)?);
    let mut logs = vec![log, first.log()?, other.log()?];
    for host in 0..2 {
        logs.push(fs::read_to_string(&lab.host(host).log)?);
    }
    for log in logs {
        assert!(!log.contains("somebody changed links or routes"), "{log}");
    }
    drop((first, other));
    lab.remove()
}

#[test]
fn two_daemons_on_a_host_leave_each_others_state_alone() -> Result<()> {
    two_daemons(r#"{"Type":"host-gw"}"#, |_, host| [host.to_owned(), "eth0".to_owned()])
}

#[test]
fn two_daemons_of_vxlan_leave_each_others_state_alone() -> Result<()> {
    let config = r#"{"Type":"vxlan","VNI":7}"#;
    two_daemons(config, |base, _| [base.to_owned(), "flannel.7".to_owned()])
}

#[test]
fn the_devices_options_are_the_configs() -> Result<()> {
    let mut lab = lab(1)?;
    let options = r#"{"Type":"vxlan","VNI":7,"Port":4790,"MTU":1400,"GBP":true,"Learning":true}"#;
    write_config(&lab, &format!(r#"{{"Network":"10.42.0.0/16","Backend":{options}}}"#))?;
    lab.start_daemon(0, &[])?;
    lab.wait_ready(0, DEADLINE)?;
    let device = link(&lab.host(0).netns, "flannel.7")?;
    assert_eq!((&device["mtu"], lab.status(0)?.mtu), (&json!(1350), Some(1350)));
    let data = &device["linkinfo"]["info_data"];
    assert_eq!(
        json!([data["id"], data["port"], data["gbp"], data["learning"]]),
        json!([7, 4790, true, true]),
        "{data}"
    );
    // Without a port and an MTU in the config they are those that all new devices have.
    lab.stop_daemon(0)?;
    let options = r#"{"Type":"vxlan","VNI":7,"GBP":true,"Learning":true}"#;
    write_config(&lab, &format!(r#"{{"Network":"10.42.0.0/16","Backend":{options}}}"#))?;
    lab.start_daemon(0, &[])?;
    lab.wait_ready(0, DEADLINE)?;
    let data = link(&lab.host(0).netns, "flannel.7")?["linkinfo"]["info_data"].clone();
    assert_eq!((&data["port"], lab.status(0)?.mtu), (&json!(8472), Some(1450)), "{data}");
    lab.remove()
}
