//! What the registry is told of us: this node's record, and its lease.

use std::net::IpAddr;
use std::time::Duration;

use tokio::time::{Instant, timeout};
use weft_control::keeper;
use weft_control::lease::{Expiry, NodeRecord};
use weft_control::{Lease, RegistryError};

use super::Forwarding;
use super::turn::Turn;
use crate::node;
use crate::probe::Prober;

/// Node records live three times as long as from one to the next, so two may get lost.
const NODE_TTL: Duration = Duration::from_secs(60);
/// How long the loop stands still for the registry.
const ANSWER_LIMIT: Duration = Duration::from_secs(60);
/// Between tries to tell the registry that our address or MAC is another: peers send to the old one.
const MOVED_RETRY: Duration = Duration::from_secs(1);

impl Forwarding<'_> {
    /// Publishes this node's record.
    pub(super) async fn publish_node(&self, turn: &mut Turn) {
        let interface = &turn.interface;
        let attrs = &turn.identity.attrs;
        let publics: Vec<IpAddr> = attrs.public_addresses().collect();
        let addresses = interface.addresses().chain(interface.other_addresses.iter().copied());
        let record = NodeRecord {
            id: self.place.node.id.clone(),
            name: node::host_name(),
            public_ip: attrs.public_ip,
            public_ipv6: attrs.public_ipv6,
            addresses: addresses.filter(|ip| !publics.contains(ip)).collect(),
            version: env!("CARGO_PKG_VERSION").into(),
            mtu: self.started.mtu,
            probe_port: turn.prober.as_ref().map(Prober::port),
        };
        turn.published = Some(Instant::now());
        let published = in_time(self.registry.publish_node(&record, NODE_TTL)).await;
        if turn.records.note("publish this node's record", &published) {
            turn.slow.reset_immediately();
        }
        if published.is_ok() {
            self.board.registry(true);
        }
    }

    /// Writes the lease anew, with what we are now, and says whether it did.
    pub(super) async fn renew(&self, turn: &mut Turn) -> bool {
        let ttl = keeper::ttl(&turn.tenure.lease, self.settings.lease_ttl);
        let renewed =
            in_time(self.registry.renew(&turn.tenure.lease, &turn.identity.attrs, ttl)).await;
        if turn.renewals.note("renew the lease", &renewed) {
            turn.slow.reset_immediately();
        }
        // What was not asked costs nothing to try again.
        let is_asked = !matches!(renewed, Err(RegistryError::NotAsked));
        if matches!(renewed, Ok(None)) {
            tracing::warn!(subnet = %turn.tenure.lease.key, "the lease to renew is not ours any more");
        }
        let renewed = renewed.ok().flatten();
        let is_renewed = renewed.is_some();
        if let Some(lease) = renewed {
            tracing::info!(subnet = %lease.key, expires = expiry(&lease), "renewed the lease");
            turn.hold(lease, self.settings.renew_margin);
            self.board.lease(&turn.tenure.lease, turn.tenure.renewal);
        }
        let is_told = turn.tenure.lease.attrs == turn.identity.attrs;
        let pause = if is_told && is_asked { self.settings.renew_retry } else { MOVED_RETRY };
        turn.renew_not_before = Instant::now() + pause;
        is_renewed
    }
}

/// What the registry answers, unless that takes longer than anybody waits.
pub(crate) async fn in_time<T>(
    asked: impl Future<Output = Result<T, RegistryError>>,
) -> Result<T, RegistryError> {
    let late = |_| Err(RegistryError::Away(format!("no answer within {ANSWER_LIMIT:?}")));
    timeout(ANSWER_LIMIT, asked).await.unwrap_or_else(late)
}

/// When a lease ends, for whoever reads the log.
pub(crate) fn expiry(lease: &Lease) -> String {
    match lease.expires {
        Expiry::Never => "never (a reservation)".into(),
        Expiry::At(end) => end.to_string(),
        Expiry::Unknown => "unknown".into(),
    }
}
