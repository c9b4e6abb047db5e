//! Leases in a real etcd, and a host whose clock is not right.

use std::cmp::Ordering::{Equal, Greater, Less};
use std::fs;
use std::path::PathBuf;

use anyhow::Result;
use rustix::process::Signal;
use weft_daemon::lab::Lab;
use weft_tests::etcd::{get, hosts, weftd};
use weft_tests::{DEADLINE, Weftd, all_acquainted, pings, renews, subnet, until};

/// What one process takes for the time of day, as a difference to it.
struct Clock {
    file: PathBuf,
    pid: u32,
}

impl Clock {
    fn set(&self, difference: &str) -> Result<()> {
        Ok(fs::write(&self.file, difference)?)
    }
}

impl Drop for Clock {
    /// What libfaketime keeps in memory for its process, which takes it away only if it ends by itself.
    fn drop(&mut self) {
        for name in ["faketime_shm_", "sem.faketime_sem_"] {
            let _ = fs::remove_file(format!("/dev/shm/{name}{}", self.pid));
        }
    }
}

/// A daemon on the first host that goes by such a clock, but for its timers.
fn with_a_clock(lab: &Lab, flags: &[&str]) -> Result<(Weftd, Clock)> {
    let file = lab.registry()?.with_file_name("clock");
    fs::write(&file, "+0")?;
    let host = lab.host(0);
    let mut command = weftd(lab, 0, flags)?;
    // libfaketime's, which Debian's dynamic linker finds by this name.
    command.env("LD_PRELOAD", "/usr/$LIB/faketime/libfaketime.so.1");
    command.env("FAKETIME_TIMESTAMP_FILE", &file);
    command.envs([("FAKETIME_NO_CACHE", "1"), ("FAKETIME_DONT_FAKE_MONOTONIC", "1")]);
    let daemon = Weftd::start_command(&host.netns, &host.log, &mut command)?;
    let clock = Clock { file, pid: daemon.pid() };
    Ok((daemon, clock))
}

/// A clock that is set back and forth by a year: leases are renewed in time, and nobody is forgotten.
#[test]
fn a_clock_that_jumps_is_not_followed() -> Result<()> {
    let mut lab = hosts(2, 1)?;
    let ttl = "--subnet-lease-ttl=10s";
    let (daemon, clock) = with_a_clock(&lab, &[ttl])?;
    lab.start_daemon(1, &[ttl])?;
    lab.wait_ready(1, DEADLINE)?;
    daemon.logs("forwarding")?;
    all_acquainted(&lab)?;
    for host in 0..2 {
        lab.attach_container(host)?;
    }
    let own = subnet(&lab, 0)?;
    let year = |line: Option<&str>| line.and_then(|line| line.get(..4)?.parse::<i32>().ok());
    let now = year(daemon.log()?.lines().next());
    for (jump, order) in [("-400d", Less), ("+400d", Greater), ("+0", Equal)] {
        clock.set(jump)?;
        for _ in 0..3 {
            renews(&lab, 0)?;
        }
        let log = daemon.log()?;
        assert_eq!(year(log.lines().last()).cmp(&now), order, "{log}");
        assert!(!log.contains("claiming it again"), "{log}");
        assert_eq!(subnet(&lab, 0)?, own);
        all_acquainted(&lab)?;
        pings(&lab)?;
    }
    assert!(daemon.end(Signal::TERM)?.success());
    lab.remove()
}

/// The clock of timers stands still meanwhile, and the lease runs on.
#[test]
fn who_was_asleep_renews_the_lease() -> Result<()> {
    let lab = hosts(1, 1)?;
    let (daemon, clock) = with_a_clock(&lab, &[])?;
    daemon.logs("wrote subnet.env")?;
    until("the lease is there", || Ok(!get(&lab, "subnets/")?.is_empty()))?;
    let before = lab.status(0)?.lease_expires;
    clock.set("+2h")?;
    // What is noticed when a host goes on.
    lab.host(0).netns.ip(&["link", "add", "woken", "type", "bridge"])?;
    until("the lease is renewed", || Ok(lab.status(0)?.lease_expires > before))?;
    assert!(daemon.end(Signal::TERM)?.success());
    lab.remove()
}
