//! host-gw: the kernel's routes to peers, exact, kept, and unbroken while the daemon is away; and how
//! what udp-tun needs of the kernel is kept, too.

use std::fs;
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use serde_json::Value;
use weft_daemon::lab::{Bytes, Lab, PingOptions};
use weft_daemon::netns::NetNs;
use weft_tests::load::loses_nothing_over_restarts;
use weft_tests::{
    DEADLINE, SUBNETS_KEPT_FREE, bring_up, dual_stack, health, hosts, hosts_of, logs, output_of,
    overlay, program, reaches, tells, until, until_within, write_config,
};

/// Two hops, both in kernels.
const TTL_ACROSS: u8 = 62;

/// What is promised of a repair, which a busy machine may keep once in several times.
const REPAIRED_WITHIN: Duration = Duration::from_secs(1);
/// Repairs in a minute.
const REPAIRS_MAX: usize = 10;
/// Events bring repairs sooner than this, the slow timer later.
const GIVEN_UP_FOR: Duration = Duration::from_secs(2);
/// The slow timer's thirty seconds, and what a busy machine takes.
const SLOW_TIMER: Duration = Duration::from_secs(45);

fn lab(hosts: usize) -> Result<Lab> {
    hosts_of("host-gw", hosts)
}

/// A host's routes that are weft's, by destination: where they lead.
fn routes(netns: &NetNs, family: &str) -> Result<Vec<(String, String)>> {
    let routes = netns.ip_json(&[family, "route", "show", "proto", "119"])?;
    let routes = routes.as_array().context("no list of routes")?;
    let text = |route: &Value, key: &str| route[key].as_str().unwrap_or_default().to_owned();
    let pairs = routes.iter().map(|route| (text(route, "dst"), text(route, "gateway")));
    let mut pairs: Vec<_> = pairs.collect();
    pairs.sort();
    Ok(pairs)
}

/// What they should be: each other host's subnet by way of that host.
fn wanted(lab: &Lab, host: usize) -> Result<Vec<(String, String)>> {
    let others = (0..lab.hosts()).filter(|other| *other != host);
    let pairs = others.map(|other| {
        let subnet = lab.status(other)?.subnets[0].to_string();
        Ok((subnet, lab.host(other).address.to_string()))
    });
    let mut pairs = pairs.collect::<Result<Vec<_>>>()?;
    pairs.sort();
    Ok(pairs)
}

fn are_as_wanted(lab: &Lab, host: usize) -> Result<()> {
    let netns = &lab.host(host).netns;
    let wanted = wanted(lab, host)?;
    until("the routes are as they should be", || Ok(routes(netns, "-4")? == wanted))
        .with_context(|| format!("{:?}, not {wanted:?}", routes(netns, "-4")))
}

fn pings(lab: &Lab) -> Result<()> {
    for (from, to) in [(0, 1), (1, 0)] {
        let report = lab.ping(from, to, &PingOptions::default())?;
        assert!(report.complete(), "{report:?}");
        assert!(report.replies.iter().all(|reply| reply.ttl == TTL_ACROSS), "{report:?}");
    }
    Ok(())
}

#[test]
fn each_peer_has_its_route_and_the_lease_is_flannels() -> Result<()> {
    let mut lab = lab(3)?;
    bring_up(&mut lab, &[])?;
    for host in 0..3 {
        are_as_wanted(&lab, host)?;
        assert!(fs::read_to_string(&lab.host(host).subnet_file)?.contains("FLANNEL_MTU=1500\n"));
        let subnet = lab.status(host)?.subnets[0];
        let key = format!("subnets/{}-24", subnet.network());
        let lease: Value = serde_json::from_slice(&fs::read(lab.registry()?.join(key))?)?;
        assert_eq!(lease["PublicIP"], lab.host(host).address.to_string());
        assert_eq!(
            (&lease["BackendType"], &lease["BackendData"]),
            (&"host-gw".into(), &Value::Null)
        );
    }
    pings(&lab)?;
    assert!(lab.transfer(0, 2, Bytes(8 << 20))?.intact());
    lab.remove()
}

#[test]
fn both_families_have_routes() -> Result<()> {
    let mut lab = lab(2)?;
    dual_stack(&lab)?;
    bring_up(&mut lab, &[])?;
    are_as_wanted(&lab, 0)?;
    let ipv6 = lab.status(1)?.subnets[1].to_string();
    let ipv6 = [(ipv6, "fd00:168::95".to_owned())];
    let netns = &lab.host(0).netns;
    for meddling in [None, Some(["-6", "route", "flush", "proto", "119"])] {
        meddling.map_or(Ok(()), |meddling| netns.ip(&meddling))?;
        until("the IPv6 route is there", || Ok(routes(netns, "-6")? == ipv6))
            .with_context(|| format!("{:?}, not {ipv6:?}", routes(netns, "-6")))?;
    }
    reaches(&lab, 0, 1)?;
    lab.remove()
}

/// By hand, one at a time, all at once, and with the link.
#[test]
fn routes_that_somebody_removes_come_back() -> Result<()> {
    let mut lab = lab(3)?;
    bring_up(&mut lab, &[])?;
    let host = NetNs::open(lab.host(0).netns.name());
    let mut quickest = DEADLINE;
    for (subnet, _) in wanted(&lab, 0)? {
        host.ip(&["route", "del", &subnet])?;
        let removed = Instant::now();
        are_as_wanted(&lab, 0)?;
        quickest = quickest.min(removed.elapsed());
        host.ip(&["route", "replace", &subnet, "via", "10.168.0.200", "proto", "119"])?;
        are_as_wanted(&lab, 0)?;
    }
    assert!(quickest < REPAIRED_WITHIN, "{quickest:?}");
    host.ip(&["route", "flush", "proto", "119"])?;
    are_as_wanted(&lab, 0)?;
    host.ip(&["link", "set", "eth0", "down"])?;
    host.ip(&["link", "set", "eth0", "up"])?;
    are_as_wanted(&lab, 0)?;
    pings(&lab)?;
    let log = fs::read_to_string(&lab.host(0).log)?;
    assert!(log.contains("somebody changed links or routes of weft's"), "{log}");
    lab.remove()
}

/// Somebody who undoes our routes again and again is not fought for ever.
#[test]
fn a_fight_is_given_up_and_told() -> Result<()> {
    let mut lab = lab(2)?;
    bring_up(&mut lab, &["--healthz-port=8081"])?;
    let host = NetNs::open(lab.host(0).netns.name());
    let given_up = || {
        let problems = lab.status(0)?.problems;
        Ok(problems.iter().any(|it| it.contains("another program keeps changing")))
    };
    until("it is told", || {
        // Fails where it is not back yet.
        let _ = host.ip(&["route", "flush", "proto", "119"]);
        given_up()
    })?;
    assert_eq!(health(&host, "/readyz")?.0, 503);
    // From now on only the slow timer puts it right, which may come once.
    let (since, mut refills) = (Instant::now(), 0);
    host.ip(&["route", "flush", "proto", "119"])?;
    until("it would have been put right", || {
        if !routes(&host, "-4")?.is_empty() {
            refills += 1;
            host.ip(&["route", "flush", "proto", "119"])?;
        }
        Ok(since.elapsed() > GIVEN_UP_FOR)
    })?;
    assert!(refills <= 1, "put right {refills} times");
    let log = fs::read_to_string(&lab.host(0).log)?;
    assert_eq!(log.matches("somebody changed links or routes").count(), REPAIRS_MAX, "{log}");
    assert_eq!(log.matches("another program keeps changing").count(), 1, "{log}");
    // Sooner than the fight is over, and events count again.
    let wanted = wanted(&lab, 0)?;
    until_within(SLOW_TIMER, "the timer puts them right", || Ok(routes(&host, "-4")? == wanted))?;
    lab.remove()
}

#[test]
fn a_restart_loses_nothing_and_cleans_up_what_is_gone() -> Result<()> {
    let mut lab = lab(2)?;
    write_config(&lab, SUBNETS_KEPT_FREE)?;
    bring_up(&mut lab, &[])?;
    are_as_wanted(&lab, 0)?;
    let before = wanted(&lab, 0)?;
    let host = NetNs::open(lab.host(0).netns.name());
    // Of a node that has left meanwhile.
    let gone = ["10.42.250.0/24", "via", "10.168.0.250", "proto", "119"];
    let leave_behind = || host.ip(&[&["route", "add"], &gone[..]].concat());
    loses_nothing_over_restarts(&mut lab, || routes(&host, "-4"), leave_behind)?;
    assert_eq!(wanted(&lab, 0)?, before, "the subnets are the same");
    lab.remove()
}

/// Nobody else would ever remove them.
#[test]
fn routes_into_a_former_network_go() -> Result<()> {
    let mut lab = lab(2)?;
    bring_up(&mut lab, &[])?;
    are_as_wanted(&lab, 0)?;
    let host = NetNs::open(lab.host(0).netns.name());
    // Of another daemon beside this one.
    host.ip(&["route", "add", "10.99.1.0/24", "via", "10.168.0.250", "proto", "119"])?;
    write_config(&lab, r#"{"Network":"10.43.0.0/16","Backend":{"Type":"host-gw"}}"#)?;
    for number in 0..2 {
        lab.stop_daemon(number)?;
        lab.start_daemon(number, &[])?;
        lab.wait_ready(number, DEADLINE)?;
    }
    let another = ("10.99.1.0/24".to_owned(), "10.168.0.250".to_owned());
    let wanted = [wanted(&lab, 0)?, vec![another]].concat();
    assert!(wanted[0].0.starts_with("10.43."), "{wanted:?}");
    until("only routes of this overlay are left", || Ok(routes(&host, "-4")? == wanted))
        .with_context(|| format!("{:?}, not {wanted:?}", routes(&host, "-4")))?;
    lab.remove()
}

/// Leases that cannot be served are told, each with the reason; the others go on.
#[test]
fn peers_that_cannot_be_reached_are_told() -> Result<()> {
    let mut lab = lab(2)?;
    let subnets = lab.registry()?.join("subnets");
    fs::create_dir_all(&subnets)?;
    write_config(&lab, SUBNETS_KEPT_FREE)?;
    let host_gw = |ip: &str| format!(r#"{{"PublicIP":"{ip}","BackendType":"host-gw"}}"#);
    fs::write(subnets.join("10.42.1.0-24"), host_gw("203.0.113.7"))?;
    fs::write(
        subnets.join("10.42.2.0-24"),
        r#"{"PublicIP":"10.168.0.120","BackendType":"vxlan"}"#,
    )?;
    fs::write(subnets.join("10.42.3.0-24"), host_gw("10.168.0.130"))?;
    fs::write(subnets.join("10.42.4.0-24"), host_gw("10.168.0.140"))?;
    fs::write(subnets.join("10.42.5.0-24"), host_gw("10.168.0.150"))?;
    let host = NetNs::open(lab.host(0).netns.name());
    // Only its own network is on the link: the lab's default route has every address there.
    for host in 0..2 {
        let netns = &lab.host(host).netns;
        netns.ip(&["route", "del", "default"])?;
        netns.ip(&["route", "add", "default", "via", "10.168.0.254"])?;
    }
    // flannel's own, a stranger's, and a stranger's that is taken where there is no other.
    let stranger = ["via", "10.168.0.200", "dev", "eth0", "metric"];
    host.ip(&["route", "add", "10.42.3.0/24", "via", "10.168.0.130", "dev", "eth0"])?;
    host.ip(&[&["route", "add", "10.42.4.0/24"], &stranger[..], &["0"]].concat())?;
    host.ip(&[&["route", "add", "10.42.5.0/24"], &stranger[..], &["100"]].concat())?;
    for host in 0..2 {
        lab.start_daemon(host, &[])?;
    }
    for host in 0..2 {
        lab.wait_ready(host, DEADLINE)?;
        lab.attach_container(host)?;
    }
    for told in [
        "the node 203.0.113.7 must be on the same link as eth0",
        "the node of 10.42.2.0-24 at 10.168.0.120 is of the backend vxlan, not host-gw",
        "the route to 10.42.4.0/24 is somebody else's",
    ] {
        tells(&lab, 0, told)?;
    }
    for (to, told) in [
        ("10.42.1.9", "do not go there: `ip route replace 10.42.1.0/24 via 203.0.113.7"),
        (
            "10.42.2.9",
            "do not go there: the node of 10.42.2.0-24 at 10.168.0.120 is of the backend vxlan",
        ),
        ("10.42.4.9", "10.168.0.200"),
    ] {
        let trace = traced(&lab, to)?;
        assert!(trace.contains("PROBLEM") && trace.contains(told), "no {told:?} in {trace}");
    }
    until("flannel's route is ours, and there is one beside the stranger's", || {
        let ours = routes(&host, "-4")?;
        let has = |to: &str, via: &str| ours.contains(&(to.into(), via.into()));
        Ok(has("10.42.3.0/24", "10.168.0.130") && has("10.42.5.0/24", "10.168.0.150"))
    })?;
    let strangers = host.ip_json(&["route", "show", "10.42.4.0/24"])?;
    assert_eq!(strangers[0]["gateway"], "10.168.0.200");
    until("the containers reach each other", || pings(&lab).map(|()| true))?;
    // The bridge and the container's cable were changes, but none of ours; what is refused again is
    // no repair.
    for _ in 0..12 {
        host.ip(&["address", "add", "192.0.2.1/32", "dev", "lo"])?;
        host.ip(&["address", "del", "192.0.2.1/32", "dev", "lo"])?;
    }
    host.ip(&["route", "del", "10.42.3.0/24"])?;
    until("a route that was removed is back", || {
        Ok(routes(&host, "-4")?.contains(&("10.42.3.0/24".into(), "10.168.0.130".into())))
    })?;
    logs(&lab, 0, "somebody changed links or routes")?;
    let log = fs::read_to_string(&lab.host(0).log)?;
    assert_eq!(log.matches("somebody changed links or routes").count(), 1, "{log}");
    // A node that has moved out of reach: nothing more is sent to where it was.
    fs::write(subnets.join("10.42.3.0-24"), host_gw("203.0.113.9"))?;
    tells(&lab, 0, "the node 203.0.113.9 must be on the same link as eth0")?;
    let left = routes(&host, "-4")?;
    assert!(left.iter().all(|(to, _)| to != "10.42.3.0/24"), "{left:?}");
    lab.remove()
}

/// What is said of the way to an address from the first host.
fn traced(lab: &Lab, to: &str) -> Result<String> {
    let mut weft = Command::new(program("weft")?);
    weft.args(["trace", to, "--run-dir"]).arg(&lab.host(0).run_dir);
    Ok(String::from_utf8(output_of(&lab.host(0).netns, &mut weft)?.stdout)?)
}

#[test]
fn behind_a_nat_it_does_not_start() -> Result<()> {
    let mut lab = lab(1)?;
    lab.start_daemon(0, &["--iface=eth0", "--public-ip=198.51.100.1"])?;
    let error = format!("{:#}", lab.wait_ready(0, DEADLINE).unwrap_err());
    assert!(error.contains("your PublicIP differs from interface IP"), "{error}");
    lab.remove()
}

/// udp-tun's device, address and route are looked after in the same way.
#[test]
fn udp_tun_has_its_device_put_right_at_once() -> Result<()> {
    let lab = overlay(2)?;
    let host = NetNs::open(lab.host(0).netns.name());
    let base = lab.status(0)?.subnets[0].network().to_string();
    let is_right = || {
        let routes = host.ip_json(&["route", "show", "10.42.0.0/16"])?;
        let links = host.ip_json(&["address", "show", "flannel0"])?;
        let addresses = links[0]["addr_info"].as_array().context("no addresses")?;
        Ok(routes[0]["dev"] == "flannel0"
            && addresses.iter().any(|it| it["local"] == base.as_str())
            && links[0]["flags"].as_array().is_some_and(|flags| flags.contains(&"UP".into())))
    };
    assert!(is_right()?);
    for meddling in [
        &["route", "del", "10.42.0.0/16"][..],
        &["address", "flush", "dev", "flannel0"],
        &["link", "set", "flannel0", "down"],
    ] {
        host.ip(meddling)?;
        until(&format!("it is right after {meddling:?}"), is_right)?;
    }
    host.ip(&["link", "set", "flannel0", "down"])?;
    host.ip(&["link", "set", "flannel0", "name", "another"])?;
    until("there is a device again", || Ok(is_right().unwrap_or(false)))?;
    until("packets pass", || Ok(lab.ping(0, 1, &PingOptions::default())?.complete()))?;
    lab.remove()
}

/// Options of other backends mean nothing to it.
#[test]
fn a_backend_flag_that_agrees_with_the_config_is_taken() -> Result<()> {
    let mut lab = hosts(1)?;
    let backend = r#"{"Type":"host-gw","DirectRouting":"yes"}"#;
    write_config(&lab, &format!(r#"{{"Network":"10.42.0.0/16","Backend":{backend}}}"#))?;
    lab.start_daemon(0, &["--backend=host-gw"])?;
    lab.wait_ready(0, DEADLINE)?;
    assert_eq!(lab.status(0)?.backend.as_deref(), Some("host-gw"));
    lab.remove()
}
