//! How many packets to look for behind a first one: a look in vain costs a tenth of a microsecond or
//! so, and a submission of its own for each packet more.

/// The most that is looked for at first.
const FIRST: u16 = 8;

/// What has come, and is expected, of packets that come in bursts.
#[derive(Debug, Default)]
pub(super) struct Burst {
    /// Looks that are under way; 0 between submissions.
    looks: u16,
    /// Packets of this submission so far.
    all: u16,
    /// Packets of the last submission.
    before: u16,
    /// How many came behind a first one, the last time that one came.
    following: u16,
}

impl Burst {
    /// How many to look for now that these have come; 0 ends the submission. At first about as many as
    /// the last time, then ever more, but no more than `most` in all. Where single packets come and
    /// go, no look is in vain.
    pub(super) fn next(&mut self, found: u16, most: u16) -> u16 {
        self.all += found;
        let wanted = match self.looks {
            _ if self.all == 0 => 0,
            0 => self.following.max(self.before.min(1)).min(FIRST),
            looks if found < looks => 0,
            _ => self.all,
        };
        self.looks = wanted.min(most.saturating_sub(self.all));
        if self.looks == 0 {
            self.following = self.all.checked_sub(1).unwrap_or(self.following);
            self.before = std::mem::take(&mut self.all);
        }
        self.looks
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MOST: u16 = 128;

    /// One submission with this many packets waiting: how many it takes, and how many looks at once.
    fn submit(burst: &mut Burst, waiting: u16) -> (u16, Vec<u16>) {
        let (mut taken, mut found, mut looks) = (0, waiting.min(1), Vec::new());
        loop {
            taken += found;
            match burst.next(found, MOST) {
                0 => return (taken, looks),
                next => looks.push(next),
            }
            found = looks[looks.len() - 1].min(waiting - taken);
        }
    }

    #[test]
    fn lone_packets_cost_no_look() {
        let mut burst = Burst::default();
        for _ in 0..10 {
            assert_eq!(submit(&mut burst, 1), (1, vec![]));
            // What it was answered with has gone out, and nothing else is there.
            assert_eq!(submit(&mut burst, 0), (0, vec![]));
        }
    }

    #[test]
    fn a_burst_is_taken_in_a_few_looks_once_bursts_come() {
        let mut burst = Burst::default();
        // Nobody expects the first.
        assert_eq!(submit(&mut burst, 50), (1, vec![]));
        assert_eq!(submit(&mut burst, 49), (49, vec![1, 2, 4, 8, 16, 32]));
        assert_eq!(submit(&mut burst, 0), (0, vec![]));
        assert_eq!(submit(&mut burst, 50), (50, vec![8, 9, 18, 36]));
        assert_eq!(submit(&mut burst, 1000), (MOST, vec![8, 9, 18, 36, 56]));
    }

    #[test]
    fn looks_in_vain_are_no_more_than_packets_and_the_first_few() {
        let mut burst = Burst::default();
        for waiting in [3, 0, 70, 1, 1, 0, 128, 2, 9, 0, 1, 0, 1, 500, 4] {
            let (taken, looks) = submit(&mut burst, waiting);
            assert!(taken <= MOST, "{waiting}");
            let vain = looks.iter().sum::<u16>() + waiting.min(1) - taken;
            assert!(vain <= taken.max(FIRST), "{waiting} waiting: {looks:?}");
        }
    }
}
