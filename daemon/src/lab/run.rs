//! `weft lab`: brings hosts up, moves traffic between all of them, and shows what came of it.

use std::io::Write;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::Context;

use super::measure::{self, Pair, measure, ordered_pairs};
use super::progress::Progress;
use super::tables::{self, HostStatus};
use super::{Cancel, EtcdOptions, Lab, LabArgs, LabOptions, POLL, require_root};

/// How long the daemons may take to come up, all together.
const UP_WITHIN: Duration = Duration::from_secs(20);

/// How long they may take to find each other.
const ACQUAINTED_WITHIN: Duration = Duration::from_secs(15);

/// How long a transfer may be without progress.
const STALL: Duration = Duration::from_secs(5);

/// Runs the lab from nothing to nothing, and returns the pairs that failed, such as `h1->h2`: results go to
/// `out`, progress and reasons to stderr.
///
/// # Errors
/// The lab cannot be made or removed, or it is cancelled (the error is then, or has as its cause,
/// [`super::Cancelled`]). In all cases the lab is removed.
pub(super) fn run_lab(
    arguments: &LabArgs,
    cancel: &Cancel,
    out: &mut dyn Write,
) -> anyhow::Result<Vec<String>> {
    require_root()?;
    let hosts = usize::from(arguments.hosts);
    let all: Vec<usize> = (0..hosts).collect();
    let pairs = ordered_pairs(&all).count();
    // Once for the namespaces, the daemons, the meeting and the end; twice a pair.
    let progress = Progress::new(u64::try_from(4 + 2 * pairs).unwrap_or(u64::MAX));
    progress.step(&format!("making {hosts} hosts"));
    let mut lab = Lab::new(LabOptions {
        hosts,
        backend: arguments.backend.clone(),
        etcd: EtcdOptions {
            members: usize::from(arguments.registry == "etcd"),
            ..EtcdOptions::default()
        },
        stall: STALL,
        cancel: cancel.clone(),
        ..LabOptions::default()
    })?;
    progress.note(&format!("lab {}: namespaces weft-{}-…", lab.id(), lab.id()));

    progress.step("starting weftd on each host");
    let up = start(&mut lab, &progress)?;
    progress.step("waiting until all know each other");
    acquaint(&lab, &up, &progress)?;
    let measured = measure(&lab, &up, arguments.bytes, &progress)?;
    let statuses: Vec<HostStatus> =
        all.iter().map(|host| (*host, lab.status(*host).ok())).collect();

    progress.step(if arguments.keep { "done" } else { "removing the lab" });
    let example = arguments.keep.then(|| example(&lab, &up));
    let kept = if arguments.keep { Some(lab.keep()?) } else { lab.remove().map(|()| None)? };
    progress.finish();
    show(out, &statuses, &measured).context("cannot write the results")?;
    if let (Some(id), Some(example)) = (&kept, example) {
        writeln!(out, "The lab {id} is left up. To enter it:\n{example}")?;
        writeln!(out, "To remove it:\n    weft lab down {id}")?;
    }
    let failed = failures(&all, &up, &measured);
    for (pair, reason) in &failed {
        eprintln!("{pair}: {reason}");
    }
    Ok(failed.into_iter().map(|(pair, _)| pair).collect())
}

/// Starts all daemons and puts containers behind them; returns the hosts on which that worked.
/// The others are told of: one that fails is no reason to say nothing of the rest.
fn start(lab: &mut Lab, progress: &Progress) -> anyhow::Result<Vec<usize>> {
    for host in 0..lab.hosts() {
        lab.start_daemon(host, &[])?;
    }
    let deadline = Instant::now() + UP_WITHIN;
    let mut up = Vec::new();
    for host in 0..lab.hosts() {
        let left = deadline.saturating_duration_since(Instant::now());
        let attached = lab.wait_ready(host, left).and_then(|()| lab.attach_container(host));
        lab.options.cancel.check()?;
        match attached {
            Ok(_) => up.push(host),
            Err(error) => progress.note(&format!("{error:#}")),
        }
    }
    Ok(up)
}

/// Waits until each of the hosts has all the others as peers. Where that never comes, the pings
/// will say between whom.
fn acquaint(lab: &Lab, hosts: &[usize], progress: &Progress) -> anyhow::Result<()> {
    let deadline = Instant::now() + ACQUAINTED_WITHIN;
    for host in hosts {
        while !lab.status(*host).is_ok_and(|status| status.peers.len() + 1 >= hosts.len()) {
            lab.options.cancel.check()?;
            if Instant::now() > deadline {
                progress.note(&format!("h{} does not know all the others", host + 1));
                break;
            }
            thread::sleep(POLL);
        }
    }
    Ok(())
}

fn show(out: &mut dyn Write, statuses: &[HostStatus], pairs: &[Pair]) -> std::io::Result<()> {
    writeln!(out, "Leases\n{}\n", tables::leases(statuses))?;
    writeln!(out, "Pairs\n{}\n", tables::pairs(pairs))?;
    if let Some(counters) = tables::counters(statuses) {
        writeln!(out, "Counters\n{counters}")?;
    }
    out.flush()
}

/// The pairs that failed and why; those of hosts that are not up are among them.
fn failures(all: &[usize], up: &[usize], measured: &[Pair]) -> Vec<(String, String)> {
    let not_up = |host: &usize| !up.contains(host);
    let reason = |(from, to): (usize, usize)| match [from, to].into_iter().find(not_up) {
        Some(host) => Some(format!("h{} is not up", host + 1)),
        None => measured.iter().find(|pair| (pair.from, pair.to) == (from, to))?.failure(),
    };
    let failed = ordered_pairs(all).filter_map(|pair| Some((pair, reason(pair)?)));
    failed.map(|((from, to), reason)| (measure::name(from, to), reason)).collect()
}

/// A command that goes into the lab, for pasting.
fn example(lab: &Lab, up: &[usize]) -> String {
    let containers: Vec<_> = up.iter().filter_map(|host| lab.container(*host).ok()).collect();
    let address = containers.last().and_then(|container| container.address().ok());
    match (containers.first(), address) {
        (Some(first), Some(address)) => {
            format!("    ip netns exec {} ping {address}", first.netns.name())
        }
        _ => format!("    ip netns exec {} sh", lab.host(0).netns.name()),
    }
}
