//! What probes found of a peer, and the words for it.

use std::net::SocketAddr;
use std::time::Duration;

use super::Target;
use crate::status::ProbeStatus;

/// Outcomes that loss is reckoned from.
const HISTORY: u32 = 64;

/// Bounds of the round trip times that are counted together, in microseconds; the last count is of
/// all above.
pub(crate) const RTT_BOUNDS_US: [u64; 11] =
    [100, 250, 500, 1_000, 2_500, 5_000, 10_000, 25_000, 50_000, 100_000, 250_000];

/// Whether packets get to the peer and back.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(crate) enum Reach {
    #[default]
    Unknown,
    Reachable,
    /// Its address on the overlay says that nobody takes probes; a firewall may say so, too.
    NoDaemon,
    /// Its address on the overlay answers ICMP echoes, but no probes.
    EchoOnly,
    /// Its host says that nothing listens on the backend's port; a firewall may say so, too.
    Refused,
    /// Its host answers at its outer address, but nothing gets there through the overlay.
    Blocked,
    /// Nothing answers, neither inside the overlay nor outside.
    Silent,
    /// No probes are answered, and without pings nobody knows why.
    Unanswered,
}

/// What the path does with large packets.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(crate) enum Path {
    #[default]
    Unknown,
    /// They get through, also cut out of larger ones.
    Full,
    /// Only packets up to this many bytes get through.
    UpTo(u16),
    /// They get through one by one, but not cut out of larger ones by an offload.
    NoOffload,
    /// They arrive damaged.
    Damaged,
}

/// Counts of round trip times, by [`RTT_BOUNDS_US`].
pub(crate) type RttCounts = [u64; RTT_BOUNDS_US.len() + 1];

/// What is known of a peer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(crate) struct Found {
    pub(crate) reach: Reach,
    pub(crate) path: Path,
    /// The largest packet that got through.
    pub(crate) path_mtu: Option<u16>,
    pub(crate) rtt: Option<Duration>,
    pub(crate) rtt_counts: RttCounts,
    /// All round trips together.
    pub(crate) rtt_total: Duration,
    pub(crate) sent: u64,
    pub(crate) answered: u64,
    /// Of the last probes, one bit each: 1 is answered.
    history: u64,
}

impl Found {
    /// Percent of the last 64 small probes that stayed without an answer.
    pub(crate) fn loss_percent(&self) -> Option<u8> {
        let known = u32::try_from(self.sent).unwrap_or(HISTORY).min(HISTORY);
        let recent = if known == HISTORY { u64::MAX } else { (1 << known) - 1 };
        let lost = known - (self.history & recent).count_ones();
        u8::try_from((lost * 100).checked_div(known)?).ok()
    }

    pub(super) fn count(&mut self, answered: bool) {
        self.sent += 1;
        self.answered += u64::from(answered);
        self.history = self.history << 1 | u64::from(answered);
    }

    pub(super) fn count_rtt(&mut self, rtt: Duration) {
        self.rtt = Some(rtt);
        self.rtt_total += rtt;
        let us = u64::try_from(rtt.as_micros()).unwrap_or(u64::MAX);
        let at = RTT_BOUNDS_US.iter().position(|bound| us <= *bound);
        self.rtt_counts[at.unwrap_or(RTT_BOUNDS_US.len())] += 1;
    }
}

/// What the small probes of many peers came to.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(crate) struct Totals {
    pub(crate) answered: u64,
    pub(crate) lost: u64,
    pub(crate) rtt_total: Duration,
    pub(crate) rtt_counts: RttCounts,
}

impl Totals {
    pub(super) fn add(&mut self, found: &Found) {
        self.answered += found.answered;
        self.lost += found.sent - found.answered;
        self.rtt_total += found.rtt_total;
        for (total, count) in self.rtt_counts.iter_mut().zip(found.rtt_counts) {
            *total += count;
        }
    }
}

/// What status says of a peer.
pub(crate) fn status((target, found): &(Target, Found)) -> ProbeStatus {
    let us = |time: Duration| u64::try_from(time.as_micros()).unwrap_or(u64::MAX);
    let bounds = RTT_BOUNDS_US.into_iter().chain([u64::MAX]);
    let (fault, problem) = match found.reach {
        Reach::Reachable => (found.path.fault(), found.path.problem()),
        Reach::Unknown
        | Reach::NoDaemon
        | Reach::EchoOnly
        | Reach::Refused
        | Reach::Blocked
        | Reach::Silent
        | Reach::Unanswered => (found.reach.fault(), found.reach.problem().map(str::to_owned)),
    };
    ProbeStatus {
        address: target.port.map(|port| SocketAddr::new(target.inner, port)),
        reachable: match found.reach {
            Reach::Unknown => None,
            Reach::Reachable | Reach::NoDaemon | Reach::EchoOnly => Some(true),
            Reach::Refused | Reach::Blocked | Reach::Silent | Reach::Unanswered => Some(false),
        },
        fault: fault.map(str::to_owned),
        problem,
        rtt_us: found.rtt.map(us),
        rtt_total_us: us(found.rtt_total),
        rtt_counts: bounds.zip(found.rtt_counts).collect(),
        sent: found.sent,
        answered: found.answered,
        loss_percent: found.loss_percent(),
        path_mtu: found.path_mtu.map(u32::from),
    }
}

/// The words for all that may be wrong with a peer.
pub(crate) const FAULTS: [&str; 9] = [
    "no-daemon",
    "echo-only",
    "refused",
    "blocked",
    "silent",
    "unanswered",
    "narrow",
    "no-offload",
    "damaged",
];

impl Reach {
    /// In one word, of [`FAULTS`].
    fn fault(self) -> Option<&'static str> {
        match self {
            Self::Unknown | Self::Reachable => None,
            Self::NoDaemon => Some("no-daemon"),
            Self::EchoOnly => Some("echo-only"),
            Self::Refused => Some("refused"),
            Self::Blocked => Some("blocked"),
            Self::Silent => Some("silent"),
            Self::Unanswered => Some("unanswered"),
        }
    }

    /// What is wrong, if something is.
    pub(super) fn problem(self) -> Option<&'static str> {
        match self {
            Self::Unknown | Self::Reachable => None,
            Self::NoDaemon => Some(
                "can be reached, but nobody takes probes there: weftd does not run, or a firewall \
                 rejects them",
            ),
            Self::EchoOnly => Some(
                "answers pings through the overlay, but no probes by UDP: a checksum offload is \
                 broken, or a firewall there drops them",
            ),
            Self::Refused => Some(
                "cannot be reached: its host refuses the backend's port; weftd does not run there, or \
                 a firewall rejects it",
            ),
            Self::Blocked => Some(
                "cannot be reached: its host answers pings, but the overlay's packets get lost: a \
                 firewall drops the backend's port, or weftd there hangs or does not know this node; \
                 `weft doctor` there tells",
            ),
            Self::Silent => {
                Some("cannot be reached: its host does not answer at all; it is down, or cut off")
            }
            Self::Unanswered => {
                Some("cannot be reached; weftd may not ping to find out why: it needs CAP_NET_RAW")
            }
        }
    }
}

impl Path {
    /// In one word, of [`FAULTS`].
    fn fault(self) -> Option<&'static str> {
        match self {
            Self::Unknown | Self::Full => None,
            Self::UpTo(_) => Some("narrow"),
            Self::NoOffload => Some("no-offload"),
            Self::Damaged => Some("damaged"),
        }
    }

    /// What is wrong, if something is.
    pub(super) fn problem(self) -> Option<String> {
        match self {
            Self::Unknown | Self::Full => None,
            Self::UpTo(len) => Some(format!(
                "packets of more than {len} bytes get lost on the way; lower the interface's MTU, or \
                 mend the path"
            )),
            Self::NoOffload => Some(
                "packets that an offload cuts out of larger ones get lost on the way; the network \
                 card or its driver is broken (tx-udp-segmentation)"
                    .into(),
            ),
            Self::Damaged => Some(
                "packets arrive damaged, with checksums that are right: an offload of a network card \
                 on the way is broken"
                    .into(),
            ),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_fault_is_one_of_the_words() {
        use Path::{Damaged, NoOffload, UpTo};
        use Reach::{Blocked, EchoOnly, NoDaemon, Refused, Silent, Unanswered};
        let reach = [NoDaemon, EchoOnly, Refused, Blocked, Silent, Unanswered].map(Reach::fault);
        let path = [UpTo(1400), NoOffload, Damaged].map(Path::fault);
        let words: Vec<&str> = reach.into_iter().chain(path).flatten().collect();
        assert_eq!(words, FAULTS);
    }
}
