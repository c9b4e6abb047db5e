//! The engine's threads let others finish, unless they would have to wait for them.

use std::fs;
use std::hint;
use std::net::{SocketAddr, UdpSocket};
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result};
use weft_daemon::lab::Lab;
use weft_tests::{bring_up, hosts, until};

/// The numbers of sched(7).
const SCHED_OTHER: u32 = 0;
const SCHED_BATCH: u32 = 3;

/// How the thread that reads the first host's device is scheduled.
fn policy(lab: &Lab) -> Result<u32> {
    for task in fs::read_dir(format!("/proc/{}/task", lab.status(0)?.pid))? {
        let stat = fs::read_to_string(task?.path().join("stat"))?;
        let (name, rest) = stat.rsplit_once(')').context("no name")?;
        if name.ends_with("(tun_to_udp-0") {
            // Field 41 of proc_pid_stat(5); the state, behind the name, is the third.
            return Ok(rest.split_whitespace().nth(41 - 3).context("no policy")?.parse()?);
        }
    }
    anyhow::bail!("the engine has no such thread")
}

fn keep_sending(lab: &Lab, stop: &AtomicBool) -> Result<()> {
    let (near, far) = (lab.container(0)?, lab.container(1)?);
    let from = SocketAddr::new(near.address()?, 0);
    let to = SocketAddr::new(far.address()?, 9);
    let socket = near.netns.run(|| UdpSocket::bind(from))??;
    while !stop.load(Ordering::Relaxed) {
        // Nobody listens, of which the sender is told now and then.
        let _ = socket.send_to(b"packet", to);
        thread::sleep(Duration::from_micros(200));
    }
    Ok(())
}

fn keep_busy(stop: &AtomicBool) {
    while !stop.load(Ordering::Relaxed) {
        hint::spin_loop();
    }
}

#[test]
fn a_thread_is_a_batch_unless_busy_ones_keep_it_waiting() -> Result<()> {
    let mut lab = hosts(2)?;
    bring_up(&mut lab, &["--workers=1"])?;
    let [enough_sent, enough_done] = [const { AtomicBool::new(false) }; 2];
    let busy = 4 * thread::available_parallelism()?.get();
    thread::scope(|scope| {
        let sending = scope.spawn(|| keep_sending(&lab, &enough_sent));
        let begun = until("it is a batch", || Ok(policy(&lab)? == SCHED_BATCH));
        for _ in 0..busy {
            scope.spawn(|| keep_busy(&enough_done));
        }
        let gave_up = until("it waits too long", || Ok(policy(&lab)? == SCHED_OTHER));
        enough_done.store(true, Ordering::Relaxed);
        let back = until("it is a batch again", || Ok(policy(&lab)? == SCHED_BATCH));
        enough_sent.store(true, Ordering::Relaxed);
        sending.join().expect("the sender panicked")?;
        begun.and(gave_up).and(back)
    })?;
    lab.remove()
}
