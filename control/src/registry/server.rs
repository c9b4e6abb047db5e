//! What each server of etcd says of itself. All versions answer this by HTTP, whichever API the
//! leases are kept by.

use jiff::Timestamp;
use jiff::fmt::rfc2822;
use serde::Deserialize;

use super::access::Access;
use super::endpoints::DEADLINE;
use super::etcd2::agent;

/// A server that answers.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Server {
    /// As in "3.5.1".
    pub version: String,
    /// Its clock when it answered, to the second.
    pub clock: Option<Timestamp>,
    /// Our clock then.
    pub asked: Timestamp,
}

#[derive(Deserialize)]
struct Version {
    etcdserver: String,
}

/// Asks each endpoint; the reason where one does not answer.
pub async fn servers(access: &Access) -> Vec<(String, Result<Server, String>)> {
    let asked = access.urls().map(|url| async move {
        let answer = ask(access, &url).await;
        (url, answer)
    });
    futures_util::future::join_all(asked).await
}

async fn ask(access: &Access, url: &str) -> Result<Server, String> {
    let found = access.credentials().await.map_err(|error| error.to_string())?;
    let agent = agent(&found).map_err(|error| error.to_string())?;
    let url = format!("{url}/version");
    let asking = tokio::task::spawn_blocking(move || {
        let request = agent.get(url).config().timeout_global(Some(DEADLINE)).build();
        let mut response = request.call().map_err(|error| error.to_string())?;
        let clock = response.headers().get("Date").and_then(|date| date.to_str().ok());
        let clock =
            clock.and_then(|date| rfc2822::DateTimeParser::new().parse_timestamp(date).ok());
        let text = response.body_mut().read_to_string().map_err(|error| error.to_string())?;
        let asked = Timestamp::now();
        let Ok(Version { etcdserver: version }) = serde_json::from_str(&text) else {
            return Err(format!("HTTP {}: not an etcd", response.status().as_u16()));
        };
        Ok(Server { version, clock, asked })
    });
    asking.await.unwrap_or_else(|error| Err(error.to_string()))
}
