//! `weft cleanup`: removes what weft has made on this host.
//!
//! What is weft's bears its mark: links the alias, routes the protocol number, the table of nftables
//! its name. The chains of iptables have flannel's names, so they go by the networks in their rules.
//! First all of it is found, then it is removed, the files last: as long as anything is left, they
//! tell the next cleanup what.

use std::ffi::OsStr;
use std::fmt;
use std::fs::{self, File};
use std::io::Write;
use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::{Context, bail};
use clap::Args;
use ipnetwork::IpNetwork;
use tokio::runtime::{Builder, Runtime};
use weft_backends::netlink::{KernelRoute, LINK_ALIAS, Link, Netlink, ROUTE_PROTOCOL};
use weft_control::firewall::FirewallError;
use weft_control::firewall::iptables::{Iptables, OwnChain};
use weft_control::firewall::nftables::{self, Nftables};

use crate::directories::{Directories, STATE_DIR};
use crate::docker_opts::{DOCKER_FILE, bridge_in};
use crate::made::{Made, files_of};
use crate::node::{self, RUN_FILES, STATE_FILES};
use crate::state_file::LastKnown;

/// Remove all that weft has made on this host: devices, routes, firewall rules and files.
///
/// With another --state-dir than the default only what the daemon has made that keeps its state
/// there. Stop weftd first. Leases stay in the registry. Exit status: 0 if nothing is left, 1 if
/// something could not be removed, or a daemon runs.
#[derive(Debug, Args)]
pub struct CleanupArgs {
    /// Say what would be removed, and remove nothing.
    #[arg(long)]
    dry_run: bool,
}

/// Finds and removes it, and says what.
///
/// # Errors
/// A daemon runs, or the kernel or a directory cannot be read.
pub fn run(
    arguments: &CleanupArgs,
    directories: &Directories,
    out: &mut dyn Write,
) -> anyhow::Result<ExitCode> {
    let scope = Scope::read(directories)?;
    // Held to the end, so that no daemon starts meanwhile.
    let _locks = match scope.keep_daemons_out() {
        Ok(locks) => locks,
        Err(error) if arguments.dry_run => {
            writeln!(out, "note: {error:#}")?;
            Vec::new()
        }
        Err(error) => return Err(error),
    };
    let cleaner = Cleaner::new()?;
    let (traces, unseen) = cleaner.find(&scope)?;
    if traces.is_empty() && unseen.is_empty() {
        writeln!(out, "there is nothing of weft")?;
    }
    for error in &unseen {
        writeln!(out, "cannot look for firewall rules: {error}")?;
    }
    let mut failures = unseen.len();
    for trace in &traces {
        if arguments.dry_run {
            writeln!(out, "would remove {trace}")?;
        } else if failures > 0 && trace.is_record() {
            writeln!(out, "kept {trace}, for another try")?;
        } else if let Err(error) = cleaner.remove(trace) {
            writeln!(out, "cannot remove {trace}: {error:#}")?;
            failures += 1;
        } else {
            writeln!(out, "removed {trace}")?;
        }
    }
    scope.left.iter().try_for_each(|line| writeln!(out, "left: {line}"))?;
    Ok(if failures == 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

/// Whose things are to be removed.
struct Scope {
    /// Of all daemons in this network namespace; else only what is for one of the networks.
    whole_host: bool,
    networks: Vec<IpNetwork>,
    locks: Vec<PathBuf>,
    /// Of the daemons, and then the directories that they were in.
    files: Vec<PathBuf>,
    directories: Vec<PathBuf>,
    /// What is not removed, and how it could be.
    left: Vec<String>,
}

impl Scope {
    fn read(directories: &Directories) -> anyhow::Result<Self> {
        let Directories { state_dir, run_dir } = directories;
        let whole_host = state_dir == Path::new(STATE_DIR);
        let made = Made::read_all(state_dir)?;
        let mut networks: Vec<IpNetwork> =
            made.iter().flat_map(|made| made.networks.clone()).collect();
        networks.extend(known_networks(state_dir)?);
        let is_state = |name: &str| STATE_FILES.iter().any(|start| name.starts_with(start));
        let mut files = files_of(state_dir, is_state)?;
        let mut locks: Vec<PathBuf> = made.iter().map(|made| made.lock.clone()).collect();
        if whole_host {
            let run_files = files_of(run_dir, |name| name.starts_with(RUN_FILES))?;
            let is_lock = |path: &&PathBuf| path.extension().is_some_and(|it| it == "lock");
            locks.extend(run_files.iter().filter(is_lock).cloned());
            files.extend(run_files);
        }
        for made in &made {
            files.extend([&made.socket, &made.subnet_file].map(Clone::clone));
        }
        files.extend(locks.iter().cloned());
        let is_of = |bridge: IpNetwork| networks.iter().any(|it| it.contains(bridge.ip()));
        let docker = fs::read_to_string(DOCKER_FILE).ok();
        if docker.and_then(|text| bridge_in(&text)).is_some_and(is_of) {
            files.push(DOCKER_FILE.into());
        }
        files.retain(|path| path.exists());
        let mut emptied: Vec<PathBuf> = vec![state_dir.clone()];
        let weft = files.iter().filter(|path| *path != Path::new(DOCKER_FILE));
        emptied.extend(weft.filter_map(|path| path.parent()).map(Path::to_owned));
        for list in [&mut locks, &mut files, &mut emptied] {
            list.sort();
            list.dedup();
        }
        // The last to go are those that tell what there is.
        files.sort_by_key(|path| path.starts_with(state_dir));
        let directories = emptied.into_iter().filter(|path| holds_only(path, &files)).collect();
        Ok(Self { whole_host, networks, locks, files, directories, left: left(state_dir)? })
    }

    /// # Errors
    /// A daemon runs.
    fn keep_daemons_out(&self) -> anyhow::Result<Vec<File>> {
        if self.whole_host
            && let Some(pid) = running()
        {
            bail!("weftd runs (pid {pid}); stop it first");
        }
        let held = self.locks.iter().map(|lock| node::keep_out(lock));
        Ok(held.collect::<anyhow::Result<Vec<_>>>()?.into_iter().flatten().collect())
    }

    fn has_address(&self, ip: IpAddr) -> bool {
        self.networks.iter().any(|network| network.contains(ip))
    }

    fn has_network(&self, network: IpNetwork) -> bool {
        self.whole_host || self.has_address(network.network())
    }

    fn has_link(&self, link: &Link) -> bool {
        let mut addresses = link.addresses.iter().map(|address| address.network.ip());
        let is_ours = self.whole_host || addresses.any(|ip| self.has_address(ip));
        is_ours && link.alias.as_deref() == Some(LINK_ALIAS)
    }
}

/// Whether it is a directory with nothing but these files.
fn holds_only(directory: &Path, files: &[PathBuf]) -> bool {
    files_of(directory, |_| true)
        .is_ok_and(|found| directory.is_dir() && found.iter().all(|path| files.contains(path)))
}

/// The overlays that daemons here were last in: the notes of what they made may be gone.
fn known_networks(state_dir: &Path) -> anyhow::Result<Vec<IpNetwork>> {
    let known = LastKnown::read_all(state_dir)?.into_iter();
    let configs = known.filter_map(|(_, known, _)| known.snapshot.network_config());
    Ok(configs.flat_map(|config| config.networks().collect::<Vec<_>>()).collect())
}

/// What lies in a registry, which is not this host's alone.
fn left(state_dir: &Path) -> anyhow::Result<Vec<String>> {
    let mut left = Vec::new();
    for (_, known, _) in LastKnown::read_all(state_dir)? {
        let mut subnets = known.lease.key.networks();
        let subnet = subnets.next().map(|it| it.to_string()).unwrap_or_default();
        left.push(format!(
            "the lease {} in the registry, until it expires; `weft registry release {subnet}` \
             removes it",
            known.lease.key
        ));
    }
    let registry = state_dir.join("registry");
    if registry.is_dir() {
        left.push(format!(
            "the registry {}, which holds the leases of every daemon that uses it",
            registry.display()
        ));
    }
    Ok(left)
}

/// A weftd in our network namespace, also one that was started by a link of another name, as flanneld.
fn running() -> Option<String> {
    let ours = fs::read_link("/proc/self/ns/net").ok()?;
    let processes = fs::read_dir("/proc").ok()?.filter_map(|entry| Some(entry.ok()?.path()));
    let mut daemons = processes.filter(|path| {
        let given = fs::read_to_string(path.join("comm")).unwrap_or_default();
        let program = fs::read_link(path.join("exe")).unwrap_or_default();
        let program = program.file_name().map(OsStr::to_string_lossy).unwrap_or_default();
        // A program that was replaced while it runs is "weftd (deleted)".
        [given.trim(), program.trim_end_matches(" (deleted)")].contains(&"weftd")
            && fs::read_link(path.join("ns/net")).is_ok_and(|its| its == ours)
    });
    Some(daemons.next()?.file_name()?.to_string_lossy().into_owned())
}

/// One thing that weft has made.
enum Trace {
    Device(Link),
    Route(KernelRoute),
    Blackhole(IpNetwork),
    Chain(Iptables, OwnChain),
    Table,
    File(PathBuf),
    Directory(PathBuf),
}

impl Trace {
    /// Whether it tells what else there is.
    fn is_record(&self) -> bool {
        matches!(self, Self::File(_) | Self::Directory(_))
    }
}

impl fmt::Display for Trace {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Device(link) => write!(f, "device {}", link.name),
            Self::Route(route) => {
                write!(f, "route to {}", route.destination)?;
                route.gateway.map_or(Ok(()), |gateway| write!(f, " via {gateway}"))
            }
            Self::Blackhole(network) => write!(f, "route that discards {network}"),
            Self::Chain(_, chain) => write!(f, "{chain}"),
            Self::Table => write!(f, "table {} of nft", nftables::TABLE),
            Self::File(path) => write!(f, "{}", path.display()),
            Self::Directory(path) => write!(f, "{}/", path.display()),
        }
    }
}

/// What finds and removes.
struct Cleaner {
    netlink: Netlink,
    /// For the firewall's programs; netlink has one of its own.
    runtime: Runtime,
}

impl Cleaner {
    fn new() -> anyhow::Result<Self> {
        Ok(Self {
            netlink: Netlink::open().context("cannot open a netlink socket")?,
            runtime: Builder::new_current_thread().enable_all().build()?,
        })
    }

    /// In the order in which it is removed; and what kept us from looking for all of it.
    fn find(&self, scope: &Scope) -> anyhow::Result<(Vec<Trace>, Vec<FirewallError>)> {
        let devices: Vec<Link> =
            self.netlink.links()?.into_iter().filter(|link| scope.has_link(link)).collect();
        // Routes out of a device go with it.
        let stays = |route: &KernelRoute| {
            route.protocol == ROUTE_PROTOCOL
                && scope.has_network(route.destination)
                && !devices.iter().any(|link| Some(link.index) == route.link)
        };
        let routes: Vec<KernelRoute> = self.netlink.routes()?.into_iter().filter(stays).collect();
        let blackholes = self.netlink.blackholes()?.into_iter();
        let blackholes = blackholes.filter(|network| scope.has_network(*network));
        let mut traces: Vec<Trace> = devices.into_iter().map(Trace::Device).collect();
        traces.extend(routes.into_iter().map(Trace::Route));
        traces.extend(blackholes.map(Trace::Blackhole));
        let (rules, unseen) = self.runtime.block_on(firewall(scope));
        traces.extend(rules);
        traces.extend(scope.files.iter().cloned().map(Trace::File));
        traces.extend(scope.directories.iter().cloned().map(Trace::Directory));
        Ok((traces, unseen))
    }

    fn remove(&self, trace: &Trace) -> anyhow::Result<()> {
        match trace {
            Trace::Device(link) => self.netlink.remove_link(link)?,
            Trace::Route(route) => {
                let refused = self.netlink.remove_routes(std::slice::from_ref(route));
                refused.into_iter().next().map_or(Ok(()), |(_, error)| Err(error))?;
            }
            Trace::Blackhole(network) => {
                self.netlink.remove_blackhole(*network)?;
            }
            Trace::Chain(iptables, chain) => {
                self.runtime.block_on(iptables.remove_chain(*chain))?;
            }
            Trace::Table => {
                self.runtime.block_on(Nftables::default().remove())?;
            }
            Trace::File(path) => fs::remove_file(path)?,
            Trace::Directory(path) => fs::remove_dir(path)?,
        }
        Ok(())
    }
}

/// The rules by both of iptables' kinds and by nft, and what failed. A program that is missing has
/// made none.
async fn firewall(scope: &Scope) -> (Vec<Trace>, Vec<FirewallError>) {
    let (mut traces, mut failures) = (Vec::new(), Vec::new());
    if !scope.networks.is_empty() {
        match Iptables::find().await {
            Ok(iptables) => {
                let other = iptables.other_kind().await;
                for iptables in [iptables].into_iter().chain(other) {
                    let (chains, failed) = iptables.chains(&scope.networks).await;
                    let chains = chains.into_iter();
                    traces.extend(chains.map(|chain| Trace::Chain(iptables.clone(), chain)));
                    failures.extend(failed);
                }
            }
            Err(FirewallError::Missing(_)) => {}
            Err(error) => failures.push(error),
        }
    }
    match Nftables::rules().await {
        Ok(rules) => {
            let mut words = rules.iter().flat_map(|rules| rules.split_whitespace());
            let is_ours = |word: &str| word.parse().is_ok_and(|it| scope.networks.contains(&it));
            if (rules.is_some() && scope.whole_host) || words.any(is_ours) {
                traces.push(Trace::Table);
            }
        }
        Err(error) => failures.push(error),
    }
    (traces, failures)
}
