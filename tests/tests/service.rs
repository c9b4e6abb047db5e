//! What systemd and health checks are told, and what the unit that we ship lets the daemon do.

use std::fs;
use std::net::{TcpListener, TcpStream};
use std::os::unix::fs::MetadataExt;
use std::path::PathBuf;
use std::process::Command;

use anyhow::{Context, Result};
use serde_json::{Value, json};
use weft_daemon::lab::{Lab, LabOptions};
use weft_daemon::netns::NetNs;
use weft_tests::service::{Service, Unit, make_root};
use weft_tests::{
    DEADLINE, health, hosts, http_get, metrics, program, repository, run_weftd, until, write_config,
};

fn unit_file() -> PathBuf {
    repository().join("packaging/systemd/weftd.service")
}

/// What one gets that asks for reasons.
fn reasons(netns: &NetNs, path: &str) -> Result<(u16, Value)> {
    let (code, body) = http_get(netns, 8081, path, "application/json")?;
    Ok((code, serde_json::from_str(&body)?))
}

#[test]
fn systemd_and_health_checks_are_told_how_it_is() -> Result<()> {
    let lab = hosts(1)?;
    let root = tempfile::tempdir()?;
    make_root(root.path())?;
    std::os::unix::fs::symlink(program("weftd")?, root.path().join("usr/local/bin/weftd"))?;
    fs::create_dir_all(lab.registry()?)?;
    let netns = &lab.host(0).netns;
    let options = format!("--registry=dir:{} --healthz-port=8081", lab.registry()?.display());
    // Our own unit, but for a shorter watchdog.
    let unit = fs::read_to_string(unit_file())?.replace("WatchdogSec=60", "WatchdogSec=2");
    let more = [("WEFT_OPTIONS", options.as_str())];
    let unit = Unit::parse(&unit)?;
    let mut service = Service::start(netns, &unit, root.path(), &more, &lab.host(0).log)?;
    service.says("STATUS=waiting for the network config: there is none in dir:")?;
    service.says("EXTEND_TIMEOUT_USEC=30000000")?;
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
    assert!(!service.is_ready()?);
    // It waits for the config, not for the registry.
    assert_eq!(metrics(netns, 8081)?["weft_registry_readable"].to_bits(), 1f64.to_bits());

    write_config(&lab, r#"{"Network":"10.42.0.0/16"}"#)?;
    service.says("READY=1")?;
    service.says("STATUS=forwarding")?;
    until("it is ready", || Ok(health(netns, "/readyz")? == (200, "flanneld is ready".into())))?;
    assert!(root.path().join("run/flannel/subnet.env").exists());
    let pulses = |service: &mut Service| -> Result<usize> {
        Ok(service.heard()?.iter().filter(|line| *line == "WATCHDOG=1").count())
    };
    // Ready, but somebody should see to it.
    write_config(&lab, r#"{"Network":"10.43.0.0/16"}"#)?;
    service.says("STATUS=the network config has changed; restart weftd to go by it")?;
    assert_eq!(health(netns, "/readyz")?.0, 200);
    let before = pulses(&mut service)?;
    until("the watchdog is fed", || Ok(pulses(&mut service)? > before + 2))?;
    assert!(service.stop()?.success());
    service.says("STOPPING=1")?;
    lab.remove()
}

#[test]
fn the_group_may_ask_and_nothing_ends_where_it_cannot() -> Result<()> {
    let netns = NetNs::create(format!("weft-group-{}", std::process::id()))?;
    netns.ip(&["link", "set", "lo", "up"])?;
    let unit = fs::read_to_string(unit_file())?;
    let options = [("WEFT_OPTIONS", "--registry=dir:/var/lib/weft/registry")];
    let in_group = unit.replace("#Group=weft", "Group=weft");
    for (unit, gid, mode) in [(&unit, 0, 0o600), (&in_group, 4242, 0o660)] {
        let root = tempfile::tempdir()?;
        make_root(root.path())?;
        std::os::unix::fs::symlink(program("weftd")?, root.path().join("usr/local/bin/weftd"))?;
        fs::create_dir_all(root.path().join("etc"))?;
        fs::write(root.path().join("etc/group"), "root:x:0:\nweft:x:4242:\n")?;
        let log = root.path().join("log");
        let unit = Unit::parse(unit)?;
        let mut service = Service::start(&netns, &unit, root.path(), &options, &log)?;
        service.says("STATUS=waiting for the network config: there is none")?;
        let sockets = weft_daemon::socket::sockets(&root.path().join("run/weft"))?;
        let socket = fs::metadata(sockets.first().context("no socket")?)?;
        assert_eq!((socket.gid(), socket.mode() & 0o777), (gid, mode), "{}", service.log());
        let is_told = service.log().contains("cannot be given to the group weft");
        assert_eq!(is_told, gid == 0, "{}", service.log());
        assert!(service.stop()?.success());
    }
    netns.remove()
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
    assert!(stderr.contains("cannot listen at 127.0.0.1:8081; change --healthz-port"), "{stderr}");
    netns.remove()
}

#[test]
fn the_unit_is_hardened() -> Result<()> {
    let mut command = Command::new("systemd-analyze");
    command.args(["security", "--offline=true", "--no-pager", "--threshold=25"]).arg(unit_file());
    let output = command.output().context("cannot run systemd-analyze; install systemd")?;
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stdout));
    Ok(())
}
