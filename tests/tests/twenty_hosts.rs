//! Twenty hosts, each with a daemon and a container: every one reaches every other.

use std::sync::Arc;
use std::thread;

use anyhow::{Context, Result};
use weft_daemon::lab::{Bytes, Patience, transfer};
use weft_tests::{bring_up, hosts_of};

const HOSTS: usize = 20;
/// Enough for some super-packets each.
const AMOUNT: Bytes = Bytes(256 << 10);

/// A transfer between each two, both ways, several at a time.
fn all_pairs(backend: &str) -> Result<()> {
    let mut lab = hosts_of(backend, HOSTS)?;
    bring_up(&mut lab, &[])?;
    let containers: Vec<_> =
        (0..HOSTS).map(|host| lab.container(host).map(Arc::clone)).collect::<Result<_>>()?;
    let from_each = |from: usize| -> Result<usize> {
        let others = (0..HOSTS).filter(|to| *to != from);
        let moved = others.map(|to| {
            let (from, to) = (&containers[from], &containers[to]);
            let moved =
                transfer(&from.netns, &to.netns, to.address()?, AMOUNT, &Patience::default())?;
            Ok(usize::from(moved.intact()))
        });
        moved.sum::<Result<usize>>().with_context(|| format!("from h{}", from + 1))
    };
    for batch in (0..HOSTS).collect::<Vec<_>>().chunks(4) {
        let intact = thread::scope(|scope| {
            let running: Vec<_> =
                batch.iter().map(|from| scope.spawn(|| from_each(*from))).collect();
            let outcomes = running.into_iter().map(|it| it.join().expect("a transfer panicked"));
            outcomes.sum::<Result<usize>>()
        })?;
        assert_eq!(intact, batch.len() * (HOSTS - 1));
    }
    lab.remove()
}

#[test]
fn twenty_hosts_of_udp_tun_reach_each_other() -> Result<()> {
    all_pairs("udp-tun")
}

#[test]
fn twenty_hosts_of_host_gw_reach_each_other() -> Result<()> {
    all_pairs("host-gw")
}

#[test]
fn twenty_hosts_of_vxlan_reach_each_other() -> Result<()> {
    all_pairs("vxlan")
}
