//! `--busy-poll`: one thread carries both directions, polls for a while, and then sleeps like others.

use std::fs;
use std::net::{SocketAddr, UdpSocket};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use weft_daemon::lab::{Bytes, Lab, Patience, PingOptions, transfer};
use weft_tests::{DEADLINE, bring_up, hosts, until};

fn socket(lab: &Lab, host: usize) -> Result<UdpSocket> {
    let container = lab.container(host)?;
    let address = SocketAddr::new(container.address()?, 0);
    let socket = container.netns.run(|| UdpSocket::bind(address))??;
    socket.set_read_timeout(Some(DEADLINE))?;
    Ok(socket)
}

/// One packet at a time, between which the engine goes to sleep or goes on polling. A lost wake-up
/// shows as time: the daemon's next probe wakes it.
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

/// Hundredths of a second that the first host's thread has run (proc_pid_stat(5)).
fn ticks(lab: &Lab) -> Result<u64> {
    for task in fs::read_dir(format!("/proc/{}/task", lab.status(0)?.pid))? {
        let stat = fs::read_to_string(task?.path().join("stat"))?;
        let (name, rest) = stat.rsplit_once(')').context("no name")?;
        if name.ends_with("(both_ways-0") {
            // Fields 14 and 15; the state, behind the name, is the third.
            let times: Vec<u64> = rest
                .split_whitespace()
                .skip(14 - 3)
                .take(2)
                .map(str::parse)
                .collect::<Result<_, _>>()?;
            return Ok(times.iter().sum());
        }
    }
    anyhow::bail!("the engine has no thread for both directions")
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
