//! Medians with minimum and maximum, and ratios of what ran in the same repeat.

use crate::run::Sample;
use crate::subject::Subject;
use crate::topology::Mode;

/// One figure over all repeats.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Spread {
    pub median: f64,
    pub min: f64,
    pub max: f64,
}

impl Spread {
    /// `None` of nothing.
    pub fn of(values: impl IntoIterator<Item = f64>) -> Option<Self> {
        let mut values: Vec<f64> = values.into_iter().collect();
        values.sort_by(f64::total_cmp);
        let (min, max) = (*values.first()?, *values.last()?);
        let middle = values.len() / 2;
        let median = if values.len() % 2 == 1 {
            values[middle]
        } else {
            f64::midpoint(values[middle - 1], values[middle])
        };
        Some(Self { median, min, max })
    }
}

/// A figure of a subject in a mode.
pub fn figure(samples: &[Sample], mode: Mode, subject: Subject, name: &str) -> Option<Spread> {
    let of = |sample: &&Sample| (sample.mode, sample.subject) == (mode, subject);
    Spread::of(samples.iter().filter(of).filter_map(|it| it.figures.get(name).copied()))
}

/// A figure of a subject divided by another's, repeat by repeat.
pub fn ratio(
    samples: &[Sample],
    mode: Mode,
    (subject, other): (Subject, Subject),
    name: &str,
) -> Option<Spread> {
    let value = |subject: Subject, repeat: usize| {
        let of = |it: &&Sample| (it.mode, it.subject, it.repeat) == (mode, subject, repeat);
        samples.iter().find(of)?.figures.get(name).copied()
    };
    let repeats = samples.iter().map(|sample| sample.repeat + 1).max().unwrap_or(0);
    let ratios = (0..repeats).filter_map(|repeat| {
        Some(value(subject, repeat)? / value(other, repeat).filter(|value| *value != 0.0)?)
    });
    Spread::of(ratios)
}

/// What the engine is to reach, as a ratio.
#[derive(Debug, Clone, Copy)]
pub struct Target {
    pub what: &'static str,
    pub figure: &'static str,
    pub modes: &'static [Mode],
    pub subject: Subject,
    pub other: Subject,
    pub bound: Bound,
}

/// On which side of the number a ratio is good.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Bound {
    AtLeast(f64),
    AtMost(f64),
}

impl Bound {
    pub fn holds(self, ratio: f64) -> bool {
        match self {
            Self::AtLeast(bound) => ratio >= bound,
            Self::AtMost(bound) => ratio <= bound,
        }
    }
}

const fn target(
    what: &'static str,
    figure: &'static str,
    modes: &'static [Mode],
    other: Subject,
    bound: Bound,
) -> Target {
    Target { what, figure, modes, subject: Subject::WeftUring, other, bound }
}

/// All of them, in the order of the table that they are printed as.
pub const TARGETS: [Target; 25] = {
    use Bound::{AtLeast, AtMost};
    use Mode::{Offload, Wire, WireGro};
    use Subject::{Naive, Vxlan, WeftBusy, WeftManyRoutes, WeftMmsg, WeftOneRoute, WeftUring};
    const WIRES: &[Mode] = &[Wire];
    const GRO: &[Mode] = &[WireGro];
    const WHOLE: &[Mode] = &[Offload];
    const ALL: &[Mode] = &[Wire, WireGro, Offload];
    const fn mmsg(what: &'static str, figure: &'static str) -> Target {
        let bound = AtLeast(0.9);
        Target { what, figure, modes: ALL, subject: WeftMmsg, other: WeftUring, bound }
    }
    [
        target("TCP, 1 stream", "tcp1_gbit", GRO, Naive, AtLeast(6.0)),
        target("TCP, 4 streams", "tcp4_gbit", GRO, Naive, AtLeast(6.0)),
        target("TCP, 1 stream", "tcp1_gbit", GRO, Vxlan, AtLeast(1.2)),
        target("TCP, 4 streams", "tcp4_gbit", GRO, Vxlan, AtLeast(1.2)),
        target("TCP, 1 stream", "tcp1_gbit", WIRES, Naive, AtLeast(4.5)),
        target("TCP, 4 streams", "tcp4_gbit", WIRES, Naive, AtLeast(4.5)),
        target("TCP, 1 stream", "tcp1_gbit", WIRES, Vxlan, AtLeast(1.15)),
        target("TCP, 4 streams", "tcp4_gbit", WIRES, Vxlan, AtLeast(1.15)),
        target("TCP, 1 stream", "tcp1_gbit", WHOLE, Naive, AtLeast(12.0)),
        target("TCP, 1 stream", "tcp1_gbit", WHOLE, Vxlan, AtLeast(1.0)),
        target("UDP 64 B, flood", "udp64_flood_kpps", ALL, Naive, AtLeast(2.2)),
        target("UDP 64 B, flood", "udp64_flood_kpps", ALL, Vxlan, AtLeast(1.5)),
        target("CPU at 100 kpps of 64 B", "paced_cpus", ALL, Naive, AtMost(0.6)),
        target("CPU at 100 kpps of 64 B", "paced_cpus", ALL, Vxlan, AtMost(0.85)),
        // The same by packets that arrived: at this rate others lose or do not send what weft carries.
        target("CPU s/Mp at 100 kpps of 64 B", "paced_cpu_s_per_mp", ALL, Naive, AtMost(0.6)),
        target("CPU s/Mp at 100 kpps of 64 B", "paced_cpu_s_per_mp", ALL, Vxlan, AtMost(0.85)),
        target("CPU s/GB, 1 stream", "tcp1_cpu_s_per_gb", GRO, Naive, AtMost(0.15)),
        target("CPU s/GB, 1 stream", "tcp1_cpu_s_per_gb", GRO, Vxlan, AtMost(1.0)),
        target("round trip p50, idle", "rtt_p50_us", ALL, Naive, AtMost(0.9)),
        target("round trip p50, idle", "rtt_p50_us", ALL, Vxlan, AtMost(1.15)),
        Target {
            what: "round trip p50, busy polling",
            figure: "rtt_p50_us",
            modes: ALL,
            subject: WeftBusy,
            other: Vxlan,
            bound: AtMost(0.6),
        },
        mmsg("mmsg beside uring: TCP, 1 stream", "tcp1_gbit"),
        mmsg("mmsg beside uring: TCP, 4 streams", "tcp4_gbit"),
        mmsg("mmsg beside uring: UDP 64 B", "udp64_flood_kpps"),
        Target {
            what: "65,000 routes, random destinations",
            figure: "scattered_kpps",
            modes: WIRES,
            subject: WeftManyRoutes,
            other: WeftOneRoute,
            bound: AtLeast(0.9),
        },
    ]
};

#[cfg(test)]
mod tests {
    use super::*;

    fn sample(subject: Subject, repeat: usize, value: f64) -> Sample {
        let figures = [("tcp1_gbit".to_owned(), value)].into();
        Sample { mode: Mode::Wire, subject, repeat, figures }
    }

    #[test]
    fn medians_of_odd_and_even_counts() {
        let spread = |values: &[f64]| Spread::of(values.iter().copied());
        assert_eq!(spread(&[3.0, 1.0, 2.0]), Some(Spread { median: 2.0, min: 1.0, max: 3.0 }));
        assert_eq!(spread(&[4.0, 1.0]), Some(Spread { median: 2.5, min: 1.0, max: 4.0 }));
        assert_eq!(spread(&[]), None);
    }

    #[test]
    fn ratios_pair_what_ran_in_one_repeat() {
        use Subject::{Naive, Vxlan};
        let samples = [
            sample(Vxlan, 0, 10.0),
            sample(Naive, 0, 2.0),
            sample(Vxlan, 1, 3.0),
            sample(Naive, 1, 1.0),
            sample(Vxlan, 2, 8.0),
        ];
        let ratio = ratio(&samples, Mode::Wire, (Vxlan, Naive), "tcp1_gbit").unwrap();
        assert_eq!(ratio, Spread { median: 4.0, min: 3.0, max: 5.0 });
        let figure = figure(&samples, Mode::Wire, Vxlan, "tcp1_gbit").unwrap();
        assert_eq!(figure, Spread { median: 8.0, min: 3.0, max: 10.0 });
    }

    #[test]
    fn bounds_hold_on_their_side() {
        assert!(Bound::AtLeast(2.0).holds(2.0) && !Bound::AtLeast(2.0).holds(1.9));
        assert!(Bound::AtMost(0.6).holds(0.5) && !Bound::AtMost(0.6).holds(0.7));
    }
}
