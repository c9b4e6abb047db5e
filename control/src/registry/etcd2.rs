//! The registry in etcd, by its v2 API over HTTP, for fleets of flannel up to 0.17: the same keys
//! and values as by v3, in a store of their own.

use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;
use std::time::Duration;

use async_trait::async_trait;
use base64::Engine as _;
use base64::prelude::BASE64_STANDARD;
use serde::Deserialize;
use tokio::sync::{Mutex, oneshot, watch};
use tokio::time::Instant;
use ureq::Agent;
use ureq::tls::{Certificate, ClientCert, PemItem, PrivateKey, RootCerts, TlsConfig, parse_pem};

use super::access::{Access, Credentials, Secret};
use super::endpoints::{CONNECT_TIMEOUT, DEADLINE, Dial, Endpoints, Failure, LIST_DEADLINE};
use super::entries::{CONFIG, Entries, Entry, NODES, SUBNETS, clean, json};
use super::watching::{self, Broken, Publish, Source};
use super::{Registry, RegistryError, View};
use crate::lease::{Expiry, Lease, LeaseAttrs, LeaseKey, NodeRecord, Snapshot};

/// Bytes of a list at most.
const LIST_LEN_MAX: u64 = 128 << 20;
/// How long one wait for an event lasts; the answer may then take as long as any. etcd remembers the last
/// 1000 changes, and a fleet refreshes the records of a twentieth of its nodes each second.
const POLL: Duration = Duration::from_secs(15);
const POLL_DEADLINE: Duration = Duration::from_secs(15 + 5);
/// While one waits, whether the server is still there is asked this often.
const CHECK_INTERVAL: Duration = Duration::from_secs(4);
/// A server that hangs is noticed soon.
const _: () = assert!(CHECK_INTERVAL.as_secs() + DEADLINE.as_secs() < 10);
/// The shortest time that a key may live, and how often is looked whether it has ended.
const TTL_MIN: Duration = Duration::from_secs(1);
const ENDING_INTERVAL: Duration = Duration::from_millis(100);

/// etcd's error codes (etcd v2 errorcode.md).
const KEY_NOT_FOUND: u32 = 100;
const TEST_FAILED: u32 = 101;
const NODE_EXIST: u32 = 105;
const EVENT_INDEX_CLEARED: u32 = 401;
/// Raft's own troubles, such as an election: another member may do better.
const RAFT_ERRORS: std::ops::Range<u32> = 300..400;

/// Connects to endpoints by HTTP.
struct Http(Access);

/// A client of one endpoint.
#[derive(Clone)]
struct Client {
    agent: Agent,
    url: String,
    authorization: Option<String>,
}

/// What is asked for.
#[derive(Clone)]
enum Method {
    Get,
    Put(Vec<(&'static str, String)>),
    Delete,
}

/// How long an answer may take to begin, and all of it.
struct Times {
    response: Duration,
    all: Duration,
}

/// Why a request brought nothing.
struct HttpError {
    reason: String,
    is_final: bool,
    is_timeout: bool,
}

impl HttpError {
    fn new(reason: String, is_final: bool) -> Self {
        Self { reason, is_final, is_timeout: false }
    }
}

impl From<ureq::Error> for HttpError {
    fn from(error: ureq::Error) -> Self {
        let is_timeout = matches!(error, ureq::Error::Timeout(_));
        Self { reason: error.to_string(), is_final: false, is_timeout }
    }
}

/// What a server says; which fields are there depends on what was asked.
#[derive(Debug, Default, Deserialize)]
#[serde(default, rename_all = "camelCase")]
struct Answer {
    action: String,
    node: Node,
    error_code: u32,
    message: String,
    cause: String,
    /// How far the store was when the request was taken up.
    #[serde(skip)]
    index: u64,
}

/// A key, or a directory with more of them.
#[derive(Debug, Default, Deserialize)]
#[serde(default, rename_all = "camelCase")]
struct Node {
    key: String,
    value: String,
    dir: bool,
    nodes: Vec<Node>,
    modified_index: u64,
    expiration: Option<String>,
    /// Seconds, by the clock of who answers: negative where the leader's, which decides, is behind it.
    ttl: Option<i64>,
}

impl Answer {
    /// Neither what was done nor why not.
    fn says_nothing(&self) -> bool {
        self.action.is_empty() && self.error_code == 0
    }
}

#[async_trait]
impl Dial for Http {
    type Client = Client;
    type Error = HttpError;

    async fn dial(&self, url: &str) -> Result<Client, Failure> {
        let found = self.0.credentials().await.map_err(Failure::Final)?;
        let agent = agent(&found).map_err(|error| Failure::new(url, error.to_string(), true))?;
        let basic = |(name, Secret(password)): &(String, Secret)| {
            format!("Basic {}", BASE64_STANDARD.encode(format!("{name}:{password}")))
        };
        let authorization = self.0.user.as_ref().map(basic);
        Ok(Client { agent, url: url.to_owned(), authorization })
    }

    fn failure(url: &str, error: &HttpError) -> Failure {
        Failure::new(url, error.reason.clone(), error.is_final)
    }
}

/// What speaks HTTP to an endpoint.
pub(super) fn agent(found: &Credentials) -> Result<Agent, ureq::Error> {
    let config = Agent::config_builder()
        .http_status_as_error(false)
        .timeout_connect(Some(CONNECT_TIMEOUT))
        .tls_config(tls(found)?);
    Ok(config.build().into())
}

fn tls(found: &Credentials) -> Result<TlsConfig, ureq::Error> {
    let certificates = |pem: &str| {
        let items = parse_pem(pem.as_bytes()).filter_map(|item| match item {
            Ok(PemItem::Certificate(certificate)) => Some(Ok(certificate)),
            Ok(_) => None,
            Err(error) => Some(Err(error)),
        });
        items.collect::<Result<Vec<Certificate<'static>>, _>>()
    };
    let mut tls = TlsConfig::builder().root_certs(match &found.authority {
        Some(pem) => RootCerts::new_with_certs(&certificates(pem)?),
        None => RootCerts::PlatformVerifier,
    });
    if let Some((cert, key)) = &found.client {
        let key = PrivateKey::from_pem(key.as_bytes())?;
        tls = tls.client_cert(Some(ClientCert::new_with_certs(&certificates(cert)?, key)));
    }
    Ok(tls.build())
}

impl Client {
    /// Asks for what a server always has something to say to. The answer has to begin within
    /// [`DEADLINE`].
    async fn ask(self, method: Method, path: String, time: Duration) -> Result<Answer, HttpError> {
        let times = Times { response: DEADLINE, all: time };
        match self.send(method, path, times).await? {
            // Said by something between us and etcd.
            answer if answer.says_nothing() => Err(HttpError::new("an empty answer".into(), false)),
            answer => Ok(answer),
        }
    }

    /// Waits for an event; an answer that says nothing is that there was none.
    async fn wait(self, path: String) -> Result<Answer, HttpError> {
        match self.send(Method::Get, path, Times { response: POLL, all: POLL }).await {
            Err(HttpError { is_timeout: true, .. }) => Ok(Answer::default()),
            outcome => outcome,
        }
    }

    /// Sends a request on a thread of its own, which may go on waiting when nobody listens any more.
    async fn send(self, method: Method, path: String, times: Times) -> Result<Answer, HttpError> {
        let (sender, receiver) = oneshot::channel();
        let work = move || {
            // Fails where nobody listens any more.
            let _ = sender.send(self.send_now(&method, &path, &times));
        };
        let no_thread = |error| HttpError::new(format!("cannot start a thread: {error}"), false);
        thread::Builder::new().spawn(work).map_err(no_thread)?;
        receiver
            .await
            .unwrap_or_else(|_| Err(HttpError::new("the asking thread panicked".into(), false)))
    }

    fn send_now(&self, method: &Method, path: &str, times: &Times) -> Result<Answer, HttpError> {
        let url = format!("{}/v2/keys{path}", self.url);
        let authorization = self.authorization.as_deref();
        let mut response = match method {
            Method::Get => self.prepare(self.agent.get(url), authorization, times).call(),
            Method::Delete => self.prepare(self.agent.delete(url), authorization, times).call(),
            Method::Put(form) => {
                let form = form.iter().map(|(name, value)| (*name, value.as_str()));
                self.prepare(self.agent.put(url), authorization, times).send_form(form)
            }
        }?;
        let index = response.headers().get("X-Etcd-Index").and_then(|it| it.to_str().ok());
        let index = index.and_then(|text| text.parse().ok()).unwrap_or(0);
        let status = response.status();
        let body = response.body_mut().with_config().limit(LIST_LEN_MAX);
        let text = body.read_to_string()?;
        understand(status.as_u16(), &text, index)
    }

    fn prepare<B>(
        &self,
        request: ureq::RequestBuilder<B>,
        authorization: Option<&str>,
        times: &Times,
    ) -> ureq::RequestBuilder<B> {
        let request = request
            .config()
            .timeout_global(Some(times.all))
            .timeout_recv_response(Some(times.response))
            .build();
        match authorization {
            Some(value) => request.header("Authorization", value),
            None => request,
        }
    }
}

/// Errors that an answer can be: those that no request of ours counts on.
fn understand(status: u16, text: &str, index: u64) -> Result<Answer, HttpError> {
    // etcd says with each answer how far its store is. What says nothing else is the end of a wait.
    if text.is_empty() && status == 200 && index > 0 {
        return Ok(Answer { index, ..Answer::default() });
    }
    let Ok(answer) = serde_json::from_str::<Answer>(text) else {
        let start: String = text.chars().take(80).collect();
        let start = if text.is_empty() { "an empty answer" } else { start.trim() };
        let hint = if status == 404 { " (is its v2 API switched on?)" } else { "" };
        let reason = format!("HTTP {status}: {start}{hint}");
        // No etcd, or one without this API: another endpoint may be one.
        return Err(HttpError::new(reason, false));
    };
    match answer.error_code {
        0 if status >= 400 => {
            Err(HttpError::new(format!("HTTP {status}: {}", answer.message), status < 500))
        }
        0 | KEY_NOT_FOUND | TEST_FAILED | NODE_EXIST | EVENT_INDEX_CLEARED => {
            Ok(Answer { index, ..answer })
        }
        code => {
            let reason = format!("{code}: {} ({})", answer.message, answer.cause);
            Err(HttpError::new(reason, !RAFT_ERRORS.contains(&code) && status < 500))
        }
    }
}

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
        let (path, value) = (format!("{SUBNETS}{key}"), json(attrs)?);
        let revision = self.shared.put_if("prevExist=false", &path, value, ttl).await?;
        let expires = Expiry::after(ttl);
        let lease = |revision| Lease { key: *key, attrs: attrs.clone(), expires, revision };
        Ok(revision.map(lease))
    }

    async fn renew(
        &self,
        seen: &Lease,
        attrs: &LeaseAttrs,
        ttl: Option<Duration>,
    ) -> Result<Option<Lease>, RegistryError> {
        let (path, value) = (format!("{SUBNETS}{}", seen.key), json(attrs)?);
        let same = format!("prevIndex={}", seen.revision);
        let revision = self.shared.put_if(&same, &path, value, ttl).await?;
        let expires = Expiry::after(ttl);
        let lease = |revision| Lease { key: seen.key, attrs: attrs.clone(), expires, revision };
        Ok(revision.map(lease))
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn answers_are_told_from_errors() {
        let cleared = r#"{"errorCode":401,"message":"cleared","cause":"","index":7}"#;
        assert_eq!(understand(400, cleared, 7).ok().map(|it| it.error_code), Some(401));
        assert!(understand(200, "", 7).is_ok_and(|answer| answer.says_nothing()));
        // A proxy's, in front of servers that are gone.
        for (status, index) in [(200, 0), (204, 7), (404, 0), (502, 0), (503, 7)] {
            assert!(understand(status, "", index).is_err_and(|error| !error.is_final), "{status}");
        }
        let error = |status, text: &str| {
            let error = understand(status, text, 0).err().unwrap();
            (error.reason, error.is_final)
        };
        let election = r#"{"errorCode":301,"message":"During Leader Election","cause":"x"}"#;
        assert_eq!(error(500, election), ("301: During Leader Election (x)".into(), false));
        let refused = r#"{"errorCode":110,"message":"no","cause":"user"}"#;
        assert!(error(401, refused).1);
        let (reason, is_final) = error(401, r#"{"message":"Insufficient credentials"}"#);
        assert_eq!((reason.as_str(), is_final), ("HTTP 401: Insufficient credentials", true));
        let (reason, is_final) = error(404, "404 page not found\n");
        assert!(reason.contains("v2 API") && !is_final, "{reason}");
        assert!(!error(503, "<html>").1);
    }
}
