//! The round of path: two packets of full size in one send, which go as one through whatever cuts
//! packets on the way (UDP segmentation offload). If they do not come through, single packets of several
//! sizes tell whether it is their size or their company.

use std::time::{Duration, Instant};

use super::super::found::{Found, Path};
use super::clock::Clock;
use super::{INTERVAL, Send};

/// How long answers may take before more is sent, and up to half as long again.
const PATIENCE: Duration = Duration::from_millis(250);
/// Pairs in turn with single packets; a pair begins and ends.
const TRIES: u8 = 5;
/// IP packets' lengths that are tried where full size does not get through: what tunnels and links
/// commonly carry.
const SIZES: [u16; 7] = [576, 1_280, 1_350, 1_400, 1_422, 1_450, 1_472];

/// Rounds in a row that have to come to the same before it is believed: packets get lost by chance, too, and
/// what is given up for the sake of a path stays so.
const ROUNDS: u8 = 2;

#[derive(Debug)]
pub(super) struct PathRound {
    pub(super) clock: Clock,
    /// What the last rounds came to, and how many in a row.
    verdict: (Option<Path>, u8),
    /// Bytes of the largest packet that containers send.
    mtu: u16,
    pairs: Vec<[(u64, bool); 2]>,
    sized: Vec<(u64, u16, bool)>,
    damaged: bool,
}

impl PathRound {
    pub(super) fn new(mtu: u16, begin: Instant) -> Self {
        let clock = Clock::new(begin);
        let (pairs, sized) = (Vec::new(), Vec::new());
        Self { clock, verdict: (None, 0), mtu, pairs, sized, damaged: false }
    }

    /// Begins anew with a peer that has just been reached. `die`: any number. Where there are many peers
    /// all are reached within one interval, and their paths are probed in more than one: each begins at
    /// a time of its own.
    pub(super) fn begin_anew(&mut self, now: Instant, die: u64) {
        self.verdict = (None, 0);
        let part = self::die(die);
        self.clock.end(now + (self.clock.interval - INTERVAL) * part / u32::from(u8::MAX));
    }

    pub(super) fn step(
        &mut self,
        now: Instant,
        found: &mut Found,
        nonce: &mut dyn FnMut() -> u64,
        sends: &mut Vec<Send>,
    ) {
        if self.clock.tries == 0 {
            self.pairs.clear();
            self.sized.clear();
            self.damaged = false;
        }
        if self.clock.tries == TRIES {
            let verdict = self.judge();
            let times = if verdict == self.verdict.0 { self.verdict.1 } else { 0 };
            self.verdict = (verdict, (times + 1).min(ROUNDS));
            return match verdict {
                Some(path) if self.is_in_doubt(path, found) => self.clock.end(now),
                _ => {
                    verdict.into_iter().for_each(|path| self.note(path, found));
                    self.clock.end(now + self.clock.interval);
                }
            };
        }
        // Not in step with what comes and goes.
        self.clock.wait(now, PATIENCE + PATIENCE * die(nonce()) / 510);
        if self.clock.tries % 2 == 1 {
            let pair = [nonce(), nonce()];
            self.pairs.push(pair.map(|nonce| (nonce, false)));
            return sends.push(Send::Pair(pair, self.mtu));
        }
        // In ascending order: the engine would join a packet with a shorter one behind it.
        let shorter = SIZES.into_iter().filter(|len| *len < self.mtu);
        for len in shorter.chain([self.mtu]) {
            let sized = nonce();
            self.sized.push((sized, len, false));
            sends.push(Send::Sized(sized, len));
        }
    }

    /// Damage is none by chance.
    fn is_in_doubt(&self, path: Path, found: &Found) -> bool {
        self.verdict.1 < ROUNDS && path != Path::Damaged && path != found.path
    }

    /// What it means that no pair has come through whole; nothing if that is too little to say.
    fn judge(&self) -> Option<Path> {
        let Self { mtu, pairs, sized, damaged, .. } = self;
        if *damaged {
            return Some(Path::Damaged);
        }
        let arrived = sized.iter().filter(|(_, _, answered)| *answered);
        let largest = arrived.map(|(_, len, _)| *len).max()?;
        if largest < *mtu {
            return Some(Path::UpTo(largest));
        }
        let mut full = sized.iter().filter(|(_, len, _)| len == mtu);
        let singles_pass = full.all(|(_, _, answered)| *answered);
        let pairs_pass = pairs.iter().flatten().any(|(_, answered)| *answered);
        (singles_pass && !pairs_pass).then_some(Path::NoOffload)
    }

    fn note(&self, path: Path, found: &mut Found) {
        found.path = path;
        found.path_mtu = match path {
            Path::UpTo(len) => Some(len),
            Path::Full | Path::NoOffload => Some(self.mtu),
            Path::Unknown | Path::Damaged => found.path_mtu,
        };
    }

    /// An answer from the peer's address on the overlay.
    pub(super) fn answered(&mut self, nonce: u64, intact: bool, now: Instant, found: &mut Found) {
        let sized = self.sized.iter_mut().find(|(it, _, _)| *it == nonce);
        if let Some((_, _, answered)) = sized {
            *answered = true;
            self.damaged |= !intact;
            return;
        }
        let pair = self.pairs.iter_mut().find(|pair| pair.iter().any(|(it, _)| *it == nonce));
        let Some(pair) = pair else { return };
        for (_, answered) in pair.iter_mut().filter(|(it, _)| *it == nonce) {
            *answered = true;
        }
        let is_whole = pair.iter().all(|(_, answered)| *answered);
        self.damaged |= !intact;
        if self.clock.tries > 0 && is_whole && !self.damaged {
            self.verdict = (None, 0);
            self.note(Path::Full, found);
            self.clock.end(now + self.clock.interval);
        }
    }
}

/// A number up to 255, by any number.
fn die(number: u64) -> u32 {
    number.to_le_bytes()[0].into()
}
