//! etcd's endpoints: one client each. Requests go to the one that last worked; where it fails, they
//! go on to the next and stay there.
//!
//! etcd-client's own balancer goes on sending to endpoints that are dead.

use std::error::Error as _;
use std::fmt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use etcd_client::{Certificate, Client, ConnectOptions, Error, Identity, TlsOptions};
use futures_util::FutureExt;
use futures_util::future::select_ok;
use tokio::sync::Mutex;
use tokio::time::timeout;
use tonic::Code;

use super::RegistryError;

const CONNECT_TIMEOUT: Duration = Duration::from_secs(2);
/// How long a request may take. Servers under load take seconds.
const DEADLINE: Duration = Duration::from_secs(5);
/// A connection whose server says nothing for so long, and then does not answer a ping, is dead.
const PING_INTERVAL: Duration = Duration::from_secs(3);
const PING_TIMEOUT: Duration = Duration::from_secs(2);

/// How to reach etcd, as the flags say it.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Access {
    /// URLs; without a scheme they are http, or https where a file below is given.
    pub endpoints: Vec<String>,
    /// What the servers' certificates are checked against; else the system's authorities.
    pub ca_file: Option<PathBuf>,
    /// The client's certificate and its key.
    pub cert_file: Option<PathBuf>,
    pub key_file: Option<PathBuf>,
    /// Name and password.
    pub user: Option<(String, Secret)>,
}

/// A password that stays out of logs.
#[derive(Clone, PartialEq, Eq)]
pub struct Secret(pub String);

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Secret(..)")
    }
}

impl From<String> for Secret {
    fn from(text: String) -> Self {
        Self(text)
    }
}

impl Access {
    fn url(&self, endpoint: &str) -> String {
        let wants_tls = self.ca_file.is_some() || self.cert_file.is_some();
        match endpoint {
            url if url.contains("://") => url.to_owned(),
            host if wants_tls => format!("https://{host}"),
            host => format!("http://{host}"),
        }
    }

    /// Files are read for each connection, so that certificates may be renewed.
    async fn options(&self, url: &str) -> Result<ConnectOptions, RegistryError> {
        let mut options = ConnectOptions::new()
            .with_connect_timeout(CONNECT_TIMEOUT)
            .with_keep_alive(PING_INTERVAL, PING_TIMEOUT)
            .with_keep_alive_while_idle(true)
            .with_require_leader(true)
            .with_auto_token_refresh(true);
        if let Some((name, Secret(password))) = &self.user {
            options = options.with_user(name, password);
        }
        if url.starts_with("https://") {
            options = options.with_tls(self.tls().await?);
        }
        Ok(options)
    }

    async fn tls(&self) -> Result<TlsOptions, RegistryError> {
        let mut tls = TlsOptions::new();
        tls = match &self.ca_file {
            Some(path) => tls.ca_certificate(Certificate::from_pem(read("cafile", path).await?)),
            None => tls.with_native_roots(),
        };
        if let (Some(cert), Some(key)) = (&self.cert_file, &self.key_file) {
            let (cert, key) = (read("certfile", cert).await?, read("keyfile", key).await?);
            tls = tls.identity(Identity::from_pem(cert, key));
        }
        Ok(tls)
    }
}

async fn read(flag: &'static str, path: &Path) -> Result<String, RegistryError> {
    let owned = path.to_owned();
    let text = tokio::task::spawn_blocking(move || std::fs::read_to_string(owned)).await;
    text.map_err(|error| RegistryError::Task(error.to_string()))?
        .map_err(|source| RegistryError::Credentials { flag, path: path.to_owned(), source })
}

/// All endpoints.
#[derive(Debug)]
pub(super) struct Endpoints {
    access: Access,
    all: Vec<Endpoint>,
    /// The one that last worked.
    current: AtomicUsize,
}

struct Endpoint {
    url: String,
    /// Made at the first request, and anew after a failure.
    client: Mutex<Option<Client>>,
}

impl fmt::Debug for Endpoint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Endpoint").field("url", &self.url).finish_non_exhaustive()
    }
}

/// Why a request brought nothing.
enum Failure {
    /// Another endpoint may do better.
    Endpoint(String),
    /// Any endpoint would say this.
    Final(RegistryError),
}

impl Endpoints {
    pub(super) fn new(access: Access) -> Self {
        let endpoint =
            |text: &String| Endpoint { url: access.url(text.trim()), client: Mutex::default() };
        let all = access.endpoints.iter().map(endpoint).collect();
        Self { access, all, current: AtomicUsize::new(0) }
    }

    /// All of them, for whoever reads the log.
    pub(super) fn describe(&self) -> String {
        let urls: Vec<&str> = self.all.iter().map(|endpoint| endpoint.url.as_str()).collect();
        urls.join(",")
    }

    /// Sends a request that may be sent more than once: to the endpoint that last worked, then to
    /// each of the others.
    ///
    /// # Errors
    /// No endpoint has answered, or one has refused.
    pub(super) async fn ask<T: Send, F>(
        &self,
        request: impl Fn(Client) -> F + Send + Sync,
    ) -> Result<T, RegistryError>
    where
        F: Future<Output = Result<T, Error>> + Send,
    {
        let first = self.current.load(Ordering::Relaxed);
        let mut reasons = Vec::new();
        for turn in 0..self.all.len() {
            let at = (first + turn) % self.all.len();
            match self.ask_one(at, &request).await {
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

    /// Sends a small request to all at once, and stays with the first that answers.
    ///
    /// # Errors
    /// None has; the reasons are those of [`Endpoints::ask`].
    pub(super) async fn probe<T: Send, F>(
        &self,
        request: impl Fn(Client) -> F + Send + Sync,
    ) -> Result<(), RegistryError>
    where
        F: Future<Output = Result<T, Error>> + Send,
    {
        let one = |at| {
            let asked = self.ask_one(at, &request);
            asked.map(move |answer| answer.map(|_| at)).boxed()
        };
        match select_ok((0..self.all.len()).map(one)).await {
            Ok((at, _)) => {
                self.current.store(at, Ordering::Relaxed);
                Ok(())
            }
            Err(Failure::Endpoint(reason)) => Err(RegistryError::Away(reason)),
            Err(Failure::Final(error)) => Err(error),
        }
    }

    async fn ask_one<T: Send, F>(
        &self,
        at: usize,
        request: impl Fn(Client) -> F + Send + Sync,
    ) -> Result<T, Failure>
    where
        F: Future<Output = Result<T, Error>> + Send,
    {
        let endpoint = &self.all[at];
        let answer = timeout(DEADLINE, async {
            let client = endpoint.client(&self.access).await?;
            request(client).await.map_err(|error| endpoint.failure(&error))
        });
        let late = || Failure::Endpoint(format!("{}: no answer in time", endpoint.url));
        let answer = answer.await.unwrap_or_else(|_| Err(late()));
        if answer.is_err() {
            endpoint.forget().await;
        }
        answer
    }
}

impl Endpoint {
    async fn client(&self, access: &Access) -> Result<Client, Failure> {
        let mut client = self.client.lock().await;
        if let Some(client) = &*client {
            return Ok(client.clone());
        }
        let options = access.options(&self.url).await.map_err(Failure::Final)?;
        let made = Client::connect([&self.url], Some(options)).await;
        let made = made.map_err(|error| self.failure(&error))?;
        Ok(client.insert(made).clone())
    }

    /// The next request connects anew. Where one waits for a connection just now, it is new.
    async fn forget(&self) {
        if let Ok(mut client) = timeout(Duration::ZERO, self.client.lock()).await {
            *client = None;
        }
    }

    fn failure(&self, error: &Error) -> Failure {
        let reason = reason(error);
        if is_final(error) {
            Failure::Final(RegistryError::Refused { endpoint: self.url.clone(), reason })
        } else {
            Failure::Endpoint(format!("{}: {reason}", self.url))
        }
    }
}

/// Whether the request or its sender is at fault, not the server.
fn is_final(error: &Error) -> bool {
    if let Error::GRpcStatus(status) = error {
        return matches!(
            status.code(),
            Code::InvalidArgument
                | Code::PermissionDenied
                | Code::Unauthenticated
                | Code::FailedPrecondition
        );
    }
    matches!(error, Error::InvalidArgs(_) | Error::InvalidUri(_))
}

/// What went wrong, down to its cause, which the error's own text leaves out.
pub(super) fn reason(error: &Error) -> String {
    let mut text = error.to_string();
    let mut cause = None;
    if let Error::GRpcStatus(status) = error {
        status.message().clone_into(&mut text);
        cause = status.source();
    } else if let Error::TransportError(error) = error {
        cause = error.source();
    }
    while let Some(error) = cause {
        let more = error.to_string();
        if !text.contains(&more) {
            text = format!("{text}: {more}");
        }
        cause = error.source();
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn endpoints_without_a_scheme_have_one() {
        let plain = Access::default();
        assert_eq!(plain.url("192.0.2.1:2379"), "http://192.0.2.1:2379");
        assert_eq!(plain.url("https://etcd:2379"), "https://etcd:2379");
        let tls = Access { ca_file: Some("/ca".into()), ..Access::default() };
        assert_eq!(tls.url("192.0.2.1:2379"), "https://192.0.2.1:2379");
    }

    #[test]
    fn a_secret_is_not_printed() {
        let access =
            Access { user: Some(("root".into(), Secret("hunter2".into()))), ..Access::default() };
        assert!(!format!("{access:?}").contains("hunter2"));
    }
}
