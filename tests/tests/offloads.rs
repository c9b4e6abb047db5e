//! Transfers keep their bytes whatever the kernel does or does not do for many packets at once: both
//! ways of input and output, features switched off in turn, a wire that loses packets.

use std::fs;
use std::io::IoSlice;
use std::os::fd::AsRawFd;
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::thread;

use anyhow::{Context, Result, ensure};
use nix::sys::socket::{ControlMessage, MsgFlags, SockaddrStorage, sendmsg};
use rustix::net::sockopt::{socket_domain, socket_type};
use rustix::net::{AddressFamily, SocketType};
use rustix::process::{Pid, PidfdFlags, PidfdGetfdFlags, pidfd_getfd, pidfd_open};
use weft_daemon::lab::{Bytes, Container, Lab, Patience, transfer};
use weft_tests::{DEADLINE, bring_up, counter, hosts, plain_wire, udp_socket, until};

const KINDS: [&str; 6] =
    ["tun-tso", "tun-uso", "udp-segment", "udp-gro", "tcp-coalesce", "udp-coalesce"];

/// Every pair of kinds is off together in exactly one of these: the lines of the Fano plane, without
/// one of its points.
const LINES: [&[usize]; 7] =
    [&[0, 1, 2], &[0, 3, 4], &[0, 5], &[1, 3, 5], &[1, 4], &[2, 3], &[2, 4, 5]];

/// What one direction carries in all, in the cases that matter most, and in the others.
const FULL: u64 = 64 << 20;
const SHORT: u64 = 4 << 20;

fn off(kinds: impl IntoIterator<Item = usize>) -> String {
    let kinds: Vec<String> = kinds.into_iter().map(|at| format!("{}=off", KINDS[at])).collect();
    format!("--offload={}", kinds.join(","))
}

/// Two hosts whose daemons have these flags.
fn overlay(flags: &[&str]) -> Result<Lab> {
    let mut lab = hosts(2)?;
    bring_up(&mut lab, flags)?;
    Ok(lab)
}

/// Moves `total` bytes each way at once, over 1, 4 and 50 connections.
fn transfers_are_intact(lab: &Lab, total: u64) -> Result<()> {
    let ends = [lab.container(0)?, lab.container(1)?];
    for streams in [1, 4, 50] {
        thread::scope(|scope| {
            let both = [(ends[0], ends[1]), (ends[1], ends[0])];
            let running: Vec<_> = (0..streams)
                .flat_map(|_| both)
                .map(|(from, to)| scope.spawn(move || one(from, to, total / streams)))
                .collect();
            running.into_iter().try_for_each(|it| it.join().expect("a transfer panicked"))
        })?;
    }
    Ok(())
}

fn one(from: &Arc<Container>, to: &Arc<Container>, bytes: u64) -> Result<()> {
    let moved =
        transfer(&from.netns, &to.netns, to.address()?, Bytes(bytes), &Patience::default())?;
    ensure!(moved.intact(), "{bytes} bytes arrived as others: {moved:?}");
    Ok(())
}

/// The kinds that are not in use.
fn fallen(lab: &Lab) -> Result<Vec<String>> {
    let offloads = lab.status(0)?.offloads.into_iter();
    Ok(offloads.filter(|(_, state)| state != "on").map(|(name, _)| name).collect())
}

#[test]
fn with_everything() -> Result<()> {
    for io in ["uring", "mmsg"] {
        let lab = overlay(&[&format!("--io={io}")])?;
        transfers_are_intact(&lab, FULL)?;
        assert_eq!(lab.status(0)?.io.as_deref(), Some(io));
        assert_eq!(fallen(&lab)?, <[&str; 0]>::default());
        assert!(counter(&lab, 0, "tun_to_udp_super_packets")? > 0);
        assert!(counter(&lab, 0, "udp_to_tun_super_packets")? > 0);
        lab.remove()?;
    }
    Ok(())
}

#[test]
fn with_what_older_kernels_have() -> Result<()> {
    // Linux 6.1; io_uring can wait for a TUN device since 6.4 only.
    let lab = overlay(&["--io=mmsg", &off([1])])?;
    transfers_are_intact(&lab, FULL)?;
    assert_eq!(fallen(&lab)?, ["tun-uso", "udp-coalesce"]);
    lab.remove()
}

#[test]
fn with_nothing() -> Result<()> {
    for io in ["--io=uring", "--io=mmsg"] {
        let lab = overlay(&[io, &off(0..KINDS.len())])?;
        transfers_are_intact(&lab, 2 * SHORT)?;
        assert_eq!(counter(&lab, 0, "tun_to_udp_super_packets")?, 0);
        assert_eq!(counter(&lab, 0, "udp_to_tun_super_packets")?, 0);
        // Of one moment: probes may cross at any time.
        let counters = lab.status(0)?.counters;
        assert_eq!(counters["tun_to_udp_sends"], counters["tun_to_udp_packets"]);
        lab.remove()?;
    }
    Ok(())
}

/// Each datagram is a send of its own: more of them than there are buffers to send from come of a few
/// super-packets.
#[test]
fn without_udp_segment_all_find_a_buffer() -> Result<()> {
    for io in ["--io=uring", "--io=mmsg"] {
        let lab = overlay(&[io, &off([2])])?;
        transfers_are_intact(&lab, FULL)?;
        for host in 0..2 {
            for lost in ["tun_to_udp_full", "tun_to_udp_overtaken"] {
                assert_eq!(counter(&lab, host, lost)?, 0, "{io}, host {host}: {lost}");
            }
        }
        lab.remove()?;
    }
    Ok(())
}

#[test]
fn with_every_pair_off() -> Result<()> {
    for (io, line) in ["--io=uring", "--io=mmsg"].into_iter().cycle().zip(LINES) {
        let lab = overlay(&[io, &off(line.iter().copied())])?;
        transfers_are_intact(&lab, SHORT)?;
        lab.remove()?;
    }
    Ok(())
}

/// On a plain wire each datagram arrives by itself; they are joined all the same.
#[test]
fn on_a_plain_wire() -> Result<()> {
    for io in ["--io=uring", "--io=mmsg"] {
        let lab = overlay(&[io])?;
        plain_wire(&lab)?;
        transfers_are_intact(&lab, FULL / 2)?;
        assert!(counter(&lab, 0, "udp_to_tun_super_packets")? > 0);
        lab.remove()?;
    }
    Ok(())
}

#[test]
fn over_a_wire_that_loses_one_in_a_hundred() -> Result<()> {
    for io in ["--io=uring", "--io=mmsg"] {
        let lab = overlay(&[io])?;
        plain_wire(&lab)?;
        for host in 0..2 {
            let netns = &lab.host(host).netns;
            netns.tool("nft", &["add table inet loss"])?;
            let chain = "add chain inet loss in { type filter hook input priority 0; }";
            netns.tool("nft", &[chain])?;
            let rule =
                "add rule inet loss in udp dport 8285 numgen random mod 100 == 0 counter drop";
            netns.tool("nft", &[rule])?;
        }
        transfers_are_intact(&lab, SHORT)?;
        let dropped = lab.host(0).netns.tool("nft", &["list chain inet loss in"])?;
        assert!(dropped.contains("packets") && !dropped.contains("packets 0 "), "{dropped}");
        lab.remove()?;
    }
    Ok(())
}

/// Has the kernel refuse UDP_SEGMENT on all of a program's UDP sockets: who does without checksums, by
/// SO_NO_CHECK, cannot have it (udp_send_skb in net/ipv4/udp.c).
fn refuse_segments(pid: u32) -> Result<()> {
    let program = Pid::from_raw(pid.cast_signed()).context("no such program")?;
    let program = pidfd_open(program, PidfdFlags::empty())?;
    let mut found = 0;
    for entry in fs::read_dir(format!("/proc/{pid}/fd"))? {
        let fd = entry?.file_name().to_string_lossy().parse()?;
        let Ok(fd) = pidfd_getfd(&program, fd, PidfdGetfdFlags::empty()) else { continue };
        if socket_domain(&fd) != Ok(AddressFamily::INET)
            || socket_type(&fd) != Ok(SocketType::DGRAM)
        {
            continue;
        }
        // No crate here sets this option.
        let set = "setsockopt(STDIN, 1, 11, pack('i', 1)) or die $!";
        let status = Command::new("perl").args(["-e", set]).stdin(Stdio::from(fd)).status()?;
        ensure!(status.success(), "perl: {status}");
        found += 1;
    }
    ensure!(found > 0, "{pid} has no UDP socket");
    Ok(())
}

#[test]
fn what_the_kernel_refuses_while_packets_flow_is_given_up() -> Result<()> {
    for io in ["--io=uring", "--io=mmsg"] {
        let lab = overlay(&[io])?;
        transfers_are_intact(&lab, SHORT)?;
        assert_eq!(lab.status(0)?.offloads["udp-segment"], "on");
        refuse_segments(lab.status(0)?.pid)?;
        transfers_are_intact(&lab, SHORT)?;
        let status = lab.status(0)?;
        assert_eq!(status.offloads["udp-segment"], "refused");
        assert_eq!(status.offloads["udp-gro"], "on");
        assert!(status.counters["tun_to_udp_segment_refused"] > 0);
        assert_eq!(status.counters["tun_to_udp_send_failed"], 0);
        let log = fs::read_to_string(&lab.host(0).log)?;
        let told = log.matches("the kernel refuses udp-segment (Invalid argument").count();
        assert_eq!(told, 1, "{log}");
        lab.remove()?;
    }
    Ok(())
}

/// What a container sends in one call, as programs do that speak QUIC, stays in one piece.
#[test]
fn udp_crosses_both_devices_as_super_packets() -> Result<()> {
    const SUPER_PACKETS: u64 = 20;
    let off = "--offload=tun-uso=off";
    for flags in [&["--io=uring"][..], &["--io=mmsg"], &["--io=uring", off], &["--io=mmsg", off]] {
        let lab = overlay(flags)?;
        let has = &lab.status(0)?.offloads["tun-uso"];
        if has == "missing" {
            eprintln!("this kernel has no super-packets of UDP");
            return lab.remove();
        }
        send_super_packets(&lab, SUPER_PACKETS)?;
        let counted = || -> Result<[u64; 2]> {
            let (cut, joined) = ("tun_to_udp_super_packets", "udp_to_tun_super_packets");
            Ok([counter(&lab, 0, cut)?, counter(&lab, 1, joined)?])
        };
        if has == "on" {
            let is_each = || Ok(counted()?.into_iter().all(|count| count >= SUPER_PACKETS));
            until("super-packets are counted", is_each)
                .with_context(|| format!("{flags:?}: {:?}", counted()))?;
        } else {
            assert_eq!(counted()?, [0; 2], "{flags:?}");
        }
        lab.remove()?;
    }
    Ok(())
}

/// From the first container to the second, the next one when the last one has arrived, datagram by
/// datagram.
fn send_super_packets(lab: &Lab, count: u64) -> Result<()> {
    const SEGMENT: u16 = 1000;
    let (near, far) = (udp_socket(lab, 0)?, udp_socket(lab, 1)?);
    far.set_read_timeout(Some(DEADLINE))?;
    let to = SockaddrStorage::from(far.local_addr()?);
    let segments = [ControlMessage::UdpGsoSegments(&SEGMENT)];
    for _ in 0..count {
        let sent: Vec<Vec<u8>> = (0..20).map(|it| vec![it; SEGMENT.into()]).collect();
        let bytes = sent.concat();
        sendmsg(
            near.as_raw_fd(),
            &[IoSlice::new(&bytes)],
            &segments,
            MsgFlags::empty(),
            Some(&to),
        )?;
        for datagram in sent {
            let mut bytes = [0; 2000];
            let len = far.recv(&mut bytes).context("a datagram is lost")?;
            ensure!(bytes[..len] == datagram, "other bytes");
        }
    }
    Ok(())
}

/// Else the pairs above would not be all pairs.
#[test]
fn the_kinds_are_all_there_are() -> Result<()> {
    let lab = overlay(&[])?;
    let known: Vec<String> = lab.status(0)?.offloads.into_keys().collect();
    let mut kinds = KINDS.to_vec();
    kinds.sort_unstable();
    assert_eq!(known, kinds);
    lab.remove()
}
