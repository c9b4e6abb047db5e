//! More than the wire carries: what cannot go out waits in the kernel's queues, where it is counted,
//! and the other direction does not notice.

use std::net::UdpSocket;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use weft_daemon::lab::Lab;
use weft_tests::load::Over;
use weft_tests::{bring_up, counter, hosts, link_count, udp_socket, until};

/// What the first host's wire is cut down to, with more room in its queue than the engine's socket
/// has in its send buffer.
const SLOW: &str = "qdisc add dev eth0 root tbf rate 50mbit burst 64kb limit 100mb";

#[test]
fn a_full_socket_makes_packets_wait_and_the_other_direction_goes_on() -> Result<()> {
    // Polling, one thread carries both directions.
    for flags in [
        ["--io=uring", "--busy-poll=0"],
        ["--io=mmsg", "--busy-poll=0"],
        ["--io=uring", "--busy-poll=50"],
        ["--io=mmsg", "--busy-poll=50"],
    ] {
        let mut lab = hosts(2)?;
        bring_up(&mut lab, &[&flags[..], &["--workers=1"]].concat())?;
        let arguments: Vec<&str> = SLOW.split(' ').collect();
        lab.host(0).netns.tool("tc", &arguments)?;
        let (near, far) = (udp_socket(&lab, 0)?, udp_socket(&lab, 1)?);
        let enough = AtomicBool::new(false);
        thread::scope(|scope| {
            let _over = Over(&enough);
            scope.spawn(|| {
                while !enough.load(Ordering::Relaxed) {
                    // A full queue is what this is for.
                    let _ = far.local_addr().and_then(|to| near.send_to(&[0x5a; 1400], to));
                }
            });
            full_but_open(&lab, &near, &far)
        })
        .with_context(|| format!("{flags:?}"))?;
        for lost in ["tun_to_udp_full", "tun_to_udp_overtaken"] {
            assert_eq!(counter(&lab, 0, lost)?, 0, "{flags:?}: {lost}");
        }
        lab.remove()?;
    }
    Ok(())
}

/// Waits until packets queue all the way back, and then sends against the stream.
fn full_but_open(lab: &Lab, near: &UdpSocket, far: &UdpSocket) -> Result<()> {
    until("sends wait for room", || Ok(counter(lab, 0, "tun_to_udp_stalls")? > 0))?;
    until("the device's queue is full", || Ok(link_count(lab, 0, "tx", "dropped")? > 0))?;
    near.set_read_timeout(Some(Duration::from_secs(5)))?;
    for number in 0..500u32 {
        far.send_to(&number.to_be_bytes(), near.local_addr()?)?;
        let mut bytes = [0; 8];
        let len = near.recv(&mut bytes).context("the other direction is blocked")?;
        ensure!(
            bytes[..len] == number.to_be_bytes(),
            "{:02x?} in place of {number}",
            &bytes[..len]
        );
    }
    Ok(())
}
