//! Processor time, of the whole machine and of single processes (proc(5)).

use std::fs;

use anyhow::Context;
use weft_daemon::usage::stat_field;

/// Seconds that all processors together have been busy since boot; waiting for the hypervisor
/// (steal) is not work.
///
/// # Errors
/// /proc is not what proc(5) says.
pub fn machine_seconds() -> anyhow::Result<f64> {
    let text = fs::read_to_string("/proc/stat").context("cannot read /proc/stat")?;
    busy_ticks(&text).map(to_seconds).context("/proc/stat has no line of all processors")
}

/// Seconds that a process and its threads have used.
///
/// # Errors
/// It has ended.
pub fn process_seconds(pid: u32) -> anyhow::Result<f64> {
    let path = format!("/proc/{pid}/stat");
    let text = fs::read_to_string(&path).with_context(|| format!("cannot read {path}"))?;
    process_ticks(&text).map(to_seconds).with_context(|| format!("{path} has no times"))
}

/// The most memory that a process has ever held, in MiB.
///
/// # Errors
/// As [`process_seconds`].
pub fn memory_mib(pid: u32) -> anyhow::Result<f64> {
    let path = format!("/proc/{pid}/status");
    let text = fs::read_to_string(&path).with_context(|| format!("cannot read {path}"))?;
    let line = text.lines().find_map(|line| line.strip_prefix("VmHWM:"));
    let kib = line.and_then(|line| line.split_whitespace().next()?.parse::<f64>().ok());
    Ok(kib.with_context(|| format!("{path} has no VmHWM"))? / 1024.0)
}

/// user, nice, system, irq and softirq; not idle, iowait and steal.
fn busy_ticks(stat: &str) -> Option<u64> {
    let line = stat.lines().next()?.strip_prefix("cpu ")?;
    let ticks: Vec<u64> = line.split_whitespace().map_while(|it| it.parse().ok()).collect();
    Some([0, 1, 2, 5, 6].into_iter().filter_map(|at| ticks.get(at)).sum())
}

/// utime and stime.
fn process_ticks(stat: &str) -> Option<u64> {
    Some(stat_field(stat, 14)? + stat_field(stat, 15)?)
}

fn to_seconds(ticks: u64) -> f64 {
    ticks as f64 / rustix::param::clock_ticks_per_second() as f64
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ticks_are_read_where_proc_5_has_them() {
        let stat = "cpu  10 20 30 1000 5 6 7 8 9 9\ncpu0 1 2 3 4\n";
        assert_eq!(busy_ticks(stat), Some(10 + 20 + 30 + 6 + 7));
        assert_eq!(busy_ticks("intr 1\n"), None);
        let stat = "42 (a (b) c) S 1 1 1 0 -1 4194560 1 2 3 4 250 50 0 0 20 0 1 0 9 9 9";
        assert_eq!(process_ticks(stat), Some(300));
    }
}
