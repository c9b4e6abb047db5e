//! `weft registry`: looks at a registry of any kind, and changes it as an operator.

mod showing;

use std::collections::BTreeMap;
use std::fs;
use std::io::{self, Read, Write};
use std::mem;
use std::net::{IpAddr, Ipv4Addr};
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, bail, ensure};
use clap::{Args, Subcommand};
use futures_util::{StreamExt, TryStreamExt, stream};
use ipnetwork::IpNetwork;
use serde::{Deserialize, Serialize};
use serde_json::json;
use weft_control::keeper;
use weft_control::lease::{Expiry, Snapshot};
use weft_control::peers::is_unusable;
use weft_control::registry::minimal_config;
use weft_control::{DirectoryRegistry, Lease, LeaseAttrs, LeaseKey, NetworkConfig, Registry};

use crate::directories::Directories;
use crate::flags::registry::quoted;
use crate::flags::{RegistryFlags, RegistrySettings};
use crate::network_config::usable;
use crate::output::Output;
use crate::registry::open_now;
use crate::{socket, started};
use showing::{addresses, as_json, as_table, changes, owner, shown};

/// Leases whose time left is asked for at once.
const ASKED_AT_ONCE: usize = 64;

/// Look at a registry, and change it.
///
/// The flags are weftd's; they come before the subcommand. Without any of them, the registry is that of the
/// weftd that runs here; where none runs, flannel's default.
#[derive(Debug, Args)]
pub struct RegistryArgs {
    #[command(flatten)]
    flags: RegistryFlags,
    /// How results are written.
    #[arg(short, long, value_enum, default_value_t, global = true)]
    output: Output,
    #[command(subcommand)]
    command: RegistryCommand,
}

#[derive(Debug, Subcommand)]
enum RegistryCommand {
    /// Write the network config, if there is none yet
    Init {
        /// The config as JSON, a file with it as @FILE, or the Network alone, as in 10.42.0.0/16
        config: String,
    },
    /// Show the config, and all leases with their owners
    Show,
    /// Keep a subnet for the node with a public address, for ever; in an overlay of both families
    /// the subnets of both, as '10.42.7.0-24&fd00:42:0:7::-64'
    #[command(verbatim_doc_comment)]
    Reserve {
        /// The subnet, or a lease's key
        #[arg(value_parser = subnets)]
        subnet: LeaseKey,
        /// The node's address: of IPv4, if it has one
        public_ip: IpAddr,
    },
    /// Remove a lease or a reservation; a node that lives claims the same subnet again, if it is free
    Release {
        /// The subnet, or a lease's key; of a lease of both families, either subnet will do
        #[arg(value_parser = subnets)]
        subnet: LeaseKey,
    },
    /// Show what changes, until Ctrl-C
    Watch,
    /// Write the config and all leases to stdout
    Export,
    /// Read what `export` wrote, from a file or stdin, and add what is not there yet
    Import {
        /// What `export` wrote [default: stdin]
        file: Option<PathBuf>,
    },
}

impl RegistryCommand {
    /// Whether a registry may begin with it.
    fn begins(&self) -> bool {
        matches!(self, Self::Init { .. } | Self::Reserve { .. } | Self::Import { .. })
    }
}

/// What moves from one registry to another.
#[derive(Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Document {
    config: Option<String>,
    leases: Vec<DocumentLease>,
}

#[derive(Debug, PartialEq, Eq, Serialize, Deserialize)]
struct DocumentLease {
    subnet: LeaseKey,
    value: LeaseAttrs,
    /// Seconds left to live; none is a reservation.
    ttl: Option<u64>,
}

/// Does what the command line says.
///
/// # Errors
/// The registry cannot be reached, or refuses; or what is asked for makes no sense.
pub fn run(
    arguments: &RegistryArgs,
    directories: &Directories,
    out: &mut dyn Write,
) -> anyhow::Result<()> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let outcome = runtime.block_on(async {
        let settings = settings(&arguments.flags, &directories.run_dir)?;
        if let (RegistrySettings::Directory(path), true) = (&settings, arguments.command.begins()) {
            DirectoryRegistry::make(path)?;
        }
        let registry = open_now(&settings, &directories.state_dir).await?;
        let (registry, output) = (registry.as_ref(), arguments.output);
        let command = Operator { registry, settings: &settings, output, out };
        command.run(&arguments.command).await
    });
    // What waits for etcd has nothing more to say.
    runtime.shutdown_background();
    outcome
}

/// What the flags name, or else the registry of the daemons that run here.
fn settings(flags: &RegistryFlags, run_dir: &Path) -> anyhow::Result<RegistrySettings> {
    if flags.name_any() {
        return Ok(flags.settings()?);
    }
    let context = "cannot tell which registry the weftd here has; name it by its flags";
    let mut found: Vec<RegistrySettings> = Vec::new();
    for socket in socket::sockets(run_dir).context(context)? {
        let Some(pid) = socket::listener(&socket).context(context)? else { continue };
        let there = || format!("{context}, or ask there: nsenter -t {pid} -m -n weft registry …");
        ensure!(!started::is_elsewhere(pid), there());
        let registry = started::settings(pid).with_context(there)?.registry;
        if !found.contains(&registry) {
            found.push(registry);
        }
    }
    match found.pop() {
        None => Ok(flags.settings()?),
        Some(only) if found.is_empty() => Ok(only),
        Some(_) => {
            bail!("the daemons that run here have several registries; name one by its flags")
        }
    }
}

struct Operator<'a> {
    registry: &'a dyn Registry,
    settings: &'a RegistrySettings,
    output: Output,
    out: &'a mut dyn Write,
}

impl Operator<'_> {
    async fn run(mut self, command: &RegistryCommand) -> anyhow::Result<()> {
        match command {
            RegistryCommand::Init { config } => self.init(config).await,
            RegistryCommand::Show => self.show().await,
            RegistryCommand::Reserve { subnet, public_ip } => {
                self.reserve(*subnet, *public_ip).await
            }
            RegistryCommand::Release { subnet } => self.release(*subnet).await,
            RegistryCommand::Watch => self.watch().await,
            RegistryCommand::Export => self.export().await,
            RegistryCommand::Import { file } => self.import(file.as_deref()).await,
        }
    }

    async fn init(&mut self, config: &str) -> anyhow::Result<()> {
        let text = match (config.strip_prefix('@'), config.parse::<IpNetwork>()) {
            (Some(path), _) => {
                fs::read_to_string(path).with_context(|| format!("cannot read {path}"))?
            }
            (None, Ok(network)) => minimal_config(network)?,
            (None, Err(_)) => config.to_owned(),
        };
        usable(&text).context("this is no network config that a weftd starts with")?;
        if self.registry.init_config(&text).await? {
            return Ok(writeln!(self.out, "wrote {text}")?);
        }
        let found = self.registry.config().await?.unwrap_or_default();
        bail!(
            "there is a network config already: {found}; to replace it, {}, and start each weftd anew",
            self.replacing(&text)
        );
    }

    /// What takes the place of a config, and is nothing for a slip of the hand.
    fn replacing(&self, text: &str) -> String {
        match self.settings {
            RegistrySettings::Directory(path) => {
                format!("edit {}", path.join("config").display())
            }
            RegistrySettings::Etcd { access, prefix, .. } => {
                let is_v2 = self.registry.identity().starts_with("etcd2:");
                let (etcdctl, put) =
                    if is_v2 { ("ETCDCTL_API=2 etcdctl", "set") } else { ("etcdctl", "put") };
                let endpoints = access.endpoints.join(",");
                let flags = self.settings.etcdctl_flags();
                let text = quoted(text);
                format!("`{etcdctl} --endpoints {endpoints}{flags} {put} {prefix}/config {text}`")
            }
        }
    }

    async fn show(&mut self) -> anyhow::Result<()> {
        let snapshot = self.registry.snapshot().await?;
        let left = self.times_left(&snapshot.leases).await?;
        match self.output {
            Output::Json => {
                let text = serde_json::to_string_pretty(&as_json(&snapshot, &left))?;
                Ok(writeln!(self.out, "{text}")?)
            }
            Output::Table => {
                let config = snapshot.config.as_deref().unwrap_or("none");
                writeln!(self.out, "{}\nconfig: {config}", self.registry.describe())?;
                writeln!(self.out, "{}", as_table(&snapshot, &left))?;
                for skipped in &snapshot.skipped {
                    writeln!(self.out, "{} cannot be read: {}", skipped.name, skipped.reason)?;
                }
                Ok(())
            }
        }
    }

    /// Lease by lease, for that is how etcd tells it, but not one after the other.
    async fn times_left(
        &self,
        leases: &[Lease],
    ) -> anyhow::Result<BTreeMap<LeaseKey, Option<Duration>>> {
        let asked = leases.iter().map(|lease| async move {
            let left = self.registry.time_left(lease).await?;
            anyhow::Ok((lease.key, left))
        });
        stream::iter(asked).buffer_unordered(ASKED_AT_ONCE).try_collect().await
    }

    async fn reserve(&mut self, key: LeaseKey, public_ip: IpAddr) -> anyhow::Result<()> {
        ensure!(!is_unusable(public_ip), "packets cannot be sent to {public_ip}");
        let snapshot = self.registry.snapshot().await?;
        if let Some(ipv4) = known_by_ipv4(&snapshot, public_ip) {
            bail!("the node at {public_ip} is known by its IPv4 address: reserve it for {ipv4}");
        }
        let config = snapshot.network_config();
        let mut networks = config.iter().flat_map(NetworkConfig::networks);
        if let Some(network) = networks.find(|network| network.contains(public_ip)) {
            bail!(
                "{public_ip} lies in the overlay's Network {network}, so other nodes would refuse the \
                 lease; give the address by which they reach the node"
            );
        }
        let attrs = match public_ip {
            IpAddr::V4(ip) => LeaseAttrs { public_ip: Some(ip), ..LeaseAttrs::default() },
            IpAddr::V6(ip) => LeaseAttrs { public_ipv6: Some(ip), ..LeaseAttrs::default() },
        };
        let is_its = |it: &&Lease| it.key != key && it.attrs.same_node(&attrs);
        let mut others = snapshot.leases.iter().filter(is_its);
        let former = others.clone().next();
        if let Some(other) = others.find(|it| it.expires == Expiry::Never) {
            bail!(
                "{public_ip} has the reservation {} already, and a node has one subnet; to give it \
                 this one, first `weft registry release {}`",
                other.key,
                quoted(&other.key.to_string())
            );
        }
        let written = match snapshot.leases.iter().find(|lease| lease.key == key) {
            Some(found) if found.attrs.same_node(&attrs) => {
                self.registry.renew(found, &found.attrs, None).await?
            }
            Some(found) => bail!("{key} is leased to {}", owner(found)),
            None => {
                let is_in_the_way =
                    |it: &&Lease| keeper::is_in_the_way(config.as_ref(), &it.key, &key);
                if let Some(other) = snapshot.leases.iter().find(is_in_the_way) {
                    bail!("{key} overlaps {}, leased to {}", other.key, owner(other));
                }
                require_compatible(&snapshot, &key)?;
                self.registry.create(&key, &attrs, None).await?
            }
        };
        written.context("somebody else has written it this instant; look again")?;
        let until = former.map_or_else(String::new, |lease| {
            format!("; its node goes on with {} until its weftd is started anew", lease.key)
        });
        Ok(writeln!(self.out, "{key} is reserved for {public_ip}{until}")?)
    }

    async fn release(&mut self, wanted: LeaseKey) -> anyhow::Result<()> {
        let snapshot = self.registry.snapshot().await?;
        let subnet = shown(wanted);
        let has_all =
            |key: &LeaseKey| wanted.networks().all(|net| key.networks().any(|it| it == net));
        let found = snapshot.leases.iter().find(|lease| has_all(&lease.key));
        if let Some((key, why)) = snapshot.unreadable().find(|(key, _)| has_all(key)) {
            bail!(
                "the lease of {subnet} cannot be read ({}), so nobody can tell whose it is; to remove it, \
                 delete subnets/{key} in {} by hand",
                why.reason,
                self.registry.describe()
            );
        }
        let found = found.with_context(|| format!("{subnet} is not leased"))?;
        ensure!(
            self.registry.remove(found).await?,
            "somebody else has written it this instant; look again"
        );
        Ok(writeln!(self.out, "{}, leased to {}, is free", shown(found.key), owner(found))?)
    }

    /// What is to be watched must be readable at first. Later, that it is not is told on stderr: what
    /// changes meanwhile is shown once it is again.
    async fn watch(&mut self) -> anyhow::Result<()> {
        self.registry.snapshot().await?;
        let mut watch = self.registry.watch(Snapshot::default());
        let mut before = BTreeMap::new();
        let mut readable = true;
        loop {
            watch.changed().await?;
            let view = watch.borrow_and_update().clone();
            if view.readable != mem::replace(&mut readable, view.readable) {
                let how =
                    if view.readable { "can be read again" } else { "cannot be read for now" };
                eprintln!("weft: {} {how}", self.registry.describe());
            }
            let leases = view.snapshot.leases.iter();
            let now: BTreeMap<LeaseKey, LeaseAttrs> =
                leases.map(|lease| (lease.key, lease.attrs.clone())).collect();
            for (change, key, attrs) in changes(&before, &now) {
                self.tell(change, key, attrs)?;
            }
            self.out.flush()?;
            before = now;
        }
    }

    fn tell(&mut self, change: &str, key: LeaseKey, attrs: &LeaseAttrs) -> io::Result<()> {
        match self.output {
            Output::Json => {
                writeln!(self.out, "{}", json!({"change": change, "subnet": key, "value": attrs}))
            }
            Output::Table => writeln!(self.out, "{change} {key} {}", addresses(attrs)),
        }
    }

    async fn export(&mut self) -> anyhow::Result<()> {
        let snapshot = self.registry.snapshot().await?;
        let unreadable = snapshot.unreadable().map(|(key, it)| format!("{key} ({})", it.reason));
        let unreadable: Vec<String> = unreadable.collect();
        let mut document = Document { config: snapshot.config, leases: Vec::new() };
        let times_left = self.times_left(&snapshot.leases).await?;
        for lease in &snapshot.leases {
            let left = times_left.get(&lease.key).copied().flatten();
            if left.is_none() && lease.expires != Expiry::Never {
                // It has ended meanwhile.
                continue;
            }
            document.leases.push(DocumentLease {
                subnet: lease.key,
                value: lease.attrs.clone(),
                ttl: left.map(|left| left.as_secs()),
            });
        }
        writeln!(self.out, "{}", serde_json::to_string_pretty(&document)?)?;
        ensure!(
            unreadable.is_empty(),
            "these leases cannot be read and are not in what was written, though their subnets are \
             somebody's: {}",
            unreadable.join("; ")
        );
        Ok(())
    }

    /// The config first, and only if it is the same or there is none: leases mean nothing under
    /// another one.
    async fn import(&mut self, file: Option<&Path>) -> anyhow::Result<()> {
        let document: Document = serde_json::from_str(&read(file)?)
            .context("this is not what `weft registry export` writes")?;
        let snapshot = self.registry.snapshot().await?;
        match (&document.config, &snapshot.config) {
            (Some(ours), Some(theirs)) if ours != theirs => {
                bail!("there is another network config already: {theirs}")
            }
            (Some(ours), None) => {
                usable(ours).context("the config to import is a bad one")?;
                ensure!(
                    self.registry.init_config(ours).await?,
                    "somebody else has written a network config this instant; look again"
                );
            }
            _ => {}
        }
        let config = snapshot.network_config();
        let (mut written, mut kept, mut refused) = (0, 0, Vec::new());
        for DocumentLease { subnet, value, ttl } in &document.leases {
            // Some registries compare whole keys only.
            let is_in_the_way = |it: &&Lease| {
                let shares = keeper::is_in_the_way(config.as_ref(), &it.key, subnet);
                shares && !it.attrs.same_node(value)
            };
            if let Some(other) = snapshot.leases.iter().find(is_in_the_way) {
                refused.push(format!("{subnet} ({} is leased to {})", other.key, owner(other)));
                continue;
            }
            let ttl = ttl.map(Duration::from_secs);
            match self.registry.create(subnet, value, ttl).await? {
                Some(_) => written += 1,
                None => kept += 1,
            }
        }
        writeln!(self.out, "{written} leases written, {kept} were there already")?;
        ensure!(
            refused.is_empty(),
            "not written, since other nodes have them: {}",
            refused.join("; ")
        );
        Ok(())
    }
}

/// The IPv4 address of the node with this IPv6 address: by that it is known where it has one.
fn known_by_ipv4(snapshot: &Snapshot, ip: IpAddr) -> Option<Ipv4Addr> {
    let leases = snapshot.leases.iter().map(|it| (it.attrs.public_ipv6, it.attrs.public_ip));
    let nodes = snapshot.nodes.iter().map(|it| (it.public_ipv6, it.public_ip));
    let mut known = leases.chain(nodes);
    known.find_map(|(ipv6, ipv4)| ipv4.filter(|_| ipv6.map(IpAddr::V6) == Some(ip)))
}

fn read(file: Option<&Path>) -> anyhow::Result<String> {
    let Some(path) = file else {
        let mut text = String::new();
        io::stdin().read_to_string(&mut text).context("cannot read stdin")?;
        return Ok(text);
    };
    fs::read_to_string(path).with_context(|| format!("cannot read {}", path.display()))
}

/// A network, or the subnets of a lease as its key has them.
fn subnets(text: &str) -> Result<LeaseKey, String> {
    if let Ok(key) = text.parse() {
        return Ok(key);
    }
    let network: IpNetwork = text.parse().map_err(|_| {
        "give a subnet, as in 10.42.7.0/24, or a lease's key, as in 10.42.7.0-24&fd00:42:0:7::-64"
    })?;
    if network.ip() != network.network() {
        return Err(format!("{network} has bits behind its length"));
    }
    Ok(network.into())
}

/// What the config would not give out, its node would give up.
fn require_compatible(snapshot: &Snapshot, key: &LeaseKey) -> anyhow::Result<()> {
    let Some(text) = &snapshot.config else { return Ok(()) };
    let config: NetworkConfig = text.parse().context("the network config is a bad one")?;
    ensure!(
        keeper::is_compatible(&config, key),
        "{key} is nothing that the network config gives out, so its node would give it up; see the \
         lengths and bounds in {text}"
    );
    Ok(())
}
