//! Following a registry of keys and values: list everything, follow what happens from there on, and
//! list again whenever that is in doubt. While nobody answers, look from time to time.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use async_trait::async_trait;
use tokio::sync::watch;
use tokio::time::Instant;

use super::entries::Entries;
use super::{RegistryError, View};
use crate::backoff::Backoff;
use crate::lease::Snapshot;

/// Everything is listed again this often, give or take a fifth: etcd has lost events before.
const RELIST_INTERVAL: Duration = Duration::from_secs(300);
/// Following that ended sooner was not worth much: the next time waits.
const FOLLOWED_SHORTLY: Duration = Duration::from_secs(5);
/// How long nobody may answer before that is an outage: a cluster that chooses another leader refuses
/// for a second or two, and again where members have split their votes; on busy hosts that was seen to
/// take eight.
const ELECTIONS: Duration = Duration::from_secs(10);

/// What a source calls when something has changed.
pub(super) type Publish<'a> = dyn Fn(&Entries) + Send + Sync + 'a;

/// What can be followed so.
#[async_trait]
pub(super) trait Source: Send + Sync + 'static {
    /// Where in its history a list was made.
    type Mark: Send;

    /// Which one it is, for whoever reads the log.
    fn describe(&self) -> String;

    /// Set while nobody answers: others need not ask.
    fn away(&self) -> &AtomicBool;

    /// Spares a request that would find nobody.
    fn refuse_while_away(&self) -> Result<(), RegistryError> {
        if self.away().load(Ordering::Relaxed) {
            return Err(RegistryError::NotAsked);
        }
        Ok(())
    }

    /// Everything at one moment.
    async fn list(&self) -> Result<(Entries, Self::Mark), RegistryError>;

    /// Asks all endpoints for next to nothing, at once or one after the other.
    async fn probe(&self) -> Result<(), RegistryError>;

    /// Takes in what has happened since the mark, and calls `publish` after each change, until it
    /// sees no more, or may not see everything. Cancel safe.
    async fn follow(
        &self,
        entries: &mut Entries,
        mark: &mut Self::Mark,
        publish: &Publish<'_>,
    ) -> Broken;

    /// Ends when the connections that there are must not be used any longer. Cancel safe.
    async fn reconnected(&self);
}

/// Why following came to its end.
#[derive(Debug)]
pub(super) enum Broken {
    /// The server is gone. Entries and mark are as it last told, and one can go on from there.
    Off(String),
    /// Something may have been missed.
    Doubt(String),
}

/// Follows a source in the background, until every receiver is dropped.
pub(super) fn watch<S: Source>(source: Arc<S>, last: Snapshot) -> watch::Receiver<View> {
    let view = View { snapshot: Arc::new(last), readable: false };
    let (sender, receiver) = watch::channel(view);
    tokio::spawn(async move {
        tokio::select! {
            () = sender.closed() => {}
            () = follow_for_ever(source.as_ref(), &sender) => {}
        }
    });
    receiver
}

async fn follow_for_ever(source: &impl Source, sender: &watch::Sender<View>) {
    let mut backoff = Backoff::default();
    let mut is_in_doubt = false;
    let mut known = None;
    loop {
        let (mut entries, mut mark) = list(source, sender, is_in_doubt, known.take()).await;
        let begun = Instant::now();
        let publish = |entries: &Entries| View::publish(sender, entries.snapshot());
        publish(&entries);
        let mut is_forgotten = false;
        is_in_doubt = false;
        let why = tokio::select! {
            broken = source.follow(&mut entries, &mut mark, &publish) => {
                is_in_doubt = true;
                match broken {
                    Broken::Off(why) => {
                        known = (begun.elapsed() > FOLLOWED_SHORTLY).then_some((entries, mark));
                        why
                    }
                    Broken::Doubt(why) => why,
                }
            }
            () = tokio::time::sleep(RELIST_INTERVAL.mul_f64(0.8 + 0.4 * fastrand::f64())) => {
                "it is time to".into()
            }
            // A connection from an address that is gone tells nothing, for as long as TCP is patient.
            () = source.reconnected() => {
                is_forgotten = true;
                "by another connection".into()
            }
        };
        let what = if known.is_some() { "following" } else { "listing" };
        tracing::debug!("{what} {} anew: {why}", source.describe());
        if is_forgotten || begun.elapsed() > FOLLOWED_SHORTLY {
            backoff = Backoff::default();
        } else {
            backoff.wait().await;
        }
    }
}

/// Lists everything, however long it takes: looks from time to time. Says once that nobody answers, when
/// that is an outage, and when everything could be listed again. Where it is in doubt that a server is
/// there, finds one first: a list may take a minute, and that of one that hangs takes no less. What is
/// `known` serves for a list where another server is found soon: a whole fleet that lists everything at
/// once, since one member of etcd is started anew, keeps the others busy for long.
async fn list<S: Source>(
    source: &S,
    sender: &watch::Sender<View>,
    is_in_doubt: bool,
    known: Option<(Entries, S::Mark)>,
) -> (Entries, S::Mark) {
    let (since, mut looks, mut backoff) = (Instant::now(), 0_u32, Backoff::default());
    let (mut begun, mut is_told, name) = (since, false, source.describe());
    let mut outcome = if is_in_doubt { find(source, known).await } else { source.list().await };
    loop {
        source.away().store(outcome.is_err(), Ordering::Relaxed);
        match outcome {
            Ok(listed) => {
                if is_told {
                    let seconds = since.elapsed().as_secs();
                    tracing::warn!("{name} is back after {seconds} s and {looks} tries");
                }
                return listed;
            }
            Err(error) if !is_told && since.elapsed() >= ELECTIONS => {
                tracing::error!("{name} is away, going on with what was last read: {error}");
                sender.send_if_modified(|view| std::mem::take(&mut view.readable));
                is_told = true;
            }
            Err(_) => {}
        }
        backoff.wait_since(begun).await;
        begun = Instant::now();
        looks += 1;
        outcome = find(source, None).await;
    }
}

/// Lists everything, by a server that answers, unless it is known.
async fn find<S: Source>(
    source: &S,
    known: Option<(Entries, S::Mark)>,
) -> Result<(Entries, S::Mark), RegistryError> {
    source.probe().await?;
    // Others need not wait until the list has come.
    source.away().store(false, Ordering::Relaxed);
    match known {
        Some(known) => Ok(known),
        None => source.list().await,
    }
}

#[cfg(test)]
mod tests {
    use std::ops::Range;
    use std::sync::atomic::AtomicUsize;
    use std::sync::{Mutex, OnceLock};

    use tokio::sync::Notify;

    use super::super::entries::Entry;
    use super::*;
    use crate::lease::Expiry;

    /// How long a probe that fails takes, as one of a server that hangs.
    const PROBE: Duration = Duration::from_secs(5);

    /// One more lease at each list, and never an event: no real server can be made to lose one.
    #[derive(Default)]
    struct Deaf {
        lists: AtomicUsize,
        /// Which lists fail, and when the first did.
        failing: Range<usize>,
        failed: OnceLock<Instant>,
        /// How many probes fail, and when each began.
        probes_failing: usize,
        probes: Mutex<Vec<Instant>>,
        away: AtomicBool,
        forgotten: Notify,
    }

    #[async_trait]
    impl Source for Deaf {
        type Mark = ();

        fn describe(&self) -> String {
            "a deaf one".into()
        }

        fn away(&self) -> &AtomicBool {
            &self.away
        }

        async fn list(&self) -> Result<(Entries, ()), RegistryError> {
            let mut entries = Entries::default();
            let last = self.lists.fetch_add(1, Ordering::Relaxed);
            if self.failing.contains(&last) {
                self.failed.get_or_init(Instant::now);
                return Err(RegistryError::Away("no leader".into()));
            }
            for number in 0..=last {
                let value = br#"{"PublicIP":"192.0.2.1"}"#;
                let entry = Entry { value, expires: Expiry::Unknown, revision: 1 };
                entries.put(&format!("subnets/10.3.{number}.0-24"), entry);
            }
            Ok((entries, ()))
        }

        async fn probe(&self) -> Result<(), RegistryError> {
            let number = {
                let mut probes = self.probes.lock().unwrap();
                probes.push(Instant::now());
                probes.len()
            };
            if number > self.probes_failing {
                return Ok(());
            }
            tokio::time::sleep(PROBE).await;
            Err(RegistryError::Away("no answer".into()))
        }

        async fn follow(&self, _: &mut Entries, (): &mut (), _: &Publish<'_>) -> Broken {
            std::future::pending().await
        }

        async fn reconnected(&self) {
            self.forgotten.notified().await;
        }
    }

    #[tokio::test(start_paused = true)]
    async fn what_no_event_told_is_known_after_five_minutes() {
        let mut receiver = watch(Arc::new(Deaf::default()), Snapshot::default());
        for leases in 1..4 {
            let begun = Instant::now();
            receiver.changed().await.unwrap();
            let view = receiver.borrow_and_update().clone();
            assert_eq!(view.snapshot.leases.len(), leases);
            let minutes = begun.elapsed().as_secs_f64() / 60.0;
            assert!(leases == 1 || (4.0..=6.0).contains(&minutes), "{minutes}");
        }
    }

    #[tokio::test(start_paused = true)]
    async fn what_is_followed_by_a_connection_that_is_given_up_is_listed_anew() {
        let source = Arc::new(Deaf::default());
        let mut receiver = watch(Arc::clone(&source), Snapshot::default());
        receiver.changed().await.unwrap();
        let begun = Instant::now();
        for leases in 2..5 {
            source.forgotten.notify_one();
            let found = receiver.wait_for(|view| view.snapshot.leases.len() == leases);
            found.await.unwrap();
        }
        assert!(begun.elapsed() < Duration::from_secs(1));
    }

    #[tokio::test(start_paused = true)]
    async fn an_election_is_no_outage() {
        let source = Arc::new(Deaf { failing: 1..2, ..Deaf::default() });
        let mut receiver = watch(Arc::clone(&source), Snapshot::default());
        for leases in [1, 3, 4] {
            receiver.changed().await.unwrap();
            let view = receiver.borrow_and_update().clone();
            assert_eq!((view.snapshot.leases.len(), view.readable), (leases, true));
        }
        assert_eq!(source.probes.lock().unwrap().len(), 1);
    }

    /// From the first pause of 100 ms on, no more than five seconds lie between two looks, so that no
    /// more pass before somebody who is back is noticed.
    #[tokio::test(start_paused = true)]
    async fn whoever_is_away_is_looked_for_every_five_seconds_at_least() {
        let source = Arc::new(Deaf { failing: 1..3, probes_failing: 12, ..Deaf::default() });
        let mut receiver = watch(Arc::clone(&source), Snapshot::default());
        receiver.wait_for(|view| view.readable).await.unwrap();
        receiver.wait_for(|view| !view.readable).await.unwrap();
        let begun = *source.failed.get().unwrap();
        assert!(begun.elapsed() >= ELECTIONS);
        assert!(source.refuse_while_away().is_err());
        let view = receiver.wait_for(|view| view.readable).await.unwrap().clone();
        // The first list after a probe that got through failed, which is not being back.
        assert_eq!(view.snapshot.leases.len(), 4);
        assert!(source.refuse_while_away().is_ok());
        let probes = source.probes.lock().unwrap();
        assert_eq!(probes.len(), 14);
        assert!(probes[0] - begun <= Duration::from_millis(101));
        for pair in probes.windows(2) {
            let pause = pair[1] - pair[0];
            assert!(pause <= PROBE + Duration::from_millis(1), "{pause:?}");
        }
    }
}
