//! One benchmark run: all subjects in all modes, a few times over, in turn.

use std::collections::BTreeMap;
use std::thread;
use std::time::Duration;

use anyhow::{Context, ensure};
use serde::{Deserialize, Serialize};
use weft_daemon::lab::Cancel;

use crate::check::CHECKS;
use crate::cpu;
use crate::load::{self, Datagrams, RoundTrips};
use crate::subject::{Running, Subject};
use crate::topology::{Carried, Mode, Topology};

/// Packets a second at which processor time is compared.
const PACED: f64 = 100_000.0;
/// A rate that loses less than this is one that a subject can carry.
const LOSS_MAX: f64 = 0.001;
/// Steps of the search for that rate.
const SEARCH_STEPS: usize = 6;

/// What to run.
#[derive(Debug, Clone)]
pub struct Plan {
    pub modes: Vec<Mode>,
    pub subjects: Vec<Subject>,
    pub repeats: usize,
    /// How long each figure is measured.
    pub time: Duration,
    /// Only the figures that have a target.
    pub quick: bool,
}

/// All figures of one subject in one mode in one repeat, by name.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Sample {
    pub mode: Mode,
    pub subject: Subject,
    pub repeat: usize,
    pub figures: BTreeMap<String, f64>,
}

/// What a run came to.
#[derive(Debug, Default)]
pub struct Outcome {
    pub samples: Vec<Sample>,
    /// What others' programs failed at, each with its subject and mode.
    pub failed: Vec<String>,
    /// The commands that set up each mode and each subject, by its name.
    pub commands: BTreeMap<String, Vec<String>>,
}

/// Runs the plan. The order of the subjects shifts with each repeat, and every other time it is the
/// other way round, so that none always profits from what ran before it.
///
/// # Errors
/// A subject of ours does not work, or somebody cancels; everything is taken away, and what was
/// measured is in `outcome`. Where another's program does not work, the others are measured all the
/// same.
pub fn run(
    plan: &Plan,
    cancel: &Cancel,
    progress: &mut dyn FnMut(&str),
    outcome: &mut Outcome,
) -> anyhow::Result<()> {
    let Outcome { samples, failed, commands } = outcome;
    for repeat in 0..plan.repeats {
        for mode in &plan.modes {
            let net = Topology::new(*mode)?;
            commands.entry(mode.name().to_owned()).or_insert_with(|| net.take_commands());
            let mut subjects = plan.subjects.clone();
            subjects.retain(|subject| subject.is_for(*mode));
            let shift = repeat % subjects.len().max(1);
            subjects.rotate_left(shift);
            if repeat % 2 == 1 {
                subjects.reverse();
            }
            for subject in subjects {
                cancel.check()?;
                // Those of one that could not be set up.
                net.take_commands();
                progress(&format!(
                    "repeat {} of {}: {} over {}",
                    repeat + 1,
                    plan.repeats,
                    subject.name(),
                    mode.name()
                ));
                let context = || format!("{} in mode {}", subject.name(), mode.name());
                let figures = subject.start(&net).and_then(|running| {
                    let lines = net.take_commands();
                    commands.entry(subject.name().to_owned()).or_insert(lines);
                    measure(&net, &running, subject, plan, cancel)
                });
                match figures.with_context(context) {
                    Ok(figures) => samples.push(Sample { mode: *mode, subject, repeat, figures }),
                    Err(error) => {
                        cancel.check()?;
                        if subject.is_ours() {
                            return Err(error);
                        }
                        progress(&format!("{error:#}"));
                        failed.push(format!("{error:#}"));
                    }
                }
            }
        }
    }
    Ok(())
}

/// The figures of a subject that is up.
fn measure(
    net: &Topology,
    running: &Running<'_>,
    subject: Subject,
    plan: &Plan,
    cancel: &Cancel,
) -> anyhow::Result<BTreeMap<String, f64>> {
    let mut it = Measuring { net, plan, cancel, time: Processor::of(running), figures: [].into() };
    if subject.is_scattered() {
        it.scattered()?;
        return Ok(it.figures);
    }
    it.put_round_trips("rtt", &load::round_trips(net, plan.time)?);
    // Busy polling is for round trips only.
    if subject == Subject::WeftBusy {
        return Ok(it.figures);
    }
    let streams: &[usize] = if plan.quick { &[1, 4] } else { &[1, 4, 50] };
    streams.iter().try_for_each(|count| it.streams(*count))?;
    let lengths: &[usize] = if plan.quick { &[64] } else { &[64, 1400] };
    lengths.iter().try_for_each(|len| it.flood(*len))?;
    it.paced()?;
    if !plan.quick {
        it.round_trips_under_load()?;
        it.others()?;
    }
    let memory: Vec<f64> =
        running.processes().into_iter().map(cpu::memory_mib).collect::<anyhow::Result<_>>()?;
    if let Some(most) = memory.into_iter().reduce(f64::max) {
        it.put("memory_mib", most);
    }
    Ok(it.figures)
}

/// One subject's figures, while they are taken.
struct Measuring<'a> {
    net: &'a Topology,
    plan: &'a Plan,
    cancel: &'a Cancel,
    time: Processor,
    figures: BTreeMap<String, f64>,
}

impl Measuring<'_> {
    fn put(&mut self, name: impl Into<String>, value: f64) {
        // Per packet, where none arrived: there is no such figure.
        if value.is_finite() {
            self.figures.insert(name.into(), value);
        }
    }

    fn put_round_trips(&mut self, name: &str, trips: &RoundTrips) {
        for (quantile, suffix) in [(0.5, "p50"), (0.99, "p99"), (0.999, "p999")] {
            let nanoseconds = trips.times.value_at_quantile(quantile);
            self.put(format!("{name}_{suffix}_us"), nanoseconds as f64 / 1000.0);
        }
        self.put(format!("{name}_lost"), trips.lost as f64);
    }

    fn streams(&mut self, count: usize) -> anyhow::Result<()> {
        self.cancel.check()?;
        let before = self.net.carried()?;
        let tcp = load::streams(self.net, count, self.plan.time, &mut || self.time.mark())?;
        let mean = self.net.carried()?.mean_since(before);
        ensure!(
            self.net.mode == Mode::Offload || mean <= Carried::LEN_MAX,
            "packets of {mean:.0} bytes crossed the cable: this was not the mode {}",
            self.net.mode.name()
        );
        let gigabytes = tcp.bytes as f64 / 1e9;
        let (machine, daemon) = (self.time.machine(), self.time.processes());
        self.put(format!("tcp{count}_bytes_per_packet"), mean);
        self.put(format!("tcp{count}_gbit"), gigabytes * 8.0 / tcp.seconds);
        self.put(format!("tcp{count}_retransmits"), tcp.retransmits as f64);
        self.put(format!("tcp{count}_cpu_s_per_gb"), machine / gigabytes);
        self.put(format!("tcp{count}_daemon_s_per_gb"), daemon / gigabytes);
        Ok(())
    }

    fn flood(&mut self, len: usize) -> anyhow::Result<()> {
        self.cancel.check()?;
        let what = Datagrams { len, rate: None, scattered: false };
        let flood = load::datagrams(self.net, what, self.plan.time, &mut || self.time.mark())?;
        let megapackets = flood.received_steadily as f64 / 1e6;
        let (machine, daemon) = (self.time.machine(), self.time.processes());
        self.put(format!("udp{len}_flood_kpps"), flood.rate() / 1000.0);
        self.put(format!("udp{len}_offered_kpps"), flood.offered() / 1000.0);
        self.put(format!("udp{len}_reordered"), flood.reordered as f64);
        self.put(format!("udp{len}_cpu_s_per_mp"), machine / megapackets);
        self.put(format!("udp{len}_daemon_s_per_mp"), daemon / megapackets);
        if !self.plan.quick {
            let rate = highest_rate(self.net, len, flood.rate(), self.plan.time, self.cancel)?;
            self.put(format!("udp{len}_lossless_kpps"), rate / 1000.0);
        }
        Ok(())
    }

    fn scattered(&mut self) -> anyhow::Result<()> {
        self.cancel.check()?;
        let what = Datagrams { len: 64, rate: None, scattered: true };
        let flood = load::datagrams(self.net, what, self.plan.time, &mut || self.time.mark())?;
        self.put("scattered_kpps", flood.rate() / 1000.0);
        Ok(())
    }

    /// What other tools measure beside us.
    fn others(&mut self) -> anyhow::Result<()> {
        self.cancel.check()?;
        for check in &CHECKS {
            if let Some(value) = check.measure(self.net, self.plan.time)? {
                self.put(check.theirs, value);
            }
        }
        Ok(())
    }

    fn paced(&mut self) -> anyhow::Result<()> {
        self.cancel.check()?;
        let what = Datagrams { len: 64, rate: Some(PACED), scattered: false };
        let paced = load::datagrams(self.net, what, self.plan.time, &mut || self.time.mark())?;
        let megapackets = paced.received_steadily as f64 / 1e6;
        let (machine, daemon) = (self.time.machine(), self.time.processes());
        self.put("paced_loss", paced.loss());
        self.put("paced_cpus", machine / paced.seconds);
        self.put("paced_daemon_cpus", daemon / paced.seconds);
        self.put("paced_cpu_s_per_mp", machine / megapackets);
        Ok(())
    }

    fn round_trips_under_load(&mut self) -> anyhow::Result<()> {
        self.cancel.check()?;
        let (net, time) = (self.net, self.plan.time);
        let loaded = thread::scope(|scope| {
            let longer = time + load::WARM_UP;
            let load = scope.spawn(move || load::streams(net, 1, longer, &mut || Ok(())));
            // Until the load is one.
            thread::sleep(load::WARM_UP);
            let loaded = load::round_trips(net, time);
            load.join().expect("the load panicked")?;
            loaded
        })?;
        self.put_round_trips("rtt_loaded", &loaded);
        Ok(())
    }
}

/// The highest rate at which hardly anything is lost, by bisection. It may be above what comes through a
/// flood: there the sender takes the processors that packets are carried by.
fn highest_rate(
    net: &Topology,
    len: usize,
    flood: f64,
    time: Duration,
    cancel: &Cancel,
) -> anyhow::Result<f64> {
    let is_good = |rate: f64| -> anyhow::Result<bool> {
        cancel.check()?;
        let what = Datagrams { len, rate: Some(rate), scattered: false };
        let sent = load::datagrams(net, what, time / 2, &mut || Ok(()))?;
        // A sender that does not reach the rate proves nothing about it.
        Ok(sent.offered() > 0.95 * rate && sent.loss() < LOSS_MAX)
    };
    let (mut good, mut bad) = (0.0, 1.1 * flood);
    while is_good(bad)? {
        (good, bad) = (bad, 2.0 * bad);
    }
    for _ in 0..SEARCH_STEPS {
        let rate = f64::midpoint(good, bad);
        if is_good(rate)? { good = rate } else { bad = rate }
    }
    Ok(good)
}

/// Processor time while a load ran.
struct Processor {
    pids: Vec<u32>,
    begin: (f64, f64),
    end: (f64, f64),
}

impl Processor {
    fn of(running: &Running<'_>) -> Self {
        Self { pids: running.processes(), begin: (0.0, 0.0), end: (0.0, 0.0) }
    }

    /// At the beginning, and at the end.
    fn mark(&mut self) -> anyhow::Result<()> {
        (self.begin, self.end) = (self.end, self.now()?);
        Ok(())
    }

    fn now(&self) -> anyhow::Result<(f64, f64)> {
        let each: Vec<f64> = self
            .pids
            .iter()
            .map(|pid| cpu::process_seconds(*pid))
            .collect::<anyhow::Result<_>>()?;
        Ok((cpu::machine_seconds()?, each.into_iter().sum()))
    }

    fn machine(&self) -> f64 {
        self.end.0 - self.begin.0
    }

    fn processes(&self) -> f64 {
        self.end.1 - self.begin.1
    }
}
