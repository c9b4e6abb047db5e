//! The lab's namespaces and what is in them, made with iproute2.

use std::fs;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::path::{Path, PathBuf};

use anyhow::Context;
use ipnetwork::IpNetwork;
use weft_control::subnet_env::SubnetEnv;

use crate::netns::NetNs;

/// Hosts are numbered through the underlay's /24, from .94 on.
pub(super) const MAX_HOSTS: usize = 160;

/// Router switches of the host namespaces; a kernel without IPv6 lacks the second.
const FORWARDING: [&str; 2] =
    ["/proc/sys/net/ipv4/ip_forward", "/proc/sys/net/ipv6/conf/all/forwarding"];

/// What has a router tell its neighbours of shorter ways; either is enough.
const SEND_REDIRECTS: [&str; 2] =
    ["/proc/sys/net/ipv4/conf/all/send_redirects", "/proc/sys/net/ipv4/conf/eth0/send_redirects"];

/// The bridge that a container runtime makes on a host.
const DOCKER0: &str = "docker0";

/// The address family of the hosts' network.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Underlay {
    /// 10.168.0.0/24
    Ipv4,
    /// fd00:168::/64
    Ipv6,
}

/// A host on the switch.
#[derive(Debug)]
pub struct Host {
    /// Where it lives; `eth0` leads to the switch.
    pub netns: NetNs,
    /// The address of `eth0`.
    pub address: IpAddr,
    /// The daemon's `--run-dir`.
    pub run_dir: PathBuf,
    /// The daemon's `--state-dir`.
    pub state_dir: PathBuf,
    /// The daemon's `--subnet-file`.
    pub subnet_file: PathBuf,
    /// Where the daemon's output goes, over restarts too.
    pub log: PathBuf,
}

/// A container behind a host.
#[derive(Debug)]
pub struct Container {
    /// Where it lives; `eth0` leads to the host's `docker0`.
    pub netns: NetNs,
    /// The addresses of `eth0`, IPv4 first.
    pub addresses: Vec<IpNetwork>,
    /// The MTU of `eth0`.
    pub mtu: u32,
}

impl Container {
    /// The address by which other containers reach it.
    ///
    /// # Errors
    /// It has none.
    pub fn address(&self) -> anyhow::Result<IpAddr> {
        let first = self.addresses.first().context("the container has no address")?;
        Ok(first.ip())
    }
}

/// Makes the switch: nothing but a bridge.
pub(super) fn make_switch(name: String) -> anyhow::Result<NetNs> {
    let switch = NetNs::create(name)?;
    switch.ip(&["link", "set", "lo", "up"])?;
    switch.ip(&["link", "add", "br0", "type", "bridge"])?;
    switch.ip(&["link", "set", "br0", "up"])?;
    Ok(switch)
}

/// Makes host `number` (from 1) and plugs it into the switch; its files go to `directory`.
pub(super) fn make_host(
    switch: &NetNs,
    name: String,
    number: usize,
    address: IpAddr,
    directory: &Path,
) -> anyhow::Result<Host> {
    let directory = directory.join(format!("h{number}"));
    let run_dir = directory.join("run");
    let host = Host {
        netns: NetNs::create(name)?,
        address,
        state_dir: directory.join("state"),
        subnet_file: run_dir.join("subnet.env"),
        log: directory.join("weftd.log"),
        run_dir,
    };
    for path in [&host.run_dir, &host.state_dir] {
        fs::create_dir_all(path).with_context(|| format!("cannot make {}", path.display()))?;
    }
    let netns = &host.netns;
    host.netns.run(|| set_forwarding(netns.name()))??;
    plug(switch, "br0", &format!("h{number}"), netns, None)?;
    add_address(netns, &on_the_switch(address)?, "eth0")?;
    netns.ip(&["link", "set", "eth0", "up"])?;
    // On-link, so that there is a default route to choose the interface by, and no router.
    let family = if address.is_ipv6() { "-6" } else { "-4" };
    netns.ip(&[family, "route", "add", "default", "dev", "eth0"])?;
    Ok(host)
}

/// Makes the namespace of etcd member `number` (from 1) and plugs it into the switch.
pub(super) fn make_etcd(
    switch: &NetNs,
    name: String,
    number: usize,
    address: IpAddr,
) -> anyhow::Result<NetNs> {
    plug_in(switch, name, &format!("e{number}"), &[on_the_switch(address)?])
}

/// Makes a router of one leg, which is plugged into the switch.
pub(super) fn make_router(
    switch: &NetNs,
    name: String,
    addresses: &[IpNetwork],
) -> anyhow::Result<NetNs> {
    let router = plug_in(switch, name, "r", addresses)?;
    router.run(|| {
        set_forwarding(router.name())?;
        // It would tell those who share its wire that they need no router.
        set_all(SEND_REDIRECTS, "0", router.name())
    })??;
    Ok(router)
}

/// Makes a namespace whose `eth0` leads to this port of the switch.
fn plug_in(
    switch: &NetNs,
    name: String,
    port: &str,
    addresses: &[IpNetwork],
) -> anyhow::Result<NetNs> {
    let netns = NetNs::create(name)?;
    plug(switch, "br0", port, &netns, None)?;
    addresses.iter().try_for_each(|address| add_address(&netns, address, "eth0"))?;
    netns.ip(&["link", "set", "eth0", "up"])?;
    Ok(netns)
}

/// Makes a container behind host `number` as docker does with `--bip` and `--mtu`.
pub(super) fn make_container(
    host: &Host,
    name: String,
    number: usize,
) -> anyhow::Result<Container> {
    let env = SubnetEnv::read(&host.subnet_file).map_err(anyhow::Error::msg)?;
    let addresses = env.gateways.iter().map(|gateway| first_container(*gateway));
    let container = Container {
        addresses: addresses.collect::<anyhow::Result<_>>()?,
        netns: NetNs::create(name)?,
        mtu: env.mtu,
    };
    let mtu = env.mtu.to_string();
    host.netns.ip(&["link", "add", DOCKER0, "mtu", &mtu, "type", "bridge"])?;
    for gateway in &env.gateways {
        add_address(&host.netns, gateway, DOCKER0)?;
    }
    host.netns.ip(&["link", "set", DOCKER0, "up"])?;

    let netns = &container.netns;
    plug(&host.netns, DOCKER0, &format!("c{number}"), netns, Some(&mtu))?;
    for address in &container.addresses {
        add_address(netns, address, "eth0")?;
    }
    netns.ip(&["link", "set", "eth0", "up"])?;
    for gateway in &env.gateways {
        let gateway = gateway.ip().to_string();
        netns.ip(&["route", "add", "default", "via", &gateway])?;
    }
    Ok(container)
}

/// Lays a cable from the bridge `bridge` of `from`, where the port is called `port`, to `eth0` of
/// `to`. Both ends are made inside their namespaces: no device appears anywhere else.
fn plug(
    from: &NetNs,
    bridge: &str,
    port: &str,
    to: &NetNs,
    mtu: Option<&str>,
) -> anyhow::Result<()> {
    let mtu: Vec<&str> = mtu.map_or(Vec::new(), |mtu| vec!["mtu", mtu]);
    let near = [&["link", "add", port], mtu.as_slice(), &["type", "veth"]].concat();
    let far = [&["peer", "name", "eth0"], mtu.as_slice(), &["netns", to.name()]].concat();
    from.ip(&[near, far].concat())?;
    from.ip(&["link", "set", port, "master", bridge])?;
    from.ip(&["link", "set", port, "up"])?;
    to.ip(&["link", "set", "lo", "up"])
}

fn add_address(netns: &NetNs, address: &IpNetwork, device: &str) -> anyhow::Result<()> {
    let text = address.to_string();
    let mut arguments = vec!["address", "add", &text, "dev", device];
    if address.is_ipv6() {
        // Usable at once: nobody else can have it here.
        arguments.push("nodad");
    }
    netns.ip(&arguments)
}

fn set_forwarding(name: &str) -> anyhow::Result<()> {
    set_all(FORWARDING, "1", name)
}

/// Sets those of these switches that there are.
fn set_all(paths: [&str; 2], value: &str, name: &str) -> anyhow::Result<()> {
    for path in paths.into_iter().filter(|path| Path::new(path).exists()) {
        fs::write(path, value).with_context(|| format!("cannot set {path} in {name}"))?;
    }
    Ok(())
}

/// Below the hosts'.
pub(super) fn etcd_address(underlay: Underlay, number: usize) -> anyhow::Result<IpAddr> {
    let last = u8::try_from(number).context("too many members of etcd")?;
    Ok(underlay_address(underlay, last))
}

pub(super) fn host_address(underlay: Underlay, number: usize) -> anyhow::Result<IpAddr> {
    let last = u8::try_from(93 + number).context("too many hosts")?;
    Ok(underlay_address(underlay, last))
}

fn underlay_address(underlay: Underlay, last: u8) -> IpAddr {
    match underlay {
        Underlay::Ipv4 => Ipv4Addr::new(10, 168, 0, last).into(),
        Underlay::Ipv6 => Ipv6Addr::new(0xfd00, 0x168, 0, 0, 0, 0, 0, last.into()).into(),
    }
}

fn on_the_switch(address: IpAddr) -> anyhow::Result<IpNetwork> {
    let len = if address.is_ipv6() { 64 } else { 24 };
    IpNetwork::new(address, len).context("no such length")
}

/// The address that the first container behind `gateway` gets.
fn first_container(gateway: IpNetwork) -> anyhow::Result<IpNetwork> {
    let next: Option<IpAddr> = match gateway.ip() {
        IpAddr::V4(ip) => u32::from(ip).checked_add(1).map(|bits| Ipv4Addr::from(bits).into()),
        IpAddr::V6(ip) => u128::from(ip).checked_add(1).map(|bits| Ipv6Addr::from(bits).into()),
    };
    next.filter(|address| gateway.contains(*address))
        .and_then(|address| IpNetwork::new(address, gateway.prefix()).ok())
        .with_context(|| format!("{gateway} has no room for a container"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_container_follows_the_gateway() {
        let first = |gateway: &str| first_container(gateway.parse().unwrap());
        assert_eq!(first("10.42.7.1/24").unwrap().to_string(), "10.42.7.2/24");
        assert_eq!(first("fd00:42:0:7::1/64").unwrap().to_string(), "fd00:42:0:7::2/64");
        assert!(first("10.42.7.1/32").is_err());
        assert!(first("255.255.255.255/24").is_err());
    }
}
