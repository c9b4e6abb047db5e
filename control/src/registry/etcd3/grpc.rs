//! Connections to etcd, and what their errors mean.

use std::error::Error as _;
use std::time::Duration;

use async_trait::async_trait;
use etcd_client::{Certificate, Client, ConnectOptions, Error, Identity, TlsOptions};
use tonic::Code;

use super::super::RegistryError;
use super::super::access::{Access, Secret};
use super::super::endpoints::{CONNECT_TIMEOUT, DEADLINE, Dial, Failure, LIST_DEADLINE};

/// A connection whose server says nothing for so long, and then does not answer a ping, is dead. etcd
/// closes one that is pinged more often than each 5 s (its --grpc-keepalive-min-time).
const PING_INTERVAL: Duration = Duration::from_secs(6);
const PING_TIMEOUT: Duration = Duration::from_secs(3);
/// A server that hangs is noticed soon.
const _: () = assert!(PING_INTERVAL.as_secs() + PING_TIMEOUT.as_secs() < 10);

/// Connects to endpoints by gRPC.
pub(super) struct Grpc(pub(super) Access);

#[async_trait]
impl Dial for Grpc {
    type Client = Client;
    type Error = Error;

    async fn dial(&self, url: &str) -> Result<Client, Failure> {
        let mut options = ConnectOptions::new()
            .with_connect_timeout(CONNECT_TIMEOUT)
            .with_keep_alive(PING_INTERVAL, PING_TIMEOUT)
            // etcd closes idle connections that are pinged; a watch, or a request, is none.
            .with_keep_alive_while_idle(false)
            .with_require_leader(true)
            .with_auto_token_refresh(true);
        if url.starts_with("https://") {
            options = options.with_tls(self.tls().await.map_err(Failure::Final)?);
        }
        let mut made = match self.0.login().await.map_err(Failure::Final)? {
            Some((name, Secret(password))) => {
                let options = options.clone().with_user(name, password);
                Client::connect([url], Some(options)).await
            }
            None => Client::connect([url], Some(options.clone())).await,
        };
        if made.as_ref().is_err_and(asks_for_no_user) {
            made = Client::connect([url], Some(options)).await;
        }
        made.map_err(|error| Self::failure(url, &error))
    }

    /// To log in costs etcd some 75 ms of a core (bcrypt), and a fleet does so all at once when it is back.
    /// Who asks again before the answer has come makes etcd begin anew. That a server hangs is noticed by
    /// its pings.
    fn deadline(&self) -> Duration {
        if self.0.user.is_some() { LIST_DEADLINE } else { DEADLINE }
    }

    /// One login a node is enough.
    fn head_start(&self) -> Duration {
        if self.0.user.is_some() { DEADLINE } else { Duration::ZERO }
    }

    fn failure(url: &str, error: &Error) -> Failure {
        Failure::new(url, reason(error), is_final(error))
    }
}

impl Grpc {
    async fn tls(&self) -> Result<TlsOptions, RegistryError> {
        let found = self.0.credentials().await?;
        // No ping finds out that a server hangs before it has shown its certificate.
        let tls = TlsOptions::new().timeout(CONNECT_TIMEOUT);
        let mut tls = match found.authority {
            Some(pem) => tls.ca_certificate(Certificate::from_pem(pem)),
            None => tls.with_native_roots(),
        };
        if let Some((cert, key)) = found.client {
            tls = tls.identity(Identity::from_pem(cert, key));
        }
        Ok(tls)
    }
}

/// Whether etcd's authentication is switched off (ErrGRPCAuthNotEnabled): then anybody may do anything.
fn asks_for_no_user(error: &Error) -> bool {
    matches!(error, Error::GRpcStatus(status) if status.code() == Code::FailedPrecondition
        && status.message().contains("authentication is not enabled"))
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
