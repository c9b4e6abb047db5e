//! The command line of weftd: flannel's flags, and weft's own.
//!
//! The flags are data here, with what each value by itself may be; `parse` reads them from the
//! command line and the variables, `arguments` turns Go's way of writing them into clap's, and
//! `settings` decides what they come to.

mod arguments;
mod engine;
mod parse;
pub(crate) mod registry;
mod settings;

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::path::PathBuf;
use std::time::Duration;

use clap::{ArgAction, Args, ValueEnum};
use ipnetwork::IpNetwork;
use jiff::SignedDuration;
use tracing_subscriber::EnvFilter;
use weft_control::Secret;

use crate::directories::{RUN_DIR, STATE_DIR};
use crate::firewall::FirewallKind;
use crate::interface::Pattern;
use crate::log::LogFormat;

pub use engine::EngineFlags;
pub use parse::{command, one_line, parse};
pub use settings::{FlagError, Note, RegistrySettings, Settings};

/// What the command line and the environment say, each value by itself.
#[derive(Debug, Clone, PartialEq, Args)]
pub struct Flags {
    #[command(flatten)]
    pub registry: RegistryFlags,
    #[command(flatten)]
    pub lease: LeaseFlags,
    #[command(flatten)]
    pub network: NetworkFlags,
    #[command(flatten)]
    pub interface: InterfaceFlags,
    #[command(flatten)]
    pub engine: EngineFlags,
    #[command(flatten)]
    pub firewall: FirewallFlags,
    #[command(flatten)]
    pub health: HealthFlags,
    #[command(flatten)]
    pub kubernetes: KubernetesFlags,
    #[command(flatten)]
    pub logging: LoggingFlags,
}

/// Where leases are kept.
#[derive(Debug, Clone, PartialEq, Args)]
#[command(next_help_heading = "Registry")]
pub struct RegistryFlags {
    /// A directory, by its absolute path, that is the registry of the daemons of one host
    /// [default: etcd]
    #[arg(long, value_name = "dir:PATH", value_parser = registry_directory)]
    #[arg(verbatim_doc_comment)]
    pub registry: Option<PathBuf>,
    /// URLs of etcd, separated by commas; each is asked when those before it fail
    /// [default: http://127.0.0.1:4001,http://127.0.0.1:2379]
    #[arg(long, value_name = "URLS", verbatim_doc_comment)]
    pub etcd_endpoints: Option<String>,
    /// etcd's API: v3, v2 (flannel up to 0.17), or auto, the one by which there is a network config
    #[arg(long, value_name = "API", value_enum, default_value_t = EtcdApi::Auto)]
    pub etcd_api: EtcdApi,
    /// Prefix of all keys in etcd [default: /coreos.com/network]
    #[arg(long, value_name = "PREFIX")]
    pub etcd_prefix: Option<String>,
    /// The client's private key for etcd; goes with --etcd-certfile
    #[arg(long, value_name = "FILE")]
    pub etcd_keyfile: Option<PathBuf>,
    /// The client's certificate for etcd; goes with --etcd-keyfile
    #[arg(long, value_name = "FILE")]
    pub etcd_certfile: Option<PathBuf>,
    /// The authority that etcd's certificate is checked against [default: the system's]
    #[arg(long, value_name = "FILE")]
    pub etcd_cafile: Option<PathBuf>,
    /// User name for etcd
    #[arg(long, value_name = "NAME")]
    pub etcd_username: Option<String>,
    /// Password for etcd; who may list processes sees it, unlike that in a file
    #[arg(long, value_name = "PASSWORD")]
    pub etcd_password: Option<Secret>,
    /// A file with the password for etcd
    #[arg(long, value_name = "FILE")]
    pub etcd_password_file: Option<PathBuf>,
}

/// How long this node's lease lasts.
#[derive(Debug, Clone, PartialEq, Args)]
#[command(next_help_heading = "Registry")]
pub struct LeaseFlags {
    /// How long the lease lasts without renewal, as in 24h or 30m, at least 10s
    #[arg(long, value_name = "TIME", default_value = "24h", value_parser = lease_ttl)]
    pub subnet_lease_ttl: Duration,
    /// Minutes before its expiry at which the lease is renewed, 1 to 1439
    #[arg(long, value_name = "MINUTES", default_value = "60", value_parser = renew_margin)]
    pub subnet_lease_renew_margin: Duration,
}

/// The overlay network and the daemon's files.
#[derive(Debug, Clone, PartialEq, Args)]
#[command(next_help_heading = "Network")]
pub struct NetworkFlags {
    /// Writes a network config with this Network if the registry has none;
    /// without --registry and any --etcd-…, the registry is then dir:/var/lib/weft/registry
    #[arg(long, value_name = "CIDR", value_parser = cidr, verbatim_doc_comment)]
    pub network: Option<IpNetwork>,
    /// The file that tells docker and others the subnet and the MTU
    #[arg(long, value_name = "FILE", default_value = "/run/flannel/subnet.env")]
    pub subnet_file: PathBuf,
    /// What outlives a reboot: this node's id, what the registry last said, and what cleanup goes by
    #[arg(long, value_name = "DIR", default_value = STATE_DIR)]
    pub state_dir: PathBuf,
    /// What does not: the lock and the socket of the running daemon
    #[arg(long, value_name = "DIR", default_value = RUN_DIR)]
    pub run_dir: PathBuf,
}

/// The interface to other nodes.
#[derive(Debug, Clone, PartialEq, Args)]
#[command(next_help_heading = "Interface")]
pub struct InterfaceFlags {
    /// The interface to other nodes, by name or by an address of it;
    /// repeatable, the first that matches is taken
    /// [default: that of --public-ip, else that of the default route]
    #[arg(long, value_name = "NAME|IP", verbatim_doc_comment)]
    pub iface: Vec<String>,
    /// As --iface, and after it, by a regular expression on addresses, then on names
    #[arg(long, value_name = "REGEX", value_parser = regex)]
    pub iface_regex: Vec<Pattern>,
    /// As --iface, and after --iface-regex, by an address that packets leave by it to
    #[arg(long, value_name = "IP")]
    pub iface_can_reach: Option<IpAddr>,
    /// The IPv4 address that other nodes send to [default: the interface's]
    #[arg(long, value_name = "IP")]
    pub public_ip: Option<Ipv4Addr>,
    /// The IPv6 address that other nodes send to [default: the interface's]
    #[arg(long, value_name = "IP")]
    pub public_ipv6: Option<Ipv6Addr>,
}

/// Rules in the kernel's firewall.
#[derive(Debug, Clone, PartialEq, Args)]
#[command(next_help_heading = "Firewall")]
pub struct FirewallFlags {
    /// Masquerades packets from containers to what is outside of the overlay
    #[arg(long, action = ArgAction::Set, value_parser = switch, default_value = "false")]
    pub ip_masq: bool,
    /// Masquerades without asking for random ports (--random-fully, fully-random)
    #[arg(long, action = ArgAction::Set, value_parser = switch, default_value = "false")]
    pub ip_masq_fully_random_disable: bool,
    /// Seconds between checks of the firewall's rules and of the blackhole route, from 1
    #[arg(long, value_name = "SECONDS", default_value = "5", value_parser = seconds)]
    pub iptables_resync: Duration,
    /// Accepts the overlay's packets in the chain FORWARD
    #[arg(long, action = ArgAction::Set, value_parser = switch, default_value = "true")]
    pub iptables_forward_rules: bool,
    /// Discards packets to addresses of our subnet that no bridge or container takes
    #[arg(long, action = ArgAction::Set, value_parser = switch, default_value = "false")]
    pub ip_blackhole_route: bool,
    /// What writes the rules; auto: nftables if the network config says EnableNFTables,
    /// else iptables if there is one, else nftables
    #[arg(long, value_name = "PROGRAM", value_enum, default_value_t = FirewallKind::Auto)]
    #[arg(verbatim_doc_comment)]
    pub firewall: FirewallKind,
}

/// Answers about the daemon's health over HTTP.
#[derive(Debug, Clone, PartialEq, Args)]
#[command(next_help_heading = "Health")]
pub struct HealthFlags {
    /// The address to answer at; flannel's default is 0.0.0.0
    #[arg(long, value_name = "IP", default_value = "127.0.0.1")]
    pub healthz_ip: IpAddr,
    /// The port to answer at; 0 is none
    #[arg(long, value_name = "PORT", default_value = "0")]
    pub healthz_port: u16,
}

/// Leases from Kubernetes.
#[derive(Debug, Clone, PartialEq, Args)]
#[command(next_help_heading = "Kubernetes")]
pub struct KubernetesFlags {
    /// Takes leases from Kubernetes (not built yet)
    #[arg(long, action = ArgAction::Set, value_parser = switch, default_value = "false")]
    pub kube_subnet_mgr: bool,
    /// URL of the Kubernetes API (not built yet)
    #[arg(long, value_name = "URL")]
    pub kube_api_url: Option<String>,
    /// How to reach the Kubernetes API from outside of the cluster (not built yet)
    #[arg(long, value_name = "FILE")]
    pub kubeconfig_file: Option<PathBuf>,
    /// Prefix of the annotations of nodes (not built yet)
    #[arg(long, value_name = "PREFIX")]
    pub kube_annotation_prefix: Option<String>,
    /// The network config of a Kubernetes cluster (not built yet)
    #[arg(long, value_name = "FILE")]
    pub net_config_path: Option<PathBuf>,
    /// Tells Kubernetes when the network of the node is up (not built yet)
    #[arg(long, action = ArgAction::Set, value_parser = switch, default_value = "true")]
    pub set_node_network_unavailable: bool,
}

/// What goes to the log.
#[derive(Debug, Clone, PartialEq, Args)]
#[command(next_help_heading = "Logging")]
pub struct LoggingFlags {
    /// What is logged: off, error, warn, info, debug or trace;
    /// for single modules MODULE=LEVEL, separated by commas
    #[arg(long, value_name = "LEVEL", default_value = "info", value_parser = log_level)]
    #[arg(verbatim_doc_comment)]
    pub log_level: String,
    /// How it is logged: text, whose fields are the journal's, too, where there is one; or json, an
    /// object a line
    #[arg(long, value_name = "FORMAT", value_enum, default_value_t = LogFormat::Text)]
    pub log_format: LogFormat,
    /// flannel's log level; changes nothing, see --log-level
    #[arg(long, value_name = "LEVEL")]
    pub v: Option<i32>,
    /// flannel's log level for single files; changes nothing, see --log-level
    #[arg(long, value_name = "PATTERN=N,…")]
    pub vmodule: Option<String>,
    /// flannel's stack trace at a line; changes nothing
    #[arg(long = "log_backtrace_at", value_name = "FILE:N")]
    pub log_backtrace_at: Option<String>,
}

/// By which API leases are kept in etcd. Each has a store of its own.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum EtcdApi {
    Auto,
    V3,
    V2,
}

fn switch(text: &str) -> Result<bool, &'static str> {
    arguments::boolean(text).ok_or("give true or false")
}

fn registry_directory(text: &str) -> Result<PathBuf, &'static str> {
    let path = text.strip_prefix("dir:").map(PathBuf::from);
    path.filter(|path| path.is_absolute())
        .ok_or("give dir: and an absolute path, as in dir:/var/lib/weft/registry")
}

fn seconds(text: &str) -> Result<Duration, &'static str> {
    match text.parse() {
        Ok(seconds @ 1..=86_400_u64) => Ok(Duration::from_secs(seconds)),
        _ => Err("give 1 to 86400 seconds"),
    }
}

fn regex(text: &str) -> Result<Pattern, String> {
    Pattern::new(text).map_err(|error| format!("could not compile the IP address regex: {error}"))
}

fn lease_ttl(text: &str) -> Result<Duration, &'static str> {
    let ttl = text.parse::<SignedDuration>().ok().and_then(|ttl| Duration::try_from(ttl).ok());
    ttl.filter(|ttl| *ttl >= Duration::from_secs(10)).ok_or("give a time as in 24h, at least 10s")
}

fn renew_margin(text: &str) -> Result<Duration, &'static str> {
    match text.parse() {
        Ok(minutes @ 1..=1439_u64) => Ok(Duration::from_secs(minutes * 60)),
        _ => Err(
            "Invalid subnet-lease-renew-margin option, out of acceptable range; give 1 to 1439 \
             minutes",
        ),
    }
}

fn cidr(text: &str) -> Result<IpNetwork, &'static str> {
    // Without a length the parser would take one address for a network.
    let network = text.contains('/').then(|| text.parse().ok()).flatten();
    network.ok_or("give a network with its length, as in 10.42.0.0/16")
}

/// Levels as `--log-level` takes them.
///
/// # Errors
/// A level or a directive is none.
pub fn log_level(text: &str) -> Result<String, String> {
    const LEVELS: [&str; 6] = ["off", "error", "warn", "info", "debug", "trace"];
    // The filter would take a misspelt level for the name of a module, and log nothing else.
    let misspelt = text
        .split(',')
        .find(|part| !part.contains('=') && !LEVELS.contains(&part.to_ascii_lowercase().as_str()));
    if let Some(part) = misspelt {
        return Err(format!("{part:?} is no level: give {}", LEVELS.join(", ")));
    }
    EnvFilter::try_new(text).map_err(|error| error.to_string())?;
    Ok(text.into())
}
