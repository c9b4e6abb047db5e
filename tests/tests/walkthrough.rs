//! docs/walkthrough.md, step by step, as an operator goes through it: its files, its commands, and
//! what it shows, under systemd. Docker's part is played by the lab.

use std::env;
use std::fs;
use std::path::{Path, PathBuf};
use std::thread;

use anyhow::{Context, Result, ensure};
use ipnetwork::IpNetwork;
use serde_json::Value;
use weft_daemon::lab::PingOptions;
use weft_daemon::netns::NetNs;
use weft_daemon::status;
use weft_tests::machine::Machine;
use weft_tests::{has_device, hosts, until};

const TEXT: &str = include_str!("../../docs/walkthrough.md");

const HOSTS: usize = 3;

/// The file that the text shows below its path.
fn file(path: &str) -> Result<&'static str> {
    let shown = || {
        let (_, rest) = TEXT.split_once(&format!("\n`{path}`"))?;
        let (_, rest) = rest.split_once("\n```ini\n")?;
        Some(rest.split_once("\n```")?.0)
    };
    shown().with_context(|| format!("the text does not show {path}"))
}

/// The commands of the text, block by block, as this test tries them: by words that only one has.
const COMMANDS: [&[&str]; 8] =
    [CERTIFICATES, HEALTH, SET_BY_V3, SET_BY_V2, LIST_BY_V3, LIST_BY_V2, SHOW, DOCKER_OPTIONS];
const CERTIFICATES: &[&str] = &["openssl req"];
const HEALTH: &[&str] = &["endpoint health"];
const SET_BY_V3: &[&str] = &[" put ", "/config"];
const SET_BY_V2: &[&str] = &["ETCDCTL_API=2", " set "];
const LIST_BY_V3: &[&str] = &["get --prefix"];
const LIST_BY_V2: &[&str] = &["ETCDCTL_API=2", " ls "];
const SHOW: &[&str] = &["weft registry"];
const DOCKER_OPTIONS: &[&str] = &["mk-docker-opts.sh"];

/// Its single commands.
const LINK: &str = "ln -sf weftd /usr/local/bin/flanneld";
const START_ETCD: [&str; 2] = ["systemctl daemon-reload", "systemctl enable --now etcd"];
const START_WEFTD: [&str; 3] =
    ["systemctl daemon-reload", "systemctl enable flanneld", "systemctl start --no-block flanneld"];

fn blocks() -> impl Iterator<Item = &'static str> {
    TEXT.split("\n```sh\n").skip(1).filter_map(|rest| rest.split("\n```").next())
}

/// The block of commands with all of these words.
fn commands(words: &[&str]) -> Result<&'static str> {
    let found = blocks().find(|block| words.iter().all(|word| block.contains(word)));
    found.with_context(|| format!("no command with {words:?}"))
}

#[test]
fn every_command_of_the_text_is_tried() -> Result<()> {
    let mut tried = Vec::new();
    for words in COMMANDS {
        tried.push(commands(words)?);
    }
    tried.sort_unstable();
    tried.dedup();
    let mut shown: Vec<&str> = blocks().collect();
    shown.sort_unstable();
    assert_eq!(tried, shown);
    let mut is_fenced = false;
    let single = TEXT.lines().filter_map(|line| {
        is_fenced ^= line.starts_with("```");
        line.strip_prefix("    ").filter(|_| !is_fenced)
    });
    let single: Vec<&str> = single.collect();
    assert_eq!(single, [&["make install", LINK], &START_ETCD[..], &START_WEFTD[..]].concat());
    Ok(())
}

fn address(host: usize) -> String {
    format!("10.168.0.{}", 94 + host)
}

/// The host's own name and address, but for the list of all of them.
fn etcd_conf(host: usize) -> Result<String> {
    let lines = file("/opt/etcd/etcd.conf")?.lines().map(|line| {
        if line.starts_with("ETCD_INITIAL_CLUSTER=") {
            return line.to_owned();
        }
        line.replace("etcd01", &format!("etcd0{}", host + 1)).replace(&address(0), &address(host))
    });
    Ok(lines.map(|line| line + "\n").collect())
}

fn etcd() -> Result<PathBuf> {
    if let Some(path) = env::var_os("LAB_ETCD") {
        return Ok(path.into());
    }
    let path = Path::new("/usr/bin/etcd");
    ensure!(path.exists(), "{} is missing: install etcd-server", path.display());
    Ok(path.to_owned())
}

/// One API's way of saying the same.
struct Api {
    set: &'static str,
    list: &'static str,
}

/// Runs commands on all hosts at once: none of etcd's members is up before most are.
fn on_all(machines: &[Machine], commands: &[&str]) -> Result<()> {
    let commands = commands.join("\n");
    thread::scope(|scope| {
        let running = machines.iter().map(|machine| scope.spawn(|| machine.shell(&commands)));
        let running: Vec<_> = running.collect();
        running.into_iter().try_for_each(|it| it.join().expect("no panic").map(drop))
    })
}

fn walk(api: &Api) -> Result<()> {
    let mut lab = hosts(HOSTS)?;
    let etcd = etcd()?;
    let mut machines = Vec::new();
    for host in 0..HOSTS {
        let mut machine = Machine::new(&lab.host(host).netns)?;
        for (name, program) in [("etcd", etcd.clone()), ("etcdctl", etcd.with_file_name("etcdctl"))]
        {
            fs::copy(program, machine.path("/usr/local/bin").join(name))?;
        }
        machine.boot()?;
        machine.shell(LINK)?;
        machines.push(machine);
    }

    machines[0].shell(commands(CERTIFICATES)?)?;
    for (host, machine) in machines.iter().enumerate() {
        for name in ["ca.pem", "etcd.pem", "etcd-key.pem"].into_iter().filter(|_| host > 0) {
            let path = format!("/opt/etcd/ssl/{name}");
            machine.write(&path, &fs::read_to_string(machines[0].path(&path))?)?;
        }
        machine.write("/opt/etcd/etcd.conf", &etcd_conf(host)?)?;
        for path in [
            "/usr/lib/systemd/system/etcd.service",
            "/opt/flannel/flanneld.conf",
            "/usr/lib/systemd/system/flanneld.service",
        ] {
            machine.write(path, file(path)?)?;
        }
    }
    on_all(&machines, &START_ETCD)?;
    machines[0].shell(commands(HEALTH)?)?;

    on_all(&machines, &START_WEFTD)?;
    for machine in &machines {
        machine.says("flanneld", "waiting for the network config")?;
        let status = machine.shell("systemctl status flanneld || true")?;
        assert!(status.contains("Active: activating (start)"), "{status}");
        assert!(status.contains("Status: \"waiting for the network config"), "{status}");
        assert!(!has_device(machine.netns(), "flannel0")?);
        assert!(!machine.path("/run/flannel/subnet.env").exists());
    }
    machines[0].shell(api.set)?;
    let mut subnets = Vec::new();
    for machine in &machines {
        machine.is("flanneld", "active")?;
        let env = fs::read_to_string(machine.path("/run/flannel/subnet.env"))?;
        let subnet: IpNetwork = env
            .lines()
            .find_map(|line| line.strip_prefix("FLANNEL_SUBNET="))
            .context("no FLANNEL_SUBNET")?
            .parse()?;
        let shown = shown("cat /run/flannel/subnet.env")?;
        assert_eq!(env, shown.replace("172.22.82.1", &subnet.ip().to_string()));
        device_is_as_shown(machine.netns(), subnet)?;
        rules_are_as_shown(machine.netns(), subnet)?;
        subnets.push(IpNetwork::new(subnet.network(), subnet.prefix())?);
    }
    leases_are_as_shown(&machines[0], api, &subnets)?;

    for (host, machine) in machines.iter().enumerate() {
        let options = machine.shell(commands(DOCKER_OPTIONS)?)?;
        let (_, wanted) = TEXT.split_once("\n```\nDOCKER_OPTS=").context("no DOCKER_OPTS")?;
        let wanted = wanted.split_once("```").context("no end")?.0;
        let gateway = fs::read_to_string(machine.path("/run/flannel/subnet.env"))?;
        let gateway =
            gateway.lines().nth(1).and_then(|line| line.split_once('=')).context("no 2nd")?;
        assert_eq!(options, format!("DOCKER_OPTS={}", wanted.replace("172.22.82.1/24", gateway.1)));
        // Docker makes its bridge by these two.
        let value = |flag: &str| {
            let (_, rest) = options.split_once(flag)?;
            rest.split([' ', '"']).next()
        };
        let [bip, mtu] = ["--bip=", "--mtu="].map(value);
        let bridge = format!(
            "FLANNEL_SUBNET={}\nFLANNEL_MTU={}\n",
            bip.context("no --bip")?,
            mtu.context("no --mtu")?
        );
        fs::write(&lab.host(host).subnet_file, bridge)?;
        lab.attach_container(host)?;
    }
    for machine in &machines {
        until("it knows the others", || {
            Ok(status::read(&machine.path("/run/weft"))?.peers.len() == HOSTS - 1)
        })?;
    }
    let report = lab.ping(1, 0, &PingOptions::default())?;
    assert!(report.complete() && report.replies.iter().all(|reply| reply.ttl == 60), "{report:?}");

    for mut machine in machines {
        machine.shell("systemctl stop flanneld")?;
        assert_eq!(machine.property("flanneld", "Result")?, "success");
        machine.cut_power()?;
    }
    lab.remove()
}

/// What the text shows below a command.
fn shown(command: &str) -> Result<&'static str> {
    let (_, rest) = TEXT.split_once(&format!("\n# {command}\n")).context("not in the text")?;
    Ok(&rest[..rest.find("```").context("no end")?])
}

fn device_is_as_shown(netns: &NetNs, subnet: IpNetwork) -> Result<()> {
    let shown = shown("ip address show flannel0")?;
    let (_, rest) = shown.split_once('<').context("no flags")?;
    let (flags, rest) = rest.split_once('>').context("no flags")?;
    let mut wanted: Vec<&str> = flags.split(',').collect();
    let links = netns.ip_json(&["address", "show", "flannel0"])?;
    let flags = links[0]["flags"].as_array().context("no flags")?;
    let mut found: Vec<&str> = flags.iter().filter_map(Value::as_str).collect();
    wanted.sort_unstable();
    found.sort_unstable();
    assert_eq!(found, wanted);
    assert!(rest.starts_with(&format!(" mtu {} ", links[0]["mtu"])), "{rest}");
    assert!(rest.contains(&format!(" qlen {}\n", links[0]["txqlen"])), "{rest}");
    assert_eq!(links[0]["link_type"], "none");
    let inet = &links[0]["addr_info"][0];
    assert_eq!(inet["local"], subnet.network().to_string());
    assert_eq!((&inet["prefixlen"], &inet["scope"]), (&32.into(), &"global".into()));
    Ok(())
}

fn rules_are_as_shown(netns: &NetNs, subnet: IpNetwork) -> Result<()> {
    let own = format!("{}/{}", subnet.network(), subnet.prefix());
    let (nat, filter) = shown("iptables -t nat -S")?
        .split_once("# iptables -S\n")
        .context("the text does not show both")?;
    for (table, shown) in [("nat", nat), ("filter", filter)] {
        let listed = netns.tool("iptables", &["-t", table, "-S"])?;
        let of = |text: &str| {
            let mut rules: Vec<String> =
                text.lines().filter(|line| line.starts_with("-A")).map(str::to_owned).collect();
            rules.sort_by_key(|rule| rule.split(' ').nth(1).map(str::to_owned));
            rules
        };
        assert_eq!(of(&listed), of(&shown.replace("172.22.82.0/24", &own)));
    }
    Ok(())
}

fn leases_are_as_shown(machine: &Machine, api: &Api, subnets: &[IpNetwork]) -> Result<()> {
    let listed = machine.shell(api.list)?;
    let shown = machine.shell(commands(SHOW)?)?;
    for (host, subnet) in subnets.iter().enumerate() {
        let key = format!("/subnets/{}-24", subnet.network());
        let value = format!("{{\"PublicIP\":\"{}\",\"PublicIPv6\":null}}", address(host));
        assert!(listed.contains(&key) || listed.contains(&value), "{listed}");
        assert!(shown.contains(&subnet.to_string()), "{shown}");
    }
    assert_eq!(listed.lines().filter(|line| !line.is_empty()).count(), subnets.len(), "{listed}");
    Ok(())
}

#[test]
fn by_etcds_v3_api() -> Result<()> {
    walk(&Api { set: commands(SET_BY_V3)?, list: commands(LIST_BY_V3)? })
}

#[test]
fn by_etcds_v2_api() -> Result<()> {
    walk(&Api { set: commands(SET_BY_V2)?, list: commands(LIST_BY_V2)? })
}
