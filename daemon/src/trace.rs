//! Which way a packet would take, found without sending one: from what the daemon knows and what the
//! kernel would do. `weft trace` asks for it.

use std::io::{self, Write};
use std::net::IpAddr;
use std::process::ExitCode;

use anyhow::{Context, bail};
use clap::Args;
use ipnetwork::IpNetwork;
use serde::{Deserialize, Serialize};
use weft_backends::netlink::Netlink;
use weft_control::firewall::Rules;
use weft_control::firewall::rules::Rule;

use crate::directories::Directories;
use crate::ip_forward;
use crate::output::{Output, joined};
use crate::socket::{self, Request};
use crate::status::{PeerStatus, Status};

/// Tell which route, peer, backend, MTU and rules a packet to an address would take; sends nothing.
///
/// Exit status: 0 if it would be delivered as far as this host can tell, else 1. Of several daemons
/// all are asked; those count that have the address in their overlay, or all if none has.
#[derive(Debug, Args)]
pub struct TraceArgs {
    /// Where the packet goes: an address, or a peer's name for the first one of its subnet.
    to: String,
    /// Where it comes from [default: an address of this host's subnet].
    #[arg(long, value_name = "IP")]
    from: Option<IpAddr>,
    /// How it is written; json is an array with one object a daemon.
    #[arg(short, long, value_enum, default_value_t)]
    output: Output,
}

/// Where a packet ends up, as far as one daemon is concerned.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Target {
    /// A container of this host.
    Local,
    /// A container of a peer.
    Peer,
    /// An address of the overlay that no peer has.
    Nobody,
    /// What the overlay has nothing to do with.
    Outside,
}

/// The way of one packet.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Trace {
    pub to: IpAddr,
    pub from: Option<IpAddr>,
    pub target: Target,
    /// Who gets it, if a peer does.
    pub peer: Option<PeerStatus>,
    pub backend: Option<String>,
    /// The device that the kernel would send it out of.
    pub device: Option<String>,
    /// The largest packet that goes through.
    pub mtu: Option<u32>,
    /// What weft's firewall rules do with it, chain by chain.
    pub rules: Vec<String>,
    /// Why it would not arrive.
    pub problems: Vec<String>,
}

/// Asks each daemon and writes the answers.
///
/// # Errors
/// No daemon runs, or one does not answer.
pub fn run(
    arguments: &TraceArgs,
    directories: &Directories,
    out: &mut dyn Write,
) -> anyhow::Result<ExitCode> {
    let to = match arguments.to.parse() {
        Ok(to) => to,
        Err(_) => address_of(&arguments.to, directories)?,
    };
    let request = Request::Trace { to, from: arguments.from };
    let answers = socket::ask_all::<Trace>(&directories.run_dir, &request)?;
    let traces = &answers.given;
    match arguments.output {
        Output::Json => writeln!(out, "{}", serde_json::to_string_pretty(traces)?)?,
        Output::Table => traces.iter().try_for_each(|trace| write_text(trace, out))?,
    }
    answers.complete()?;
    Ok(if arrives(traces) { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

/// The first address of the subnet of the peer with this name.
fn address_of(name: &str, directories: &Directories) -> anyhow::Result<IpAddr> {
    let answers = socket::ask_all::<Status>(&directories.run_dir, &Request::Status)?;
    let peers = answers.given.iter().flat_map(|daemon| &daemon.peers);
    let named = peers.filter(|peer| peer.name.as_deref() == Some(name));
    let found: Vec<IpNetwork> = named.filter_map(|peer| peer.subnets.first()).copied().collect();
    match found[..] {
        [subnet] => Ok(subnet.network()),
        [] => {
            bail!("{name} is no address, and no peer is called so; `weft status` lists the peers")
        }
        _ => bail!("{} peers are called {name}; give an address of the one's subnet", found.len()),
    }
}

/// Judged by the daemons whose overlay has the address; by all of them if none does.
fn arrives(traces: &[Trace]) -> bool {
    let is_carried = |trace: &&Trace| trace.target != Target::Outside;
    let is_well = |trace: &Trace| trace.problems.is_empty();
    let mut carried = traces.iter().filter(is_carried).peekable();
    if carried.peek().is_some() { carried.all(is_well) } else { traces.iter().all(is_well) }
}

fn write_text(trace: &Trace, out: &mut dyn Write) -> io::Result<()> {
    let from = trace.from.map(|from| format!("{from} → ")).unwrap_or_default();
    let target = match (trace.target, &trace.peer) {
        (Target::Peer, Some(peer)) => {
            let subnets = joined(&peer.subnets, " ");
            let name = peer.name.as_ref().map(|name| format!(" ({name})")).unwrap_or_default();
            format!("{subnets} of the peer {}{name}, {}", peer.public_ip, peer.way)
        }
        (Target::Local, _) => "a container of this host".into(),
        (Target::Nobody, _) | (Target::Peer, None) => "the overlay, but no peer has it".into(),
        (Target::Outside, _) => "outside of the overlay".into(),
    };
    writeln!(out, "{from}{}: {target}", trace.to)?;
    let mtu = trace.mtu.map(|mtu| mtu.to_string());
    for (name, value) in [("backend", &trace.backend), ("device", &trace.device), ("MTU", &mtu)] {
        if let Some(value) = value {
            writeln!(out, "  {name:<8} {value}")?;
        }
    }
    trace.rules.iter().try_for_each(|rule| writeln!(out, "  {:<8} {rule}", "rule"))?;
    trace.problems.iter().try_for_each(|problem| writeln!(out, "  {:<8} {problem}", "PROBLEM"))
}

/// Finds the way. Asks the kernel, so it blocks.
///
/// # Errors
/// netlink failed.
pub(crate) fn trace(
    status: &Status,
    rules: Option<&Rules>,
    to: IpAddr,
    from: Option<IpAddr>,
) -> anyhow::Result<Trace> {
    let netlink = Netlink::open().context("cannot open a netlink socket")?;
    // None where there is not even a default route.
    let way = netlink.way_out(to).unwrap_or_default();
    let mut links = netlink.links()?.into_iter();
    let device = links.find(|link| Some(link.index) == way.link).map(|link| link.name);
    let kernel = Kernel { device, gateway: way.gateway };
    let mut trace = follow(status, rules, to, from, kernel);
    if trace.target != Target::Outside && ip_forward::off(to.is_ipv6(), "all").is_some() {
        trace.problems.push("this host does not forward packets; see `weft doctor`".into());
    }
    Ok(trace)
}

/// What the kernel would do with the packet.
#[derive(Debug, Default)]
struct Kernel {
    /// It leaves by this.
    device: Option<String>,
    /// It is handed to this router.
    gateway: Option<IpAddr>,
}

fn follow(
    status: &Status,
    rules: Option<&Rules>,
    to: IpAddr,
    from: Option<IpAddr>,
    kernel: Kernel,
) -> Trace {
    let own = status.subnets.iter().find(|subnet| subnet.is_ipv6() == to.is_ipv6());
    let from = from.or(own.map(|subnet| subnet.network()));
    let (target, peer) = target(status, to);
    let problems = problems(status, to, (target, peer), &kernel);
    let rules = rules.zip(from).map_or_else(Vec::new, |(rules, from)| verdicts(rules, from, to));
    let mtu = peer.and(status.mtu);
    let backend = peer.and_then(|_| status.backend.clone());
    let (peer, device) = (peer.cloned(), kernel.device);
    Trace { to, from, target, peer, backend, device, mtu, rules, problems }
}

/// By the longest prefix, as the packet engine and the kernel do it.
fn target(status: &Status, to: IpAddr) -> (Target, Option<&PeerStatus>) {
    let peers = status.peers.iter().flat_map(|peer| {
        let covering = peer.subnets.iter().filter(|subnet| subnet.contains(to));
        covering.map(move |subnet| (subnet.prefix(), Some(peer)))
    });
    let own = status.subnets.iter().filter(|subnet| subnet.contains(to));
    let own = own.map(|subnet| (subnet.prefix(), None));
    match peers.chain(own).max_by_key(|(prefix, _)| *prefix) {
        Some((_, Some(peer))) => (Target::Peer, Some(peer)),
        Some((_, None)) => (Target::Local, None),
        None if status.networks.iter().any(|network| network.contains(to)) => {
            (Target::Nobody, None)
        }
        None => (Target::Outside, None),
    }
}

/// Why it would not arrive.
fn problems(
    status: &Status,
    to: IpAddr,
    (target, peer): (Target, Option<&PeerStatus>),
    kernel: &Kernel,
) -> Vec<String> {
    let mut problems = Vec::new();
    if !status.forwards() {
        problems.push(format!("the daemon does not forward: {}", status.state));
    }
    if target == Target::Nobody {
        problems.push(match status.problem_of(|network| network.contains(to)) {
            Some(problem) => format!("a lease covers {to}, but packets do not go there: {problem}"),
            None => format!(
                "no lease that this host knows covers {to}; `weft registry show` lists all of them, \
                 and `weft status` says what is wrong with some"
            ),
        });
    }
    problems.extend(off_route(status, to, (target, peer), kernel));
    // Packets get there all the same where only its daemon has ended, or the probes are refused.
    let gets_there = |fault: &String| ["no-daemon", "echo-only"].contains(&fault.as_str());
    let unreached = peer.filter(|it| !it.probe.fault.as_ref().is_some_and(gets_there));
    let probe = unreached.and_then(|peer| Some((peer.public_ip, peer.probe.problem.as_ref()?)));
    problems.extend(probe.map(|(peer, problem)| format!("the peer {peer}: {problem}")));
    problems
}

/// What is wrong with where the kernel would send it.
fn off_route(
    status: &Status,
    to: IpAddr,
    (target, peer): (Target, Option<&PeerStatus>),
    kernel: &Kernel,
) -> Option<String> {
    let Some(device) = &kernel.device else {
        return Some(format!("the kernel has no route to {to}"));
    };
    let expected: Vec<&String> = match (target, peer) {
        (Target::Peer, Some(peer)) if peer.way == "direct" => status.interface.iter().collect(),
        (Target::Peer, _) => status.devices().collect(),
        (Target::Local | Target::Nobody | Target::Outside, _) => Vec::new(),
    };
    match expected.first() {
        Some(first) if !expected.contains(&device) => Some(format!(
            "the kernel sends it out of {device}, not {first}: another route comes first; see `ip \
             route get {to}`"
        )),
        None if target == Target::Local && is_way_out(status, device) => Some(format!(
            "the kernel sends it out of {device}, away from this host: no bridge here has {to}'s \
             subnet; see `weft doctor` on docker0"
        )),
        Some(_) | None => peer.and_then(|peer| stolen(peer, to, kernel.gateway)),
    }
}

/// Who gets what is for a peer that packets go to unwrapped, if not the peer.
fn stolen(peer: &PeerStatus, to: IpAddr, gateway: Option<IpAddr>) -> Option<String> {
    let public = peer.public_ip;
    // Of two families the IPv6 address is not told.
    let is_told = !to.is_ipv6() || public.is_ipv6();
    if peer.way != "direct" || !is_told || gateway == Some(public) {
        return None;
    }
    let next = gateway.map_or("to nobody in particular".into(), |ip| format!("by way of {ip}"));
    Some(format!(
        "the kernel sends it {next}, not by way of the peer's {public}: another route took the place \
         of weft's; see `ip route get {to}`"
    ))
}

/// Whether it leads to other hosts.
fn is_way_out(status: &Status, device: &str) -> bool {
    let mut ways = status.devices().chain(&status.interface);
    ways.any(|way| way == device)
}

/// What each chain does with it.
fn verdicts(rules: &Rules, from: IpAddr, to: IpAddr) -> Vec<String> {
    if from.is_ipv6() != to.is_ipv6() {
        return Vec::new();
    }
    let family = rules.family(to.is_ipv6());
    let chains = [("forward", &family.forward), ("postrouting", &family.postrouting)];
    chains.map(|(chain, rules)| verdict(chain, rules, from, to)).into()
}

/// What the first rule of a chain that the packet matches does with it.
fn verdict(chain: &str, rules: &[Rule], from: IpAddr, to: IpAddr) -> String {
    match rules.iter().find(|rule| rule.takes(from, to)) {
        Some(rule) => format!("{chain}: {rule}"),
        None => format!("{chain}: none of weft's takes it"),
    }
}

#[cfg(test)]
mod tests {
    use weft_control::NetworkConfig;
    use weft_control::firewall::rules::Switches;
    use weft_control::lease::LeaseKey;

    use super::*;

    fn status() -> Status {
        let peer = PeerStatus::example;
        Status {
            state: "forwarding".into(),
            networks: vec!["10.42.0.0/16".parse().unwrap()],
            subnets: vec!["10.42.1.0/24".parse().unwrap()],
            device: Some("flannel.1".into()),
            interface: Some("eth0".into()),
            mtu: Some(1450),
            peers: vec![
                peer("192.0.2.2", "10.42.2.0/24", "tunnel"),
                peer("192.0.2.3", "10.42.3.0/24", "direct"),
            ],
            ..Status::default()
        }
    }

    /// vxlan has a device for each family.
    #[test]
    fn the_other_familys_device_is_as_good() {
        let mut status = status();
        status.other_devices = vec!["flannel-v6.1".into()];
        status.peers[0].subnets.push("fd00:42:0:2::/64".parse().unwrap());
        let follow = |device: &str| {
            let to = "fd00:42:0:2::9".parse().unwrap();
            let kernel = Kernel { device: Some(device.into()), ..Kernel::default() };
            follow(&status, None, to, None, kernel).problems
        };
        assert_eq!(follow("flannel-v6.1"), Vec::<String>::new());
        assert!(follow("eth0")[0].contains("out of eth0, not flannel.1"));
    }

    fn traced(to: &str, device: &str) -> Trace {
        // Of the peer that packets go to unwrapped.
        traced_by(to, device, "192.0.2.3")
    }

    fn traced_by(to: &str, device: &str, gateway: &str) -> Trace {
        let config: NetworkConfig = r#"{"Network":"10.42.0.0/16"}"#.parse().unwrap();
        let key: LeaseKey = "10.42.1.0-24".parse().unwrap();
        let switches = Switches { masquerade: true, forward: true, random_fully: true };
        let rules = Rules::new(&config, &key, switches, None);
        let device = (!device.is_empty()).then(|| device.to_owned());
        let kernel = Kernel { device, gateway: gateway.parse().ok() };
        follow(&status(), Some(&rules), to.parse().unwrap(), None, kernel)
    }

    #[test]
    fn each_target_has_its_way() {
        let tunnel = traced("10.42.2.9", "flannel.1");
        assert_eq!(tunnel.target, Target::Peer);
        assert_eq!(tunnel.peer.unwrap().public_ip, IpAddr::from([192, 0, 2, 2]));
        assert_eq!(tunnel.problems, Vec::<String>::new());
        assert_eq!(tunnel.mtu, Some(1450));
        let accepted = [
            "forward: accept from 10.42.0.0/16",
            "postrouting: leave alone from \
            10.42.1.0/24 to 10.42.0.0/16",
        ];
        assert_eq!(tunnel.rules, accepted);
        assert_eq!(traced("10.42.3.9", "eth0").problems, Vec::<String>::new());
        assert_eq!(traced("10.42.1.9", "docker0").target, Target::Local);
        let outside = traced("8.8.8.8", "eth0");
        assert_eq!(outside.target, Target::Outside);
        assert_eq!(
            outside.rules[1],
            "postrouting: masquerade from 10.42.0.0/16 not to 224.0.0.0/4"
        );
    }

    #[test]
    fn what_is_in_the_way_is_told() {
        let first = |trace: Trace| trace.problems[0].clone();
        assert!(first(traced("10.42.9.9", "flannel.1")).contains("no lease"));
        assert!(first(traced("10.42.2.9", "eth1")).contains("out of eth1, not flannel.1"));
        assert!(first(traced("10.42.2.9", "")).contains("no route to 10.42.2.9"));
        assert!(first(traced("10.42.1.9", "flannel.1")).contains("away from this host"));
        assert!(first(traced("10.42.1.9", "eth0")).contains("away from this host"));
        let stolen = first(traced_by("10.42.3.9", "eth0", "192.0.2.9"));
        assert!(stolen.contains("by way of 192.0.2.9, not by way of the peer's 192.0.2.3"));
        assert!(first(traced_by("10.42.3.9", "eth0", "")).contains("to nobody in particular"));
        let mut status = status();
        let problem = "cannot be reached: its host does not answer at all";
        status.peers[0].probe.problem = Some(problem.into());
        let to = "10.42.2.9".parse().unwrap();
        let by_device = || Kernel { device: Some("flannel.1".into()), ..Kernel::default() };
        let silent = follow(&status, None, to, None, by_device());
        assert_eq!(silent.problems, [format!("the peer 192.0.2.2: {problem}")]);
        let refusal = "route replace 10.42.9.0/24 via 192.0.2.9: no such way";
        status.problems = vec![refusal.into()];
        let to = "10.42.9.9".parse().unwrap();
        let refused = follow(&status, None, to, None, by_device());
        assert!(refused.problems[0].ends_with(&format!("do not go there: {refusal}")));
    }

    #[test]
    fn a_daemon_that_has_nothing_to_do_with_it_does_not_make_it_arrive() {
        let outside = traced("8.8.8.8", "eth0");
        let (well, ill) = (traced("10.42.2.9", "flannel.1"), traced("10.42.2.9", "eth1"));
        assert!(arrives(&[outside.clone(), well.clone()]));
        assert!(!arrives(&[outside.clone(), ill.clone()]));
        assert!(!arrives(&[well, ill]));
        assert!(arrives(&[outside]));
        assert!(!arrives(&[traced("8.8.8.8", "")]));
    }
}
