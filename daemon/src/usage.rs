//! What this process uses of the machine (proc(5)).

use std::fs;

/// It at one moment.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct Usage {
    pub(crate) cpu_millis: u64,
    pub(crate) resident_bytes: u64,
    pub(crate) threads: u64,
}

/// How it is now.
pub(crate) fn now() -> Usage {
    let read = fs::read_to_string("/proc/self/stat").ok();
    read.and_then(|text| Usage::parse(&text)).unwrap_or_default()
}

/// How many files are open.
pub(crate) fn open_files() -> u64 {
    fs::read_dir("/proc/self/fd").map_or(0, Iterator::count) as u64
}

impl Usage {
    /// Reads `/proc/self/stat`.
    fn parse(text: &str) -> Option<Self> {
        let field = |number: usize| stat_field(text, number);
        Some(Self {
            cpu_millis: (field(14)? + field(15)?) * 1000 / rustix::param::clock_ticks_per_second(),
            threads: field(20)?,
            resident_bytes: field(24)? * rustix::param::page_size() as u64,
        })
    }
}

/// A number of `/proc/PID/stat`, counted as in proc_pid_stat(5).
pub fn stat_field(text: &str, number: usize) -> Option<u64> {
    // The second, the name in parentheses, may hold anything.
    let (_, fields) = text.rsplit_once(')')?;
    fields.split_whitespace().nth(number.checked_sub(3)?)?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_process_with_a_bad_name_is_read() {
        let fields: Vec<String> = (3..=52).map(|number| number.to_string()).collect();
        let usage = Usage::parse(&format!("1 (a) b (c)) {}\n", fields.join(" "))).unwrap();
        assert_eq!((usage.threads, usage.cpu_millis), (20, 290));
        assert_eq!(Usage::parse("1 (a) S"), None);
    }
}
