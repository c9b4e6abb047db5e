//! Getting and keeping this node's lease: carries out what `weft_control::keeper` plans.

use std::time::Duration;

use weft_control::keeper::{self, Identity, Plan};
use weft_control::lease::{NodeRecord, Snapshot};
use weft_control::{Backoff, Lease, LeaseKey, NetworkConfig, Registry, RegistryError};

use crate::board::Board;
use crate::health::Health;
use crate::node::host_name;
use crate::repeats::Repeats;

/// Rounds of losing a race for a subnet before the daemon takes a breath.
const RACES_MAX: u32 = 10;

/// What a claim is made with.
#[derive(Debug)]
pub(crate) struct Claim<'a> {
    pub(crate) config: &'a NetworkConfig,
    pub(crate) identity: &'a Identity,
    /// How long the lease lasts without renewal.
    pub(crate) ttl: Duration,
    /// Who is told of what keeps us from a lease.
    pub(crate) health: &'a Health,
    /// Where it is written down whether the registry can be read.
    pub(crate) board: &'a Board,
}

impl Claim<'_> {
    /// Claims a subnet, however long it takes: a registry that is away, or full, is waited for, and
    /// so is another node that lives with our address. With it comes what else the registry has.
    pub(crate) async fn acquire(
        &self,
        registry: &dyn Registry,
        previous: &LeaseKey,
    ) -> (Lease, Snapshot) {
        let mut backoff = Backoff::default();
        let mut said = Repeats::told_to(self.health);
        loop {
            match self.attempt(registry, previous).await {
                Ok(Attempt::Ours(ours)) => return *ours,
                Ok(Attempt::Again) => said.warn(
                    "cannot get a lease yet: each time it is tried, the registry changes meanwhile",
                ),
                Ok(Attempt::Unreadable(why)) => said.error(&why),
                Ok(Attempt::Full) => said.warn(
                    "out of subnets: every subnet between SubnetMin and SubnetMax is leased; \
                     remove leases of nodes that are gone, or widen the range in the network config",
                ),
                Ok(Attempt::Claimed(other)) => {
                    let is_namesake = other.name == host_name();
                    let perhaps_us = if is_namesake {
                        " (if that was this host, its --state-dir was lost: keep that over restarts, \
                         as by a volume)"
                    } else {
                        ""
                    };
                    said.error(&format!(
                        "the node {} (id {}) lives with our public address; two nodes cannot share \
                         one: give either a --public-ip of its own{perhaps_us}; waiting until that \
                         node is gone",
                        other.name, other.id
                    ));
                }
                Err(error) => said.warn(&format!("cannot get a lease yet: {error}")),
            }
            backoff.wait().await;
        }
    }

    /// Not beyond what keeps it from a lease now.
    async fn attempt(
        &self,
        registry: &dyn Registry,
        previous: &LeaseKey,
    ) -> Result<Attempt, RegistryError> {
        let mut rng = fastrand::Rng::new();
        for _ in 0..RACES_MAX {
            let outcome = self.race(registry, previous, &mut rng).await?;
            if !matches!(outcome, Attempt::Again) {
                return Ok(outcome);
            }
        }
        Ok(Attempt::Again)
    }

    async fn race(
        &self,
        registry: &dyn Registry,
        previous: &LeaseKey,
        rng: &mut fastrand::Rng,
    ) -> Result<Attempt, RegistryError> {
        let Self { config, identity, .. } = *self;
        let snapshot = registry.snapshot().await;
        self.board.registry(snapshot.is_ok());
        let snapshot = snapshot?;
        if let Some(other) = keeper::claimant(identity, &snapshot.nodes) {
            return Ok(Attempt::Claimed(Box::new(other.clone())));
        }
        let unreadable: Vec<LeaseKey> = snapshot.unreadable().map(|(key, _)| key).collect();
        let plan = keeper::plan(config, identity, previous, &snapshot.leases, &unreadable, rng);
        self.carry_out(plan, registry, snapshot).await
    }

    async fn carry_out(
        &self,
        plan: Plan,
        registry: &dyn Registry,
        snapshot: Snapshot,
    ) -> Result<Attempt, RegistryError> {
        let lease = match plan {
            Plan::Reuse(seen) => {
                tracing::info!(subnet = %seen.key, "taking up the lease that is ours");
                registry.renew(&seen, &self.identity.attrs, keeper::ttl(&seen, self.ttl)).await?
            }
            Plan::Create(key) => self.create(registry, &key).await?,
            Plan::Remove(seen) => {
                let why = if !keeper::is_compatible(self.config, &seen.key) {
                    "the network config does not allow it any more"
                } else if keeper::came_second(self.config, &seen, &snapshot.leases) {
                    "another node had part of it before"
                } else {
                    "another one is reserved for us"
                };
                tracing::warn!(subnet = %seen.key, "giving up the lease that is ours: {why}");
                registry.remove(&seen).await?;
                None
            }
            Plan::Unreadable(key) => {
                let why = snapshot.unreadable().find(|(it, _)| *it == key);
                let why = why.map_or_else(String::new, |(_, it)| format!(" ({})", it.reason));
                return Ok(Attempt::Unreadable(format!(
                    "our subnet's lease {key} cannot be read{why}; correct or delete that entry of \
                     the registry; until then we have no lease, and peers no way to us"
                )));
            }
            Plan::OutOfSubnets => return Ok(Attempt::Full),
        };
        let Some(lease) = lease else { return Ok(Attempt::Again) };
        self.tell_set_aside(&lease, &snapshot);
        Ok(Attempt::Ours(Box::new((lease.clone(), snapshot.with(lease)))))
    }

    fn tell_set_aside(&self, ours: &Lease, before: &Snapshot) {
        for reserved in keeper::set_aside(self.config, self.identity, &before.leases) {
            tracing::warn!(
                "the network config does not allow {}, which is reserved for this node; it stays \
                 reserved, and we have {} instead",
                reserved.key,
                ours.key
            );
        }
    }

    /// `None` if somebody else was faster, be it with a part of it only.
    async fn create(
        &self,
        registry: &dyn Registry,
        key: &LeaseKey,
    ) -> Result<Option<Lease>, RegistryError> {
        let created = registry.create(key, &self.identity.attrs, Some(self.ttl)).await?;
        let (Some(ours), 2..) = (&created, key.networks().count()) else {
            return Ok(created);
        };
        let (mut backoff, mut said) = (Backoff::default(), Repeats::told_to(self.health));
        // Until it is known: a lease that is taken up again later is not asked who came second.
        let snapshot = loop {
            match registry.snapshot().await {
                Ok(snapshot) => break snapshot,
                Err(error) => {
                    said.warn(&format!("cannot see whether {key} is ours alone: {error}"))
                }
            }
            backoff.wait().await;
        };
        if keeper::came_second(self.config, ours, &snapshot.leases) {
            registry.remove(ours).await?;
            return Ok(None);
        }
        Ok(created)
    }
}

/// What came of trying to get a lease.
#[derive(Debug)]
enum Attempt {
    Ours(Box<(Lease, Snapshot)>),
    /// The registry changed meanwhile, by us or by others.
    Again,
    /// What has our subnet cannot be read, and why.
    Unreadable(String),
    Full,
    /// Another node lives with our address.
    Claimed(Box<NodeRecord>),
}
