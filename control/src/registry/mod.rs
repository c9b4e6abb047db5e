//! Where leases are kept.

pub mod access;
pub mod directory;
mod endpoints;
mod entries;
pub mod etcd2;
pub mod etcd3;
mod files;
mod notices;
pub mod server;
mod store;
mod watching;

use std::io;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use ipnetwork::IpNetwork;
use tokio::sync::watch;

use crate::config::{ConfigError, NetworkConfig};
use crate::lease::{Lease, LeaseAttrs, LeaseKey, NodeRecord, Snapshot};

/// A registry. Every write is conditional on what the writer saw: a lease is never taken from
/// somebody by accident.
#[async_trait]
pub trait Registry: Send + Sync + 'static {
    /// Which one it is, for whoever reads the log. Not a secret.
    fn describe(&self) -> String;

    /// What tells it from others on this host, and stays when servers come and go.
    fn identity(&self) -> String;

    /// Everything at this moment.
    async fn snapshot(&self) -> Result<Snapshot, RegistryError>;

    /// The text of the network config, if there is one: of a large fleet a small part.
    async fn config(&self) -> Result<Option<String>, RegistryError> {
        Ok(self.snapshot().await?.config)
    }

    /// Writes a network config unless there is one, and says whether it did.
    async fn init_config(&self, text: &str) -> Result<bool, RegistryError>;

    /// Creates a lease that lives for `ttl`, or a reservation if there is none; `None` if somebody has
    /// the key already, or has part of it in a registry that does not number its entries.
    async fn create(
        &self,
        key: &LeaseKey,
        attrs: &LeaseAttrs,
        ttl: Option<Duration>,
    ) -> Result<Option<Lease>, RegistryError>;

    /// Writes attributes to a lease that is still the one we saw, and lets it live for `ttl` from
    /// now, or makes it a reservation if there is none. `None` if it is not that lease any more.
    async fn renew(
        &self,
        seen: &Lease,
        attrs: &LeaseAttrs,
        ttl: Option<Duration>,
    ) -> Result<Option<Lease>, RegistryError>;

    /// Removes a lease that is still the one we saw, and says whether it was.
    async fn remove(&self, seen: &Lease) -> Result<bool, RegistryError>;

    /// How long a lease has still to live; `None` if for ever, or if it is gone.
    async fn time_left(&self, lease: &Lease) -> Result<Option<Duration>, RegistryError>;

    /// Makes sure that this node's record is there, and lives for `ttl` from now.
    async fn publish_node(&self, node: &NodeRecord, ttl: Duration) -> Result<(), RegistryError>;

    /// Does not go on with connections that were made before: this host's address has changed, and
    /// answers may not find back to the old one.
    fn reconnect(&self) {}

    /// Keeps the newest view at hand, beginning with `last`: the receiver changes when the registry
    /// does, also by leases that expire, and when it can be read no more, or again. Ends when every
    /// receiver is dropped.
    fn watch(&self, last: Snapshot) -> watch::Receiver<View>;
}

/// What is known of a registry.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct View {
    /// As it was when it could last be read.
    pub snapshot: Arc<Snapshot>,
    /// Whether that is now. While it is not, nothing is known to have expired.
    pub readable: bool,
}

impl View {
    /// Tells those who follow what the registry has now, if that is news.
    fn publish(sender: &watch::Sender<Self>, snapshot: Snapshot) {
        sender.send_if_modified(|view| {
            let changed = !view.readable || *view.snapshot != snapshot;
            if changed {
                *view = Self { snapshot: Arc::new(snapshot), readable: true };
            }
            changed
        });
    }
}

/// The text of the config that `--network` stands for.
///
/// # Errors
/// No overlay can be made of the network.
pub fn minimal_config(network: IpNetwork) -> Result<String, RegistryError> {
    let config = match network {
        IpNetwork::V4(net) => serde_json::json!({ "Network": net }),
        IpNetwork::V6(net) => serde_json::json!({
            "EnableIPv4": false, "EnableIPv6": true, "IPv6Network": net
        }),
    };
    let text = config.to_string();
    text.parse::<NetworkConfig>().map_err(|reason| RegistryError::Network { network, reason })?;
    Ok(text)
}

/// What a registry refused.
#[derive(Debug, thiserror::Error)]
pub enum RegistryError {
    #[error("cannot {action} {}: {source}", path.display())]
    File { action: &'static str, path: PathBuf, source: io::Error },
    #[error(
        "{} lies on {kind}, where locks and change notices between hosts cannot be relied on; a \
         directory registry serves the daemons of one host, from a local file system",
        path.display()
    )]
    NotLocal { path: PathBuf, kind: &'static str },
    #[error("{network} cannot be the overlay's network: {reason}")]
    Network { network: IpNetwork, reason: ConfigError },
    #[error("cannot read the lease in {}: {reason}; correct the file or remove it", path.display())]
    Unreadable { path: PathBuf, reason: String },
    #[error("the registry's work was cut short: {0}")]
    Task(String),
    /// No server answers, or none of them can.
    #[error("{0}")]
    Away(String),
    /// Nothing was asked: no server answered a moment ago, and whoever watches looks for one.
    #[error("nobody answers just now")]
    NotAsked,
    /// A server answered with no.
    #[error("{endpoint} refuses: {reason}")]
    Refused { endpoint: String, reason: String },
    #[error("cannot read {}, which --etcd-{flag} names: {source}", path.display())]
    Credentials { flag: &'static str, path: PathBuf, source: io::Error },
    #[error(
        "the certificate {} (--etcd-certfile) and the key {} (--etcd-keyfile) cannot be used together: \
         {reason}", cert.display(), key.display()
    )]
    ClientCertificate { cert: PathBuf, key: PathBuf, reason: String },
}
