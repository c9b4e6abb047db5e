//! Saying things once.

use crate::health::Health;

/// Keeps a loop from saying the same thing at every turn.
#[derive(Debug, Default)]
pub(crate) struct Repeats {
    last: String,
    health: Option<Health>,
}

impl Repeats {
    /// Has `health` know what the loop waits for.
    pub(crate) fn told_to(health: &Health) -> Self {
        Self { last: String::new(), health: Some(health.clone()) }
    }

    /// Whether `line` is news.
    pub(crate) fn is_new(&mut self, line: &str) -> bool {
        let new = self.last != line;
        if new {
            line.clone_into(&mut self.last);
            if let Some(health) = &self.health {
                health.waits(line);
            }
        }
        new
    }

    /// Logs `line` as an error unless it was the last one.
    pub(crate) fn error(&mut self, line: &str) {
        if self.is_new(line) {
            tracing::error!("{line}");
        }
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
