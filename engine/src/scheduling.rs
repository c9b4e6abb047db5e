//! How the kernel schedules a thread of the engine (sched(7)).
//!
//! By SCHED_BATCH, a woken thread does not interrupt whoever woke it: the sender goes on, more packets
//! gather, and cores change less often between threads (8.4 times a round trip in place of 10.8, on
//! two cores). But neither does it interrupt a thread that has nothing to do with packets: where such
//! ones keep the cores busy, it waits for their slices to end, some milliseconds. So a thread of the
//! engine is a batch only while its waits are short.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::time::{Duration, Instant};

use crate::sys;

/// How long waits are watched before they are judged.
const WINDOW: Duration = Duration::from_millis(50);
/// How many there must be.
const WAITS_MIN: u32 = 8;
/// The mean wait for a core that a batch may have. On two cores: with round trips 1 to 10 µs, with TCP
/// 20 to 700; with a flood that takes both cores 1,400 to 1,900, beside busy loops 3,600.
const WAIT_MAX: Duration = Duration::from_millis(1);
/// How long not to try again: each time that it fails, twice as long as before.
const PAUSE_MIN: Duration = Duration::from_secs(1);
const PAUSE_MAX: Duration = Duration::from_secs(64);

/// Schedules the calling thread.
#[derive(Debug)]
pub(crate) struct Scheduling {
    schedstat: File,
    judge: Judge,
}

impl Scheduling {
    /// Makes the calling thread a batch. `None`, and nothing is changed, where somebody has chosen
    /// how it is scheduled, or the kernel does not let it choose or does not tell its waits.
    pub(crate) fn of_this_thread(now: Instant) -> Option<Self> {
        if !sys::is_scheduled_by_default() {
            return None;
        }
        let schedstat = File::open("/proc/thread-self/schedstat").ok()?;
        let waits = read(&schedstat)?;
        sys::schedule_as_batch(true).ok()?;
        Some(Self { schedstat, judge: Judge::new(now, waits) })
    }

    /// Changes it if its waits ask for that. To be called now and then; mostly it does nothing.
    pub(crate) fn review(&mut self, now: Instant) {
        if now < self.judge.next {
            return;
        }
        // So that a file that cannot be read any more is not read for each batch.
        self.judge.next = now + WINDOW;
        let Some(waits) = read(&self.schedstat) else { return };
        let was_batch = self.judge.batch;
        self.judge.judge(now, waits);
        if self.judge.batch != was_batch {
            // It was allowed before; should it no longer be, nothing is lost but the choice.
            let _ = sys::schedule_as_batch(self.judge.batch);
        }
    }
}

/// What a thread has waited for a core so far.
#[derive(Debug, Clone, Copy)]
struct Waits {
    total: Duration,
    count: u32,
}

/// Time on a core, time waiting for one, both in nanoseconds, and how often it got one
/// (sched-stats.rst in the kernel's documentation).
fn read(schedstat: &File) -> Option<Waits> {
    let mut bytes = [0; 64];
    let len = schedstat.read_at(&mut bytes, 0).ok()?;
    let mut numbers = str::from_utf8(&bytes[..len]).ok()?.split_ascii_whitespace().skip(1);
    let total = Duration::from_nanos(numbers.next()?.parse().ok()?);
    let count: u64 = numbers.next()?.parse().ok()?;
    #[expect(clippy::cast_possible_truncation, reason = "only differences count")]
    Some(Waits { total, count: count as u32 })
}

/// Decides whether a thread should be a batch.
#[derive(Debug)]
struct Judge {
    batch: bool,
    /// When to look again.
    next: Instant,
    before: Waits,
    pause: Duration,
}

impl Judge {
    fn new(now: Instant, before: Waits) -> Self {
        Self { batch: true, next: now + WINDOW, before, pause: PAUSE_MIN }
    }

    fn judge(&mut self, now: Instant, waits: Waits) {
        self.next = now + WINDOW;
        let count = waits.count.wrapping_sub(self.before.count);
        if self.batch && count < WAITS_MIN {
            return;
        }
        let mean = waits.total.saturating_sub(self.before.total) / count.max(1);
        self.before = waits;
        if !self.batch {
            self.batch = true;
        } else if mean <= WAIT_MAX {
            self.pause = PAUSE_MIN;
        } else {
            self.batch = false;
            self.next = now + self.pause;
            self.pause = (2 * self.pause).min(PAUSE_MAX);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Thread {
        judge: Judge,
        now: Instant,
        waits: Waits,
    }

    impl Thread {
        fn new() -> Self {
            let (now, waits) = (Instant::now(), Waits { total: Duration::ZERO, count: u32::MAX });
            Self { judge: Judge::new(now, waits), now, waits }
        }

        /// Lets a hundred waits pass until it is judged, and says for how long it stays as it is.
        fn wait(&mut self, micros: u64) -> Duration {
            self.now = self.judge.next;
            self.waits.total += Duration::from_micros(100 * micros);
            self.waits.count = self.waits.count.wrapping_add(100);
            self.judge.judge(self.now, self.waits);
            self.judge.next - self.now
        }
    }

    #[test]
    fn short_waits_keep_it_a_batch() {
        let mut thread = Thread::new();
        for micros in [0, 5, 300, 1000] {
            assert_eq!(thread.wait(micros), WINDOW);
            assert!(thread.judge.batch);
        }
    }

    #[test]
    fn a_few_waits_say_nothing() {
        let mut thread = Thread::new();
        for few in [3, 4] {
            thread.waits.total += Duration::from_secs(1);
            thread.waits.count = thread.waits.count.wrapping_add(few);
            thread.judge.judge(thread.judge.next, thread.waits);
            assert!(thread.judge.batch);
        }
        thread.waits.count = thread.waits.count.wrapping_add(1);
        thread.judge.judge(thread.judge.next, thread.waits);
        assert!(!thread.judge.batch);
    }

    #[test]
    fn long_waits_end_it_for_ever_longer() {
        let mut thread = Thread::new();
        for seconds in [1, 2, 4, 8, 16, 32, 64, 64] {
            assert_eq!(thread.wait(4000), Duration::from_secs(seconds));
            assert!(!thread.judge.batch);
            assert_eq!(thread.wait(10), WINDOW);
            assert!(thread.judge.batch);
        }
        assert_eq!(thread.wait(10), WINDOW);
        assert_eq!(thread.wait(4000), PAUSE_MIN);
    }

    #[test]
    fn a_thread_becomes_a_batch_unless_somebody_has_chosen() {
        std::thread::spawn(|| {
            assert!(sys::is_scheduled_by_default());
            assert!(Scheduling::of_this_thread(Instant::now()).is_some());
            assert!(!sys::is_scheduled_by_default());
            assert!(Scheduling::of_this_thread(Instant::now()).is_none());
            sys::schedule_as_batch(false).unwrap();
            assert!(sys::is_scheduled_by_default());
        })
        .join()
        .unwrap();
    }
}
