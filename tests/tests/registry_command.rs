//! `weft registry`, against real registries of all kinds.

use std::fs;
use std::io::{BufRead, BufReader};
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::mpsc;
use std::thread;

use anyhow::{Context, Result, ensure};
use rustix::process::Signal;
use serde_json::Value;
use weft_daemon::lab::Lab;
use weft_tests::etcd::hosts;
use weft_tests::{DEADLINE, Killed, Weftd, output_of, program, subnet};

/// The flags that name one registry, and a command against it from the first host.
struct Target<'a> {
    lab: &'a Lab,
    flags: Vec<String>,
}

impl<'a> Target<'a> {
    /// etcd by both APIs, and a directory.
    fn all(lab: &'a Lab, directory: &Path) -> [Self; 3] {
        let url = format!("--etcd-endpoints={}", lab.etcd_urls()[0]);
        let etcd = |api: &str| Self { lab, flags: vec![url.clone(), format!("--etcd-api={api}")] };
        let registry = format!("--registry=dir:{}", directory.join("registry").display());
        [etcd("v3"), etcd("v2"), Self { lab, flags: vec![registry] }]
    }

    fn command(&self, arguments: &[&str]) -> Result<Command> {
        let mut command = Command::new(program("weft")?);
        command.arg("registry").args(&self.flags).args(arguments).stdin(Stdio::null());
        Ok(command)
    }

    /// What it writes; an error with what it says where it fails.
    fn run(&self, arguments: &[&str]) -> Result<String> {
        let output = output_of(&self.lab.host(0).netns, &mut self.command(arguments)?)?;
        ensure!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        Ok(String::from_utf8(output.stdout)?)
    }

    fn refused(&self, arguments: &[&str]) -> Result<String> {
        let outcome = self.run(arguments);
        Ok(outcome.err().context("it was not refused")?.to_string())
    }

    fn show(&self) -> Result<Value> {
        Ok(serde_json::from_str(&self.run(&["show", "-o", "json"])?)?)
    }
}

#[test]
fn an_operator_changes_a_registry_of_any_kind() -> Result<()> {
    let (lab, directory) = (hosts(1, 1)?, tempfile::tempdir()?);
    for target in Target::all(&lab, directory.path()) {
        let is_directory = target.flags.iter().any(|flag| flag.contains("dir:"));
        assert_eq!(target.run(&["show"]).is_err(), is_directory, "to look at one makes none");
        assert!(target.refused(&["init", "10.42.0.0/29"])?.contains("cannot be the overlay's"));
        assert!(target.refused(&["init", "{}"])?.contains("this is no network config"));
        for (backend, told) in [
            (r#""pigeon""#, "unknown backend type"),
            (r#""vxlan","VNI":99999999"#, "VNI must be at most"),
            (r#""udp","Port":99999"#, "Port must be a whole number"),
        ] {
            let config = format!(r#"{{"Network":"10.42.0.0/16","Backend":{{"Type":{backend}}}}}"#);
            let refused = target.refused(&["init", &config])?;
            assert!(refused.contains(told), "{refused}");
        }
        target.run(&["init", "10.42.0.0/16"])?;
        let refused = target.refused(&["init", "10.43.0.0/16"])?;
        let cure = if is_directory {
            format!("edit {}", directory.path().join("registry/config").display())
        } else {
            r#"/coreos.com/network/config '{"Network":"10.43.0.0/16"}'`"#.to_owned()
        };
        assert!(refused.contains(&cure), "{refused}");
        assert!(
            refused.contains(r#"there is a network config already: {"Network":"10.42.0.0/16"}"#)
        );

        target.run(&["reserve", "10.42.7.0/24", "192.0.2.7"])?;
        target.run(&["reserve", "10.42.7.0/24", "192.0.2.7"])?;
        let taken = target.refused(&["reserve", "10.42.7.0/24", "192.0.2.8"])?;
        assert!(taken.contains("is leased to 192.0.2.7"), "{taken}");
        let half = target.refused(&["reserve", "10.42.7.128/25", "192.0.2.8"])?;
        assert!(half.contains("overlaps 10.42.7.0-24"), "{half}");
        for (subnet, told) in [
            ("10.43.7.0/24", "10.43.7.0-24 is nothing that the network config gives out"),
            ("10.42.8.0-25", "10.42.8.0-25 is nothing that the network config gives out"),
            ("10.42.8.0-24&fd00::-64", "is nothing that the network config gives out"),
            ("10.42.8.1/24", "has bits behind its length"),
            ("ten", "give a subnet"),
        ] {
            let refused = target.refused(&["reserve", subnet, "192.0.2.8"])?;
            assert!(refused.contains(told), "{subnet}: {refused}");
        }
        let second = target.refused(&["reserve", "10.42.8.0/24", "192.0.2.7"])?;
        assert!(second.contains("weft registry release 10.42.7.0-24"), "{second}");
        let inside = target.refused(&["reserve", "10.42.8.0/24", "10.42.7.2"])?;
        assert!(inside.contains("lies in the overlay's Network 10.42.0.0/16"), "{inside}");
        let nowhere = target.refused(&["reserve", "10.42.8.0/24", "0.0.0.0"])?;
        assert!(nowhere.contains("packets cannot be sent to 0.0.0.0"), "{nowhere}");
        if is_directory {
            let file = directory.path().join("registry/subnets/10.42.9.0-24");
            fs::write(&file, "?")?;
            let refused = target.refused(&["release", "10.42.9.0/24"])?;
            assert!(refused.contains("delete subnets/10.42.9.0-24 in "), "{refused}");
            fs::remove_file(file)?;
        }
        let table = target.run(&["show"])?;
        assert!(table.contains("10.42.7.0/24") && table.contains("never (reserved)"), "{table}");
        let shown = target.show()?;
        assert_eq!(shown["leases"][0]["reservation"], true);
        assert_eq!(shown["leases"][0]["value"]["PublicIP"], "192.0.2.7");

        let released = target.run(&["release", "10.42.7.0-24"])?;
        assert!(released.contains("10.42.7.0/24, leased to 192.0.2.7, is free"), "{released}");
        assert_eq!(target.show()?["leases"].as_array().map(Vec::len), Some(0));
        assert!(target.refused(&["release", "10.42.7.0/24"])?.contains("is not leased"));
    }
    lab.remove()
}

/// Each as weft itself prints it.
#[test]
fn a_lease_of_both_families_is_released_by_any_of_its_names() -> Result<()> {
    let (lab, directory) = (hosts(1, 1)?, tempfile::tempdir()?);
    let [_, _, target] = Target::all(&lab, directory.path());
    let config = r#"{"EnableIPv6":true,"Network":"10.42.0.0/16","IPv6Network":"fd00:42::/48"}"#;
    target.run(&["init", config])?;
    let key = "10.42.7.0-24&fd00:42:0:7::-64";
    for name in [key, "10.42.7.0-24", "10.42.7.0/24", "fd00:42:0:7::/64"] {
        target.run(&["reserve", key, "192.0.2.7"])?;
        let released = target.run(&["release", name])?;
        assert!(released.contains("10.42.7.0/24, fd00:42:0:7::/64, leased"), "{released}");
    }
    lab.remove()
}

/// From each kind to each other: config, leases with what they have left to live, reservations.
#[test]
fn leases_move_from_registry_to_registry() -> Result<()> {
    let (lab, directory) = (hosts(1, 1)?, tempfile::tempdir()?);
    let document = directory.path().join("document.json");
    let text = r#"{"config":"{\"Network\":\"10.42.0.0/16\"}","leases":[
        {"subnet":"10.42.1.0-24","value":{"PublicIP":"192.0.2.1"},"ttl":3600},
        {"subnet":"10.42.2.0-24","value":{"PublicIP":"192.0.2.2","BackendType":"vxlan",
            "BackendData":{"VNI":1,"VtepMAC":"00:00:00:00:00:01"}},"ttl":null}]}"#;
    fs::write(&document, text)?;
    let path = document.to_str().context("no text")?;
    // Round the circle: the last two bring what was in a directory to etcd.
    let again = directory.path().join("again");
    fs::create_dir(&again)?;
    let mut targets = Vec::from(Target::all(&lab, directory.path()));
    for mut target in Target::all(&lab, &again) {
        target.flags.push("--etcd-prefix=/again".into());
        targets.push(target);
    }
    for target in targets {
        assert!(target.run(&["import", path])?.contains("2 leases written, 0 were there"));
        assert!(target.run(&["import", path])?.contains("0 leases written, 2 were there"));
        let shown = target.show()?;
        let left = shown["leases"][0]["ttl"].as_u64().context("no time to live")?;
        assert!((3000..=3600).contains(&left), "{left}");
        assert_eq!(shown["leases"][1]["reservation"], true);
        assert_eq!(shown["leases"][1]["value"]["BackendData"]["VNI"], 1);
        // What comes out goes into the next.
        fs::write(&document, target.run(&["export"])?)?;
    }
    let [v3, _, in_directory] = Target::all(&lab, directory.path());
    // A part of the second one's subnet, and a new one, beside one that nobody can read.
    let others = r#"{"leases":[
        {"subnet":"10.42.2.0-25","value":{"PublicIP":"192.0.2.3"}},
        {"subnet":"10.42.4.0-24","value":{"PublicIP":"0.0.0.0","PublicIPv6":"2001:db8::4"}},
        {"subnet":"10.42.5.0-24","value":{"PublicIP":"192.0.2.5","PublicIPv6":"2001:db8::5"}}]}"#;
    fs::write(&document, others)?;
    for target in [&v3, &in_directory] {
        let refused = target.refused(&["import", path])?;
        assert!(
            refused.contains("10.42.2.0-25 (10.42.2.0-24 is leased to 192.0.2.2)"),
            "{refused}"
        );
        assert_eq!(target.show()?["leases"].as_array().map(Vec::len), Some(4));
        let known = target.refused(&["reserve", "10.42.6.0/24", "2001:db8::5"])?;
        assert!(known.contains("reserve it for 192.0.2.5"), "{known}");
    }
    fs::write(directory.path().join("registry/subnets/10.42.9.0-24"), "?")?;
    let refused = in_directory.refused(&["export"])?;
    assert!(refused.contains("not in what was written") && refused.contains("10.42.9.0-24"));
    fs::write(&document, r#"{"config":"{\"Network\":\"10.43.0.0/16\"}","leases":[]}"#)?;
    assert!(v3.refused(&["import", path])?.contains("there is another network config already"));
    lab.remove()
}

#[test]
fn a_watch_of_what_cannot_be_read_ends() -> Result<()> {
    let lab = hosts(1, 1)?;
    let flags = vec!["--etcd-endpoints=http://127.0.0.1:1".to_owned()];
    let refused = Target { lab: &lab, flags }.refused(&["watch"])?;
    assert!(refused.contains("http://127.0.0.1:1"), "{refused}");
    lab.remove()
}

#[test]
fn a_watch_shows_what_changes() -> Result<()> {
    let (lab, directory) = (hosts(1, 1)?, tempfile::tempdir()?);
    for target in Target::all(&lab, directory.path()) {
        target.run(&["init", "10.42.0.0/16"])?;
        target.run(&["reserve", "10.42.1.0/24", "192.0.2.1"])?;
        let mut command = target.command(&["watch"])?;
        let mut watching = Killed(lab.host(0).netns.spawn(command.stdout(Stdio::piped()))?);
        let lines = BufReader::new(watching.0.stdout.take().context("no output")?).lines();
        let (sender, told) = mpsc::channel();
        thread::spawn(move || lines.map_while(|it| sender.send(it.ok()?).ok()).count());
        let next = || told.recv_timeout(DEADLINE).context("it told nothing more");
        assert_eq!(next()?, "added 10.42.1.0-24 192.0.2.1");
        target.run(&["reserve", "10.42.2.0/24", "192.0.2.2"])?;
        assert_eq!(next()?, "added 10.42.2.0-24 192.0.2.2");
        target.run(&["release", "10.42.1.0/24"])?;
        assert_eq!(next()?, "removed 10.42.1.0-24 192.0.2.1");
    }
    lab.remove()
}

/// An endpoint that is dead is named, and does not keep anybody waiting for ever.
#[test]
fn a_dead_endpoint_is_named() -> Result<()> {
    let lab = hosts(1, 1)?;
    let target = Target { lab: &lab, flags: vec!["--etcd-endpoints=http://10.168.0.1:1".into()] };
    let refused = target.refused(&["show"])?;
    assert!(refused.contains("http://10.168.0.1:1: "), "{refused}");
    lab.remove()
}

/// Who is on a host and names none means that of the daemon there.
#[test]
fn without_flags_it_is_the_registry_of_the_daemon_here() -> Result<()> {
    let mut lab = hosts(1, 1)?;
    lab.start_daemon(0, &[])?;
    lab.wait_ready(0, DEADLINE)?;
    let host = lab.host(0);
    let show = || {
        let mut command = Command::new(program("weft")?);
        command.args(["registry", "show", "-o", "json", "--run-dir"]).arg(&host.run_dir);
        output_of(&host.netns, &mut command)
    };
    let shown: Value = serde_json::from_slice(&show()?.stdout)?;
    let subnet = subnet(&lab, 0)?.to_string().replace('/', "-");
    assert_eq!(shown["leases"][0]["subnet"], subnet, "{shown}");

    let directory = tempfile::tempdir()?;
    let path = |name: &str| directory.path().join(name).display().to_string();
    let registry = format!("dir:{}", path("registry"));
    let mut other = Command::new(program("weftd")?);
    other.args(["--network=10.43.0.0/16", "--backend=host-gw", "--registry", &registry]);
    other.arg("--iptables-forward-rules=false");
    other.args(["--state-dir", &path("state"), "--subnet-file", &path("subnet.env")]);
    other.arg("--run-dir").arg(&host.run_dir);
    let other = Weftd::start_command(&host.netns, &directory.path().join("log"), &mut other)?;
    other.logs("the registry is a directory")?;
    let refused = show()?;
    let told = String::from_utf8_lossy(&refused.stderr);
    assert!(told.contains("have several registries") && !refused.status.success(), "{told}");
    other.end(Signal::TERM)?;
    lab.remove()
}
