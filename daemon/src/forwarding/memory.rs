//! What the registry said, kept for a start while it is away.

use weft_control::NetworkConfig;
use weft_control::lease::{Expiry, Snapshot};

use super::turn::Turn;
use crate::probe::Prober;
use crate::state_file::{LastKnown, StateFile};

/// The files.
pub(crate) struct Memory {
    pub(crate) last_known: StateFile<LastKnown>,
    /// The network config's text, for all daemons that use this registry.
    pub(crate) config: StateFile<String>,
}

impl Memory {
    /// Without it weft works as well, until then.
    pub(super) async fn keep(&mut self, turn: &mut Turn, snapshot: &Snapshot) {
        turn.forgetful = self.write(turn, snapshot).await.err().map(|error| {
            format!(
                "cannot remember what the registry said, for a start while it is away: {error:#}"
            )
        });
    }

    /// That others renew their leases, as one does each few seconds in a large fleet, is no reason to write it
    /// all anew.
    async fn write(&mut self, turn: &Turn, snapshot: &Snapshot) -> anyhow::Result<()> {
        let mut known = LastKnown {
            lease: turn.tenure.lease.clone(),
            snapshot: snapshot.clone(),
            probe_port: turn.prober.as_ref().map(Prober::port),
        };
        for lease in known.snapshot.leases.iter_mut().filter(|it| it.key != turn.tenure.lease.key) {
            lease.revision = 0;
            if lease.expires != Expiry::Never {
                lease.expires = Expiry::Unknown;
            }
        }
        self.last_known.save(&known).await?;
        let text = snapshot.config.as_ref();
        // One that takes a restart may be one that no daemon starts with.
        let is_followed = |text: &&String| {
            text.parse::<NetworkConfig>().ok().as_ref() == Some(&turn.tenure.config)
        };
        match text.filter(is_followed) {
            Some(text) => self.config.save(text).await,
            None => Ok(()),
        }
    }
}
