//! The running backend, for async callers: each of its calls, and its end, blocks a thread of the
//! pool instead of the daemon's loop.

use std::thread;

use anyhow::Context;
use tokio::sync::mpsc::UnboundedReceiver;
use weft_backends::{Backend, BackendStatus, Opened};

/// A backend, and why its packets no longer move.
#[derive(Debug)]
pub(crate) struct Overlay {
    backend: Held,
    losses: UnboundedReceiver<String>,
}

/// Away only while a call runs. May be dropped anywhere: what a backend runs inside may not end on a thread
/// of the runtime; see the trait on blocking.
#[derive(Debug)]
struct Held(Option<Box<dyn Backend>>);

impl Overlay {
    pub(crate) fn new((backend, losses): Opened) -> Self {
        Self { backend: Held(Some(backend)), losses }
    }

    /// Runs one call of the backend. When the future is dropped midway the call still runs to its
    /// end, and the backend goes with it: only a daemon that is stopping does that.
    pub(crate) async fn call<T: Send + 'static>(
        &mut self,
        work: impl FnOnce(&mut dyn Backend) -> T + Send + 'static,
    ) -> anyhow::Result<T> {
        let mut held = Held(self.backend.0.take());
        let (held, answer) = tokio::task::spawn_blocking(move || {
            let answer = held.0.as_mut().map(|backend| work(backend.as_mut()));
            (held, answer)
        })
        .await
        .context("the backend panicked")?;
        self.backend = held;
        answer.context("the backend was lost in an earlier call")
    }

    /// Why packets no longer move, once they do not. Cancel safe.
    pub(crate) async fn lost(&mut self) -> String {
        match self.losses.recv().await {
            Some(reason) => reason,
            // A backend that does not break by itself has dropped the sender.
            None => std::future::pending().await,
        }
    }

    /// Forgets what a backend that is stopped now reported: each of its threads may have.
    pub(crate) fn forget_losses(&mut self) {
        while self.losses.try_recv().is_ok() {}
    }

    /// Reads numbers only, so it needs no thread of its own.
    pub(crate) fn status(&self) -> BackendStatus {
        self.backend.0.as_ref().map(|backend| backend.status()).unwrap_or_default()
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        let Some(backend) = self.0.take() else { return };
        let ended = thread::spawn(move || drop(backend)).join();
        if ended.is_err() {
            tracing::error!("the backend panicked while it was stopped");
        }
    }
}
