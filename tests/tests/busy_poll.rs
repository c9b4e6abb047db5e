//! `--busy-poll`: one thread carries both directions, polls for a while, and then sleeps like others.

use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use weft_daemon::lab::{Bytes, Lab, PingOptions};
use weft_tests::{DEADLINE, bring_up, hosts, thread_stat, udp_socket, until};

/// One packet at a time, between which the engine goes to sleep or goes on polling. A lost wake-up
/// shows as time: the daemon's next probe wakes it.
fn each_is_answered(lab: &Lab) -> Result<()> {
    let (near, far) = (udp_socket(lab, 0)?, udp_socket(lab, 1)?);
    far.set_read_timeout(Some(DEADLINE))?;
    near.set_read_timeout(Some(DEADLINE))?;
    let deadline = Instant::now() + DEADLINE;
    for number in 0..1000u32 {
        for (from, to) in [(&near, &far), (&far, &near)] {
            from.send_to(&number.to_be_bytes(), to.local_addr()?)?;
            let mut bytes = [0; 8];
            let len = to.recv(&mut bytes).context("a packet did not arrive")?;
            assert_eq!(bytes[..len], number.to_be_bytes());
        }
        ensure!(Instant::now() < deadline, "packets wait for others to wake the engine");
        if number % 2 == 0 {
            thread::sleep(Duration::from_millis(1));
        }
    }
    Ok(())
}

fn both_ways_at_once(lab: &Lab) -> Result<()> {
    let amount = Bytes(16 << 20);
    thread::scope(|scope| {
        let there = scope.spawn(|| lab.transfer(0, 1, amount));
        let back = lab.transfer(1, 0, amount)?;
        let there = there.join().expect("a transfer panicked")?;
        ensure!(there.intact() && back.intact(), "bytes arrived as others: {there:?}, {back:?}");
        Ok(())
    })
}

/// Hundredths of a second that the first host's thread has run: in user mode, and in the kernel.
fn ticks(lab: &Lab) -> Result<u64> {
    let [user, kernel] = thread_stat(lab, 0, "both_ways-0", [14, 15])?;
    Ok(user + kernel)
}

fn sleeps(lab: &Lab) -> Result<()> {
    until("it sleeps", || {
        let before = ticks(lab)?;
        thread::sleep(Duration::from_millis(300));
        Ok(ticks(lab)? < before + 3)
    })
}

fn survives_its_device(lab: &Lab) -> Result<()> {
    lab.host(0).netns.ip(&["link", "del", "flannel0"])?;
    let once = PingOptions { count: 1, ..PingOptions::default() };
    until("traffic flows over a new device", || Ok(lab.ping(0, 1, &once)?.complete()))
}

#[test]
fn a_thread_that_polls_wakes_up_and_carries_both_ways() -> Result<()> {
    for io in ["--io=uring", "--io=mmsg"] {
        // Shorter than anything that happens, and longer than the pauses here.
        for busy_poll in ["--busy-poll=1", "--busy-poll=5000"] {
            let mut lab = hosts(2)?;
            bring_up(&mut lab, &[io, busy_poll, "--workers=1"])?;
            each_is_answered(&lab)
                .and_then(|()| both_ways_at_once(&lab))
                .and_then(|()| sleeps(&lab))
                .and_then(|()| survives_its_device(&lab))
                .with_context(|| format!("{io} {busy_poll}"))?;
            lab.remove()?;
        }
    }
    Ok(())
}
