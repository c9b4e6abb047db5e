//! The lab: hosts in network namespaces with a weftd each, and containers behind them.
//!
//! ```text
//!          c1              c2              c3        containers: eth0 is .2 of the host's subnet
//!           |               |               |
//!        docker0         docker0         docker0     .1 of it, as docker does with --bip and --mtu
//!    h1  weftd       h2  weftd       h3  weftd       hosts: the overlay's device is weftd's own
//!         eth0            eth0            eth0       10.168.0.94, .95, .96
//!           |               |               |
//!           +------------- br0 -------------+        the switch sw, all that the hosts share
//! ```
//!
//! Each of c1…, h1… and sw is a namespace `weft-<lab id>-c1` and so on. No device ever appears
//! outside of them, and labs run beside each other. Dropping a [`Lab`] removes all of it.

mod bytes;
mod cancel;
mod child;
mod command;
mod down;
mod etcd;
mod measure;
mod ping;
mod process;
mod progress;
mod record;
mod run;
mod tables;
mod topology;
mod transfer;

use std::net::IpAddr;
use std::path::PathBuf;
use std::process::ExitStatus;
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use ipnetwork::IpNetwork;
use tempfile::TempDir;

use self::child::RunningChild;
use self::process::ProcessId;
use self::record::Record;
use crate::netns::NetNs;
use crate::status::{self, Status};

pub use self::bytes::{BadBytes, Bytes};
pub use self::cancel::{Cancel, Cancelled};
pub use self::child::forget_settings;
pub use self::command::{LabArgs, run};
pub use self::etcd::{EtcdMember, EtcdOptions};
pub use self::ping::{PingOptions, PingReport, Reply, ping};
pub use self::topology::{Container, Host, Underlay};
pub use self::transfer::{Patience, Transfer, transfer};

/// The overlay's network, where no other is asked for.
pub const NETWORK: &str = "10.42.0.0/16";

/// How long a daemon may take to stop, on a host that is busy with others: tens may stop at a time.
const GRACE: Duration = Duration::from_secs(10);

/// How often something that is waited for is looked at.
const POLL: Duration = Duration::from_millis(20);

/// How much of a daemon's log goes into an error.
const LOG_LINES: usize = 15;

/// What a lab begins with.
#[derive(Debug, Clone)]
pub struct LabOptions {
    /// How many hosts.
    pub hosts: usize,
    /// The daemons' `--backend`.
    pub backend: String,
    /// The daemons' `--network`.
    pub network: String,
    /// What hosts and etcd are reached by.
    pub underlay: Underlay,
    /// Where leases are kept, if not in a directory.
    pub etcd: EtcdOptions,
    /// Where daemons look for programs, if not where we do.
    pub search_path: Option<PathBuf>,
    /// How long a transfer may be without progress.
    pub stall: Duration,
    /// Ends whatever the lab waits for.
    pub cancel: Cancel,
}

impl Default for LabOptions {
    fn default() -> Self {
        Self {
            hosts: 3,
            backend: "udp-tun".into(),
            network: NETWORK.into(),
            underlay: Underlay::Ipv4,
            etcd: EtcdOptions::default(),
            search_path: None,
            stall: Duration::from_secs(20),
            cancel: Cancel::default(),
        }
    }
}

/// A lab that is up. Hosts are numbered from 0 in calls; host 0 is called h1, its container c1.
#[derive(Debug)]
pub struct Lab {
    options: LabOptions,
    sites: Vec<Site>,
    etcd: Vec<EtcdMember>,
    router: Option<NetNs>,
    switch: Option<NetNs>,
    /// What daemons are started from, if not from what was built beside us.
    weftd: Option<PathBuf>,
    /// None once removed or kept.
    directory: Option<TempDir>,
    record: Record,
}

/// A host and what belongs to it.
#[derive(Debug)]
struct Site {
    host: Host,
    container: Option<Arc<Container>>,
    daemon: Option<RunningChild>,
}

impl Lab {
    /// Makes the switch and the hosts; daemons and containers come with their own calls.
    ///
    /// # Errors
    /// We are not root, a program is missing, or the kernel refuses something. What was made so
    /// far is removed.
    pub fn new(options: LabOptions) -> anyhow::Result<Self> {
        require_root()?;
        let id: String = (0..6).map(|_| fastrand::lowercase()).collect();
        let directory = tempfile::Builder::new()
            .prefix(&Record::directory_prefix(&id))
            .tempdir()
            .context("cannot make a temporary directory")?;
        let record = Record {
            owner: Some(ProcessId::of(std::process::id())?),
            directory: directory.path().to_owned(),
            namespaces: Vec::new(),
            daemons: Vec::new(),
            id,
        };
        let hosts = options.hosts;
        let directory = Some(directory);
        let mut lab = Self {
            options,
            sites: Vec::new(),
            etcd: Vec::new(),
            router: None,
            switch: None,
            weftd: None,
            directory,
            record,
        };
        let name = lab.announce("sw")?;
        lab.switch = Some(topology::make_switch(name)?);
        lab.add_etcd()?;
        for _ in 0..hosts {
            lab.options.cancel.check()?;
            lab.add_host()?;
        }
        Ok(lab)
    }

    /// Makes the members of etcd, all at once since none serves before most are there.
    fn add_etcd(&mut self) -> anyhow::Result<()> {
        let options = self.options.etcd.clone();
        let addresses: Vec<IpAddr> = (1..=options.members)
            .map(|number| self.etcd_address(number))
            .collect::<Result<_, _>>()?;
        for number in 1..=options.members {
            let name = self.announce(&format!("e{number}"))?;
            let netns = topology::make_etcd(self.switch()?, name, number, addresses[number - 1])?;
            let directory = self.directory()?;
            self.etcd.push(EtcdMember::new(netns, number, &addresses, &options, directory));
        }
        (0..options.members).try_for_each(|member| self.start_etcd(member))
    }

    fn etcd_address(&self, number: usize) -> anyhow::Result<IpAddr> {
        topology::etcd_address(self.options.underlay, number)
    }

    /// A member of etcd.
    ///
    /// # Panics
    /// There are not so many.
    pub fn etcd(&mut self, member: usize) -> &mut EtcdMember {
        &mut self.etcd[member]
    }

    /// Starts a member of etcd that was killed.
    ///
    /// # Errors
    /// There is no etcd to start.
    pub fn start_etcd(&mut self, member: usize) -> anyhow::Result<()> {
        let id = self.etcd[member].start()?;
        self.record.daemons.push(id);
        self.record.save()
    }

    /// Where clients find etcd.
    pub fn etcd_urls(&self) -> Vec<String> {
        self.etcd.iter().map(|member| member.url.clone()).collect()
    }

    /// What tells this lab from others.
    pub fn id(&self) -> &str {
        &self.record.id
    }

    /// The namespace that holds the switch `br0`; host h1 is plugged into its port `h1`.
    ///
    /// # Errors
    /// The lab is removed.
    pub fn switch(&self) -> anyhow::Result<&NetNs> {
        self.switch.as_ref().context("the lab is removed")
    }

    /// The directory registry that all daemons use.
    ///
    /// # Errors
    /// The lab is removed.
    pub fn registry(&self) -> anyhow::Result<PathBuf> {
        Ok(self.directory()?.join("registry"))
    }

    /// How many hosts there are.
    pub fn hosts(&self) -> usize {
        self.sites.len()
    }

    /// A host.
    ///
    /// # Panics
    /// There are not so many.
    pub fn host(&self, host: usize) -> &Host {
        &self.sites[host].host
    }

    /// Plugs one more host into the switch and returns its number.
    ///
    /// # Errors
    /// The address range is full, or the kernel refuses something.
    pub fn add_host(&mut self) -> anyhow::Result<usize> {
        let host = self.sites.len();
        if host == topology::MAX_HOSTS {
            bail!("a lab holds at most {} hosts", topology::MAX_HOSTS);
        }
        let number = host + 1;
        let name = self.announce(&format!("h{number}"))?;
        let address = topology::host_address(self.options.underlay, number)?;
        let made = topology::make_host(self.switch()?, name, number, address, self.directory()?)?;
        self.sites.push(Site { host: made, container: None, daemon: None });
        Ok(host)
    }

    /// Plugs a router with these addresses into the switch, which forwards what hosts send to it.
    ///
    /// # Errors
    /// There is one already, or the kernel refuses something.
    pub fn add_router(&mut self, addresses: &[IpNetwork]) -> anyhow::Result<&NetNs> {
        if self.router.is_some() {
            bail!("there is a router already");
        }
        let name = self.announce("r")?;
        let router = topology::make_router(self.switch()?, name, addresses)?;
        Ok(self.router.insert(router))
    }

    /// Starts a weftd on a host.
    ///
    /// # Errors
    /// One runs there already, or there is no weftd to start.
    pub fn start_daemon(&mut self, host: usize, more: &[&str]) -> anyhow::Result<()> {
        if self.sites[host].daemon.is_some() {
            bail!("a weftd runs on h{} already", host + 1);
        }
        let mut arguments = self.arguments(host)?;
        arguments.extend(more.iter().map(|argument| (*argument).to_owned()));
        let Host { netns, log, .. } = self.host(host);
        let mut command = child::weftd(self.weftd.as_deref(), &arguments)?;
        command.envs(self.options.search_path.iter().map(|path| ("PATH", path)));
        let daemon = RunningChild::start(netns, log, command)?;
        self.record.daemons.push(daemon.id());
        self.sites[host].daemon = Some(daemon);
        self.record.save()
    }

    /// Starts weftd from this file from now on.
    pub fn use_weftd(&mut self, program: PathBuf) {
        self.weftd = Some(program);
    }

    /// Stops a host's weftd by SIGTERM and says how it ended.
    ///
    /// # Errors
    /// It runs no longer, or did not stop in time and was killed.
    pub fn stop_daemon(&mut self, host: usize) -> anyhow::Result<ExitStatus> {
        let mut daemon = self.take_daemon(host)?;
        daemon.terminate()?;
        daemon.wait(Instant::now() + GRACE)
    }

    /// Ends a host's weftd by SIGKILL.
    ///
    /// # Errors
    /// There is none.
    pub fn kill_daemon(&mut self, host: usize) -> anyhow::Result<()> {
        self.take_daemon(host)?.kill()
    }

    /// Waits until a host's weftd forwards and its subnet.env is there.
    ///
    /// # Errors
    /// It ended, or the time is over; the last lines of its log are in the error.
    pub fn wait_ready(&mut self, host: usize, within: Duration) -> anyhow::Result<()> {
        let deadline = Instant::now() + within;
        loop {
            self.options.cancel.check()?;
            let state = self.readiness(host);
            let failure = match state {
                Ok(None) => return Ok(()),
                Ok(Some(_)) if Instant::now() < deadline => None,
                Ok(Some(state)) => Some(format!("after {} s: {state}", within.as_secs())),
                Err(error) => Some(error.to_string()),
            };
            if let Some(reason) = failure {
                let log = child::last_lines(&self.host(host).log, LOG_LINES);
                bail!("weftd on h{} did not come up; {reason}; its log ends:\n{log}", host + 1);
            }
            thread::sleep(POLL);
        }
    }

    /// Puts a container behind a host whose subnet.env is there.
    ///
    /// # Errors
    /// The host has one already, or its subnet.env is not of use.
    pub fn attach_container(&mut self, host: usize) -> anyhow::Result<Arc<Container>> {
        let number = host + 1;
        if self.sites[host].container.is_some() {
            bail!("c{number} is there already");
        }
        let name = self.announce(&format!("c{number}"))?;
        let container = Arc::new(topology::make_container(self.host(host), name, number)?);
        self.sites[host].container = Some(Arc::clone(&container));
        Ok(container)
    }

    /// The container behind a host. A clone of it is of use on another thread, with [`ping()`] and
    /// [`transfer()`], while hosts come and go here.
    ///
    /// # Errors
    /// It is not attached.
    pub fn container(&self, host: usize) -> anyhow::Result<&Arc<Container>> {
        let container = self.sites[host].container.as_ref();
        container.with_context(|| format!("there is no c{}; attach it first", host + 1))
    }

    /// What a host's weftd says of itself.
    ///
    /// # Errors
    /// It does not answer.
    pub fn status(&self, host: usize) -> anyhow::Result<Status> {
        status::read(&self.host(host).run_dir)
    }

    /// Pings from one container to another.
    ///
    /// # Errors
    /// As [`ping()`]; no answer is none.
    pub fn ping(&self, from: usize, to: usize, how: &PingOptions) -> anyhow::Result<PingReport> {
        ping(&self.container(from)?.netns, self.container(to)?.address()?, how)
    }

    /// Moves pseudo-random data over TCP from one container to another.
    ///
    /// # Errors
    /// As [`transfer()`].
    pub fn transfer(&self, from: usize, to: usize, bytes: Bytes) -> anyhow::Result<Transfer> {
        let (from, to) = (self.container(from)?, self.container(to)?);
        let LabOptions { stall, cancel, .. } = self.options.clone();
        transfer(&from.netns, &to.netns, to.address()?, bytes, &Patience { stall, cancel })
    }

    /// Removes the lab now; what a drop does, but failures come back.
    ///
    /// # Errors
    /// All that could not be removed.
    pub fn remove(mut self) -> anyhow::Result<()> {
        self.tear_down()
    }

    /// Leaves the lab up after the drop, for `weft lab down`, and returns its id.
    ///
    /// # Errors
    /// That cannot be recorded; the lab is removed then.
    pub fn keep(mut self) -> anyhow::Result<String> {
        self.record.owner = None;
        self.record.save()?;
        for site in self.sites.drain(..) {
            site.host.netns.leave();
            if let Some(container) = site.container {
                container.netns.leave();
            }
        }
        self.etcd.drain(..).for_each(EtcdMember::leave);
        for netns in [self.router.take(), self.switch.take()].into_iter().flatten() {
            netns.leave();
        }
        self.directory.take().map(TempDir::keep);
        Ok(self.record.id.clone())
    }

    /// Names a namespace and records that it is about to be.
    fn announce(&mut self, what: &str) -> anyhow::Result<String> {
        let name = format!("{}{what}", Record::namespace_prefix(&self.record.id));
        self.record.namespaces.push(name.clone());
        self.record.save()?;
        Ok(name)
    }

    fn directory(&self) -> anyhow::Result<&std::path::Path> {
        Ok(self.directory.as_ref().context("the lab is removed")?.path())
    }

    fn arguments(&self, host: usize) -> anyhow::Result<Vec<String>> {
        let Host { state_dir, run_dir, subnet_file, .. } = self.host(host);
        let registry = if self.etcd.is_empty() {
            ("--registry", format!("dir:{}", self.registry()?.display()))
        } else {
            ("--etcd-endpoints", self.etcd_urls().join(","))
        };
        let arguments = [
            registry,
            ("--network", self.options.network.clone()),
            ("--backend", self.options.backend.clone()),
            ("--state-dir", state_dir.display().to_string()),
            ("--run-dir", run_dir.display().to_string()),
            ("--subnet-file", subnet_file.display().to_string()),
        ];
        Ok(arguments.into_iter().flat_map(|(flag, value)| [flag.to_owned(), value]).collect())
    }

    /// None where the daemon is ready, else what it is doing; an error where waiting is of no use.
    fn readiness(&mut self, host: usize) -> anyhow::Result<Option<String>> {
        let site = &mut self.sites[host];
        let daemon = site.daemon.as_mut().context("it was not started")?;
        if let Some(status) = daemon.ended()? {
            bail!("it ended ({status})");
        }
        let pid = daemon.id().pid();
        let state = match status::read(&site.host.run_dir) {
            Ok(status) if i32::try_from(status.pid) != Ok(pid) => {
                format!("process {} answers in its place", status.pid)
            }
            Ok(status) if !status.forwards() => status.state,
            Ok(_) if !site.host.subnet_file.exists() => "it wrote no subnet.env".into(),
            Ok(_) => return Ok(None),
            Err(error) => format!("{error:#}"),
        };
        Ok(Some(state))
    }

    fn take_daemon(&mut self, host: usize) -> anyhow::Result<RunningChild> {
        let daemon = self.sites[host].daemon.take();
        daemon.with_context(|| format!("no weftd runs on h{}", host + 1))
    }

    fn tear_down(&mut self) -> anyhow::Result<()> {
        let Some(directory) = self.directory.take() else {
            return Ok(());
        };
        let mut failures = self.end_daemons();
        failures.extend(self.etcd.iter_mut().filter_map(|member| member.end().err()));
        let containers = self.sites.iter().filter_map(|site| site.container.as_deref());
        let namespaces = containers.map(|container| &container.netns);
        let namespaces = namespaces.chain(self.sites.iter().map(|site| &site.host.netns));
        let namespaces = namespaces.chain(self.etcd.iter().map(|member| &member.netns));
        let namespaces = namespaces.chain(self.router.as_ref()).chain(self.switch.as_ref());
        failures.extend(namespaces.filter_map(|netns| netns.remove().err()));
        failures.extend(directory.close().context("cannot remove the lab's directory").err());
        if failures.is_empty() {
            failures.extend(Record::delete(&self.record.id).err());
        }
        join_failures(&format!("removing the lab {}", self.record.id), failures)
    }

    /// Ends all at once, so that it takes as long as the slowest.
    fn end_daemons(&mut self) -> Vec<anyhow::Error> {
        let mut failures = Vec::new();
        let mut daemons: Vec<_> =
            self.sites.iter_mut().filter_map(|site| site.daemon.take()).collect();
        for daemon in &mut daemons {
            failures.extend(daemon.terminate().err());
        }
        let deadline = Instant::now() + GRACE;
        failures.extend(daemons.into_iter().filter_map(|daemon| daemon.wait(deadline).err()));
        failures
    }
}

impl Drop for Lab {
    fn drop(&mut self) {
        if let Err(error) = self.tear_down() {
            eprintln!("{error:#}");
        }
    }
}

/// One error of all that failed, or none.
fn join_failures(what: &str, failures: Vec<anyhow::Error>) -> anyhow::Result<()> {
    if failures.is_empty() {
        return Ok(());
    }
    let reasons: Vec<_> = failures.iter().map(|failure| format!("{failure:#}")).collect();
    bail!("{what}: {}", reasons.join("; "))
}

fn require_root() -> anyhow::Result<()> {
    if nix::unistd::geteuid().is_root() {
        return Ok(());
    }
    bail!("the lab makes network namespaces, which only root may do; run it with sudo")
}
