//! The registry that the flags name.

use std::path::Path;

use weft_control::{
    Access, DirectoryRegistry, Etcd2Registry, Etcd3Registry, Registry, RegistryError,
};

use crate::board::Board;
use crate::flags::{EtcdApi, RegistrySettings, Settings};
use crate::health::Health;
use crate::network_config::CONFIG_INTERVAL;
use crate::node;
use crate::repeats::Repeats;
use crate::state_file::StateFile;

/// Opens it. Where the flags leave open by which API etcd is to be used, waits until that is known.
///
/// # Errors
/// A directory cannot be one.
pub(crate) async fn open(
    settings: &Settings,
    health: &Health,
    board: &Board,
) -> Result<Box<dyn Registry>, RegistryError> {
    match &settings.registry {
        RegistrySettings::Directory(path) => {
            let registry = DirectoryRegistry::make(path)?;
            tracing::info!(
                "the registry is a directory, so it serves the daemons of this host only: {}",
                path.display()
            );
            Ok(Box::new(registry))
        }
        RegistrySettings::Etcd { access, prefix, api: EtcdApi::Auto } => {
            Ok(find_config(settings, access, prefix, board, Repeats::told_to(health)).await)
        }
        RegistrySettings::Etcd { access, prefix, api: EtcdApi::V3 } => {
            Ok(Box::new(Etcd3Registry::new(access, prefix)))
        }
        RegistrySettings::Etcd { access, prefix, api: EtcdApi::V2 } => {
            Ok(Box::new(Etcd2Registry::new(access, prefix)))
        }
    }
}

/// Opens it for one command: where the API is left open, v2 only if there alone is a config, and the daemons
/// that keep their state in `state_dir` have not used v3.
///
/// # Errors
/// A directory is missing, or cannot be a registry.
pub(crate) async fn open_now(
    settings: &RegistrySettings,
    state_dir: &Path,
) -> Result<Box<dyn Registry>, RegistryError> {
    match settings {
        RegistrySettings::Directory(path) => Ok(Box::new(DirectoryRegistry::open(path)?)),
        RegistrySettings::Etcd { access, prefix, api } => {
            let (v3, v2) = (Etcd3Registry::new(access, prefix), Etcd2Registry::new(access, prefix));
            let is_v2 = match api {
                EtcdApi::V2 => true,
                EtcdApi::V3 => false,
                EtcdApi::Auto => {
                    let (by_v3, by_v2) = tokio::join!(v3.config(), v2.config());
                    !has_config(&by_v3) && has_config(&by_v2) && is_unused(&v3, &by_v3, state_dir)
                }
            };
            Ok(if is_v2 { Box::new(v2) } else { Box::new(v3) })
        }
    }
}

/// What a registry says of its network config.
type Found = Result<Option<String>, RegistryError>;

fn has_config(found: &Found) -> bool {
    matches!(found, Ok(Some(_)))
}

/// Whether there may be a config all the same, which we are not let see.
fn is_refused(found: &Found) -> bool {
    matches!(found, Err(RegistryError::Refused { .. }))
}

/// Whether a config by v2 is no remnant: v3, which has none, neither refuses us nor was used here before.
fn is_unused(v3: &Etcd3Registry, by_v3: &Found, state_dir: &Path) -> bool {
    !is_refused(by_v3) && config_file(state_dir, v3).load().is_none()
}

/// The config as it was last read from a registry.
pub(crate) fn config_file(state_dir: &Path, registry: &dyn Registry) -> StateFile<String> {
    StateFile::new(node::config_path(state_dir, &registry.identity()))
}

/// The API by which there is a network config, v3 before v2. A config by v2 may be what a fleet left
/// behind when it moved to v3: it does not count where v3 refuses us, or was used here before. While there
/// is none: v3 if one is to be written, the one of the last run if nobody answers, and else both are asked
/// again.
async fn find_config(
    settings: &Settings,
    access: &Access,
    prefix: &str,
    board: &Board,
    mut said: Repeats,
) -> Box<dyn Registry> {
    loop {
        let v3 = Etcd3Registry::new(access, prefix);
        let v2 = Etcd2Registry::new(access, prefix);
        let (by_v3, by_v2) = tokio::join!(v3.config(), v2.config());
        board.registry(by_v3.is_ok() || by_v2.is_ok());
        match (has_config(&by_v3), has_config(&by_v2)) {
            (true, both) => {
                if both {
                    tracing::warn!(
                        "there is a network config by etcd's v3 API and one by its v2 API; taking \
                         v3's; --etcd-api v2 takes the other"
                    );
                }
                return Box::new(v3);
            }
            (false, true) if is_unused(&v3, &by_v3, &settings.state_dir) => {
                return Box::new(v2);
            }
            (false, _) => {}
        }
        let reason = match by_v3 {
            Ok(_) if settings.network.is_some() => return Box::new(v3),
            Ok(_) => {
                let by_v2 = if has_config(&by_v2) {
                    "; there is one by its v2 API, which --etcd-api v2 takes"
                } else {
                    ""
                };
                let v3 = v3.describe();
                format!("there is none in {v3}; write one, or start with --network{by_v2}")
            }
            Err(error) => {
                if config_file(&settings.state_dir, &v3).load().is_some() {
                    return Box::new(v3);
                }
                if by_v2.is_err() && config_file(&settings.state_dir, &v2).load().is_some() {
                    return Box::new(v2);
                }
                error.to_string()
            }
        };
        said.warn(&format!("waiting for the network config: {reason}"));
        tokio::time::sleep(CONFIG_INTERVAL).await;
    }
}
