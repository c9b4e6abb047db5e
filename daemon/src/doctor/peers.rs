//! What the daemon's probes of its peers came to.

use std::collections::HashSet;

use ipnetwork::IpNetwork;
use weft_backends::{BackendKind, Feature, FeatureState};
use weft_control::Lease;
use weft_control::lease::NodeRecord;
use weft_control::peers::untaken;

use super::check::Check;
use super::seen::Seen;
use crate::status::{PeerStatus, Status};

/// Whether all peers answer.
pub(super) fn peers(seen: &Seen) -> Option<Check> {
    let status = seen.status()?;
    let is_gone =
        |peer: &&PeerStatus| has_fault(peer, &["silent", "unanswered", "refused", "no-daemon"]);
    let mut gone = status.peers.iter().filter(is_gone);
    let Some(peer) = gone.next() else {
        if !seen.waits()
            && let Some((what, cure)) = unreached(seen, status)
        {
            return Check::fail(what, cure);
        }
        let answering = status.peers.iter().filter(|it| it.probe.reachable == Some(true)).count();
        return Check::ok(format!("{answering} of {} are known to answer", status.peers.len()));
    };
    let more = match gone.count() {
        0 => String::new(),
        more => format!("; so it is with {more} more"),
    };
    let ip = peer.public_ip;
    let cure = if has_fault(peer, &["refused", "no-daemon"]) {
        format!("ssh {ip} systemctl start {}", seen.unit())
    } else {
        let gone = seen.registry.as_ref().zip(peer.subnets.first());
        let gone = gone.map(|(registry, subnet)| {
            format!("; if it is gone for good: {}", registry.weft(&format!("release {subnet}")))
        });
        let mend = "then start that host, or mend the way to it";
        format!("ping {ip}   # {mend}{}", gone.unwrap_or_default())
    };
    Check::fail(describe(peer) + &more, cure)
}

/// Others' leases that the daemon has no way to, as where it refused them, or the kernel its routes. And what
/// tells more.
fn unreached(seen: &Seen, status: &Status) -> Option<(String, String)> {
    let (snapshot, _) = seen.registry.as_ref()?.content.as_ref().ok()?;
    let own = seen.lease_key()?;
    let is_ours = |lease: &Lease| {
        let mut addresses = lease.attrs.public_addresses();
        lease.key == own || addresses.any(|ip| Some(ip) == status.public_ip)
    };
    let ways: HashSet<IpNetwork> =
        status.peers.iter().flat_map(|peer| &peer.subnets).copied().collect();
    // Nobody is there yet.
    let tells_backend = status.backend != Some(BackendKind::UdpTun.to_string());
    let untaken = untaken(Some(&own), tells_backend, &snapshot.leases);
    let is_others = |it: &&Lease| !is_ours(it) && !untaken.contains_key(&it.key);
    let others = snapshot.leases.iter().filter(is_others);
    let missing = |lease: &&Lease| lease.key.networks().find(|subnet| !ways.contains(subnet));
    let unreached: Vec<IpNetwork> = others.clone().filter_map(|it| missing(&it)).collect();
    let first = unreached.first()?;
    let reason = status.problem_of(|network| unreached.contains(&network));
    let what = format!(
        "there is no way to {} of {} leases, {first} among them: {}",
        unreached.len(),
        others.count(),
        reason.unwrap_or("weftd does not say why")
    );
    Some((what, format!("weft trace {}; weft status", first.network())))
}

/// Whether the backend's packets get through where pings do.
pub(super) fn port(seen: &Seen) -> Option<Check> {
    let status = seen.status()?;
    let Some(peer) = find(status, &["blocked"]) else {
        return Check::ok("no peer's is blocked");
    };
    let backend = status.backend.as_deref().and_then(BackendKind::from_config);
    let config = seen.config().map(|it| it.backend);
    let port = backend.and_then(|it| it.port(config.as_ref())).unwrap_or_default();
    let cure =
        format!("iptables -I INPUT -p udp --dport {port} -j ACCEPT   # on {}", peer.public_ip);
    Check::fail(describe(peer), cure)
}

/// Whether packets as large as containers send get through.
pub(super) fn mtu(seen: &Seen) -> Option<Check> {
    let status = seen.status()?;
    let mtu = status.mtu.unwrap_or_default();
    let Some(peer) = find(status, &["narrow"]) else {
        return Check::ok(format!("no packet of up to {mtu} bytes is known to get lost"));
    };
    let interface = status.interface.as_deref().unwrap_or_default();
    let outer = seen.link(interface).map_or(0, |link| link.mtu);
    // As much as headers take away now, they will then.
    let wanted = outer.saturating_sub(mtu.saturating_sub(peer.probe.path_mtu.unwrap_or(mtu)));
    // weftd follows.
    let cure = format!("ip link set {interface} mtu {wanted}");
    match node_of(seen, peer).filter(|node| node.mtu < mtu) {
        Some(node) => {
            let name = if node.name.is_empty() { "that host" } else { &node.name };
            let differ = format!("{name} has the MTU {}, we have {mtu}: make them equal", node.mtu);
            let cure = format!("{cure}   # or a larger one on {}", peer.public_ip);
            Check::fail(format!("{}; {differ}", describe(peer)), cure)
        }
        None => Check::fail(describe(peer), cure),
    }
}

/// What a peer tells of itself, if it is a node of weft's.
fn node_of<'a>(seen: &'a Seen, peer: &PeerStatus) -> Option<&'a NodeRecord> {
    let (snapshot, _) = seen.registry.as_ref()?.content.as_ref().ok()?;
    let mut nodes = snapshot.nodes.iter();
    nodes.find(|node| node.public_addresses().any(|ip| ip == peer.public_ip))
}

/// Whether what cuts and checks packets on the way does it right.
pub(super) fn offloads(seen: &Seen) -> Option<Check> {
    let status = seen.status()?;
    let interface = status.interface.as_deref().unwrap_or_default();
    if let Some(peer) = find(status, &["no-offload", "damaged"]) {
        let kinds = if has_fault(peer, &["damaged"]) {
            "tx off rx off"
        } else {
            "tx-udp-segmentation off gro off"
        };
        let cure = format!("ethtool -K {interface} {kinds}   # here, or on {}", peer.public_ip);
        return Check::fail(describe(peer), cure);
    }
    if let Some(peer) = find(status, &["echo-only"]) {
        let device = status.device.as_deref().unwrap_or_default();
        let ip = peer.public_ip;
        let cure = if status.backend.as_deref() == Some("vxlan") {
            format!("ethtool -K {device} tx-checksum-ip-generic off   # here and on {ip}")
        } else {
            format!("iptables -I INPUT -i {device} -p udp -j ACCEPT   # on {ip}")
        };
        return Check::warn(describe(peer), cure);
    }
    let given_up = status.problems.iter().find(|problem| problem.contains(" is given up: "));
    if let Some(problem) = given_up {
        return Check::warn(problem, format!("ethtool -k {interface}"));
    }
    let name = Feature::UdpSegment.name();
    let state = status.offloads.get(name).map_or("on", String::as_str);
    if [FeatureState::Lossy, FeatureState::Refused].iter().any(|bad| bad.name() == state) {
        let what = format!("{name} is not in use: {state}");
        let cure = format!("ethtool -K {interface} tx-udp-segmentation off");
        return Check::warn(what, cure);
    }
    Check::ok("nothing that they cut or check is known to get lost")
}

fn find<'a>(status: &'a Status, faults: &[&str]) -> Option<&'a PeerStatus> {
    status.peers.iter().find(|peer| has_fault(peer, faults))
}

fn has_fault(peer: &PeerStatus, faults: &[&str]) -> bool {
    peer.probe.fault.as_deref().is_some_and(|fault| faults.contains(&fault))
}

fn describe(peer: &PeerStatus) -> String {
    let subnet = peer.subnets.first().map(ToString::to_string).unwrap_or_default();
    let problem = peer.probe.problem.as_deref().unwrap_or_default();
    format!("{} ({subnet}): {problem}", peer.public_ip)
}

#[cfg(test)]
mod tests {
    use weft_control::LeaseAttrs;
    use weft_control::lease::{Expiry, Snapshot};

    use super::*;
    use crate::doctor::check::Verdict;
    use crate::doctor::seen::{Daemon, RegistrySeen};
    use crate::probe::FAULTS;
    use crate::status::{FORWARDING, ProbeStatus};

    fn seen(fault: &str) -> Seen {
        let probe = ProbeStatus {
            reachable: Some(!["silent", "unanswered", "refused", "blocked"].contains(&fault)),
            fault: (!fault.is_empty()).then(|| fault.to_owned()),
            problem: Some(format!("what {fault} means")),
            path_mtu: Some(1400),
            ..ProbeStatus::default()
        };
        let peer =
            PeerStatus { probe, ..PeerStatus::example("192.0.2.7", "10.42.7.0/24", "tunnel") };
        let status = Status { peers: vec![peer], mtu: Some(1472), ..Status::default() };
        Seen { daemon: Some(Daemon { status, ..Daemon::default() }), ..Seen::default() }
    }

    #[test]
    fn each_fault_is_one_checks_business() {
        let checks = [peers, port, mtu, offloads];
        let business = [
            ("no-daemon", 0, Verdict::Fail),
            ("echo-only", 3, Verdict::Warn),
            ("refused", 0, Verdict::Fail),
            ("blocked", 1, Verdict::Fail),
            ("silent", 0, Verdict::Fail),
            ("unanswered", 0, Verdict::Fail),
            ("narrow", 2, Verdict::Fail),
            ("no-offload", 3, Verdict::Fail),
            ("damaged", 3, Verdict::Fail),
        ];
        assert_eq!(business.map(|(fault, ..)| fault), FAULTS);
        for (fault, at, verdict) in business {
            let seen = seen(fault);
            for (number, check) in checks.iter().enumerate() {
                let found = check(&seen).unwrap();
                let wanted = if number == at { verdict } else { Verdict::Ok };
                assert_eq!(found.verdict, wanted, "{fault}: {found:?}");
                if number == at {
                    assert!(found.seen.contains("192.0.2.7 (10.42.7.0/24): what"), "{found:?}");
                }
            }
        }
        assert!(checks.iter().all(|check| check(&seen("")).unwrap().verdict == Verdict::Ok));
    }

    #[test]
    fn the_lease_of_a_host_that_is_gone_can_be_released() {
        let snapshot = Snapshot::default();
        let registry = Some(RegistrySeen::example(snapshot));
        let cure = peers(&Seen { registry, ..seen("silent") }).unwrap().cure.unwrap();
        assert!(cure.ends_with(": weft registry --registry dir:/r release 10.42.7.0/24"), "{cure}");
    }

    /// As where host-gw's peers are all behind a router.
    #[test]
    fn leases_without_a_way_are_counted() {
        let lease = |number: u8| Lease {
            key: format!("10.42.{number}.0-24").parse().unwrap(),
            attrs: LeaseAttrs {
                public_ip: Some([192, 0, 2, number].into()),
                ..LeaseAttrs::default()
            },
            expires: Expiry::Unknown,
            revision: 0,
        };
        // Ours, the peer's, two more, and what waits for one's next start.
        let mut leases: Vec<Lease> = [1, 7, 8, 9].map(lease).into();
        let key = "10.42.20.0-24".parse().unwrap();
        leases.push(Lease { key, expires: Expiry::Never, ..lease(8) });
        let mut seen = Seen {
            registry: Some(RegistrySeen::example(Snapshot { leases, ..Snapshot::default() })),
            ..seen("")
        };
        let status = &mut seen.daemon.as_mut().unwrap().status;
        status.state = FORWARDING.into();
        status.subnets = vec!["10.42.1.0/24".parse().unwrap()];
        status.problems = vec!["route replace 10.42.9.0/24 via 192.0.2.9: refused".into()];
        let found = peers(&seen).unwrap();
        let told = "there is no way to 2 of 3 leases, 10.42.8.0/24 among them: route replace \
                    10.42.9.0/24 via 192.0.2.9: refused";
        assert_eq!((found.verdict, found.seen.as_str()), (Verdict::Fail, told));
    }

    #[test]
    fn a_peer_of_a_smaller_mtu_is_named_with_it() {
        let mut seen = seen("narrow");
        let node = |mtu: u32| NodeRecord {
            id: String::new(),
            name: "host7".into(),
            public_ip: Some([192, 0, 2, 7].into()),
            public_ipv6: None,
            addresses: Vec::new(),
            version: String::new(),
            mtu,
            probe_port: None,
        };
        for (theirs, is_told) in [(1372, true), (1472, false)] {
            let snapshot = Snapshot { nodes: vec![node(theirs)], ..Snapshot::default() };
            seen.registry = Some(RegistrySeen::example(snapshot));
            let found = mtu(&seen).unwrap();
            let told = "; host7 has the MTU 1372, we have 1472: make them equal";
            assert_eq!(found.seen.ends_with(told), is_told, "{found:?}");
            assert!(!found.cure.unwrap().contains("systemctl"));
        }
    }

    #[test]
    fn an_offload_that_fell_is_told() {
        let mut fallen = seen("");
        let status = &mut fallen.daemon.as_mut().unwrap().status;
        status.offloads.insert("udp-segment".into(), "lossy".into());
        status.problems.push("udp-segment is given up: packets get lost".into());
        let found = offloads(&fallen).unwrap();
        assert_eq!(
            (found.verdict, found.seen.as_str()),
            (Verdict::Warn, "udp-segment is given up: packets get lost")
        );
    }
}
