//! weftd's start and end: what it waits for, what ends it, and what it says.

use std::fs::{self, Permissions};
use std::net::UdpSocket;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::Result;
use rustix::process::Signal;
use weft_daemon::lab::Lab;
use weft_daemon::status;
use weft_tests::{
    DEADLINE, Weftd, bring_up, has_device, hosts, log, pings, program, run_to_end, run_weftd,
    until, write_config,
};

/// How long a daemon may take to stop, on a machine that is busy with other tests.
const STOP: Duration = Duration::from_secs(5);
/// Bytes that are enough for one ring, and not for the four of two workers.
const MEMLOCK: u32 = 128 << 10;

/// The flags of a daemon on the first host, without a network.
struct Files {
    registry: String,
    state: String,
    run: String,
    subnet: String,
}

impl Files {
    fn of(lab: &Lab) -> Result<Self> {
        let host = lab.host(0);
        Ok(Self {
            registry: format!("dir:{}", lab.registry()?.display()),
            state: host.state_dir.display().to_string(),
            run: host.run_dir.display().to_string(),
            subnet: host.subnet_file.display().to_string(),
        })
    }

    fn flags<'a>(&'a self, more: &[&'a str]) -> Vec<&'a str> {
        let files = [
            "--registry",
            &self.registry,
            "--state-dir",
            &self.state,
            "--run-dir",
            &self.run,
            "--subnet-file",
            &self.subnet,
        ];
        [&files[..], more].concat()
    }
}

#[test]
fn waits_for_a_good_config_and_touches_nothing_before() -> Result<()> {
    let lab = hosts(1)?;
    let (host, files) = (lab.host(0), Files::of(&lab)?);
    let daemon = Weftd::start(&host.netns, &host.log, &files.flags(&[]))?;
    daemon.logs("there is none in dir:")?;
    for (config, said) in [
        ("{", "not JSON"),
        (r#"{"Network":"10.42.0.0/29"}"#, "Minimum useful network prefix is /28"),
        (r#"{"Network":"10.42.0.0/16","SubnetLen":"24"}"#, "SubnetLen must be a whole number"),
        (r#"{"Network":"10.42.0.0/16","Backend":{"Type":"nope"}}"#, "unknown backend type"),
        (
            r#"{"Network":"10.42.0.0/16","Backend":{"Type":"vxlan","VNI":16777216}}"#,
            "VNI must be at most 16777215",
        ),
        (r#"{"Network":"10.42.0.0/16","Backend":{"Type":"udp","Port":-1}}"#, "Port must be"),
        (r#"{"Network":"10.0.0.0/8"}"#, "10.168.0.94, an address of the external interface eth0"),
    ] {
        write_config(&lab, config)?;
        daemon.logs(said)?;
    }
    assert!(!has_device(&host.netns, "flannel0")?);
    assert!(!host.subnet_file.exists());
    assert_eq!(fs::read_dir(&host.state_dir)?.count(), 0);

    write_config(&lab, r#"{"Network":"10.42.0.0/16","Backend":{"Type":"UDP","Port":9000}}"#)?;
    until("it forwards", || Ok(status::read(&host.run_dir)?.state == "forwarding"))?;
    assert!(has_device(&host.netns, "flannel0")?);
    until("subnet.env is there", || Ok(host.subnet_file.exists()))?;
    let taken = host.netns.run(|| UdpSocket::bind((host.address, 9000)))?;
    assert!(taken.is_err(), "it listens on the config's port");
    assert!(daemon.end(Signal::TERM)?.success());
    lab.remove()
}

#[test]
fn stops_at_once_and_cleanly_whatever_it_waits_for() -> Result<()> {
    let lab = hosts(1)?;
    let (host, files) = (lab.host(0), Files::of(&lab)?);
    let stops = |signal, ready: &str, more: &[&str]| -> Result<()> {
        let daemon = Weftd::start(&host.netns, &host.log, &files.flags(more))?;
        daemon.logs(ready)?;
        let begun = Instant::now();
        assert_eq!(daemon.end(signal)?.code(), Some(0));
        assert!(begun.elapsed() < STOP, "took {:?}", begun.elapsed());
        Ok(())
    };
    stops(Signal::TERM, "waiting for the network config", &[])?;
    stops(Signal::INT, "waiting for the network config", &[])?;
    let network = ["--network", "10.42.0.0/16"];
    for ready in ["external interface", "this node", "lease", "forwarding", "wrote subnet.env"] {
        stops(Signal::TERM, ready, &network)?;
    }
    until("no device is left", || Ok(!has_device(&host.netns, "flannel0")?))?;
    lab.remove()
}

/// As a terminal that is closed, or an operator who takes it for "reload", sends it.
#[test]
fn a_hangup_changes_nothing() -> Result<()> {
    let lab = hosts(1)?;
    let (host, files) = (lab.host(0), Files::of(&lab)?);
    let flags = files.flags(&["--network", "10.42.0.0/16"]);
    let daemon = Weftd::start(&host.netns, &host.log, &flags)?;
    daemon.logs("wrote subnet.env")?;
    daemon.signal(Signal::HUP)?;
    daemon.logs("SIGHUP changes nothing")?;
    assert_eq!(status::read(&host.run_dir)?.state, "forwarding");
    assert!(daemon.end(Signal::TERM)?.success());
    lab.remove()
}

/// As in a container, where nobody may write to /proc/sys. The last lines of the log are few.
#[test]
fn a_sysctl_that_cannot_be_set_is_told_once() -> Result<()> {
    let lab = hosts(1)?;
    let (host, files) = (lab.host(0), Files::of(&lab)?);
    let mut weftd = Command::new("unshare");
    let script = "mount --bind -o ro /proc/sys /proc/sys && exec \"$@\"";
    weftd.args(["--mount", "sh", "-c", script, "sh"]).arg(program("weftd")?);
    weftd.args(files.flags(&["--network", "10.42.0.0/16"]));
    let daemon = Weftd::start_command(&host.netns, &host.log, &mut weftd)?;
    daemon.logs("wrote subnet.env")?;
    for number in 0..3 {
        let looks = lab.status(0)?.reconciliations;
        host.netns.ip(&["link", "add", &format!("more{number}"), "type", "bridge"])?;
        until("weftd looks again", || Ok(lab.status(0)?.reconciliations > looks + 1))?;
    }
    assert_eq!(daemon.log()?.matches("accept_local").count(), 1, "{}", daemon.log()?);
    daemon.end(Signal::TERM)?;
    lab.remove()
}

/// Scripts that reset a node, or the end of an old flanneld's unit, remove its directory.
#[test]
fn subnet_env_is_written_again_if_somebody_removes_it() -> Result<()> {
    let mut lab = hosts(1)?;
    lab.start_daemon(0, &[])?;
    lab.wait_ready(0, DEADLINE)?;
    let file = &lab.host(0).subnet_file.clone();
    let wanted = fs::read(file)?;
    for (number, spoil) in
        [|file: &Path| fs::remove_file(file), |file: &Path| fs::write(file, "FL")]
            .into_iter()
            .enumerate()
    {
        spoil(file)?;
        // Whatever the kernel tells of, everything is looked at.
        lab.host(0).netns.ip(&["link", "add", &format!("more{number}"), "type", "bridge"])?;
        until("subnet.env is whole again", || Ok(fs::read(file).unwrap_or_default() == wanted))?;
    }

    // What is in its place now cannot be written to.
    fs::remove_file(file)?;
    fs::create_dir_all(file.join("in the way"))?;
    lab.host(0).netns.ip(&["link", "add", "more2", "type", "bridge"])?;
    until("that is told", || {
        let status = lab.status(0)?;
        Ok(!status.ready && status.problems.iter().any(|it| it.contains("cannot write")))
    })?;
    lab.stop_daemon(0)?;
    lab.start_daemon(0, &[])?;
    until("who starts waits for that", || Ok(lab.status(0)?.state.contains("cannot write")))?;
    fs::remove_dir_all(file)?;
    lab.host(0).netns.ip(&["link", "add", "more3", "type", "bridge"])?;
    until("subnet.env is whole again", || Ok(fs::read(file).unwrap_or_default() == wanted))?;
    until("all is well", || Ok(lab.status(0)?.ready))?;
    lab.remove()
}

#[test]
fn a_full_network_and_a_taken_route_are_waited_out() -> Result<()> {
    let lab = hosts(1)?;
    let (host, files) = (lab.host(0), Files::of(&lab)?);
    let subnets = lab.registry()?.join("subnets");
    fs::create_dir_all(&subnets)?;
    let quarters = [0, 64, 128, 192].map(|it| subnets.join(format!("10.42.{it}.0-18")));
    for quarter in &quarters {
        fs::write(quarter, r#"{"PublicIP":"10.168.0.77"}"#)?;
    }
    host.netns.ip(&["route", "add", "10.42.0.0/16", "dev", "eth0"])?;
    let flags = files.flags(&["--network", "10.42.0.0/16"]);
    let daemon = Weftd::start(&host.netns, &host.log, &flags)?;
    daemon.logs("out of subnets")?;
    quarters.iter().try_for_each(fs::remove_file)?;
    daemon.logs("already leads to eth0")?;
    host.netns.ip(&["route", "del", "10.42.0.0/16"])?;
    until("it forwards", || Ok(status::read(&host.run_dir)?.state == "forwarding"))?;
    assert!(daemon.end(Signal::TERM)?.success());
    lab.remove()
}

/// One line that says what and how to mend it, and an exit status that is not zero.
#[test]
fn what_ends_it_is_said_in_one_line() -> Result<()> {
    let lab = hosts(1)?;
    let (netns, files) = (&lab.host(0).netns, Files::of(&lab)?);
    let ends = |more: &[&str], wanted: &[&str]| -> Result<()> {
        let (status, stderr) = run_weftd(netns, &files.flags(more))?;
        assert_eq!(status, Some(1), "{more:?}: {stderr}");
        let errors: Vec<_> = stderr.lines().filter(|line| line.contains("ERROR")).collect();
        assert_eq!(errors.len(), 1, "{more:?}: {stderr}");
        for part in wanted {
            assert!(errors[0].contains(part), "{more:?}: no {part:?} in {stderr}");
        }
        assert!(!stderr.contains("panicked") && !stderr.contains("stack backtrace"), "{stderr}");
        Ok(())
    };
    let network = ["--network", "10.42.0.0/16"];
    ends(&["--iface", "nope0", network[0], network[1]], &["nope0", "eth0"])?;

    let squatter = netns.run(|| UdpSocket::bind("0.0.0.0:8285"))??;
    ends(&network, &["UDP 10.168.0.94:8285", "another weftd or flanneld"])?;
    drop(squatter);

    fs::write(
        lab.registry()?.join("config"),
        r#"{"Network":"10.42.0.0/16","Backend":{"Type":"udp"}}"#,
    )?;
    ends(&["--backend", "host-gw"], &["--backend host-gw", "udp-tun"])?;

    netns.ip(&["route", "del", "default"])?;
    ends(&network, &["default route", "--iface"])?;
    netns.ip(&["route", "add", "default", "dev", "eth0"])?;

    let mut unprivileged = Command::new("setpriv");
    unprivileged.args(["--bounding-set=-net_admin", "--inh-caps=-net_admin"]);
    unprivileged.arg(program("weftd")?).args(files.flags(&network));
    let (status, stderr) = run_to_end(netns, &mut unprivileged)?;
    assert_eq!(status, Some(1), "{stderr}");
    assert!(stderr.contains("CAP_NET_ADMIN"), "{stderr}");
    assert!(!has_device(netns, "flannel0")?);
    lab.remove()
}

#[test]
fn a_second_one_with_the_same_identity_is_refused() -> Result<()> {
    let mut lab = hosts(1)?;
    lab.start_daemon(0, &[])?;
    lab.wait_ready(0, DEADLINE)?;
    let first = lab.status(0)?.pid;
    let files = Files::of(&lab)?;
    let (status, stderr) = run_weftd(&lab.host(0).netns, &files.flags(&[]))?;
    assert_eq!(status, Some(1));
    assert!(stderr.contains(&format!("pid {first}")), "{stderr}");
    assert_eq!(lab.status(0)?.pid, first);
    lab.remove()
}

/// Each thread has its ring, and the memlock limit may allow the first of them only: packets go by the
/// calls that need none.
#[test]
fn rings_beyond_the_memlock_limit_are_done_without() -> Result<()> {
    let (mut lab, directory) = (hosts(2)?, tempfile::tempdir()?);
    let limited = directory.path().join("weftd");
    let script = format!(
        "#!/bin/sh\nexec prlimit --memlock={MEMLOCK} setpriv --bounding-set=-ipc_lock {} \"$@\"\n",
        program("weftd")?.display()
    );
    fs::write(&limited, script)?;
    fs::set_permissions(&limited, Permissions::from_mode(0o755))?;
    lab.use_weftd(limited);
    bring_up(&mut lab, &["--workers=2"])?;
    pings(&lab)?;
    for host in 0..2 {
        assert_eq!(lab.status(host)?.io.as_deref(), Some("mmsg"));
        let log = log(&lab, host)?;
        assert!(log.contains("packets go by recvmmsg and sendmsg, since"), "{log}");
        assert!(
            log.contains("raise the memlock limit") && !log.contains("forwarding broke"),
            "{log}"
        );
    }
    lab.remove()
}

/// Its error is passed on once to who receives; the socket receives on.
#[test]
fn a_socket_that_is_killed_from_outside_receives_on() -> Result<()> {
    for io in ["--io=uring", "--io=mmsg"] {
        let mut lab = hosts(2)?;
        bring_up(&mut lab, &[io, "--workers=1"])?;
        for _ in 0..3 {
            let killed =
                lab.host(1).netns.tool("ss", &["--kill", "--udp", "--all", "sport = 8285"])?;
            assert!(killed.contains(":8285"), "{killed}");
            pings(&lab)?;
        }
        let log = log(&lab, 1)?;
        assert!(!log.contains("forwarding broke"), "{log}");
        lab.remove()?;
    }
    Ok(())
}

#[test]
fn a_wrong_command_line_is_told_apart() -> Result<()> {
    let lab = hosts(1)?;
    let netns = &lab.host(0).netns;
    for (flags, said) in [
        (&["--ip-mask"][..], "--ip-masq"),
        (&["-etcd-endpoint=x"], "--etcd-endpoints"),
        (&["--guard", "tight"], "strict"),
        (&["--workers", "0"], "--workers"),
        (&["--network", "10.42.0.0"], "--network"),
        (&["serve"], "serve"),
    ] {
        let (status, stderr) = run_weftd(netns, flags)?;
        assert_eq!(status, Some(2), "{flags:?}: {stderr}");
        assert_eq!(stderr.lines().count(), 1, "{flags:?}: {stderr}");
        assert!(stderr.contains(said), "{flags:?}: {stderr}");
    }
    for (flags, said) in [
        (&["-etcd-certfile=/x"][..], "--etcd-certfile goes with --etcd-keyfile"),
        (&["-kube-subnet-mgr"], "--kube-subnet-mgr: leases from Kubernetes are not built yet"),
    ] {
        let (status, stderr) = run_weftd(netns, flags)?;
        assert_eq!(status, Some(1), "{flags:?}: {stderr}");
        assert!(stderr.contains(said), "{flags:?}: {stderr}");
    }
    lab.remove()
}

#[test]
fn subnet_env_is_flannels_and_ip_masq_is_written() -> Result<()> {
    let mut lab = hosts(1)?;
    lab.start_daemon(0, &["", "-ip-masq", "true", ""])?;
    lab.wait_ready(0, DEADLINE)?;
    let status = lab.status(0)?;
    let base = status.subnets[0].network().to_string();
    let gateway = format!("{}1/24", base.strip_suffix('0').unwrap());
    let env = fs::read_to_string(&lab.host(0).subnet_file)?;
    assert_eq!(
        env,
        format!(
            "FLANNEL_NETWORK=10.42.0.0/16\nFLANNEL_SUBNET={gateway}\nFLANNEL_MTU=1472\n\
             FLANNEL_IPMASQ=true\n"
        )
    );
    let log = fs::read_to_string(&lab.host(0).log)?;
    assert!(!log.contains("WARN"), "{log}");

    let device = &lab.host(0).netns.ip_json(&["address", "show", "flannel0"])?[0];
    assert_eq!(device["mtu"], 1472);
    let flags: Vec<_> = device["flags"].as_array().unwrap().iter().collect();
    for flag in ["POINTOPOINT", "NOARP", "UP", "LOWER_UP"] {
        assert!(flags.iter().any(|it| *it == flag), "{flags:?}");
    }
    assert_eq!(device["addr_info"][0]["local"], base);
    assert_eq!(device["addr_info"][0]["prefixlen"], 32);
    lab.remove()
}

#[test]
fn the_next_free_device_name_is_taken() -> Result<()> {
    let mut lab = hosts(1)?;
    lab.host(0).netns.ip(&["link", "add", "flannel0", "type", "bridge"])?;
    lab.start_daemon(0, &[])?;
    lab.wait_ready(0, DEADLINE)?;
    assert_eq!(lab.status(0)?.device.as_deref(), Some("flannel1"));
    lab.remove()
}

/// The reference's cases, on a real device: the flags, the address that is taken, and the one that
/// others send to.
#[test]
fn the_interface_is_chosen_as_asked() -> Result<()> {
    let lab = hosts(1)?;
    let (host, files) = (lab.host(0), Files::of(&lab)?);
    host.netns.ip(&["link", "add", "dummy0", "type", "bridge"])?;
    for address in
        ["1.10.100.1", "192.168.200.128", "172.16.30.18", "172.16.31.200", "172.16.32.100"]
    {
        host.netns.ip(&["address", "add", &format!("{address}/24"), "dev", "dummy0"])?;
    }
    host.netns.ip(&["link", "set", "dummy0", "up"])?;
    let cases: [(&[&str], &str, &str); 8] = [
        (&[], "10.168.0.94", "it has the default route"),
        (&["--iface=dummy0"], "1.10.100.1", "it matches --iface dummy0"),
        (&["--iface=172.16.30.18"], "172.16.30.18", "it matches --iface 172.16.30.18"),
        (&["-iface-regex", r"192\.168\.200\.\d+"], "192.168.200.128", "it matches --iface-regex"),
        (&[r"-iface-regex=dummy\d+"], "1.10.100.1", "it matches --iface-regex"),
        (&["--iface=eth7", "--iface-regex=^dum"], "1.10.100.1", "matching --iface eth7: no such"),
        (&["--iface-can-reach=172.16.32.254"], "172.16.32.100", "it matches --iface-can-reach"),
        (
            &[r"--iface-regex=172\.16\.30\.\d+", "--public-ip=172.16.31.200"],
            "172.16.31.200",
            "it matches --iface-regex",
        ),
    ];
    for (flags, public_ip, why) in cases {
        fs::remove_dir_all(lab.registry()?).or_else(|error| {
            if error.kind() == std::io::ErrorKind::NotFound { Ok(()) } else { Err(error) }
        })?;
        let flags = [&["--network=10.42.0.0/16"][..], flags].concat();
        let daemon = Weftd::start(&host.netns, &host.log, &files.flags(&flags))?;
        daemon.logs(why)?;
        until(&format!("{flags:?} take {public_ip}"), || {
            let found = status::read(&host.run_dir)?.public_ip;
            Ok(found.is_some_and(|found| found.to_string() == public_ip))
        })?;
        daemon.end(Signal::TERM)?;
    }
    let (code, stderr) = run_weftd(&host.netns, &files.flags(&["--iface-regex=("]))?;
    assert_eq!(code, Some(2));
    assert!(stderr.contains("could not compile the IP address regex"), "{stderr}");
    Ok(())
}
