//! The firewall's rules: what is listed, what becomes of packets, and who may meddle with them.

use std::fs;
use std::io::ErrorKind;
use std::net::{IpAddr, SocketAddr, UdpSocket};
use std::os::unix::fs::symlink;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use ipnetwork::IpNetwork;
use tempfile::TempDir;
use weft_daemon::lab::{Lab, LabOptions};
use weft_daemon::netns::NetNs;
use weft_tests::{
    DEADLINE, all_acquainted, bring_up, dual_stack, health, hosts, logs, measures, pings, restart,
    run_weftd, tells, until, write_config,
};

/// How rules come into the kernel.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Mode {
    /// By iptables, into the kernel's nftables.
    Nft,
    /// By iptables, into the kernel's older tables.
    Legacy,
    /// By nft.
    Nftables,
}

/// The hosts' interface on the cable.
const EXTERNAL: &str = "eth0";

impl Mode {
    fn flag(self) -> &'static str {
        match self {
            Self::Nft | Self::Legacy => "--firewall=iptables",
            Self::Nftables => "--firewall=nftables",
        }
    }

    fn save(self, ipv6: bool) -> &'static str {
        match (self, ipv6) {
            (Self::Legacy, false) => "iptables-legacy-save",
            (Self::Legacy, true) => "ip6tables-legacy-save",
            (Self::Nft | Self::Nftables, false) => "iptables-nft-save",
            (Self::Nft | Self::Nftables, true) => "ip6tables-nft-save",
        }
    }
}

/// Makes iptables in a directory of programs one of this kind.
fn choose_kind(dir: &Path, kind: &str) -> Result<()> {
    for program in ["iptables", "ip6tables"] {
        for work in ["", "-save", "-restore"] {
            let link = dir.join(format!("{program}{work}"));
            if link.is_symlink() {
                fs::remove_file(&link)?;
            }
            symlink(format!("/usr/sbin/{program}-{kind}{work}"), link)?;
        }
    }
    Ok(())
}

/// A directory of programs: all but iptables as they are, and iptables of one kind.
fn programs(kind: &str) -> Result<TempDir> {
    let dir = tempfile::tempdir()?;
    choose_kind(dir.path(), kind)?;
    for work in ["-save", "-restore"] {
        for program in ["iptables-legacy", "ip6tables-legacy", "iptables-nft", "ip6tables-nft"] {
            let name = format!("{program}{work}");
            symlink(format!("/usr/sbin/{name}"), dir.path().join(name))?;
        }
    }
    symlink("/usr/sbin/nft", dir.path().join("nft"))?;
    Ok(dir)
}

fn lab(hosts: usize, search_path: &Path) -> Result<Lab> {
    let search_path = Some(search_path.to_owned());
    Lab::new(LabOptions { hosts, search_path, ..LabOptions::default() })
}

/// What iptables lists of flannel's.
fn listed(netns: &NetNs, mode: Mode, ipv6: bool) -> Result<Vec<String>> {
    let saved = netns.tool(mode.save(ipv6), &[])?;
    let ours = saved.lines().filter(|line| line.contains("FLANNEL") || line.contains("flanneld"));
    Ok(ours.filter(|line| line.starts_with("-A")).map(str::to_owned).collect())
}

/// Our table of nft as nft itself shows it, for these subnets.
fn nft_listing(subnets: &[IpNetwork]) -> String {
    let (mut masq, mut pass) = (Vec::new(), Vec::new());
    for subnet in subnets {
        let (ip, network, multicast) = if subnet.is_ipv6() {
            ("ip6", "fd00:42::/48", "ff00::/8")
        } else {
            ("ip", "10.42.0.0/16", "224.0.0.0/4")
        };
        masq.push("meta mark & 0x00004000 == 0x00004000 return".to_owned());
        for rule in [
            format!("saddr {subnet} {ip} daddr {network} return"),
            format!("saddr {network} {ip} daddr {subnet} return"),
            format!("saddr != {network} {ip} daddr {subnet} return"),
            format!("saddr {network} {ip} daddr != {multicast} masquerade fully-random"),
            format!("saddr != {network} {ip} daddr {network} masquerade fully-random"),
        ] {
            masq.push(format!("{ip} {rule}"));
        }
        let iface = format!("iifname \"{EXTERNAL}\"");
        pass.push(format!("{iface} {ip} saddr {network} {ip} daddr {network} drop"));
        pass.extend(["saddr", "daddr"].map(|side| format!("{ip} {side} {network} accept")));
    }
    let lines = |rules: &[String], comment: &str| {
        let line = |rule: &String| format!("\t\t{rule} comment \"{comment}\"\n");
        rules.iter().map(line).collect::<String>()
    };
    format!(
        "table inet weft {{\n\tchain postrouting {{\n\t\ttype nat hook postrouting priority srcnat; \
         policy accept;\n{}\t}}\n\n\tchain forward {{\n\t\ttype filter hook forward priority filter; \
         policy accept;\n{}\t}}\n}}\n",
        lines(&masq, "flanneld masq"),
        lines(&pass, "flanneld forward"),
    )
}

fn nft_table(netns: &NetNs) -> Result<String> {
    netns.tool("nft", &["-s", "list", "table", "inet", "weft"])
}

/// The rules that flannel of today makes, as its own tests list them; and before those of `FORWARD` the one
/// that drops what comes unwrapped, and claims to be a container's.
fn flannels(network: &str, subnet: IpNetwork, multicast: &str) -> Vec<String> {
    let masq = |rule: String| {
        let (matches, target) = rule.split_once(" -j ").expect("every rule has a target");
        let comment = "-m comment --comment \"flanneld masq\"";
        format!("-A FLANNEL-POSTRTG {matches} {comment} -j {target}")
    };
    let forward = |matches: &str, target: &str| {
        format!("-A FLANNEL-FWD {matches} -m comment --comment \"flanneld forward\" -j {target}")
    };
    let mut rules = vec![
        "-A POSTROUTING -m comment --comment \"flanneld masq\" -j FLANNEL-POSTRTG".to_owned(),
        "-A FORWARD -m comment --comment \"flanneld forward\" -j FLANNEL-FWD".to_owned(),
        forward(&format!("-s {network} -d {network} -i {EXTERNAL}"), "DROP"),
        forward(&format!("-s {network}"), "ACCEPT"),
        forward(&format!("-d {network}"), "ACCEPT"),
    ];
    rules.extend(
        [
            "-m mark --mark 0x4000/0x4000 -j RETURN".to_owned(),
            format!("-s {subnet} -d {network} -j RETURN"),
            format!("-s {network} -d {subnet} -j RETURN"),
            format!("! -s {network} -d {subnet} -j RETURN"),
            format!("-s {network} ! -d {multicast} -j MASQUERADE --random-fully"),
            format!("! -s {network} -d {network} -j MASQUERADE --random-fully"),
        ]
        .map(masq),
    );
    rules
}

/// All of them, in the right order within each chain; chains in any.
fn assert_flannels(lab: &Lab, host: usize, mode: Mode) -> Result<()> {
    for subnet in lab.status(host)?.subnets {
        let (network, multicast) = if subnet.is_ipv6() {
            ("fd00:42::/48", "ff00::/8")
        } else {
            ("10.42.0.0/16", "224.0.0.0/4")
        };
        let found = listed(&lab.host(host).netns, mode, subnet.is_ipv6())?;
        let wanted = flannels(network, subnet, multicast);
        for chain in ["POSTROUTING", "FORWARD", "FLANNEL-POSTRTG", "FLANNEL-FWD"] {
            let of = |rules: &[String]| {
                let start = format!("-A {chain} ");
                rules.iter().filter(|rule| rule.starts_with(&start)).cloned().collect::<Vec<_>>()
            };
            ensure!(of(&found) == of(&wanted), "{chain}: {found:#?}, not {wanted:#?}");
        }
        ensure!(found.len() == wanted.len(), "{found:#?}");
    }
    Ok(())
}

fn is_flannels(lab: &Lab, host: usize, mode: Mode) -> Result<()> {
    until("the rules are as they should be", || assert_flannels(lab, host, mode).map(|()| true))
}

/// Who a socket at `to` takes a datagram from `from` to be from.
fn seen_source(from: &NetNs, to: &NetNs, at: IpAddr) -> Result<IpAddr> {
    let receiver = to.run(|| UdpSocket::bind(SocketAddr::new(at, 0)))??;
    receiver.set_read_timeout(Some(DEADLINE))?;
    let address = receiver.local_addr()?;
    let any = if at.is_ipv6() { "[::]:0" } else { "0.0.0.0:0" };
    let sender = from.run(|| UdpSocket::bind(any))??;
    sender.send_to(b"who am I", address)?;
    loop {
        match receiver.recv_from(&mut [0; 64]) {
            Err(error) if error.kind() == ErrorKind::Interrupted => {}
            received => return Ok(received?.1.ip()),
        }
    }
}

/// The switch as somebody outside of the overlay.
fn outside(lab: &Lab) -> Result<IpAddr> {
    lab.switch()?.ip(&["address", "add", "10.168.0.254/24", "dev", "br0"])?;
    Ok([10, 168, 0, 254].into())
}

#[test]
fn every_mode_has_flannels_rules_and_masquerades_as_flannel_does() -> Result<()> {
    for mode in [Mode::Nft, Mode::Legacy, Mode::Nftables] {
        let programs = programs(if mode == Mode::Legacy { "legacy" } else { "nft" })?;
        let mut lab = lab(2, programs.path())?;
        dual_stack(&lab)?;
        bring_up(&mut lab, &["--ip-masq", mode.flag()])?;
        if mode == Mode::Nftables {
            let table = nft_table(&lab.host(0).netns)?;
            assert_eq!(table, nft_listing(&lab.status(0)?.subnets));
            assert!(listed(&lab.host(0).netns, mode, false)?.is_empty());
        } else {
            assert_flannels(&lab, 0, mode)?;
        }
        let outside = outside(&lab)?;
        let [near, far] = [lab.container(0)?, lab.container(1)?];
        let host = lab.host(0).address;
        assert_eq!(seen_source(&near.netns, lab.switch()?, outside)?, host, "{mode:?}");
        for to in &far.addresses {
            let own = near.addresses.iter().find(|own| own.is_ipv6() == to.is_ipv6());
            let own = own.context("no address of this family")?.ip();
            assert_eq!(seen_source(&near.netns, &far.netns, to.ip())?, own, "{mode:?}");
        }
        pings(&lab)?;
        lab.remove()?;
    }
    Ok(())
}

#[test]
fn switches_leave_out_what_they_say() -> Result<()> {
    let mut lab = hosts(2)?;
    bring_up(&mut lab, &["--firewall=iptables"])?;
    // Hosts that masquerade, but not at random.
    let flags = ["--ip-masq", "--ip-masq-fully-random-disable", "--firewall=nftables"];
    restart(&mut lab, 1, &flags)?;
    let table = nft_table(&lab.host(1).netns)?;
    assert!(table.contains("masquerade comment") && !table.contains("random"), "{table}");
    restart(&mut lab, 1, &[&flags[..2], &["--firewall=iptables"]].concat())?;
    let found = listed(&lab.host(1).netns, Mode::Nft, false)?.concat();
    assert!(found.contains("-j MASQUERADE") && !found.contains("random"), "{found}");

    let found = listed(&lab.host(0).netns, Mode::Nft, false)?;
    assert_eq!(found.len(), 4, "{found:#?}");
    assert!(found.iter().all(|rule| rule.contains("flanneld forward")));
    lab.stop_daemon(0)?;
    assert_eq!(listed(&lab.host(0).netns, Mode::Nft, false)?, found, "a stop leaves them");
    lab.start_daemon(0, &["--firewall=iptables", "--iptables-forward-rules=false"])?;
    lab.wait_ready(0, DEADLINE)?;
    assert!(listed(&lab.host(0).netns, Mode::Nft, false)?.is_empty());
    lab.remove()
}

/// Docker may use the other kind of iptables, which weft's rules are not in.
#[test]
fn another_iptables_that_drops_is_told() -> Result<()> {
    let mut lab = hosts(1)?;
    lab.host(0).netns.tool("iptables-legacy", &["-P", "FORWARD", "DROP"])?;
    lab.start_daemon(0, &["--firewall=iptables", "--healthz-port=8081"])?;
    lab.wait_ready(0, DEADLINE)?;
    logs(&lab, 0, "the chain FORWARD of iptables-legacy drops by its policy")?;
    // It may be that others' rules there let the packets pass.
    assert_eq!(health(&lab.host(0).netns, "/readyz")?.0, 200);
    lab.remove()
}

/// Left to itself: nftables where the network config says so, else iptables where it runs, else
/// nftables.
#[test]
fn the_program_is_chosen_by_the_config_and_by_what_there_is() -> Result<()> {
    let (both, nft) = (programs("nft")?, tempfile::tempdir()?);
    symlink("/usr/sbin/nft", nft.path().join("nft"))?;
    for (config, programs, chosen) in [
        (r#"{"Network":"10.42.0.0/16","EnableNFTables":true}"#, both.path(), "nftables"),
        (r#"{"Network":"10.42.0.0/16"}"#, both.path(), "iptables v"),
        (r#"{"Network":"10.42.0.0/16"}"#, nft.path(), "nftables"),
    ] {
        let mut lab = lab(1, programs)?;
        write_config(&lab, config)?;
        lab.start_daemon(0, &["--ip-masq"])?;
        lab.wait_ready(0, DEADLINE)?;
        let by = lab.status(0)?.firewall.context("nothing wrote rules")?;
        assert!(by.starts_with(chosen), "{by}, not {chosen}");
        let table = nft_table(&lab.host(0).netns);
        assert_eq!(table.is_ok(), chosen == "nftables", "{table:?}");
        lab.remove()?;
    }
    Ok(())
}

/// Hosts that forward nothing by themselves, as Docker leaves them.
#[test]
fn the_policy_drop_is_overcome_by_iptables_and_told_by_nftables() -> Result<()> {
    let mut lab = hosts(2)?;
    for host in 0..2 {
        lab.host(host).netns.tool("iptables-nft", &["-P", "FORWARD", "DROP"])?;
        let reject = ["-A", "FORWARD", "-j", "REJECT"];
        lab.host(host).netns.tool("iptables-nft", &reject)?;
    }
    bring_up(&mut lab, &["--firewall=iptables"])?;
    pings(&lab)?;
    for host in 0..2 {
        let log = fs::read_to_string(&lab.host(host).log)?;
        assert!(log.contains("the chain FORWARD drops by its policy"), "{log}");
        restart(&mut lab, host, &["--firewall=nftables"])?;
        tells(&lab, host, "`iptables -P FORWARD ACCEPT`")?;
    }
    lab.remove()
}

/// Rules that go are back, at once where the kernel tells; other people's stay as they are.
#[test]
fn wiped_rules_come_back_and_foreign_ones_stay() -> Result<()> {
    let mut lab = hosts(2)?;
    let host = NetNs::open(lab.host(0).netns.name());
    let mut foreign = String::from("*filter\n:MINE - [0:0]\n");
    for number in 0..1000 {
        foreign +=
            &format!("-A MINE -s 192.0.2.{}/32 -p tcp --dport {number} -j DROP\n", number % 250);
    }
    foreign += "-A FORWARD -j MINE\nCOMMIT\n";
    restore(&host, "iptables-nft-restore", &foreign)?;
    bring_up(&mut lab, &["--ip-masq", "--firewall=iptables", "--iptables-resync=600"])?;
    assert_flannels(&lab, 0, Mode::Nft)?;
    let mut quickest = DEADLINE;
    for wipe in [
        &["iptables-nft", "-t", "nat", "-F"][..],
        &["iptables-nft", "-F", "FLANNEL-FWD"],
        &["iptables-nft", "-D", "FLANNEL-FWD", "1"],
        &["iptables-nft", "-t", "nat", "-D", "FLANNEL-POSTRTG", "3"],
    ] {
        let before = lab.status(0)?.firewall_repairs;
        host.tool(wipe[0], &wipe[1..])?;
        let wiped = Instant::now();
        is_flannels(&lab, 0, Mode::Nft)?;
        quickest = quickest.min(wiped.elapsed());
        until("the repair is counted", || Ok(lab.status(0)?.firewall_repairs > before))?;
    }
    assert!(quickest < Duration::from_secs(1), "{quickest:?}");
    let mine = host.tool("iptables-nft-save", &[])?.matches("-A MINE ").count();
    assert_eq!(mine, 1000);
    // As firewalld's restart: everything goes, and others' rules come in its place.
    host.tool("nft", &["flush", "ruleset"])?;
    restore(&host, "iptables-nft-restore", &foreign)?;
    is_flannels(&lab, 0, Mode::Nft)?;
    assert_eq!(host.tool("iptables-nft-save", &[])?.matches("-A MINE ").count(), 1000);
    pings(&lab)?;

    for host in 0..2 {
        restart(&mut lab, host, &["--ip-masq", "--firewall=nftables", "--iptables-resync=600"])?;
    }
    all_acquainted(&lab)?;
    let table = nft_table(&host)?;
    for wipe in [
        &["flush", "ruleset"][..],
        &["delete", "table", "inet", "weft"],
        &["flush", "chain", "inet", "weft", "postrouting"],
        &["add", "rule", "inet", "weft", "forward", "drop"],
    ] {
        host.tool("nft", wipe)?;
        until("the table is as it was", || Ok(nft_table(&host)? == table))?;
    }
    pings(&lab)?;
    lab.remove()
}

/// Events bring repairs sooner than this, the timer later.
const GIVEN_UP_FOR: Duration = Duration::from_secs(2);

/// Somebody who removes our rules again and again is not fought for ever.
#[test]
fn a_fight_over_rules_is_given_up_and_told() -> Result<()> {
    let mut lab = hosts(1)?;
    let flags = ["--ip-masq", "--firewall=iptables", "--healthz-port=8081"];
    lab.start_daemon(0, &flags)?;
    lab.wait_ready(0, DEADLINE)?;
    let host = NetNs::open(lab.host(0).netns.name());
    let flush = || host.tool("iptables-nft", &["-F", "FLANNEL-FWD"]).map(drop);
    let is_there = || Ok::<_, anyhow::Error>(assert_flannels(&lab, 0, Mode::Nft).is_ok());
    until("it is told", || {
        flush()?;
        let problems = lab.status(0)?.problems;
        Ok(problems.iter().any(|it| it.contains("another program keeps removing")))
    })?;
    assert_eq!(health(&host, "/readyz")?.0, 503);
    // From now on only the timer puts them back, which may come once.
    let (since, mut refills) = (Instant::now(), 0);
    flush()?;
    until("they would have been put back", || {
        if is_there()? {
            refills += 1;
            flush()?;
        }
        Ok(since.elapsed() > GIVEN_UP_FOR)
    })?;
    assert!(refills <= 1, "put back {refills} times");
    until("the timer puts them back", is_there)?;
    lab.remove()
}

fn restore(netns: &NetNs, program: &str, rules: &str) -> Result<()> {
    let file = tempfile::NamedTempFile::new()?;
    fs::write(file.path(), rules)?;
    let path = file.path().to_str().context("an odd path")?;
    netns.tool(program, &["--noflush", path]).map(drop)
}

/// Who asks iptables-legacy for a table makes it, and all packets pass by it from then on.
#[test]
fn tables_that_nobody_needs_are_not_made() -> Result<()> {
    let programs = programs("legacy")?;
    let mut lab = lab(1, programs.path())?;
    lab.start_daemon(0, &["--ip-masq", "--firewall=nftables"])?;
    lab.wait_ready(0, DEADLINE)?;
    for names in ["ip_tables_names", "ip6_tables_names"] {
        let names = format!("/proc/thread-self/net/{names}");
        let tables = lab.host(0).netns.run(|| fs::read_to_string(names).unwrap_or_default())?;
        assert_eq!(tables, "");
    }
    lab.remove()
}

/// Where the kernel does not tell, the timer finds out.
#[test]
fn the_older_tables_are_looked_at_from_time_to_time() -> Result<()> {
    let programs = programs("legacy")?;
    let mut lab = lab(1, programs.path())?;
    bring_up(&mut lab, &["--ip-masq", "--firewall=iptables", "--iptables-resync=1"])?;
    lab.host(0).netns.tool("iptables-legacy", &["-t", "nat", "-F"])?;
    is_flannels(&lab, 0, Mode::Legacy)?;
    // The host's iptables becomes one of the newer kind: nothing of ours is left in the older tables.
    lab.stop_daemon(0)?;
    choose_kind(programs.path(), "nft")?;
    lab.start_daemon(0, &["--ip-masq", "--firewall=iptables"])?;
    lab.wait_ready(0, DEADLINE)?;
    is_flannels(&lab, 0, Mode::Nft)?;
    until("nothing is left", || Ok(listed(&lab.host(0).netns, Mode::Legacy, false)?.is_empty()))?;
    lab.remove()
}

/// Another mode, another subnet, another Network, an older flannel: nothing is left of it.
#[test]
fn nothing_is_left_of_what_was_before() -> Result<()> {
    let programs = programs("nft")?;
    let mut lab = lab(1, programs.path())?;
    let host = NetNs::open(lab.host(0).netns.name());
    restore(
        &host,
        "iptables-nft-restore",
        "*nat\n\
         -A POSTROUTING -s 10.9.0.0/16 -d 10.9.0.0/16 -m comment --comment \"flanneld masq\" -j RETURN\n\
         -A POSTROUTING -s 10.9.0.0/16 -j MASQUERADE\nCOMMIT\n*filter\n\
         -A FORWARD -s 10.9.0.0/16 -m comment --comment \"flanneld forward\" -j ACCEPT\nCOMMIT\n",
    )?;
    host.tool("nft", &["add", "table", "ip", "flannel-ipv4"])?;
    let start = |lab: &mut Lab, mode: Mode| -> Result<()> {
        lab.start_daemon(0, &["--ip-masq", mode.flag()])?;
        lab.wait_ready(0, DEADLINE)
    };
    start(&mut lab, Mode::Nft)?;
    assert_flannels(&lab, 0, Mode::Nft)?;
    let saved = host.tool("iptables-nft-save", &[])?;
    assert!(saved.contains("-s 10.9.0.0/16 -j MASQUERADE"), "somebody else's: {saved}");
    assert!(!host.tool("nft", &["list", "tables"])?.contains("flannel-ipv4"));

    lab.stop_daemon(0)?;
    start(&mut lab, Mode::Nftables)?;
    assert!(listed(&host, Mode::Nft, false)?.is_empty());
    let first = nft_table(&host)?;
    lab.stop_daemon(0)?;

    // A lease of another subnet in another Network.
    fs::remove_dir_all(lab.registry()?)?;
    write_config(&lab, r#"{"Network":"10.43.0.0/16"}"#)?;
    start(&mut lab, Mode::Nftables)?;
    let second = nft_table(&host)?;
    assert!(first.contains("10.42.0.0/16") && !second.contains("10.42."), "{second}");
    lab.stop_daemon(0)?;
    start(&mut lab, Mode::Nft)?;
    let found = listed(&host, Mode::Nft, false)?;
    assert!(found.len() == 11 && !found.concat().contains("10.42."), "{found:#?}");
    assert!(!host.tool("nft", &["list", "tables"])?.contains("inet weft"));

    // Somebody else gets our subnet while we run. At no moment is there less than all.
    let subnet = lab.status(0)?.subnets[0];
    let key = format!("subnets/{}-24", subnet.network());
    fs::write(lab.registry()?.join(key), r#"{"PublicIP":"10.168.0.200","PublicIPv6":null}"#)?;
    until("the rules follow the lease", || {
        let now = lab.status(0).ok().and_then(|status| status.subnets.first().copied());
        let found = listed(&host, Mode::Nft, false)?;
        assert_eq!(found.len(), 11, "{found:#?}");
        let found = found.concat();
        Ok(now.is_some_and(|now| now != subnet && found.contains(&now.to_string()))
            && !found.contains(&subnet.to_string()))
    })?;
    lab.remove()
}

/// Somebody who changes rules all the time gets what they ask for, and so do we.
#[test]
fn two_writers_at_once_lose_nothing() -> Result<()> {
    let mut lab = hosts(1)?;
    bring_up(&mut lab, &["--ip-masq", "--firewall=iptables"])?;
    let host = NetNs::open(lab.host(0).netns.name());
    let done = AtomicBool::new(false);
    thread::scope(|scope| -> Result<()> {
        let other = scope.spawn(|| -> Result<u32> {
            let mut count = 0;
            // Each write makes iptables-save begin anew, which with many rules would never end.
            while count < 20 || !done.load(Ordering::Relaxed) && count < 300 {
                let port = count.to_string();
                let rule = ["-w", "-A", "FORWARD", "-p", "tcp", "--dport", &port, "-j", "DROP"];
                host.tool("iptables-nft", &rule)?;
                count += 1;
            }
            Ok(count)
        });
        let ours = (0..5).try_for_each(|_| {
            host.tool("iptables-nft", &["-w", "-t", "nat", "-F", "FLANNEL-POSTRTG"])?;
            is_flannels(&lab, 0, Mode::Nft)
        });
        done.store(true, Ordering::Relaxed);
        ours?;
        let count = other.join().expect("the other writer panicked")?;
        let saved = host.tool("iptables-nft-save", &["-t", "filter"])?;
        assert_eq!(saved.matches("-p tcp").count(), usize::try_from(count)?);
        Ok(())
    })?;
    lab.remove()
}

#[test]
fn without_the_program_the_overlay_goes_on_and_says_so() -> Result<()> {
    let programs = tempfile::tempdir()?;
    let mut lab = lab(2, programs.path())?;
    let flags = ["--ip-masq", "--firewall=iptables", "--iptables-resync=1", "--healthz-port=8081"];
    bring_up(&mut lab, &flags)?;
    pings(&lab)?;
    let told = "there is no iptables; install it, or choose the other --firewall";
    tells(&lab, 0, told)?;
    let log = fs::read_to_string(&lab.host(0).log)?;
    assert_eq!(log.matches(told).count(), 1, "{log}");
    for (name, value) in [("weft_firewall_in_place", 0), ("weft_problems", 1), ("weft_ready", 0)] {
        measures(&lab, 0, name, value)?;
    }
    // Once it is there, nothing is wrong any more.
    choose_kind(programs.path(), "nft")?;
    for (name, value) in [("weft_firewall_in_place", 1), ("weft_problems", 0), ("weft_ready", 1)] {
        measures(&lab, 0, name, value)?;
    }
    lab.remove()
}

/// So that whatever bridge comes later is before it.
const LAST_METRIC: u64 = u32::MAX as u64 - 1;

/// The route that discards is there for whatever no bridge takes, and goes with the flag.
#[test]
fn a_blackhole_takes_what_no_bridge_does() -> Result<()> {
    let mut lab = hosts(2)?;
    dual_stack(&lab)?;
    bring_up(&mut lab, &["--ip-blackhole-route", "--iptables-resync=1"])?;
    let host = NetNs::open(lab.host(0).netns.name());
    let subnets = lab.status(0)?.subnets;
    assert_eq!(subnets.len(), 2);
    let family = |subnet: &IpNetwork| if subnet.is_ipv6() { "-6" } else { "-4" };
    let metrics = |subnet: &IpNetwork| -> Result<Vec<u64>> {
        let routes = host.ip_json(&[family(subnet), "route", "show", "type", "blackhole"])?;
        let routes = routes.as_array().context("no list of routes")?;
        let to_it = routes.iter().filter(|route| route["dst"] == subnet.to_string());
        Ok(to_it.map(|route| route["metric"].as_u64().unwrap_or(0)).collect())
    };
    let there = |subnet: &IpNetwork| Ok(!metrics(subnet)?.is_empty());
    pings(&lab)?;
    for subnet in &subnets {
        assert!(there(subnet)?);
        host.ip(&[family(subnet), "route", "del", "blackhole", &subnet.to_string()])?;
        until("it is back", || there(subnet))?;
        // As flannel leaves it, before any bridge that is made later.
        host.ip(&[family(subnet), "route", "append", "blackhole", &subnet.to_string()])?;
    }
    until("flannel's is gone", || {
        let metrics = subnets.iter().map(&metrics);
        Ok(metrics.collect::<Result<Vec<_>>>()?.concat() == [LAST_METRIC; 2])
    })?;
    restart(&mut lab, 0, &[])?;
    for subnet in &subnets {
        assert!(!there(subnet)?);
    }
    lab.remove()
}

#[test]
fn bad_values_are_refused() -> Result<()> {
    let netns = NetNs::create(format!("weft-fw-{}", std::process::id()))?;
    for (flag, told) in
        [("--firewall=ipfw", "auto, iptables, nftables"), ("--iptables-resync=0", "1 to 86400")]
    {
        let (code, stderr) = run_weftd(&netns, &[flag])?;
        assert_eq!(code, Some(2));
        assert!(stderr.contains(told), "{stderr}");
    }
    netns.remove()
}
