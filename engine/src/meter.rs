//! What can be read of a running engine, without a word to its threads.

use std::sync::Arc;

use crate::IoKind;
use crate::features::{Feature, FeatureState, Features};
use crate::io::Direction;
use crate::stats::{Counter, Distribution, Histogram, LaneStats};

/// Reads an engine's counters and features. A clone reads the same engine, also after its end.
#[derive(Debug, Clone)]
pub struct EngineMeter {
    io: IoKind,
    features: Arc<Features>,
    /// One a direction of a worker.
    stats: Arc<[(Direction, Arc<LaneStats>)]>,
}

impl EngineMeter {
    pub(crate) fn new(
        io: IoKind,
        features: Arc<Features>,
        stats: Arc<[(Direction, Arc<LaneStats>)]>,
    ) -> Self {
        Self { io, features, stats }
    }

    /// How input and output are done.
    pub fn io(&self) -> IoKind {
        self.io
    }

    /// What the kernel does for many packets at once.
    pub fn features(&self) -> impl Iterator<Item = (Feature, FeatureState)> {
        Feature::ALL.into_iter().map(|feature| (feature, self.features.state(feature)))
    }

    /// A counter, summed over all workers.
    pub fn counter(&self, counter: Counter) -> u64 {
        self.stats.iter().map(|(_, stats)| stats.get(counter)).sum()
    }

    /// A distribution of a direction, summed over all workers.
    pub fn distribution(&self, direction: Direction, distribution: Distribution) -> Histogram {
        let mut sum = Histogram::default();
        for (_, stats) in self.stats.iter().filter(|(its, _)| *its == direction) {
            stats.add_to(&mut sum, distribution);
        }
        sum
    }

    /// All counters.
    pub fn counters(&self) -> impl Iterator<Item = (Counter, u64)> {
        Counter::ALL.iter().map(|counter| (*counter, self.counter(*counter)))
    }
}
