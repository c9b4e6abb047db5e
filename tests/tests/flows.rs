//! Many flows at once: none is reordered, all workers take part, and a change of the routes under
//! load loses nothing.

use std::fs;
use std::net::{SocketAddr, UdpSocket};
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{self, Receiver, RecvTimeoutError};
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use weft_daemon::lab::Lab;
use weft_tests::{DEADLINE, SUBNETS_KEPT_FREE, bring_up, hosts, plain_wire, until, write_config};

const FLOWS: u16 = 16;
const FIRST_PORT: u16 = 20_000;
/// The number of the datagram behind the last one.
const END: u32 = u32::MAX;
/// Between two of these, where one may get lost.
const END_INTERVAL: Duration = Duration::from_millis(20);

/// A sender and a receiver for each flow, in the containers of two hosts.
fn flows(lab: &Lab, from: usize, to: usize) -> Result<Vec<(UdpSocket, UdpSocket)>> {
    let (near, far) = (lab.container(from)?, lab.container(to)?);
    (0..FLOWS)
        .map(|flow| {
            let target = SocketAddr::new(far.address()?, FIRST_PORT + flow);
            let receiver = far.netns.run(|| UdpSocket::bind(target))??;
            let sender = near.netns.run(|| UdpSocket::bind("0.0.0.0:0"))??;
            sender.connect(target)?;
            // Not what an earlier sender may have under way still.
            receiver.connect(sender.local_addr()?)?;
            receiver.set_read_timeout(Some(DEADLINE))?;
            Ok((sender, receiver))
        })
        .collect()
}

/// Datagrams of a few sizes, so that some may share a send and a write, and others may not.
fn datagram(number: u32) -> Vec<u8> {
    let mut bytes = vec![0x5a; [64, 64, 64, 1200, 1200, 9][number as usize % 6]];
    bytes[..4].copy_from_slice(&number.to_be_bytes());
    bytes
}

/// Receives until the end comes, and tells of each; how many came before it, in their order.
fn receive_in_order(receiver: &UdpSocket, tell: impl Fn()) -> Result<u32> {
    let (mut bytes, mut next, mut count) = ([0; 2048], 0, 0);
    loop {
        let len = receiver.recv(&mut bytes).context("the end has not come")?;
        let number = u32::from_be_bytes(*bytes.first_chunk().context("too short")?);
        if number == END {
            return Ok(count);
        }
        ensure!(number >= next, "{number} came behind {}", next - 1);
        ensure!(bytes[..len] == datagram(number), "{number} has other bytes");
        next = number + 1;
        count += 1;
        tell();
    }
}

/// How often each thread of the engine has gone to sleep, by its name: one that carries packets
/// does so all the time.
fn sleeps(lab: &Lab, host: usize) -> Result<Vec<(String, u64)>> {
    let tasks = format!("/proc/{}/task", lab.status(host)?.pid);
    let mut found = Vec::new();
    for task in fs::read_dir(tasks)? {
        let path = task?.path();
        let name = fs::read_to_string(path.join("comm"))?.trim().to_owned();
        if ["tun_to_udp-", "udp_to_tun-", "both_ways-"].iter().any(|it| name.starts_with(it)) {
            found.push((name, voluntary_switches(&path)?));
        }
    }
    found.sort();
    Ok(found)
}

fn voluntary_switches(task: &Path) -> Result<u64> {
    let status = fs::read_to_string(task.join("status"))?;
    let line = status.lines().find_map(|line| line.strip_prefix("voluntary_ctxt_switches:"));
    Ok(line.context("no such line")?.trim().parse()?)
}

/// Sends over all flows, both ways at once, and sees that each keeps its order.
fn all_keep_their_order(lab: &Lab) -> Result<()> {
    let received: Result<Vec<u32>> = thread::scope(|scope| {
        let mut receiving = Vec::new();
        for (from, to) in [(0, 1), (1, 0)] {
            let (senders, receivers): (Vec<_>, Vec<_>) = flows(lab, from, to)?.into_iter().unzip();
            let (listening, ended) = mpsc::channel::<()>();
            let receive = |it| {
                let listening = listening.clone();
                scope.spawn(move || {
                    let _listening = listening;
                    receive_in_order(&it, || {})
                })
            };
            receiving.extend(receivers.into_iter().map(receive));
            drop(listening);
            scope.spawn(move || {
                for number in 0..3000 {
                    for sender in &senders {
                        // A full queue loses datagrams, which is no matter here.
                        let _ = sender.send(&datagram(number));
                    }
                }
                while ended.recv_timeout(END_INTERVAL) == Err(RecvTimeoutError::Timeout) {
                    for sender in &senders {
                        // Refused where the receiver is gone already.
                        let _ = sender.send(&datagram(END));
                    }
                }
            });
        }
        receiving.into_iter().map(|it| it.join().expect("a receiver panicked")).collect()
    });
    ensure!(received?.into_iter().all(|count| count > 100), "hardly anything arrived");
    Ok(())
}

/// The threads that have not slept since, of all hosts.
fn idle_since(lab: &Lab, before: &[Vec<(String, u64)>; 2]) -> Result<Vec<String>> {
    let mut idle = Vec::new();
    for (host, before) in before.iter().enumerate() {
        let after = sleeps(lab, host)?;
        assert_eq!(after.len(), before.len());
        let unchanged = after.into_iter().filter(|thread| before.contains(thread));
        idle.extend(unchanged.map(|(name, _)| format!("{name} of host {host}")));
    }
    Ok(idle)
}

#[test]
fn no_flow_is_reordered_and_every_worker_takes_part() -> Result<()> {
    // Two workers, of two threads each, or one that polls.
    for (flags, threads) in [
        (["--io=uring", "--busy-poll=0"], 4),
        (["--io=mmsg", "--busy-poll=0"], 4),
        (["--io=uring", "--busy-poll=50"], 2),
        (["--io=mmsg", "--busy-poll=50"], 2),
    ] {
        let mut lab = hosts(2)?;
        plain_wire(&lab)?;
        bring_up(&mut lab, &[&flags[..], &["--workers=2"]].concat())?;
        let before = [sleeps(&lab, 0)?, sleeps(&lab, 1)?];
        assert_eq!(before.each_ref().map(Vec::len), [threads; 2], "{flags:?}");
        let mut idle = Vec::new();
        // Ports are the kernel's choice: once in some hundred times all sixteen flows fall to one
        // worker. Others then do not.
        for _ in 0..3 {
            all_keep_their_order(&lab).with_context(|| format!("{flags:?}"))?;
            idle = idle_since(&lab, &before)?;
            if idle.is_empty() {
                break;
            }
        }
        assert_eq!(idle, <[&str; 0]>::default(), "{flags:?}: these have carried nothing");
        lab.remove()?;
    }
    Ok(())
}

/// For strict firewalls: all of it leaves by the port that it comes in at.
#[test]
fn a_fixed_source_port_is_the_only_one() -> Result<()> {
    let mut lab = hosts(2)?;
    bring_up(&mut lab, &["--workers=2", "--udp-source-port=fixed"])?;
    let host = &lab.host(0).netns;
    host.tool("nft", &["add table ip ports"])?;
    host.tool("nft", &["add chain ip ports out { type filter hook output priority 0; }"])?;
    for sport in ["8285", "!= 8285"] {
        host.tool(
            "nft",
            &[&format!("add rule ip ports out udp dport 8285 udp sport {sport} counter")],
        )?;
    }
    all_keep_their_order(&lab)?;
    let listed = host.tool("nft", &["list table ip ports"])?;
    let counts =
        listed.lines().filter_map(|line| line.split_once("counter packets ")?.1.split(' ').next());
    let counts = counts.map(str::parse).collect::<Result<Vec<u64>, _>>()?;
    assert!(counts.len() == 2 && counts[0] > 100 && counts[1] == 0, "{listed}");
    lab.remove()
}

/// How many datagrams are under way at a time: a few batches, and less than any queue holds, the
/// receiving socket with its 208 KiB being the shortest.
const UNDER_WAY: usize = 64;
const CHANGES: u32 = 20;

/// As fast as it goes with so many under way that no queue is full: nothing but the change itself
/// could lose any.
#[test]
fn routes_change_under_load_without_a_loss() -> Result<()> {
    let mut lab = hosts(2)?;
    write_config(&lab, SUBNETS_KEPT_FREE)?;
    bring_up(&mut lab, &[])?;
    let (sender, receiver) = flows(&lab, 0, 1)?.swap_remove(0);
    let enough = AtomicBool::new(false);
    let (tell, arrived) = mpsc::channel();
    let (sent, received) = thread::scope(|scope| {
        let tell = move || {
            // The sender has stopped listening when it is done.
            let _ = tell.send(());
        };
        let (sender, receiver, enough) = (&sender, &receiver, &enough);
        let receiving = scope.spawn(move || receive_in_order(receiver, tell));
        let sending = scope.spawn(move || {
            let sent = send_until(enough, sender, &arrived);
            sender.send(&datagram(END))?;
            sent
        });
        let changed = (0..CHANGES / 2).try_for_each(|_| come_and_go(&lab));
        enough.store(true, Ordering::Relaxed);
        let sent = sending.join().expect("the sender panicked");
        // First, since the sender only notices that nobody tells it of arrivals any more.
        let received = receiving.join().expect("the receiver panicked")?;
        changed?;
        anyhow::Ok((sent?, received))
    })?;
    assert_eq!(received, sent);
    assert!(sent > 1000, "only {sent} datagrams met {CHANGES} changes");
    lab.remove()
}

/// Sends one more whenever one has arrived; how many in all.
fn send_until(enough: &AtomicBool, sender: &UdpSocket, arrived: &Receiver<()>) -> Result<u32> {
    let mut number = 0;
    while !enough.load(Ordering::Relaxed) {
        sender.send(&datagram(number))?;
        number += 1;
        if number as usize > UNDER_WAY {
            arrived.recv_timeout(DEADLINE).context("a datagram is lost")?;
        }
    }
    Ok(number)
}

/// A third node's lease appears in the registry and vanishes again, and the first host follows.
fn come_and_go(lab: &Lab) -> Result<()> {
    let lease = lab.registry()?.join("subnets/10.42.200.0-24");
    fs::write(&lease, r#"{"PublicIP":"10.168.0.99"}"#)?;
    until("the third node is there", || Ok(lab.status(0)?.peers.len() == 2))?;
    fs::remove_file(&lease)?;
    until("the third node is gone", || Ok(lab.status(0)?.peers.len() == 1))
}
