//! etcd's endpoints: one client each. Requests go to the one that last worked; where it fails, they
//! go on to the next and stay there.
//!
//! etcd-client's own balancer goes on sending to endpoints that are dead.

use std::fmt;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use async_trait::async_trait;
use futures_util::stream::FuturesUnordered;
use futures_util::{FutureExt, StreamExt};
use tokio::sync::{Mutex, Notify};
use tokio::time::{sleep, timeout};

use super::RegistryError;

/// How long a connection may take.
pub(super) const CONNECT_TIMEOUT: Duration = Duration::from_secs(2);
/// How long a request may take. Servers under load take seconds.
pub(super) const DEADLINE: Duration = Duration::from_secs(5);
/// How long a list of everything may take: megabytes in a large fleet, which asks for them all at once
/// when etcd is back. That a server hangs is noticed sooner by other means.
pub(super) const LIST_DEADLINE: Duration = Duration::from_secs(60);

/// How to speak to an endpoint.
#[async_trait]
pub(super) trait Dial: Send + Sync + 'static {
    type Client: Clone + Send + Sync;
    type Error: Send + Sync;

    /// A client of this endpoint. It may connect later.
    async fn dial(&self, url: &str) -> Result<Self::Client, Failure>;

    /// How long that may take.
    fn deadline(&self) -> Duration {
        DEADLINE
    }

    /// How long one endpoint has before the next one is looked for beside it.
    fn head_start(&self) -> Duration {
        Duration::ZERO
    }

    /// What an error of a request means.
    fn failure(url: &str, error: &Self::Error) -> Failure;
}

/// Why a request brought nothing.
#[derive(Debug)]
pub(super) enum Failure {
    /// Another endpoint may do better.
    Endpoint(String),
    /// Any endpoint would say this.
    Final(RegistryError),
}

impl Failure {
    /// The endpoint's fault, or else the request's.
    pub(super) fn new(url: &str, reason: String, is_final: bool) -> Self {
        if is_final {
            Self::Final(RegistryError::Refused { endpoint: url.to_owned(), reason })
        } else {
            Self::Endpoint(format!("{url}: {reason}"))
        }
    }
}

impl From<Failure> for RegistryError {
    fn from(failure: Failure) -> Self {
        match failure {
            Failure::Endpoint(reason) => Self::Away(reason),
            Failure::Final(error) => error,
        }
    }
}

/// All endpoints.
pub(super) struct Endpoints<D: Dial> {
    dial: D,
    all: Vec<Endpoint<D::Client>>,
    /// The one that last worked.
    current: AtomicUsize,
    /// Told when all connections are given up.
    forgotten: Notify,
}

struct Endpoint<C> {
    url: String,
    /// Made at the first request, and anew after a failure.
    client: Mutex<Option<C>>,
}

impl<D: Dial> fmt::Debug for Endpoints<D> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Endpoints").field(&self.describe()).finish()
    }
}

impl<D: Dial> Endpoints<D> {
    pub(super) fn new(dial: D, urls: impl Iterator<Item = String>) -> Self {
        let all = urls.map(|url| Endpoint { url, client: Mutex::new(None) }).collect();
        Self { dial, all, current: AtomicUsize::new(0), forgotten: Notify::new() }
    }

    /// All of them, for whoever reads the log.
    pub(super) fn describe(&self) -> String {
        let urls: Vec<&str> = self.all.iter().map(|endpoint| endpoint.url.as_str()).collect();
        urls.join(",")
    }

    /// Makes new connections from now on.
    pub(super) fn forget(&self) {
        self.all.iter().for_each(Endpoint::forget);
        self.forgotten.notify_one();
    }

    /// Ends when new connections are made from then on. For one that waits, and cancel safe.
    pub(super) async fn forgotten(&self) {
        self.forgotten.notified().await;
    }

    /// The endpoint that last worked, by its number.
    pub(super) fn current(&self) -> usize {
        self.current.load(Ordering::Relaxed)
    }

    /// Goes on to the next endpoint, if this is still the one in use: it has let somebody down who had
    /// nothing to ask.
    pub(super) fn leave(&self, at: usize) {
        self.all[at].forget();
        let next = (at + 1) % self.all.len();
        // Fails where another request went on before.
        let _ = self.current.compare_exchange(at, next, Ordering::Relaxed, Ordering::Relaxed);
    }

    /// Sends a request that may be sent more than once: to the endpoint that last worked, then to
    /// each of the others.
    ///
    /// # Errors
    /// No endpoint has answered, or one has refused.
    pub(super) async fn ask<T: Send, F>(
        &self,
        request: impl Fn(D::Client) -> F + Send + Sync,
    ) -> Result<T, RegistryError>
    where
        F: Future<Output = Result<T, D::Error>> + Send,
    {
        self.ask_within(DEADLINE, request).await
    }

    /// As [`Endpoints::ask`], with another time for each endpoint.
    pub(super) async fn ask_within<T: Send, F>(
        &self,
        time: Duration,
        request: impl Fn(D::Client) -> F + Send + Sync,
    ) -> Result<T, RegistryError>
    where
        F: Future<Output = Result<T, D::Error>> + Send,
    {
        let first = self.current.load(Ordering::Relaxed);
        let mut reasons = Vec::new();
        for turn in 0..self.all.len() {
            let at = (first + turn) % self.all.len();
            match self.ask_one(at, time, &request).await {
                Ok(answer) => {
                    self.current.store(at, Ordering::Relaxed);
                    return Ok(answer);
                }
                Err(Failure::Endpoint(reason)) => reasons.push(reason),
                Err(Failure::Final(error)) => return Err(error),
            }
        }
        Err(RegistryError::Away(reasons.join("; ")))
    }

    /// Sends a small request to all, from the one that last worked on, each a [`Dial::head_start`] after the
    /// other or once that has failed, and stays with the first that answers.
    ///
    /// # Errors
    /// None has; the reason is the last one's.
    pub(super) async fn probe<T: Send, F>(
        &self,
        request: impl Fn(D::Client) -> F + Send + Sync,
    ) -> Result<(), RegistryError>
    where
        F: Future<Output = Result<T, D::Error>> + Send,
    {
        let first = self.current();
        let mut others = (0..self.all.len()).map(|turn| {
            let at = (first + turn) % self.all.len();
            let asked = self.ask_one(at, DEADLINE, &request);
            asked.map(move |answer| answer.map(|_| at)).boxed()
        });
        let mut asked: FuturesUnordered<_> = others.next().into_iter().collect();
        loop {
            let answer = tokio::select! {
                answer = asked.next() => answer,
                () = sleep(self.dial.head_start()), if others.len() > 0 => None,
            };
            asked.extend(others.next());
            match answer {
                Some(Ok(at)) => {
                    self.current.store(at, Ordering::Relaxed);
                    return Ok(());
                }
                Some(Err(failure)) if asked.is_empty() => return Err(failure.into()),
                Some(Err(_)) | None => {}
            }
        }
    }

    async fn ask_one<T: Send, F>(
        &self,
        at: usize,
        time: Duration,
        request: impl Fn(D::Client) -> F + Send + Sync,
    ) -> Result<T, Failure>
    where
        F: Future<Output = Result<T, D::Error>> + Send,
    {
        let endpoint = &self.all[at];
        let url = &endpoint.url;
        let late = |_| Failure::Endpoint(format!("{url}: no answer in time"));
        let answer = async {
            let client = timeout(self.dial.deadline(), endpoint.client(&self.dial));
            let client = client.await.map_err(late)??;
            let answer = timeout(time, request(client)).await.map_err(late)?;
            answer.map_err(|error| D::failure(url, &error))
        };
        let answer = answer.await;
        if answer.is_err() {
            endpoint.forget();
        }
        answer
    }
}

impl<C: Clone> Endpoint<C> {
    async fn client(&self, dial: &impl Dial<Client = C>) -> Result<C, Failure> {
        let mut client = self.client.lock().await;
        if let Some(client) = &*client {
            return Ok(client.clone());
        }
        let made = dial.dial(&self.url).await?;
        Ok(client.insert(made).clone())
    }

    /// The next request connects anew. Where one waits for a connection just now, it is new.
    fn forget(&self) {
        if let Ok(mut client) = self.client.try_lock() {
            *client = None;
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Mutex as SyncMutex;

    use tokio::time::Instant;

    use super::*;

    /// Endpoints that answer, fail or hang, as their names say; and when each was connected to.
    #[derive(Default)]
    struct Named {
        begun: Option<Instant>,
        dialled: SyncMutex<Vec<(String, u64)>>,
    }

    #[async_trait]
    impl Dial for Named {
        type Client = ();
        type Error = ();

        async fn dial(&self, url: &str) -> Result<(), Failure> {
            let since = self.begun.map_or(0, |begun| begun.elapsed().as_secs());
            self.dialled.lock().unwrap().push((url.to_owned(), since));
            match url {
                "answers" => Ok(()),
                "fails" => Err(Failure::Endpoint(url.to_owned())),
                _ => std::future::pending().await,
            }
        }

        fn deadline(&self) -> Duration {
            Duration::from_secs(60)
        }

        fn head_start(&self) -> Duration {
            Duration::from_secs(5)
        }

        fn failure(url: &str, (): &()) -> Failure {
            Failure::Endpoint(url.to_owned())
        }
    }

    /// Whether a probe finds somebody, and whom it has connected to by then.
    async fn probe(urls: &[&str]) -> (bool, Vec<(String, u64)>) {
        let dial = Named { begun: Some(Instant::now()), ..Named::default() };
        let endpoints = Endpoints::new(dial, urls.iter().map(ToString::to_string));
        let found = endpoints.probe(async |()| Ok(())).await.is_ok();
        let dialled = std::mem::take(&mut *endpoints.dial.dialled.lock().unwrap());
        (found, dialled)
    }

    #[tokio::test(start_paused = true)]
    async fn each_endpoint_has_its_head_start() {
        let dialled = |list: &[(&str, u64)]| -> Vec<(String, u64)> {
            list.iter().map(|(url, at)| ((*url).to_owned(), *at)).collect()
        };
        let alone = probe(&["answers", "hangs"]).await;
        assert_eq!(alone, (true, dialled(&[("answers", 0)])));
        let late = probe(&["hangs", "hangs", "answers"]).await;
        assert_eq!(late, (true, dialled(&[("hangs", 0), ("hangs", 5), ("answers", 10)])));
        let at_once = probe(&["fails", "answers"]).await;
        assert_eq!(at_once, (true, dialled(&[("fails", 0), ("answers", 0)])));
        let none = probe(&["hangs", "fails"]).await;
        assert_eq!(none, (false, dialled(&[("hangs", 0), ("fails", 5)])));
    }
}
