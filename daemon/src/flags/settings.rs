//! What the flags come to: the one place that knows defaults which depend on other flags, and
//! which flags' work has not landed yet.

use std::fmt;
use std::fs;
use std::net::IpAddr;
use std::num::NonZeroUsize;
use std::path::PathBuf;
use std::thread;
use std::time::Duration;

use ipnetwork::IpNetwork;
use weft_backends::{BackendKind, GuardMode, Tuning};
use weft_control::{Access, Secret};

use super::engine::MAX_WORKERS;
use super::{EtcdApi, Flags, LoggingFlags, RegistryFlags};
use crate::interface::Wish;

/// flannel's default, in seconds.
pub(super) const IPTABLES_RESYNC: u32 = 5;

/// Where `--network` alone keeps leases.
const DEFAULT_REGISTRY: &str = "/var/lib/weft/registry";

const ANOTHER_REGISTRY: &str = "--etcd-endpoints URLS or --registry dir:PATH";
const IFACE: &str = "--iface";

/// flannel's defaults.
const ETCD_ENDPOINTS: [&str; 2] = ["http://127.0.0.1:4001", "http://127.0.0.1:2379"];
const ETCD_PREFIX: &str = "/coreos.com/network";

/// Pauses between tries to renew a lease, as flannel's, unless there is less time left.
const RENEW_RETRY: Duration = Duration::from_secs(60);

/// A flag whose work has not landed yet.
struct NotBuilt {
    flag: &'static str,
    /// What serves meanwhile.
    instead: Option<&'static str>,
    /// Whether the operator asks for it; a value that flannel has by default asks for nothing.
    asked: fn(&Flags) -> bool,
}

const fn not_built(
    flag: &'static str,
    instead: Option<&'static str>,
    asked: fn(&Flags) -> bool,
) -> NotBuilt {
    NotBuilt { flag, instead, asked }
}

const NOT_BUILT: [NotBuilt; 13] = {
    const R: Option<&str> = Some(ANOTHER_REGISTRY);
    const I: Option<&str> = Some(IFACE);
    [
        not_built("--kube-subnet-mgr", R, |flags| flags.kubernetes.kube_subnet_mgr),
        not_built("--kube-api-url", R, |flags| flags.kubernetes.kube_api_url.is_some()),
        not_built("--kubeconfig-file", R, |flags| flags.kubernetes.kubeconfig_file.is_some()),
        not_built("--kube-annotation-prefix", R, |flags| {
            flags.kubernetes.kube_annotation_prefix.is_some()
        }),
        not_built("--net-config-path", R, |flags| flags.kubernetes.net_config_path.is_some()),
        not_built("--set-node-network-unavailable", None, |flags| {
            !flags.kubernetes.set_node_network_unavailable
        }),
        not_built("--iface-regex", I, |flags| !flags.interface.iface_regex.is_empty()),
        not_built("--iface-can-reach", I, |flags| flags.interface.iface_can_reach.is_some()),
        not_built("--ip-masq-fully-random-disable", None, |flags| {
            flags.firewall.ip_masq_fully_random_disable
        }),
        not_built("--iptables-resync", None, |flags| {
            flags.firewall.iptables_resync != IPTABLES_RESYNC
        }),
        not_built("--iptables-forward-rules", None, |flags| !flags.firewall.iptables_forward_rules),
        not_built("--ip-blackhole-route", None, |flags| flags.firewall.ip_blackhole_route),
        not_built("--healthz-port", None, |flags| flags.health.healthz_port != 0),
    ]
};

/// Why the daemon cannot start with these flags.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum FlagError {
    /// Flags whose work has not landed yet.
    #[error(
        "not built yet: {flags}; leave out each of these flags and its FLANNELD_ variable{instead}"
    )]
    NotBuilt {
        /// Their names, separated by commas.
        flags: String,
        /// What serves meanwhile: empty, or "; use …".
        instead: String,
    },
    /// Half of a client certificate, or of a user's name and password.
    #[error("{given} goes with {missing}: give both or none")]
    Half { given: &'static str, missing: &'static str },
    /// Two flags say the same thing in two ways.
    #[error("--etcd-password and --etcd-password-file: give one of them")]
    TwoPasswords,
    /// The file that `--etcd-password-file` names.
    #[error("cannot read {path}, which --etcd-password-file names: {reason}")]
    PasswordFile { path: String, reason: String },
}

/// What the operator should know of the flags, once.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Note {
    /// Something asked for does not happen.
    Warn(&'static str),
    /// Worth knowing.
    Info(&'static str),
    /// Worth knowing when looking for a fault.
    Debug(&'static str),
}

impl Note {
    /// Writes the note to the log, at its level.
    pub fn log(&self) {
        match self {
            Self::Warn(text) => tracing::warn!("{text}"),
            Self::Info(text) => tracing::info!("{text}"),
            Self::Debug(text) => tracing::debug!("{text}"),
        }
    }
}

impl fmt::Display for Note {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (Self::Warn(text) | Self::Info(text) | Self::Debug(text)) = self;
        f.write_str(text)
    }
}

/// What the daemon works by.
#[derive(Debug, Clone, PartialEq)]
pub struct Settings {
    /// Where leases are kept.
    pub registry: RegistrySettings,
    /// How long the lease lasts without renewal.
    pub lease_ttl: Duration,
    /// The Network of the config that is written if there is none.
    pub network: Option<IpNetwork>,
    /// How long before its expiry the lease is renewed.
    pub renew_margin: Duration,
    /// Where subnet.env goes.
    pub subnet_file: PathBuf,
    /// What outlives a reboot.
    pub state_dir: PathBuf,
    /// What does not.
    pub run_dir: PathBuf,
    /// Which interface leads to other nodes.
    pub wish: Wish,
    /// The backend that the operator named; it stands where the network config names none.
    pub backend: Option<BackendKind>,
    /// What is checked of received packets.
    pub guard: GuardMode,
    /// A node's public address, and a further one that it sends from.
    pub peer_sources: Vec<(IpAddr, IpAddr)>,
    /// Workers of the packet engine, at least 1.
    pub workers: usize,
    /// How the packet engine goes about it.
    pub tuning: Tuning,
    /// Whether subnet.env says that weft masquerades.
    pub ip_masq: bool,
    /// What the operator should know.
    pub notes: Vec<Note>,
}

/// Where leases are kept.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum RegistrySettings {
    Directory(PathBuf),
    Etcd { access: Access, prefix: String, api: EtcdApi },
}

impl Settings {
    /// How long before its end the lease is renewed, and the pause after a try that failed. A short
    /// lease leaves less time for both.
    pub fn renewal(&self) -> (Duration, Duration) {
        let margin = self.renew_margin.min(self.lease_ttl / 2);
        (margin, RENEW_RETRY.min(margin / 4))
    }
}

impl Flags {
    /// Decides what the flags come to.
    ///
    /// # Errors
    /// A flag asks for what is not built yet.
    pub fn settings(self) -> Result<Settings, FlagError> {
        refuse_not_built(&self)?;
        Ok(Settings {
            registry: registry(&self)?,
            lease_ttl: self.lease.subnet_lease_ttl,
            notes: notes(&self),
            network: self.network.network,
            renew_margin: self.lease.subnet_lease_renew_margin,
            subnet_file: self.network.subnet_file,
            state_dir: self.network.state_dir,
            run_dir: self.network.run_dir,
            wish: Wish {
                iface: self.interface.iface,
                public_ip: self.interface.public_ip,
                public_ipv6: self.interface.public_ipv6,
            },
            backend: self.engine.backend,
            guard: self.engine.guard,
            tuning: self.engine.tuning(),
            peer_sources: self.engine.peer_source,
            workers: self.engine.workers.unwrap_or_else(default_workers),
            ip_masq: self.firewall.ip_masq,
        })
    }
}

/// A directory where one is named, or `--network` alone asks for no servers; else etcd.
fn registry(flags: &Flags) -> Result<RegistrySettings, FlagError> {
    if flags.registry.registry.is_none()
        && flags.network.network.is_some()
        && !asks_for_etcd(&flags.registry)
    {
        return Ok(RegistrySettings::Directory(DEFAULT_REGISTRY.into()));
    }
    flags.registry.settings()
}

impl RegistryFlags {
    /// What these flags alone name.
    ///
    /// # Errors
    /// Half of a certificate or a user is given, or a password twice, or its file cannot be read.
    pub fn settings(&self) -> Result<RegistrySettings, FlagError> {
        match &self.registry {
            Some(path) => Ok(RegistrySettings::Directory(path.clone())),
            None => etcd(self),
        }
    }
}

fn etcd(flags: &RegistryFlags) -> Result<RegistrySettings, FlagError> {
    let RegistryFlags { etcd_cafile, etcd_certfile, etcd_keyfile, .. } = flags;
    let half = |given, missing| Err(FlagError::Half { given, missing });
    match (etcd_certfile, etcd_keyfile) {
        (Some(_), None) => return half("--etcd-certfile", "--etcd-keyfile"),
        (None, Some(_)) => return half("--etcd-keyfile", "--etcd-certfile"),
        _ => {}
    }
    let user = match (flags.etcd_username.clone(), password(flags)?) {
        (Some(name), Some(password)) => Some((name, password)),
        (Some(_), None) => return half("--etcd-username", "--etcd-password"),
        (None, Some(_)) => return half("--etcd-password", "--etcd-username"),
        (None, None) => None,
    };
    let given = flags.etcd_endpoints.as_deref().unwrap_or_default().split(',');
    let given = given.map(|url| url.trim().to_owned());
    let mut endpoints: Vec<String> = given.filter(|url| !url.is_empty()).collect();
    if endpoints.is_empty() {
        endpoints = ETCD_ENDPOINTS.map(str::to_owned).to_vec();
    }
    let prefix = flags.etcd_prefix.clone().unwrap_or_else(|| ETCD_PREFIX.to_owned());
    let access = Access {
        endpoints,
        ca_file: etcd_cafile.clone(),
        cert_file: etcd_certfile.clone(),
        key_file: etcd_keyfile.clone(),
        user,
    };
    Ok(RegistrySettings::Etcd { access, prefix, api: flags.etcd_api })
}

fn asks_for_etcd(flags: &RegistryFlags) -> bool {
    flags.etcd_endpoints.is_some()
        || flags.etcd_prefix.is_some()
        || flags.etcd_api != EtcdApi::Auto
        || flags.etcd_cafile.is_some()
        || flags.etcd_certfile.is_some()
        || flags.etcd_username.is_some()
}

fn password(flags: &RegistryFlags) -> Result<Option<Secret>, FlagError> {
    let Some(path) = &flags.etcd_password_file else {
        return Ok(flags.etcd_password.clone());
    };
    if flags.etcd_password.is_some() {
        return Err(FlagError::TwoPasswords);
    }
    let text = fs::read_to_string(path).map_err(|error| FlagError::PasswordFile {
        path: path.display().to_string(),
        reason: error.to_string(),
    })?;
    Ok(Some(Secret(text.trim_end_matches(['\r', '\n']).to_owned())))
}

fn refuse_not_built(flags: &Flags) -> Result<(), FlagError> {
    let asked: Vec<&NotBuilt> = NOT_BUILT.iter().filter(|it| (it.asked)(flags)).collect();
    if asked.is_empty() {
        return Ok(());
    }
    let names: Vec<&str> = asked.iter().map(|it| it.flag).collect();
    let mut instead: Vec<&str> = asked.iter().filter_map(|it| it.instead).collect();
    // The table keeps flags with the same replacement together.
    instead.dedup();
    let instead: String = instead.iter().map(|it| format!("; use {it}")).collect();
    Err(FlagError::NotBuilt { flags: names.join(", "), instead })
}

fn notes(flags: &Flags) -> Vec<Note> {
    let mut notes = Vec::new();
    if flags.firewall.ip_masq {
        notes.push(Note::Warn(
            "--ip-masq: no firewall rule is installed yet, while subnet.env says \
             FLANNEL_IPMASQ=true: packets from containers to the outside keep their container \
             addresses",
        ));
    }
    if flags.engine.guard == GuardMode::Strict {
        notes.push(Note::Info(
            "--guard strict: without masquerading, packets that a host forwards into the overlay \
             for others are dropped where they arrive, their source being neither in its subnet \
             nor its public IP; --guard peer lets them through",
        ));
    }
    if flags.registry.registry.is_some() && asks_for_etcd(&flags.registry) {
        notes
            .push(Note::Warn("--registry names a directory, so the flags --etcd-… change nothing"));
    }
    if speaks_klog(&flags.logging) {
        notes.push(Note::Info(
            "--v, --vmodule and --log_backtrace_at change nothing: see --log-level",
        ));
    }
    if flags.firewall.iptables_forward_rules {
        notes.push(Note::Debug(
            "--iptables-forward-rules: no rule is installed yet; the chain FORWARD must let the \
             overlay's packets pass",
        ));
    }
    notes
}

fn speaks_klog(logging: &LoggingFlags) -> bool {
    logging.v.is_some() || logging.vmodule.is_some() || logging.log_backtrace_at.is_some()
}

fn default_workers() -> usize {
    thread::available_parallelism().map_or(1, NonZeroUsize::get).min(MAX_WORKERS)
}

#[cfg(test)]
pub(super) fn not_built_flags() -> impl Iterator<Item = &'static str> {
    NOT_BUILT.iter().map(|it| it.flag)
}

#[cfg(test)]
mod tests {
    use std::ffi::OsString;

    use super::super::parse;
    use super::*;

    fn flags(args: &[&str], variables: &[(&str, &str)]) -> Flags {
        let args = ["weftd"].iter().chain(args).map(OsString::from);
        let variable = |name: &str| {
            let (_, value) = variables.iter().find(|(variable, _)| *variable == name)?;
            Some(OsString::from(value))
        };
        parse(args, variable).unwrap()
    }

    fn settings(args: &[&str]) -> Result<Settings, FlagError> {
        flags(args, &[]).settings()
    }

    const REGISTRY: &str = "--registry=dir:/srv/registry";

    #[test]
    fn the_registry_is_flannels_unless_a_flag_says_otherwise() {
        let registry = |args: &[&str]| settings(args).unwrap().registry;
        let directory = |path: &str| RegistrySettings::Directory(path.into());
        let RegistrySettings::Etcd { access, prefix, api: EtcdApi::Auto } = registry(&[]) else {
            panic!()
        };
        assert_eq!(access.endpoints, ["http://127.0.0.1:4001", "http://127.0.0.1:2379"]);
        assert_eq!((access.user, prefix.as_str()), (None, "/coreos.com/network"));
        assert_eq!(registry(&["--network=10.42.0.0/16"]), directory("/var/lib/weft/registry"));
        assert_eq!(registry(&["--network=10.42.0.0/16", REGISTRY]), directory("/srv/registry"));
        let found =
            registry(&["--network=10.42.0.0/16", "--etcd-endpoints=a:1, b:2,", "-etcd-prefix=/x"]);
        let RegistrySettings::Etcd { access, prefix, .. } = found else { panic!() };
        assert_eq!(access.endpoints, ["a:1", "b:2"]);
        assert_eq!(prefix, "/x");
    }

    #[test]
    fn half_a_certificate_or_a_user_is_refused() {
        for (given, missing) in [
            ("--etcd-certfile", "--etcd-keyfile"),
            ("--etcd-keyfile", "--etcd-certfile"),
            ("--etcd-username", "--etcd-password"),
            ("--etcd-password", "--etcd-username"),
        ] {
            let refused = settings(&[&format!("{given}=x")]).unwrap_err();
            assert_eq!(
                refused.to_string(),
                format!("{given} goes with {missing}: give both or none")
            );
        }
    }

    #[test]
    fn a_password_may_come_from_a_file() {
        let file = tempfile::NamedTempFile::new().unwrap();
        fs::write(file.path(), "hunter2\n").unwrap();
        let flag = format!("--etcd-password-file={}", file.path().display());
        let found = settings(&["--etcd-username=root", &flag]).unwrap();
        assert!(!format!("{found:?}").contains("hunter2"));
        let RegistrySettings::Etcd { access, .. } = found.registry else { panic!() };
        assert_eq!(access.user, Some(("root".into(), Secret("hunter2".into()))));
        let both = settings(&["--etcd-username=root", &flag, "--etcd-password=x"]);
        assert_eq!(both, Err(FlagError::TwoPasswords));
        let none = settings(&["--etcd-username=root", "--etcd-password-file=/nowhere"]);
        assert!(none.unwrap_err().to_string().contains("/nowhere"));
    }

    #[test]
    fn a_short_lease_is_renewed_in_time() {
        let renewal = |args: &[&str]| settings(args).unwrap().renewal();
        let seconds = Duration::from_secs;
        assert_eq!(renewal(&[REGISTRY]), (seconds(3600), seconds(60)));
        let short = [REGISTRY, "--subnet-lease-ttl=20s"];
        assert_eq!(renewal(&short), (seconds(10), Duration::from_millis(2500)));
    }

    #[test]
    fn defaults() {
        let found = settings(&[REGISTRY]).unwrap();
        assert_eq!(found.renew_margin, Duration::from_secs(3600));
        assert_eq!(found.subnet_file, PathBuf::from("/run/flannel/subnet.env"));
        assert_eq!(found.state_dir, PathBuf::from("/var/lib/weft"));
        assert_eq!(found.run_dir, PathBuf::from("/run/weft"));
        assert_eq!((found.backend, found.guard), (None, GuardMode::Strict));
        assert_eq!(found.wish, Wish::default());
        assert!(found.workers >= 1 && !found.ip_masq);
        assert!(!found.notes.iter().any(|note| matches!(note, Note::Warn(_))));
    }

    /// Each flag of the table with a value that asks for something.
    const ASKING: [&str; 13] = [
        "--kube-subnet-mgr=true",
        "--kube-api-url=u",
        "--kubeconfig-file=/k",
        "--kube-annotation-prefix=p",
        "--net-config-path=/n",
        "--set-node-network-unavailable=false",
        "--iface-regex=eth",
        "--iface-can-reach=192.0.2.1",
        "--ip-masq-fully-random-disable=true",
        "--iptables-resync=6",
        "--iptables-forward-rules=false",
        "--ip-blackhole-route=true",
        "--healthz-port=8081",
    ];

    #[test]
    fn what_is_not_built_is_refused_by_flag_and_by_variable() {
        for (asking, known) in ASKING.iter().zip(not_built_flags()) {
            let (flag, value) = asking.split_once('=').unwrap();
            assert_eq!(flag, known);
            let variable = format!("FLANNELD_{}", flag[2..].to_uppercase().replace('-', "_"));
            for flags in
                [flags(&[REGISTRY, asking], &[]), flags(&[REGISTRY], &[(&variable, value)])]
            {
                let error = flags.settings().unwrap_err().to_string();
                assert!(error.starts_with(&format!("not built yet: {flag};")), "{error}");
            }
        }
    }

    #[test]
    fn all_of_what_is_not_built_is_told_at_once() {
        let error = settings(&["-kube-subnet-mgr", "-net-config-path=/y", "-iface-regex=e"]);
        assert_eq!(
            error.unwrap_err().to_string(),
            "not built yet: --kube-subnet-mgr, --net-config-path, --iface-regex; leave out each of \
             these flags and its FLANNELD_ variable; use --etcd-endpoints URLS or --registry \
             dir:PATH; use --iface"
        );
    }

    #[test]
    fn flannels_defaults_ask_for_nothing() {
        let found = settings(&[
            REGISTRY,
            "-kube-subnet-mgr=false",
            "-set-node-network-unavailable=true",
            "-iptables-resync=5",
            "-iptables-forward-rules",
            "-ip-masq-fully-random-disable=false",
            "-ip-blackhole-route=false",
            "-healthz-port=0",
            "-healthz-ip=127.0.0.1",
        ]);
        assert!(found.is_ok());
    }

    #[test]
    fn notes_tell_what_has_no_effect_yet() {
        let found = settings(&[REGISTRY, "-ip-masq", "-v=4", "-vmodule=x=1", "--guard=peer"]);
        let found = found.unwrap();
        assert!(found.ip_masq);
        let [Note::Warn(masq), Note::Info(klog), Note::Debug(forward)] = found.notes[..] else {
            panic!("{:?}", found.notes);
        };
        assert!(masq.contains("no firewall rule is installed yet"));
        assert!(masq.contains("FLANNEL_IPMASQ=true"));
        assert!(klog.contains("--log-level"));
        assert!(forward.contains("--iptables-forward-rules"));
    }

    #[test]
    fn strict_says_what_it_drops() {
        let notes = settings(&[REGISTRY]).unwrap().notes;
        assert!(notes.iter().any(|note| note.to_string().starts_with("--guard strict")));
    }
}
