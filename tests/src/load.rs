//! Traffic between the first host's container and the second's while something happens: from before
//! its first step until a second after its last.

use std::collections::BTreeSet;
use std::fmt::Debug;
use std::fs::{self, File};
use std::io::Write;
use std::net::{SocketAddr, UdpSocket};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use weft_daemon::lab::{Bytes, Container, Lab, Patience, transfer};

use crate::{DEADLINE, all_acquainted, program, until};

/// Between two datagrams.
const INTERVAL: Duration = Duration::from_millis(10);
/// How many have to come back after the last step.
const ECHOES_AFTER: u32 = 100;
/// How long an end waits for one before it sees whether all is over.
const LOOK: Duration = Duration::from_millis(100);
/// What one transfer moves. The first is small: it shows that data can move.
const FIRST: Bytes = Bytes(1 << 20);
const AMOUNT: Bytes = Bytes(32 << 20);
/// How long data may not move.
const STALL: Duration = Duration::from_secs(5);

/// Those between whom the traffic is.
pub type Ends = [Arc<Container>; 2];

/// The containers of the first two hosts.
pub fn ends(lab: &Lab) -> Result<Ends> {
    Ok([Arc::clone(lab.container(0)?), Arc::clone(lab.container(1)?)])
}

/// The most datagrams in a row that never came back while `steps` were made, or right after, as time; one
/// that is only late is none of them.
pub fn outage_while(ends: &Ends, steps: impl FnOnce() -> Result<()>) -> Result<Duration> {
    let paced = Paced::new(ends)?;
    let is_over = AtomicBool::new(false);
    thread::scope(|scope| {
        let _over = Over(&is_over);
        scope.spawn(|| paced.send_back(&is_over));
        scope.spawn(|| paced.send(&is_over));
        until("a datagram comes back", || Ok(paced.last() > 0))?;
        steps()?;
        let enough = paced.last() + ECHOES_AFTER;
        until("datagrams come back after the last step", || Ok(paced.last() >= enough))?;
        Ok(INTERVAL * paced.longest_gap())
    })
}

/// That not one datagram is lost while `steps` are made, and that data arrive as they were sent.
pub fn loses_nothing_while(ends: &Ends, steps: impl FnOnce() -> Result<()>) -> Result<()> {
    let (has_begun, is_over) = (AtomicBool::new(false), AtomicBool::new(false));
    thread::scope(|scope| {
        let over = Over(&is_over);
        let moving = scope.spawn(|| move_data(ends, &has_begun, &is_over));
        // Where it has ended already, its error comes out below.
        until("data move", || Ok(has_begun.load(Ordering::Relaxed) || moving.is_finished()))?;
        let outage = outage_while(ends, steps)?;
        ensure!(outage.is_zero(), "no datagram came back for {outage:?}");
        drop(over);
        moving.join().expect("a transfer panicked")
    })
}

/// Stops the first host's daemon, starts it, kills it, and starts it again, as another build of it.
/// Nothing is lost, and `objects` of the kernel stay as they are; what `leave_behind` adds to them
/// while no daemon runs is gone after a start.
pub fn loses_nothing_over_restarts<T: PartialEq + Debug>(
    lab: &mut Lab,
    objects: impl Fn() -> Result<T>,
    leave_behind: impl FnOnce() -> Result<()>,
) -> Result<()> {
    let before = objects()?;
    let are_as_before = || -> Result<()> {
        let now = objects()?;
        ensure!(now == before, "{now:#?}, not {before:#?}");
        Ok(())
    };
    let directory = tempfile::tempdir()?;
    let other_build = directory.path().join("weftd");
    fs::copy(program("weftd")?, &other_build)?;
    File::options().append(true).open(&other_build)?.write_all(b"another")?;
    loses_nothing_while(&ends(lab)?, || {
        lab.stop_daemon(0)?;
        are_as_before()?;
        leave_behind()?;
        lab.start_daemon(0, &[])?;
        lab.wait_ready(0, DEADLINE)?;
        until("what is gone is forgotten", || are_as_before().map(|()| true))?;
        lab.kill_daemon(0)?;
        are_as_before()?;
        lab.use_weftd(other_build);
        lab.start_daemon(0, &[])?;
        lab.wait_ready(0, DEADLINE)?;
        all_acquainted(lab)?;
        are_as_before()
    })
}

/// One transfer after the other, until it is over.
fn move_data([from, to]: &Ends, has_begun: &AtomicBool, is_over: &AtomicBool) -> Result<()> {
    let patience = Patience { stall: STALL, ..Patience::default() };
    let mut amount = FIRST;
    while !is_over.load(Ordering::Relaxed) {
        let moved = transfer(&from.netns, &to.netns, to.address()?, amount, &patience)?;
        ensure!(moved.intact(), "{moved:?}");
        has_begun.store(true, Ordering::Relaxed);
        amount = AMOUNT;
    }
    Ok(())
}

/// Says, when dropped, that what others go on beside is over, also by an error or a panic.
#[derive(Debug)]
pub struct Over<'a>(pub &'a AtomicBool);

impl Drop for Over<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

/// Numbered datagrams from one container to another, which sends them back.
struct Paced {
    near: UdpSocket,
    far: UdpSocket,
    to: SocketAddr,
    /// The numbers of those that came back.
    arrived: Mutex<BTreeSet<u32>>,
}

impl Paced {
    fn new([from, to]: &Ends) -> Result<Self> {
        let bind = |container: &Container| -> Result<UdpSocket> {
            let address = container.address()?;
            Ok(container.netns.run(|| UdpSocket::bind((address, 0)))??)
        };
        let (near, far) = (bind(from)?, bind(to)?);
        near.set_nonblocking(true)?;
        far.set_read_timeout(Some(LOOK))?;
        Ok(Self { near, to: far.local_addr()?, far, arrived: Mutex::default() })
    }

    fn send(&self, is_over: &AtomicBool) {
        let begun = Instant::now();
        let mut number = [0; 4];
        for sent in 1_u32.. {
            if is_over.load(Ordering::Relaxed) {
                return;
            }
            // What the kernel refuses is lost as well.
            let _ = self.near.send_to(&sent.to_be_bytes(), self.to);
            thread::sleep((begun + INTERVAL * sent).saturating_duration_since(Instant::now()));
            while let Ok((4, _)) = self.near.recv_from(&mut number) {
                self.arrived().insert(u32::from_be_bytes(number));
            }
        }
    }

    fn send_back(&self, is_over: &AtomicBool) {
        let mut number = [0; 4];
        while !is_over.load(Ordering::Relaxed) {
            if let Ok((4, from)) = self.far.recv_from(&mut number) {
                let _ = self.far.send_to(&number, from);
            }
        }
    }

    /// The number of the last one that came back; 0 before the first.
    fn last(&self) -> u32 {
        self.arrived().last().copied().unwrap_or(0)
    }

    /// The most in a row that did not come back. What is on its way still is no loss.
    fn longest_gap(&self) -> u32 {
        let arrived = self.arrived();
        let before = std::iter::once(&0).chain(&*arrived);
        before.zip(&*arrived).map(|(before, next)| next - before - 1).max().unwrap_or(0)
    }

    fn arrived(&self) -> MutexGuard<'_, BTreeSet<u32>> {
        self.arrived.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
