//! Waiting between tries.

use std::time::Duration;

use tokio::time::Instant;

/// Pauses that double, each cut by chance so that a fleet does not act in step.
#[derive(Debug)]
pub struct Backoff {
    next: Duration,
}

impl Backoff {
    const FIRST: Duration = Duration::from_millis(100);
    const LONGEST: Duration = Duration::from_secs(5);

    /// Sleeps between half of this try's pause and all of it.
    pub async fn wait(&mut self) {
        self.wait_since(Instant::now()).await;
    }

    /// As [`Backoff::wait`], but what has passed since a try began counts: the next one begins after
    /// the pause, however long this one took to fail.
    pub async fn wait_since(&mut self, begun: Instant) {
        let pause = self.next.mul_f64(0.5 + 0.5 * fastrand::f64());
        self.next = (self.next * 2).min(Self::LONGEST);
        tokio::time::sleep_until(begun + pause).await;
    }
}

impl Default for Backoff {
    fn default() -> Self {
        Self { next: Self::FIRST }
    }
}
