//! `--busy-poll`: one thread carries both directions, polls for a while, and then sleeps like others.

use std::net::{SocketAddr, UdpSocket};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use weft_daemon::lab::{Bytes, Lab, Patience, transfer};
use weft_tests::{DEADLINE, bring_up, hosts};

fn socket(lab: &Lab, host: usize) -> Result<UdpSocket> {
    let container = lab.container(host)?;
    let address = SocketAddr::new(container.address()?, 0);
    let socket = container.netns.run(|| UdpSocket::bind(address))??;
    socket.set_read_timeout(Some(DEADLINE))?;
    Ok(socket)
}

/// One packet at a time, between which the engine goes to sleep or goes on polling. Were it not to
/// wake up for each, the next probe would wake it, and there is no time for so many.
fn each_is_answered(lab: &Lab) -> Result<()> {
    let (near, far) = (socket(lab, 0)?, socket(lab, 1)?);
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
    let ends = [lab.container(0)?, lab.container(1)?];
    thread::scope(|scope| {
        let both = [(ends[0], ends[1]), (ends[1], ends[0])];
        let running = both.map(|(from, to)| {
            scope.spawn(|| {
                let (to_address, patience) = (to.address()?, Patience::default());
                transfer(&from.netns, &to.netns, to_address, Bytes(16 << 20), &patience)
            })
        });
        for it in running {
            let moved = it.join().expect("a transfer panicked")?;
            ensure!(moved.intact(), "bytes arrived as others: {moved:?}");
        }
        Ok(())
    })
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
                .with_context(|| format!("{io} {busy_poll}"))?;
            lab.remove()?;
        }
    }
    Ok(())
}
