//! The daemon while it forwards: one loop that waits for whatever changes, and makes everything
//! follow.

use std::collections::{BTreeSet, HashMap, HashSet};
use std::net::IpAddr;
use std::time::Duration;

use anyhow::Context;
use jiff::Timestamp;
use tokio::sync::watch;
use tokio::time::Instant;
use weft_backends::{BackendEvent, BackendKind, Desired, DesiredPeer, ExternalInterface, Started};
use weft_control::keeper::{self, Own};
use weft_control::lease::{Expiry, NodeRecord, Snapshot, peers};
use weft_control::subnet_env::SubnetEnv;
use weft_control::{Lease, NetworkConfig, Registry, View};

use crate::flags::Settings;
use crate::leasing::{self, Claim};
use crate::node::{self, Node};
use crate::overlay::Overlay;
use crate::state_file::{LastKnown, StateFile};
use crate::status::{self, PeerStatus, Status, StatusSocket};

/// The slow timer: everything is reconciled even if nothing was heard.
const RECONCILE_INTERVAL: Duration = Duration::from_secs(30);
/// Node records live three times as long, so two may get lost.
const NODE_INTERVAL: Duration = Duration::from_secs(20);
const NODE_TTL: Duration = Duration::from_secs(60);

/// What stays the same while one lease is forwarded under.
pub(crate) struct Forwarding<'a> {
    pub(crate) settings: &'a Settings,
    pub(crate) registry: &'a dyn Registry,
    pub(crate) claim: &'a Claim<'a>,
    pub(crate) kind: BackendKind,
    pub(crate) interface: &'a ExternalInterface,
    pub(crate) node: &'a Node,
    pub(crate) public_ip: IpAddr,
    pub(crate) started: Started,
    pub(crate) socket: &'a StatusSocket,
}

/// Why the loop ended.
#[derive(Debug)]
pub(crate) enum Ended {
    /// Packets no longer move.
    Lost(String),
    /// Our subnets are others now.
    OtherLease(Box<Lease>),
}

/// What changes from turn to turn.
#[derive(Debug)]
struct Turn {
    lease: Lease,
    /// Whether the registry could be read when it was last heard of.
    readable: bool,
    /// What could not be done, at the last reconciliation.
    problems: BTreeSet<String>,
    subnet_file_written: bool,
}

impl Forwarding<'_> {
    /// Follows `watch` until packets no longer move, or our subnets are others. While the registry
    /// cannot be read all stays as it is: nothing is renewed, published or known to have expired.
    ///
    /// # Errors
    /// The backend panicked, or nothing watches the registry any more.
    pub(crate) async fn run(
        self,
        overlay: &mut Overlay,
        lease: Lease,
        watch: &mut watch::Receiver<View>,
        last_known: &mut StateFile<LastKnown>,
    ) -> anyhow::Result<Ended> {
        let mut turn =
            Turn { lease, readable: false, problems: BTreeSet::new(), subnet_file_written: false };
        let mut slow = tokio::time::interval(RECONCILE_INTERVAL);
        let mut publish = tokio::time::interval(NODE_INTERVAL);
        let mut renew_not_before = Instant::now();
        let (margin, retry) = self.settings.renewal();
        watch.mark_changed();
        loop {
            let renewal = until_renewal(&turn.lease, margin, renew_not_before);
            tokio::select! {
                changed = watch.changed() => {
                    changed.context("nothing watches the registry any more")?;
                    let View { snapshot, readable } = watch.borrow_and_update().clone();
                    let is_back = readable && !turn.readable;
                    turn.readable = readable;
                    if !readable {
                        self.reconcile(&snapshot, overlay, &mut turn).await?;
                        continue;
                    }
                    if let Some(ended) = self.follow(&snapshot, overlay, &mut turn).await? {
                        return Ok(ended);
                    }
                    if !snapshot.nodes.iter().any(|node| node.id == self.node.id) {
                        publish.reset_immediately();
                    }
                    if is_back {
                        remember(last_known, &turn, &snapshot);
                    }
                }
                _ = slow.tick() => {
                    let View { snapshot, readable } = watch.borrow().clone();
                    self.reconcile(&snapshot, overlay, &mut turn).await?;
                    if readable {
                        remember(last_known, &turn, &snapshot);
                    }
                }
                _ = publish.tick(), if turn.readable => self.publish_node().await,
                () = renewal, if turn.readable => {
                    self.renew(&mut turn).await;
                    renew_not_before = Instant::now() + retry;
                }
                BackendEvent::Lost(reason) = overlay.event() => return Ok(Ended::Lost(reason)),
                Ok(asker) = self.socket.accept() => {
                    status::answer(asker, &self.status(overlay, &turn));
                }
            }
        }
    }

    /// Follows the registry: first our own lease, then the peers'.
    async fn follow(
        &self,
        snapshot: &Snapshot,
        overlay: &mut Overlay,
        turn: &mut Turn,
    ) -> anyhow::Result<Option<Ended>> {
        match keeper::check_own(&turn.lease, &snapshot.leases) {
            Own::Held(lease) => turn.lease = lease,
            Own::Missing => {
                tracing::warn!(subnet = %turn.lease.key, "our lease is gone; claiming it again");
                let previous = leasing::previous(&turn.lease.key);
                let lease = self.claim.acquire(self.registry, &previous).await;
                if lease.key != turn.lease.key {
                    return Ok(Some(Ended::OtherLease(lease.into())));
                }
                turn.lease = lease;
            }
            Own::TakenBy(other) => {
                tracing::error!(
                    subnet = %turn.lease.key,
                    owner = ?other.attrs.public_addresses().collect::<Vec<_>>(),
                    "our subnet has another owner; its containers must move to a new subnet"
                );
                let previous = leasing::previous(&turn.lease.key);
                let lease = self.claim.acquire(self.registry, &previous).await;
                return Ok(Some(Ended::OtherLease(lease.into())));
            }
        }
        self.reconcile(snapshot, overlay, turn).await?;
        Ok(None)
    }

    async fn reconcile(
        &self,
        snapshot: &Snapshot,
        overlay: &mut Overlay,
        turn: &mut Turn,
    ) -> anyhow::Result<()> {
        let (desired, mut problems) = self.desired(snapshot, &turn.lease);
        let report = overlay.call(move |backend| backend.reconcile(&desired)).await?;
        problems.extend(report.problems);
        for problem in problems.difference(&turn.problems) {
            tracing::warn!("{problem}");
        }
        turn.problems = problems;
        if !turn.subnet_file_written {
            turn.subnet_file_written = self.write_subnet_file(&turn.lease);
        }
        Ok(())
    }

    /// Everybody whose lease can be trusted, with the addresses they may send from.
    fn desired(&self, snapshot: &Snapshot, own: &Lease) -> (Desired, BTreeSet<String>) {
        let peers = peers(self.claim.config, own, &snapshot.leases);
        let mut others: HashMap<IpAddr, Vec<IpAddr>> = HashMap::new();
        let mut weft_nodes: HashSet<IpAddr> = HashSet::new();
        for record in &snapshot.nodes {
            for public in record.public_addresses() {
                weft_nodes.insert(public);
                others.entry(public).or_default().extend(&record.addresses);
            }
        }
        for (public, address) in &self.settings.peer_sources {
            others.entry(*public).or_default().push(*address);
        }
        let desired = peers.accepted.into_iter().map(|lease| {
            let publics: Vec<IpAddr> = lease.attrs.public_addresses().collect();
            let is_weft = publics.iter().any(|ip| weft_nodes.contains(ip));
            let other_addresses =
                publics.iter().filter_map(|ip| others.get(ip)).flatten().copied().collect();
            DesiredPeer { lease, other_addresses, is_weft }
        });
        let desired = Desired { lease: own.clone(), peers: desired.collect() };
        let refused = peers.refused.iter().map(|(key, why)| format!("lease {key} refused: {why}"));
        let skipped =
            snapshot.skipped.iter().map(|it| format!("lease {} skipped: {}", it.name, it.reason));
        let mut problems: BTreeSet<String> = refused.chain(skipped).collect();
        problems.extend(self.config_problem(snapshot));
        problems.extend(keeper::claimant(self.claim.identity, &snapshot.nodes).map(|other| {
            format!(
                "the node {} (id {}) lives with our public address; give either a --public-ip of \
                 its own",
                other.name, other.id
            )
        }));
        (desired, problems)
    }

    /// What a network config that is not the one we work by means.
    fn config_problem(&self, snapshot: &Snapshot) -> Option<String> {
        let Some(text) = &snapshot.config else {
            return Some("the network config is gone; going on with what it was".into());
        };
        match text.parse::<NetworkConfig>() {
            Ok(config) if config == *self.claim.config => None,
            Ok(_) => Some("the network config has changed; restart weftd to go by it".into()),
            Err(error) => Some(format!(
                "the network config is a bad one now ({error}); going on with what it was"
            )),
        }
    }

    fn write_subnet_file(&self, lease: &Lease) -> bool {
        let path = &self.settings.subnet_file;
        let env = SubnetEnv::new(self.claim.config, lease, self.started.mtu, self.settings.ip_masq);
        match env.write(path) {
            Ok(()) => {
                tracing::info!(path = %path.display(), "wrote subnet.env");
                true
            }
            Err(error) => {
                tracing::error!("cannot write {}: {error}; trying again", path.display());
                false
            }
        }
    }

    async fn publish_node(&self) {
        let interface = self.interface;
        let bound = [interface.ipv4.map(IpAddr::V4), interface.ipv6.map(IpAddr::V6)];
        let attrs = &self.claim.identity.attrs;
        let publics: Vec<IpAddr> = attrs.public_addresses().collect();
        let addresses = bound.into_iter().flatten().chain(interface.other_addresses.clone());
        let record = NodeRecord {
            id: self.node.id.clone(),
            name: node::host_name(),
            public_ip: attrs.public_ip,
            public_ipv6: attrs.public_ipv6,
            addresses: addresses.filter(|ip| !publics.contains(ip)).collect(),
            version: env!("CARGO_PKG_VERSION").into(),
            mtu: self.started.mtu,
        };
        if let Err(error) = self.registry.publish_node(&record, NODE_TTL).await {
            tracing::warn!("cannot publish this node's record: {error}");
        }
    }

    async fn renew(&self, turn: &mut Turn) {
        let Claim { identity, ttl, .. } = *self.claim;
        let ttl = keeper::ttl(&turn.lease, ttl);
        match self.registry.renew(&turn.lease, &identity.attrs, ttl).await {
            Ok(Some(lease)) => {
                tracing::info!(subnet = %lease.key, expires = expiry(&lease), "renewed the lease");
                turn.lease = lease;
            }
            Ok(None) => {
                tracing::warn!(subnet = %turn.lease.key, "the lease to renew is not ours any more");
            }
            Err(error) => tracing::warn!("cannot renew the lease, trying again: {error}"),
        }
    }

    fn status(&self, overlay: &Overlay, turn: &Turn) -> Status {
        let backend = overlay.status();
        let peers = backend.peers.into_iter();
        Status {
            pid: std::process::id(),
            version: env!("CARGO_PKG_VERSION").into(),
            node_id: self.node.id.clone(),
            state: "forwarding".into(),
            registry: self.registry.describe(),
            backend: Some(self.kind.to_string()),
            interface: Some(self.interface.name.clone()),
            public_ip: Some(self.public_ip),
            device: Some(self.started.device.clone()),
            mtu: Some(self.started.mtu),
            subnets: turn.lease.key.networks().collect(),
            lease_expires: match turn.lease.expires {
                Expiry::At(end) => Some(end.to_string()),
                Expiry::Never | Expiry::Unknown => None,
            },
            peers: peers.map(|(public_ip, subnets)| PeerStatus { subnets, public_ip }).collect(),
            problems: turn.problems.iter().cloned().collect(),
            io: backend.io,
            offloads: backend.offloads,
            counters: backend.counters,
        }
    }
}

/// For a start while the registry is away. Without it weft works as well, until then.
fn remember(file: &mut StateFile<LastKnown>, turn: &Turn, snapshot: &Snapshot) {
    let known = LastKnown { lease: turn.lease.clone(), snapshot: snapshot.clone() };
    if let Err(error) = file.save(&known) {
        tracing::warn!("cannot remember what the registry said: {error:#}");
    }
}

/// When a lease ends, for whoever reads the log.
pub(crate) fn expiry(lease: &Lease) -> String {
    match lease.expires {
        Expiry::Never => "never (a reservation)".into(),
        Expiry::At(end) => end.to_string(),
        Expiry::Unknown => "unknown".into(),
    }
}

/// Sleeps until the lease is due for renewal, and no less than until `not_before`.
async fn until_renewal(lease: &Lease, margin: Duration, not_before: Instant) {
    let Some(due) = keeper::renew_at(lease, margin) else {
        return std::future::pending().await;
    };
    let left = Duration::try_from(due.duration_since(Timestamp::now())).unwrap_or_default();
    tokio::time::sleep_until(not_before.max(Instant::now() + left)).await;
}
