//! What a fleet of ten thousand nodes costs one of them: the list of all leases from a real etcd, a
//! change of one of them, and whom that makes a peer. Needs root, as the lab does.

mod fleet;

use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use hdrhistogram::Histogram;
use weft_control::lease::{Expiry, Lease, Snapshot};
use weft_control::peers::peers;
use weft_control::{Access, Etcd3Registry, LeaseAttrs, LeaseKey, NetworkConfig, Registry};
use weft_daemon::lab::{EtcdOptions, Lab, LabOptions};

const LEASES: u32 = 10_000;
const CONFIG: &str = r#"{"Network":"10.0.0.0/8"}"#;
const LISTS: u32 = 30;
const EVENTS: u32 = 300;
const PATIENCE: Duration = Duration::from_secs(20);

fn main() -> Result<()> {
    let etcd = EtcdOptions { members: 1, ..EtcdOptions::default() };
    let lab = Lab::new(LabOptions { hosts: 1, etcd, ..LabOptions::default() })?;
    let urls = lab.etcd_urls();
    lab.host(0).netns.run(|| {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        runtime.block_on(measure(urls))
    })??;
    lab.remove()
}

async fn measure(urls: Vec<String>) -> Result<()> {
    let leases: Vec<Lease> = (0..LEASES).map(lease).collect();
    fleet::write(&urls, CONFIG, &leases).await?;
    let access = Access { endpoints: urls, ..Access::default() };
    let registry = Etcd3Registry::new(&access, fleet::PREFIX);

    let mut times = Times::default();
    for _ in 0..LISTS {
        times.time(async || registry.snapshot().await).await?;
    }
    times.report("list all leases", Duration::from_millis(100));

    let mut watch = registry.watch(Snapshot::default());
    let listed = watch.wait_for(|view| view.readable);
    let view = tokio::time::timeout(PATIENCE, listed).await??.clone();
    let mut own = view.snapshot.leases[0].clone();
    let mut times = Times::default();
    for _ in 0..EVENTS {
        let begun = Instant::now();
        let written = registry.renew(&own, &own.attrs, None).await?;
        own = written.context("somebody else writes here")?;
        let known = |lease: &Lease| lease.revision == own.revision;
        let seen = watch.wait_for(|view| view.snapshot.leases.iter().any(known));
        tokio::time::timeout(PATIENCE, seen).await??;
        times.add(begun.elapsed());
    }
    times.report("write one and hear of it", Duration::from_millis(5));

    let config: NetworkConfig = CONFIG.parse()?;
    let mut times = Times::default();
    for _ in 0..LISTS {
        times
            .time(async || anyhow::Ok(peers(&config, &own, &[], &[], &view.snapshot.leases)))
            .await?;
    }
    times.report("decide on all peers", Duration::from_millis(5));
    Ok(())
}

/// 10.0.1.0/24 and on.
fn lease(number: u32) -> Lease {
    let base = (10 << 24) | ((number + 1) << 8);
    let ipv4 = format!("{}/24", std::net::Ipv4Addr::from(base)).parse().ok();
    let public_ip = Some(std::net::Ipv4Addr::from((192 << 24) | (168 << 16) | number));
    let attrs = LeaseAttrs { public_ip, ..LeaseAttrs::default() };
    Lease { key: LeaseKey::new(ipv4, None), attrs, expires: Expiry::Never, revision: 0 }
}

/// How long something took, each time, in microseconds.
struct Times(Histogram<u64>);

impl Default for Times {
    fn default() -> Self {
        Self(Histogram::new_with_bounds(1, 60_000_000, 3).expect("valid by construction"))
    }
}

impl Times {
    async fn time<T, E>(&mut self, work: impl AsyncFn() -> Result<T, E>) -> Result<T, E> {
        let begun = Instant::now();
        let done = work().await;
        self.add(begun.elapsed());
        done
    }

    fn add(&mut self, time: Duration) {
        self.0.saturating_record(u64::try_from(time.as_micros()).unwrap_or(u64::MAX));
    }

    #[expect(clippy::print_stdout, reason = "it is what this program is for")]
    fn report(&self, what: &str, target: Duration) {
        let at = |quantile| Duration::from_micros(self.0.value_at_quantile(quantile));
        let (median, p99) = (at(0.5), at(0.99));
        println!("{what} ({LEASES}): median {median:?}, p99 {p99:?}, target {target:?}");
    }
}
