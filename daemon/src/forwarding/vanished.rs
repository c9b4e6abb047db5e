//! Peers that the registry lost together with our own lease: it was wiped, restored from an older backup, or
//! is another one. Their nodes claim their subnets again, as we do; until then packets go on.

use std::collections::HashSet;
use std::net::IpAddr;
use std::time::Duration;

use ipnetwork::IpNetwork;
use tokio::time::Instant;
use weft_control::lease::{NodeRecord, Snapshot};
use weft_control::{Lease, LeaseKey};

/// How long their nodes have for that.
const PATIENCE: Duration = Duration::from_secs(60);
/// What is said of it.
pub(super) const PROBLEM: &str = "the registry has lost leases of peers together with ours; packets go on to \
                                  them, and their nodes have a minute to claim them again";

/// What is not in the registry any more.
#[derive(Debug)]
pub(super) struct Vanished {
    leases: Vec<Lease>,
    nodes: Vec<NodeRecord>,
    until: Instant,
}

impl Vanished {
    /// All that the registry said before, but for our own lease; what it still says goes with the first
    /// [`Vanished::complete`].
    pub(super) fn of(before: &Snapshot, own: &LeaseKey) -> Self {
        let Snapshot { mut leases, nodes, .. } = before.clone();
        leases.retain(|lease| lease.key != *own);
        Self { leases, nodes, until: Instant::now() + PATIENCE }
    }

    /// Whether nothing is to be waited for any more.
    pub(super) fn is_over(&self) -> bool {
        self.leases.is_empty() || Instant::now() >= self.until
    }

    /// What the registry says now, and what it said of nodes that it says nothing of. Who has come back, or
    /// whose subnet has another owner, is not waited for any more.
    pub(super) fn complete(&mut self, now: &Snapshot) -> Snapshot {
        let networks: HashSet<IpNetwork> =
            now.leases.iter().flat_map(|lease| lease.key.networks()).collect();
        let addresses: HashSet<IpAddr> =
            now.leases.iter().flat_map(|lease| lease.attrs.public_addresses()).collect();
        self.leases.retain(|lease| {
            let mut publics = lease.attrs.public_addresses();
            let mut subnets = lease.key.networks();
            !subnets.any(|it| networks.contains(&it)) && !publics.any(|ip| addresses.contains(&ip))
        });
        let ids: HashSet<&str> = now.nodes.iter().map(|node| node.id.as_str()).collect();
        self.nodes.retain(|node| !ids.contains(node.id.as_str()));
        let mut all = now.clone();
        all.leases.extend(self.leases.iter().cloned());
        all.nodes.extend(self.nodes.iter().cloned());
        all.leases.sort_unstable_by_key(|lease| lease.key);
        all
    }
}

#[cfg(test)]
mod tests {
    use weft_control::LeaseAttrs;
    use weft_control::lease::Expiry;

    use super::*;

    fn snapshot(leases: &[(&str, u8)]) -> Snapshot {
        let lease = |(key, last): &(&str, u8)| Lease {
            key: key.parse().unwrap(),
            attrs: LeaseAttrs {
                public_ip: Some([192, 0, 2, *last].into()),
                ..LeaseAttrs::default()
            },
            expires: Expiry::Never,
            revision: 0,
        };
        Snapshot { leases: leases.iter().map(lease).collect(), ..Snapshot::default() }
    }

    #[tokio::test(start_paused = true)]
    async fn who_vanished_stays_until_it_is_back_or_its_subnet_is_anothers() {
        let before = snapshot(&[("10.3.1.0-24", 1), ("10.3.2.0-24", 2), ("10.3.3.0-24", 3)]);
        let own = "10.3.4.0-24".parse().unwrap();
        let mut vanished = Vanished::of(&before, &own);
        assert_eq!(vanished.complete(&Snapshot::default()), before);
        assert!(!vanished.is_over());
        // One has another subnet now, and one's subnet is another node's.
        let now = snapshot(&[("10.3.1.0-24", 9), ("10.3.7.0-24", 2)]);
        let all = snapshot(&[("10.3.1.0-24", 9), ("10.3.3.0-24", 3), ("10.3.7.0-24", 2)]);
        assert_eq!(vanished.complete(&now), all);
        // Who was back once goes like any other.
        vanished.complete(&before);
        assert!(vanished.is_over());
        assert_eq!(vanished.complete(&Snapshot::default()), Snapshot::default());

        let vanished = Vanished::of(&before, &own);
        assert!(!vanished.is_over());
        tokio::time::advance(PATIENCE).await;
        assert!(vanished.is_over());
        let ours_alone = Vanished::of(&snapshot(&[("10.3.4.0-24", 4)]), &own);
        assert!(ours_alone.is_over());
    }
}
