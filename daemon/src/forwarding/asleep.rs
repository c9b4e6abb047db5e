//! Noticing that the host was asleep, or its virtual machine paused: the clock that timers go by stood
//! still, while leases in the registry ran on. What tells is the clock that people set, which went on, or
//! was set right afterwards.

use std::time::{Duration, Instant};

use jiff::Timestamp;

/// A clock that is only set right, or read late, differs by less.
const LEAST: Duration = Duration::from_secs(10);

/// When somebody last looked, by the clock of timers and by the one that people set.
#[derive(Debug)]
pub(super) struct LastLook {
    timers: Instant,
    clock: Timestamp,
}

impl LastLook {
    pub(super) fn new() -> Self {
        Self { timers: Instant::now(), clock: Timestamp::now() }
    }

    /// Whether the host slept since the last look. It seems so as well where somebody has set the clock
    /// forward.
    pub(super) fn was_asleep(&mut self) -> bool {
        let now = Self::new();
        let was = now.slept_since(self);
        *self = now;
        was
    }

    fn slept_since(&self, before: &Self) -> bool {
        let by_clock = self.clock.duration_since(before.clock);
        // Negative where somebody has set it back.
        let by_clock = Duration::try_from(by_clock).unwrap_or_default();
        by_clock.saturating_sub(self.timers.duration_since(before.timers)) >= LEAST
    }
}

#[cfg(test)]
mod tests {
    use jiff::SignedDuration;

    use super::*;

    #[test]
    fn a_clock_that_went_on_alone_is_noticed() {
        let before = LastLook::new();
        let later = |timers: u64, clock: i64| LastLook {
            timers: before.timers + Duration::from_secs(timers),
            clock: before.clock + SignedDuration::from_secs(clock),
        };
        assert!(later(30, 3630).slept_since(&before));
        for (timers, clock) in [(30, 30), (30, 35), (3600, 3600), (30, -7200)] {
            assert!(!later(timers, clock).slept_since(&before), "{timers} and {clock}");
        }
    }
}
