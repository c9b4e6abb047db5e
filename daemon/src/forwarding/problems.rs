//! What is not as it should be, as it is logged and told.

use std::collections::{BTreeSet, HashSet};
use std::net::IpAddr;
use std::time::Duration;

use tokio::time::Instant;
use weft_backends::Desired;

use super::turn::Turn;
use super::vanished;

/// A problem that comes back sooner is not logged once more.
const LOGGED_AGAIN: Duration = Duration::from_secs(60);

impl Turn {
    /// What is given up towards a peer is forgotten with the peer.
    pub(super) fn forget_given_up(&mut self, desired: &Desired) {
        if !self.given_up.is_empty() {
            let addresses: HashSet<IpAddr> = desired.public_addresses();
            self.given_up.retain(|(_, peer)| peer.is_none_or(|peer| addresses.contains(&peer)));
        }
    }

    /// While the registry cannot be read, that tells why writes fail. They are not mended by that.
    pub(super) fn forget_writes(&mut self) {
        for problem in self.renewals.problem().into_iter().chain(self.records.problem()) {
            self.unresolved.remove(&problem);
        }
        (self.renewals, self.records) = Default::default();
    }

    /// Takes in what keeps our own part in forwarding from being right: what the backend says, and what is
    /// known besides.
    pub(super) fn fails_in(&mut self, mut failures: Vec<String>) {
        if self.readable == Some(false) && self.tenure.lease.attrs != self.identity.attrs {
            failures.push(
                "the registry tells peers what this node was before, and cannot be told otherwise now: \
                 they do not reach it until it can"
                    .into(),
            );
        }
        failures.extend(self.stuck.iter().map(|reason| {
            format!(
                "the external interface cannot be followed ({reason}); it stays {}",
                self.interface
            )
        }));
        if self.repairs.is_fight() {
            failures.push(
                "another program keeps changing links or routes of weft's; they are put right every \
                 30 s only"
                    .into(),
            );
        }
        let unwritten = self.subnet_file.as_ref().and_then(|written| written.as_ref().err());
        failures.extend(unwritten.cloned());
        self.failures = failures;
    }

    /// Takes in all that could not be done, with what is known besides, and logs what is news.
    pub(super) fn has_problems(&mut self, found: impl Iterator<Item = String>) {
        let waits = self.vanished.as_ref().map(|_| vanished::PROBLEM.to_owned());
        let writes = self.renewals.problem().into_iter().chain(self.records.problem());
        let config = self.config_problem.iter().chain(&self.rival).chain(&self.forgetful);
        let host = self.in_the_way.iter().chain(&self.failures);
        let problems = found.chain(waits).chain(writes).chain(config.chain(host).cloned());
        let mut problems: BTreeSet<String> = problems.collect();
        self.logged.retain(|_, at| at.elapsed() < LOGGED_AGAIN);
        for problem in &problems {
            if !self.unresolved.contains(problem) && !self.logged.contains_key(problem) {
                tracing::warn!("{problem}");
                self.logged.insert(problem.clone(), Instant::now());
                self.unresolved.insert(problem.clone());
            }
        }
        self.unresolved.retain(|problem| {
            let stays = problems.contains(problem);
            if !stays {
                tracing::info!("resolved: {problem}");
            }
            stays
        });
        // Those were told as they came.
        problems.extend(self.given_up.iter().map(|(line, _)| line.clone()));
        self.problems = problems;
    }
}
