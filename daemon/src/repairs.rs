//! How often something was put right that somebody else had changed.

use std::time::Duration;

use tokio::time::Instant;

/// More repairs in a minute are a fight, which nobody wins: only a timer repairs then.
const A_MINUTE_MAX: u32 = 10;
const MINUTE: Duration = Duration::from_secs(60);

/// Counts repairs, and knows a fight.
#[derive(Debug)]
pub(crate) struct Repairs {
    minute: Instant,
    this_minute: u32,
}

impl Repairs {
    pub(crate) fn new() -> Self {
        Self { minute: Instant::now(), this_minute: 0 }
    }

    /// One more. Says whether it is a fight from now on.
    pub(crate) fn count(&mut self) -> bool {
        if self.minute.elapsed() > MINUTE {
            *self = Self::new();
        }
        self.this_minute += 1;
        self.this_minute == A_MINUTE_MAX
    }

    /// Whether another program undoes what is put right, again and again.
    pub(crate) fn is_fight(&self) -> bool {
        self.this_minute >= A_MINUTE_MAX && self.minute.elapsed() <= MINUTE
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn ten_in_a_minute_are_a_fight_for_its_rest() {
        let mut repairs = Repairs::new();
        for number in 1..=10 {
            assert!(!repairs.is_fight());
            assert_eq!(repairs.count(), number == 10);
        }
        assert!(repairs.is_fight());
        tokio::time::advance(MINUTE + Duration::from_secs(1)).await;
        assert!(!repairs.is_fight());
        assert!(!repairs.count());
        assert!(!repairs.is_fight());
    }
}
