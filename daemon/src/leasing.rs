//! Getting and keeping this node's lease: carries out what `weft_control::keeper` plans.

use std::time::Duration;

use ipnetwork::{IpNetwork, Ipv4Network, Ipv6Network};
use weft_control::keeper::{self, Identity, Plan};
use weft_control::subnet_env::Previous;
use weft_control::{Lease, LeaseKey, NetworkConfig, Registry, RegistryError};

use crate::retry::{Backoff, Repeats};

/// How long a lease lasts without renewal, as flannel's.
pub(crate) const LEASE_TTL: Duration = Duration::from_secs(24 * 60 * 60);

/// Rounds of losing a race for a subnet before the daemon takes a breath.
const RACES_MAX: u32 = 10;

/// Claims a subnet, however long it takes: a registry that is away, or full, is waited for.
pub(crate) async fn acquire<R: Registry>(
    registry: &R,
    config: &NetworkConfig,
    identity: &Identity,
    previous: &Previous,
) -> Lease {
    let mut backoff = Backoff::default();
    let mut said = Repeats::default();
    let mut rng = fastrand::Rng::new();
    loop {
        for _ in 0..RACES_MAX {
            match attempt(registry, config, identity, previous, &mut rng).await {
                Ok(Attempt::Ours(lease)) => return *lease,
                Ok(Attempt::Again) => {}
                Ok(Attempt::Full) => {
                    said.warn(
                        "out of subnets: every subnet between SubnetMin and SubnetMax is \
                               leased; remove leases of nodes that are gone, or widen the range \
                               in the network config",
                    );
                    break;
                }
                Err(error) => {
                    said.warn(&format!("cannot get a lease yet: {error}"));
                    break;
                }
            }
        }
        backoff.wait().await;
    }
}

enum Attempt {
    Ours(Box<Lease>),
    /// The registry changed meanwhile, by us or by others.
    Again,
    Full,
}

async fn attempt<R: Registry>(
    registry: &R,
    config: &NetworkConfig,
    identity: &Identity,
    previous: &Previous,
    rng: &mut fastrand::Rng,
) -> Result<Attempt, RegistryError> {
    let leases = registry.leases().await?.leases;
    let lease = match keeper::plan(config, identity, previous, &leases, rng) {
        Plan::Reuse(seen) => {
            tracing::info!(subnet = %seen.key, "taking up the lease that has our address");
            registry.renew(&seen, &identity.attrs, LEASE_TTL).await?
        }
        Plan::Create(key) => registry.create(&key, &identity.attrs, LEASE_TTL).await?,
        Plan::Remove(seen) => {
            tracing::warn!(
                subnet = %seen.key,
                "giving up the lease that has our address: the network config does not allow it \
                 any more"
            );
            registry.remove(&seen).await?;
            None
        }
        Plan::OutOfSubnets => return Ok(Attempt::Full),
    };
    Ok(lease.map_or(Attempt::Again, |lease| Attempt::Ours(lease.into())))
}

/// What to ask for again, so that containers keep their addresses.
pub(crate) fn previous(key: &LeaseKey) -> Previous {
    let mut previous = Previous::default();
    for network in key.networks() {
        match network {
            IpNetwork::V4(net) => previous.ipv4 = Some(net) as Option<Ipv4Network>,
            IpNetwork::V6(net) => previous.ipv6 = Some(net) as Option<Ipv6Network>,
        }
    }
    previous
}
