//! What the loop that forwards knows, and what follows from it.

use std::collections::{BTreeSet, HashMap};
use std::net::IpAddr;
use std::sync::Arc;
use std::time::Duration;

use jiff::Timestamp;
use tokio::time::{Instant, Interval, MissedTickBehavior, interval};
use weft_backends::ExternalInterface;
use weft_control::keeper::{self, Identity, KnownEnd, Own};
use weft_control::lease::Snapshot;
use weft_control::{Lease, LeaseAttrs, NetworkConfig, RegistryError};

use super::members::Members;
use super::vanished::Vanished;
use super::{Ended, Why};
use crate::place::Place;
use crate::probe::Prober;
use crate::repairs::Repairs;

/// The slow timer: everything is reconciled even if nothing was heard.
const RECONCILE_INTERVAL: Duration = Duration::from_secs(30);
/// How often the node's record is published.
const NODE_INTERVAL: Duration = Duration::from_secs(20);

/// What changes from turn to turn.
#[derive(Debug)]
pub(super) struct Turn {
    pub(super) tenure: Tenure,
    /// As [`Place::interface`], but for further addresses, which come and go.
    pub(super) interface: ExternalInterface,
    /// Why the external interface cannot be followed to what it is now.
    pub(super) stuck: Option<String>,
    /// Since when one of its further addresses would be taken in place of ours.
    pub(super) replaced: Option<Instant>,
    /// What kept our own part in forwarding from being right, at the last reconciliation.
    pub(super) failures: Vec<String>,
    /// What our lease is to say of us.
    pub(super) identity: Identity,
    known_end: KnownEnd,
    /// The registry may have refused a renewal a moment ago.
    pub(super) renew_not_before: Instant,
    /// Whether the registry could be read when it was last heard of; at first nothing has been.
    pub(super) readable: Option<bool>,
    /// What could not be done, at the last reconciliation.
    pub(super) problems: BTreeSet<String>,
    /// When problems were last logged, not long ago: some come and go with a link that flaps.
    pub(super) logged: HashMap<String, Instant>,
    /// Those that were logged, and whose end is to be.
    pub(super) unresolved: BTreeSet<String>,
    /// Of those, another node at our address, and a network config that is not gone by.
    pub(super) rival: Option<String>,
    pub(super) config_problem: Option<String>,
    /// Another config, by which we do not go, and what is said of it.
    pub(super) judged: Option<(NetworkConfig, String)>,
    /// What came of the last try to write subnet.env; and whether it has said once what it should.
    pub(super) subnet_file: Option<Result<(), String>>,
    pub(super) is_announced: bool,
    pub(super) repairs: Repairs,
    /// Why what the registry said is not written down.
    pub(super) forgetful: Option<String>,
    /// What of this host keeps packets from containers, as of the last look.
    pub(super) in_the_way: Vec<String>,
    /// Renewals of the lease, and of the node's record.
    pub(super) renewals: Failing,
    pub(super) records: Failing,
    /// When the record was last to be published, and when it is next; and when all is reconciled.
    pub(super) published: Option<Instant>,
    pub(super) publish: Interval,
    pub(super) slow: Interval,
    /// The registry as it was last heard of.
    pub(super) heard: Arc<Snapshot>,
    /// Who is a peer.
    pub(super) members: Members,
    /// What it lost together with our own lease, for a while.
    pub(super) vanished: Option<Vanished>,
    /// None where no socket was to be had.
    pub(super) prober: Option<Prober>,
    /// What was given up for the sake of packets that got lost; with the peer, if only towards that.
    pub(super) given_up: Vec<(String, Option<IpAddr>)>,
}

/// Our hold on a lease, from one turn to the next.
#[derive(Debug, Clone)]
pub(crate) struct Tenure {
    pub(crate) lease: Lease,
    /// What it goes by: its range of subnets may have changed since the start.
    pub(super) config: NetworkConfig,
    /// What the registry may tell of us: what we were, are, and were about to be when a write's answer
    /// got lost.
    pub(super) former: Vec<LeaseAttrs>,
    /// Why the lease is ours no more, until we have another.
    pub(super) lost: Option<Lost>,
    /// When it is due to be renewed, as worked out once by the clock that nobody sets; never if it is a
    /// reservation.
    pub(super) renewal: Option<Instant>,
}

impl Tenure {
    /// The beginning.
    pub(crate) fn of(lease: Lease, config: NetworkConfig) -> Self {
        Self { lease, config, former: Vec::new(), lost: None, renewal: None }
    }

    /// When the lease is due to be renewed by who is `attrs` now; never if it is a reservation.
    pub(crate) fn renewal(&mut self, attrs: &LeaseAttrs, margin: Duration) -> Option<Instant> {
        let known = self.renewal.filter(|_| self.lease.attrs == *attrs);
        self.renewal = known.or_else(|| renewal(&self.lease, attrs, margin));
        self.renewal
    }

    /// Goes on with the lease as it was renewed. Who looks may still see it as it was.
    pub(crate) fn renewed(&mut self, lease: Lease) {
        let before = std::mem::replace(&mut self.lease, lease);
        self.may_be_told(before.attrs);
        self.renewal = None;
    }

    /// Goes by what the registry has.
    pub(crate) fn look(&mut self, leases: &[Lease]) {
        match keeper::check_own(&self.lease, &self.former, leases) {
            Own::Held(lease) => self.renewed(lease),
            Own::Missing => self.lost = Some(Lost::Gone),
            Own::TakenBy(_) => self.lost = Some(Lost::Taken),
        }
    }

    /// The registry may say this of us, now or when an answer got lost.
    pub(crate) fn may_be_told(&mut self, attrs: LeaseAttrs) {
        if !self.former.contains(&attrs) {
            self.former.push(attrs);
        }
    }

    /// Whether the lease is still ours, as far as is known.
    pub(crate) fn is_held(&self) -> bool {
        self.lost.is_none()
    }
}

/// What became of a lease that was ours.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Lost {
    Gone,
    /// Another node has the subnet.
    Taken,
}

impl Turn {
    pub(super) fn new(mut tenure: Tenure, place: &Place, margin: Duration) -> Self {
        let attrs = &place.identity.attrs;
        tenure.renewal(attrs, margin);
        for ours in [tenure.lease.attrs.clone(), attrs.clone()] {
            tenure.may_be_told(ours);
        }
        Self {
            known_end: KnownEnd::of(&tenure.lease),
            tenure,
            interface: place.interface.clone(),
            stuck: None,
            replaced: None,
            failures: Vec::new(),
            identity: place.identity.clone(),
            renew_not_before: Instant::now(),
            readable: None,
            problems: BTreeSet::new(),
            logged: HashMap::new(),
            unresolved: BTreeSet::new(),
            members: Members::default(),
            rival: None,
            config_problem: None,
            judged: None,
            subnet_file: None,
            is_announced: false,
            repairs: Repairs::new(),
            forgetful: None,
            in_the_way: Vec::new(),
            renewals: Failing::default(),
            records: Failing::default(),
            published: None,
            publish: timer(NODE_INTERVAL),
            slow: timer(RECONCILE_INTERVAL),
            heard: Arc::default(),
            vanished: None,
            prober: None,
            given_up: Vec::new(),
        }
    }

    /// Goes on under a lease for the same subnets. When it is due is worked out when its end becomes
    /// known, and not again: the clock may be set meanwhile.
    pub(super) fn hold(&mut self, lease: Lease, margin: Duration) {
        let lease = self.known_end.complete(lease);
        let held = &mut self.tenure;
        if (lease.expires, &lease.attrs) != (held.lease.expires, &held.lease.attrs) {
            held.renewal = renewal(&lease, &self.identity.attrs, margin);
        }
        held.lease = lease;
    }

    /// When the lease is to be renewed, if ever.
    pub(super) fn renewal(&self) -> Option<Instant> {
        self.tenure.renewal.map(|due| due.max(self.renew_not_before))
    }

    /// What the next turn goes on with.
    pub(super) fn ended(&self, why: Why) -> Ended {
        Ended { why, tenure: self.tenure.clone() }
    }

    /// What the registry says, and what it has lost a moment ago; `None` if that is nothing.
    pub(super) fn with_vanished(&mut self, snapshot: &Snapshot) -> Option<Snapshot> {
        let completed = self.vanished.as_mut()?.complete(snapshot);
        self.vanished.take_if(|it| it.is_over());
        self.vanished.is_some().then_some(completed)
    }

    /// The address that is next, where the interface has had it besides ours.
    pub(super) fn further_in_place_of_ours(&self, next: &ExternalInterface) -> Option<IpAddr> {
        next.addresses().find(|ip| self.interface.other_addresses.contains(ip))
    }

    /// The lease is to say this of us. Peers must know of a change at once.
    pub(super) fn describe(&mut self, attrs: LeaseAttrs) {
        if attrs != self.identity.attrs {
            tracing::warn!(subnet = %self.tenure.lease.key, "what our lease tells of us has changed");
            self.identity.attrs = attrs;
            self.renew_not_before = Instant::now();
            self.tenure.renewal = Some(self.renew_not_before);
        }
    }
}

/// Writes that fail though the registry can be read. The first one may be how an outage begins, which
/// whoever watches tells; from the second on they are a problem of their own.
#[derive(Debug, Default)]
pub(super) struct Failing {
    times: u32,
    why: String,
}

impl Failing {
    /// Takes in what became of a write, and says whether a problem has come or gone.
    pub(super) fn note<T>(&mut self, what: &str, outcome: &Result<T, RegistryError>) -> bool {
        let was = self.is_problem();
        match outcome {
            Ok(_) => *self = Self::default(),
            Err(RegistryError::NotAsked) => {}
            Err(error) => {
                self.times += 1;
                self.why = format!("cannot {what}, trying again: {error}");
                tracing::debug!("{}", self.why);
            }
        }
        self.is_problem() != was
    }

    fn is_problem(&self) -> bool {
        self.times > 1
    }

    pub(super) fn problem(&self) -> Option<String> {
        self.is_problem().then(|| self.why.clone())
    }
}

fn timer(period: Duration) -> Interval {
    let mut timer = interval(period);
    // What was due while the registry was away is due once.
    timer.set_missed_tick_behavior(MissedTickBehavior::Delay);
    timer
}

fn renewal(lease: &Lease, attrs: &LeaseAttrs, margin: Duration) -> Option<Instant> {
    keeper::renew_in(lease, attrs, margin, Timestamp::now()).map(|left| Instant::now() + left)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_write_that_fails_is_told_from_the_second_time_on() {
        let away = || Err::<(), _>(RegistryError::Away("connection refused".into()));
        let mut failing = Failing::default();
        assert!(!failing.note("renew the lease", &away()));
        // Nothing was asked, so nothing failed.
        assert!(!failing.note("renew the lease", &Err::<(), _>(RegistryError::NotAsked)));
        assert_eq!(failing.problem(), None);
        assert!(failing.note("renew the lease", &away()));
        let told = failing.problem().unwrap();
        assert_eq!(told, "cannot renew the lease, trying again: connection refused");
        assert!(!failing.note("renew the lease", &away()));
        assert!(failing.note("renew the lease", &Ok(())));
        assert_eq!(failing.problem(), None);
    }
}
