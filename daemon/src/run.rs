//! The daemon from its flags to its end.
//!
//! config → interface → identity → lease → backend → firewall → subnet.env → forwarding. What is missing is
//! waited for; only a wrong flag, a missing privilege, a port in use, and an interface that is missing or
//! that the backend can never use end the daemon. When forwarding breaks, or the lease or the interface becomes another one, the backend
//! starts again.

use std::net::IpAddr;
use std::time::Duration;

use anyhow::{Context, bail};
use ipnetwork::IpNetwork;
use rustix::thread::{CapabilitySet, capabilities};
use tokio::task::spawn_blocking;
use tokio::time::Instant;
use weft_backends::{
    BackendError, BackendKind, ExternalInterface, GuardMode, KernelEvents, Started,
};
use weft_control::firewall::Rules;
use weft_control::keeper;
use weft_control::lease::{Expiry, Snapshot};
use weft_control::subnet_env::read_previous;
use weft_control::{Backoff, Lease, LeaseAttrs, LeaseKey, NetworkConfig, Registry};

use crate::board::Board;
use crate::external::{self, Prepared, Surroundings};
use crate::firewall::{Firewall, Wanted};
use crate::flags::{Flags, Note, Settings};
use crate::former;
use crate::forwarding::{Ended, Forwarding, Memory, Tenure, Why, expiry, in_time};
use crate::health::Health;
use crate::http;
use crate::leasing::Claim;
use crate::log::Log;
use crate::made::Made;
use crate::network_config::{CONFIG_INTERVAL, wait_for_config};
use crate::node::Node;
use crate::notify;
use crate::overlay::Overlay;
use crate::place::{self, Place};
use crate::registry::{self, config_file};
use crate::repeats::Repeats;
use crate::socket::Socket;
use crate::state_file::StateFile;

/// How long a start waits for the address that this node is known by. Where that is gone for good, it becomes
/// another node.
const ADDRESS_PATIENCE: Duration = Duration::from_secs(60);

/// How often who waits for a lease looks whether it still asks for the right one.
const OUTDATED_INTERVAL: Duration = Duration::from_secs(5);

/// A backend that breaks sooner starts again after a pause: another program may take its device away
/// again and again.
const STEADY: Duration = Duration::from_secs(10);

/// Runs the daemon until `shutdown` completes, at whatever point that finds it.
///
/// # Errors
/// What ends the daemon; see the module.
pub async fn run(flags: Flags, log: Log, shutdown: impl Future<Output = ()>) -> anyhow::Result<()> {
    let settings = flags.settings()?;
    settings.notes.iter().for_each(Note::log);
    let health = Health::new();
    let board = Board::new(log, &health);
    tokio::select! {
        outcome = serve(&settings, &health, &board) => outcome,
        () = notify::tell(health.watch(), &board) => bail!("nobody knows any more how the daemon is"),
        () = shutdown => {
            tracing::info!(
                "stopping; lease, subnet.env and firewall rules stay for the next start"
            );
            notify::tell_stopping();
            Ok(())
        }
    }
}

async fn serve(settings: &Settings, health: &Health, board: &Board) -> anyhow::Result<()> {
    require_net_admin()?;
    let mut socket = Socket::open(&settings.run_dir, board.clone())?;
    if let Some(address) = settings.health {
        http::serve(address, board.clone()).await?;
    }
    let registry = registry::open(settings, health, board).await?;
    board.update(|status| status.registry = registry.describe());
    let mut said = Repeats::told_to(health);
    let mut backoff = Backoff::default();
    let mut told = None;
    let mut known = Known::read(settings, registry.as_ref());
    loop {
        let (text, config, kind) =
            wait_for_config(registry.as_ref(), settings, board, &mut said).await?;
        let around = Surroundings::look(settings.wish.can_reach).await?;
        let chosen = around.choose(settings, &config, &known.addresses())?;
        if let Some(late) = known.waits_for(&around, settings, &config, &chosen.interface) {
            said.warn(&late);
            tokio::time::sleep(CONFIG_INTERVAL).await;
            continue;
        }
        if let Some(reason) = around.conflict(settings, &config, &chosen.interface) {
            said.error(&format!("waiting: {reason}"));
            tokio::time::sleep(CONFIG_INTERVAL).await;
            continue;
        }
        if told.as_ref() != Some(&chosen) {
            tracing::info!(
                interface = chosen.interface.name,
                why = chosen.why,
                "external interface"
            );
            told = Some(chosen.clone());
        }
        board.update(|status| {
            status.backend = Some(kind.to_string());
            status.networks = config.networks().collect();
        });
        let overlay = match external::open(settings, &config, kind, &chosen.interface) {
            Ok(overlay) => overlay,
            Err(error) => {
                end_or_warn(error, &mut said)?;
                backoff.wait().await;
                continue;
            }
        };
        let node = Place::claim(settings, &registry.identity(), &chosen.interface)?;
        match Prepared::new(overlay, chosen, &node.id).await? {
            Ok(prepared) => {
                let registry = registry.as_ref();
                let daemon = Daemon { settings, registry, health, board, text, config, kind };
                let why = daemon.serve(node, prepared, socket).await?;
                tracing::warn!("there is no lease yet, and {why}; beginning anew");
                socket = Socket::open(&settings.run_dir, board.clone())?;
                continue;
            }
            Err(error) => end_or_warn(error, &mut said)?,
        }
        backoff.wait().await;
    }
}

/// What this node was known by when it last ran.
struct Known {
    attrs: LeaseAttrs,
    /// Since when an address is waited for that is not there.
    late_since: Option<Instant>,
}

impl Known {
    fn read(settings: &Settings, registry: &dyn Registry) -> Self {
        let attrs = place::formerly(settings, &registry.identity()).unwrap_or_default();
        Self { attrs, late_since: None }
    }

    fn addresses(&self) -> Vec<IpAddr> {
        self.attrs.public_addresses().collect()
    }

    /// What a start waits for, if that is an address that the interface has not got yet.
    fn waits_for(
        &mut self,
        around: &Surroundings,
        settings: &Settings,
        config: &NetworkConfig,
        interface: &ExternalInterface,
    ) -> Option<String> {
        let address = around.lacks(&self.attrs, settings, config, interface)?;
        let since = *self.late_since.get_or_insert_with(Instant::now);
        (since.elapsed() < ADDRESS_PATIENCE).then(|| {
            format!(
                "waiting a minute for {address}, by which other nodes know this one: {} has not got it yet",
                interface.name
            )
        })
    }
}

/// What was decided before the lease.
struct Daemon<'a> {
    settings: &'a Settings,
    registry: &'a dyn Registry,
    health: &'a Health,
    board: &'a Board,
    /// The config as the registry has it.
    text: String,
    config: NetworkConfig,
    kind: BackendKind,
}

/// What becomes another one where the external interface does.
struct Station {
    place: Place,
    overlay: Overlay,
    memory: Memory,
}

impl Daemon<'_> {
    /// Serves under one lease after the other. Comes back only before the first one, where something else
    /// is to be asked for, and says why.
    async fn serve(
        &self,
        node: Node,
        prepared: Prepared,
        socket: Socket,
    ) -> anyhow::Result<&'static str> {
        let Self { settings, registry, health, board, .. } = *self;
        let mut station = self.take_station(node, prepared, socket)?;
        let (lease, last) = tokio::select! {
            first = self.first_lease(&station) => first,
            why = self.outdated(&station.place.interface) => return Ok(why),
        };
        let mut tenure = Tenure::of(lease, self.config.clone());
        if let Err(error) = station.memory.config.save(&self.text).await {
            tracing::warn!("cannot remember the network config: {error:#}");
        }
        let mut watch = registry.watch(last);
        let by_config = self.config.enable_nftables;
        let kernel = KernelEvents::of_routing().context("cannot open a netlink socket")?;
        let mut firewall = Firewall::start(settings.firewall, by_config, settings.resync);
        board.firewall(firewall.watch());
        self.remove_former(&station).await;
        self.record_made(&station).await;
        let mut pauses = Backoff::default();
        loop {
            let lease = &tenure.lease;
            tracing::info!(subnet = %lease.key, expires = expiry(lease), "lease");
            let started = self.start(&mut station, &mut tenure).await?;
            let begun = Instant::now();
            self.tell_started(&started, &station.place.interface);
            firewall.want(self.wanted(&tenure.lease.key, &station.place.interface)?).await;
            let Station { place, overlay, memory } = &mut station;
            let forwarding = Forwarding {
                settings,
                registry,
                health,
                firewall: &firewall,
                kernel: &kernel,
                kind: self.kind,
                place,
                started,
                board,
            };
            let Ended { why, tenure: held } =
                forwarding.run(overlay, tenure, &mut watch, memory).await?;
            tenure = held;
            self.tell_ended(&why);
            if begun.elapsed() < STEADY {
                pauses.wait().await;
            } else {
                pauses = Backoff::default();
            }
            if let Why::OtherInterface(prepared) = why {
                let next = &prepared.interface;
                // After a pause it may be another one again, which whoever starts next finds out.
                if let Ok(None) = external::changed(settings, &self.config, next).await {
                    self.move_station(&mut station, *prepared).await?;
                }
            }
        }
    }

    fn take_station(
        &self,
        node: Node,
        prepared: Prepared,
        socket: Socket,
    ) -> anyhow::Result<Station> {
        let Prepared { interface, why, overlay, attrs } = prepared;
        let place = Place::take(node, socket, interface, attrs)?;
        self.tell_place(&place, why);
        let memory = Memory {
            last_known: StateFile::new(place.node.files.last_known.clone()),
            config: config_file(&self.settings.state_dir, self.registry),
        };
        tracing::info!(node = place.node.id, public_ip = %place.public_ip,
            registry = self.registry.describe(), "this node");
        Ok(Station { place, overlay, memory })
    }

    /// Moves to the interface as it is now. The backend that was there ends before the next one starts:
    /// both may want one device, or one port.
    async fn move_station(&self, station: &mut Station, prepared: Prepared) -> anyhow::Result<()> {
        let Prepared { interface, why, overlay, attrs } = prepared;
        station.overlay.call(|backend| backend.stop()).await?;
        station.overlay = overlay;
        self.registry.reconnect();
        tracing::warn!(
            "the external interface has changed, from {} to {}; moving there",
            station.place.interface,
            interface
        );
        let registry = self.registry.identity();
        station.place.move_to(self.settings, &registry, interface, attrs)?;
        self.record_made(station).await;
        self.tell_place(&station.place, why);
        station.memory.last_known.move_to(&station.place.node.files.last_known);
        Ok(())
    }

    /// Removes what this node made for another Network. It is in nobody's way, so packets move without.
    async fn remove_former(&self, station: &Station) {
        let (state_dir, files) = (&self.settings.state_dir, &station.place.node.files);
        let networks = Made::networks(state_dir, files);
        let ours: Vec<IpNetwork> = self.config.networks().collect();
        let remove = move || {
            let (former, others) = networks?;
            former::remove(&former, &[ours, others].concat())
        };
        let removed = spawn_blocking(remove).await;
        if let Err(error) = removed.unwrap_or_else(|panicked| Err(panicked.into())) {
            tracing::warn!("cannot remove what was made for a former Network: {error:#}");
        }
    }

    /// Writes down what `weft cleanup` is to find. Packets move without it, as on a full disk.
    async fn record_made(&self, station: &Station) {
        let files = &station.place.node.files;
        if let Err(error) = Made::record(&self.config, self.settings, files).await {
            tracing::warn!("`weft cleanup` would not find all that this daemon makes: {error:#}");
        }
    }

    fn tell_place(&self, place: &Place, why: String) {
        self.board.update(|status| {
            status.node_id.clone_from(&place.node.id);
            status.public_ip = Some(place.public_ip);
            status.interface = Some(place.interface.name.clone());
            status.interface_why = Some(why);
        });
    }

    fn tell_started(&self, started: &Started, interface: &ExternalInterface) {
        let Started { device, other_devices, mtu } = started;
        tracing::info!(backend = %self.kind, device, mtu, "forwarding");
        self.board.update(|status| {
            status.device = Some(device.clone());
            status.other_devices.clone_from(other_devices);
            status.mtu = Some(*mtu);
            status.mtu_why = Some(mtu_why(interface, *mtu));
        });
    }

    fn tell_ended(&self, why: &Why) {
        match why {
            Why::Lost(reason) => {
                tracing::error!("forwarding broke: {reason}; starting the backend again");
                self.health.starts_again(&format!("forwarding broke: {reason}"));
            }
            Why::OtherLease => self.health.starts_again("taking up other subnets"),
            Why::OtherInterface(_) => {
                self.health.starts_again("the external interface has changed");
            }
        }
    }

    /// Starts the backend, however often it takes, on whatever the external interface becomes
    /// meanwhile.
    ///
    /// # Errors
    /// What trying again would not mend.
    async fn start(&self, station: &mut Station, tenure: &mut Tenure) -> anyhow::Result<Started> {
        station.overlay.call(|backend| backend.stop()).await?;
        station.overlay.forget_losses();
        let mut backoff = Backoff::default();
        let mut said = Repeats::told_to(self.health);
        loop {
            let wanted = tenure.lease.clone();
            match station.overlay.call(move |backend| backend.start(&wanted)).await? {
                Ok(started) => return Ok(started),
                Err(error) => end_or_warn(error, &mut said)?,
            }
            backoff.wait().await;
            let known = &station.place.interface;
            let Ok(Some(next)) = external::changed(self.settings, &self.config, known).await else {
                self.keep_lease(&station.place, tenure).await;
                continue;
            };
            let Self { settings, ref config, kind, .. } = *self;
            let node_id = &station.place.node.id;
            match Prepared::open(settings, config, kind, next, node_id).await? {
                Ok(prepared) => self.move_station(station, prepared).await?,
                Err(error) => said.warn(&format!("waiting: {error}")),
            }
        }
    }

    /// Renews the lease where that is due, while nothing goes on under it: it must not end meanwhile.
    async fn keep_lease(&self, place: &Place, tenure: &mut Tenure) {
        let attrs = &place.identity.attrs;
        let margin = self.settings.renew_margin;
        let due = tenure.renewal(attrs, margin);
        if !tenure.is_held() || due.is_none_or(|due| due > Instant::now()) {
            return;
        }
        let ttl = keeper::ttl(&tenure.lease, self.settings.lease_ttl);
        tenure.may_be_told(attrs.clone());
        match in_time(self.registry.renew(&tenure.lease, attrs, ttl)).await {
            Ok(Some(lease)) => {
                tenure.renewed(lease);
                let due = tenure.renewal(attrs, margin);
                self.board.lease(&tenure.lease, due);
            }
            // By somebody else's write, or one of ours whose answer got lost.
            Ok(None) => {
                if let Ok(found) = in_time(self.registry.snapshot()).await {
                    tenure.look(&found.leases);
                }
            }
            Err(error) => tracing::debug!("cannot renew the lease: {error}"),
        }
    }

    /// Ends when what a lease is asked for with is not what it was, and says what: another config or another
    /// interface may be what the wait for one is to end by.
    async fn outdated(&self, known: &ExternalInterface) -> &'static str {
        loop {
            tokio::time::sleep(OUTDATED_INTERVAL).await;
            let found = self.registry.config().await.ok().flatten();
            let config = found.and_then(|text| text.parse().ok());
            if config.is_some_and(|config: NetworkConfig| config != self.config) {
                return "the network config has changed";
            }
            if let Ok(Some(_)) = external::changed(self.settings, &self.config, known).await {
                return "the external interface has changed";
            }
        }
    }

    /// What the firewall is to do for this lease. What the guard is there for, nobody gets around by sending
    /// packets unwrapped; and while udp-tun's device is away, none leave by the default route.
    fn wanted(&self, key: &LeaseKey, interface: &ExternalInterface) -> anyhow::Result<Wanted> {
        let Self { settings, config, .. } = self;
        let is_tunnel = self.kind == BackendKind::UdpTun;
        // host-gw has no such option, and takes no notice of one.
        let is_direct = is_tunnel && config.backend.bool_option("DirectRouting")?.unwrap_or(false);
        let is_guarded = is_tunnel && !is_direct && settings.guard == GuardMode::Strict;
        let outside = is_guarded.then_some(interface.name.as_str());
        let networks: Vec<IpNetwork> = config.networks().collect();
        let subnets = key.networks().filter(|_| settings.blackhole);
        let blackholes = networks.iter().copied().filter(|_| is_tunnel).chain(subnets).collect();
        let rules = Rules::new(config, key, settings.switches, outside);
        Ok(Wanted { rules, blackholes, networks })
    }

    /// The lease to begin with, and what else is known of the registry. While that is away: what it
    /// was when this node last saw it.
    async fn first_lease(&self, station: &Station) -> (Lease, Snapshot) {
        let mut previous = read_previous(&self.settings.subnet_file);
        let away = self.registry.config().await.err();
        // A reboot takes subnet.env away.
        let is_forgotten = previous == LeaseKey::default();
        let known =
            if is_forgotten || away.is_some() { station.memory.last_known.load() } else { None };
        if let (true, Some((known, _))) = (is_forgotten, &known) {
            previous = known.lease.key;
        }
        if let Some(error) = away
            && let Some((known, since)) = known
            && keeper::is_compatible(&self.config, &known.lease.key)
        {
            tracing::warn!(
                "{error}; starting with the lease and the {} peers known at {since}",
                known.snapshot.leases.len().saturating_sub(1)
            );
            // How long it lasts now, only the registry knows.
            return (Lease { expires: Expiry::Unknown, ..known.lease }, known.snapshot);
        }
        let claim = Claim {
            config: &self.config,
            identity: &station.place.identity,
            ttl: self.settings.lease_ttl,
            health: self.health,
            board: self.board,
        };
        claim.acquire(self.registry, &previous).await
    }
}

/// How containers' MTU was found.
fn mtu_why(interface: &ExternalInterface, mtu: u32) -> String {
    let ExternalInterface { name, mtu: external, .. } = interface;
    match external.saturating_sub(mtu) {
        0 => format!("that of {name}"),
        headers => format!("{external} of {name}, less {headers} for what packets are wrapped in"),
    }
}

fn end_or_warn(error: BackendError, said: &mut Repeats) -> anyhow::Result<()> {
    if error.is_final() {
        // Its text tells the reasons behind it, too.
        return Err(anyhow::Error::msg(error.to_string()));
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
