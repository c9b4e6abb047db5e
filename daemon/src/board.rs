//! What is known of the running daemon, for whoever asks: its parts write here what they do, and the
//! socket ([`crate::socket`]) and HTTP ([`crate::http`]) read it at any time, whatever the daemon
//! waits for.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use ipnetwork::IpNetwork;
use jiff::Timestamp;
use tokio::sync::watch;
use tokio::time::Instant;
use weft_backends::{BackendStatus, EngineMeter, PeerWay, Traffic};
use weft_control::Lease;
use weft_control::firewall::Rules;
use weft_control::lease::{Expiry, NodeRecord, by_address};

use crate::firewall::FirewallState;
use crate::health::{Health, Phase};
use crate::log::Log;
use crate::probe::{self, Findings, Totals};
use crate::status::{FORWARDING, PeerStatus, ProbeStatus, SCHEMA, Status, TrafficStatus};
use crate::usage;

/// How long one turn of the loop may take: some work waits for slow servers, and for the kernel.
pub(crate) const STILL_MAX: Duration = Duration::from_secs(120);

/// The one place where it is kept. Clones are the same board.
#[derive(Debug, Clone)]
pub(crate) struct Board {
    log: Log,
    phases: watch::Receiver<Phase>,
    facts: Arc<Mutex<Facts>>,
}

#[derive(Debug, Default)]
struct Facts {
    status: Status,
    engine: Option<EngineMeter>,
    /// Of the peers in the status, in their order.
    traffic: Vec<Option<Arc<Traffic>>>,
    firewall: Option<watch::Receiver<FirewallState>>,
    probes: Option<Findings>,
    /// When the loop that forwards last came round.
    turned: Option<Instant>,
}

impl Board {
    pub(crate) fn new(log: Log, health: &Health) -> Self {
        let status = Status {
            schema: SCHEMA,
            pid: std::process::id(),
            version: env!("CARGO_PKG_VERSION").into(),
            started: Timestamp::now(),
            ..Status::default()
        };
        let facts = Facts { status, ..Facts::default() };
        Self { log, phases: health.watch(), facts: Arc::new(Mutex::new(facts)) }
    }

    pub(crate) fn log(&self) -> &Log {
        &self.log
    }

    /// Writes down what has become known or has changed.
    pub(crate) fn update(&self, change: impl FnOnce(&mut Status)) {
        change(&mut self.facts().status);
    }

    /// Writes down what the backend does, and what the nodes tell of themselves.
    pub(crate) fn backend(&self, backend: BackendStatus, nodes: &[NodeRecord]) {
        let nodes = by_address(nodes);
        let peers = backend.peers.into_iter().map(|peer| {
            let PeerWay { public_ip, subnets, way, traffic } = peer;
            let node = nodes.get(&public_ip);
            let peer = PeerStatus {
                subnets,
                public_ip,
                way: way.name().into(),
                name: node.map(|node| node.name.clone()),
                version: node.map(|node| node.version.clone()),
                traffic: None,
                probe: ProbeStatus::default(),
            };
            (peer, traffic)
        });
        let (peers, traffic) = peers.unzip();
        let mut facts = self.facts();
        (facts.status.peers, facts.traffic) = (peers, traffic);
        facts.engine = backend.engine;
    }

    /// Writes down whether the registry could be read just now.
    pub(crate) fn registry(&self, readable: bool) {
        self.update(|status| {
            status.registry_readable = readable;
            if readable {
                status.registry_answered = Some(Timestamp::now());
            }
        });
    }

    /// Writes down how long our lease lasts, and when it is due to be renewed.
    pub(crate) fn lease(&self, lease: &Lease, renewal: Option<Instant>) {
        self.update(|status| {
            status.lease_expires = lease.expires.end();
            status.lease_reserved = lease.expires == Expiry::Never;
            status.lease_renewal = renewal.and_then(on_the_clock);
        });
    }

    /// Says where the firewall's state is to be found.
    pub(crate) fn firewall(&self, state: watch::Receiver<FirewallState>) {
        self.facts().firewall = Some(state);
    }

    /// Says where the findings of probes are.
    pub(crate) fn probes(&self, findings: Option<Findings>) {
        self.facts().probes = findings;
    }

    /// What all probes came to since the backend started.
    pub(crate) fn probe_totals(&self) -> Totals {
        self.facts().probes.as_ref().map(Findings::totals).unwrap_or_default()
    }

    /// The packet engine, where it carries the packets.
    pub(crate) fn engine(&self) -> Option<EngineMeter> {
        self.facts().engine.clone()
    }

    /// What the firewall is asked, once it is.
    pub(crate) fn rules(&self) -> Option<Rules> {
        let facts = self.facts();
        let firewall = facts.firewall.as_ref()?.borrow();
        firewall.tried.as_ref().map(|wanted| wanted.rules.clone())
    }

    /// How far the daemon has come.
    pub(crate) fn phase(&self) -> Phase {
        self.phases.borrow().clone()
    }

    /// The loop that forwards has come round once more.
    pub(crate) fn turn(&self) {
        self.facts().turned = Some(Instant::now());
    }

    /// Says so if the daemon should forward, but its loop has stopped coming round.
    pub(crate) fn stands_still(&self) -> Option<String> {
        let Phase::Forwarding { .. } = self.phase() else { return None };
        let still = self.facts().turned?.elapsed();
        (still > STILL_MAX).then(|| {
            format!("the daemon's loop has stood still for {} s; restart it", still.as_secs())
        })
    }

    /// All of it, as it is now.
    pub(crate) fn read(&self) -> Status {
        let facts = self.facts();
        let mut status = facts.status.clone();
        if let Some(engine) = &facts.engine {
            status.io = Some(engine.io().name().into());
            status.offloads = engine
                .features()
                .map(|(it, state)| (it.name().into(), state.name().into()))
                .collect();
            status.counters =
                engine.counters().map(|(it, count)| (it.name().into(), count)).collect();
        }
        for (peer, traffic) in status.peers.iter_mut().zip(&facts.traffic) {
            peer.traffic = traffic.as_deref().map(TrafficStatus::from);
        }
        if let Some(probes) = &facts.probes {
            for peer in &mut status.peers {
                // Two leases may have one public address; host-gw's overlay has no other.
                let mut bases = peer.subnets.iter().map(IpNetwork::network);
                let found = bases.find_map(|base| probes.at(base));
                let found = found.or_else(|| probes.at(peer.public_ip));
                peer.probe = found.as_ref().map(probe::status).unwrap_or_default();
            }
        }
        if let Some(firewall) = &facts.firewall {
            let firewall = firewall.borrow().clone();
            status.firewall_in_place =
                firewall.tried.is_some().then_some(firewall.problem.is_none());
            status.firewall = firewall.by;
            status.firewall_repairs = firewall.repairs;
            status.problems.extend(firewall.problem);
        }
        drop(facts);
        (status.state, status.ready) = match &*self.phases.borrow() {
            Phase::Starting(what) => (what.clone(), false),
            Phase::Forwarding { problems, .. } => (FORWARDING.into(), problems.is_empty()),
        };
        if let Some(why) = self.stands_still() {
            status.ready = false;
            status.problems.push(why);
        }
        status.cpu_millis = usage::now().cpu_millis;
        status.changes = self.log.recent();
        status
    }

    fn facts(&self) -> MutexGuard<'_, Facts> {
        // What is written is whole after each statement, so a panic elsewhere leaves nothing half done.
        self.facts.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The same moment by the clock that people set, as that stands now.
fn on_the_clock(at: Instant) -> Option<Timestamp> {
    let (here, now) = (Instant::now(), Timestamp::now());
    let ahead = now.checked_add(at.saturating_duration_since(here)).ok()?;
    ahead.checked_sub(here.saturating_duration_since(at)).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn a_loop_that_stands_still_is_not_ready() {
        let health = Health::new();
        let board = Board::new(Log::silent(), &health);
        health.forwards(Vec::new(), Vec::new());
        board.turn();
        assert!(board.read().ready);
        tokio::time::advance(STILL_MAX + Duration::from_secs(1)).await;
        let status = board.read();
        assert!(!status.ready);
        assert_eq!(status.problems, ["the daemon's loop has stood still for 121 s; restart it"]);
    }
}
