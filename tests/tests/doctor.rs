//! `weft doctor`: each check is provoked on a host of its own, and content again once it is mended.

use std::fs;
use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result, ensure};
use rustix::process::{Pid, Signal, kill_process};
use weft_daemon::lab::{Lab, PingOptions, ping};
use weft_tests::doctor::{Check, check, doctor, finds, run};
use weft_tests::refusing::{Call, refusing};
use weft_tests::{
    DEADLINE, Weftd, bring_up, etcd, free_subnet, hosts, pings, program, until, write_config,
    write_sysctl,
};

/// Does what the cure says, as an operator would.
fn cure(lab: &Lab, host: usize, name: &str) -> Result<()> {
    let cure = check(lab, host, name)?.cure;
    lab.host(host).netns.tool("sh", &["-c", &cure]).map(drop)
}

/// Two hosts that doctor has nothing to say of, with an etcd.
fn healthy() -> Result<Lab> {
    let mut lab = etcd::hosts(2, 1)?;
    bring_up(&mut lab, &["--ip-masq"])?;
    let mut bad = Vec::new();
    let healthy = until("doctor is content", || {
        let (checks, content) = doctor(&lab, 0, &[])?;
        bad = checks.into_iter().filter(|check| check.verdict != "OK").collect();
        Ok(content && bad.is_empty())
    });
    healthy.with_context(|| format!("{bad:#?}"))?;
    Ok(lab)
}

#[test]
fn what_is_wrong_with_the_host_is_named_and_the_cure_mends_it() -> Result<()> {
    let lab = healthy()?;
    let netns = &lab.host(0).netns;
    let peer = lab.host(1).address.to_string();

    write_sysctl(netns, "net/ipv4/ip_forward", "0")?;
    finds(&lab, 0, "ip_forward", "FAIL", "sysctl -w net.ipv4.ip_forward=1")?;
    cure(&lab, 0, "ip_forward")?;
    finds(&lab, 0, "ip_forward", "OK", "net.ipv4.ip_forward is 1")?;

    netns.ip(&["link", "add", "elsewhere", "type", "bridge"])?;
    netns.ip(&["address", "add", "172.30.0.1/24", "dev", "elsewhere"])?;
    netns.ip(&["link", "set", "elsewhere", "up"])?;
    write_sysctl(netns, "net/ipv4/conf/eth0/rp_filter", "1")?;
    finds(&lab, 0, "rp_filter", "OK", "strict on eth0")?;
    netns.ip(&["route", "add", &peer, "dev", "elsewhere"])?;
    finds(&lab, 0, "rp_filter", "FAIL", "eth0/rp_filter=2")?;
    finds(&lab, 0, "interface", "FAIL", "the way to the peer 10.168.0.95 is elsewhere")?;
    cure(&lab, 0, "rp_filter")?;
    finds(&lab, 0, "rp_filter", "OK", "not strict")?;
    netns.ip(&["route", "del", &peer, "dev", "elsewhere"])?;
    finds(&lab, 0, "interface", "OK", "eth0")?;

    let free = free_subnet(&lab)?;
    netns.ip(&["route", "add", &free.to_string(), "via", &peer])?;
    finds(&lab, 0, "routes", "FAIL", &format!("{free} via 10.168.0.95 dev eth0"))?;
    cure(&lab, 0, "routes")?;
    finds(&lab, 0, "routes", "OK", "")?;

    netns.ip(&["address", "add", &free.to_string(), "dev", "elsewhere"])?;
    finds(&lab, 0, "overlap", "FAIL", &free.to_string())?;
    cure(&lab, 0, "overlap")?;
    finds(&lab, 0, "overlap", "OK", "")?;

    let gateway = fs::read_to_string(&lab.host(0).subnet_file)?;
    let gateway = gateway.lines().find_map(|line| line.strip_prefix("FLANNEL_SUBNET="));
    let gateway = gateway.context("no FLANNEL_SUBNET")?;
    netns.ip(&["address", "del", gateway, "dev", "docker0"])?;
    netns.ip(&["address", "add", "172.17.0.1/16", "dev", "docker0"])?;
    finds(&lab, 0, "docker0", "FAIL", "docker0 has 172.17.0.1/16, subnet.env says")?;
    netns.ip(&["address", "add", gateway, "dev", "docker0"])?;
    finds(&lab, 0, "docker0", "OK", "")?;
    lab.remove()
}

/// The rules of Docker 28 for a bridge and a container behind it.
#[test]
fn docker_that_lets_no_other_host_in_is_told_and_the_cure_opens_it() -> Result<()> {
    let lab = healthy()?;
    let netns = &lab.host(0).netns;
    for rule in [
        "-N DOCKER-USER",
        "-N DOCKER",
        "-I FORWARD -o docker0 -j DOCKER",
        "-I FORWARD -j DOCKER-USER",
        "-A DOCKER ! -i docker0 -o docker0 -j DROP",
    ] {
        netns.tool("iptables-nft", &rule.split(' ').collect::<Vec<_>>())?;
    }
    let reach =
        || ping(&lab.container(1)?.netns, lab.container(0)?.address()?, &PingOptions::default());
    assert_eq!(reach()?.received, 0);
    finds(&lab, 0, "Docker", "FAIL", "drops what other hosts send to containers behind docker0")?;
    cure(&lab, 0, "Docker")?;
    finds(&lab, 0, "Docker", "OK", "")?;
    assert!(reach()?.complete());

    let container = format!("{}/32", lab.container(0)?.address()?);
    let rule =
        ["-t", "raw", "-A", "PREROUTING", "-d", &container, "!", "-i", "docker0", "-j", "DROP"];
    netns.tool("iptables-nft", &rule)?;
    assert_eq!(reach()?.received, 0);
    finds(&lab, 0, "Docker", "FAIL", "dockerd --allow-direct-routing")?;
    lab.remove()
}

#[test]
fn firewalls_are_seen_through() -> Result<()> {
    let mut lab = hosts(2)?;
    bring_up(&mut lab, &[])?;
    let netns = &lab.host(0).netns;
    netns.tool("iptables-nft", &["-P", "FORWARD", "DROP"])?;
    finds(&lab, 0, "FORWARD", "OK", "weft's rules let the overlay's packets pass")?;
    netns.tool("iptables-nft", &["-P", "FORWARD", "ACCEPT"])?;

    netns.tool("iptables-nft", &["-F", "FLANNEL-FWD"])?;
    finds(&lab, 0, "rules", "WARN", "put back")?;

    netns.tool("nft", &["add table inet firewalld"])?;
    netns.tool("nft", &["add chain inet firewalld filter_FORWARD"])?;
    netns.tool("nft", &["add rule inet firewalld filter_FORWARD reject"])?;
    finds(&lab, 0, "firewalld", "FAIL", "--add-source=10.42.0.0/16")?;
    netns.tool("nft", &["delete table inet firewalld"])?;

    let chain =
        "add chain inet mine forward { type filter hook forward priority 10; policy drop; }";
    netns.tool("nft", &["add table inet mine"])?;
    netns.tool("nft", &[chain])?;
    finds(&lab, 0, "FORWARD", "WARN", "inet mine forward")?;
    netns.tool("nft", &["delete table inet mine"])?;

    // Without weft's rules the policy is what counts.
    lab.stop_daemon(0)?;
    lab.start_daemon(0, &["--iptables-forward-rules=false"])?;
    lab.wait_ready(0, DEADLINE)?;
    let netns = &lab.host(0).netns;
    netns.tool("iptables-nft", &["-F", "FORWARD"])?;
    netns.tool("iptables-nft", &["-P", "FORWARD", "DROP"])?;
    // The module is not loaded everywhere.
    let has_filter = Path::new("/proc/sys/net/bridge/bridge-nf-call-iptables").exists();
    if has_filter {
        write_sysctl(netns, "net/bridge/bridge-nf-call-iptables", "1")?;
        finds(&lab, 0, "br_netfilter", "FAIL", "bridge-nf-call-iptables=0")?;
    }
    finds(&lab, 0, "FORWARD", "FAIL", "iptables-nft -P FORWARD ACCEPT")?;
    cure(&lab, 0, "FORWARD")?;
    finds(&lab, 0, "FORWARD", "OK", "accepts")?;
    if has_filter {
        finds(&lab, 0, "br_netfilter", "OK", "lets them pass")?;
    }
    lab.remove()
}

/// As under a container runtime that forbids io_uring, or keeps weftd from large buffers.
#[test]
fn what_the_kernel_refuses_is_named_and_traffic_flows_without_it() -> Result<()> {
    let mut lab = hosts(2)?;
    bring_up(&mut lab, &[])?;
    for (call, name, told) in [
        (Call::IoUringSetup, "io_uring", "blocked, so packets go by mmsg"),
        (Call::RcvBufForce, "sockets", "sysctl -w net.core.rmem_max="),
    ] {
        finds(&lab, 0, name, "OK", "")?;
        lab.stop_daemon(0)?;
        refusing(call, || lab.start_daemon(0, &[]))?;
        lab.wait_ready(0, DEADLINE)?;
        finds(&lab, 0, name, "WARN", told)?;
        until("traffic flows", || pings(&lab).map(|()| true))?;
    }
    lab.remove()
}

/// What counts for all of the machine is not for a test to change: doctor sees files in its place.
#[test]
fn what_is_wrong_with_the_machine_is_named() -> Result<()> {
    let mut lab = hosts(1)?;
    lab.start_daemon(0, &["--ip-masq"])?;
    lab.wait_ready(0, DEADLINE)?;
    let table = |count| {
        [("net/netfilter/nf_conntrack_count", count), ("net/netfilter/nf_conntrack_max", "100")]
    };
    for (files, told) in [
        (&[("kernel/osrelease", "5.15.0-91")][..], "WARN kernel: 5.15.0-91 is older than 6.1"),
        (&table("100"), "FAIL conntrack: full, 100 of 100"),
        (&table("95"), "WARN conntrack: nearly full, 95 of 100"),
    ] {
        let seen = doctor_with(&lab, files)?;
        assert!(seen.contains(told), "no {told:?} in {seen}");
    }
    lab.remove()
}

/// What doctor says on the first host with these files over those below /proc/sys.
fn doctor_with(lab: &Lab, files: &[(&str, &str)]) -> Result<String> {
    let directory = tempfile::tempdir()?;
    let mut script = String::new();
    for (at, (path, text)) in files.iter().enumerate() {
        let file = directory.path().join(at.to_string());
        fs::write(&file, text)?;
        script += &format!("mount --bind {} /proc/sys/{path}\n", file.display());
    }
    let [weft, run_dir] = [program("weft")?, lab.host(0).run_dir.clone()];
    script += &format!("exec {} doctor --run-dir {}", weft.display(), run_dir.display());
    // The mounts are only there for what it starts (mount_namespaces(7)).
    let mut command = Command::new("unshare");
    let output = lab.host(0).netns.output(command.args(["--mount", "sh", "-ec", &script]))?;
    ensure!(output.stderr.is_empty(), "{}", String::from_utf8_lossy(&output.stderr));
    Ok(String::from_utf8(output.stdout)?)
}

/// In a container the daemon may number processes on its own: here, another one has its number.
#[test]
fn a_daemon_is_found_by_its_number_here() -> Result<()> {
    let lab = hosts(1)?;
    let host = lab.host(0);
    let registry = format!("dir:{}", lab.registry()?.display());
    let mut weftd = Command::new("unshare");
    weftd.args(["--pid", "--fork", "--kill-child"]).arg(program("weftd")?);
    weftd.args(["--network=10.42.0.0/16", "--registry", &registry]);
    weftd.arg("--state-dir").arg(&host.state_dir).arg("--run-dir").arg(&host.run_dir);
    weftd.arg("--subnet-file").arg(&host.subnet_file);
    let weftd = Weftd::start_command(&host.netns, &host.log, &mut weftd)?;
    weftd.logs("wrote subnet.env")?;
    assert_eq!(lab.status(0)?.pid, 1);
    finds(&lab, 0, "registry", "OK", &registry)?;
    finds(&lab, 0, "sockets", "OK", "buffers of")?;
    weftd.end(Signal::KILL)?;
    lab.remove()
}

#[test]
fn a_daemon_that_hangs_is_to_be_restarted_and_its_flags_are_known() -> Result<()> {
    let mut lab = hosts(1)?;
    lab.start_daemon(0, &[])?;
    lab.wait_ready(0, DEADLINE)?;
    let registry = format!("dir:{}", lab.registry()?.display());
    let pid = i32::try_from(lab.status(0)?.pid)?;
    let pid = Pid::from_raw(pid).context("a process has a number")?;
    kill_process(pid, Signal::STOP)?;
    finds(&lab, 0, "daemon", "FAIL", "systemctl restart weftd")?;
    finds(&lab, 0, "registry", "OK", &registry)?;
    finds(&lab, 0, "MAC", "WARN", "systemctl restart weftd")?;
    kill_process(pid, Signal::CONT)?;
    finds(&lab, 0, "daemon", "OK", "carries")?;
    lab.remove()
}

#[test]
fn of_a_daemon_that_waits_nothing_is_called_well_that_is_not_known() -> Result<()> {
    let mut lab = hosts(1)?;
    write_config(&lab, r#"{"Network":"10.42.0.0/16","Backend":{"Type":"pigeon"}}"#)?;
    lab.start_daemon(0, &["--ip-masq"])?;
    finds(&lab, 0, "daemon", "FAIL", "weftd waits: unknown backend type")?;
    finds(&lab, 0, "registry", "FAIL", "unknown backend type")?;
    let (checks, _) = doctor(&lab, 0, &[])?;
    for name in ["MAC", "rules", "Docker", "docker0", "peers", "MTU", "sockets"] {
        let check = checks.iter().find(|check| check.name == name).context(name)?;
        let found = (check.verdict.as_str(), check.seen.as_str(), check.cure.as_str());
        assert_eq!(found, ("WARN", "not known while weftd waits", ""), "{name}");
    }
    let starts = |check: &&Check| check.cure.contains("systemctl");
    assert_eq!(checks.iter().find(starts), None);
    lab.remove()
}

/// Daemons of two networks may share the state directory; somebody pastes the cure.
#[test]
fn a_lost_config_is_given_back_to_the_registry_that_had_it() -> Result<()> {
    let mut lab = hosts(1)?;
    lab.start_daemon(0, &[])?;
    lab.wait_ready(0, DEADLINE)?;
    let host = lab.host(0);
    fs::write(host.state_dir.join("config-0.json"), r#""{\"Network\":\"10.7.0.0/16\"}""#)?;
    let config = lab.registry()?.join("config");
    let text = fs::read_to_string(&config)?;
    fs::remove_file(&config)?;
    finds(&lab, 0, "registry", "FAIL", &format!("init '{text}'"))?;
    lab.remove()
}

#[test]
fn the_registry_and_the_daemon_are_asked() -> Result<()> {
    let mut lab = healthy()?;
    let url = lab.etcd_urls()[0].clone();
    let flags = ["--etcd-endpoints", &url];

    // One that waits for its node's next start is no second lease.
    let mut weft = Command::new(program("weft")?);
    weft.arg("registry").args(flags).arg("reserve").arg(free_subnet(&lab)?.to_string());
    weft.arg("10.168.0.94");
    let reserved = lab.host(0).netns.output(&mut weft)?;
    ensure!(reserved.status.success(), "{reserved:?}");
    finds(&lab, 0, "PublicIP", "OK", "3 leases")?;
    // No subnet that nodes are given.
    let second = r#"{"PublicIP":"10.168.0.94","BackendType":"vxlan"}"#;
    etcd::put(&lab, "subnets/10.42.0.0-24", second)?;
    finds(&lab, 0, "PublicIP", "FAIL", "10.168.0.94 has several leases")?;

    let mut weft = Command::new(program("weft")?);
    weft.args(["doctor", "-o", "json", "--run-dir"]).arg(&lab.host(0).run_dir);
    weft.env("LD_PRELOAD", "/usr/$LIB/faketime/libfaketime.so.1").env("FAKETIME", "+1h");
    let told = String::from_utf8(lab.host(0).netns.output(&mut weft)?.stdout)?;
    ensure!(told.contains("s ahead of http://"), "{told}");

    lab.etcd(0).kill()?;
    finds(&lab, 0, "registry", "FAIL", "etcdctl --endpoints")?;
    lab.start_etcd(0)?;
    finds(&lab, 0, "registry", "OK", "etcd 3.")?;

    lab.stop_daemon(0)?;
    finds(&lab, 0, "daemon", "FAIL", "systemctl start weftd")?;
    let text = String::from_utf8(run(&lab, 0, &flags)?.stdout)?;
    ensure!(text.starts_with("1. FAIL daemon: ") && text.contains("\n2. OK registry: "), "{text}");
    ensure!(!run(&lab, 0, &flags)?.status.success());

    // A registry that nobody has used yet, and that looking does not make.
    let directory = tempfile::tempdir()?;
    let missing = directory.path().join("registry");
    let registry = format!("dir:{}", missing.display());
    let (checks, _) = doctor(&lab, 0, &["--registry", &registry])?;
    let cured = checks
        .iter()
        .any(|it| it.name == "registry" && it.cure.contains(&format!("{registry} init")));
    ensure!(cured && !missing.exists(), "{checks:#?}");
    until("the daemon of the other host goes on", || Ok(lab.status(1)?.state == "forwarding"))?;
    lab.remove()
}
