//! What a fleet's leases cost a node whose packets the kernel moves: all of them at a start, one that
//! joins or leaves, all of them looked at again; and what a daemon takes that has them all. Needs root,
//! as the lab does.

mod fleet;

use std::net::{IpAddr, Ipv4Addr};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use serde_json::json;
use weft_backends::netlink::Netlink;
use weft_backends::{
    Backend, BackendKind, Basis, Desired, DesiredPeer, ExternalInterface, GuardMode, Options,
    Report, Tuning,
};
use weft_benches::cpu;
use weft_benches::summary::Spread;
use weft_control::lease::Expiry;
use weft_control::{Lease, LeaseAttrs, LeaseKey, NetworkConfig};
use weft_daemon::lab::{EtcdOptions, Lab, LabOptions};

/// Room for 16,384 subnets, and not where the lab's hosts are.
const NETWORK: &str = "100.64.0.0/10";
const ROUNDS: u32 = 50;
/// How long all leases may take at a start, of a backend and of the whole daemon; and one that joins
/// or leaves, as a median.
const ALL_OF_1_000: Duration = Duration::from_secs(1);
const ALL_OF_10_000: Duration = Duration::from_secs(5);
const ONE: Duration = Duration::from_millis(20);
/// How long a daemon is waited for.
const PATIENCE: Duration = Duration::from_secs(60);
/// How long a daemon is watched that has nothing to do.
const QUIET: Duration = Duration::from_secs(31);

fn main() -> Result<()> {
    for kind in [BackendKind::Vxlan, BackendKind::HostGw] {
        for (leases, target) in [(1_000, ALL_OF_1_000), (10_000, ALL_OF_10_000)] {
            let lab = Lab::new(LabOptions { hosts: 1, ..LabOptions::default() })?;
            lab.host(0).netns.run(|| measure(kind, leases, target))??;
            lab.remove()?;
        }
    }
    for kind in [BackendKind::Vxlan, BackendKind::HostGw, BackendKind::UdpTun] {
        whole_daemon(kind)?;
    }
    Ok(())
}

/// One backend, without a daemon around it.
fn measure(kind: BackendKind, leases: u32, target: Duration) -> Result<()> {
    let config: NetworkConfig = format!(r#"{{"Network":"{NETWORK}"}}"#).parse()?;
    let options = Options { guard: GuardMode::Strict, workers: 1, tuning: Tuning::default() };
    let (mut backend, _events) = weft_backends::open(kind, &config, &interface()?, options)?;
    let attrs = backend.prepare("bench")?;
    let own = Lease { attrs, ..lease(kind, 0) };
    backend.start(&own)?;
    let peers = (1..=leases).map(|number| peer(kind, number)).collect();
    let mut desired = Desired { lease: own, peers };
    let what = |what: &str| format!("{kind}, {leases} leases: {what}");

    let begun = Instant::now();
    let report = backend.reconcile(&desired, Basis::Kernel);
    let took = begun.elapsed();
    check(&*backend, &report, &desired)?;
    tell(&what("all at the start"), &[took], Some(target));

    let mut times = Vec::new();
    for _ in 0..10 {
        let begun = Instant::now();
        let report = backend.reconcile(&desired, Basis::Kernel);
        times.push(begun.elapsed());
        ensure!(!report.changed, "all was there already");
    }
    tell(&what("the kernel is looked at again"), &times, None);

    let (mut joins, mut leaves) = (Vec::new(), Vec::new());
    for _ in 0..ROUNDS {
        desired.peers.push(peer(kind, leases + 1));
        let begun = Instant::now();
        let report = backend.reconcile(&desired, Basis::Memory);
        joins.push(begun.elapsed());
        check(&*backend, &report, &desired)?;
        desired.peers.pop();
        let begun = Instant::now();
        let report = backend.reconcile(&desired, Basis::Memory);
        leaves.push(begun.elapsed());
        check(&*backend, &report, &desired)?;
    }
    tell(&what("one joins"), &joins, Some(ONE));
    tell(&what("one leaves"), &leaves, Some(ONE));
    Ok(())
}

/// That the kernel has a route for each peer, which comes last of what there is for one.
fn check(backend: &dyn Backend, report: &Report, desired: &Desired) -> Result<()> {
    ensure!(report.problems.is_empty(), "{report:?}");
    let wanted = desired.peers.len();
    ensure!(backend.status().peers.len() == wanted, "not all are peers");
    let routes = Netlink::open()?.routes()?;
    let found = routes.iter().filter(|route| route.protocol == 119).count();
    ensure!(found == wanted, "{found} routes for {wanted} peers");
    Ok(())
}

/// A daemon and an etcd, from its start on.
fn whole_daemon(kind: BackendKind) -> Result<()> {
    let leases = 10_000;
    let etcd = EtcdOptions { members: 1, ..EtcdOptions::default() };
    let backend = kind.to_string();
    let mut lab = Lab::new(LabOptions { hosts: 1, backend, etcd, ..LabOptions::default() })?;
    let urls = lab.etcd_urls();
    lab.host(0).netns.run(|| {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        let config = format!(r#"{{"Network":"{NETWORK}","SubnetMin":"100.127.0.0"}}"#);
        let leases: Vec<Lease> = (1..=leases).map(|number| lease(kind, number)).collect();
        runtime.block_on(fleet::write(&urls, &config, &leases))
    })??;
    let begun = Instant::now();
    lab.start_daemon(0, &[])?;
    lab.wait_ready(0, PATIENCE)?;
    while lab.status(0)?.peers.len() < leases as usize {
        ensure!(begun.elapsed() < PATIENCE, "not all are peers");
        // To tell of 10,000 peers is work too.
        thread::sleep(Duration::from_millis(100));
    }
    let what = format!("weftd, {kind}, {leases} leases: from its start on");
    tell(&what, &[begun.elapsed()], Some(ALL_OF_10_000));
    let pid = lab.status(0)?.pid;
    // What it does right after the start is not what it does all day.
    thread::sleep(Duration::from_secs(5));
    let before = cpu::process_seconds(pid)?;
    thread::sleep(QUIET);
    let used = cpu::process_seconds(pid)? - before;
    let share = 100.0 * used / QUIET.as_secs_f64();
    let memory = cpu::memory_mib(pid)?;
    say(&format!(
        "weftd, {kind}, {leases} leases: {memory:.0} MiB at most, {share:.2} % of a core"
    ));
    lab.remove()
}

fn interface() -> Result<ExternalInterface> {
    let links = Netlink::open()?.links()?;
    let link = links.into_iter().find(|link| link.name == "eth0").context("no eth0")?;
    let ipv4 = link.addresses.iter().find_map(|address| match address.network.ip() {
        IpAddr::V4(ip) => Some(ip),
        IpAddr::V6(_) => None,
    });
    Ok(ExternalInterface {
        name: link.name.clone(),
        index: link.index,
        mtu: link.mtu,
        ipv4,
        ipv6: None,
        public_ipv4: ipv4,
        public_ipv6: None,
        other_addresses: Vec::new(),
        link_local: None,
    })
}

fn peer(kind: BackendKind, number: u32) -> DesiredPeer {
    DesiredPeer { lease: lease(kind, number), other_addresses: Vec::new(), is_weft: false }
}

/// The number's /24 of the Network, and an address that the default route takes to be on the link.
fn lease(kind: BackendKind, number: u32) -> Lease {
    let base = Ipv4Addr::from((100 << 24) | (64 << 16) | (number << 8));
    let [.., b, c, d] = number.to_be_bytes();
    let mac = format!("02:00:00:{b:02x}:{c:02x}:{d:02x}");
    let is_vxlan = kind == BackendKind::Vxlan;
    let attrs = LeaseAttrs {
        public_ip: Some(Ipv4Addr::from((172 << 24) | (16 << 16) | number)),
        backend_type: if kind == BackendKind::UdpTun { String::new() } else { kind.to_string() },
        backend_data: is_vxlan.then(|| json!({"VNI": 1, "VtepMAC": mac})),
        ..LeaseAttrs::default()
    };
    let ipv4 = format!("{base}/24").parse().ok();
    Lease { key: LeaseKey::new(ipv4, None), attrs, expires: Expiry::Never, revision: 0 }
}

/// The median is held against the target.
fn tell(what: &str, times: &[Duration], target: Option<Duration>) {
    let times = Spread::of(times.iter().map(Duration::as_secs_f64)).expect("it was measured");
    let [median, longest] = [times.median, times.max].map(Duration::from_secs_f64);
    let held = target.map(|target| {
        let verdict = if median < target { "held" } else { "MISSED" };
        format!(", target {target:?}: {verdict}")
    });
    let held = held.unwrap_or_default();
    say(&format!("{what}: median {median:.1?}, longest {longest:.1?}{held}"));
}

#[expect(clippy::print_stdout, reason = "it is what this program is for")]
fn say(line: &str) {
    println!("{line}");
}
