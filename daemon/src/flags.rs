//! The command line of weftd: flannel's flags, and weft's own.
//!
//! The flags are data here; `arguments` turns Go's way of writing them into clap's, and
//! `settings` decides what they come to.

mod arguments;
mod engine;
mod settings;

use std::ffi::OsString;
use std::fmt;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::path::PathBuf;
use std::time::Duration;

use clap::parser::ValueSource;
use clap::{Arg, ArgAction, ArgMatches, Args, Command, FromArgMatches};
use ipnetwork::IpNetwork;
use tracing_subscriber::EnvFilter;

pub use engine::EngineFlags;
pub use settings::{FlagError, Note, Settings};

const PROGRAM: &str = "weftd";

/// The flags that flannel does not have; their variables begin with WEFT_.
const WEFT_FLAGS: [&str; 14] = [
    "registry",
    "network",
    "state-dir",
    "run-dir",
    "backend",
    "guard",
    "peer-source",
    "workers",
    "io",
    "offload",
    "udp-source-port",
    "busy-poll",
    "dscp",
    "log-level",
];

/// What the command line and the environment say, each value by itself.
#[derive(Debug, Clone, PartialEq, Args)]
pub struct Flags {
    #[command(flatten)]
    pub registry: RegistryFlags,
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
    #[arg(long, value_name = "dir:PATH", value_parser = registry_directory)]
    pub registry: Option<PathBuf>,
    /// Minutes before its expiry at which the lease is renewed, 1 to 1439
    #[arg(long, value_name = "MINUTES", default_value = "60", value_parser = renew_margin)]
    pub subnet_lease_renew_margin: Duration,
    /// URLs of etcd, separated by commas (not built yet)
    #[arg(long, value_name = "URLS")]
    pub etcd_endpoints: Option<String>,
    /// Prefix of all keys in etcd (not built yet)
    #[arg(long, value_name = "PREFIX")]
    pub etcd_prefix: Option<String>,
    /// The client's private key for etcd (not built yet)
    #[arg(long, value_name = "FILE")]
    pub etcd_keyfile: Option<PathBuf>,
    /// The client's certificate for etcd (not built yet)
    #[arg(long, value_name = "FILE")]
    pub etcd_certfile: Option<PathBuf>,
    /// The authority that etcd's certificate is checked against (not built yet)
    #[arg(long, value_name = "FILE")]
    pub etcd_cafile: Option<PathBuf>,
    /// User name for etcd (not built yet)
    #[arg(long, value_name = "NAME")]
    pub etcd_username: Option<String>,
    /// Password for etcd (not built yet)
    #[arg(long, value_name = "PASSWORD")]
    pub etcd_password: Option<Password>,
}

/// The overlay network and the daemon's files.
#[derive(Debug, Clone, PartialEq, Args)]
#[command(next_help_heading = "Network")]
pub struct NetworkFlags {
    /// Writes a network config with this Network if the registry has none;
    /// without --registry, the registry is then dir:/var/lib/weft/registry
    #[arg(long, value_name = "CIDR", value_parser = cidr, verbatim_doc_comment)]
    pub network: Option<IpNetwork>,
    /// The file that tells docker and others the subnet and the MTU
    #[arg(long, value_name = "FILE", default_value = "/run/flannel/subnet.env")]
    pub subnet_file: PathBuf,
    /// What outlives a reboot: this node's id
    #[arg(long, value_name = "DIR", default_value = "/var/lib/weft")]
    pub state_dir: PathBuf,
    /// What does not: the lock and the socket of the running daemon
    #[arg(long, value_name = "DIR", default_value = "/run/weft")]
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
    /// As --iface, by a regular expression on addresses, then on names (not built yet)
    #[arg(long, value_name = "REGEX")]
    pub iface_regex: Vec<String>,
    /// As --iface, by an address that it must lead to (not built yet)
    #[arg(long, value_name = "IP")]
    pub iface_can_reach: Option<String>,
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
    /// Masquerades packets that leave the overlay (only told in subnet.env; rules not built yet)
    #[arg(long, action = ArgAction::Set, value_parser = switch, default_value = "false")]
    pub ip_masq: bool,
    /// Never asks iptables for --random-fully (not built yet)
    #[arg(long, action = ArgAction::Set, value_parser = switch, default_value = "false")]
    pub ip_masq_fully_random_disable: bool,
    /// Seconds between checks of the rules (not built yet)
    #[arg(long, value_name = "SECONDS", default_value_t = settings::IPTABLES_RESYNC)]
    pub iptables_resync: u32,
    /// Accepts the overlay's packets in the chain FORWARD (not built yet)
    #[arg(long, action = ArgAction::Set, value_parser = switch, default_value = "true")]
    pub iptables_forward_rules: bool,
    /// Discards packets to addresses of our subnet that no container has (not built yet)
    #[arg(long, action = ArgAction::Set, value_parser = switch, default_value = "false")]
    pub ip_blackhole_route: bool,
}

/// Answers about the daemon's health over HTTP.
#[derive(Debug, Clone, PartialEq, Args)]
#[command(next_help_heading = "Health")]
pub struct HealthFlags {
    /// The address to answer at (not built yet)
    #[arg(long, value_name = "IP", default_value = "0.0.0.0")]
    pub healthz_ip: IpAddr,
    /// The port to answer at; 0 is none (not built yet)
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

/// A secret that stays out of logs.
#[derive(Clone, PartialEq, Eq)]
pub struct Password(pub String);

impl From<String> for Password {
    fn from(text: String) -> Self {
        Self(text)
    }
}

impl fmt::Debug for Password {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Password(..)")
    }
}

/// Reads the command line `args`, which begins with the program's name, and for each flag that it
/// lacks the variable: FLANNELD_IP_MASQ for --ip-masq, WEFT_GUARD for weft's own --guard. An empty
/// value, of a flag or a variable, counts as none.
///
/// # Errors
/// A flag or a value is wrong; or, with an exit code of 0, help or version was asked for, and is
/// what the error prints. See [`one_line`].
pub fn parse(
    args: impl IntoIterator<Item = OsString>,
    variable: impl Fn(&str) -> Option<OsString>,
) -> Result<Flags, clap::Error> {
    let command = command();
    let arguments = arguments::from_go(&command, args.into_iter().skip(1));
    let matches = matches(&command, &arguments)?;
    let mut all = from_variables(&command, &matches, variable)?;
    all.extend(arguments);
    Flags::from_arg_matches(&self::matches(&command, &all)?)
}

/// What is wrong with the command line and how to mend it, without line breaks.
pub fn one_line(error: &clap::Error) -> String {
    let text = error.to_string();
    let lines = text.lines().map(str::trim);
    let told =
        lines.take_while(|line| !line.starts_with("Usage:") && !line.starts_with("For more"));
    let told = told.map(|line| line.trim_start_matches("error: ").trim_start_matches("tip: "));
    let mut told: Vec<&str> = told.filter(|line| !line.is_empty()).collect();
    if !text.contains("tip: ") {
        told.push("see --help");
    }
    told.join("; ")
}

fn command() -> Command {
    let version =
        Arg::new("version").long("version").action(ArgAction::Version).help("Print version");
    let command = Command::new(PROGRAM).disable_version_flag(true).arg(version);
    Flags::augment_args(command)
        .about("Carries container packets between hosts, in flannel's place")
        .version(env!("CARGO_PKG_VERSION"))
        .args_override_self(true)
        .mut_args(|arg| if arguments::is_switch(&arg) { as_switch(arg) } else { arg })
        .next_line_help(true)
        .after_help(format!(
            "A flag may be written with one dash or two. An empty value counts as none.\n\
             For a flag that is missing, a variable is read: FLANNELD_IP_MASQ for --ip-masq, and \
             so on;\nWEFT_LOG_LEVEL for --log-level, and so on, for weft's own flags:\n  --{}",
            WEFT_FLAGS.join(", --")
        ))
}

/// Go's booleans take a value only behind `=`.
fn as_switch(arg: Arg) -> Arg {
    arg.num_args(0..=1).require_equals(true).default_missing_value("true").value_name("BOOL")
}

fn matches(command: &Command, arguments: &[OsString]) -> Result<ArgMatches, clap::Error> {
    let program = [OsString::from(PROGRAM)];
    command.clone().try_get_matches_from(program.iter().chain(arguments))
}

/// The flags that only variables give, as arguments.
fn from_variables(
    command: &Command,
    given: &ArgMatches,
    variable: impl Fn(&str) -> Option<OsString>,
) -> Result<Vec<OsString>, clap::Error> {
    let mut arguments = Vec::new();
    for arg in command.get_arguments().filter(|arg| arg.get_action().takes_values()) {
        let name = arg.get_long().unwrap_or_default();
        if given.value_source(arg.get_id().as_str()) == Some(ValueSource::CommandLine) {
            continue;
        }
        let variable_name = variable_name(name);
        let Some(value) = variable(&variable_name).filter(|value| !value.is_empty()) else {
            continue;
        };
        let argument = arguments::with_value(name.as_ref(), &value);
        // By itself, so that an error is known to be this variable's.
        matches(command, std::slice::from_ref(&argument)).map_err(|error| {
            let text = format!("{} (from the variable {variable_name})", one_line(&error));
            clap::Error::raw(error.kind(), text)
        })?;
        arguments.push(argument);
    }
    Ok(arguments)
}

fn variable_name(flag: &str) -> String {
    let prefix = if WEFT_FLAGS.contains(&flag) { "WEFT" } else { "FLANNELD" };
    format!("{prefix}_{}", flag.to_uppercase().replace('-', "_"))
}

fn switch(text: &str) -> Result<bool, &'static str> {
    arguments::boolean(text).ok_or("give true or false")
}

fn registry_directory(text: &str) -> Result<PathBuf, &'static str> {
    let path = text.strip_prefix("dir:").map(PathBuf::from);
    path.filter(|path| path.is_absolute())
        .ok_or("give dir: and an absolute path, as in dir:/var/lib/weft/registry")
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

fn log_level(text: &str) -> Result<String, String> {
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

#[cfg(test)]
mod tests {
    use clap::error::ErrorKind;

    use super::*;

    /// flannel's flags, each with a value other than its default.
    const FLANNEL: [(&str, &str); 30] = [
        ("etcd-endpoints", "https://192.0.2.1:2379,https://192.0.2.2:2379"),
        ("etcd-prefix", "/overlay/network"),
        ("etcd-keyfile", "/etc/key.pem"),
        ("etcd-certfile", "/etc/cert.pem"),
        ("etcd-cafile", "/etc/ca.pem"),
        ("etcd-username", "weft"),
        ("etcd-password", "-secret=="),
        ("iface", "eth1"),
        ("iface-regex", "^eth\\d+$"),
        ("iface-can-reach", "192.0.2.1"),
        ("public-ip", "192.0.2.7"),
        ("public-ipv6", "2001:db8::7"),
        ("subnet-file", "/tmp/subnet.env"),
        ("subnet-lease-renew-margin", "1439"),
        ("ip-masq", "true"),
        ("ip-masq-fully-random-disable", "1"),
        ("iptables-resync", "30"),
        ("iptables-forward-rules", "F"),
        ("ip-blackhole-route", "t"),
        ("kube-subnet-mgr", "TRUE"),
        ("kube-api-url", "https://192.0.2.1:6443"),
        ("kubeconfig-file", "/etc/kubeconfig"),
        ("kube-annotation-prefix", "example.org"),
        ("net-config-path", "/etc/net-conf.json"),
        ("set-node-network-unavailable", "false"),
        ("healthz-ip", "127.0.0.1"),
        ("healthz-port", "8081"),
        ("v", "10"),
        ("vmodule", "main=2"),
        ("log_backtrace_at", "main.go:10"),
    ];

    const WEFT: [(&str, &str); 14] = [
        ("registry", "dir:/srv/registry"),
        ("network", "10.42.0.0/16"),
        ("state-dir", "/srv/state"),
        ("run-dir", "/srv/run"),
        ("backend", "vxlan"),
        ("guard", "peer"),
        ("peer-source", "192.0.2.7=198.51.100.7"),
        ("workers", "3"),
        ("io", "mmsg"),
        ("offload", "udp-gro=off"),
        ("udp-source-port", "fixed"),
        ("busy-poll", "50"),
        ("dscp", "copy"),
        ("log-level", "warn,weft_engine=trace"),
    ];

    fn parsed(args: &[&str], variables: &[(&str, &str)]) -> Result<Flags, clap::Error> {
        let args = [PROGRAM].iter().chain(args).map(OsString::from);
        parse(args, |name| {
            let (_, value) = variables.iter().find(|(variable, _)| *variable == name)?;
            Some(value.into())
        })
    }

    fn flags(args: &[&str]) -> Flags {
        parsed(args, &[]).unwrap()
    }

    fn refused(args: &[&str]) -> String {
        let error = parsed(args, &[]).unwrap_err();
        assert_eq!(error.exit_code(), 2);
        one_line(&error)
    }

    #[test]
    fn every_flag_parses_in_every_form() {
        let defaults = flags(&[]);
        for (name, value) in FLANNEL.into_iter().chain(WEFT) {
            let variable = variable_name(name);
            let joined = [format!("-{name}={value}"), format!("--{name}={value}")];
            let apart = [format!("-{name}"), format!("--{name}")];
            let expected = flags(&[&joined[0]]);
            assert_ne!(expected, defaults, "{name}");
            assert_eq!(flags(&[&joined[1]]), expected, "{name}");
            assert_eq!(flags(&[&apart[0], value]), expected, "{name}");
            assert_eq!(flags(&[&apart[1], value]), expected, "{name}");
            assert_eq!(parsed(&[], &[(&variable, value)]).unwrap(), expected, "{variable}");
        }
    }

    #[test]
    fn the_tables_of_these_tests_are_whole() {
        let command = command();
        let known = command.get_arguments().filter_map(Arg::get_long);
        let mut known: Vec<&str> = known.filter(|name| *name != "version").collect();
        let mut tested: Vec<&str> = FLANNEL.into_iter().chain(WEFT).map(|(name, _)| name).collect();
        known.sort_unstable();
        tested.sort_unstable();
        assert_eq!(known, tested);
        let own: Vec<&str> = WEFT.into_iter().map(|(name, _)| name).collect();
        assert_eq!(own, WEFT_FLAGS);
    }

    #[test]
    fn help_names_every_flag_under_its_heading() {
        for spelling in ["-h", "-help", "--help"] {
            let error = parsed(&["-ip-masq", spelling, "-unknown"], &[]).unwrap_err();
            assert_eq!((error.kind(), error.exit_code()), (ErrorKind::DisplayHelp, 0));
            assert!(!error.use_stderr());
            let help = error.to_string();
            for (name, _) in FLANNEL.into_iter().chain(WEFT) {
                let named = help.split_whitespace().any(|word| {
                    word.split(['[', '=']).next() == Some(format!("--{name}").as_str())
                });
                assert!(named, "--{name} is missing");
            }
            for heading in [
                "Registry",
                "Network",
                "Interface",
                "Engine",
                "Firewall",
                "Health",
                "Kubernetes",
                "Logging",
            ] {
                assert!(help.contains(&format!("\n{heading}:\n")), "{heading} is missing");
            }
        }
    }

    #[test]
    fn help_marks_what_is_not_built() {
        let command = command();
        let marked = command.get_arguments().filter(|arg| {
            arg.get_help().is_some_and(|help| help.to_string().contains("(not built yet)"))
        });
        let names = marked.filter_map(Arg::get_long).map(|name| format!("--{name}"));
        let mut marked: Vec<String> = names.collect();
        // Without a port it asks for nothing, so it is not refused.
        marked.retain(|name| name != "--healthz-ip");
        let mut refused: Vec<&str> = settings::not_built_flags().collect();
        marked.sort_unstable();
        refused.sort_unstable();
        assert_eq!(marked, refused);
    }

    #[test]
    fn version_is_told_before_variables_are_looked_at() {
        for spelling in ["-version", "--version", "-version=true"] {
            let error = parsed(&[spelling], &[("FLANNELD_HEALTHZ_PORT", "x")]).unwrap_err();
            assert_eq!((error.kind(), error.exit_code()), (ErrorKind::DisplayVersion, 0));
        }
        assert!(parsed(&[], &[("FLANNELD_VERSION", "true")]).is_ok());
    }

    #[test]
    fn a_flag_comes_before_its_variable_and_an_empty_variable_is_none() {
        let variable = [("FLANNELD_IP_MASQ", "true"), ("FLANNELD_IFACE", "eth0,eth1")];
        let found = parsed(&["-ip-masq=false", "-iface=lo", "-iface", "eth2"], &variable).unwrap();
        assert!(!found.firewall.ip_masq);
        assert_eq!(found.interface.iface, ["lo", "eth2"]);
        // A variable gives a repeatable flag one element, whatever is in it.
        assert_eq!(parsed(&[], &variable).unwrap().interface.iface, ["eth0,eth1"]);
        let empty = [("FLANNELD_HEALTHZ_PORT", ""), ("FLANNELD_IP_MASQ", "")];
        assert_eq!(parsed(&[], &empty).unwrap(), flags(&[]));
        // A flag without a value leaves the variable its say, as if it had not been given.
        assert!(parsed(&["-ip-masq="], &variable).unwrap().firewall.ip_masq);
    }

    #[test]
    fn a_variable_of_the_other_kind_is_not_read() {
        let found = parsed(&[], &[("FLANNELD_GUARD", "off"), ("WEFT_IP_MASQ", "true")]).unwrap();
        assert_eq!(found, flags(&[]));
    }

    #[test]
    fn a_bad_variable_is_named() {
        for (variable, value) in [
            ("FLANNELD_HEALTHZ_PORT", "http"),
            ("FLANNELD_IP_MASQ", "maybe"),
            ("WEFT_BACKEND", "ipip"),
            ("WEFT_WORKERS", "0"),
        ] {
            let error = parsed(&["-v=1"], &[(variable, value)]).unwrap_err();
            let text = one_line(&error);
            assert_eq!(error.exit_code(), 2);
            assert!(text.contains(variable) && text.contains(value), "{text}");
            assert!(!text.contains('\n'), "{text}");
        }
    }

    #[test]
    fn the_last_of_a_flag_counts() {
        assert_eq!(flags(&["-v=1", "-v", "2"]).logging.v, Some(2));
        assert!(!flags(&["-ip-masq", "-ip-masq=false"]).firewall.ip_masq);
    }

    #[test]
    fn gos_booleans() {
        for text in ["1", "t", "T", "TRUE", "true", "True"] {
            assert!(flags(&[&format!("-ip-masq={text}")]).firewall.ip_masq, "{text}");
            assert!(flags(&["-ip-masq", text]).firewall.ip_masq, "{text}");
        }
        for text in ["0", "f", "F", "FALSE", "false", "False"] {
            let found = flags(&[&format!("-iptables-forward-rules={text}")]);
            assert!(!found.firewall.iptables_forward_rules, "{text}");
        }
        assert!(flags(&["-ip-masq"]).firewall.ip_masq);
    }

    #[test]
    fn the_seeds_command_line_survives_unset_variables() {
        let found = flags(&["--ip-masq", "", "-etcd-prefix=/x", "", "", "-etcd-cafile=/ca"]);
        assert!(found.firewall.ip_masq);
        assert_eq!(found.registry.etcd_prefix.as_deref(), Some("/x"));
        assert_eq!(found.registry.etcd_cafile, Some("/ca".into()));
    }

    #[test]
    fn what_is_wrong_is_said_in_one_line() {
        let cases: &[(&[&str], &[&str])] = &[
            (&["-etcd-prefx=/x"], &["'--etcd-prefx'", "'--etcd-prefix'"]),
            (&["-unknown", "x"], &["'--unknown'"]),
            (&["-ip-masq", "extra", "-v=1"], &["'extra'"]),
            (&["--", "-ip-masq"], &["'-ip-masq'"]),
            (&["-"], &["'-'"]),
            (&["---x"], &["---x"]),
            (&["--=x"], &["'--'"]),
            (&["-etcd-prefix"], &["a value is required", "--etcd-prefix"]),
            (&["-ip-masq=maybe"], &["'maybe'", "--ip-masq", "true or false"]),
            (&["-public-ip=2001:db8::1"], &["'2001:db8::1'", "--public-ip"]),
            (&["-healthz-port=70000"], &["70000", "--healthz-port"]),
            (&["-subnet-lease-renew-margin=0"], &["'0'", "out of acceptable range", "1439"]),
            (&["-subnet-lease-renew-margin=1440"], &["out of acceptable range"]),
            (&["--backend=ipip"], &["'ipip'", "udp-tun, vxlan, host-gw"]),
            (&["--guard=of"], &["'of'", "strict, peer, off"]),
            (&["--registry=/srv"], &["'/srv'", "dir:/var/lib/weft/registry"]),
            (&["--registry=dir:srv"], &["absolute path"]),
            (&["--network=10.42.0.0"], &["10.42.0.0/16"]),
            (&["--peer-source=192.0.2.7"], &["192.0.2.7=198.51.100.7"]),
            (&["--workers=0"], &["from 1 to 256"]),
            (&["--workers=257"], &["from 1 to 256"]),
            (&["--io=epoll"], &["'epoll'", "auto, uring, mmsg"]),
            (&["--offload=udp-gro"], &["udp-gro=off"]),
            (&["--offload=udp-gro=on"], &["udp-gro=off"]),
            (&["--offload=gro=off"], &["no offload is called gro", "udp-gro", "tun-tso"]),
            (&["--busy-poll=1s"], &["'1s'"]),
            (&["--busy-poll=100001"], &["100001"]),
            (&["--log-level=inof"], &["\"inof\" is no level", "info"]),
        ];
        for (args, told) in cases {
            let text = refused(args);
            assert!(!text.contains('\n') && !text.starts_with("error"), "{text}");
            for word in *told {
                assert!(text.contains(word), "{args:?}: {text}");
            }
        }
    }

    #[test]
    fn log_levels_are_as_tracing_has_them() {
        assert_eq!(flags(&[]).logging.log_level, "info");
        assert_eq!(flags(&["-log-level=DEBUG"]).logging.log_level, "DEBUG");
    }

    #[test]
    fn the_password_stays_out_of_logs() {
        let found = flags(&["-etcd-password=secret"]);
        assert!(!format!("{found:?}").contains("secret"));
    }
}
