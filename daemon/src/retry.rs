//! Waiting between tries, and saying things once.

use std::time::Duration;

/// Pauses that double, each cut by chance so that a fleet does not act in step.
#[derive(Debug)]
pub(crate) struct Backoff {
    next: Duration,
}

impl Backoff {
    const FIRST: Duration = Duration::from_millis(200);
    const LONGEST: Duration = Duration::from_secs(5);

    /// Sleeps between half of this try's pause and all of it.
    pub(crate) async fn wait(&mut self) {
        let pause = self.next.mul_f64(0.5 + 0.5 * fastrand::f64());
        self.next = (self.next * 2).min(Self::LONGEST);
        tokio::time::sleep(pause).await;
    }
}

impl Default for Backoff {
    fn default() -> Self {
        Self { next: Self::FIRST }
    }
}

/// Keeps a loop from saying the same thing at every turn.
#[derive(Debug, Default)]
pub(crate) struct Repeats {
    last: String,
}

impl Repeats {
    /// Whether `line` is news.
    pub(crate) fn is_new(&mut self, line: &str) -> bool {
        let new = self.last != line;
        if new {
            line.clone_into(&mut self.last);
        }
        new
    }

    /// Logs `line` unless it was the last one.
    pub(crate) fn warn(&mut self, line: &str) {
        if self.is_new(line) {
            tracing::warn!("{line}");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_same_line_is_no_news() {
        let mut repeats = Repeats::default();
        assert!(repeats.is_new("a"));
        assert!(!repeats.is_new("a"));
        assert!(repeats.is_new("b"));
        assert!(repeats.is_new("a"));
    }
}
