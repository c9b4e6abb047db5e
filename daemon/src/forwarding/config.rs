//! Going by a network config that changes while the daemon runs.

use weft_backends::ExternalInterface;
use weft_control::lease::Snapshot;
use weft_control::{NetworkConfig, keeper};

use super::turn::Turn;
use crate::flags::Settings;
use crate::network_config::choose_backend;
use crate::{external, overlap};

/// Goes by a network config that was changed, where a running daemon can: in which subnets are given
/// out. Says what is wrong with it otherwise.
pub(super) fn follow_config(
    settings: &Settings,
    snapshot: &Snapshot,
    turn: &mut Turn,
) -> Option<String> {
    let Some(text) = &snapshot.config else {
        return Some(
            "the network config is gone; going on with what it was, but no weftd starts until it is \
             back (`weft doctor` says how)"
                .into(),
        );
    };
    match text.parse::<NetworkConfig>() {
        Ok(config) if config == turn.tenure.config => None,
        Ok(config)
            if config.differs_in_bounds_only(&turn.tenure.config)
                && keeper::is_compatible(&config, &turn.tenure.lease.key) =>
        {
            tracing::info!("the range of subnets in the network config has changed; going by it");
            turn.tenure.config = config;
            None
        }
        Ok(config) => {
            // Once: it opens a backend.
            if turn.judged.as_ref().is_none_or(|(judged, _)| *judged != config) {
                let verdict = judge(settings, &config, turn);
                turn.judged = Some((config, verdict));
            }
            turn.judged.as_ref().map(|(_, verdict)| verdict.clone())
        }
        Err(error) => Some(format!(
            "the network config is a bad one now ({error}); going on with what it was"
        )),
    }
}

/// What is said of another config, by which a running daemon cannot go.
fn judge(settings: &Settings, config: &NetworkConfig, turn: &Turn) -> String {
    match unusable(settings, config, &turn.interface) {
        Some(reason) => format!(
            "the network config has become one that weftd would not start with ({reason}); going on \
             with what it was"
        ),
        None if !keeper::is_in_range(config, &turn.tenure.lease.key) => format!(
            "the network config has changed; restart weftd to go by it, which gives up our subnet \
             {}, since it is not in the range",
            turn.tenure.lease.key
        ),
        None => "the network config has changed; restart weftd to go by it".into(),
    }
}

/// What a start with this config would wait for, or end by.
fn unusable(
    settings: &Settings,
    config: &NetworkConfig,
    interface: &ExternalInterface,
) -> Option<String> {
    match choose_backend(config, settings) {
        Err(error) => Some(error.to_string()),
        Ok(Err(reason)) => Some(reason),
        Ok(Ok(kind)) => overlap::conflict(config, interface, &[], &settings.registry)
            .or_else(|| Some(external::open(settings, config, kind, interface).err()?.to_string())),
    }
}
