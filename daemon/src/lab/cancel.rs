//! A flag that a signal raises and that long work looks at between its steps.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicI32, Ordering};
use std::thread;

use thiserror::Error;
use tokio::signal::unix::{SignalKind, signal};

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
    /// A flag that SIGINT, SIGTERM and SIGHUP raise; from here on they end nothing by themselves.
    ///
    /// # Errors
    /// The signals cannot be listened to.
    pub fn on_signals() -> io::Result<Self> {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_io().build()?;
        let (mut interrupt, mut terminate, mut hangup) = {
            let _entered = runtime.enter();
            (
                signal(SignalKind::interrupt())?,
                signal(SignalKind::terminate())?,
                signal(SignalKind::hangup())?,
            )
        };
        let flag = Self::default();
        let cancel = flag.clone();
        // Lives as long as the program: the first signal counts, later ones change nothing.
        let listen = async move {
            loop {
                let kind = tokio::select! {
                    _ = interrupt.recv() => SignalKind::interrupt(),
                    _ = terminate.recv() => SignalKind::terminate(),
                    _ = hangup.recv() => SignalKind::hangup(),
                };
                cancel.raise(kind.as_raw_value());
            }
        };
        thread::Builder::new().name("signals".into()).spawn(move || runtime.block_on(listen))?;
        Ok(flag)
    }

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
