//! The daemon from its flags to its end.
//!
//! config → interface → identity → lease → backend → subnet.env → forwarding. What is missing is
//! waited for; only a wrong flag, a missing privilege, a port in use and a missing interface end
//! the daemon. When forwarding breaks, or the lease becomes another one, the backend starts again.

use std::time::Duration;

use anyhow::{Context, bail};
use rustix::thread::{CapabilitySet, capabilities};
use weft_backends::netlink::Netlink;
use weft_backends::{BackendError, BackendKind, ExternalInterface, Options};
use weft_control::keeper::Identity;
use weft_control::subnet_env::read_previous;
use weft_control::{DirectoryRegistry, Lease, NetworkConfig, Registry};

use crate::flags::{Flags, Note, Settings};
use crate::forwarding::{Ended, Forwarding};
use crate::interface::{self, Families};
use crate::leasing;
use crate::node::Node;
use crate::overlay::Overlay;
use crate::retry::{Backoff, Repeats};
use crate::status::StatusSocket;

/// How often a missing config is looked for, as flannel does.
const CONFIG_INTERVAL: Duration = Duration::from_secs(1);

/// Runs the daemon until `shutdown` completes, at whatever point that finds it.
///
/// # Errors
/// What ends the daemon; see the module.
pub async fn run(flags: Flags, shutdown: impl Future<Output = ()>) -> anyhow::Result<()> {
    let settings = flags.settings()?;
    settings.notes.iter().for_each(Note::log);
    tokio::select! {
        outcome = serve(&settings) => outcome,
        () = shutdown => {
            tracing::info!("stopping; lease and subnet.env stay for the next start");
            Ok(())
        }
    }
}

async fn serve(settings: &Settings) -> anyhow::Result<()> {
    require_net_admin()?;
    let registry = open_registry(settings)?;
    let mut said = Repeats::default();
    let mut backoff = Backoff::default();
    loop {
        let (config, kind) = wait_for_config(&registry, settings, &mut said).await?;
        let interface = choose_interface(settings, &config).await?;
        let options = Options {
            guard: settings.guard,
            workers: settings.workers,
            tuning: settings.tuning.clone(),
        };
        let opened = weft_backends::open(kind, &config, &interface, options).map(Overlay::new);
        let mut overlay = match opened {
            Ok(overlay) => overlay,
            Err(error) => {
                end_or_warn(error, &mut said)?;
                backoff.wait().await;
                continue;
            }
        };
        match overlay.call(|backend| backend.prepare()).await? {
            Ok(attrs) => {
                let identity = Identity { attrs };
                let daemon = Daemon { settings, registry: &registry, config, kind, interface };
                return daemon.serve(overlay, identity).await;
            }
            Err(error) => end_or_warn(error, &mut said)?,
        }
        backoff.wait().await;
    }
}

/// What was decided before the lease.
struct Daemon<'a> {
    settings: &'a Settings,
    registry: &'a DirectoryRegistry,
    config: NetworkConfig,
    kind: BackendKind,
    interface: ExternalInterface,
}

impl Daemon<'_> {
    async fn serve(&self, mut overlay: Overlay, identity: Identity) -> anyhow::Result<()> {
        let public_ip = identity
            .attrs
            .public_addresses()
            .next()
            .context("the interface has no address that other nodes could send to")?;
        let describe = self.registry.describe();
        let node =
            Node::claim(&self.settings.state_dir, &self.settings.run_dir, &describe, public_ip)?;
        let socket = StatusSocket::open(&node.socket)?;
        tracing::info!(node = node.id, %public_ip, registry = describe, "this node");

        let previous = read_previous(&self.settings.subnet_file);
        let mut lease = leasing::acquire(self.registry, &self.config, &identity, &previous).await;
        loop {
            tracing::info!(subnet = %lease.key, expires = expiry(&lease), "lease");
            let started = start(&mut overlay, &lease).await?;
            tracing::info!(backend = %self.kind, device = started.device, mtu = started.mtu,
                "forwarding");
            let forwarding = Forwarding {
                settings: self.settings,
                registry: self.registry,
                config: &self.config,
                kind: self.kind,
                interface: &self.interface,
                identity: &identity,
                node: &node,
                public_ip,
                started,
                socket: &socket,
            };
            match forwarding.run(&mut overlay, lease.clone()).await? {
                Ended::Lost(reason) => {
                    tracing::error!("forwarding broke: {reason}; starting the backend again");
                }
                Ended::OtherLease(other) => lease = *other,
            }
        }
    }
}

/// Starts the backend, however often it takes.
///
/// # Errors
/// What trying again would not mend.
async fn start(overlay: &mut Overlay, lease: &Lease) -> anyhow::Result<weft_backends::Started> {
    overlay.call(|backend| backend.stop()).await?;
    overlay.forget_events();
    let mut backoff = Backoff::default();
    let mut said = Repeats::default();
    loop {
        let lease = lease.clone();
        match overlay.call(move |backend| backend.start(&lease)).await? {
            Ok(started) => return Ok(started),
            Err(error) => end_or_warn(error, &mut said)?,
        }
        backoff.wait().await;
    }
}

fn end_or_warn(error: BackendError, said: &mut Repeats) -> anyhow::Result<()> {
    if error.is_final() {
        return Err(error.into());
    }
    said.warn(&format!("waiting: {error}"));
    Ok(())
}

/// TUN devices, routes and addresses need CAP_NET_ADMIN: better said now than after an hour of
/// waiting for a config.
fn require_net_admin() -> anyhow::Result<()> {
    let held = capabilities(None).context("cannot read the process's capabilities")?;
    if held.effective.contains(CapabilitySet::NET_ADMIN) {
        return Ok(());
    }
    bail!("weftd needs CAP_NET_ADMIN: run it as root, or grant the capability")
}

fn open_registry(settings: &Settings) -> anyhow::Result<DirectoryRegistry> {
    let registry = DirectoryRegistry::open(&settings.registry_dir)?;
    tracing::info!(
        "the registry is a directory, so it serves the daemons of this host only: {}",
        settings.registry_dir.display()
    );
    if let Some(network) = settings.network
        && registry.init_config(network)?
    {
        tracing::info!(%network, "wrote the network config, there being none");
    }
    Ok(registry)
}

/// The config, once there is one that this daemon can work by, and the backend it asks for.
///
/// # Errors
/// `--backend` and the config name different backends, or the one that only `--backend` names is
/// not built yet.
async fn wait_for_config(
    registry: &DirectoryRegistry,
    settings: &Settings,
    said: &mut Repeats,
) -> anyhow::Result<(NetworkConfig, BackendKind)> {
    loop {
        match read_config(registry).await {
            Ok(config) => match choose_backend(&config, settings)? {
                Ok(kind) => return Ok((config, kind)),
                Err(reason) => said.warn(&reason),
            },
            Err(reason) => said.warn(&format!("waiting for the network config: {reason}")),
        }
        tokio::time::sleep(CONFIG_INTERVAL).await;
    }
}

async fn read_config(registry: &DirectoryRegistry) -> Result<NetworkConfig, String> {
    let text = registry.config().await.map_err(|error| error.to_string())?;
    let text = text.ok_or_else(|| {
        format!("there is none in {}; write one, or start with --network", registry.describe())
    })?;
    text.parse().map_err(|error| format!("{} holds a bad one: {error}", registry.describe()))
}

/// The inner error is the registry's and is waited out; the outer one is the command line's.
fn choose_backend(
    config: &NetworkConfig,
    settings: &Settings,
) -> anyhow::Result<Result<BackendKind, String>> {
    let Some(name) = config.backend.kind.as_deref() else {
        let kind = settings.backend.unwrap_or(BackendKind::UdpTun);
        return if kind == BackendKind::UdpTun {
            Ok(Ok(kind))
        } else {
            Err(BackendError::NotBuilt(kind).into())
        };
    };
    let Some(kind) = BackendKind::from_config(name) else {
        return Ok(Err(format!("waiting: unknown backend type in the network config: {name:?}")));
    };
    match settings.backend {
        Some(wanted) if wanted != kind => bail!(
            "--backend {wanted} contradicts the network config, which names the backend {kind}; \
             drop the flag or change the config"
        ),
        _ if kind != BackendKind::UdpTun => {
            Ok(Err(format!("waiting: the network config: {}", BackendError::NotBuilt(kind))))
        }
        _ => Ok(Ok(kind)),
    }
}

async fn choose_interface(
    settings: &Settings,
    config: &NetworkConfig,
) -> anyhow::Result<ExternalInterface> {
    let (links, routes) = tokio::task::spawn_blocking(|| {
        let netlink = Netlink::open().context("cannot open a netlink socket")?;
        anyhow::Ok((netlink.links()?, netlink.default_routes()?))
    })
    .await??;
    let families = Families { ipv4: config.ipv4.is_some(), ipv6: config.ipv6.is_some() };
    let chosen = interface::choose(&settings.wish, families, &links, &routes)?;
    tracing::info!(interface = chosen.interface.name, why = chosen.why, "external interface");
    Ok(chosen.interface)
}

fn expiry(lease: &Lease) -> String {
    lease.expires.map_or("never (a reservation)".into(), |at| at.to_string())
}
