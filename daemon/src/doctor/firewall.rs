//! What firewalls do with the overlay's packets.

use ipnetwork::IpNetwork;

use super::check::Check;
use super::seen::{Chain, Filter, Seen};

/// Whether bridged packets go through iptables too, where nothing would let them pass.
pub(super) fn br_netfilter(seen: &Seen) -> Option<Check> {
    match seen.sysctl("net/bridge/bridge-nf-call-iptables") {
        None => Check::ok("not loaded"),
        Some("0") => Check::ok("bridged packets do not go through iptables"),
        Some(_) => match blocking(seen).next() {
            None => Check::ok("bridged packets go through iptables, which lets them pass"),
            Some(filter) => Check::fail(
                format!(
                    "packets between containers of one bridge go through {}'s FORWARD, which drops \
                     them",
                    filter.program
                ),
                "sysctl -w net.bridge.bridge-nf-call-iptables=0",
            ),
        },
    }
}

/// Whether some chain drops forwarded packets that no rule knows, and ours among them.
pub(super) fn forward(seen: &Seen) -> Option<Check> {
    if let Some(filter) = blocking(seen).next() {
        let program = &filter.program;
        return Check::fail(
            format!("{program}'s chain FORWARD drops by its policy, and no rule lets ours pass"),
            format!("{program} -P FORWARD ACCEPT"),
        );
    }
    let mut others = seen.chains.iter().filter(|chain| chain.hook == "forward");
    let is_foreign = |chain: &&Chain| {
        let matters = seen.networks().is_empty() || seen_by(chain, seen).is_some();
        chain.table != "weft" && chain.policy == "drop" && !is_of_iptables(seen, chain) && matters
    };
    if let Some(chain) = others.find(is_foreign) {
        let name = format!("{} {} {}", chain.family, chain.table, chain.name);
        let what = format!("nftables' chain {name} drops by its policy what its rules do not know");
        let network = seen_by(chain, seen);
        let family = if network.is_some_and(IpNetwork::is_ipv6) { "ip6" } else { "ip" };
        let network = network.map(ToString::to_string).unwrap_or_default();
        let cure = format!("nft insert rule {name} {family} daddr {network} accept");
        return Check::warn(what, cure);
    }
    if of_our_families(seen).any(|filter| filter.drops) {
        return Check::ok("drops by its policy; weft's rules let the overlay's packets pass");
    }
    Check::ok("accepts by its policy")
}

/// The first of the overlay's networks whose packets get to this chain.
fn seen_by<'a>(chain: &Chain, seen: &'a Seen) -> Option<&'a IpNetwork> {
    seen.networks().iter().find(|network| match chain.family.as_str() {
        "ip" => network.is_ipv4(),
        "ip6" => network.is_ipv6(),
        _ => true,
    })
}

/// Whether it is a chain that iptables shows too; those are judged by what it shows.
fn is_of_iptables(seen: &Seen, chain: &Chain) -> bool {
    let is_shown = |filter: &Filter| {
        let family = if filter.ipv6 { "ip6" } else { "ip" };
        chain.family == family && !filter.program.ends_with("-legacy")
    };
    (chain.table.as_str(), chain.name.as_str()) == ("filter", "FORWARD")
        && seen.filters.iter().any(is_shown)
}

/// Whether weft's own rules stand, and stay.
pub(super) fn rules(seen: &Seen) -> Option<Check> {
    let status = seen.status()?;
    let Some(by) = status.firewall.as_deref() else {
        return Check::ok("none are asked for");
    };
    let wants_forward = seen.settings().is_none_or(|settings| settings.switches.forward);
    let is_there = if by == "nftables" {
        seen.chains.iter().any(|chain| chain.table == "weft")
    } else {
        !wants_forward || of_our_families(seen).any(|filter| filter.passes_ours)
    };
    if !is_there {
        return Check::fail(
            format!("weft's rules, written by {by}, are gone"),
            seen.restart() + "   # and stop what flushes them",
        );
    }
    match status.firewall_repairs {
        0 => Check::ok(format!("written by {by}")),
        times => Check::warn(
            format!("somebody removed weft's rules; they were put back {times} times"),
            "nft monitor   # shows who changes rules; let it leave weft's alone",
        ),
    }
}

/// Whether firewalld runs and would reject what is forwarded to and from containers.
pub(super) fn firewalld(seen: &Seen) -> Option<Check> {
    let Some(table) = &seen.firewalld else {
        return Check::ok("not running");
    };
    let network = seen.networks().first()?;
    let source = network.to_string();
    let device = seen.status().and_then(|status| status.device.as_deref());
    let trusts = |line: &str, whom: &str| {
        let mut words = line.split_whitespace().map(|word| word.trim_matches('"'));
        line.contains("trusted") && words.any(|word| word == whom)
    };
    for whom in device.into_iter().chain([source.as_str()]) {
        if table.lines().any(|line| trusts(line, whom)) {
            return Check::ok(format!("trusts {whom}"));
        }
    }
    Check::fail(
        format!("firewalld runs and does not trust {source}: it rejects what is forwarded"),
        format!(
            "firewall-cmd --permanent --zone=trusted --add-source={source} && firewall-cmd --reload"
        ),
    )
}

/// Whether Docker, from 28 on, lets packets from other hosts in to the containers behind its bridge.
pub(super) fn docker_lets_in(seen: &Seen) -> Option<Check> {
    let Some(Ok(env)) = &seen.subnet_env else {
        return None;
    };
    let is_ours = |name: &&String| {
        let addresses = seen.link(name).into_iter().flat_map(|link| &link.addresses);
        addresses.map(|it| it.network).any(|network| env.gateways.contains(&network))
    };
    for filter in of_our_families(seen) {
        let shut = filter.docker.shut.iter().find(is_ours);
        let raw = filter.docker.raw.iter().find(is_ours);
        let Some(bridge) = shut.or(raw) else { continue };
        let (program, from) = (&filter.program, of_the_overlay(seen, filter.ipv6));
        let accept = format!("{program} -I DOCKER-USER {from} -o {bridge} -j ACCEPT");
        let direct = "dockerd --allow-direct-routing   # from 28.2 on; in its unit, or daemon.json";
        let cures = [shut.map(|_| accept.as_str()), raw.map(|_| direct)];
        let what = format!("Docker drops what other hosts send to containers behind {bridge}");
        return Check::fail(what, cures.into_iter().flatten().collect::<Vec<_>>().join("; "));
    }
    Check::ok("none of its rules keeps other hosts from our containers")
}

/// What tells the overlay's packets from others in a rule: with udp-tun the device, since what comes
/// unwrapped is not to pass; else their source.
fn of_the_overlay(seen: &Seen, ipv6: bool) -> String {
    let status = seen.status().filter(|status| {
        let is_direct = status.peers.iter().any(|peer| peer.way != "tunnel");
        status.backend.as_deref() == Some("udp-tun") && !is_direct
    });
    if let Some(device) = status.and_then(|status| status.device.as_deref()) {
        return format!("-i {device}");
    }
    let network = seen.networks().iter().find(|network| network.is_ipv6() == ipv6);
    network.map(|network| format!("-s {network}")).unwrap_or_default()
}

fn of_our_families(seen: &Seen) -> impl Iterator<Item = &Filter> {
    let ipv6 = seen.networks().iter().any(|network| network.is_ipv6());
    seen.filters.iter().filter(move |filter| ipv6 || !filter.ipv6)
}

/// Those that drop the overlay's packets.
fn blocking(seen: &Seen) -> impl Iterator<Item = &Filter> {
    of_our_families(seen).filter(|filter| filter.drops && !filter.passes_ours)
}

#[cfg(test)]
mod tests {
    use weft_control::subnet_env::SubnetEnv;

    use super::super::seen::Daemon;
    use super::*;
    use crate::doctor::check::Verdict;
    use crate::status::Status;

    fn seen() -> Seen {
        let subnet_env = Some(Ok(SubnetEnv {
            networks: vec!["10.42.0.0/16".parse().unwrap()],
            gateways: vec!["10.42.7.1/24".parse().unwrap()],
            mtu: 1472,
            ip_masq: false,
        }));
        Seen { subnet_env, ..Seen::default() }
    }

    #[test]
    fn firewalld_that_does_not_know_the_overlay_is_told() {
        assert_eq!(firewalld(&seen()).unwrap().verdict, Verdict::Ok);
        let table = |text: &str| firewalld(&Seen { firewalld: Some(text.into()), ..seen() });
        let rejecting =
            table("chain filter_FORWARD {\n reject with icmpx admin-prohibited\n}").unwrap();
        assert_eq!(rejecting.verdict, Verdict::Fail);
        assert!(rejecting.cure.unwrap().contains("--add-source=10.42.0.0/16"));
        let trusting = table("ip saddr 10.42.0.0/16 goto filter_FORWARD_trusted").unwrap();
        assert_eq!(trusting.verdict, Verdict::Ok);
        for (zone, verdict) in [("trusted", Verdict::Ok), ("public", Verdict::Fail)] {
            let text = format!("iifname \"flannel0\" goto filter_FORWARD_{zone}");
            let seen = Seen { firewalld: Some(text), daemon: Some(daemon()), ..seen() };
            assert_eq!(firewalld(&seen).unwrap().verdict, verdict);
        }
    }

    fn daemon() -> Daemon {
        let status = Status { device: Some("flannel0".into()), ..Status::default() };
        Daemon { status, ..Daemon::default() }
    }

    #[test]
    fn a_foreign_chain_that_drops_is_told_and_iptables_is_not_taken_for_one() {
        let with = |family: &str, table: &str, name: &str, filters: &[Filter]| {
            let chain = Chain {
                family: family.into(),
                table: table.into(),
                name: name.into(),
                hook: "forward".into(),
                policy: "drop".into(),
            };
            forward(&Seen { chains: vec![chain], filters: filters.to_vec(), ..seen() })
                .unwrap()
                .verdict
        };
        let iptables = Filter {
            program: "iptables-nft".into(),
            drops: true,
            passes_ours: true,
            ..Filter::default()
        };
        let iptables = [iptables];
        assert_eq!(with("ip", "filter", "FORWARD", &iptables), Verdict::Ok);
        assert_eq!(with("inet", "mine", "forward", &iptables), Verdict::Warn);
        // As in the file that comes with Debian's nftables.
        assert_eq!(with("inet", "filter", "forward", &iptables), Verdict::Warn);
        assert_eq!(with("ip", "filter", "forward", &iptables), Verdict::Warn);
        assert_eq!(with("ip", "filter", "FORWARD", &[]), Verdict::Warn, "nobody judges it");
        assert_eq!(with("ip6", "mine", "forward", &[]), Verdict::Ok, "of no matter to IPv4");
    }

    #[test]
    fn a_foreign_chain_is_opened_to_the_family_that_it_sees() {
        let mut seen = seen();
        if let Some(Ok(env)) = &mut seen.subnet_env {
            env.networks.push("fd00:42::/48".parse().unwrap());
        }
        let mut cure = |family: &str| {
            let (table, name) = ("mine".into(), "forward".into());
            let (hook, policy) = ("forward".into(), "drop".into());
            seen.chains = vec![Chain { family: family.into(), table, name, hook, policy }];
            forward(&seen).unwrap().cure.unwrap()
        };
        assert!(cure("inet").ends_with(" ip daddr 10.42.0.0/16 accept"));
        assert!(cure("ip6").ends_with(" ip6 daddr fd00:42::/48 accept"));
    }
}
