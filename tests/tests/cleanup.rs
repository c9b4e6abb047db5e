//! `weft cleanup`: after it, a host is as it was before weft, but for what others have made.

use std::collections::BTreeSet;
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result};
use rustix::process::Signal;
use serde_json::Value;
use weft_daemon::lab::{Host, Lab};
use weft_daemon::netns::NetNs;
use weft_tests::{DEADLINE, Weftd, dual_stack, hosts_of, program, until};

/// The key of the peer's lease, in an overlay of IPv4 and in one of both families.
const IPV4: &str = "10.42.250.0-24";
const BOTH_FAMILIES: &str = "10.42.250.0-24&fd00:42:0:fa::-64";

/// Everything about a host that weft could change.
#[derive(Debug, PartialEq)]
struct Picture {
    links: Vec<(String, Value)>,
    addresses: Value,
    routes: [Value; 2],
    neighbours: Value,
    forwarding: BTreeSet<String>,
    iptables: Vec<String>,
    nftables: String,
    files: Vec<PathBuf>,
}

impl Picture {
    fn of(host: &Host) -> Result<Self> {
        let netns = &host.netns;
        let links = netns.ip_json(&["link", "show"])?;
        let links = links.as_array().context("no list of links")?;
        let links =
            links.iter().map(|it| (it["ifname"].to_string(), it["ifalias"].clone())).collect();
        let mut iptables = Vec::new();
        for program in ["iptables-save", "ip6tables-save"] {
            let saved = netns.tool(program, &[])?;
            let lines = saved.lines().filter(|line| !line.starts_with('#'));
            // Policies come with counters.
            iptables.extend(lines.filter_map(|line| line.split(" [").next()).map(str::to_owned));
        }
        let mut files = Vec::new();
        list(host.state_dir.parent().context("a directory for the host")?, &mut files)?;
        files.retain(|path| !path.ends_with("weftd.log"));
        Ok(Self {
            links,
            addresses: netns.ip_json(&["address", "show"])?,
            routes: [
                netns.ip_json(&["-4", "route", "show", "table", "all"])?,
                netns.ip_json(&["-6", "route", "show", "table", "all"])?,
            ],
            neighbours: netns.ip_json(&["neigh", "show", "nud", "permanent"])?,
            forwarding: netns
                .tool("bridge", &["fdb", "show"])?
                .lines()
                .map(str::to_owned)
                .collect(),
            iptables,
            nftables: netns.tool("nft", &["-s", "list", "ruleset"])?,
            files,
        })
    }
}

fn list(directory: &Path, files: &mut Vec<PathBuf>) -> Result<()> {
    for entry in fs::read_dir(directory)? {
        let path = entry?.path();
        if path.is_dir() {
            list(&path, files)?;
        }
        files.push(path);
    }
    files.sort();
    Ok(())
}

/// Runs `weft cleanup` and returns its exit status and all that it wrote.
fn cleanup(netns: &NetNs, arguments: &[&str]) -> Result<(Option<i32>, String)> {
    let mut command = Command::new(program("weft")?);
    let output = netns.output(command.arg("cleanup").args(arguments))?;
    let text = [output.stdout, output.stderr].concat();
    Ok((output.status.code(), String::from_utf8(text)?))
}

/// A host with rules, a route and a table of its own, and a lease of some peer in the registry.
fn host_of_its_own(backend: &str, key: &str, peers_type: &str) -> Result<Lab> {
    let lab = hosts_of(backend, 1)?;
    if key == BOTH_FAMILIES {
        dual_stack(&lab)?;
    }
    let netns = &lab.host(0).netns;
    netns.ip(&["route", "add", "198.51.100.0/24", "via", "10.168.0.1"])?;
    for (program, source) in [("iptables", "192.0.2.0/24"), ("ip6tables", "2001:db8::/32")] {
        for (chain, table) in [("POSTROUTING", "nat"), ("FORWARD", "filter")] {
            netns.tool(program, &["-t", table, "-A", chain, "-s", source, "-j", "RETURN"])?;
        }
    }
    for directory in [&lab.host(0).run_dir, &lab.host(0).state_dir] {
        fs::remove_dir(directory)?;
    }
    netns.tool("nft", &["add table inet other"])?;
    let subnets = lab.registry()?.join("subnets");
    fs::create_dir_all(&subnets)?;
    let lease = format!(r#"{{"PublicIP":"10.168.0.250"{peers_type}}}"#);
    fs::write(subnets.join(key), lease)?;
    settled(&lab)?;
    Ok(lab)
}

fn settled(lab: &Lab) -> Result<()> {
    until("the kernel knows that nobody else has its addresses", || {
        let addresses = lab.host(0).netns.ip_json(&["address", "show"])?;
        Ok(!addresses.to_string().contains("tentative"))
    })
}

/// Runs weftd, and takes away what it has made; `made` is what a cleanup must tell of, once the
/// daemon has stopped.
fn leaves_nothing(
    backend: &str,
    key: &str,
    peers_type: &str,
    flags: &[&str],
    made: &[&str],
) -> Result<()> {
    let mut lab = host_of_its_own(backend, key, peers_type)?;
    let before = Picture::of(lab.host(0))?;
    let flags = [&["--ip-masq", "--ip-blackhole-route"], flags].concat();
    lab.start_daemon(0, &flags)?;
    lab.wait_ready(0, DEADLINE)?;
    until("it knows its peer", || Ok(lab.status(0)?.peers.len() == 1))?;
    settled(&lab)?;
    let state_dir = lab.host(0).state_dir.display().to_string();
    let scope = ["--state-dir", &state_dir];

    let pid = lab.status(0)?.pid;
    let running = Picture::of(lab.host(0))?;
    let (code, text) = cleanup(&lab.host(0).netns, &scope)?;
    assert_eq!(code, Some(1), "{text}");
    assert!(text.contains(&format!("weftd runs (pid {pid}); stop it first")), "{text}");
    let (_, text) = cleanup(&lab.host(0).netns, &[&scope[..], &["--dry-run"]].concat())?;
    assert!(text.contains("note: weftd runs") && text.contains("would remove"), "{text}");
    assert_eq!(Picture::of(lab.host(0))?, running);

    // Killed, it leaves its socket too.
    lab.kill_daemon(0)?;
    until("the device of udp-tun is gone", || {
        let links = Picture::of(lab.host(0))?.links;
        Ok(backend != "udp-tun" || links == before.links)
    })?;
    let stopped = Picture::of(lab.host(0))?;
    let (code, told) = cleanup(&lab.host(0).netns, &[&scope[..], &["--dry-run"]].concat())?;
    assert_eq!(code, Some(0), "{told}");
    for line in made {
        assert!(told.contains(&format!("would remove {line}")), "no {line} in\n{told}");
    }
    assert!(told.contains("left: the lease 10.42."), "{told}");
    assert_eq!(Picture::of(lab.host(0))?, stopped, "a dry run changes nothing");

    let (code, text) = cleanup(&lab.host(0).netns, &scope)?;
    assert_eq!(code, Some(0), "{text}");
    assert_eq!(text, told.replace("would remove", "removed"));
    assert_eq!(Picture::of(lab.host(0))?, before);
    let (code, text) = cleanup(&lab.host(0).netns, &scope)?;
    assert_eq!((code, text.as_str()), (Some(0), "there is nothing of weft\n"));
    assert_eq!(Picture::of(lab.host(0))?, before);
    lab.remove()
}

#[test]
fn after_host_gw_and_iptables_nothing_is_left() -> Result<()> {
    let made = [
        "route to 10.42.250.0/24 via 10.168.0.250",
        "route that discards 10.42.",
        "chain FLANNEL-POSTRTG of iptables -t nat",
        "chain FLANNEL-FWD of iptables -t filter",
    ];
    let host_gw = r#","BackendType":"host-gw""#;
    leaves_nothing("host-gw", IPV4, host_gw, &["--firewall=iptables"], &made)
}

#[test]
fn after_udp_tun_and_nftables_nothing_is_left() -> Result<()> {
    let made = ["route that discards 10.42.", "table inet weft of nft"];
    leaves_nothing("udp-tun", IPV4, "", &["--firewall=nftables"], &made)
}

/// Where that file lies is the machine's: there is another directory in its place.
#[test]
fn what_docker_was_started_with_goes_where_it_is_of_the_overlay() -> Result<()> {
    let mut lab = hosts_of("udp-tun", 1)?;
    lab.start_daemon(0, &[])?;
    lab.wait_ready(0, DEADLINE)?;
    lab.kill_daemon(0)?;
    let host = lab.host(0);
    let weft = program("weft")?.display().to_string();
    let cleanup = format!("{weft} cleanup --state-dir {}", host.state_dir.display());
    let script = format!(
        "mount -t tmpfs none /run
        {weft} docker-opts -f {}
        {cleanup} --dry-run | grep 'would remove /run/docker_opts.env'
        {cleanup} | grep 'removed /run/docker_opts.env'
        test ! -e /run/docker_opts.env
        echo 'DOCKER_OPT_BIP=\"--bip=172.17.0.1/16\"' > /run/docker_opts.env
        {cleanup} | grep 'nothing of weft'
        test -e /run/docker_opts.env",
        host.subnet_file.display()
    );
    let mut command = Command::new("unshare");
    let output = host.netns.output(command.args(["--mount", "sh", "-exc", &script]))?;
    assert!(output.status.success(), "{output:?}");
    lab.remove()
}

#[test]
fn after_vxlan_nothing_is_left() -> Result<()> {
    let made = ["device flannel.1", "route that discards 10.42.", "chain FLANNEL-FWD"];
    let data = r#","BackendType":"vxlan","BackendData":{"VNI":1,"VtepMAC":"0a:00:00:00:00:01"}"#;
    leaves_nothing("vxlan", IPV4, data, &["--firewall=iptables"], &made)
}

#[test]
fn after_vxlan_of_both_families_nothing_is_left() -> Result<()> {
    let made = [
        "device flannel.1",
        "device flannel-v6.1",
        "route that discards 10.42.",
        "route that discards fd00:42:",
        "chain FLANNEL-FWD of ip6tables",
    ];
    let data = r#","PublicIPv6":"fd00:168::fa","BackendType":"vxlan",
        "BackendData":{"VNI":1,"VtepMAC":"0a:00:00:00:00:01"},
        "BackendV6Data":{"VNI":1,"VtepMAC":"0a:00:00:00:00:02"}"#;
    leaves_nothing("vxlan", BOTH_FAMILIES, data, &["--firewall=iptables"], &made)
}

/// The note of what was made may be gone, or torn.
#[test]
fn without_the_note_the_last_known_network_counts() -> Result<()> {
    let mut lab = host_of_its_own("host-gw", IPV4, r#","BackendType":"host-gw""#)?;
    lab.start_daemon(0, &["--firewall=iptables"])?;
    lab.wait_ready(0, DEADLINE)?;
    let state_dir = lab.host(0).state_dir.clone();
    let file = |start: &str| -> Result<Option<PathBuf>> {
        let mut paths = fs::read_dir(&state_dir)?.filter_map(|entry| Some(entry.ok()?.path()));
        Ok(paths.find(|path| {
            path.file_name().is_some_and(|it| it.to_string_lossy().starts_with(start))
        }))
    };
    until("what is known is written down", || Ok(file("last-known-")?.is_some()))?;
    lab.stop_daemon(0)?;
    let note = file("made-")?.context("no note")?;
    fs::write(&note, "")?;
    let scope = ["--state-dir", &state_dir.display().to_string()];
    let (code, text) = cleanup(&lab.host(0).netns, &scope)?;
    assert_eq!(code, Some(1), "{text}");
    assert!(text.contains("does not tell what weftd has made; remove it"), "{text}");
    fs::remove_file(note)?;
    let (code, text) = cleanup(&lab.host(0).netns, &scope)?;
    assert_eq!(code, Some(0), "{text}");
    assert!(text.contains("removed chain FLANNEL-FWD"), "{text}");
    lab.remove()
}

/// A firewall's program that fails keeps nothing from being removed but the records of what there is.
#[test]
fn what_a_failing_program_hides_is_left_for_another_try() -> Result<()> {
    let mut lab = host_of_its_own("host-gw", IPV4, r#","BackendType":"host-gw""#)?;
    lab.start_daemon(0, &["--firewall=iptables"])?;
    lab.wait_ready(0, DEADLINE)?;
    let state_dir = lab.host(0).state_dir.display().to_string();
    lab.stop_daemon(0)?;
    let host = lab.host(0);
    let broken = tempfile::tempdir()?;
    let save = broken.path().join("iptables-save");
    fs::write(&save, "#!/bin/sh\necho the lock is taken >&2\nexit 4\n")?;
    fs::set_permissions(&save, fs::Permissions::from_mode(0o755))?;
    let path = format!("{}:{}", broken.path().display(), std::env::var("PATH")?);
    let mut command = Command::new(program("weft")?);
    command.args(["cleanup", "--state-dir", &state_dir]).env("PATH", path);
    let output = host.netns.output(&mut command)?;
    let text = String::from_utf8([output.stdout, output.stderr].concat())?;
    assert_eq!(output.status.code(), Some(1), "{text}");
    assert!(text.contains("cannot look for firewall rules: `iptables-save -t filter`"), "{text}");
    assert!(text.contains("the lock is taken"), "{text}");
    assert!(text.contains("removed route to 10.42.250.0/24"), "{text}");
    assert!(text.contains("for another try"), "{text}");

    let (code, text) = cleanup(&host.netns, &["--state-dir", &state_dir])?;
    assert_eq!(code, Some(0), "{text}");
    assert!(text.contains("removed chain FLANNEL-FWD of iptables -t filter"), "{text}");
    assert!(!Path::new(&state_dir).exists(), "{text}");
    lab.remove()
}

/// Each state directory is one daemon's; without any, all that bears weft's mark goes.
#[test]
fn another_daemons_things_stay() -> Result<()> {
    let mut lab = host_of_its_own("host-gw", IPV4, r#","BackendType":"host-gw""#)?;
    lab.start_daemon(0, &["--firewall=iptables"])?;
    lab.wait_ready(0, DEADLINE)?;
    let host = lab.host(0);
    let directory = host.state_dir.parent().context("a directory for the host")?;
    let path = |name: &str| directory.join("other").join(name).display().to_string();
    let other = path("state");
    let registry = format!("dir:{}", path("registry"));
    let (run_dir, subnet_file) = (path("run"), path("run/subnet.env"));
    let flags = [
        "--network=10.43.0.0/16",
        "--iptables-forward-rules=false",
        "--registry",
        &registry,
        "--state-dir",
        &other,
        "--run-dir",
        &run_dir,
        "--subnet-file",
        &subnet_file,
    ];
    let daemon = Weftd::start(&host.netns, &directory.join("other.log"), &flags)?;
    daemon.logs("wrote subnet.env")?;
    daemon.end(Signal::TERM)?;
    host.netns.ip(&["route", "add", "10.43.7.0/24", "via", "10.168.0.7", "proto", "119"])?;

    let state_dir = lab.host(0).state_dir.display().to_string();
    lab.stop_daemon(0)?;
    let host = lab.host(0);
    let (code, text) = cleanup(&host.netns, &["--state-dir", &state_dir])?;
    assert_eq!(code, Some(0), "{text}");
    assert!(text.contains("removed route to 10.42.250.0/24"), "{text}");
    assert!(!text.contains("10.43.") && !text.contains("other"), "{text}");
    let left = Picture::of(host)?;
    assert!(left.routes[0].to_string().contains("10.43.7.0/24"), "{left:?}");
    assert!(left.files.iter().any(|path| path.starts_with(&other)), "{left:?}");
    assert!(left.files.contains(&subnet_file.clone().into()), "{left:?}");

    // The mark is enough where the state directory is gone.
    let mut command = Command::new("unshare");
    let script = format!(
        "mount -t tmpfs none /var/lib && mount -t tmpfs none /run && exec {} cleanup",
        program("weft")?.display()
    );
    command.args(["--mount", "sh", "-c", &script]);
    let output = host.netns.output(&mut command)?;
    let text = String::from_utf8([output.stdout, output.stderr].concat())?;
    assert!(text.contains("removed route to 10.43.7.0/24 via 10.168.0.7"), "{text}");

    let (code, text) = cleanup(&host.netns, &["--state-dir", &other])?;
    assert_eq!(code, Some(0), "{text}");
    let now = Picture::of(host)?;
    assert!(!now.files.iter().any(|path| path.starts_with(&other)), "{now:?}");
    assert!(!now.routes[0].to_string().contains("\"119\""), "{now:?}");
    lab.remove()
}
