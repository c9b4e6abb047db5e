//! The registry in etcd, by its v3 API: flannel's keys and values, byte for byte.
//!
//! One range is everything: the config, the leases and the nodes' records all lie below the prefix,
//! so one list gives a consistent picture, and one watch tells what happens to it from the next
//! revision on. Whenever the watch ends or is in doubt, everything is listed again and compared.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use async_trait::async_trait;
use etcd_client::{
    Client, Compare, CompareOp, Error, EventType, GetOptions, KeyValue, PutOptions, Txn, TxnOp,
    TxnOpResponse, WatchOptions, WatchResponse, WatchStream,
};
use jiff::{SignedDuration, Timestamp};
use tokio::sync::{Mutex, watch};

use super::endpoints::{self, Access, Endpoints};
use super::entries::{CONFIG, Entries, Entry, NODES, SUBNETS};
use super::{Registry, RegistryError, View};
use crate::backoff::Backoff;
use crate::lease::{Expiry, Lease, LeaseAttrs, LeaseKey, NodeRecord, Snapshot};

/// Bytes of a list at most: some 500,000 leases.
const LIST_LEN_MAX: usize = 128 << 20;
/// Everything is listed again this often, give or take a fifth: etcd has lost events before.
const RELIST_INTERVAL: Duration = Duration::from_secs(300);
/// A watch that ended sooner was not worth much: the next one waits.
const WATCH_SHORT: Duration = Duration::from_secs(5);

/// The registry under one prefix of an etcd.
#[derive(Debug, Clone)]
pub struct Etcd3Registry {
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    endpoints: Endpoints,
    /// Without a slash at its end.
    prefix: String,
    /// Whoever watches finds that no endpoint answers: nobody else need ask.
    away: AtomicBool,
    /// The etcd lease of our node record, and the record.
    node: Mutex<Option<(i64, String)>>,
}

impl Etcd3Registry {
    /// Connects to nothing yet.
    pub fn new(access: Access, prefix: &str) -> Self {
        let shared = Shared {
            endpoints: Endpoints::new(access),
            prefix: clean(prefix),
            away: AtomicBool::new(false),
            node: Mutex::default(),
        };
        Self { shared: Arc::new(shared) }
    }
}

/// As Go's path.Join cleans it, which flannel makes its keys with.
fn clean(prefix: &str) -> String {
    let root = if prefix.starts_with('/') { "/" } else { "" };
    let parts: Vec<&str> = prefix.split('/').filter(|part| !part.is_empty()).collect();
    format!("{root}{}", parts.join("/"))
}

impl Shared {
    fn key(&self, path: &str) -> String {
        format!("{}/{path}", self.prefix)
    }

    fn lease_key(&self, key: &LeaseKey) -> String {
        self.key(&format!("{SUBNETS}{key}"))
    }

    /// As [`Endpoints::ask`], but not while it is known that nobody answers.
    async fn ask<T: Send, F>(
        &self,
        request: impl Fn(Client) -> F + Send + Sync,
    ) -> Result<T, RegistryError>
    where
        F: Future<Output = Result<T, Error>> + Send,
    {
        self.refuse_while_away()?;
        self.endpoints.ask(request).await
    }

    fn refuse_while_away(&self) -> Result<(), RegistryError> {
        if self.away.load(Ordering::Relaxed) {
            return Err(RegistryError::Away("etcd is away".into()));
        }
        Ok(())
    }

    async fn list(&self) -> Result<Listed, RegistryError> {
        let answer = self.endpoints.ask(|client| async move {
            let mut kv = client.kv_client().max_decoding_message_size(LIST_LEN_MAX);
            kv.get(self.key(""), Some(GetOptions::new().with_prefix())).await
        });
        let answer = answer.await?;
        let mut entries = Entries::default();
        for kv in answer.kvs() {
            if let Some(path) = self.path(kv) {
                entries.put(path, entry(kv));
            }
        }
        let header = answer.header();
        Ok(Listed {
            entries,
            revision: header.map_or(0, etcd_client::ResponseHeader::revision),
            cluster: header.map_or(0, etcd_client::ResponseHeader::cluster_id),
        })
    }

    /// What follows the prefix and a slash.
    fn path<'a>(&self, kv: &'a KeyValue) -> Option<&'a str> {
        kv.key_str().ok()?.strip_prefix(&self.prefix)?.strip_prefix('/')
    }

    async fn grant(&self, ttl: Duration) -> Result<Granted, RegistryError> {
        let seconds = i64::try_from(ttl.as_secs()).unwrap_or(i64::MAX).max(1);
        let grant = self.ask(|mut client| async move { client.lease_grant(seconds, None).await });
        let grant = grant.await?;
        Ok(Granted { id: grant.id(), end: end(grant.ttl()) })
    }

    /// An etcd lease that came to nothing; left alone it would end by itself.
    async fn revoke(&self, granted: &Granted) {
        let id = granted.id;
        let _ = self.ask(|mut client| async move { client.lease_revoke(id).await }).await;
    }

    /// Puts a value where `compare` holds, and says at which revision; `None` where it does not.
    async fn put_if(
        &self,
        compare: Compare,
        key: &str,
        value: &str,
        granted: Option<&Granted>,
    ) -> Result<Option<u64>, RegistryError> {
        let lease = granted.map_or(0, |granted| granted.id);
        let put = TxnOp::put(key, value, Some(PutOptions::new().with_lease(lease)));
        let txn = Txn::new().when([compare]).and_then([put]).or_else([TxnOp::get(key, None)]);
        let answer = self.ask(|mut client| {
            let txn = txn.clone();
            async move { client.txn(txn).await }
        });
        let answer = answer.await?;
        if answer.succeeded() {
            let revision = answer.header().map_or(0, etcd_client::ResponseHeader::revision);
            return Ok(Some(unsigned(revision)));
        }
        // An answer that got lost, and the request sent again: it is what we have put ourselves.
        let TxnOpResponse::Get(found) = answer.op_responses().remove(0) else {
            return Ok(None);
        };
        let ours =
            |kv: &&KeyValue| lease != 0 && kv.lease() == lease && kv.value() == value.as_bytes();
        Ok(found.kvs().first().filter(ours).map(|kv| unsigned(kv.mod_revision())))
    }
}

/// Everything at one revision.
struct Listed {
    entries: Entries,
    revision: i64,
    cluster: u64,
}

/// An etcd lease: what lets keys end.
struct Granted {
    id: i64,
    end: Timestamp,
}

fn end(ttl_seconds: i64) -> Timestamp {
    let ttl = SignedDuration::from_secs(ttl_seconds);
    Timestamp::now().checked_add(ttl).unwrap_or(Timestamp::MAX)
}

/// Revisions begin with 1.
fn unsigned(revision: i64) -> u64 {
    u64::try_from(revision).unwrap_or(0)
}

fn signed(revision: u64) -> i64 {
    i64::try_from(revision).unwrap_or(i64::MAX)
}

fn entry(kv: &KeyValue) -> Entry<'_> {
    Entry { value: kv.value(), ends: kv.lease() != 0, revision: unsigned(kv.mod_revision()) }
}

fn json(value: &impl serde::Serialize) -> Result<String, RegistryError> {
    serde_json::to_string(value).map_err(|error| RegistryError::Task(error.to_string()))
}

#[async_trait]
impl Registry for Etcd3Registry {
    fn describe(&self) -> String {
        format!("etcd ({}, {})", self.shared.endpoints.describe(), self.shared.prefix)
    }

    fn identity(&self) -> String {
        format!("etcd:{}", self.shared.prefix)
    }

    async fn snapshot(&self) -> Result<Snapshot, RegistryError> {
        self.shared.refuse_while_away()?;
        Ok(self.shared.list().await?.entries.snapshot())
    }

    async fn init_config(&self, text: &str) -> Result<bool, RegistryError> {
        let key = self.shared.key(CONFIG);
        let free = Compare::version(key.as_str(), CompareOp::Equal, 0);
        Ok(self.shared.put_if(free, &key, text, None).await?.is_some())
    }

    async fn create(
        &self,
        key: &LeaseKey,
        attrs: &LeaseAttrs,
        ttl: Duration,
    ) -> Result<Option<Lease>, RegistryError> {
        let (name, value) = (self.shared.lease_key(key), json(attrs)?);
        let granted = self.shared.grant(ttl).await?;
        let free = Compare::version(name.as_str(), CompareOp::Equal, 0);
        let Some(revision) = self.shared.put_if(free, &name, &value, Some(&granted)).await? else {
            self.shared.revoke(&granted).await;
            return Ok(None);
        };
        let expires = Expiry::At(granted.end);
        Ok(Some(Lease { key: *key, attrs: attrs.clone(), expires, revision }))
    }

    async fn renew(
        &self,
        seen: &Lease,
        attrs: &LeaseAttrs,
        ttl: Duration,
    ) -> Result<Option<Lease>, RegistryError> {
        let (name, value) = (self.shared.lease_key(&seen.key), json(attrs)?);
        let same = || Compare::mod_revision(name.as_str(), CompareOp::Equal, signed(seen.revision));
        if seen.expires == Expiry::Never {
            let revision = self.shared.put_if(same(), &name, &value, None).await?;
            let renewed = |revision| Lease { attrs: attrs.clone(), revision, ..seen.clone() };
            return Ok(revision.map(renewed));
        }
        let granted = self.shared.grant(ttl).await?;
        let Some(revision) = self.shared.put_if(same(), &name, &value, Some(&granted)).await?
        else {
            self.shared.revoke(&granted).await;
            return Ok(None);
        };
        let expires = Expiry::At(granted.end);
        Ok(Some(Lease { key: seen.key, attrs: attrs.clone(), expires, revision }))
    }

    async fn remove(&self, seen: &Lease) -> Result<bool, RegistryError> {
        let name = self.shared.lease_key(&seen.key);
        let revision = signed(seen.revision);
        let same = Compare::mod_revision(name.as_str(), CompareOp::Equal, revision);
        let txn = Txn::new().when([same]).and_then([TxnOp::delete(name, None)]);
        let answer = self.shared.ask(|mut client| {
            let txn = txn.clone();
            async move { client.txn(txn).await }
        });
        Ok(answer.await?.succeeded())
    }

    /// The record is written once and then only kept alive, so that a fleet of nodes does not wake
    /// each other up.
    async fn publish_node(&self, node: &NodeRecord, ttl: Duration) -> Result<(), RegistryError> {
        let value = json(node)?;
        let mut held = self.shared.node.lock().await;
        if let Some((id, published)) = &*held
            && *published == value
            && self.shared.ask(|client| keep_alive(client, *id)).await?
        {
            return Ok(());
        }
        let granted = self.shared.grant(ttl).await?;
        let (id, key) = (granted.id, self.shared.key(&format!("{NODES}{}", node.id)));
        let put = self.shared.ask(|mut client| {
            let (key, value) = (key.clone(), value.clone());
            async move { client.put(key, value, Some(PutOptions::new().with_lease(id))).await }
        });
        put.await?;
        *held = Some((id, value));
        Ok(())
    }

    fn watch(&self, last: Snapshot) -> watch::Receiver<View> {
        let view = View { snapshot: Arc::new(last), readable: false };
        let (sender, receiver) = watch::channel(view);
        let shared = Arc::clone(&self.shared);
        let describe = self.describe();
        tokio::spawn(async move {
            let mut watching =
                Watching { shared, describe, sender: &sender, backoff: Backoff::default() };
            tokio::select! {
                () = sender.closed() => {}
                () = watching.run() => {}
            }
        });
        receiver
    }
}

/// Whether the etcd lease is still there; if so it lives for its whole TTL again.
async fn keep_alive(mut client: Client, id: i64) -> Result<bool, Error> {
    match client.lease_keep_alive(id).await {
        Ok(_) => Ok(true),
        // Said of a lease that has ended.
        Err(Error::LeaseKeepAliveError(_)) => Ok(false),
        Err(error) => Err(error),
    }
}

/// The background of one [`Registry::watch`].
struct Watching<'a> {
    shared: Arc<Shared>,
    describe: String,
    sender: &'a watch::Sender<View>,
    /// Between looks while nobody answers, and between watches that end at once.
    backoff: Backoff,
}

impl Watching<'_> {
    async fn run(&mut self) {
        loop {
            match self.shared.list().await {
                Ok(listed) => {
                    let begun = Instant::now();
                    let why = self.follow(listed).await;
                    tracing::debug!("listing {} anew: {why}", self.describe);
                    if begun.elapsed() < WATCH_SHORT {
                        self.backoff.wait().await;
                    } else {
                        self.backoff = Backoff::default();
                    }
                }
                Err(error) => self.wait_for_answer(&error).await,
            }
        }
    }

    /// Says once that nobody answers, looks from time to time, and says when somebody does.
    async fn wait_for_answer(&mut self, error: &RegistryError) {
        tracing::error!("{} is away, going on with what was last read: {error}", self.describe);
        self.sender.send_if_modified(|view| std::mem::take(&mut view.readable));
        self.shared.away.store(true, Ordering::Relaxed);
        let (since, mut looks) = (Instant::now(), 0_u32);
        self.backoff = Backoff::default();
        let key = self.shared.key(CONFIG);
        loop {
            self.backoff.wait().await;
            looks += 1;
            let count = |mut client: Client| {
                let key = key.clone();
                async move { client.get(key, Some(GetOptions::new().with_count_only())).await }
            };
            if self.shared.endpoints.probe(count).await.is_ok() {
                break;
            }
        }
        self.shared.away.store(false, Ordering::Relaxed);
        self.backoff = Backoff::default();
        let seconds = since.elapsed().as_secs();
        tracing::warn!("{} is back after {seconds} s and {looks} tries", self.describe);
    }

    /// Publishes what was listed and what happens from then on, until that is in doubt; says why.
    async fn follow(&self, listed: Listed) -> String {
        let Listed { mut entries, revision, cluster } = listed;
        self.publish(&entries);
        let options = WatchOptions::new()
            .with_prefix()
            .with_start_revision(revision + 1)
            .with_progress_notify()
            .with_fragment();
        let opened = self.shared.endpoints.ask(|client| {
            let (key, options) = (self.shared.key(""), options.clone());
            async move {
                let mut watch = client.watch_client().max_decoding_message_size(LIST_LEN_MAX);
                watch.watch(key, Some(options)).await
            }
        });
        let mut stream = match opened.await {
            Ok(stream) => stream,
            Err(error) => return error.to_string(),
        };
        let relist = tokio::time::sleep(RELIST_INTERVAL.mul_f64(0.8 + 0.4 * fastrand::f64()));
        tokio::pin!(relist);
        loop {
            let message = tokio::select! {
                message = next(&mut stream) => message,
                () = &mut relist => return "it is time to".into(),
            };
            let response = match message {
                Ok(response) => response,
                Err(why) => return why,
            };
            if response.header().is_some_and(|header| header.cluster_id() != cluster) {
                return "it is another cluster now".into();
            }
            if self.apply(&mut entries, &response) {
                self.publish(&entries);
            }
        }
    }

    /// Takes in events, and says whether there were any.
    fn apply(&self, entries: &mut Entries, response: &WatchResponse) -> bool {
        for event in response.events() {
            let Some((kv, path)) = event.kv().and_then(|kv| Some((kv, self.shared.path(kv)?)))
            else {
                continue;
            };
            match event.event_type() {
                EventType::Put => entries.put(path, entry(kv)),
                EventType::Delete => entries.remove(path),
            }
        }
        !response.events().is_empty()
    }

    fn publish(&self, entries: &Entries) {
        let snapshot = entries.snapshot();
        self.sender.send_if_modified(|view| {
            let changed = !view.readable || *view.snapshot != snapshot;
            if changed {
                *view = View { snapshot: Arc::new(snapshot), readable: true };
            }
            changed
        });
    }
}

/// The next response, or why there is none.
async fn next(stream: &mut WatchStream) -> Result<WatchResponse, String> {
    match stream.message().await {
        Ok(Some(response)) if response.compact_revision() > 0 => {
            Err("the revision to watch from is compacted".into())
        }
        Ok(Some(response)) if response.canceled() => {
            Err(format!("the watch was cancelled: {}", response.cancel_reason()))
        }
        Ok(Some(response)) => Ok(response),
        Ok(None) => Err("the watch was closed".into()),
        Err(error) => Err(endpoints::reason(&error)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn prefixes_are_cleaned_as_flannel_does() {
        for (given, key) in [
            ("/coreos.com/network", "/coreos.com/network/config"),
            ("/coreos.com//network/", "/coreos.com/network/config"),
            ("fleet", "fleet/config"),
        ] {
            let registry = Etcd3Registry::new(Access::default(), given);
            assert_eq!(registry.shared.key(CONFIG), key);
        }
    }
}
