//! Who has joined the overlay, and who has left it, for whoever reads the log.

use std::collections::BTreeMap;

use weft_backends::DesiredPeer;
use weft_control::{LeaseAttrs, LeaseKey};

/// So many are named at a time: a registry that is restored brings thousands.
const NAMED_MAX: usize = 5;

/// The peers as of the last look; none before the first.
#[derive(Debug, Default)]
pub(super) struct Members(Option<BTreeMap<LeaseKey, LeaseAttrs>>);

impl Members {
    /// Takes in who is a peer now, and logs what has changed.
    pub(super) fn follow(&mut self, peers: &[DesiredPeer]) {
        let now: BTreeMap<LeaseKey, LeaseAttrs> =
            peers.iter().map(|it| (it.lease.key, it.lease.attrs.clone())).collect();
        let Some(before) = self.0.replace(now) else { return };
        let Some(now) = &self.0 else { return };
        tell("joined", now.iter().filter(|(key, _)| !before.contains_key(key)).collect());
        tell("left", before.iter().filter(|(key, _)| !now.contains_key(key)).collect());
    }
}

fn tell(what: &str, peers: Vec<(&LeaseKey, &LeaseAttrs)>) {
    if peers.len() > NAMED_MAX {
        tracing::info!("{} peers have {what}", peers.len());
        return;
    }
    for (subnet, attrs) in peers {
        let public_ip = attrs.public_addresses().next().map(|ip| ip.to_string());
        tracing::info!(%subnet, public_ip, "a peer has {what}");
    }
}
