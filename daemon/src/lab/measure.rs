//! Pings and transfers between all pairs of containers.

use super::progress::Progress;
use super::{Bytes, Cancelled, Lab, PingOptions, PingReport, Transfer};

/// One ordered pair of containers and how traffic fared between them.
#[derive(Debug)]
pub(super) struct Pair {
    /// The host of the sending container, from 0.
    pub(super) from: usize,
    /// The host of the receiving container, from 0.
    pub(super) to: usize,
    /// Three echo requests, or why there were none.
    pub(super) ping: Result<PingReport, String>,
    /// One transfer, or why it failed.
    pub(super) transfer: Result<Transfer, String>,
}

impl Pair {
    /// The pair as the user reads it.
    pub(super) fn name(&self) -> String {
        name(self.from, self.to)
    }

    /// What went wrong, if anything did.
    pub(super) fn failure(&self) -> Option<String> {
        match (&self.ping, &self.transfer) {
            (Err(reason), _) => Some(format!("ping: {reason}")),
            (Ok(ping), _) if !ping.complete() => {
                let errors = ping.errors.first().map_or(String::new(), |line| format!(" ({line})"));
                Some(format!("{} of {} pings answered{errors}", ping.received, ping.sent))
            }
            (_, Err(reason)) => Some(format!("transfer: {reason}")),
            (_, Ok(transfer)) if !transfer.intact() => Some("transfer: the hashes differ".into()),
            (Ok(_), Ok(_)) => None,
        }
    }
}

/// Pings between all pairs of `hosts`, then transfers, one at a time.
///
/// # Errors
/// Only that it was cancelled: a pair that fails is a result.
pub(super) fn measure(
    lab: &Lab,
    hosts: &[usize],
    bytes: Bytes,
    progress: &Progress,
) -> Result<Vec<Pair>, Cancelled> {
    let mut pairs = Vec::new();
    for (from, to) in ordered_pairs(hosts) {
        lab.options.cancel.check()?;
        progress.step(&format!("ping {}", name(from, to)));
        let ping = lab.ping(from, to, &PingOptions::default());
        let ping = ping.map_err(|error| format!("{error:#}"));
        pairs.push(Pair { from, to, ping, transfer: Err("not tried".into()) });
    }
    for pair in &mut pairs {
        lab.options.cancel.check()?;
        progress.step(&format!("transfer of {bytes} {}", pair.name()));
        // A transfer would only spend its patience where not one ping came back.
        if pair.ping.as_ref().is_ok_and(|ping| ping.received > 0) {
            let transfer = lab.transfer(pair.from, pair.to, bytes);
            pair.transfer = transfer.map_err(|error| format!("{error:#}"));
        }
    }
    lab.options.cancel.check()?;
    Ok(pairs)
}

/// Every pair in both directions.
pub(super) fn ordered_pairs(hosts: &[usize]) -> impl Iterator<Item = (usize, usize)> {
    let all = hosts.iter().flat_map(|from| hosts.iter().map(|to| (*from, *to)));
    all.filter(|(from, to)| from != to)
}

/// A pair as the user reads it.
pub(super) fn name(from: usize, to: usize) -> String {
    format!("h{}->h{}", from + 1, to + 1)
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::thread;
    use std::time::Duration;

    use super::super::LabOptions;
    use super::super::down::{abandoned, down};
    use super::*;
    use crate::netns::{self, NetNs};

    /// A lab whose overlay is the kernel's own routes, so that it needs no daemon.
    fn routed_lab(hosts: usize) -> Lab {
        let stall = Duration::from_secs(1);
        let mut lab = Lab::new(LabOptions { hosts, stall, ..LabOptions::default() }).unwrap();
        for host in 0..hosts {
            route_host(&mut lab, host);
        }
        lab
    }

    /// Attaches a container and routes between it and all the others.
    fn route_host(lab: &mut Lab, host: usize) {
        let env = format!("FLANNEL_SUBNET=10.42.{host}.1/24\nFLANNEL_MTU=1472\n");
        fs::write(&lab.host(host).subnet_file, env).unwrap();
        lab.attach_container(host).unwrap();
        for other in (0..lab.hosts()).filter(|other| *other != host) {
            for (at, to) in [(host, other), (other, host)] {
                let (subnet, via) = (format!("10.42.{to}.0/24"), lab.host(to).address.to_string());
                lab.host(at).netns.ip(&["route", "replace", &subnet, "via", &via]).unwrap();
            }
        }
    }

    fn failed(lab: &Lab) -> Vec<String> {
        let hosts: Vec<_> = (0..lab.hosts()).collect();
        let pairs = measure(lab, &hosts, Bytes(1 << 20), &Progress::new(0)).unwrap();
        pairs.iter().filter(|pair| pair.failure().is_some()).map(Pair::name).collect()
    }

    #[test]
    fn pairs_pass_and_those_of_a_dead_link_fail() {
        let mut lab = routed_lab(3);
        assert_eq!(failed(&lab), Vec::<String>::new());
        let report = lab.ping(0, 2, &PingOptions::default()).unwrap();
        assert_eq!(report.replies[0].ttl, 62, "two hosts route");

        lab.host(1).netns.ip(&["link", "set", "eth0", "down"]).unwrap();
        assert_eq!(failed(&lab), ["h1->h2", "h2->h1", "h2->h3", "h3->h2"]);

        lab.host(1).netns.ip(&["link", "set", "eth0", "up"]).unwrap();
        // The link took its routes along.
        for other in [0, 2] {
            let subnet = format!("10.42.{other}.0/24");
            let via = lab.host(other).address.to_string();
            lab.host(1).netns.ip(&["route", "add", &subnet, "via", &via]).unwrap();
        }
        let joined = lab.add_host().unwrap();
        route_host(&mut lab, joined);
        assert_eq!(failed(&lab), Vec::<String>::new());
    }

    #[test]
    fn a_link_that_dies_under_a_transfer_ends_it() {
        let lab = routed_lab(2);
        let (from, to) = (lab.container(0).unwrap(), lab.container(1).unwrap());
        // Without segmentation offload a transfer takes long enough to be cut.
        from.netns.ip(&["link", "set", "eth0", "gso_max_segs", "1"]).unwrap();
        let error = thread::scope(|scope| {
            let moving = scope.spawn(|| lab.transfer(0, 1, Bytes(256 << 20)).unwrap_err());
            while received(&to.netns) < 1 << 20 && !moving.is_finished() {}
            lab.host(1).netns.ip(&["link", "set", "eth0", "down"]).unwrap();
            moving.join().unwrap()
        });
        assert!(format!("{error:#}").contains("nothing moved for 1 s"), "{error:#}");
    }

    fn received(netns: &NetNs) -> u64 {
        let links = netns.ip_json(&["-statistics", "link", "show", "dev", "eth0"]).unwrap();
        links[0]["stats64"]["rx"]["bytes"].as_u64().unwrap()
    }

    #[test]
    fn containers_have_what_docker_would_give_them() {
        let lab = routed_lab(2);
        let container = lab.container(1).unwrap();
        assert_eq!(container.address().unwrap().to_string(), "10.42.1.2");
        let links = container.netns.ip_json(&["link", "show", "dev", "eth0"]).unwrap();
        assert_eq!(links[0]["mtu"], 1472);
        let routes = container.netns.ip_json(&["route", "show", "default"]).unwrap();
        assert_eq!(routes[0]["gateway"], "10.42.1.1");
        let links = lab.host(1).netns.ip_json(&["link", "show", "dev", "docker0"]).unwrap();
        assert_eq!(links[0]["mtu"], 1472);
        let full = PingOptions { size: Some(1472 - 28), df: true, ..PingOptions::default() };
        assert!(lab.ping(0, 1, &full).unwrap().complete());
        let over = PingOptions { size: Some(1472 - 27), ..full };
        let report = lab.ping(0, 1, &over).unwrap();
        assert_eq!(report.received, 0);
        assert!(report.errors.iter().any(|line| line.contains("1472")), "{:?}", report.errors);
    }

    #[test]
    fn a_lab_leaves_nothing_behind() {
        let lab = routed_lab(2);
        let (names, directory) = (lab.record.namespaces.clone(), lab.record.directory.clone());
        assert_eq!(names.len(), 5);
        assert!(names.iter().all(|name| netns::exists(name)));
        let id = lab.id().to_owned();
        assert!(down(&id).unwrap_err().to_string().contains("runs under process"));
        lab.remove().unwrap();
        assert!(!names.iter().any(|name| netns::exists(name)));
        assert!(!directory.exists());
        assert!(down(&id).unwrap_err().to_string().contains("there is no lab"));
    }

    #[test]
    fn a_kept_lab_is_removed_by_its_record() {
        let lab = routed_lab(2);
        let (names, directory) = (lab.record.namespaces.clone(), lab.record.directory.clone());
        let id = lab.keep().unwrap();
        assert!(names.iter().all(|name| netns::exists(name)));
        assert!(abandoned().unwrap().contains(&id));
        let said = down(&id).unwrap().to_string();
        assert!(names.iter().all(|name| said.contains(name)), "{said}");
        assert!(!names.iter().any(|name| netns::exists(name)));
        assert!(!directory.exists());
    }
}
