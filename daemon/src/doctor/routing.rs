//! Links, addresses and routes that keep packets from where they belong.

use std::net::IpAddr;

use ipnetwork::IpNetwork;
use weft_backends::netlink::KernelRoute;
use weft_control::lease::contains;

use super::check::Check;
use super::seen::Seen;
use crate::output::joined;
use crate::overlap;
use crate::status::{PeerStatus, Status};

/// The bridges that container runtimes make.
const BRIDGES: [&str; 3] = ["docker0", "cni0", "cbr0"];
/// RTPROT_KERNEL (rtnetlink(7)): the route that belongs to an address.
const BY_KERNEL: u8 = 2;

/// Whether packets to the peers leave by the interface that weft is bound to.
pub(super) fn interface(seen: &Seen) -> Option<Check> {
    let status = seen.status()?;
    let Some(name) = status.interface.as_deref() else {
        return Check::warn("none is chosen yet", format!("journalctl -u {} -n 20", seen.unit()));
    };
    let Some(link) = seen.link(name) else {
        return Check::fail(format!("{name} is gone"), seen.restart());
    };
    if !link.up {
        return Check::fail(format!("{name} is down"), format!("ip link set {name} up"));
    }
    for ip in status.peers.iter().map(|peer| peer.public_ip) {
        match seen.ways.get(&ip) {
            Some(Some(index)) if *index == link.index => {}
            Some(Some(index)) => {
                let other = seen.links.iter().find(|link| link.index == *index);
                let other = other.map_or("another interface", |link| &link.name);
                return Check::fail(
                    format!("weft sends from {name}, but the way to the peer {ip} is {other}"),
                    format!("systemctl cat {}   # give its weftd --iface {other}", seen.unit()),
                );
            }
            Some(None) => {
                let what = format!("there is no route to the peer {ip}");
                return Check::fail(what, format!("ip route get {ip}"));
            }
            None => {}
        }
    }
    let public = status.public_ip.map(|ip| ip.to_string()).unwrap_or_default();
    Check::ok(format!("{name}, known to others as {public}"))
}

/// Whether the containers' bridge has the address that subnet.env gives it.
pub(super) fn bridge(seen: &Seen) -> Option<Check> {
    let env = match seen.subnet_env.as_ref()? {
        Ok(env) => env,
        // A daemon that waits writes it when it no longer does.
        Err(_) if seen.waits() => return None,
        Err(reason) => return Check::warn(reason, seen.restart()),
    };
    let mut astray = None;
    for link in BRIDGES.iter().filter_map(|name| seen.link(name)) {
        let addresses = link.addresses.iter().filter(|address| !address.link_local);
        let addresses = addresses.map(|address| address.network);
        let name = &link.name;
        if addresses.clone().any(|address| env.gateways.contains(&address)) {
            if link.mtu > env.mtu {
                return Check::warn(
                    format!("{name} has the MTU {}, subnet.env says {}", link.mtu, env.mtu),
                    restart(name),
                );
            }
            return Check::ok(format!("{name} has the address of subnet.env"));
        }
        let found = joined(addresses, ", ");
        let what = format!(
            "{name} has {}, subnet.env says {}: no other host reaches its containers",
            if found.is_empty() { "no address" } else { &found },
            joined(&env.gateways, ", ")
        );
        astray = astray.or_else(|| Check::fail(what, restart(name)));
    }
    astray.or_else(|| Check::ok("there is no docker0 or cni0 yet"))
}

fn restart(bridge: &str) -> String {
    if bridge == "docker0" {
        "weft docker-opts && systemctl restart docker".into()
    } else {
        format!("weft cni > /etc/cni/net.d/10-weft.conflist && ip link delete {bridge}")
    }
}

/// Routes, or rules, that take packets for some node's containers elsewhere.
pub(super) fn stale_routes(seen: &Seen) -> Option<Check> {
    let status = seen.status()?;
    let peers: Vec<IpNetwork> =
        status.peers.iter().flat_map(|peer| peer.subnets.iter().copied()).collect();
    let is_ours = |route: &KernelRoute| {
        let is_weft = route.protocol == weft_backends::netlink::ROUTE_PROTOCOL;
        is_weft && peers.contains(&route.destination)
    };
    let is_behind_ours = |route: &KernelRoute| {
        let mut same = seen.routes.iter().filter(|it| it.destination == route.destination);
        same.any(|it| is_ours(it) && it.metric < route.metric)
    };
    let is_stale = |route: &&KernelRoute| {
        route.protocol != BY_KERNEL && !is_ours(route) && !is_behind_ours(route)
    };
    let stale = inside(seen).find(is_stale);
    match stale {
        None => match status.peers.iter().find_map(|peer| astray(seen, status, peer)) {
            None => Check::ok("none takes packets of the overlay elsewhere"),
            Some((what, cure)) => Check::fail(what, cure),
        },
        Some(route) => {
            let KernelRoute { destination, .. } = route;
            let what = format!(
                "the route to {destination}{} is no peer's, and takes packets of the overlay \
                 elsewhere",
                way(seen, route)
            );
            Check::fail(what, format!("ip route del {destination}{}", way(seen, route)))
        }
    }
}

/// Where else the kernel sends what is for a peer that is not reached: routes that discard, and rules, are in
/// no list of routes. And what shows it.
fn astray(seen: &Seen, status: &Status, peer: &PeerStatus) -> Option<(String, String)> {
    let subnet = peer.subnets.first().filter(|_| peer.probe.reachable == Some(false))?;
    let ip = subnet.network();
    let cure = format!("ip route get {ip}; ip rule   # and remove what comes before weft's route");
    let Some(index) = seen.ways.get(&ip)? else {
        return Some((format!("the kernel discards packets for the peer's {subnet}"), cure));
    };
    // A peer that is routed to directly is on whatever link its address is; of two families one may be.
    let may_be_direct = peer.way == "direct" || peer.subnets.len() > 1;
    let is_direct = may_be_direct && seen.ways.get(&peer.public_ip) == Some(&Some(*index));
    let mut ours = status.devices();
    let name = &seen.links.iter().find(|link| link.index == *index)?.name;
    let what =
        format!("packets for the peer's {subnet} leave by {name}, which is none of weft's ways");
    (!is_direct && !ours.any(|it| it == name)).then_some((what, cure))
}

/// Networks of this host that lie within the overlay's.
pub(super) fn overlap(seen: &Seen) -> Option<Check> {
    let status = seen.status()?;
    let networks = seen.networks();
    let inside_overlay = |ip: &IpAddr| networks.iter().any(|network| network.contains(*ip));
    if let Some(ip) = status.public_ip.filter(inside_overlay) {
        return Check::fail(
            format!("this host's own address {ip} lies in the overlay's Network"),
            format!("write another Network into the config in {}", status.registry),
        );
    }
    let connected = inside(seen).find(|route| route.protocol == BY_KERNEL);
    if let Some(route) = connected {
        let what = format!(
            "{} is a network of this host{} and lies in the overlay's Network: packets for \
             another node's containers end there",
            route.destination,
            way(seen, route)
        );
        let device = link_name(seen, route).unwrap_or("DEVICE");
        let cure = format!("ip address flush dev {device} to {}", route.destination);
        return Check::fail(what, cure);
    }
    let ours: Vec<&str> = status.devices().map(String::as_str).collect();
    // Before there is a device, nothing is known to be anywhere.
    if let (Some(config), Some(key), false) = (seen.config(), seen.lease_key(), ours.is_empty()) {
        let strays = overlap::strays(&config, &key, &seen.links, &ours);
        if let Some(stray) = strays.into_iter().next() {
            return Check::warn(stray, restart("docker0"));
        }
    }
    Check::ok("no network of this host lies in the overlay's")
}

/// Routes more special than the overlay's, and not into our own subnet.
fn inside(seen: &Seen) -> impl Iterator<Item = &KernelRoute> {
    let own = seen.subnets();
    seen.routes.iter().filter(move |route| {
        let to = route.destination;
        let mut networks = seen.networks().iter();
        networks.any(|net| contains(*net, to) && net.prefix() < to.prefix())
            && !own.iter().any(|subnet| contains(*subnet, to))
    })
}

fn link_name<'a>(seen: &'a Seen, route: &KernelRoute) -> Option<&'a str> {
    let link = seen.links.iter().find(|link| Some(link.index) == route.link)?;
    Some(&link.name)
}

/// As `ip route` writes it: " via 192.0.2.1 dev eth0".
fn way(seen: &Seen, route: &KernelRoute) -> String {
    let gateway = route.gateway.map(|ip| format!(" via {ip}")).unwrap_or_default();
    let link = link_name(seen, route).map(|name| format!(" dev {name}")).unwrap_or_default();
    gateway + &link
}
