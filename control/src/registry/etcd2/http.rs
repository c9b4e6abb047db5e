//! Asking etcd's v2 API by HTTP, and what its answers mean.

use std::thread;
use std::time::Duration;

use async_trait::async_trait;
use base64::Engine as _;
use base64::prelude::BASE64_STANDARD;
use serde::Deserialize;
use tokio::sync::oneshot;
use ureq::Agent;
use ureq::tls::{Certificate, ClientCert, PemItem, PrivateKey, RootCerts, TlsConfig, parse_pem};

use super::super::access::{Access, Credentials, Secret};
use super::super::endpoints::{CONNECT_TIMEOUT, DEADLINE, Dial, Failure};

/// Bytes of a list at most.
const LIST_LEN_MAX: u64 = 128 << 20;
/// How long one wait for an event lasts; the answer may then take as long as any. etcd remembers the last
/// 1000 changes, and a fleet refreshes the records of a twentieth of its nodes each second.
pub(super) const POLL: Duration = Duration::from_secs(15);

/// etcd's error codes (etcd v2 errorcode.md).
const KEY_NOT_FOUND: u32 = 100;
const TEST_FAILED: u32 = 101;
const NODE_EXIST: u32 = 105;
pub(super) const EVENT_INDEX_CLEARED: u32 = 401;
/// Raft's own troubles, such as an election: another member may do better.
const RAFT_ERRORS: std::ops::Range<u32> = 300..400;

/// Connects to endpoints by HTTP.
pub(super) struct Http(pub(super) Access);

/// A client of one endpoint.
#[derive(Clone)]
pub(super) struct Client {
    agent: Agent,
    url: String,
    authorization: Option<String>,
}

/// What is asked for.
#[derive(Clone)]
pub(super) enum Method {
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
pub(super) struct HttpError {
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
pub(super) struct Answer {
    pub(super) action: String,
    pub(super) node: Node,
    pub(super) error_code: u32,
    pub(super) message: String,
    pub(super) cause: String,
    /// How far the store was when the request was taken up.
    #[serde(skip)]
    pub(super) index: u64,
}

/// A key, or a directory with more of them.
#[derive(Debug, Default, Deserialize)]
#[serde(default, rename_all = "camelCase")]
pub(super) struct Node {
    pub(super) key: String,
    pub(super) value: String,
    pub(super) dir: bool,
    pub(super) nodes: Vec<Node>,
    pub(super) modified_index: u64,
    pub(super) expiration: Option<String>,
    /// Seconds, by the clock of who answers: negative where the leader's, which decides, is behind it.
    pub(super) ttl: Option<i64>,
}

impl Answer {
    /// Neither what was done nor why not.
    pub(super) fn says_nothing(&self) -> bool {
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
        let basic = |(name, Secret(password))| {
            format!("Basic {}", BASE64_STANDARD.encode(format!("{name}:{password}")))
        };
        let authorization = self.0.login().await.map_err(Failure::Final)?.map(basic);
        Ok(Client { agent, url: url.to_owned(), authorization })
    }

    fn failure(url: &str, error: &HttpError) -> Failure {
        Failure::new(url, error.reason.clone(), error.is_final)
    }
}

/// What speaks HTTP to an endpoint.
pub(in crate::registry) fn agent(found: &Credentials) -> Result<Agent, ureq::Error> {
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
    pub(super) async fn ask(
        self,
        method: Method,
        path: String,
        time: Duration,
    ) -> Result<Answer, HttpError> {
        let times = Times { response: DEADLINE, all: time };
        match self.send(method, path, times).await? {
            // Said by something between us and etcd.
            answer if answer.says_nothing() => Err(HttpError::new("an empty answer".into(), false)),
            answer => Ok(answer),
        }
    }

    /// Waits for an event; an answer that says nothing is that there was none.
    pub(super) async fn wait(self, path: String) -> Result<Answer, HttpError> {
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
        let mut response = match method {
            Method::Get => self.prepare(self.agent.get(url), times).call(),
            Method::Delete => self.prepare(self.agent.delete(url), times).call(),
            Method::Put(form) => {
                let form = form.iter().map(|(name, value)| (*name, value.as_str()));
                self.prepare(self.agent.put(url), times).send_form(form)
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
        times: &Times,
    ) -> ureq::RequestBuilder<B> {
        let request = request
            .config()
            .timeout_global(Some(times.all))
            .timeout_recv_response(Some(times.response))
            .build();
        match self.authorization.as_deref() {
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
