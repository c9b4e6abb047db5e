//! Getting a lease anew while the loop goes on under the one that is lost.

use std::pin::Pin;

use weft_control::{Lease, NetworkConfig};

use super::Forwarding;
use super::turn::Turn;
use crate::leasing::Claim;

/// A claim that takes as long as it takes.
pub(super) struct Claiming<'a> {
    config: NetworkConfig,
    lease: Pin<Box<dyn Future<Output = Lease> + Send + 'a>>,
}

impl<'a> Claiming<'a> {
    /// Asks for the subnets that were ours.
    pub(super) fn begin(forwarding: &Forwarding<'a>, turn: &Turn) -> Self {
        let Forwarding { settings, registry, health, board, .. } = *forwarding;
        let (config, identity) = (turn.tenure.config.clone(), turn.identity.clone());
        let previous = turn.tenure.lease.key;
        let lease = Box::pin(async move {
            let (config, identity, ttl) = (&config, &identity, settings.lease_ttl);
            Claim { config, identity, ttl, health, board }.acquire(registry, &previous).await.0
        });
        Self { config: turn.tenure.config.clone(), lease }
    }

    /// Whether this is the network config that it goes by.
    pub(super) fn goes_by(&self, config: &NetworkConfig) -> bool {
        self.config == *config
    }

    /// The lease once it is there. Cancel safe.
    pub(super) async fn lease(&mut self) -> Lease {
        self.lease.as_mut().await
    }
}
