//! Saying things once, and again only after a while.

use std::collections::HashMap;
use std::mem;
use std::time::Duration;

use tokio::time::Instant;

use crate::health::Health;

/// How long after a line was said it may be said again, if it is still so.
const REMINDER: Duration = Duration::from_secs(600);

/// Keeps a loop from saying the same things at every turn.
#[derive(Debug, Default)]
pub(crate) struct Repeats {
    said: HashMap<String, Said>,
    health: Option<Health>,
}

/// Of one line.
#[derive(Debug)]
struct Said {
    at: Instant,
    /// How often it came since.
    times: u64,
}

impl Repeats {
    /// Has `health` know what the loop waits for.
    pub(crate) fn told_to(health: &Health) -> Self {
        Self { health: Some(health.clone()), ..Self::default() }
    }

    /// Whether to say `line` now, and how often it came since it was last said.
    fn news(&mut self, line: &str) -> Option<u64> {
        let Some(said) = self.said.get_mut(line) else {
            self.said.retain(|_, said| said.at.elapsed() < REMINDER);
            self.said.insert(line.to_owned(), Said { at: Instant::now(), times: 0 });
            return Some(1);
        };
        said.times += 1;
        if said.at.elapsed() < REMINDER {
            return None;
        }
        said.at = Instant::now();
        Some(mem::take(&mut said.times))
    }

    /// Logs `line` as an error, unless that was not long ago.
    pub(crate) fn error(&mut self, line: &str) {
        self.waits(line);
        match self.news(line) {
            None => {}
            Some(1) => tracing::error!("{line}"),
            Some(times) => tracing::error!(times, "{line}"),
        }
    }

    /// Logs `line`, unless that was not long ago.
    pub(crate) fn warn(&mut self, line: &str) {
        self.waits(line);
        self.note(line);
    }

    fn waits(&self, line: &str) {
        self.health.iter().for_each(|health| health.waits(line));
    }

    /// The same of what the loop does not wait for.
    pub(crate) fn note(&mut self, line: &str) {
        match self.news(line) {
            None => {}
            Some(1) => tracing::warn!("{line}"),
            Some(times) => tracing::warn!(times, "{line}"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn the_same_line_is_said_again_after_a_while_with_how_often_it_came() {
        let mut repeats = Repeats::default();
        assert_eq!(repeats.news("a"), Some(1));
        assert_eq!(repeats.news("a"), None);
        assert_eq!(repeats.news("b"), Some(1));
        for _ in 0..2 {
            assert_eq!(repeats.news("a"), None);
        }
        tokio::time::advance(REMINDER).await;
        assert_eq!(repeats.news("a"), Some(4));
        assert_eq!(repeats.news("a"), None);
    }
}
