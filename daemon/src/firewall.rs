//! Keeps the firewall's rules as they should be, beside the daemon's loop: writes them when they
//! change, puts them back when somebody else removes them, and takes over what flannel or another
//! `--firewall` left.

use std::time::{Duration, Instant};

use anyhow::Context;
use clap::ValueEnum;
use ipnetwork::IpNetwork;
use tokio::sync::watch;
use tokio::time::{MissedTickBehavior, interval};
use weft_backends::KernelEvents;
use weft_backends::netlink::Netlink;
use weft_control::firewall::iptables::Iptables;
use weft_control::firewall::nftables::Nftables;
use weft_control::firewall::{FirewallError, Rules};

use crate::or_never::or_never;
use crate::repairs::Repairs;
use crate::repeats::Repeats;
use crate::rest::Rest;

/// How often what is not ours is looked at, and tried to be removed where it is in the way.
const OTHERS_INTERVAL: Duration = Duration::from_secs(60);

/// By what program rules come into the kernel.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum FirewallKind {
    Auto,
    Iptables,
    Nftables,
}

/// What the daemon wants of the firewall.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Wanted {
    pub(crate) rules: Rules,
    /// Networks whose packets are discarded where no better route takes them.
    pub(crate) blackholes: Vec<IpNetwork>,
    /// The overlay's, in which there are no others.
    pub(crate) networks: Vec<IpNetwork>,
}

/// How the firewall is.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct FirewallState {
    /// What was last tried to bring about.
    pub(crate) tried: Option<Wanted>,
    /// What writes the rules.
    pub(crate) by: Option<String>,
    /// How often rules that somebody else changed were put back.
    pub(crate) repairs: u64,
    /// What is not as it should be.
    pub(crate) problem: Option<String>,
    /// What may not be as it should.
    pub(crate) note: Option<String>,
}

/// The firewall; it stays as it is when this is dropped.
#[derive(Debug)]
pub(crate) struct Firewall {
    wanted: watch::Sender<Option<Wanted>>,
    state: watch::Receiver<FirewallState>,
}

impl Firewall {
    /// Begins to keep it, with nothing wanted yet. `by_config`: the network config asks for nftables.
    pub(crate) fn start(kind: FirewallKind, by_config: bool, resync: Duration) -> Self {
        let (wanted, receiver) = watch::channel(None);
        let (sender, state) = watch::channel(FirewallState::default());
        let keeper = Keeper {
            kind: if by_config && kind == FirewallKind::Auto {
                FirewallKind::Nftables
            } else {
                kind
            },
            writer: None,
            kept: None,
            state: sender,
            said: Repeats::default(),
            left: Repeats::default(),
            repairs: Repairs::new(),
            repaired: 0,
            blackholes_kept: false,
            sweep_at: Some(Instant::now()),
            doubted: None,
        };
        tokio::spawn(keeper.keep(receiver, resync));
        Self { wanted, state }
    }

    /// Wants this from now on, and waits until it has been tried.
    pub(crate) async fn want(&mut self, wanted: Wanted) {
        self.wanted.send_replace(Some(wanted.clone()));
        // Fails only if nothing keeps the firewall any more.
        let _ = self.state.wait_for(|state| state.tried.as_ref() == Some(&wanted)).await;
    }

    pub(crate) fn watch(&self) -> watch::Receiver<FirewallState> {
        self.state.clone()
    }

    pub(crate) fn state(&self) -> FirewallState {
        self.state.borrow().clone()
    }
}

/// What writes rules.
#[derive(Debug)]
enum Writer {
    Iptables(Iptables),
    Nftables(Nftables),
}

impl Writer {
    async fn choose(kind: FirewallKind) -> Result<Self, FirewallError> {
        let nftables = || Self::Nftables(Nftables::default());
        match kind {
            FirewallKind::Nftables => Ok(nftables()),
            FirewallKind::Iptables => Iptables::find().await.map(Self::Iptables),
            FirewallKind::Auto => {
                Ok(Iptables::find().await.map_or_else(|_| nftables(), Self::Iptables))
            }
        }
    }

    async fn apply(&mut self, rules: &Rules, adopt: bool) -> Result<bool, FirewallError> {
        match self {
            Self::Iptables(iptables) => iptables.apply(rules, adopt).await,
            Self::Nftables(nftables) => nftables.apply(rules).await,
        }
    }

    /// Removes what others wrote for the same purpose, now that our own rules stand.
    async fn remove_leavings(&mut self) -> Result<(), FirewallError> {
        let mut removed = match self {
            Self::Iptables(_) => unless_missing(Nftables::default().remove().await)?,
            Self::Nftables(_) => match Iptables::find().await {
                Ok(iptables) => iptables.remove().await?,
                Err(_) => false,
            },
        };
        removed |= unless_missing(Nftables::remove_flannels().await)?;
        if let Ok(iptables) = Iptables::find().await
            && let Some(other) = iptables.other_kind().await
        {
            removed |= other.remove().await?;
        }
        if removed {
            tracing::info!("removed firewall rules that flannel or another --firewall had left");
        }
        Ok(())
    }

    /// What keeps the overlay's packets from passing in spite of our rules.
    async fn obstacle(&self, ipv6: bool) -> Option<String> {
        let Self::Nftables(_) = self else { return None };
        let drops = Iptables::find().await.ok()?.forward_drops(ipv6).await.ok()?;
        let program = if ipv6 { "ip6tables" } else { "iptables" };
        drops.then(|| {
            format!(
                "the chain FORWARD of {program} drops by its policy, which rules of nftables cannot \
                 overrule: use --firewall iptables, or `{program} -P FORWARD ACCEPT`"
            )
        })
    }

    /// What may keep them from it: rules there that nobody reads may let them pass.
    async fn doubt(&self, ipv6: bool) -> Option<String> {
        let found;
        let iptables = match self {
            Self::Iptables(iptables) => iptables,
            Self::Nftables(_) => {
                found = Iptables::find().await.ok()?;
                &found
            }
        };
        let other = iptables.other_that_drops(ipv6).await?;
        Some(format!(
            "the chain FORWARD of {other} drops by its policy, and weft's rules are not there: unless \
             others there accept the overlay's packets, have who set it use the same kind as weft, or \
             `{other} -P FORWARD ACCEPT`"
        ))
    }

    /// Says that others' packets do not pass, for whoever looks for the reason.
    async fn tell_policy(&self) {
        if let Self::Iptables(iptables) = self
            && iptables.forward_drops(false).await.unwrap_or(false)
        {
            tracing::info!(
                "the chain FORWARD drops by its policy; our rules let the overlay's packets pass"
            );
        }
    }

    fn describe(&self) -> String {
        match self {
            Self::Iptables(iptables) => iptables.version.clone(),
            Self::Nftables(_) => "nftables".into(),
        }
    }
}

/// Without nft there is nothing that was made by it.
fn unless_missing(outcome: Result<bool, FirewallError>) -> Result<bool, FirewallError> {
    match outcome {
        Err(FirewallError::Missing(_)) => Ok(false),
        other => other,
    }
}

/// The work behind [`Firewall`].
struct Keeper {
    kind: FirewallKind,
    writer: Option<Writer>,
    /// What stands, as far as we know.
    kept: Option<Wanted>,
    state: watch::Sender<FirewallState>,
    said: Repeats,
    /// What was said of what others left.
    left: Repeats,
    repairs: Repairs,
    /// How many there were in all.
    repaired: u64,
    /// Whether the blackhole routes have once been what they should be.
    blackholes_kept: bool,
    /// When to remove what others wrote before for the same purpose; never once that is done.
    sweep_at: Option<Instant>,
    /// When the other kind of iptables was last looked at.
    doubted: Option<Instant>,
}

impl Keeper {
    async fn keep(mut self, mut wanted: watch::Receiver<Option<Wanted>>, resync: Duration) {
        let events = KernelEvents::of_nftables()
            .inspect_err(|error| tracing::debug!("the kernel tells of no nftables: {error}"))
            .ok();
        let mut timer = interval(resync);
        timer.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut rest = Rest::none();
        loop {
            let tables_changed = async {
                rest.over().await;
                or_never(events.as_ref().map(KernelEvents::changed)).await;
            };
            let is_by_event = tokio::select! {
                changed = wanted.changed() => {
                    if changed.is_err() {
                        return;
                    }
                    false
                }
                _ = timer.tick() => false,
                () = tables_changed, if !self.repairs.is_fight() => true,
            };
            let now = wanted.borrow_and_update().clone();
            if let Some(now) = now {
                let (begun, before) = (tokio::time::Instant::now(), self.repaired);
                self.once(now).await;
                // Whoever removes ours may do so again at once.
                let is_for_nothing = is_by_event && self.repaired == before;
                rest = if is_for_nothing { Rest::after(begun) } else { Rest::none() };
            }
        }
    }

    async fn once(&mut self, wanted: Wanted) {
        let problem = match self.apply(&wanted).await {
            Ok(obstacle) => obstacle,
            Err(error) => Some(format!("the firewall is not as it should be: {error:#}")),
        };
        match &problem {
            Some(problem) => self.said.warn(problem),
            None => self.said = Repeats::default(),
        }
        let by = self.writer.as_ref().map(Writer::describe);
        let (repairs, note) = (self.repaired, self.state.borrow().note.clone());
        let tried = Some(wanted.clone());
        self.state.send_replace(FirewallState { tried, by, repairs, problem, note });
        // Nobody waits for that.
        self.look_elsewhere(&wanted.rules).await;
    }

    /// At the other kind of iptables, from time to time.
    async fn look_elsewhere(&mut self, rules: &Rules) {
        let Some(writer) = &self.writer else { return };
        if self.doubted.is_some_and(|at| at.elapsed() < OTHERS_INTERVAL) {
            return;
        }
        let mut found = None;
        for ipv6 in [false, true] {
            if found.is_none() && !rules.family(ipv6).forward.is_empty() {
                found = writer.doubt(ipv6).await;
            }
        }
        self.doubted = Some(Instant::now());
        self.state.send_if_modified(|state| {
            let is_news = state.note != found;
            if let Some(doubt) = found.as_ref().filter(|_| is_news) {
                tracing::warn!("{doubt}");
            }
            state.note = found;
            is_news
        });
    }

    /// Makes it so; says what is in the way nevertheless. Routes and rules do not depend on each other.
    async fn apply(&mut self, wanted: &Wanted) -> anyhow::Result<Option<String>> {
        let routes = self.keep_blackholes(wanted).await;
        let obstacle = self.keep_rules(wanted).await?;
        routes?;
        Ok(obstacle)
    }

    /// With none wanted, those of an earlier run go once; later ones are another's.
    async fn keep_blackholes(&mut self, wanted: &Wanted) -> anyhow::Result<()> {
        let Wanted { blackholes, networks, .. } = wanted.clone();
        if self.blackholes_kept && blackholes.is_empty() {
            return Ok(());
        }
        tokio::task::spawn_blocking(move || {
            let netlink = Netlink::open().context("cannot open a netlink socket")?;
            anyhow::Ok(netlink.keep_blackholes(&blackholes, &networks)?)
        })
        .await??;
        self.blackholes_kept = true;
        Ok(())
    }

    async fn keep_rules(&mut self, wanted: &Wanted) -> anyhow::Result<Option<String>> {
        let first = self.kept.is_none();
        let nothing = wanted.rules.is_empty();
        // Later it is another daemon's.
        if nothing && !first {
            return Ok(None);
        }
        let Some(mut writer) = self.writer(nothing).await? else {
            self.kept = Some(wanted.clone());
            return Ok(None);
        };
        let outcome = writer.apply(&wanted.rules, first).await;
        let mut obstacle = None;
        for ipv6 in [false, true] {
            if obstacle.is_none() && !wanted.rules.family(ipv6).forward.is_empty() {
                obstacle = writer.obstacle(ipv6).await;
            }
        }
        if outcome.is_ok() {
            self.sweep(&mut writer).await;
            if first {
                writer.tell_policy().await;
            }
        }
        let by = writer.describe();
        self.writer = Some(writer);
        self.note(outcome, wanted, &by)?;
        if self.repairs.is_fight() {
            return Ok(Some(
                "another program keeps removing the firewall's rules; they are put back by the \
                 timer only (--iptables-resync)"
                    .into(),
            ));
        }
        Ok(obstacle)
    }

    /// The one so far, or a new one; none where there is no program to write with and nothing to write.
    async fn writer(&mut self, nothing: bool) -> Result<Option<Writer>, FirewallError> {
        if let Some(writer) = self.writer.take() {
            return Ok(Some(writer));
        }
        match Writer::choose(self.kind).await {
            Err(FirewallError::Missing(_)) if nothing => Ok(None),
            chosen => chosen.map(Some),
        }
    }

    /// Removes what others left, once it is time.
    async fn sweep(&mut self, writer: &mut Writer) {
        if self.sweep_at.is_none_or(|at| at > Instant::now()) {
            return;
        }
        self.sweep_at = match writer.remove_leavings().await {
            Ok(()) => None,
            Err(error) => {
                self.left.warn(&format!(
                    "cannot look for, or remove, firewall rules that may be left from before: {error}"
                ));
                Some(Instant::now() + OTHERS_INTERVAL)
            }
        };
    }

    /// What came of writing.
    fn note(
        &mut self,
        outcome: Result<bool, FirewallError>,
        wanted: &Wanted,
        by: &str,
    ) -> Result<(), FirewallError> {
        match outcome {
            Err(FirewallError::Missing(_)) if wanted.rules.is_empty() => {}
            Ok(true) if self.kept.as_ref() == Some(wanted) => self.repaired(),
            Ok(true) => tracing::info!(%by, "wrote the firewall's rules"),
            Ok(false) => {}
            Err(error) => {
                // We wrote, which the kernel tells us of, too.
                if matches!(error, FirewallError::NotKept(_)) {
                    self.repairs.count();
                }
                return Err(error);
            }
        }
        self.kept = Some(wanted.clone());
        Ok(())
    }

    fn repaired(&mut self) {
        tracing::warn!("somebody changed the firewall's rules; put them back");
        self.repairs.count();
        self.repaired += 1;
    }
}
