//! The daemon itself, and what it needs of the kernel.

use ipnetwork::IpNetwork;
use weft_backends::IoKind;

use super::check::Check;
use super::seen::Seen;
use super::version;
use crate::output::joined;

/// What weft is tried with.
const OLDEST: (u32, u32) = (6, 1);
/// The first kernel whose TUN device io_uring can wait for.
const IO_URING_SINCE: (u32, u32) = (6, 4);
/// The first kernels with what is worth having.
const NEWER_FEATURES: [((u32, u32), &str); 2] = [
    ((6, 2), "UDP segmentation offload from containers (6.2)"),
    (IO_URING_SINCE, "io_uring for the TUN device (6.4)"),
];

/// Whether a daemon answers, forwards, and has nothing to complain of.
pub(super) fn daemon(seen: &Seen) -> Option<Check> {
    let log = format!("journalctl -u {} -n 20", seen.unit());
    let Some(daemon) = &seen.daemon else {
        return Check::fail(&seen.absent.reason, seen.cure_of_silence());
    };
    let status = &daemon.status;
    if let (true, Some(pid)) = (daemon.is_elsewhere, daemon.pid) {
        let there = format!("nsenter -t {pid} -n weft doctor");
        return Check::fail("it lives in another network namespace than this command", there);
    }
    if !status.forwards() {
        let state = status.state.strip_prefix("waiting").map(str::to_owned);
        let state = state.unwrap_or_else(|| format!(": {}", status.state));
        return Check::fail(format!("weftd waits{state}"), log);
    }
    if !status.problems.is_empty() {
        return Check::warn(status.problems.join("; "), log);
    }
    let subnets = joined(&status.subnets, " and ");
    let backend = status.backend.as_deref().unwrap_or_default();
    let pid = daemon.pid.unwrap_or(status.pid);
    let what = format!("weftd {} (pid {pid}) carries", status.version);
    Check::ok(format!("{what} {subnets} by {backend}"))
}

/// What this kernel can and cannot do.
pub(super) fn kernel(seen: &Seen) -> Option<Check> {
    let release = seen.sysctl("kernel/osrelease").unwrap_or("an unknown kernel");
    let Some(version) = version(release) else {
        return Check::ok(release);
    };
    // The kernel moves the packets of the other backends, and any can.
    if !uses_tun(seen) {
        return Check::ok(release);
    }
    if !seen.has_tun {
        return Check::fail(format!("{release}: there is no /dev/net/tun"), "modprobe tun");
    }
    if version < OLDEST {
        let seen = format!("{release} is older than 6.1, the oldest that weft is tried with");
        return Check::warn(seen, "apt-get install linux-image-amd64   # 6.1 or newer");
    }
    let missing = NEWER_FEATURES.iter().filter(|(since, _)| version < *since);
    let missing: Vec<&str> = missing.map(|(_, feature)| *feature).collect();
    if missing.is_empty() {
        return Check::ok(release);
    }
    Check::ok(format!("{release}; newer ones have {}", missing.join(" and ")))
}

/// Whether the engine has io_uring, unless it was told to do without.
pub(super) fn io_uring(seen: &Seen) -> Option<Check> {
    let disabled = seen.sysctl("kernel/io_uring_disabled").unwrap_or("0");
    let enable = format!("sysctl -w kernel.io_uring_disabled=0 && {}", seen.restart());
    let by_sysctl = format!("kernel.io_uring_disabled is {disabled}");
    let Some(status) = seen.status() else {
        return if disabled == "0" { Check::ok(by_sysctl) } else { Check::warn(by_sysctl, enable) };
    };
    match status.io.as_deref() {
        None => Check::ok("the backend moves no packets itself"),
        Some("uring") => Check::ok("in use"),
        Some(io) => {
            let asked = seen.settings().is_some_and(|it| it.tuning.io == Some(IoKind::Mmsg));
            if asked {
                return Check::ok(format!("not asked for: --io {io}"));
            }
            let release = seen.sysctl("kernel/osrelease").and_then(version);
            if release.is_some_and(|version| version < IO_URING_SINCE) {
                return Check::ok(format!("not for this kernel; packets go by {io}"));
            }
            if disabled != "0" {
                return Check::warn(format!("{by_sysctl}; packets go by {io}"), enable);
            }
            let what = format!("blocked, so packets go by {io}; weftd's log has the reason");
            // The unit that weft comes with allows both.
            let cure = format!(
                "systemctl edit {}   # [Service] LimitMEMLOCK=infinity, and \
                 SystemCallFilter=io_uring_setup io_uring_enter io_uring_register",
                seen.unit()
            );
            Check::warn(what, cure)
        }
    }
}

/// Whether the host routes at all: between containers' bridge and the overlay.
pub(super) fn ip_forward(seen: &Seen) -> Option<Check> {
    let networks = seen.networks();
    let ipv4 = networks.is_empty() || networks.iter().any(IpNetwork::is_ipv4);
    let ipv6 = networks.iter().any(IpNetwork::is_ipv6);
    let wanted = [
        (ipv4, "net/ipv4/ip_forward", "net.ipv4.ip_forward"),
        (ipv6, "net/ipv6/conf/all/forwarding", "net.ipv6.conf.all.forwarding"),
    ];
    let wanted = wanted.into_iter().filter(|(carried, ..)| *carried);
    let mut on = Vec::new();
    for (_, path, name) in wanted {
        match seen.sysctl(path) {
            Some("0") => {
                let what = format!("{name} is 0: this host drops what containers send to others");
                return Check::fail(what, format!("sysctl -w {name}=1"));
            }
            Some(value) => on.push(format!("{name} is {value}")),
            None => {}
        }
    }
    // A device has a say in IPv4 only (ip-sysctl.rst).
    let status = seen.status().filter(|_| ipv4);
    let devices = status.into_iter().flat_map(|it| [it.device.as_deref(), it.interface.as_deref()]);
    for device in devices.flatten() {
        if seen.sysctl(&format!("net/ipv4/conf/{device}/forwarding")) == Some("0") {
            let what = format!("{device} does not forward, though the host does");
            let cure = format!("sysctl -w net/ipv4/conf/{device}/forwarding=1");
            return Check::fail(what, cure);
        }
    }
    Check::ok(on.join(", "))
}

/// Whether the kernel discards what comes in another way than it would answer: strict reverse path
/// filtering (ip-sysctl.rst). That is harmless where both ways are the same.
pub(super) fn rp_filter(seen: &Seen) -> Option<Check> {
    let status = seen.status()?;
    // Direct peers' packets come unwrapped, so not out of the device.
    let (mut outer, mut inner) = (Vec::new(), Vec::new());
    for peer in &status.peers {
        outer.push(peer.public_ip);
        let way = if peer.way == "direct" { &mut outer } else { &mut inner };
        way.extend(peer.subnets.iter().map(IpNetwork::network));
    }
    let mut strict = Vec::new();
    let ways = [(&status.interface, outer), (&status.device, inner)];
    for (device, addresses) in ways {
        let Some(device) = device.as_deref() else { continue };
        let value = |device: &str| {
            let path = format!("net/ipv4/conf/{device}/rp_filter");
            seen.sysctl(&path).and_then(|value| value.parse::<u8>().ok()).unwrap_or(0)
        };
        // The kernel takes the larger one: 0 is off, 1 is strict, 2 is loose.
        if value("all").max(value(device)) != 1 {
            continue;
        }
        let index = seen.link(device).map(|link| link.index);
        let other = addresses.iter().filter(|ip| ip.is_ipv4());
        let mut other = other.filter(|ip| seen.ways.get(ip).is_some_and(|way| *way != index));
        if let Some(ip) = other.next() {
            let what = format!(
                "strict on {device}, but answers to {ip} leave another way: what comes from there \
                 is dropped"
            );
            return Check::fail(what, format!("sysctl -w net/ipv4/conf/{device}/rp_filter=2"));
        }
        strict.push(device);
    }
    strict.dedup();
    if strict.is_empty() {
        return Check::ok("not strict");
    }
    Check::ok(format!("strict on {}, which all answers leave by", strict.join(" and ")))
}

fn uses_tun(seen: &Seen) -> bool {
    seen.status().is_none_or(|status| status.backend.as_deref() == Some("udp-tun"))
}

#[cfg(test)]
mod tests {
    use weft_backends::netlink::Link;

    use super::*;
    use crate::doctor::check::Verdict;
    use crate::doctor::seen::Daemon;
    use crate::status::{PeerStatus, Status};

    fn with_sysctl(path: &str, value: &str) -> Seen {
        let sysctls = [(path.to_owned(), value.to_owned())].into();
        Seen { sysctls, has_tun: true, ..Seen::default() }
    }

    fn with_status(status: Status) -> Seen {
        Seen { daemon: Some(Daemon { status, ..Daemon::default() }), ..Seen::default() }
    }

    #[test]
    fn old_kernels_and_those_without_tun_are_told() {
        let verdict =
            |release: &str| kernel(&with_sysctl("kernel/osrelease", release)).unwrap().verdict;
        assert_eq!(verdict("5.15.0-91-generic"), Verdict::Warn);
        assert_eq!(verdict("6.1.0-18-amd64"), Verdict::Ok);
        assert!(kernel(&with_sysctl("kernel/osrelease", "6.1.0")).unwrap().seen.contains("6.4"));
        assert_eq!(kernel(&with_sysctl("kernel/osrelease", "6.18.3")).unwrap().seen, "6.18.3");
        let no_tun = Seen { has_tun: false, ..with_sysctl("kernel/osrelease", "6.18.3") };
        let found = kernel(&no_tun).unwrap();
        assert_eq!((found.verdict, found.cure.as_deref()), (Verdict::Fail, Some("modprobe tun")));
    }

    #[test]
    fn what_only_the_engine_needs_is_no_matter_to_other_backends() {
        let mut seen = with_status(Status { backend: Some("vxlan".into()), ..Status::default() });
        seen.sysctls = with_sysctl("kernel/osrelease", "5.15.0-91-generic").sysctls;
        assert_eq!(kernel(&seen).unwrap().verdict, Verdict::Ok);
    }

    #[test]
    fn forwarding_is_asked_for_in_the_families_of_the_overlay() {
        let seen = |network: &str| Seen {
            sysctls: [
                ("net/ipv4/ip_forward", "0"),
                ("net/ipv4/conf/flannel.1/forwarding", "0"),
                ("net/ipv6/conf/all/forwarding", "1"),
            ]
            .map(|(path, value)| (path.to_owned(), value.to_owned()))
            .into(),
            ..with_status(Status {
                networks: vec![network.parse().unwrap()],
                device: Some("flannel.1".into()),
                ..Status::default()
            })
        };
        assert_eq!(ip_forward(&seen("10.42.0.0/16")).unwrap().verdict, Verdict::Fail);
        let found = ip_forward(&seen("fd00:42::/48")).unwrap();
        assert_eq!(found.seen, "net.ipv6.conf.all.forwarding is 1", "{found:?}");
    }

    /// With DirectRouting a peer's packets come unwrapped.
    #[test]
    fn strict_filtering_is_judged_by_the_way_of_each_peer() {
        let peer = PeerStatus::example;
        let link = |index, name: &str| Link {
            index,
            name: name.into(),
            mtu: 1500,
            up: true,
            ..Link::default()
        };
        let status = Status {
            device: Some("flannel.1".into()),
            interface: Some("eth0".into()),
            peers: vec![
                peer("192.0.2.2", "10.42.2.0/24", "tunnel"),
                peer("192.0.2.3", "10.42.3.0/24", "direct"),
            ],
            ..Status::default()
        };
        let way = |ip: &str, index| (ip.parse().unwrap(), Some(index));
        let ways = [("192.0.2.2", 1), ("192.0.2.3", 1), ("10.42.2.0", 2), ("10.42.3.0", 1)];
        let mut seen = Seen {
            sysctls: with_sysctl("net/ipv4/conf/all/rp_filter", "1").sysctls,
            links: vec![link(1, "eth0"), link(2, "flannel.1")],
            ways: ways.map(|(ip, index)| way(ip, index)).into(),
            ..with_status(status)
        };
        assert_eq!(rp_filter(&seen).unwrap().verdict, Verdict::Ok);
        seen.ways.extend([way("10.42.3.0", 2)]);
        let found = rp_filter(&seen).unwrap();
        assert!(found.seen.starts_with("strict on eth0, but answers to 10.42.3.0"), "{found:?}");
    }

    #[test]
    fn io_uring_is_missed_only_where_it_was_wanted() {
        let by =
            |io: Option<&str>| with_status(Status { io: io.map(Into::into), ..Status::default() });
        assert_eq!(io_uring(&by(Some("uring"))).unwrap().verdict, Verdict::Ok);
        assert_eq!(io_uring(&by(None)).unwrap().verdict, Verdict::Ok);
        assert_eq!(io_uring(&by(Some("mmsg"))).unwrap().verdict, Verdict::Warn);
        let kernel = |release: &str| Seen {
            sysctls: [("kernel/osrelease".to_owned(), release.to_owned())].into(),
            ..by(Some("mmsg"))
        };
        assert_eq!(io_uring(&kernel("6.1.0-56-amd64")).unwrap().verdict, Verdict::Ok);
        assert_eq!(io_uring(&kernel("6.4.0")).unwrap().verdict, Verdict::Warn);
        let off = Seen {
            sysctls: [("kernel/io_uring_disabled".to_owned(), "2".to_owned())].into(),
            ..by(Some("mmsg"))
        };
        assert!(
            io_uring(&off)
                .unwrap()
                .cure
                .unwrap()
                .starts_with("sysctl -w kernel.io_uring_disabled=0")
        );
    }
}
