//! When a round begins and goes on.

use std::time::{Duration, Instant};

use super::{EARLY, INTERVAL};

/// The time of one kind of round.
#[derive(Debug)]
pub(super) struct Clock {
    /// From one round to the next.
    pub(super) interval: Duration,
    /// Times that something was sent; 0 between rounds.
    pub(super) tries: u8,
    /// When to go on, in a round; when to begin one, else.
    pub(super) due: Instant,
}

impl Clock {
    pub(super) fn new(begin: Instant) -> Self {
        Self { interval: INTERVAL, tries: 0, due: begin }
    }

    /// A round begins early, but an answer has its time.
    pub(super) fn can_go_on(&self, now: Instant) -> bool {
        let early = if self.tries == 0 { EARLY } else { Duration::ZERO };
        now + early >= self.due
    }

    /// Begins a round now, unless one is under way.
    pub(super) fn begin_soon(&mut self, now: Instant) {
        if self.tries == 0 {
            self.due = now;
        }
    }

    /// Something is sent, and waited for.
    pub(super) fn wait(&mut self, now: Instant, patience: Duration) {
        self.tries += 1;
        self.due = now + patience;
    }

    /// The round is over; the next one begins then.
    pub(super) fn end(&mut self, next: Instant) {
        self.tries = 0;
        self.due = next;
    }
}
