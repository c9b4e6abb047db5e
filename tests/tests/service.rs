//! What systemd and health checks are told, and what the unit that we ship lets the daemon do: under
//! systemd itself.

use std::fs;
use std::net::{TcpListener, TcpStream};
use std::os::unix::fs::MetadataExt;
use std::process::Command;

use anyhow::{Context, Result};
use serde_json::{Value, json};
use weft_daemon::lab::{Lab, LabOptions};
use weft_daemon::netns::NetNs;
use weft_tests::etcd;
use weft_tests::machine::Machine;
use weft_tests::{DEADLINE, health, hosts, http_get, metrics, pings, repository, run_weftd, until};

/// What one gets that asks for reasons.
fn reasons(netns: &NetNs, path: &str) -> Result<(u16, Value)> {
    let (code, body) = http_get(netns, 8081, path, "application/json")?;
    Ok((code, serde_json::from_str(&body)?))
}

/// A host with our unit, and options for it.
fn machine(netns: &NetNs, options: &str) -> Result<Machine> {
    let machine = Machine::new(netns)?;
    machine.write("/etc/weft/weftd.conf", &format!("WEFT_OPTIONS=\"{options}\"\n"))?;
    Ok(machine)
}

/// Changes a setting of our unit, as `systemctl edit` does.
fn edit(machine: &Machine, settings: &str) -> Result<()> {
    machine.write("/etc/systemd/system/weftd.service.d/override.conf", settings)
}

/// A host that needs no other.
const ALONE: &str = "--registry=dir:/var/lib/weft/registry --network=10.42.0.0/16";

const CONFIG: &str = "/var/lib/weft/registry/config";

#[test]
fn systemd_and_health_checks_are_told_how_it_is() -> Result<()> {
    let lab = hosts(1)?;
    let netns = &lab.host(0).netns;
    let mut machine = machine(netns, "--registry=dir:/var/lib/weft/registry --healthz-port=8081")?;
    edit(&machine, "[Service]\nWatchdogSec=4\nTimeoutStartSec=2\n")?;
    machine.boot()?;
    machine.shell("systemctl start --no-block weftd")?;
    machine.says("weftd", "waiting for the network config: there is none in dir:")?;
    until("it answers", || health(netns, "/healthz").map(|_| true))?;
    assert_eq!(health(netns, "/healthz")?, (200, "flanneld is running".into()));
    assert_eq!(health(netns, "/readyz")?, (503, "flanneld is not ready yet".into()));
    assert_eq!(health(netns, "/other")?.0, 404);
    assert_eq!(reasons(netns, "/healthz")?, (200, json!({"alive": true, "reasons": []})));
    // More than may be open at once, all of whom say nothing, are in nobody's way for long.
    let connect = || netns.run(|| TcpStream::connect("127.0.0.1:8081"));
    let silent = (0..100).map(|_| Ok(connect()??)).collect::<Result<Vec<_>>>()?;
    until("it answers others", || health(netns, "/healthz").map(|_| true))?;
    drop(silent);
    let (code, why) = reasons(netns, "/readyz")?;
    assert_eq!((code, &why["ready"]), (503, &json!(false)));
    assert!(why["reasons"][0].to_string().contains("waiting for the network config"), "{why}");
    // It waits for the config, not for the registry.
    assert_eq!(metrics(netns, 8081)?["weft_registry_readable"].to_bits(), 1f64.to_bits());
    // For as long as it takes, whatever the unit says of its start.
    let waited = || -> Result<f64> {
        let begun = machine.property("weftd", "InactiveExitTimestampMonotonic")?;
        let now = fs::read_to_string("/proc/uptime")?;
        let now: f64 = now.split(' ').next().context("no time")?.parse()?;
        Ok(now - begun.parse::<f64>()? / 1e6)
    };
    until("it has waited twice as long as a start may take", || Ok(waited()? > 4.0))?;
    let state =
        [machine.property("weftd", "ActiveState")?, machine.property("weftd", "NRestarts")?];
    assert_eq!(state, ["activating", "0"]);

    machine.write(CONFIG, r#"{"Network":"10.42.0.0/16"}"#)?;
    machine.is("weftd", "active")?;
    machine.says("weftd", "forwarding")?;
    until("it is ready", || Ok(health(netns, "/readyz")? == (200, "flanneld is ready".into())))?;
    let env = machine.shell("cat /run/flannel/subnet.env")?;
    // Ready, but somebody should see to it.
    machine.write(CONFIG, r#"{"Network":"10.43.0.0/16"}"#)?;
    machine.says("weftd", "the network config has changed; restart weftd to go by it")?;
    assert_eq!(health(netns, "/readyz")?.0, 200);
    machine.write(CONFIG, r#"{"Network":"10.42.0.0/16"}"#)?;
    machine.says("weftd", "forwarding")?;

    // The watchdog lets it live while it works, and ends it where it does not.
    let fed = || machine.property("weftd", "WatchdogTimestampMonotonic");
    let before: u64 = fed()?.parse()?;
    until("the watchdog is fed", || Ok(fed()?.parse::<u64>()? > before + 6_000_000))?;
    assert_eq!(machine.property("weftd", "NRestarts")?, "0");
    machine.shell("systemctl kill --signal=STOP weftd")?;
    until("it is started anew", || Ok(machine.property("weftd", "NRestarts")? == "1"))?;
    machine.is("weftd", "active")?;
    assert!(machine.journal("weftd", "--output=cat")?.contains("Watchdog timeout"));
    assert_eq!(machine.shell("cat /run/flannel/subnet.env")?, env);

    machine.shell("systemctl stop weftd")?;
    assert_eq!(machine.property("weftd", "Result")?, "success");
    // Docker may start before weftd is up again.
    assert_eq!(machine.shell("cat /run/flannel/subnet.env")?, env);
    machine.cut_power()?;
    lab.remove()
}

#[test]
fn the_journal_has_levels_and_fields() -> Result<()> {
    let lab = hosts(1)?;
    let mut machine = machine(&lab.host(0).netns, ALONE)?;
    machine.boot()?;
    machine.shell("systemctl start weftd")?;
    let entries = machine.journal("weftd", "--output=json")?;
    let entries = entries.lines().map(serde_json::from_str);
    let entries: Vec<Value> = entries.collect::<Result<_, _>>()?;
    let with = |text: &str| {
        let says = |it: &&Value| it["MESSAGE"].as_str().is_some_and(|it| it.starts_with(text));
        entries.iter().find(says).with_context(|| format!("no {text:?} in {entries:?}"))
    };
    let lease = with("lease subnet=10.42.")?;
    let subnet = lease["WEFT_SUBNET"].as_str().context("no field")?;
    assert!(lease["MESSAGE"].to_string().contains(&format!("subnet={subnet} expires=")));
    assert_eq!((&lease["PRIORITY"], &lease["SYSLOG_IDENTIFIER"]), (&json!("6"), &json!("weftd")));
    machine.cut_power()?;
    lab.remove()
}

#[test]
fn the_group_may_ask_and_nothing_ends_where_it_cannot() -> Result<()> {
    let netns = NetNs::create(format!("weft-group-{}", std::process::id()))?;
    netns.ip(&["link", "set", "lo", "up"])?;
    let mut machine = machine(&netns, "--registry=dir:/var/lib/weft/registry")?;
    machine.boot()?;
    machine.shell("groupadd --gid=4242 weft")?;
    for (settings, gid, mode) in [("", 0, 0o600), ("[Service]\nGroup=weft\n", 4242, 0o660)] {
        edit(&machine, settings)?;
        machine.shell("systemctl daemon-reload; systemctl start --no-block weftd")?;
        machine.says("weftd", "waiting for the network config: there is none")?;
        let sockets = weft_daemon::socket::sockets(&machine.path("/run/weft"))?;
        let socket = fs::metadata(sockets.first().context("no socket")?)?;
        let run = machine.property("weftd", "InvocationID")?;
        let log = machine.journal("weftd", &format!("_SYSTEMD_INVOCATION_ID={run}"))?;
        assert_eq!((socket.gid(), socket.mode() & 0o777), (gid, mode), "{log}");
        let is_told = log.contains("cannot be given to the group weft");
        assert_eq!(is_told, gid == 0, "{log}");
        machine.shell("systemctl stop weftd")?;
    }
    machine.cut_power()?;
    netns.remove()
}

/// Two hosts whose daemons run as our unit lets them: with etcd, a backend, and a firewall's program. Their
/// containers reach each other.
fn by_our_unit(backend: &str, firewall: &str) -> Result<(Lab, Vec<Machine>)> {
    let mut lab = etcd::hosts(2, 1)?;
    let options = format!(
        "--etcd-endpoints={} --network=10.42.0.0/16 --backend={backend} --firewall={firewall}",
        lab.etcd_urls().join(",")
    );
    let mut machines = Vec::new();
    for host in 0..2 {
        let mut machine = machine(&lab.host(host).netns, &options)?;
        machine.boot()?;
        machine.shell("systemctl start weftd")?;
        let env = machine.shell("cat /run/flannel/subnet.env")?;
        fs::write(&lab.host(host).subnet_file, env)?;
        lab.attach_container(host)?;
        machines.push(machine);
    }
    for machine in &machines {
        until("its peer is reached", || Ok(machine.shell("weft status")?.contains("yes")))?;
    }
    pings(&lab)?;
    Ok((lab, machines))
}

fn is_let(backend: &str, firewall: &str) -> Result<()> {
    let (lab, machines) = by_our_unit(backend, firewall)?;
    for mut machine in machines {
        let diagnosis = machine.shell("weft doctor")?;
        assert!(!diagnosis.contains("WARN"), "{diagnosis}");
        let log = machine.journal("weftd", "--priority=warning --output=cat")?;
        assert_eq!(log, "");
        machine.cut_power()?;
    }
    lab.remove()
}

#[test]
fn the_unit_lets_udp_tun_work_with_nftables() -> Result<()> {
    is_let("udp-tun", "nftables")
}

#[test]
fn the_unit_lets_vxlan_work_with_iptables() -> Result<()> {
    is_let("vxlan", "iptables")
}

#[test]
fn the_unit_lets_host_gw_work() -> Result<()> {
    is_let("host-gw", "auto")
}

/// It takes addresses and routes out of its interfaces that are not its own, each time it sets them up.
#[test]
fn what_systemd_networkd_takes_away_is_put_back() -> Result<()> {
    let (lab, machines) = by_our_unit("host-gw", "auto")?;
    let network = format!(
        "[Match]\nName=eth0\n[Network]\nAddress={}/24\nLinkLocalAddressing=no\n[Route]\nDestination=0.0.0.0/0\nScope=link\n",
        lab.host(0).address
    );
    machines[0].write("/etc/systemd/network/eth0.network", &network)?;
    // It does not take over the address that the lab has given.
    lab.host(0).netns.ip(&["address", "flush", "dev", "eth0", "scope", "global"])?;
    machines[0].shell("systemctl start systemd-networkd")?;
    let state = || machines[0].shell("networkctl status eth0");
    let is_set_up = || Ok(state()?.contains("(configured)"));
    until("networkd has set up eth0", is_set_up).with_context(|| state().unwrap_or_default())?;
    until("containers reach each other again", || pings(&lab).map(|()| true))?;
    let told = "somebody changed links or routes of weft's; put them right";
    let times = || -> Result<usize> {
        Ok(machines[0].journal("weftd", "--output=cat")?.matches(told).count())
    };
    let before = times()?;
    machines[0].shell("networkctl reconfigure eth0")?;
    until("weftd tells", || Ok(times()? > before))?;
    until("networkd has set up eth0 again", is_set_up)?;
    until("containers reach each other", || pings(&lab).map(|()| true))?;
    drop(machines);
    lab.remove()
}

/// Docker's unit with our drop-in, by its ExecStart. Docker itself is played.
#[test]
fn docker_gets_the_options_of_this_subnet_at_each_start() -> Result<()> {
    let lab = hosts(1)?;
    let mut machine = machine(&lab.host(0).netns, ALONE)?;
    let script = "#!/bin/sh\necho \"$@\" > /run/options; exec sleep infinity\n";
    machine.write("/usr/bin/dockerd", script)?;
    let unit = "[Service]\nExecStart=/usr/bin/dockerd\n";
    machine.write("/etc/systemd/system/docker.service", unit)?;
    machine.boot()?;
    machine.shell(
        "chmod +x /usr/bin/dockerd; mkdir /etc/systemd/system/docker.service.d; cd /usr/local/share/weft
         cp docker-weft.conf /etc/systemd/system/docker.service.d/; systemctl daemon-reload",
    )?;
    // Without the file there is no Docker: its bridge would be another one.
    assert!(machine.shell("systemctl start docker").is_err());
    machine.shell("systemctl start weftd; systemctl start docker")?;
    let wanted = machine.shell(
        "source /run/flannel/subnet.env
         echo -H fd:// --containerd=/run/containerd/containerd.sock --bip=$FLANNEL_SUBNET \
             --ip-masq=false --mtu=$FLANNEL_MTU",
    )?;
    let options = || -> Result<String> {
        until("docker runs", || Ok(fs::metadata(machine.path("/run/options"))?.len() > 0))?;
        machine.shell("cat /run/options; rm /run/options")
    };
    assert_eq!(options()?, wanted);
    machine.shell("systemctl restart docker")?;
    assert_eq!(options()?, wanted);
    machine.cut_power()?;
    lab.remove()
}

/// The overlay works without the firewall's program, but it is not ready for everything.
#[test]
fn what_is_missing_shows_in_readyz() -> Result<()> {
    let nothing = tempfile::tempdir()?;
    let search_path = Some(nothing.path().to_owned());
    let mut lab = Lab::new(LabOptions { hosts: 1, search_path, ..LabOptions::default() })?;
    lab.start_daemon(0, &["--ip-masq", "--healthz-port=8081", "--iptables-resync=1"])?;
    lab.wait_ready(0, DEADLINE)?;
    let netns = &lab.host(0).netns;
    assert_eq!(health(netns, "/healthz")?.0, 200);
    assert_eq!(health(netns, "/readyz")?.0, 503);
    let (_, why) = reasons(netns, "/readyz")?;
    assert!(why["reasons"][0].to_string().contains("nft"), "{why}");
    // Somebody installs it.
    std::os::unix::fs::symlink("/usr/sbin/nft", nothing.path().join("nft"))?;
    until("it is ready", || Ok(health(netns, "/readyz")?.0 == 200))?;
    lab.remove()
}

#[test]
fn a_port_in_use_is_told() -> Result<()> {
    let netns = NetNs::create(format!("weft-port-{}", std::process::id()))?;
    netns.ip(&["link", "set", "lo", "up"])?;
    let _taken = netns.run(|| TcpListener::bind("127.0.0.1:8081"))??;
    let (code, stderr) = run_weftd(&netns, &["--healthz-port=8081", "--network=10.42.0.0/16"])?;
    assert_eq!(code, Some(1));
    assert!(
        stderr.contains("cannot listen at 127.0.0.1:8081; another weftd may run here"),
        "{stderr}"
    );
    netns.remove()
}

#[test]
fn the_unit_is_hardened() -> Result<()> {
    let unit = repository().join("packaging/systemd/weftd.service");
    let mut command = Command::new("systemd-analyze");
    command.args(["security", "--offline=true", "--no-pager", "--threshold=25"]).arg(unit);
    let output = command.output().context("cannot run systemd-analyze; install systemd")?;
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stdout));
    Ok(())
}
