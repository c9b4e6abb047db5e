//! The daemon while it forwards: one loop that waits for whatever changes, and makes everything
//! follow.

mod asleep;
mod claiming;
mod config;
mod desired;
mod members;
mod memory;
mod problems;
mod telling;
mod turn;
mod vanished;

use std::sync::Arc;
use std::time::Duration;

use anyhow::Context;
use ipnetwork::IpNetwork;
use jiff::Timestamp;
use tokio::sync::watch;
use tokio::task::spawn_blocking;
use tokio::time::{Instant, sleep_until};
use weft_backends::netlink::Netlink;
use weft_backends::{
    BackendKind, Basis, ExternalInterface, GivenUp, KernelEvents, Started, Towards, some,
};
use weft_control::keeper::{self, Own};
use weft_control::lease::Snapshot;
use weft_control::subnet_env::SubnetEnv;
use weft_control::{Lease, Registry, View};

use crate::board::Board;
use crate::external::{self, Prepared};
use crate::firewall::Firewall;
use crate::flags::Settings;
use crate::health::Health;
use crate::ip_forward;
use crate::or_never::or_never;
use crate::overlap;
use crate::overlay::Overlay;
use crate::place::Place;
use crate::probe::{self, Prober};
use crate::rest::Rest;
use asleep::LastLook;
use claiming::Claiming;
use config::follow_config;
use desired::desired;
use turn::{Lost, Turn};
use vanished::Vanished;

pub(crate) use memory::Memory;
pub(crate) use telling::{expiry, in_time};
pub(crate) use turn::Tenure;

/// Between tries, where the registry does not show it: what it tells may be from before the last one.
const NODE_RETRY: Duration = Duration::from_secs(5);
/// How long our address may be gone before one that the interface has besides is taken: that may be a virtual
/// router's, which leaves again some day.
const ADDRESS_PATIENCE: Duration = Duration::from_secs(5);

/// What stays the same while one lease is forwarded under.
pub(crate) struct Forwarding<'a> {
    pub(crate) settings: &'a Settings,
    pub(crate) registry: &'a dyn Registry,
    pub(crate) health: &'a Health,
    pub(crate) firewall: &'a Firewall,
    /// What the kernel tells of links, addresses, routes and neighbours.
    pub(crate) kernel: &'a KernelEvents,
    pub(crate) kind: BackendKind,
    pub(crate) place: &'a Place,
    pub(crate) started: Started,
    pub(crate) board: &'a Board,
}

/// The end of the loop, and under which lease the next one begins.
#[derive(Debug)]
pub(crate) struct Ended {
    pub(crate) why: Why,
    pub(crate) tenure: Tenure,
}

/// Why the loop ended.
#[derive(Debug)]
pub(crate) enum Why {
    /// Packets no longer move, for this reason.
    Lost(String),
    /// Our subnets are others now.
    OtherLease,
    /// The external interface is another, or has another address or MTU; a backend is ready there, for
    /// the same lease.
    OtherInterface(Box<Prepared>),
}

impl Forwarding<'_> {
    /// Follows `watch` until packets no longer move, or our subnets are others. While the registry
    /// cannot be read all stays as it is: nothing is renewed, published or known to have expired.
    ///
    /// # Errors
    /// The backend panicked, or nothing watches the registry any more.
    pub(crate) async fn run(
        self,
        overlay: &mut Overlay,
        tenure: Tenure,
        watch: &mut watch::Receiver<View>,
        memory: &mut Memory,
    ) -> anyhow::Result<Ended> {
        let mut turn = self.begin(tenure, memory);
        watch.mark_changed();
        let mut firewall = self.firewall.watch();
        let mut last_look = LastLook::new();
        let mut rest = Rest::none();
        let mut claiming: Option<Claiming<'_>> = None;
        loop {
            self.board.turn();
            if last_look.was_asleep() {
                turn.tenure.renewal = turn.tenure.renewal.map(|_| Instant::now());
            }
            // A wider range of subnets may be what it waits for.
            let is_on = claiming.as_ref().is_some_and(|it| it.goes_by(&turn.tenure.config));
            if turn.tenure.lost.is_some() && !is_on {
                claiming = Some(Claiming::begin(&self, &turn));
            }
            // Two nodes with one address would each wait for the other's record to end.
            let is_whole = turn.readable == Some(true) && turn.tenure.is_held();
            let kernel_changed = async {
                rest.over().await;
                self.kernel.changed().await;
            };
            let renewal = or_never(turn.renewal().map(sleep_until));
            let ended = tokio::select! {
                changed = watch.changed() => {
                    changed.context("nothing watches the registry any more")?;
                    let view = watch.borrow_and_update().clone();
                    self.heard(&view, overlay, &mut turn, memory).await?;
                    None
                }
                () = kernel_changed, if !turn.repairs.is_fight() => {
                    let begun = Instant::now();
                    let ended = self.put_right(watch, overlay, &mut turn).await?;
                    rest = Rest::after(begun);
                    ended
                }
                _ = turn.slow.tick() => self.look_at_all(watch, overlay, &mut turn, memory).await?,
                lease = or_never(claiming.as_mut().map(Claiming::lease)) => {
                    claiming = None;
                    self.claimed(lease, watch, overlay, &mut turn).await?
                }
                _ = turn.publish.tick(), if is_whole => {
                    self.publish_node(&mut turn).await;
                    None
                }
                () = or_never(turn.prober.as_ref().map(Prober::changed)) => {
                    self.give_up_offload(overlay, &mut turn).await?;
                    None
                }
                () = renewal, if is_whole => {
                    if self.renew(&mut turn).await {
                        let snapshot = watch.borrow().snapshot.clone();
                        memory.keep(&mut turn, &snapshot).await;
                    }
                    None
                }
                Ok(()) = firewall.changed() => {
                    self.tell_health(&turn);
                    None
                }
                reason = overlay.lost() => Some(turn.ended(Why::Lost(reason))),
            };
            if let Some(ended) = ended {
                return Ok(ended);
            }
        }
    }

    fn begin(&self, tenure: Tenure, memory: &Memory) -> Turn {
        let mut turn = Turn::new(tenure, self.place, self.settings.renew_margin);
        turn.prober = self.prober(&turn, memory);
        self.board.probes(turn.prober.as_ref().map(|prober| prober.findings().clone()));
        turn
    }

    /// What finds out whom packets reach; none where no socket is to be had.
    fn prober(&self, turn: &Turn, memory: &Memory) -> Option<Prober> {
        let local =
            probe::local(self.kind, self.place.public_ip, turn.tenure.lease.key.networks())?;
        // During an outage of the registry, peers cannot hear of another port.
        let known = memory.last_known.load().map(|(known, _)| known);
        // Who has probed another subnet's before it was ours may have left its mark in this host's NAT.
        let known = known.filter(|known| known.lease.key == turn.tenure.lease.key);
        let port = known.and_then(|known| known.probe_port);
        let overlay_port = self.kind.port(Some(&turn.tenure.config.backend));
        Prober::start(local, port, self.started.mtu, overlay_port)
    }

    /// Takes in what the registry says now, or that it cannot be read.
    async fn heard(
        &self,
        View { snapshot, readable }: &View,
        overlay: &mut Overlay,
        turn: &mut Turn,
        memory: &mut Memory,
    ) -> anyhow::Result<()> {
        let was_readable = turn.readable.replace(*readable) == Some(true);
        self.board.registry(*readable);
        if *readable {
            self.follow(snapshot, overlay, turn).await?;
        } else {
            turn.forget_writes();
            self.reconcile(snapshot, overlay, turn, Basis::Memory).await?;
        }
        turn.heard = Arc::clone(snapshot);
        let is_told = snapshot.nodes.iter().any(|it| it.id == self.place.node.id);
        if let Some(at) = turn.published.filter(|_| *readable && !is_told) {
            turn.publish.reset_at(at + NODE_RETRY);
        }
        if *readable && !was_readable {
            memory.keep(turn, snapshot).await;
        }
        Ok(())
    }

    /// Takes up what a claim has got; ends the loop where those are other subnets.
    async fn claimed(
        &self,
        lease: Lease,
        watch: &watch::Receiver<View>,
        overlay: &mut Overlay,
        turn: &mut Turn,
    ) -> anyhow::Result<Option<Ended>> {
        turn.tenure.lost = None;
        if lease.key != turn.tenure.lease.key {
            let tenure = Tenure::of(lease, turn.tenure.config.clone());
            return Ok(Some(Ended { why: Why::OtherLease, tenure }));
        }
        turn.hold(lease, self.settings.renew_margin);
        turn.publish.reset_immediately();
        let snapshot = watch.borrow().snapshot.clone();
        self.reconcile(&snapshot, overlay, turn, Basis::Memory).await?;
        Ok(None)
    }

    /// Sees whether the external interface is what it was, and ends the turn where the backend has to
    /// begin anew on it. Where there is none to use for now, all stays as it is.
    async fn follow_interface(&self, turn: &mut Turn) -> anyhow::Result<Option<Ended>> {
        let next =
            match external::changed(self.settings, &turn.tenure.config, &turn.interface).await {
                Ok(None) => {
                    (turn.stuck, turn.replaced) = (None, None);
                    return Ok(None);
                }
                Ok(Some(next)) => next,
                Err(reason) => {
                    (turn.stuck, turn.replaced) = (Some(reason), None);
                    return Ok(None);
                }
            };
        let ExternalInterface { other_addresses, link_local, .. } = next.interface.clone();
        let mut known = ExternalInterface { other_addresses, ..turn.interface.clone() };
        // An address that comes and goes with the link, and that only one backend has a use for.
        if self.kind != BackendKind::HostGw {
            known.link_local = link_local;
        }
        if known == next.interface {
            (turn.stuck, turn.replaced) = (None, None);
            turn.interface = next.interface;
            turn.publish.reset_immediately();
            return Ok(None);
        }
        if let Some(further) = turn.further_in_place_of_ours(&next.interface) {
            let since = *turn.replaced.get_or_insert_with(Instant::now);
            if since.elapsed() < ADDRESS_PATIENCE {
                turn.slow.reset_at(since + ADDRESS_PATIENCE);
                turn.stuck =
                    Some(format!("its address may be back in a moment; else {further} is next"));
                return Ok(None);
            }
        }
        let Self { settings, kind, place, .. } = *self;
        match Prepared::open(settings, &turn.tenure.config, kind, next, &place.node.id).await? {
            Ok(prepared) => Ok(Some(turn.ended(Why::OtherInterface(Box::new(prepared))))),
            Err(error) => {
                turn.stuck = Some(error.to_string());
                Ok(None)
            }
        }
    }

    /// Sees to what somebody may have changed in the kernel.
    async fn put_right(
        &self,
        watch: &watch::Receiver<View>,
        overlay: &mut Overlay,
        turn: &mut Turn,
    ) -> anyhow::Result<Option<Ended>> {
        if let Some(ended) = self.follow_interface(turn).await? {
            return Ok(Some(ended));
        }
        let snapshot = watch.borrow().snapshot.clone();
        // What the registry says anew is no repair.
        self.reconcile(&snapshot, overlay, turn, Basis::Memory).await?;
        if self.reconcile(&snapshot, overlay, turn, Basis::Kernel).await? {
            tracing::warn!("somebody changed links or routes of weft's; put them right");
            self.board.update(|status| status.repairs += 1);
            if turn.repairs.count() {
                // Says that it is given up.
                self.reconcile(&snapshot, overlay, turn, Basis::Memory).await?;
            }
        }
        Ok(None)
    }

    /// Sees to everything, though nothing was heard.
    async fn look_at_all(
        &self,
        watch: &watch::Receiver<View>,
        overlay: &mut Overlay,
        turn: &mut Turn,
        memory: &mut Memory,
    ) -> anyhow::Result<Option<Ended>> {
        if let Some(ended) = self.follow_interface(turn).await? {
            return Ok(Some(ended));
        }
        let View { snapshot, readable } = watch.borrow().clone();
        if readable {
            memory.keep(turn, &snapshot).await;
        }
        self.reconcile(&snapshot, overlay, turn, Basis::Kernel).await?;
        Ok(None)
    }

    /// Follows the registry: first our own lease, then the peers'. Under a lost lease all goes on as
    /// before.
    async fn follow(
        &self,
        snapshot: &Snapshot,
        overlay: &mut Overlay,
        turn: &mut Turn,
    ) -> anyhow::Result<()> {
        match keeper::check_own(&turn.tenure.lease, &turn.tenure.former, &snapshot.leases) {
            Own::Held(lease) => {
                if lease.attrs.same_node(&turn.identity.attrs) {
                    turn.tenure.former = vec![turn.identity.attrs.clone()];
                }
                // A claim that goes on will find it, and ends with it.
                turn.tenure.lost = None;
                turn.hold(lease, self.settings.renew_margin);
            }
            Own::Missing if turn.tenure.lost == Some(Lost::Gone) => {}
            Own::Missing => {
                // What is told may be from before our last write: who is waited for then stays so.
                turn.vanished
                    .get_or_insert_with(|| Vanished::of(&turn.heard, &turn.tenure.lease.key));
                tracing::warn!(subnet = %turn.tenure.lease.key, "our lease is gone; claiming it again");
                self.lose(turn, Lost::Gone, "our lease is gone; claiming it again");
            }
            Own::TakenBy(_) if turn.tenure.lost == Some(Lost::Taken) => {}
            Own::TakenBy(other) => {
                tracing::error!(
                    subnet = %turn.tenure.lease.key,
                    owner = ?other.attrs.public_addresses().collect::<Vec<_>>(),
                    "our subnet has another owner; its containers must move to a new subnet"
                );
                self.lose(turn, Lost::Taken, "our subnet has another owner; claiming another one");
            }
        }
        self.reconcile(snapshot, overlay, turn, Basis::Memory).await?;
        Ok(())
    }

    fn lose(&self, turn: &mut Turn, lost: Lost, why: &str) {
        // Else the claim has told already what it waits for.
        if turn.tenure.lost.replace(lost).is_none() {
            self.health.starts_again(why);
        }
    }

    /// Makes everything as it should be, and says whether the kernel had to be changed.
    async fn reconcile(
        &self,
        snapshot: &Snapshot,
        overlay: &mut Overlay,
        turn: &mut Turn,
        basis: Basis,
    ) -> anyhow::Result<bool> {
        let completed = turn.with_vanished(snapshot);
        let snapshot = completed.as_ref().unwrap_or(snapshot);
        let (desired, refused) = desired(self.settings, self.kind, snapshot, turn);
        turn.members.follow(&desired.peers);
        let (kind, public_ip) = (self.kind, self.place.public_ip);
        let targets = probe::targets(kind, public_ip, &desired.peers, &snapshot.nodes);
        turn.forget_given_up(&desired);
        turn.config_problem = follow_config(self.settings, snapshot, turn);
        turn.rival = Self::rival(snapshot, turn);
        if basis == Basis::Kernel {
            turn.in_the_way = self.in_the_way(turn).await?;
        }
        let report = overlay.call(move |backend| backend.reconcile(&desired, basis)).await?;
        // Not before there is a way to them: the first probe would be lost.
        if let Some(prober) = &turn.prober {
            prober.aim(targets);
        }
        self.kernel.hear_neighbours_of(report.neighbours_of);
        report.attrs.into_iter().for_each(|attrs| turn.describe(attrs));
        if turn.tenure.is_held() && (basis == Basis::Kernel || turn.subnet_file != Some(Ok(()))) {
            self.keep_subnet_file(turn);
        }
        turn.fails_in(report.failures);
        turn.has_problems(refused.into_iter().chain(report.problems));
        self.tell(overlay, turn, snapshot);
        Ok(report.changed)
    }

    /// Tells whoever asks how it is.
    fn tell(&self, overlay: &Overlay, turn: &Turn, snapshot: &Snapshot) {
        let lease = &turn.tenure.lease;
        let subnets: Vec<IpNetwork> = lease.key.networks().collect();
        self.board.backend(overlay.status(), &snapshot.nodes);
        self.board.update(|status| {
            status.reconciliations += 1;
            status.problems = turn.problems.iter().cloned().collect();
            if status.subnets != subnets {
                status.subnets = subnets;
                status.lease_since = Some(Timestamp::now());
            }
        });
        self.board.lease(lease, turn.tenure.renewal);
        self.tell_health(turn);
    }

    /// What of this host keeps packets from containers: bridges of other subnets, and a kernel that does not
    /// forward.
    async fn in_the_way(&self, turn: &Turn) -> anyhow::Result<Vec<String>> {
        let links = spawn_blocking(|| Netlink::open().ok()?.links().ok()).await?;
        let Started { device, other_devices, .. } = &self.started;
        let ours: Vec<&str> =
            [device].into_iter().chain(other_devices).map(String::as_str).collect();
        let found = links
            .map(|it| overlap::strays(&turn.tenure.config, &turn.tenure.lease.key, &it, &ours));
        let found = found.unwrap_or_default().into_iter();
        let families = turn.tenure.lease.key.networks().map(|subnet| subnet.is_ipv6());
        let still =
            families.filter_map(|ipv6| ours.iter().find_map(|it| ip_forward::off(ipv6, it)));
        Ok(some(found.chain(still)))
    }

    /// Without the firewall's rules packets move, but containers do not get far; with another node at
    /// our address some get lost, as with a device or routes that are not as they should be; without
    /// subnet.env containers do not get their addresses.
    fn tell_health(&self, turn: &Turn) {
        if turn.tenure.lost.is_some() {
            // What keeps us from a lease has been told.
        } else if turn.is_announced {
            let firewall = self.firewall.state();
            let problems = firewall.problem.iter().chain(&turn.rival).chain(&turn.failures);
            let notes = turn.config_problem.iter().chain(&firewall.note);
            self.health.forwards(problems.cloned().collect(), notes.cloned().collect());
        } else {
            let problem = turn.subnet_file.as_ref().and_then(|written| written.as_ref().err());
            self.health.waits(problem.map_or("subnet.env is not written yet", String::as_str));
        }
    }

    /// Another node that lives with our public address.
    fn rival(snapshot: &Snapshot, turn: &Turn) -> Option<String> {
        let other = keeper::claimant(&turn.identity, &snapshot.nodes)?;
        Some(format!(
            "the node {} (id {}) lives with our public address; give either a --public-ip of its own",
            other.name, other.id
        ))
    }

    /// Writes subnet.env where it does not say what it should.
    fn keep_subnet_file(&self, turn: &mut Turn) {
        let path = &self.settings.subnet_file;
        let Self { settings, started, .. } = self;
        let ip_masq = settings.switches.masquerade;
        let env = SubnetEnv::new(&turn.tenure.config, &turn.tenure.lease, started.mtu, ip_masq);
        if turn.subnet_file == Some(Ok(())) {
            if env.is_in(path) {
                return;
            }
            tracing::warn!(path = %path.display(), "somebody changed or removed subnet.env");
        }
        let written = env.write(path);
        if written.is_ok() {
            tracing::info!(path = %path.display(), "wrote subnet.env");
            turn.is_announced = true;
        }
        let problem = |error| format!("cannot write {}: {error}; trying again", path.display());
        turn.subnet_file = Some(written.map_err(problem));
    }

    /// Where an offload loses packets, does without it, and sees whether that helps.
    async fn give_up_offload(&self, overlay: &mut Overlay, turn: &mut Turn) -> anyhow::Result<()> {
        let Some(prober) = &turn.prober else { return Ok(()) };
        let mut is_news = false;
        for (offload, towards) in prober.findings().blamed() {
            let (Towards::One(peer) | Towards::All(peer)) = towards;
            let given_up = overlay.call(move |backend| backend.give_up(offload, towards)).await?;
            if let Some(GivenUp { what, towards, cure }) = given_up {
                let whom = towards.map(|peer| format!(" towards {peer}")).unwrap_or_default();
                let line = format!(
                    "{what}{whom} is given up: packets get lost by it on the way to {peer}; {cure}"
                );
                tracing::warn!("{line}");
                turn.problems.insert(line.clone());
                turn.given_up.push((line, towards));
                is_news = true;
            }
        }
        if is_news {
            prober.probe_paths();
            let problems = turn.problems.iter().cloned().collect();
            self.board.update(|status| status.problems = problems);
        }
        Ok(())
    }
}
