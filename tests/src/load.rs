//! Traffic between the first host's container and the second's while something happens: from before
//! its first step until a second after its last.

use std::fmt::Debug;
use std::fs::{self, File};
use std::io::Write;
use std::path::PathBuf;
use std::process::{Child, Command};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use rustix::process::Signal;
use tempfile::TempDir;
use weft_daemon::lab::{Bytes, Container, Lab, Patience, PingReport, transfer};

use crate::{DEADLINE, all_acquainted, end, program, until};

/// Between two echo requests.
const INTERVAL: Duration = Duration::from_millis(10);
/// How many have to come back after the last step.
const ECHOES_AFTER: u32 = 100;
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

/// The longest time for which no echo came back while `steps` were made, or right after.
pub fn outage_while(ends: &Ends, steps: impl FnOnce() -> Result<()>) -> Result<Duration> {
    let ping = Ping::start(ends)?;
    steps()?;
    let last = ping.last_echo()?;
    until("echoes come back after the last step", || Ok(ping.last_echo()? >= last + ECHOES_AFTER))?;
    Ok(INTERVAL * longest_gap(&ping.stop()?))
}

/// That not one echo is lost while `steps` are made, and that data arrive as they were sent.
pub fn loses_nothing_while(ends: &Ends, steps: impl FnOnce() -> Result<()>) -> Result<()> {
    let (has_begun, is_over) = (AtomicBool::new(false), AtomicBool::new(false));
    thread::scope(|scope| {
        let over = Over(&is_over);
        let moving = scope.spawn(|| move_data(ends, &has_begun, &is_over));
        // Where it has ended already, its error comes out below.
        until("data move", || Ok(has_begun.load(Ordering::Relaxed) || moving.is_finished()))?;
        let outage = outage_while(ends, steps)?;
        ensure!(outage.is_zero(), "no echo came back for {outage:?}");
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

/// Says, when dropped, that what others go on beside is over, also by an error.
struct Over<'a>(&'a AtomicBool);

impl Drop for Over<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

/// A ping that runs. Dropped, it is killed.
struct Ping {
    child: Child,
    output: PathBuf,
    _directory: TempDir,
}

impl Ping {
    /// Starts it, and waits for the first echo.
    fn start([from, to]: &Ends) -> Result<Self> {
        let directory = tempfile::tempdir()?;
        let output = directory.path().join("output");
        let interval = format!("-i{}", INTERVAL.as_secs_f64());
        let mut command = Command::new("ping");
        command.env("LC_ALL", "C").args(["-n", &interval]).arg(to.address()?.to_string());
        let child = from.netns.spawn(command.stdout(File::create(&output)?))?;
        let it = Self { child, output, _directory: directory };
        until("an echo comes back", || Ok(it.last_echo()? > 0))?;
        Ok(it)
    }

    /// The number of the last echo that came back; 0 before the first.
    fn last_echo(&self) -> Result<u32> {
        let text = fs::read_to_string(&self.output)?;
        let numbers = text.rsplit("icmp_seq=").filter_map(|rest| rest.split_once(' '));
        Ok(numbers.filter_map(|(number, _)| number.parse().ok()).next().unwrap_or(0))
    }

    fn stop(mut self) -> Result<PingReport> {
        end(&mut self.child, Signal::INT)?;
        PingReport::parse(&fs::read_to_string(&self.output)?, "").context("what ping wrote")
    }
}

impl Drop for Ping {
    fn drop(&mut self) {
        // Both fail only for a process that has ended.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// The most echo requests in a row that went unanswered. What was on its way at the end is no loss.
fn longest_gap(report: &PingReport) -> u32 {
    let mut arrived: Vec<u32> = report.replies.iter().map(|reply| reply.sequence).collect();
    arrived.push(0);
    arrived.sort_unstable();
    let gaps = arrived.windows(2).map(|pair| pair[1].saturating_sub(pair[0] + 1));
    gaps.max().unwrap_or(0)
}
