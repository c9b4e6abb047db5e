//! `weft status`, as an operator calls it.

use std::fs;
use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result};
use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;
use weft_daemon::netns::NetNs;
use weft_tests::{Weftd, free_subnet, output_of, overlay, program, subnet, until};

/// What `weft` with these arguments answers: whether it succeeded, and its output.
fn weft(netns: &NetNs, arguments: &[&str]) -> Result<(bool, String, String)> {
    let output = output_of(netns, Command::new(program("weft")?).args(arguments))?;
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    Ok((output.status.success(), text(&output.stdout), text(&output.stderr)))
}

fn text(path: &Path) -> Result<&str> {
    path.to_str().context("a path that is no text")
}

#[test]
fn it_tells_people_and_programs() -> Result<()> {
    let lab = overlay(2)?;
    let host = lab.host(0);
    let run_dir = text(&host.run_dir)?;
    let (_, json, _) = weft(&host.netns, &["--run-dir", run_dir, "status", "-o", "json"])?;
    let daemons: Value = serde_json::from_str(&json)?;
    let daemon = &daemons[0];
    assert_eq!(daemon["schema"], 1);
    assert_eq!(daemon["state"], "forwarding");
    assert_eq!(daemon["interface_why"], "it has the default route");
    assert_eq!(daemon["mtu_why"], "1500 of eth0, less 28 for what packets are wrapped in");
    assert_eq!(daemon["registry_readable"], true);
    let peer = &daemon["peers"][0];
    assert_eq!(peer["public_ip"], lab.host(1).address.to_string());
    assert_eq!(peer["way"], "tunnel");
    let changes = daemon["changes"].as_array().context("no changes")?;
    let says = |text: &str| changes.iter().any(|it| it["text"].to_string().contains(text));
    assert!(says("forwarding backend=udp-tun device=flannel0 mtu=1472"), "{changes:?}");

    // Directories go before and after the subcommand.
    until("all is well", || Ok(weft(&host.netns, &["status", "--run-dir", run_dir])?.0))?;
    let (_, stdout, _) = weft(&host.netns, &["status", "--run-dir", run_dir])?;
    for part in ["forwarding", "lease      10.42.", "MTU        1472", "udp-gro on", "Last changes"]
    {
        assert!(stdout.contains(part), "no {part:?} in:\n{stdout}");
    }

    // The node is ready, but there is something to see to.
    let lease = free_subnet(&lab)?.to_string().replace('/', "-");
    fs::write(lab.registry()?.join("subnets").join(&lease), "{")?;
    until("it is told", || Ok(!weft(&host.netns, &["status", "--run-dir", run_dir])?.0))?;
    let status = lab.status(0)?;
    assert!(status.ready && status.problems[0].contains(&lease), "{status:?}");

    let (ok, _, stderr) = weft(&host.netns, &["status", "--run-dir", "/nowhere"])?;
    assert!(!ok);
    assert!(stderr.contains("no weftd runs with --run-dir /nowhere"), "{stderr}");
    lab.remove()
}

#[test]
fn a_daemon_that_waits_says_what_for_and_a_killed_one_is_passed_over() -> Result<()> {
    let lab = overlay(2)?;
    until("the peer is probed", || Ok(lab.status(0)?.peers[0].probe.address.is_some()))?;
    let subnet = subnet(&lab, 1)?.network().to_string();
    let host = lab.host(0);
    let run_dir = text(&host.run_dir)?;
    let all = || -> Result<(bool, Vec<Value>)> {
        let (ok, json, _) = weft(&host.netns, &["status", "-o", "json", "--run-dir", run_dir])?;
        Ok((ok, serde_json::from_str(&json)?))
    };
    let log = tempfile::NamedTempFile::new()?;
    let run_dir = format!("--run-dir={run_dir}");
    let waiting = Weftd::start(
        &host.netns,
        log.path(),
        &["--etcd-endpoints=http://127.0.0.1:9", "--etcd-api=v3", &run_dir],
    )?;
    until("it says what it waits for", || {
        let (ok, daemons) = all()?;
        let state = |number: usize| daemons[number]["state"].to_string();
        let waits =
            (0..daemons.len()).any(|it| state(it).contains("waiting for the network config"));
        Ok(!ok && daemons.len() == 2 && waits)
    })?;
    // Frozen, it hides no others.
    let waits = |daemon: &&Value| daemon["state"] != "forwarding";
    let pid = all()?.1.iter().find(waits).context("nobody waits")?["pid"].as_i64();
    let pid = Pid::from_raw(pid.context("no pid")?.try_into()?).context("no pid")?;
    kill_process(pid, Signal::STOP)?;
    for (command, said) in [
        (&["status"][..], "forwarding"),
        (&["top", "--once", "--interval=1"], "packets"),
        (&["trace", &subnet], "the peer"),
        (&["ping-peer", "--count=1"], "bytes"),
        (&["log-level"], "info"),
    ] {
        let (ok, text, stderr) = weft(&host.netns, &[command, &[&run_dir]].concat())?;
        let is_told = text.contains(said) && stderr.contains("does not answer");
        assert!(!ok && is_told, "{command:?}: {text}{stderr}");
    }
    // Killed, it leaves its socket behind.
    drop(waiting);
    let (_, daemons) = all()?;
    assert_eq!(daemons.len(), 1);
    assert_eq!(daemons[0]["state"], "forwarding");
    lab.remove()
}
