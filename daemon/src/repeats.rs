//! Saying things once, and again only after a while.

use std::time::Duration;

use tokio::time::Instant;

use crate::health::Health;

/// How long after a line was said it may be said again, if it is still so.
const REMINDER: Duration = Duration::from_secs(600);

/// Keeps a loop from saying the same thing at every turn.
#[derive(Debug, Default)]
pub(crate) struct Repeats {
    last: String,
    said: Option<Instant>,
    /// How often the last line came since it was said.
    times: u64,
    health: Option<Health>,
}

impl Repeats {
    /// Has `health` know what the loop waits for.
    pub(crate) fn told_to(health: &Health) -> Self {
        Self { health: Some(health.clone()), ..Self::default() }
    }

    /// Whether to say `line` now, and how often it came since it was last said.
    fn news(&mut self, line: &str) -> Option<u64> {
        self.times += 1;
        let is_old = self.last == line;
        if is_old && self.said.is_some_and(|at| at.elapsed() < REMINDER) {
            return None;
        }
        if !is_old {
            line.clone_into(&mut self.last);
            self.times = 1;
            if let Some(health) = &self.health {
                health.waits(line);
            }
        }
        self.said = Some(Instant::now());
        Some(std::mem::take(&mut self.times))
    }

    /// Logs `line` as an error unless it was the last one, and not long ago.
    pub(crate) fn error(&mut self, line: &str) {
        match self.news(line) {
            None => {}
            Some(1) => tracing::error!("{line}"),
            Some(times) => tracing::error!(times, "{line}"),
        }
    }

    /// Logs `line` unless it was the last one, and not long ago.
    pub(crate) fn warn(&mut self, line: &str) {
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
        assert_eq!(repeats.news("a"), Some(1));
        for _ in 0..3 {
            assert_eq!(repeats.news("a"), None);
        }
        tokio::time::advance(REMINDER).await;
        assert_eq!(repeats.news("a"), Some(4));
        assert_eq!(repeats.news("a"), None);
    }
}
