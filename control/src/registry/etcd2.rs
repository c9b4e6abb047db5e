//! The registry in etcd, by its v2 API over HTTP, for fleets of flannel up to 0.17: the same keys
//! and values as by v3, in a store of their own.

mod http;

use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use async_trait::async_trait;
use tokio::sync::{Mutex, watch};
use tokio::time::Instant;

use super::access::Access;
use super::endpoints::{DEADLINE, Endpoints, LIST_DEADLINE};
use super::entries::{CONFIG, Entries, Entry, NODES, SUBNETS, clean, json};
use super::watching::{self, Broken, Publish, Source};
use super::{Registry, RegistryError, View};
use crate::lease::{Expiry, Lease, LeaseAttrs, LeaseKey, NodeRecord, Snapshot};
pub(super) use http::agent;
use http::{Answer, Client, EVENT_INDEX_CLEARED, Http, Method, Node, POLL};

/// How long one wait for an event may take, with its answer.
const POLL_DEADLINE: Duration = POLL.saturating_add(DEADLINE);
/// While one waits, whether the server is still there is asked this often.
const CHECK_INTERVAL: Duration = Duration::from_secs(4);
/// A server that hangs is noticed soon.
const _: () = assert!(CHECK_INTERVAL.as_secs() + DEADLINE.as_secs() < 10);
/// The shortest time that a key may live, and how often is looked whether it has ended.
const TTL_MIN: Duration = Duration::from_secs(1);
const ENDING_INTERVAL: Duration = Duration::from_millis(100);

/// The registry under one prefix of an etcd.
#[derive(Debug, Clone)]
pub struct Etcd2Registry {
    shared: Arc<Shared>,
}

struct Shared {
    endpoints: Endpoints<Http>,
    /// Without a slash at its end.
    prefix: String,
    /// Whoever watches finds that no endpoint answers: nobody else need ask.
    away: AtomicBool,
    /// Our node record, as it was last written.
    node: Mutex<Option<String>>,
}

impl fmt::Debug for Shared {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.describe())
    }
}

impl Etcd2Registry {
    /// Connects to nothing yet.
    pub fn new(access: &Access, prefix: &str) -> Self {
        let shared = Shared {
            endpoints: Endpoints::new(Http(access.clone()), access.urls()),
            prefix: rooted(clean(prefix)),
            away: AtomicBool::new(false),
            node: Mutex::default(),
        };
        Self { shared: Arc::new(shared) }
    }
}

impl Shared {
    /// One request, to whichever endpoint answers.
    async fn ask(&self, method: Method, path: &str) -> Result<Answer, RegistryError> {
        self.ask_within(DEADLINE, method, path).await
    }

    /// As [`Shared::ask`], with another time for the whole answer.
    async fn ask_within(
        &self,
        time: Duration,
        method: Method,
        path: &str,
    ) -> Result<Answer, RegistryError> {
        let path = format!("{}/{path}", self.prefix);
        let request = |client: Client| client.ask(method.clone(), path.clone(), time);
        self.endpoints.ask_within(time, request).await
    }

    /// As [`Shared::ask`], but not while it is known that nobody answers.
    async fn ask_if_there(&self, method: Method, path: &str) -> Result<Answer, RegistryError> {
        self.refuse_while_away()?;
        self.ask(method, path).await
    }

    /// Writes a key where `condition` holds, and says at which index; `None` where it does not.
    async fn put_if(
        &self,
        condition: &str,
        path: &str,
        value: String,
        ttl: Option<Duration>,
    ) -> Result<Option<u64>, RegistryError> {
        let mut form = vec![("value", value)];
        form.extend(ttl.map(|ttl| ("ttl", ttl.as_secs().max(1).to_string())));
        let path = format!("{path}?{condition}");
        let answer = self.ask_if_there(Method::Put(form), &path).await?;
        Ok((answer.error_code == 0).then_some(answer.node.modified_index))
    }

    /// Writes a lease where the condition holds; `None` where it does not.
    async fn write_lease(
        &self,
        condition: &str,
        key: &LeaseKey,
        attrs: &LeaseAttrs,
        ttl: Option<Duration>,
    ) -> Result<Option<Lease>, RegistryError> {
        let path = format!("{SUBNETS}{key}");
        let revision = self.put_if(condition, &path, json(attrs)?, ttl).await?;
        let expires = Expiry::after(ttl);
        Ok(revision.map(|revision| Lease { key: *key, attrs: attrs.clone(), expires, revision }))
    }

    /// Everything below a directory.
    fn put_all(&self, entries: &mut Entries, node: &Node) {
        for node in &node.nodes {
            if node.dir {
                self.put_all(entries, node);
            } else if let Some(path) = self.path(&node.key) {
                entries.put(path, entry(node));
            }
        }
    }

    /// What follows the prefix and a slash.
    fn path<'a>(&self, key: &'a str) -> Option<&'a str> {
        key.strip_prefix(&self.prefix)?.strip_prefix('/')
    }

    /// Ends when the server that is asked is no longer there, or has lost the others; says why. Until
    /// then `index` is how far its store is.
    async fn until_gone(&self, index: &AtomicU64) -> String {
        let at = self.endpoints.current();
        loop {
            tokio::time::sleep(CHECK_INTERVAL).await;
            // Only a quorum read needs the others.
            let answer = match self.ask(Method::Get, &format!("{CONFIG}?quorum=true")).await {
                Ok(answer) => answer,
                Err(error) => return error.to_string(),
            };
            if self.endpoints.current() != at {
                return "another server is asked now".into();
            }
            index.store(answer.index, Ordering::Relaxed);
        }
    }
}

/// A path of its own: all keys begin with a slash by this API.
fn rooted(prefix: String) -> String {
    if prefix.is_empty() || prefix.starts_with('/') { prefix } else { format!("/{prefix}") }
}

fn entry(node: &Node) -> Entry<'_> {
    let ends = node.expiration.is_some();
    let expires = if ends { Expiry::Unknown } else { Expiry::Never };
    Entry { value: node.value.as_bytes(), expires, revision: node.modified_index }
}

#[async_trait]
impl Registry for Etcd2Registry {
    fn describe(&self) -> String {
        self.shared.describe()
    }

    fn identity(&self) -> String {
        format!("etcd2:{}", self.shared.prefix)
    }

    fn reconnect(&self) {
        self.shared.endpoints.forget();
    }

    async fn snapshot(&self) -> Result<Snapshot, RegistryError> {
        self.shared.refuse_while_away()?;
        Ok(self.shared.list().await?.0.snapshot())
    }

    async fn config(&self) -> Result<Option<String>, RegistryError> {
        let path = format!("{CONFIG}?quorum=true");
        let answer = self.shared.ask_if_there(Method::Get, &path).await?;
        let is_there = answer.error_code == 0 && !answer.node.dir;
        Ok(is_there.then_some(answer.node.value))
    }

    async fn init_config(&self, text: &str) -> Result<bool, RegistryError> {
        let written = self.shared.put_if("prevExist=false", CONFIG, text.to_owned(), None);
        Ok(written.await?.is_some())
    }

    async fn create(
        &self,
        key: &LeaseKey,
        attrs: &LeaseAttrs,
        ttl: Option<Duration>,
    ) -> Result<Option<Lease>, RegistryError> {
        self.shared.write_lease("prevExist=false", key, attrs, ttl).await
    }

    async fn renew(
        &self,
        seen: &Lease,
        attrs: &LeaseAttrs,
        ttl: Option<Duration>,
    ) -> Result<Option<Lease>, RegistryError> {
        let same = format!("prevIndex={}", seen.revision);
        self.shared.write_lease(&same, &seen.key, attrs, ttl).await
    }

    /// flannel does not know what a conditional delete is: up to 0.13 it learns of nothing any more, later
    /// it keeps the routes (parseSubnetWatchResponse in subnet/etcdv2/registry.go). So the lease is made to
    /// end, and deleted only where it does not, since servers' clocks differ.
    async fn remove(&self, seen: &Lease) -> Result<bool, RegistryError> {
        let Some(ending) = self.renew(seen, &seen.attrs, Some(TTL_MIN)).await? else {
            return Ok(false);
        };
        let path = format!("{SUBNETS}{}", seen.key);
        let begun = Instant::now();
        while begun.elapsed() < DEADLINE {
            let found =
                self.shared.ask_if_there(Method::Get, &format!("{path}?quorum=true")).await?;
            if found.error_code != 0 {
                return Ok(true);
            }
            // Renewed by its owner.
            if found.node.modified_index != ending.revision {
                return Ok(false);
            }
            tokio::time::sleep(ENDING_INTERVAL).await;
        }
        let path = format!("{path}?prevIndex={}", ending.revision);
        Ok(self.shared.ask_if_there(Method::Delete, &path).await?.error_code == 0)
    }

    async fn time_left(&self, lease: &Lease) -> Result<Option<Duration>, RegistryError> {
        let path = format!("{SUBNETS}{}?quorum=true", lease.key);
        let ttl = self.shared.ask_if_there(Method::Get, &path).await?.node.ttl;
        Ok(ttl.map(|seconds| Duration::from_secs(u64::try_from(seconds).unwrap_or(0))))
    }

    /// The record is written once and then only refreshed, of which those who watch are not told: a
    /// fleet of nodes does not wake each other up.
    async fn publish_node(&self, node: &NodeRecord, ttl: Duration) -> Result<(), RegistryError> {
        let (path, value) = (format!("{NODES}{}", node.id), json(node)?);
        let ttl = ("ttl", ttl.as_secs().to_string());
        let mut published = self.shared.node.lock().await;
        if published.as_ref() == Some(&value) {
            let (path, form) = (format!("{path}?prevExist=true"), [("refresh", "true".into())]);
            let form = form.into_iter().chain([ttl.clone()]).collect();
            let answer = self.shared.ask_if_there(Method::Put(form), &path).await?;
            // Gone, or somebody else has written to it.
            if answer.error_code == 0 && answer.node.value == value {
                return Ok(());
            }
        }
        let form = vec![("value", value.clone()), ttl];
        self.shared.ask_if_there(Method::Put(form), &path).await?;
        *published = Some(value);
        Ok(())
    }

    fn watch(&self, last: Snapshot) -> watch::Receiver<View> {
        watching::watch(Arc::clone(&self.shared), last)
    }
}

#[async_trait]
impl Source for Shared {
    /// The index to wait for an event from.
    type Mark = u64;

    fn describe(&self) -> String {
        format!("etcd by its v2 API ({}, {})", self.endpoints.describe(), self.prefix)
    }

    fn away(&self) -> &AtomicBool {
        &self.away
    }

    async fn reconnected(&self) {
        self.endpoints.forgotten().await;
    }

    async fn list(&self) -> Result<(Entries, u64), RegistryError> {
        let all = "?recursive=true&quorum=true";
        let answer = self.ask_within(LIST_DEADLINE, Method::Get, all).await?;
        let mut entries = Entries::default();
        self.put_all(&mut entries, &answer.node);
        Ok((entries, answer.index + 1))
    }

    async fn probe(&self) -> Result<(), RegistryError> {
        let path = format!("{}/{CONFIG}?quorum=true", self.prefix);
        let request = |client: Client| client.ask(Method::Get, path.clone(), DEADLINE);
        self.endpoints.probe(request).await
    }

    async fn follow(&self, entries: &mut Entries, mark: &mut u64, publish: &Publish<'_>) -> Broken {
        let index = AtomicU64::new(0);
        let gone = self.until_gone(&index);
        tokio::pin!(gone);
        loop {
            let begun = index.load(Ordering::Relaxed);
            let path = format!("{}/?recursive=true&wait=true&waitIndex={mark}", self.prefix);
            let request = |client: Client| client.wait(path.clone());
            let answer = tokio::select! {
                answer = self.endpoints.ask_within(POLL_DEADLINE, request) => answer,
                why = &mut gone => return Broken::Doubt(why),
            };
            let answer = match answer {
                Ok(answer) => answer,
                Err(error) => return Broken::Doubt(error.to_string()),
            };
            let node = &answer.node;
            match (answer.error_code, answer.action.as_str()) {
                (EVENT_INDEX_CLEARED, _) => {
                    return Broken::Doubt("the index to wait for is cleared".into());
                }
                // No event, at least up to where the store was when the wait began.
                _ if answer.says_nothing() => {
                    *mark = (*mark).max(begun + 1);
                    continue;
                }
                _ if node.dir => return Broken::Doubt("a directory came or went".into()),
                (_, "delete" | "expire" | "compareAndDelete") => {
                    self.path(&node.key).into_iter().for_each(|path| entries.remove(path));
                }
                _ => {
                    let path = self.path(&node.key);
                    path.into_iter().for_each(|path| entries.put(path, entry(node)));
                }
            }
            *mark = node.modified_index + 1;
            publish(entries);
        }
    }
}
