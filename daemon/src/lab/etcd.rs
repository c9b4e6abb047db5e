//! An etcd on the lab's switch, each member in a network namespace of its own.

use std::env;
use std::net::{IpAddr, SocketAddr};
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::Context;
use rustix::process::Signal;

use super::child::RunningChild;
use super::process::ProcessId;
use crate::netns::NetNs;

/// What an etcd is run with.
#[derive(Debug, Clone, Default)]
pub struct EtcdOptions {
    /// How many members; without any the registry is a directory.
    pub members: usize,
    /// Further arguments of each.
    pub arguments: Vec<String>,
    /// Whether those make clients use https.
    pub tls: bool,
}

/// One member.
#[derive(Debug)]
pub struct EtcdMember {
    /// Where it lives; `eth0` leads to the switch.
    pub netns: NetNs,
    /// The address of `eth0`.
    pub address: IpAddr,
    /// Where clients find it.
    pub url: String,
    /// Where its output goes, over restarts too.
    pub log: PathBuf,
    /// Where it keeps its data.
    pub data: PathBuf,
    arguments: Vec<String>,
    process: Option<RunningChild>,
}

impl EtcdMember {
    /// Member `number` (from 1) of those that live at `addresses`; its files go to `directory`.
    pub(super) fn new(
        netns: NetNs,
        number: usize,
        addresses: &[IpAddr],
        options: &EtcdOptions,
        directory: &Path,
    ) -> Self {
        let name = |number: usize| format!("e{number}");
        let peer = |address: &IpAddr| format!("http://{}", SocketAddr::new(*address, 2380));
        let address = addresses[number - 1];
        let scheme = if options.tls { "https" } else { "http" };
        let url = format!("{scheme}://{}", SocketAddr::new(address, 2379));
        let data = directory.join(name(number));
        let cluster: Vec<String> = addresses
            .iter()
            .enumerate()
            .map(|(at, address)| format!("{}={}", name(at + 1), peer(address)))
            .collect();
        let flags = [
            ("--name", name(number)),
            ("--data-dir", data.display().to_string()),
            ("--listen-client-urls", url.clone()),
            ("--advertise-client-urls", url.clone()),
            ("--listen-peer-urls", peer(&address)),
            ("--initial-advertise-peer-urls", peer(&address)),
            ("--initial-cluster", cluster.join(",")),
        ];
        let flags = flags.into_iter().flat_map(|(flag, value)| [flag.to_owned(), value]);
        Self {
            arguments: flags.chain(options.arguments.iter().cloned()).collect(),
            log: directory.join(format!("{}.log", name(number))),
            netns,
            address,
            url,
            data,
            process: None,
        }
    }

    /// Starts it, on the data that it left. It serves some time later.
    pub(super) fn start(&mut self) -> anyhow::Result<ProcessId> {
        let mut command = Command::new(program());
        // Its own settings come by variables too.
        for (name, _) in env::vars_os() {
            if name.to_string_lossy().starts_with("ETCD_") {
                command.env_remove(&name);
            }
        }
        command.args(&self.arguments);
        let process = RunningChild::start(&self.netns, &self.log, command)?;
        Ok(self.process.insert(process).id())
    }

    /// Ends it by SIGKILL.
    ///
    /// # Errors
    /// It does not run.
    pub fn kill(&mut self) -> anyhow::Result<()> {
        self.process.take().context("this etcd does not run")?.kill()
    }

    /// Stops its clock: it holds its connections and says nothing.
    ///
    /// # Errors
    /// It does not run.
    pub fn freeze(&mut self) -> anyhow::Result<()> {
        self.signal(Signal::STOP)
    }

    /// Lets it go on.
    ///
    /// # Errors
    /// It does not run.
    pub fn thaw(&mut self) -> anyhow::Result<()> {
        self.signal(Signal::CONT)
    }

    /// Ends it, if it runs: what it writes goes with the lab.
    pub(super) fn end(&mut self) -> anyhow::Result<()> {
        self.process.take().map_or(Ok(()), RunningChild::kill)
    }

    /// Leaves it running.
    pub(super) fn leave(mut self) {
        self.netns.leave();
        self.process = None;
    }

    fn signal(&mut self, signal: Signal) -> anyhow::Result<()> {
        self.process.as_mut().context("this etcd does not run")?.signal(signal)
    }
}

impl Drop for EtcdMember {
    fn drop(&mut self) {
        if let Err(error) = self.end() {
            eprintln!("{error:#}");
        }
    }
}

/// The etcd to run: `$LAB_ETCD`, or the one in the search path.
fn program() -> PathBuf {
    env::var_os("LAB_ETCD").unwrap_or_else(|| "etcd".into()).into()
}
