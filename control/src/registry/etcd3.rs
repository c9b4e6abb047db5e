//! The registry in etcd, by its v3 API: flannel's keys and values, byte for byte.
//!
//! One range is everything: the config, the leases and the nodes' records all lie below the prefix,
//! so one list gives a consistent picture, and one watch tells what happens to it from the next
//! revision on. Where it ends, another one goes on from there; where it is in doubt, everything is listed
//! again and compared.

mod grpc;

use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::time::Duration;

use async_trait::async_trait;
use etcd_client::{
    Client, Compare, CompareOp, Error, EventType, GetOptions, KeyValue, LeaseTimeToLiveResponse,
    PutOptions, ResponseHeader, Txn, TxnOp, TxnOpResponse, WatchOptions, WatchResponse,
    WatchStream,
};
use futures_util::FutureExt as _;
use jiff::Timestamp;
use tokio::sync::{Mutex, watch};

use self::grpc::{Grpc, reason};
use super::access::Access;
use super::endpoints::{Endpoints, LIST_DEADLINE};
use super::entries::{CONFIG, Entries, Entry, NODES, SUBNETS, clean, json};
use super::watching::{self, Broken, Publish, Source};
use super::{Registry, RegistryError, View};
use crate::lease::{Expiry, Lease, LeaseAttrs, LeaseKey, NodeRecord, Snapshot, end_of};

/// Bytes of a list at most: some 500,000 leases.
const LIST_LEN_MAX: usize = 128 << 20;
/// Responses of a watch that are taken in before what they come to is told.
const TOGETHER_MAX: usize = 1000;

/// The registry under one prefix of an etcd.
#[derive(Debug, Clone)]
pub struct Etcd3Registry {
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    endpoints: Endpoints<Grpc>,
    /// Without a slash at its end.
    prefix: String,
    /// Whoever watches finds that no endpoint answers: nobody else need ask.
    away: AtomicBool,
    /// The etcd lease of our node record, and the record.
    node: Mutex<Option<(i64, String)>>,
}

impl Etcd3Registry {
    /// Connects to nothing yet.
    pub fn new(access: &Access, prefix: &str) -> Self {
        let shared = Shared {
            endpoints: Endpoints::new(Grpc(access.clone()), access.urls()),
            prefix: clean(prefix),
            away: AtomicBool::new(false),
            node: Mutex::default(),
        };
        Self { shared: Arc::new(shared) }
    }
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

    /// What follows the prefix and a slash.
    fn path<'a>(&self, kv: &'a KeyValue) -> Option<&'a str> {
        kv.key_str().ok()?.strip_prefix(&self.prefix)?.strip_prefix('/')
    }

    async fn grant(&self, ttl: Duration) -> Result<Granted, RegistryError> {
        let seconds = i64::try_from(ttl.as_secs()).unwrap_or(i64::MAX).max(1);
        let grant = self.ask(|mut client| async move { client.lease_grant(seconds, None).await });
        let grant = grant.await?;
        let ttl = u64::try_from(grant.ttl()).unwrap_or(0);
        Ok(Granted { id: grant.id(), end: end_of(Duration::from_secs(ttl)) })
    }

    /// An etcd lease that came to nothing; left alone it would end by itself.
    async fn revoke(&self, granted: &Granted) {
        let id = granted.id;
        let _ = self.ask(|mut client| async move { client.lease_revoke(id).await }).await;
    }

    async fn get(&self, key: &str) -> Result<Option<KeyValue>, RegistryError> {
        let found = self.ask(|mut client| async move { client.get(key, None).await });
        Ok(found.await?.take_kvs().pop())
    }

    /// Lets a lease live for its `ttl` again without a write, which would wake the whole fleet, and which
    /// an etcd without space refuses. `None` where it takes one, or is not that lease any more.
    async fn keep_lease(
        &self,
        seen: &Lease,
        ttl: Duration,
    ) -> Result<Option<Lease>, RegistryError> {
        let found = self.get(&self.lease_key(&seen.key)).await?;
        let Some(id) =
            found.filter(|kv| unsigned(kv.mod_revision()) == seen.revision).map(|kv| kv.lease())
        else {
            return Ok(None);
        };
        if id == 0 || !self.ask(|client| keep_alive(client, id)).await? {
            return Ok(None);
        }
        let answer = self.time_to_live(id).await?;
        if unsigned(answer.granted_ttl()) != ttl.as_secs() {
            return Ok(None);
        }
        let left = Duration::from_secs(unsigned(answer.ttl()));
        Ok(Some(Lease { expires: Expiry::after(Some(left)), ..seen.clone() }))
    }

    async fn time_to_live(&self, id: i64) -> Result<LeaseTimeToLiveResponse, RegistryError> {
        self.ask(|mut client| async move { client.lease_time_to_live(id, None).await }).await
    }

    /// Writes a lease where `compare` holds; `None` where it does not.
    async fn write_lease(
        &self,
        compare: Compare,
        key: &LeaseKey,
        attrs: &LeaseAttrs,
        ttl: Option<Duration>,
    ) -> Result<Option<Lease>, RegistryError> {
        let value = json(attrs)?;
        let granted = match ttl {
            Some(ttl) => Some(self.grant(ttl).await?),
            None => None,
        };
        let written = self.put_if(compare, &self.lease_key(key), &value, granted.as_ref()).await;
        // Any other failure leaves open whether it was written. So does this one where another endpoint
        // was asked before and got lost: the key goes with its lease then, and is claimed again.
        if let (Some(granted), Ok(None) | Err(RegistryError::Refused { .. })) = (&granted, &written)
        {
            self.revoke(granted).await;
        }
        let Some(revision) = written? else { return Ok(None) };
        let expires = granted.map_or(Expiry::Never, |granted| Expiry::At(granted.end));
        Ok(Some(Lease { key: *key, attrs: attrs.clone(), expires, revision }))
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
            let revision = answer.header().map_or(0, ResponseHeader::revision);
            return Ok(Some(unsigned(revision)));
        }
        // An answer that got lost, and the request sent again: it is what we have put ourselves.
        let Some(TxnOpResponse::Get(found)) = answer.op_responses().into_iter().next() else {
            return Ok(None);
        };
        let ours =
            |kv: &&KeyValue| lease != 0 && kv.lease() == lease && kv.value() == value.as_bytes();
        Ok(found.kvs().first().filter(ours).map(|kv| unsigned(kv.mod_revision())))
    }
}

/// When a list was made.
struct Mark {
    revision: i64,
    cluster: u64,
}

/// An etcd lease: what lets keys end.
struct Granted {
    id: i64,
    end: Timestamp,
}

/// Of what is never negative, but for the time to live of a lease that has ended.
fn unsigned(revision: i64) -> u64 {
    u64::try_from(revision).unwrap_or(0)
}

fn signed(revision: u64) -> i64 {
    i64::try_from(revision).unwrap_or(i64::MAX)
}

fn entry(kv: &KeyValue) -> Entry<'_> {
    let expires = if kv.lease() == 0 { Expiry::Never } else { Expiry::Unknown };
    Entry { value: kv.value(), expires, revision: unsigned(kv.mod_revision()) }
}

#[async_trait]
impl Registry for Etcd3Registry {
    fn describe(&self) -> String {
        self.shared.describe()
    }

    fn identity(&self) -> String {
        format!("etcd:{}", self.shared.prefix)
    }

    fn reconnect(&self) {
        self.shared.endpoints.forget();
    }

    async fn snapshot(&self) -> Result<Snapshot, RegistryError> {
        self.shared.refuse_while_away()?;
        Ok(self.shared.list().await?.0.snapshot())
    }

    async fn config(&self) -> Result<Option<String>, RegistryError> {
        let found = self.shared.get(&self.shared.key(CONFIG)).await?;
        Ok(found.map(|kv| String::from_utf8_lossy(kv.value()).into_owned()))
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
        ttl: Option<Duration>,
    ) -> Result<Option<Lease>, RegistryError> {
        let name = self.shared.lease_key(key);
        let free = Compare::version(name.as_str(), CompareOp::Equal, 0);
        self.shared.write_lease(free, key, attrs, ttl).await
    }

    async fn renew(
        &self,
        seen: &Lease,
        attrs: &LeaseAttrs,
        ttl: Option<Duration>,
    ) -> Result<Option<Lease>, RegistryError> {
        if let Some(ttl) = ttl
            && *attrs == seen.attrs
            && let Some(kept) = self.shared.keep_lease(seen, ttl).await?
        {
            return Ok(Some(kept));
        }
        let (name, revision) = (self.shared.lease_key(&seen.key), signed(seen.revision));
        let same = Compare::mod_revision(name.as_str(), CompareOp::Equal, revision);
        self.shared.write_lease(same, &seen.key, attrs, ttl).await
    }

    async fn time_left(&self, lease: &Lease) -> Result<Option<Duration>, RegistryError> {
        let found = self.shared.get(&self.shared.lease_key(&lease.key)).await?;
        let Some(id) = found.map(|kv| kv.lease()).filter(|id| *id != 0) else { return Ok(None) };
        let left = self.shared.time_to_live(id).await?.ttl();
        // Negative once it has ended.
        Ok(u64::try_from(left).ok().map(Duration::from_secs))
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
        let (value, key) = (json(node)?, self.shared.key(&format!("{NODES}{}", node.id)));
        let mut held = self.shared.node.lock().await;
        if let Some((id, published)) = &*held
            && *published == value
            && self.shared.ask(|client| keep_alive(client, *id)).await?
            && self.shared.get(&key).await?.is_some()
        {
            // And nobody has removed it.
            return Ok(());
        }
        let granted = self.shared.grant(ttl).await?;
        let id = granted.id;
        let put = self.shared.ask(|mut client| {
            let (key, value) = (key.clone(), value.clone());
            async move { client.put(key, value, Some(PutOptions::new().with_lease(id))).await }
        });
        let put = put.await;
        if let Err(RegistryError::Refused { .. }) = &put {
            self.shared.revoke(&granted).await;
        }
        put?;
        *held = Some((id, value));
        Ok(())
    }

    fn watch(&self, last: Snapshot) -> watch::Receiver<View> {
        watching::watch(Arc::clone(&self.shared), last)
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

#[async_trait]
impl Source for Shared {
    type Mark = Mark;

    fn describe(&self) -> String {
        format!("etcd ({}, {})", self.endpoints.describe(), self.prefix)
    }

    fn away(&self) -> &AtomicBool {
        &self.away
    }

    async fn reconnected(&self) {
        self.endpoints.forgotten().await;
    }

    async fn list(&self) -> Result<(Entries, Mark), RegistryError> {
        let answer = self.endpoints.ask_within(LIST_DEADLINE, |client| async move {
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
        let (revision, cluster) =
            answer.header().map_or((0, 0), |header| (header.revision(), header.cluster_id()));
        Ok((entries, Mark { revision, cluster }))
    }

    async fn probe(&self) -> Result<(), RegistryError> {
        let count = |mut client: Client| async move {
            client.get(self.key(CONFIG), Some(GetOptions::new().with_count_only())).await
        };
        self.endpoints.probe(count).await
    }

    async fn follow(
        &self,
        entries: &mut Entries,
        mark: &mut Mark,
        publish: &Publish<'_>,
    ) -> Broken {
        let mut stream = match self.open_watch(mark.revision + 1).await {
            Ok(stream) => stream,
            Err(error) => return Broken::Doubt(error.to_string()),
        };
        let at = self.endpoints.current();
        loop {
            let mut has_changed = false;
            for response in next_ones(&mut stream).await {
                let response = match response {
                    Ok(response) if response.compact_revision() > 0 => {
                        return Broken::Doubt("the revision to watch from is compacted".into());
                    }
                    Ok(response) => response,
                    Err(why) => {
                        // What was heard before it counts, however long nobody answers now.
                        if has_changed {
                            publish(entries);
                        }
                        self.endpoints.leave(at);
                        return Broken::Off(why);
                    }
                };
                // etcd's grpc-proxy tells none to whoever joins a watch that it has.
                let cluster = response.header().map_or(0, ResponseHeader::cluster_id);
                if ![0, mark.cluster].contains(&cluster) {
                    return Broken::Doubt("it is another cluster now".into());
                }
                if response.created() && cluster != 0 && revision(&response) < mark.revision {
                    return Broken::Doubt("its history is shorter now".into());
                }
                has_changed |= self.apply(entries, &response);
                mark.move_on(&response);
            }
            if has_changed {
                publish(entries);
            }
        }
    }
}

impl Shared {
    async fn open_watch(&self, revision: i64) -> Result<WatchStream, RegistryError> {
        let options = WatchOptions::new()
            .with_prefix()
            .with_start_revision(revision)
            .with_progress_notify()
            .with_fragment();
        let opened = self.endpoints.ask(|client| {
            let options = options.clone();
            async move {
                let mut watch = client.watch_client().max_decoding_message_size(LIST_LEN_MAX);
                watch.watch(self.key(""), Some(options)).await
            }
        });
        opened.await
    }

    /// Takes in events, and says whether there were any.
    fn apply(&self, entries: &mut Entries, response: &WatchResponse) -> bool {
        for event in response.events() {
            let Some((kv, path)) = event.kv().and_then(|kv| Some((kv, self.path(kv)?))) else {
                continue;
            };
            match event.event_type() {
                EventType::Put => entries.put(path, entry(kv)),
                EventType::Delete => entries.remove(path),
            }
        }
        !response.events().is_empty()
    }
}

impl Mark {
    /// Takes in how far a watch has come. A revision may come in pieces, so that of the last event is not
    /// over yet; and whoever catches up is told a later one than that of the events.
    fn move_on(&mut self, response: &WatchResponse) {
        let last =
            response.events().iter().filter_map(|event| event.kv()).map(KeyValue::mod_revision);
        match last.max() {
            Some(last) => self.revision = self.revision.max(last - 1),
            // Nothing has happened to our keys up to there (progress notification).
            None if !response.created() => self.revision = self.revision.max(revision(response)),
            None => {}
        }
    }
}

fn revision(response: &WatchResponse) -> i64 {
    response.header().map_or(0, ResponseHeader::revision)
}

/// The next response, and those behind it that are there already: a fleet that starts makes more of
/// them than could be published one by one. After an error there is none.
async fn next_ones(stream: &mut WatchStream) -> Vec<Result<WatchResponse, String>> {
    let mut responses = vec![next(stream).await];
    while responses.len() < TOGETHER_MAX
        && responses.last().is_some_and(Result::is_ok)
        && let Some(response) = next(stream).now_or_never()
    {
        responses.push(response);
    }
    responses
}

/// The next response, or why there is none. Cancel safe.
async fn next(stream: &mut WatchStream) -> Result<WatchResponse, String> {
    match stream.message().await {
        Ok(Some(response)) if response.canceled() && response.compact_revision() == 0 => {
            Err(format!("the watch was cancelled: {}", response.cancel_reason()))
        }
        Ok(Some(response)) => Ok(response),
        Ok(None) => Err("the watch was closed".into()),
        Err(error) => Err(reason(&error)),
    }
}
