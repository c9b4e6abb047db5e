//! An underlay that is smaller somewhere on the way: senders are told what fits, and what may be
//! cut arrives in pieces.

use std::process::Command;

use anyhow::{Context, Result};
use weft_daemon::lab::{Bytes, Lab, PingOptions};
use weft_tests::{counter, overlay, until};

/// The path's MTU, and what is left of it for an inner packet.
const PATH_MTU: &str = "1400";
const INNER_MTU: &str = "1372";

/// A router that stands on the lab's switch, with a smaller way from there to host 1 (the second).
fn behind_a_router(lab: &mut Lab) -> Result<()> {
    let far = lab.host(1).address.to_string();
    let router = lab.add_router(&["10.168.0.200/24".parse()?])?;
    router.ip(&["route", "add", &far, "dev", "eth0", "mtu", "lock", PATH_MTU])?;
    lab.host(0).netns.ip(&["route", "add", &far, "via", "10.168.0.200"])
}

#[test]
fn a_smaller_path_is_told_and_transfers_pass() -> Result<()> {
    let mut lab = overlay(2)?;
    behind_a_router(&mut lab)?;

    // First those that may be cut: afterwards the container knows the path's MTU.
    let to = lab.container(1)?.address()?.to_string();
    let mut cut = Command::new("ping");
    cut.args(["-c", "1", "-W", "1", "-M", "dont", "-s", "1444", &to]);
    let from = &lab.container(0)?.netns;
    until("a packet that may be cut arrives", || Ok(from.output(&mut cut)?.status.success()))?;
    assert!(counter(&lab, 0, "tun_to_udp_fragmented")? > 0);

    let large = PingOptions { size: Some(1444), df: true, ..PingOptions::default() };
    let report = lab.ping(0, 1, &large)?;
    assert_eq!(report.received, 0, "{report:?}");
    let told = report.errors.iter().find(|line| line.contains(INNER_MTU));
    told.with_context(|| format!("nobody told the sender {INNER_MTU}: {report:?}"))?;
    assert!(counter(&lab, 0, "tun_to_udp_too_big")? > 0);
    assert!(counter(&lab, 0, "icmp_sent")? > 0);

    let fitting = PingOptions { size: Some(1372 - 28), df: true, ..PingOptions::default() };
    let report = lab.ping(0, 1, &fitting)?;
    assert!(report.complete(), "{report:?}");
    assert!(lab.transfer(0, 1, Bytes(8 << 20))?.intact());
    lab.remove()
}
