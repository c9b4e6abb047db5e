//! What the end-to-end tests share: deadlines, packets made by hand, and hosts that are up.

use std::fmt::Debug;
use std::net::IpAddr;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Result, bail};
use etherparse::PacketBuilder;
use weft_daemon::lab::{Lab, LabOptions};

/// How long anything may take on a machine that is busy with other tests.
pub const DEADLINE: Duration = Duration::from_secs(20);

/// Hosts with a weftd and a container each, all of which know each other.
pub fn overlay(hosts: usize) -> Result<Lab> {
    let mut lab = Lab::new(LabOptions {
        hosts,
        ..LabOptions::default()
    })?;
    for host in 0..hosts {
        lab.start_daemon(host, &[])?;
    }
    for host in 0..hosts {
        lab.wait_ready(host, DEADLINE)?;
        lab.attach_container(host)?;
    }
    knows_all(&lab, hosts)?;
    Ok(lab)
}

/// Waits until each of the first `hosts` hosts has all the others as peers.
pub fn knows_all(lab: &Lab, hosts: usize) -> Result<()> {
    for host in 0..hosts {
        until(&format!("host {host} knows {} peers", hosts - 1), || {
            Ok(lab.status(host)?.peers.len() == hosts - 1)
        })?;
    }
    Ok(())
}

/// Asks until the answer is yes.
///
/// # Errors
/// The deadline passed; the last error or `what` says what was waited for.
pub fn until(what: &str, mut ask: impl FnMut() -> Result<bool>) -> Result<()> {
    let deadline = Instant::now() + DEADLINE;
    loop {
        let answer = ask();
        match answer {
            Ok(true) => return Ok(()),
            Ok(false) if Instant::now() > deadline => bail!("never happened: {what}"),
            Err(error) if Instant::now() > deadline => return Err(error.context(what.to_owned())),
            _ => thread::sleep(Duration::from_millis(20)),
        }
    }
}

/// A counter of a host's daemon.
pub fn counter(lab: &Lab, host: usize, name: &str) -> Result<u64> {
    match lab.status(host)?.counters.get(name) {
        Some(count) => Ok(*count),
        None => bail!("no counter {name}"),
    }
}

/// An IP packet that carries a UDP datagram, valid in every field.
pub fn udp_packet(from: IpAddr, to: IpAddr, port: u16, ttl: u8, payload: &[u8]) -> Result<Vec<u8>> {
    let builder = match (from, to) {
        (IpAddr::V4(from), IpAddr::V4(to)) => PacketBuilder::ipv4(from.octets(), to.octets(), ttl),
        (IpAddr::V6(from), IpAddr::V6(to)) => PacketBuilder::ipv6(from.octets(), to.octets(), ttl),
        _ => bail!("{from} and {to} are of two families"),
    };
    let mut packet = Vec::new();
    builder.udp(40_000, port).write(&mut packet, payload)?;
    Ok(packet)
}

/// Panics with both values unless they are equal; for use where `?` carries the rest.
pub fn same<T: PartialEq + Debug>(what: &str, found: T, wanted: T) {
    assert_eq!(found, wanted, "{what}");
}
