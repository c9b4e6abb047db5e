//! The round of reach: a small probe each ten seconds. One that stays without an answer is repeated at
//! once, three times; beside the repeats go ICMP echoes, to the peer's address on the overlay and to its
//! outer one, which tell why. One of flannel's gets echoes alone, and repeats only once it has answered.

use std::time::{Duration, Instant};

use super::super::found::{Found, Reach};
use super::clock::Clock;
use super::{Means, Send};

/// How long an answer may take before the probe is repeated.
const PATIENCE: Duration = Duration::from_millis(750);
pub(super) const REPEATS: u8 = 3;

#[derive(Debug)]
pub(super) struct ReachRound {
    pub(super) clock: Clock,
    means: Means,
    /// When the next round begins.
    next: Instant,
    small: Vec<(u64, Instant)>,
    echoes: Vec<u64>,
    outer_echoes: Vec<u64>,
    echo_answers: bool,
    outer_answers: bool,
    /// At its outer address.
    refused: bool,
    probe_refused: bool,
}

impl ReachRound {
    pub(super) fn new(means: Means, begin: Instant) -> Self {
        Self {
            clock: Clock::new(begin),
            means,
            next: begin,
            small: Vec::new(),
            echoes: Vec::new(),
            outer_echoes: Vec::new(),
            echo_answers: false,
            outer_answers: false,
            refused: false,
            probe_refused: false,
        }
    }

    pub(super) fn step(
        &mut self,
        now: Instant,
        found: &mut Found,
        nonce: &mut dyn FnMut() -> u64,
        sends: &mut Vec<Send>,
    ) {
        if self.clock.tries == 0 {
            self.small.clear();
            self.echoes.clear();
            self.outer_echoes.clear();
            (self.echo_answers, self.outer_answers) = (false, false);
            (self.refused, self.probe_refused) = (false, false);
            self.next = now + self.clock.interval;
        } else {
            // One of flannel's loses nothing by not answering.
            if self.means.probes {
                found.count(false);
            }
            if self.clock.tries > self.repeats(found) {
                found.reach = self.unreachable();
                return self.clock.end(self.next);
            }
        }
        self.clock.wait(now, PATIENCE);
        let small = nonce();
        self.small.push((small, now));
        if !self.means.probes {
            return sends.push(Send::Echo(small));
        }
        sends.push(Send::Small(small));
        if self.clock.tries > 1 && self.means.pings {
            let (echo, outer) = (nonce(), nonce());
            self.echoes.push(echo);
            self.outer_echoes.push(outer);
            sends.extend([Send::Echo(echo), Send::OuterEcho(outer)]);
        }
    }

    /// Where nobody needs to answer, silence is news only after an answer.
    fn repeats(&self, found: &Found) -> u8 {
        let is_news = self.means.probes || found.reach == Reach::Reachable;
        if is_news { REPEATS } else { 0 }
    }

    /// What it means that nothing has come back.
    fn unreachable(&self) -> Reach {
        match self {
            _ if !self.means.probes => Reach::Unknown,
            _ if !self.means.pings => Reach::Unanswered,
            // Nobody is there to take a probe: that its kernel still answers echoes blames no offload.
            Self { probe_refused: true, .. } => Reach::NoDaemon,
            Self { echo_answers: true, .. } => Reach::EchoOnly,
            Self { refused: true, .. } => Reach::Refused,
            Self { outer_answers: true, .. } => Reach::Blocked,
            Self { .. } => Reach::Silent,
        }
    }

    /// An answer from the peer's address on the overlay. Says whether it is one to a small probe.
    pub(super) fn answered(&mut self, nonce: u64, now: Instant, found: &mut Found) -> bool {
        let Some((_, sent)) = self.small.iter().find(|(it, _)| *it == nonce) else {
            self.echo_answers |= self.echoes.contains(&nonce);
            return false;
        };
        found.count_rtt(now.saturating_duration_since(*sent));
        found.reach = Reach::Reachable;
        self.small.retain(|(it, _)| *it != nonce);
        // One that comes late was counted as lost.
        if self.clock.tries > 0 {
            found.count(true);
            self.clock.end(self.next);
        }
        true
    }

    pub(super) fn outer_answered(&mut self, nonce: u64) {
        self.outer_answers |= self.outer_echoes.contains(&nonce);
    }

    pub(super) fn refused(&mut self) {
        self.refused |= self.clock.tries > 0;
    }

    pub(super) fn probe_refused(&mut self) {
        self.probe_refused |= self.clock.tries > 0;
    }
}
