//! Every pair of families inside {IPv4, IPv6, both} and outside {IPv4, IPv6}, for each backend:
//! pings, transfers, and what the registry, subnet.env and the firewall hold.

use std::fs;

use anyhow::{Context, Result};
use ipnetwork::IpNetwork;
use serde_json::Value;
use weft_daemon::lab::{
    Bytes, EtcdOptions, Lab, LabOptions, Patience, PingOptions, Underlay, ping, transfer,
};
use weft_daemon::netns::NetNs;
use weft_tests::{
    DEADLINE, all_acquainted, bring_up, dual_stack, etcd, hosts_of, reaches, tells, until,
    write_config, write_sysctl,
};

const IPV4: &str = "10.42.0.0/16";
const IPV6: &str = "fd00:42::/48";
const DUAL: &str = r#"{"EnableIPv6":true,"Network":"10.42.0.0/16","IPv6Network":"fd00:42::/48"}"#;

/// What containers have.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Inner {
    Ipv4,
    Ipv6,
    Both,
}

impl Inner {
    fn has(self, ipv6: bool) -> bool {
        self == Self::Both || (self == Self::Ipv6) == ipv6
    }
}

/// Two hosts with a container each.
fn lab(backend: &str, inner: Inner, underlay: Underlay) -> Result<Lab> {
    let network = if inner == Inner::Ipv6 { IPV6 } else { IPV4 };
    let mut lab = Lab::new(LabOptions {
        hosts: 2,
        backend: backend.into(),
        network: network.into(),
        underlay,
        ..LabOptions::default()
    })?;
    if inner == Inner::Both {
        write_config(&lab, DUAL)?;
    }
    bring_up(&mut lab, &[])?;
    Ok(lab)
}

/// flannel's key, and flannel's lines for container runtimes.
fn registry_and_subnet_env(lab: &Lab, inner: Inner, mtu: u32) -> Result<()> {
    let subnets = lab.status(0)?.subnets;
    let of = |ipv6: bool| subnets.iter().find(|net| net.is_ipv6() == ipv6);
    let dashed = |net: &IpNetwork| format!("{}-{}", net.network(), net.prefix());
    let ipv4 = of(false).map_or("0.0.0.0-0".into(), dashed);
    let key = of(true).map_or(ipv4.clone(), |net| format!("{ipv4}&{}", dashed(net)));
    assert!(lab.registry()?.join("subnets").join(&key).exists(), "no lease {key}");

    let gateway = |net: &IpNetwork| {
        let base = net.network().to_string();
        let base = base.strip_suffix('0').unwrap_or(&base).to_owned();
        format!("{base}1/{}", net.prefix())
    };
    let mut env = String::new();
    for (infix, ipv6, network) in [("", false, IPV4), ("IPV6_", true, IPV6)] {
        if let Some(net) = of(ipv6) {
            env += &format!("FLANNEL_{infix}NETWORK={network}\n");
            env += &format!("FLANNEL_{infix}SUBNET={}\n", gateway(net));
        }
    }
    env += &format!("FLANNEL_MTU={mtu}\nFLANNEL_IPMASQ=false\n");
    assert_eq!(fs::read_to_string(&lab.host(0).subnet_file)?, env);
    assert_eq!(subnets.len(), [false, true].iter().filter(|ipv6| inner.has(**ipv6)).count());
    Ok(())
}

fn rules(lab: &Lab, inner: Inner) -> Result<()> {
    for (program, ipv6, network) in [("iptables-save", false, IPV4), ("ip6tables-save", true, IPV6)]
    {
        let saved = lab.host(0).netns.tool(program, &["-t", "filter"])?;
        let rule = format!("-A FLANNEL-FWD -s {network} ");
        assert_eq!(saved.contains(&rule), inner.has(ipv6), "{program}: {saved}");
    }
    Ok(())
}

/// Both ways, by each of the addresses.
fn traffic(lab: &Lab) -> Result<()> {
    for (from, to) in [(0, 1), (1, 0)] {
        reaches(lab, from, to)?;
        let (from, to) = (lab.container(from)?, lab.container(to)?);
        for address in &to.addresses {
            let ip = address.ip();
            let moved = transfer(&from.netns, &to.netns, ip, Bytes(2 << 20), &Patience::default())?;
            assert!(moved.intact(), "{moved:?}");
        }
    }
    Ok(())
}

/// A container whose own link takes more learns from its host what passes: that, and not a byte more.
fn largest_packet(lab: &Lab, mtu: u32) -> Result<()> {
    let (from, to) = (lab.container(0)?, lab.container(1)?);
    let larger = (mtu + 200).to_string();
    let host = NetNs::open(lab.host(0).netns.name());
    for device in ["c1", "docker0"] {
        host.ip(&["link", "set", device, "mtu", &larger])?;
    }
    from.netns.ip(&["link", "set", "eth0", "mtu", &larger])?;
    for address in &to.addresses {
        // Of IP and ICMP.
        let headers = if address.is_ipv6() { 48 } else { 28 };
        let of = |packet: u32| -> Result<PingOptions> {
            let size = Some(u16::try_from(packet - headers)?);
            Ok(PingOptions { size, df: true, count: 2, ..PingOptions::default() })
        };
        let refused = ping(&from.netns, address.ip(), &of(mtu + 1)?)?;
        assert_eq!(refused.received, 0, "{address}: {refused:?}");
        let told = |line: &String| {
            line.split(|it: char| !it.is_ascii_digit()).any(|word| word == mtu.to_string())
        };
        assert!(refused.errors.iter().any(told), "{address}, {mtu}: {refused:?}");
        let passes = ping(&from.netns, address.ip(), &of(mtu)?)?;
        assert!(passes.complete(), "{address}, {mtu}: {passes:?}");
    }
    Ok(())
}

/// All of it.
fn every_pair(backend: &str, overhead: impl Fn(Underlay) -> u32) -> Result<()> {
    for underlay in [Underlay::Ipv4, Underlay::Ipv6] {
        for inner in [Inner::Ipv4, Inner::Ipv6, Inner::Both] {
            let mtu = 1500 - overhead(underlay);
            let checked = || -> Result<()> {
                let lab = lab(backend, inner, underlay)?;
                registry_and_subnet_env(&lab, inner, mtu)?;
                rules(&lab, inner)?;
                traffic(&lab)?;
                largest_packet(&lab, mtu)?;
                lab.remove()
            };
            checked().with_context(|| format!("{backend}: {inner:?} over {underlay:?}"))?;
        }
    }
    Ok(())
}

#[test]
fn udp_tun_carries_every_family_over_every_family() -> Result<()> {
    let overhead = |underlay| if underlay == Underlay::Ipv4 { 28 } else { 48 };
    every_pair("udp-tun", overhead)
}

#[test]
fn vxlan_carries_every_family_over_every_family() -> Result<()> {
    let overhead = |underlay| if underlay == Underlay::Ipv4 { 50 } else { 70 };
    every_pair("vxlan", overhead)
}

/// As where images are hardened, and the network card alone has IPv6 on.
#[test]
fn a_device_has_ipv6_where_the_host_has_it_off() -> Result<()> {
    for backend in ["udp-tun", "vxlan"] {
        let mut lab = hosts_of(backend, 2)?;
        write_config(&lab, DUAL)?;
        let host = NetNs::open(lab.host(0).netns.name());
        let disable = |which: &str, value: &str| -> Result<()> {
            write_sysctl(&host, &format!("net/ipv6/conf/{which}/disable_ipv6"), value)
        };
        let has_ipv6 = |device: &str| -> Result<bool> {
            let links = host.ip_json(&["-6", "address", "show", "dev", device])?;
            Ok(links.to_string().contains("fd00:42:"))
        };
        disable("default", "1")?;
        lab.start_daemon(0, &[])?;
        lab.wait_ready(0, DEADLINE)?;
        let device = lab.status(0)?.device.context("no device")?;
        assert!(has_ipv6(&device)?, "{backend}");
        // Containers' bridges are not weft's.
        disable("default", "0")?;
        lab.start_daemon(1, &[])?;
        lab.wait_ready(1, DEADLINE)?;
        for host in 0..2 {
            lab.attach_container(host)?;
        }
        all_acquainted(&lab)?;
        disable(&device, "1")?;
        until("it has it again", || has_ipv6(&device))?;
        assert!(lab.ping(0, 1, &PingOptions::default())?.complete());
        lab.remove()?;
    }
    Ok(())
}

/// Each of vxlan's devices is over one family of the underlay; they change while the daemon runs.
#[test]
fn a_family_that_comes_or_goes_brings_or_takes_its_device() -> Result<()> {
    let mut lab = lab("vxlan", Inner::Both, Underlay::Ipv6)?;
    let locals = |lab: &Lab, host: usize| -> Result<Vec<String>> {
        let links = lab.host(host).netns.ip_json(&["-details", "link", "show", "type", "vxlan"])?;
        let links = links.as_array().context("no list")?.iter();
        let local = |link: &Value| -> Result<String> {
            let data = &link["linkinfo"]["info_data"];
            let local = data["local"].as_str().or(data["local6"].as_str()).context("no local")?;
            Ok(format!("{} {local}", link["ifname"].as_str().context("no name")?))
        };
        let mut locals = links.map(local).collect::<Result<Vec<_>>>()?;
        locals.sort();
        Ok(locals)
    };
    let ipv6 = [0, 1].map(|host| lab.host(host).address);
    let ipv4 = ["10.168.0.94", "10.168.0.95"];
    assert_eq!(locals(&lab, 0)?, [format!("flannel.1 {}", ipv6[0])]);
    for host in 0..2 {
        let netns = &lab.host(host).netns;
        netns.ip(&["address", "add", &format!("{}/24", ipv4[host]), "dev", "eth0"])?;
        netns.ip(&["route", "add", "default", "dev", "eth0"])?;
        let wanted = [format!("flannel-v6.1 {}", ipv6[host]), format!("flannel.1 {}", ipv4[host])];
        until("both devices are there", || Ok(locals(&lab, host)? == wanted))
            .with_context(|| format!("{:?}", locals(&lab, host)))?;
    }
    traffic(&lab)?;
    lab.stop_daemon(0)?;
    lab.host(0).netns.ip(&["address", "flush", "dev", "eth0", "scope", "global"])?;
    let host = &lab.host(0).netns;
    host.ip(&["address", "add", &format!("{}/24", ipv4[0]), "dev", "eth0"])?;
    host.ip(&["route", "replace", "default", "dev", "eth0"])?;
    lab.start_daemon(0, &[])?;
    lab.wait_ready(0, DEADLINE)?;
    assert_eq!(locals(&lab, 0)?, [format!("flannel.1 {}", ipv4[0])]);
    // Each kernel takes what bears a device's own MAC only.
    tells(&lab, 0, "has a device for each family, and we have one for both")?;
    tells(&lab, 1, "publishes no address of")?;
    lab.remove()
}

/// The kernel has no IPv6 routes by way of IPv4 addresses, but hosts have link-local ones too.
#[test]
fn host_gw_carries_every_family_over_every_family() -> Result<()> {
    every_pair("host-gw", |_| 0)
}

/// One with an IPv6 address for everybody, one with a link-local one only.
#[test]
fn host_gw_carries_ipv6_between_hosts_of_different_families() -> Result<()> {
    let mut lab =
        Lab::new(LabOptions { hosts: 2, backend: "host-gw".into(), ..LabOptions::default() })?;
    write_config(&lab, DUAL)?;
    lab.host(0).netns.ip(&["address", "add", "fd00:168::94/64", "dev", "eth0", "nodad"])?;
    bring_up(&mut lab, &[])?;
    traffic(&lab)?;
    let gateway = |host: usize| -> Result<String> {
        let routes = lab.host(host).netns.ip_json(&["-6", "route", "show", "proto", "119"])?;
        let gateway = routes[0]["gateway"].as_str();
        Ok(gateway.with_context(|| format!("no route: {routes}"))?.to_owned())
    };
    assert!(gateway(0)?.starts_with("fe80:"), "{}", gateway(0)?);
    assert_eq!(gateway(1)?, "fd00:168::94");
    // As with a new MAC.
    let host = &lab.host(1).netns;
    host.ip(&["-6", "address", "flush", "dev", "eth0", "scope", "link"])?;
    host.ip(&["address", "add", "fe80::95/64", "dev", "eth0", "nodad"])?;
    until("the other host knows the new address", || Ok(gateway(0)? == "fe80::95"))?;
    traffic(&lab)?;
    // The kernel makes another one from the MAC.
    host.ip(&["link", "set", "eth0", "down"])?;
    host.ip(&["link", "set", "eth0", "up"])?;
    host.ip(&["route", "add", "default", "dev", "eth0"])?;
    until("the other host knows the next address", || {
        let next = gateway(0)?;
        Ok(next.starts_with("fe80:") && next != "fe80::95" && lab.status(1)?.problems.is_empty())
    })?;
    traffic(&lab)?;
    lab.remove()
}

/// One publishes its IPv6 address alone, the other one, having none, IPv4's.
#[test]
fn host_gw_carries_ipv6_alone_between_hosts_of_different_families() -> Result<()> {
    let mut lab = Lab::new(LabOptions {
        hosts: 2,
        backend: "host-gw".into(),
        network: IPV6.into(),
        ..LabOptions::default()
    })?;
    let host = &lab.host(0).netns;
    host.ip(&["address", "add", "fd00:168::94/64", "dev", "eth0", "nodad"])?;
    host.ip(&["-6", "route", "add", "default", "dev", "eth0"])?;
    bring_up(&mut lab, &[])?;
    traffic(&lab)?;
    lab.remove()
}

#[test]
fn host_gw_without_any_ipv6_says_what_it_lacks() -> Result<()> {
    let mut lab = Lab::new(LabOptions {
        hosts: 1,
        backend: "host-gw".into(),
        network: IPV6.into(),
        ..LabOptions::default()
    })?;
    lab.host(0).netns.tool("sysctl", &["-w", "net.ipv6.conf.eth0.disable_ipv6=1"])?;
    lab.start_daemon(0, &[])?;
    let error = format!("{:#}", lab.wait_ready(0, DEADLINE).unwrap_err());
    assert!(error.contains("host-gw needs an IPv6 address on eth0"), "{error}");
    lab.remove()
}

#[test]
fn udp_tun_with_a_link_local_address_alone_says_what_it_lacks() -> Result<()> {
    let mut lab = Lab::new(LabOptions { hosts: 1, network: IPV6.into(), ..LabOptions::default() })?;
    lab.host(0).netns.ip(&["-4", "address", "flush", "dev", "eth0"])?;
    lab.start_daemon(0, &["--iface=eth0"])?;
    let error = format!("{:#}", lab.wait_ready(0, DEADLINE).unwrap_err());
    assert!(error.contains("eth0 has no address that the backend can send from"), "{error}");
    lab.remove()
}

/// Where hosts have both families, one socket is enough: packets of both go by IPv4.
#[test]
fn udp_tun_sends_both_families_over_ipv4_where_there_are_both() -> Result<()> {
    let mut lab = Lab::new(LabOptions { hosts: 2, ..LabOptions::default() })?;
    dual_stack(&lab)?;
    for family in ["ipv4", "ipv6"] {
        let rule = format!("meta nfproto {family} udp dport 8285 counter");
        let chain = format!("chain {family} {{ type filter hook output priority 0; {rule}; }}");
        lab.host(0).netns.tool("nft", &[&format!("add table inet count {{ {chain}; }}")])?;
    }
    bring_up(&mut lab, &[])?;
    traffic(&lab)?;
    let counted = |family: &str| -> Result<bool> {
        let chain = ["list", "chain", "inet", "count", family];
        Ok(!lab.host(0).netns.tool("nft", &chain)?.contains("counter packets 0 "))
    };
    assert_eq!((counted("ipv4")?, counted("ipv6")?), (true, false));
    lab.remove()
}

/// IPv6 alone, etcd included. In flannel all such nodes would share one identity, 0.0.0.0.
#[test]
fn nodes_of_ipv6_alone_are_told_apart_in_etcd() -> Result<()> {
    let mut lab = Lab::new(LabOptions {
        hosts: 3,
        network: IPV6.into(),
        underlay: Underlay::Ipv6,
        etcd: EtcdOptions { members: 1, arguments: vec!["--enable-v2".into()], tls: false },
        ..LabOptions::default()
    })?;
    etcd::wait_until_it_serves(&lab)?;
    bring_up(&mut lab, &[])?;
    let mut seen = Vec::new();
    for host in 0..lab.hosts() {
        let status = lab.status(host)?;
        assert_eq!(status.public_ip, Some(lab.host(host).address));
        assert_eq!(status.problems, Vec::<String>::new());
        seen.push((status.node_id, status.subnets));
    }
    seen.sort();
    seen.dedup_by(|a, b| a.0 == b.0 || a.1 == b.1);
    assert_eq!(seen.len(), lab.hosts());
    let before = lab.status(0)?;
    lab.kill_daemon(0)?;
    lab.start_daemon(0, &[])?;
    lab.wait_ready(0, DEADLINE)?;
    assert_eq!(lab.status(0)?.subnets, before.subnets, "found again by its IPv6 address");
    let log = fs::read_to_string(&lab.host(0).log)?;
    assert!(log.contains("taking up the lease that is ours"), "{log}");
    traffic(&lab)?;
    lab.remove()
}
