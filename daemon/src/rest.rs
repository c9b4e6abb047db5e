//! Rest between looks at all that the kernel has.

use std::time::Duration;

use tokio::time::{Instant, sleep_until};

/// So many times as long as a look took, however much changes on a busy host: some tenth of a core,
/// and not more than this behind.
const FOLD: u32 = 10;
const MAX: Duration = Duration::from_secs(5);

/// A time in which nothing is looked at because something changed.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Rest {
    until: Instant,
}

impl Rest {
    /// That after nothing.
    pub(crate) fn none() -> Self {
        Self { until: Instant::now() }
    }

    /// That after a look, which `began` then and ends now.
    pub(crate) fn after(began: Instant) -> Self {
        Self { until: Instant::now() + (began.elapsed() * FOLD).min(MAX) }
    }

    /// Waits for its end.
    pub(crate) async fn over(self) {
        sleep_until(self.until).await;
    }
}
