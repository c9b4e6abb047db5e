//! When one peer is probed with what, and what its answers mean. Pure: time and packets come from
//! outside. Two rounds go on side by side: whether the peer is reached, and where it is, how large
//! packets may be on the path to it.

mod clock;
mod path;
mod reach;

use std::time::{Duration, Instant};

use self::path::PathRound;
use self::reach::ReachRound;
use super::found::{Found, Reach};

/// How often a peer is probed.
pub(super) const INTERVAL: Duration = Duration::from_secs(10);
/// How far probes of different peers lie apart at least: 1,000 peers have their turn in an interval,
/// more of them less often.
pub(super) const DISTANCE: Duration = Duration::from_millis(10);
/// How much earlier a round may begin than it is due, together with others: most of what a probe costs
/// is to wake up for it.
pub(super) const EARLY: Duration = Duration::from_millis(250);
/// Probes of the path to all peers together: where there are many, each has its turn less often.
const PATHS_A_SECOND: u32 = 10;

/// Something to send to the peer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Send {
    /// A probe in an IP packet of as many bytes as it needs.
    Small(u64),
    /// A probe in an IP packet of this length.
    Sized(u64, u16),
    /// Two probes in one send, in IP packets of this length.
    Pair([u64; 2], u16),
    /// An ICMP echo to its address on the overlay.
    Echo(u64),
    /// An ICMP echo to its outer address.
    OuterEcho(u64),
}

/// How a peer can be asked.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Means {
    /// It answers probes; else it is asked by ICMP only, which it need not answer.
    pub(super) probes: bool,
    /// We can send ICMP echoes, and hear what comes by ICMP.
    pub(super) pings: bool,
}

/// The probing of one peer.
#[derive(Debug)]
pub(super) struct Course {
    means: Means,
    found: Found,
    reach: ReachRound,
    path: PathRound,
}

impl Course {
    /// A peer that is first probed at `begin`; `mtu`: bytes of the largest packet that containers send.
    pub(super) fn new(means: Means, mtu: u16, begin: Instant) -> Self {
        Self {
            means,
            found: Found::default(),
            reach: ReachRound::new(means, begin),
            path: PathRound::new(mtu, begin),
        }
    }

    pub(super) fn found(&self) -> &Found {
        &self.found
    }

    /// Says how many peers there are, which the pace depends on.
    pub(super) fn set_pace(&mut self, peers: usize) {
        let peers = u32::try_from(peers).unwrap_or(u32::MAX);
        self.reach.clock.interval = INTERVAL.max(DISTANCE.saturating_mul(peers));
        let turns = peers.saturating_mul(1_000) / PATHS_A_SECOND;
        self.path.clock.interval = INTERVAL.max(Duration::from_millis(turns.into()));
    }

    /// When [`Course::step`] has something to do next, at the latest.
    pub(super) fn due(&self) -> Instant {
        let reach = self.reach.clock.due;
        if self.probes_path() { reach.min(self.path.clock.due) } else { reach }
    }

    /// Whether [`Course::step`] has something to do now.
    pub(super) fn can_step(&self, now: Instant) -> bool {
        self.reach.clock.can_go_on(now) || self.can_step_path(now)
    }

    fn can_step_path(&self, now: Instant) -> bool {
        self.probes_path() && self.path.clock.can_go_on(now)
    }

    fn probes_path(&self) -> bool {
        self.means.probes && self.found.reach == Reach::Reachable
    }

    /// Has the next probe go out now: the peer has shown itself.
    pub(super) fn hurry(&mut self, now: Instant) {
        if self.found.reach != Reach::Reachable {
            self.reach.clock.begin_soon(now);
        }
    }

    /// Begins a round of the path now.
    pub(super) fn probe_path_soon(&mut self, now: Instant) {
        self.path.clock.begin_soon(now);
    }

    /// What is to be sent now. `nonce` makes numbers that nobody guesses.
    pub(super) fn step(&mut self, now: Instant, mut nonce: impl FnMut() -> u64) -> Vec<Send> {
        let mut sends = Vec::new();
        if self.reach.clock.can_go_on(now) {
            self.reach.step(now, &mut self.found, &mut nonce, &mut sends);
        }
        if self.can_step_path(now) {
            self.path.step(now, &mut self.found, &mut nonce, &mut sends);
        }
        sends
    }

    /// An answer from the peer's address on the overlay: to a probe, or to an ICMP echo.
    pub(super) fn answered(&mut self, nonce: u64, intact: bool, now: Instant) {
        let was_reached = self.found.reach == Reach::Reachable;
        if self.reach.answered(nonce, now, &mut self.found) && !was_reached {
            self.path.begin_anew(now, nonce);
        }
        self.path.answered(nonce, intact, now, &mut self.found);
    }

    /// The peer's outer address answered an ICMP echo.
    pub(super) fn outer_answered(&mut self, nonce: u64) {
        self.reach.outer_answered(nonce);
    }

    /// The peer's outer address said that nothing listens on the port.
    pub(super) fn refused(&mut self) {
        self.reach.refused();
    }

    /// The peer's address on the overlay said that nothing listens where probes go.
    pub(super) fn probe_refused(&mut self) {
        self.reach.probe_refused();
    }
}

#[cfg(test)]
mod tests {
    use std::cell::Cell;

    use super::super::found::Path;
    use super::reach::REPEATS;
    use super::*;

    const MTU: u16 = 1472;
    const TICK: Duration = Duration::from_millis(10);

    /// A peer, and what lies between it and us.
    struct World {
        course: Course,
        now: Instant,
        nonces: u64,
        sends: Vec<Send>,
    }

    impl World {
        fn new(probes: bool) -> Self {
            Self::with(Means { probes, pings: true })
        }

        fn with(means: Means) -> Self {
            let now = Instant::now();
            Self { course: Course::new(means, MTU, now), now, nonces: 0, sends: Vec::new() }
        }

        /// Lets time pass; `wire` says what becomes of what is sent: the nonces that are answered.
        fn pass(&mut self, time: Duration, wire: impl Fn(&Send) -> Vec<u64>) {
            let end = self.now + time;
            while self.now < end {
                let mut nonces = self.nonces;
                let nonce = || {
                    nonces += 1;
                    nonces
                };
                // Alone, it has nobody to begin early with.
                let is_due = self.course.due() <= self.now;
                let sends = if is_due { self.course.step(self.now, nonce) } else { Vec::new() };
                self.nonces = nonces;
                self.now += TICK;
                for send in &sends {
                    for nonce in wire(send) {
                        if matches!(send, Send::OuterEcho(_)) {
                            self.course.outer_answered(nonce);
                        } else {
                            self.course.answered(nonce, true, self.now);
                        }
                    }
                }
                self.sends.extend(sends);
            }
        }

        fn reach(&self) -> Reach {
            self.course.found().reach
        }

        fn path(&self) -> Path {
            self.course.found().path
        }
    }

    fn all(send: &Send) -> Vec<u64> {
        match send {
            Send::Small(it) | Send::Sized(it, _) | Send::Echo(it) | Send::OuterEcho(it) => {
                vec![*it]
            }
            Send::Pair(pair, _) => pair.to_vec(),
        }
    }

    fn nothing(_: &Send) -> Vec<u64> {
        Vec::new()
    }

    const MINUTE: Duration = Duration::from_secs(60);
    /// An interval, and two rounds of either kind.
    const ENOUGH: Duration = Duration::from_secs(14);

    #[test]
    fn a_healthy_peer_costs_one_small_probe_and_one_pair_in_ten_seconds() {
        let mut world = World::new(true);
        world.pass(MINUTE, all);
        assert_eq!((world.reach(), world.path()), (Reach::Reachable, Path::Full));
        let small = world.sends.iter().filter(|send| matches!(send, Send::Small(_))).count();
        assert_eq!((small, world.sends.len() - small), (6, 6));
        let found = world.course.found();
        assert_eq!((found.sent, found.answered, found.loss_percent()), (6, 6, Some(0)));
        assert_eq!(found.rtt_counts.iter().sum::<u64>(), 6);
        assert_eq!(found.rtt_counts[6], 6, "10 ms");
    }

    #[test]
    fn many_peers_have_their_paths_probed_less_often() {
        let mut world = World::new(true);
        world.course.set_pace(1_000);
        world.pass(MINUTE, all);
        world.pass(MINUTE * 4, all);
        let pairs = world.sends.iter().filter(|send| matches!(send, Send::Pair(..))).count();
        assert_eq!(pairs, 3, "one in 100 s, the first after 90");
        let small = |world: &World| {
            world.sends.iter().filter(|send| matches!(send, Send::Small(_))).count()
        };
        let before = small(&world);
        world.course.set_pace(6_000);
        world.pass(MINUTE * 10, all);
        let more = small(&world) - before;
        assert!((10..=11).contains(&more), "one in 60 s, not {more} in 600 s");
    }

    #[test]
    fn a_peer_that_is_gone_is_told_with_the_reason() {
        for (wire, expected) in [
            (nothing as fn(&Send) -> Vec<u64>, Reach::Silent),
            (|it| if matches!(it, Send::OuterEcho(_)) { all(it) } else { vec![] }, Reach::Blocked),
            (|it| if matches!(it, Send::Echo(_)) { all(it) } else { vec![] }, Reach::EchoOnly),
        ] {
            let mut world = World::new(true);
            world.pass(MINUTE, all);
            world.pass(ENOUGH, wire);
            assert_eq!(world.reach(), expected);
            world.pass(ENOUGH, all);
            assert_eq!(world.reach(), Reach::Reachable);
        }
    }

    #[test]
    fn a_refusal_is_told_from_a_block() {
        let mut world = World::new(true);
        let one = Duration::from_secs(1);
        world.pass(one, nothing);
        world.course.refused();
        world.pass(ENOUGH, nothing);
        // The next round without a refusal knows no better than that nothing answers.
        assert_eq!(world.reach(), Reach::Silent);
        let mut world = World::new(true);
        world.pass(one, nothing);
        world.course.refused();
        world.pass(3 * one, nothing);
        assert_eq!(world.reach(), Reach::Refused);
    }

    /// vxlan's device stays when weftd stops, and host-gw has none: the kernel goes on answering.
    #[test]
    fn a_daemon_that_has_ended_is_told_from_a_broken_offload() {
        let echoes = |it: &Send| {
            if matches!(it, Send::Echo(_) | Send::OuterEcho(_)) { all(it) } else { vec![] }
        };
        let mut world = World::new(true);
        world.pass(MINUTE, all);
        let probes = world.sends.len();
        while world.sends.len() == probes {
            world.pass(TICK, echoes);
        }
        world.course.probe_refused();
        world.pass(ENOUGH - INTERVAL, echoes);
        assert_eq!(world.reach(), Reach::NoDaemon);
        assert_eq!(world.course.found().blamed().count(), 0);
        world.pass(ENOUGH, all);
        assert_eq!(world.reach(), Reach::Reachable);
    }

    #[test]
    fn one_lost_probe_is_loss_and_nothing_else() {
        let mut world = World::new(true);
        world.pass(Duration::from_millis(500), nothing);
        world.pass(MINUTE, all);
        assert_eq!(world.reach(), Reach::Reachable);
        let found = world.course.found();
        assert_eq!(found.sent - found.answered, 1);
        assert!(found.loss_percent().unwrap() > 0);
    }

    #[test]
    fn a_flannel_peer_is_asked_by_icmp_and_never_called_down() {
        let mut world = World::new(false);
        world.pass(MINUTE, nothing);
        assert_eq!(world.reach(), Reach::Unknown);
        assert_eq!((world.course.found().sent, world.course.found().loss_percent()), (0, None));
        assert!(world.sends.iter().all(|send| matches!(send, Send::Echo(_))));
        assert_eq!(world.sends.len(), 6, "nobody waits for an answer");
        world.pass(MINUTE, all);
        assert_eq!((world.reach(), world.path()), (Reach::Reachable, Path::Unknown));
        world.sends.clear();
        world.pass(MINUTE, nothing);
        assert_eq!(world.reach(), Reach::Unknown);
        assert_eq!(world.sends.len(), 6 + usize::from(REPEATS), "one silence was news");
    }

    #[test]
    fn without_pings_nothing_is_said_of_the_reason() {
        let mut world = World::with(Means { probes: true, pings: false });
        world.pass(MINUTE, nothing);
        assert_eq!(world.reach(), Reach::Unanswered);
        assert!(world.sends.iter().all(|send| matches!(send, Send::Small(_))));
        world.pass(ENOUGH, all);
        assert_eq!(world.reach(), Reach::Reachable);
    }

    #[test]
    fn a_narrow_path_and_its_size_are_found_and_lost_again() {
        let carries = |max: u16| {
            move |send: &Send| {
                let too_long =
                    matches!(send, Send::Sized(_, len) | Send::Pair(_, len) if *len > max);
                if too_long { vec![] } else { all(send) }
            }
        };
        let mut world = World::new(true);
        world.pass(ENOUGH, carries(1_420));
        assert_eq!((world.reach(), world.path()), (Reach::Reachable, Path::UpTo(1_400)));
        world.pass(ENOUGH, all);
        assert_eq!(world.path(), Path::Full);
    }

    #[test]
    fn a_broken_offload_is_told_from_a_narrow_path() {
        let no_pairs = |it: &Send| if matches!(it, Send::Pair(..)) { vec![] } else { all(it) };
        let mut world = World::new(true);
        world.pass(MINUTE, all);
        world.pass(ENOUGH, no_pairs);
        assert_eq!(world.path(), Path::NoOffload);
        // The pairs of one round are ordinary loss.
        let mut world = World::new(true);
        world.pass(MINUTE, all);
        let lost = Cell::new(0);
        world.pass(ENOUGH, |it| {
            let is_lost = matches!(it, Send::Pair(..)) && lost.get() < 3;
            lost.set(lost.get() + u8::from(is_lost));
            if is_lost { vec![] } else { all(it) }
        });
        assert_eq!((world.path(), lost.get()), (Path::Full, 3));
        // So is half a pair.
        let mut world = World::new(true);
        world.pass(ENOUGH, |it| if let Send::Pair(pair, _) = it { vec![pair[0]] } else { all(it) });
        assert_eq!(world.path(), Path::Unknown);
    }

    #[test]
    fn damage_is_told() {
        let mut world = World::new(true);
        world.pass(TICK, all);
        let now = world.now;
        let [Send::Pair(pair, _)] = world.course.step(now, || 99)[..] else { panic!() };
        world.course.answered(pair[0], false, now);
        world.pass(ENOUGH, nothing);
        assert_eq!(world.path(), Path::Damaged);
    }
}
