//! What the flags come to: the one place that knows defaults which depend on other flags, and
//! which flags' work has not landed yet.

use std::fs;
use std::net::{IpAddr, SocketAddr};
use std::num::NonZeroUsize;
use std::path::PathBuf;
use std::thread;
use std::time::Duration;

use ipnetwork::IpNetwork;
use weft_backends::{BackendKind, GuardMode, Tuning};
use weft_control::firewall::rules::Switches;
use weft_control::{Access, Password};

use super::engine::MAX_WORKERS;
use super::{EtcdApi, Flags, KubernetesFlags, LoggingFlags, RegistryFlags};
use crate::firewall::FirewallKind;
use crate::interface::Wish;

/// Where `--network` alone keeps leases.
const DEFAULT_REGISTRY: &str = "/var/lib/weft/registry";

/// flannel's defaults.
pub(super) const ETCD_ENDPOINTS: [&str; 2] = ["http://127.0.0.1:4001", "http://127.0.0.1:2379"];
pub(super) const ETCD_PREFIX: &str = "/coreos.com/network";

/// Pauses between tries to renew a lease, as flannel's, unless there is less time left.
const RENEW_RETRY: Duration = Duration::from_secs(60);

/// Why the daemon cannot start with these flags.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum FlagError {
    /// Leases from Kubernetes.
    #[error(
        "--kube-subnet-mgr: leases from Kubernetes are not built yet; leave the flag and its \
         FLANNELD_ variable out, and use --etcd-endpoints URLS or --registry dir:PATH"
    )]
    Kubernetes,
    /// Half of a client certificate, or of a user's name and password.
    #[error("{given} goes with {missing}: give both or none")]
    Half { given: &'static str, missing: &'static str },
    /// A user's name, and perhaps the password, where it would be shown.
    #[error(
        "--etcd-endpoints: there is a user in one of them, which logs and status would show; leave it \
         out, and give --etcd-username and --etcd-password-file"
    )]
    UserInUrl,
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
}

impl Note {
    /// Writes the note to the log, at its level.
    pub fn log(&self) {
        match self {
            Self::Warn(text) => tracing::warn!("{text}"),
            Self::Info(text) => tracing::info!("{text}"),
        }
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
    /// How long before its end the lease is renewed.
    pub renew_margin: Duration,
    /// The pause after a try to renew it that failed.
    pub renew_retry: Duration,
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
    /// What the firewall is asked.
    pub switches: Switches,
    /// What writes the firewall's rules.
    pub firewall: FirewallKind,
    /// How often they are checked.
    pub resync: Duration,
    /// Whether our subnet's packets are discarded where no container takes them.
    pub blackhole: bool,
    /// Where health is told over HTTP.
    pub health: Option<SocketAddr>,
    /// What the operator should know.
    pub notes: Vec<Note>,
}

/// Where leases are kept.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum RegistrySettings {
    Directory(PathBuf),
    Etcd { access: Access, prefix: String, api: EtcdApi },
}

impl Flags {
    /// Decides what the flags come to.
    ///
    /// # Errors
    /// A flag asks for what is not built yet, lacks the one that it goes with or contradicts it, or names a
    /// file that cannot be read.
    pub fn settings(self) -> Result<Settings, FlagError> {
        if self.kubernetes.kube_subnet_mgr {
            return Err(FlagError::Kubernetes);
        }
        let lease_ttl = self.lease.subnet_lease_ttl;
        // A short lease leaves less time for both.
        let renew_margin = self.lease.subnet_lease_renew_margin.min(lease_ttl / 2);
        Ok(Settings {
            registry: registry(&self)?,
            lease_ttl,
            notes: notes(&self),
            network: self.network.network,
            renew_margin,
            renew_retry: RENEW_RETRY.min(renew_margin / 4),
            subnet_file: self.network.subnet_file,
            state_dir: self.network.state_dir,
            run_dir: self.network.run_dir,
            wish: Wish {
                iface: self.interface.iface,
                patterns: self.interface.iface_regex,
                can_reach: self.interface.iface_can_reach,
                public_ip: self.interface.public_ip,
                public_ipv6: self.interface.public_ipv6,
            },
            backend: self.engine.backend,
            guard: self.engine.guard,
            tuning: self.engine.tuning(),
            peer_sources: self.engine.peer_source,
            workers: self.engine.workers.unwrap_or_else(default_workers),
            switches: Switches {
                masquerade: self.firewall.ip_masq,
                forward: self.firewall.iptables_forward_rules,
                random_fully: !self.firewall.ip_masq_fully_random_disable,
            },
            firewall: self.firewall.firewall,
            resync: self.firewall.iptables_resync,
            blackhole: self.firewall.ip_blackhole_route,
            health: Some(SocketAddr::new(self.health.healthz_ip, self.health.healthz_port))
                .filter(|address| address.port() != 0),
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
    /// Whether any of them is given.
    pub(crate) fn name_any(&self) -> bool {
        self.registry.is_some() || asks_for_etcd(self)
    }

    /// What these flags alone name.
    ///
    /// # Errors
    /// Half of a certificate or a user is given, or a user in an endpoint, or a password twice, or its
    /// file cannot be read.
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
    // Endpoints are told in logs and status.
    if endpoints.iter().any(|url| url.contains('@')) {
        return Err(FlagError::UserInUrl);
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

/// Whether any flag of etcd's is given.
fn asks_for_etcd(flags: &RegistryFlags) -> bool {
    flags.etcd_endpoints.is_some()
        || flags.etcd_prefix.is_some()
        || flags.etcd_api != EtcdApi::Auto
        || flags.etcd_cafile.is_some()
        || flags.etcd_certfile.is_some()
        || flags.etcd_keyfile.is_some()
        || flags.etcd_username.is_some()
        || flags.etcd_password.is_some()
        || flags.etcd_password_file.is_some()
}

fn password(flags: &RegistryFlags) -> Result<Option<Password>, FlagError> {
    let Some(path) = &flags.etcd_password_file else {
        return Ok(flags.etcd_password.clone().map(Password::Given));
    };
    if flags.etcd_password.is_some() {
        return Err(FlagError::TwoPasswords);
    }
    // It is read when it is needed, but a wrong path is told at once.
    fs::read_to_string(path).map_err(|error| FlagError::PasswordFile {
        path: path.display().to_string(),
        reason: error.to_string(),
    })?;
    Ok(Some(Password::File(path.clone())))
}

fn notes(flags: &Flags) -> Vec<Note> {
    let mut notes = Vec::new();
    // The config may still name a backend without the packet engine, which alone guards.
    let has_engine = flags.engine.backend.is_none_or(|kind| kind == BackendKind::UdpTun);
    if has_engine && flags.engine.guard == GuardMode::Strict && !flags.firewall.ip_masq {
        notes.push(Note::Info(
            "--guard strict without --ip-masq: where the backend is udp-tun, packets that a host \
             forwards into the overlay for others are dropped where they arrive, their source \
             being neither in its subnet nor its public IP; --guard peer lets them through",
        ));
    }
    if flags.registry.registry.is_some() && asks_for_etcd(&flags.registry) {
        notes
            .push(Note::Warn("--registry names a directory, so the flags --etcd-… change nothing"));
    }
    if speaks_kubernetes(&flags.kubernetes) {
        notes.push(Note::Info(
            "--kube-api-url, --kubeconfig-file, --kube-annotation-prefix, --net-config-path and \
             --set-node-network-unavailable change nothing: they go with --kube-subnet-mgr",
        ));
    }
    if speaks_klog(&flags.logging) {
        notes.push(Note::Info(
            "--v, --vmodule and --log_backtrace_at change nothing: see --log-level",
        ));
    }
    notes
}

fn speaks_kubernetes(kubernetes: &KubernetesFlags) -> bool {
    kubernetes.kube_api_url.is_some()
        || kubernetes.kubeconfig_file.is_some()
        || kubernetes.kube_annotation_prefix.is_some()
        || kubernetes.net_config_path.is_some()
        || !kubernetes.set_node_network_unavailable
}

fn speaks_klog(logging: &LoggingFlags) -> bool {
    logging.v.is_some() || logging.vmodule.is_some() || logging.log_backtrace_at.is_some()
}

fn default_workers() -> usize {
    thread::available_parallelism().map_or(1, NonZeroUsize::get).min(MAX_WORKERS)
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
    fn a_user_in_an_endpoint_is_refused() {
        let refused = settings(&["--etcd-endpoints=http://a:1,http://me:pw@b:1"]).unwrap_err();
        assert_eq!(refused, FlagError::UserInUrl);
        assert!(!refused.to_string().contains("pw"));
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
        let RegistrySettings::Etcd { access, .. } = found.registry else { panic!() };
        let password = Password::File(file.path().to_owned());
        assert_eq!(access.user, Some(("root".into(), password)));
        let both = settings(&["--etcd-username=root", &flag, "--etcd-password=x"]);
        assert_eq!(both, Err(FlagError::TwoPasswords));
        let none = settings(&["--etcd-username=root", "--etcd-password-file=/nowhere"]);
        assert!(none.unwrap_err().to_string().contains("/nowhere"));
    }

    #[test]
    fn a_short_lease_is_renewed_in_time() {
        let renewal = |args: &[&str]| {
            let found = settings(args).unwrap();
            (found.renew_margin, found.renew_retry)
        };
        let seconds = Duration::from_secs;
        assert_eq!(renewal(&[REGISTRY]), (seconds(3600), seconds(60)));
        let wide = [REGISTRY, "--subnet-lease-renew-margin=600"];
        assert_eq!(renewal(&wide), (seconds(36_000), seconds(60)));
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
        assert!(found.workers >= 1);
        let switches = Switches { masquerade: false, forward: true, random_fully: true };
        assert_eq!((found.switches, found.firewall), (switches, FirewallKind::Auto));
        assert_eq!((found.resync, found.blackhole), (Duration::from_secs(5), false));
        assert_eq!(found.health, None);
        assert!(!found.notes.iter().any(|note| matches!(note, Note::Warn(_))));
    }

    #[test]
    fn kubernetes_is_refused_and_its_other_flags_change_nothing() {
        for flags in [
            flags(&[REGISTRY, "-kube-subnet-mgr"], &[]),
            flags(&[REGISTRY], &[("FLANNELD_KUBE_SUBNET_MGR", "true")]),
        ] {
            let error = flags.settings().unwrap_err().to_string();
            assert!(error.starts_with("--kube-subnet-mgr: "), "{error}");
        }
        for flag in [
            "--kube-api-url=u",
            "--kubeconfig-file=/k",
            "--kube-annotation-prefix=p",
            "--net-config-path=/n",
            "--set-node-network-unavailable=false",
        ] {
            let notes = settings(&[REGISTRY, "--guard=off", flag]).unwrap().notes;
            assert!(matches!(notes[..], [Note::Info(text)] if text.contains("--kube-subnet-mgr")));
        }
    }

    #[test]
    fn health_is_told_on_loopback_unless_an_address_is_given() {
        let health = |args: &[&str]| settings(args).unwrap().health.map(|it| it.to_string());
        assert_eq!(health(&[REGISTRY, "-healthz-ip=0.0.0.0"]), None);
        let port = "-healthz-port=8081";
        assert_eq!(health(&[REGISTRY, port]).as_deref(), Some("127.0.0.1:8081"));
        let all = health(&[REGISTRY, port, "-healthz-ip=0.0.0.0"]);
        assert_eq!(all.as_deref(), Some("0.0.0.0:8081"));
    }

    #[test]
    fn notes_tell_what_has_no_effect() {
        let found = settings(&[REGISTRY, "-ip-masq", "-v=4", "-vmodule=x=1"]).unwrap();
        assert!(found.switches.masquerade);
        assert!(matches!(found.notes[..], [Note::Info(klog)] if klog.contains("--log-level")));
    }

    #[test]
    fn strict_says_what_it_drops() {
        let notes = settings(&[REGISTRY]).unwrap().notes;
        let is_told =
            |(Note::Warn(text) | Note::Info(text)): &Note| text.starts_with("--guard strict");
        assert!(notes.iter().any(is_told));
        let of_kernel = settings(&[REGISTRY, "--backend=vxlan"]).unwrap().notes;
        assert!(!of_kernel.iter().any(is_told), "only the packet engine guards");
    }
}
