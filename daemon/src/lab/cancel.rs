//! A flag that a signal raises and that long work looks at between its steps.

use std::sync::Arc;
use std::sync::atomic::{AtomicI32, Ordering};

use thiserror::Error;

/// Says whether work should end early. Clones share the flag.
#[derive(Debug, Clone, Default)]
pub struct Cancel(Arc<AtomicI32>);

/// Work ended early because of a signal.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Error)]
#[error("interrupted by signal {signal}")]
pub struct Cancelled {
    /// The signal's number, as in signal(7).
    pub signal: i32,
}

impl Cancel {
    /// Raises the flag; the first signal counts.
    pub fn raise(&self, signal: i32) {
        // Relaxed: the flag guards no other memory.
        let _ = self.0.compare_exchange(0, signal, Ordering::Relaxed, Ordering::Relaxed);
    }

    /// Whether to go on.
    ///
    /// # Errors
    /// The flag is raised.
    pub fn check(&self) -> Result<(), Cancelled> {
        match self.0.load(Ordering::Relaxed) {
            0 => Ok(()),
            signal => Err(Cancelled { signal }),
        }
    }
}
