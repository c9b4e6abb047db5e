//! Whom to probe, and who is due when.

use std::cmp::Reverse;
use std::collections::{BinaryHeap, HashMap, HashSet};
use std::net::IpAddr;
use std::time::{Duration, Instant};

use super::course::{Course, DISTANCE, EARLY, INTERVAL, Means};
use super::found::Totals;
use super::{TICK, Target};

#[derive(Debug, Default)]
pub(super) struct Known {
    pub(super) peers: Peers,
    /// Their addresses on the overlay, by those on the underlay: anybody may make the kernel tell of errors, and
    /// often.
    pub(super) by_outer: HashMap<IpAddr, Vec<IpAddr>>,
    /// When to look at whom.
    pub(super) agenda: Agenda,
    /// Of peers that are peers no more.
    pub(super) left: Totals,
}

/// All peers, by their addresses on the overlay.
pub(super) type Peers = HashMap<IpAddr, Peer>;

/// Instants and peers, the earliest first. What an earlier one of the same peer has overtaken stays
/// until its time comes.
pub(super) type Agenda = BinaryHeap<Reverse<(Instant, IpAddr)>>;

#[derive(Debug)]
pub(super) struct Peer {
    pub(super) target: Target,
    pub(super) course: Course,
    /// When the agenda has it.
    noted: Option<Instant>,
}

impl Peer {
    /// To be called when something may be due earlier than it was.
    pub(super) fn note(&mut self, agenda: &mut Agenda) {
        let due = self.course.due();
        if self.noted.is_none_or(|noted| due < noted) {
            self.noted = Some(due);
            agenda.push(Reverse((due, self.target.inner)));
        }
    }
}

impl Known {
    /// Goes on with those that are known, and spreads those that are new. `pings`: whether we can.
    pub(super) fn aim(&mut self, targets: &[Target], pings: bool, mtu: u16, now: Instant) {
        let Self { peers, by_outer, agenda, left } = self;
        let wanted: HashSet<IpAddr> = targets.iter().map(|target| target.inner).collect();
        peers.retain(|inner, peer| {
            let stays = wanted.contains(inner);
            if !stays {
                left.add(peer.course.found());
            }
            stays
        });
        let mut distance = Duration::ZERO;
        for target in targets {
            let mut target = *target;
            if let Some(Peer { target: former, .. }) = peers.get(&target.inner)
                && former.outer == target.outer
            {
                // The record ends with the daemon, the lease later: it is a node that is down.
                target.port = target.port.or(former.port);
            }
            match peers.get_mut(&target.inner) {
                Some(peer) if peer.target.port.is_some() == target.port.is_some() => {
                    if peer.target != target {
                        peer.course.hurry(now);
                    }
                    peer.target = target;
                }
                _ => {
                    let means = Means { probes: target.port.is_some(), pings };
                    let course = Course::new(means, mtu, now + distance);
                    let peer = Peer { target, course, noted: None };
                    let former = peers.insert(target.inner, peer);
                    former.iter().for_each(|former| left.add(former.course.found()));
                    distance += DISTANCE;
                }
            }
        }
        by_outer.clear();
        for peer in peers.values_mut() {
            by_outer.entry(peer.target.outer).or_default().push(peer.target.inner);
            peer.course.set_pace(targets.len());
            peer.note(agenda);
        }
    }

    /// Has those go on that are due, or may go on early, and says when somebody is due again.
    pub(super) fn step(&mut self, now: Instant, mut go_on: impl FnMut(&mut Peer)) -> Instant {
        let Self { peers, agenda, .. } = self;
        let mut noted = Vec::new();
        while let Some(entry) = agenda.peek().filter(|Reverse((at, _))| *at <= now + EARLY) {
            noted.push(entry.0);
            agenda.pop();
        }
        for (at, inner) in noted {
            let Some(peer) = peers.get_mut(&inner).filter(|it| it.noted == Some(at)) else {
                continue;
            };
            if peer.course.can_step(now) {
                go_on(peer);
            }
            peer.noted = None;
            peer.note(agenda);
        }
        let next = agenda.peek().map_or(now + INTERVAL, |Reverse((at, _))| *at);
        next.clamp(now + TICK, now + INTERVAL)
    }
}

#[cfg(test)]
mod tests {
    use std::net::Ipv4Addr;

    use super::super::course::Send;
    use super::super::found::Reach;
    use super::*;

    const LOCAL: IpAddr = IpAddr::V4(Ipv4Addr::LOCALHOST);

    /// A node's record ends a minute after its daemon, its lease a day.
    #[test]
    fn a_node_whose_record_has_ended_is_still_one_of_wefts() {
        let now = Instant::now();
        let mut known = Known::default();
        let [mut target, mut other] =
            [2, 3].map(|at| Target { inner: [10, 42, at, 0].into(), outer: LOCAL, port: None });
        let mut aim = |targets: [Target; 2]| {
            known.aim(&targets, true, 1472, now);
            targets.map(|it| known.peers[&it.inner].target.port)
        };
        target.port = Some(4711);
        assert_eq!(aim([target, other]), [Some(4711), None]);
        target.port = None;
        assert_eq!(aim([target, other]), [Some(4711), None]);
        // flannel's node may become one of weft's; and another node may get the subnet.
        other.port = Some(4712);
        target.outer = [192, 0, 2, 7].into();
        assert_eq!(aim([target, other]), [None, Some(4712)]);
    }

    /// What probing costs is what is sent, and how often we wake up for it.
    #[test]
    fn a_thousand_peers_cost_a_hundred_probes_and_four_wake_ups_a_second() {
        let target = |at: u16| {
            let [high, low] = at.to_be_bytes();
            Target { inner: [10, 42, high, low].into(), outer: LOCAL, port: Some(4711) }
        };
        let begin = Instant::now();
        let mut known = Known::default();
        known.aim(&(0..1_000).map(target).collect::<Vec<_>>(), true, 1472, begin);
        // From when all are known on, until each path has had its turn.
        let (from, to) = (begin + 10 * INTERVAL, begin + 20 * INTERVAL);
        let (mut now, mut wake_ups, mut small) = (begin, 0, 0);
        let mut pairs = [0; 10];
        while now < to {
            let is_counted = u32::from(now >= from);
            wake_ups += is_counted;
            let then = now;
            now = known.step(now, |peer| {
                for send in peer.course.step(now, || fastrand::u64(..)) {
                    match send {
                        Send::Small(nonce) => {
                            small += is_counted;
                            peer.course.answered(nonce, true, now);
                        }
                        Send::Pair(pair, _) => {
                            let tenth = now.saturating_duration_since(from).as_secs() / 10;
                            pairs[usize::try_from(tenth).unwrap().min(9)] += is_counted;
                            for nonce in pair {
                                peer.course.answered(nonce, true, now);
                            }
                        }
                        Send::Sized(..) | Send::Echo(_) | Send::OuterEcho(_) => {
                            panic!("{send:?} though all is well")
                        }
                    }
                }
            });
            assert!(known.peers.values().all(|peer| peer.course.due() >= then), "one is forgotten");
        }
        let reached = known.peers.values().filter(|it| it.course.found().reach == Reach::Reachable);
        assert_eq!(reached.count(), 1_000);
        assert!((9_000..=10_000).contains(&small), "{small} small probes in 100 s");
        assert!((900..=1_000).contains(&pairs.iter().sum::<u32>()), "{pairs:?} pairs");
        assert!(pairs.iter().all(|pairs| *pairs <= 200), "not all at one time: {pairs:?}");
        assert!(wake_ups <= 400, "{wake_ups} wake-ups");
        assert_eq!(known.agenda.len(), 1_000);
    }
}
