//! Where leases are kept.

pub mod directory;
mod notices;
mod store;

use std::io;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use ipnetwork::IpNetwork;
use tokio::sync::watch;

use crate::config::ConfigError;
use crate::lease::{Lease, LeaseAttrs, LeaseKey, NodeRecord, Snapshot};

/// A registry. Every write is conditional on what the writer saw: a lease is never taken from
/// somebody by accident.
pub trait Registry: Send + Sync + 'static {
    /// Which one it is, as the flag names it. Not a secret.
    fn describe(&self) -> String;

    /// The network config's text, if there is one.
    fn config(&self) -> impl Future<Output = Result<Option<String>, RegistryError>> + Send;

    /// Everything at this moment.
    fn leases(&self) -> impl Future<Output = Result<Snapshot, RegistryError>> + Send;

    /// Creates a lease that lives for `ttl`; `None` if somebody has the key already.
    fn create(
        &self,
        key: &LeaseKey,
        attrs: &LeaseAttrs,
        ttl: Duration,
    ) -> impl Future<Output = Result<Option<Lease>, RegistryError>> + Send;

    /// Writes our attributes to a lease that is still the one we saw, and lets it live for `ttl`
    /// from now, unless it is a reservation. `None` if it is not that lease any more.
    fn renew(
        &self,
        seen: &Lease,
        attrs: &LeaseAttrs,
        ttl: Duration,
    ) -> impl Future<Output = Result<Option<Lease>, RegistryError>> + Send;

    /// Removes a lease that is still the one we saw, and says whether it was.
    fn remove(&self, seen: &Lease) -> impl Future<Output = Result<bool, RegistryError>> + Send;

    /// Writes this node's record, which lives for `ttl`.
    fn publish_node(
        &self,
        node: &NodeRecord,
        ttl: Duration,
    ) -> impl Future<Output = Result<(), RegistryError>> + Send;

    /// Keeps the newest snapshot at hand: the receiver changes when the registry does, also by
    /// leases that expire. While the registry cannot be read the last snapshot stays. Ends when
    /// every receiver is dropped.
    fn watch(
        &self,
    ) -> impl Future<Output = Result<watch::Receiver<Arc<Snapshot>>, RegistryError>> + Send;
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
}
