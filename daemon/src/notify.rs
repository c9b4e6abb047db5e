//! What systemd is told (sd_notify(3)): that the daemon is ready once it forwards, what it waits for
//! until then, and that it is alive.

use std::time::Duration;

use sd_notify::NotifyState;
use tokio::sync::watch;
use tokio::time::{Instant, MissedTickBehavior, interval_at};

use crate::board::Board;
use crate::health::Phase;

/// How long systemd is asked to wait on; asked anew three times in between.
const PATIENCE: Duration = Duration::from_secs(30);

/// Tells systemd, where there is one, until the daemon ends. That it is alive only as long as its loop
/// comes round: where that stands still, systemd starts it anew.
pub(crate) async fn tell(mut phases: watch::Receiver<Phase>, board: &Board) {
    let watchdog = sd_notify::watchdog_enabled();
    // Twice in the time that systemd gives.
    let pulse = watchdog.map_or(PATIENCE / 3, |limit| (limit / 2).min(PATIENCE / 3));
    let mut timer = interval_at(Instant::now(), pulse);
    timer.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut is_ready = false;
    loop {
        tokio::select! {
            changed = phases.changed() => {
                if changed.is_err() {
                    return;
                }
            }
            _ = timer.tick() => {
                if beats(watchdog, board) {
                    send(&[NotifyState::Watchdog]);
                }
            }
        }
        match &*phases.borrow_and_update() {
            Phase::Starting(what) if !is_ready => {
                let micros = u32::try_from(PATIENCE.as_micros()).unwrap_or(u32::MAX);
                send(&[NotifyState::ExtendTimeoutUsec(micros), status(what)]);
            }
            Phase::Starting(what) => send(&[status(what)]),
            Phase::Forwarding { problems, notes } => {
                let told = problems.first().or(notes.first());
                send(&[status(told.map_or("forwarding", String::as_str))]);
                if !std::mem::replace(&mut is_ready, true) {
                    send(&[NotifyState::Ready]);
                }
            }
        }
    }
}

/// Whether a watchdog, if there is one, is to hear that we are alive.
fn beats(watchdog: Option<Duration>, board: &Board) -> bool {
    watchdog.is_some() && board.stands_still().is_none()
}

/// Tells systemd that the daemon is about to end.
pub(crate) fn tell_stopping() {
    send(&[NotifyState::Stopping]);
}

/// Behind a line break another message would begin.
fn status(text: &str) -> NotifyState<'_> {
    NotifyState::Status(text.lines().next().unwrap_or_default())
}

/// Does nothing where nobody listens.
fn send(states: &[NotifyState<'_>]) {
    if let Err(error) = sd_notify::notify(states) {
        tracing::debug!("cannot tell systemd: {error}");
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::board::STILL_MAX;
    use crate::health::Health;
    use crate::log::Log;

    #[tokio::test(start_paused = true)]
    async fn the_watchdog_hears_nothing_of_a_loop_that_stands_still() {
        let health = Health::new();
        let board = Board::new(Log::silent(), &health);
        let beats = |watchdog| beats(watchdog, &board);
        let asked = Some(Duration::from_secs(60));
        // However long it waits for its first lease.
        tokio::time::advance(STILL_MAX * 2).await;
        assert!(beats(asked));
        health.forwards(Vec::new(), Vec::new());
        board.turn();
        assert!(beats(asked));
        tokio::time::advance(STILL_MAX + Duration::from_secs(1)).await;
        assert!(!beats(asked));
        board.turn();
        assert!(beats(asked));
        assert!(!beats(None));
    }
}
