//! The engine's threads let others finish, unless they would have to wait for them.

use std::hint;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::Duration;

use anyhow::Result;
use weft_daemon::lab::Lab;
use weft_tests::{bring_up, hosts, thread_stat, udp_socket, until};

/// The numbers of sched(7).
const SCHED_OTHER: u64 = 0;
const SCHED_BATCH: u64 = 3;

/// How the thread that reads the first host's device is scheduled.
fn policy(lab: &Lab) -> Result<u64> {
    let [policy] = thread_stat(lab, 0, "tun_to_udp-0", [41])?;
    Ok(policy)
}

fn keep_sending(lab: &Lab, stop: &AtomicBool) -> Result<()> {
    let socket = udp_socket(lab, 0)?;
    let to = SocketAddr::new(lab.container(1)?.address()?, 9);
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
