//! The network config to start with: the registry's, and which backend it asks for.

use std::time::Duration;

use anyhow::bail;
use weft_backends::BackendKind;
use weft_control::registry::minimal_config;
use weft_control::{NetworkConfig, Registry};

use crate::board::Board;
use crate::flags::Settings;
use crate::output::joined;
use crate::registry::config_file;
use crate::repeats::Repeats;
use crate::state_file::StateFile;

/// How often a missing config is looked for, as flannel does.
pub(crate) const CONFIG_INTERVAL: Duration = Duration::from_secs(1);

/// The backend where neither the config nor a flag names one.
const DEFAULT_BACKEND: BackendKind = BackendKind::UdpTun;

/// The config, once there is one that this daemon can work by, and the backend it asks for.
///
/// # Errors
/// `--backend` and the config name different backends, or no overlay can be made of `--network`.
pub(crate) async fn wait_for_config(
    registry: &dyn Registry,
    settings: &Settings,
    board: &Board,
    said: &mut Repeats,
) -> anyhow::Result<(String, NetworkConfig, BackendKind)> {
    let wanted = settings.network.map(minimal_config).transpose()?;
    let file = config_file(&settings.state_dir, registry);
    loop {
        let text = read_config(registry, wanted.as_deref(), &file, board, said).await;
        let parsed = text.and_then(|text| {
            let bad = |error| format!("{} holds a bad one: {error}", registry.describe());
            text.parse().map(|config: NetworkConfig| (text, config)).map_err(bad)
        });
        match parsed {
            Ok((text, config)) => match choose_backend(&config, settings)? {
                Ok(kind) => {
                    note_ignored(&config, settings, registry, said);
                    return Ok((text, config, kind));
                }
                Err(reason) => said.warn(&format!("waiting: {reason}")),
            },
            Err(reason) => said.warn(&format!("waiting for the network config: {reason}")),
        }
        tokio::time::sleep(CONFIG_INTERVAL).await;
    }
}

fn note_ignored(
    config: &NetworkConfig,
    settings: &Settings,
    registry: &dyn Registry,
    said: &mut Repeats,
) {
    if let Some(wanted) =
        settings.network.filter(|wanted| !config.networks().any(|it| it == *wanted))
    {
        said.note(&format!(
            "--network {wanted} has no effect: {} has a network config already",
            registry.describe()
        ));
    }
}

/// The config's text; that of `--network` if there is none; while the registry is away, what it
/// was when it could last be read.
async fn read_config(
    registry: &dyn Registry,
    wanted: Option<&str>,
    file: &StateFile<String>,
    board: &Board,
    said: &mut Repeats,
) -> Result<String, String> {
    let found = registry.config().await;
    board.registry(found.is_ok());
    let found = match found {
        Ok(found) => found,
        Err(error) => {
            let (text, since) = file.load().ok_or_else(|| error.to_string())?;
            said.note(&format!("{error}; starting with the network config known at {since}"));
            return Ok(text);
        }
    };
    if let Some(text) = found {
        return Ok(text);
    }
    let wanted = wanted.ok_or_else(|| {
        let none = format!("there is none in {}; write one, or start with", registry.describe());
        match file.load() {
            // On one line, however it was written.
            Some((text, since)) => {
                let text = joined(text.split_whitespace(), " ");
                format!("{none} --network; it was {text} at {since}")
            }
            None => format!("{none} --network"),
        }
    })?;
    if registry.init_config(wanted).await.map_err(|error| error.to_string())? {
        tracing::info!("wrote the network config, there being none: {wanted}");
    }
    // It may be somebody else's, who was faster.
    let found = registry.config().await.map_err(|error| error.to_string())?;
    found.ok_or_else(|| "it was there for a moment only".into())
}

/// Reads a config as a start would, as far as neither the daemon's flags nor its host have a say in it.
///
/// # Errors
/// It is none that a weftd starts with.
pub(crate) fn usable(text: &str) -> anyhow::Result<NetworkConfig> {
    let config: NetworkConfig = text.parse()?;
    let kind = backend_of(&config).map_err(anyhow::Error::msg)?;
    weft_backends::check_options(kind.unwrap_or(DEFAULT_BACKEND), &config)?;
    Ok(config)
}

/// The backend that a config names, if it names one.
fn backend_of(config: &NetworkConfig) -> Result<Option<BackendKind>, String> {
    let Some(name) = config.backend.kind.as_deref() else { return Ok(None) };
    let unknown = || {
        format!(
            "unknown backend type in the network config: {name:?}; there are udp, vxlan and host-gw"
        )
    };
    BackendKind::from_config(name).ok_or_else(unknown).map(Some)
}

/// The inner error is the registry's and is waited out; the outer one is the command line's.
pub(crate) fn choose_backend(
    config: &NetworkConfig,
    settings: &Settings,
) -> anyhow::Result<Result<BackendKind, String>> {
    let kind = match backend_of(config) {
        Ok(Some(kind)) => kind,
        Ok(None) => return Ok(Ok(settings.backend.unwrap_or(DEFAULT_BACKEND))),
        Err(reason) => return Ok(Err(reason)),
    };
    match settings.backend {
        Some(wanted) if wanted != kind => bail!(
            "--backend {wanted} contradicts the network config, which names the backend {kind}; \
             drop the flag or change the config"
        ),
        _ => Ok(Ok(kind)),
    }
}
