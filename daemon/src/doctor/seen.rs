//! What there is to be seen of a host: everything that checks judge, and nothing judged yet.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::io;
use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::Context;
use ipnetwork::IpNetwork;
use serde_json::Value;
use weft_backends::netlink::{KernelRoute, Link, Netlink};
use weft_control::firewall::iptables::has_legacy;
use weft_control::lease::Snapshot;
use weft_control::registry::server::{Server, servers};
use weft_control::subnet_env::SubnetEnv;
use weft_control::{LeaseKey, NetworkConfig, RegistryError};

use crate::flags::{RegistrySettings, Settings};
use crate::node::config_path;
use crate::registry::open_now;
use crate::socket;
use crate::started;
use crate::state_file::StateFile;
use crate::status::Status;

/// Sysctls that do not belong to one device, below /proc/sys.
const SYSCTLS: [&str; 7] = [
    "kernel/io_uring_disabled",
    "kernel/osrelease",
    "net/bridge/bridge-nf-call-iptables",
    "net/ipv4/ip_forward",
    "net/ipv6/conf/all/forwarding",
    "net/netfilter/nf_conntrack_count",
    "net/netfilter/nf_conntrack_max",
];
/// Those of each device, below /proc/sys/net/ipv4/conf/DEVICE.
const DEVICE_SYSCTLS: [&str; 2] = ["forwarding", "rp_filter"];

/// One host, and one daemon on it.
#[derive(Debug, Default)]
pub(super) struct Seen {
    pub(super) daemon: Option<Daemon>,
    /// What is known without one.
    pub(super) absent: Absent,
    /// By their paths below /proc/sys.
    pub(super) sysctls: BTreeMap<String, String>,
    pub(super) has_tun: bool,
    pub(super) links: Vec<Link>,
    /// Unicast routes of the main table.
    pub(super) routes: Vec<KernelRoute>,
    /// By which link packets to an address leave: of peers, and of their subnets.
    pub(super) ways: BTreeMap<IpAddr, Option<u32>>,
    /// The chain FORWARD of each kind of iptables.
    pub(super) filters: Vec<Filter>,
    /// nftables' chains.
    pub(super) chains: Vec<Chain>,
    /// firewalld's table.
    pub(super) firewalld: Option<String>,
    /// subnet.env, or why it cannot be used.
    pub(super) subnet_env: Option<Result<SubnetEnv, String>>,
    pub(super) registry: Option<RegistrySeen>,
    /// The daemon's UDP sockets: bytes of their receive and send buffers.
    pub(super) sockets: Vec<(u64, u64)>,
}

/// A daemon that answers.
#[derive(Debug, Default)]
pub(super) struct Daemon {
    pub(super) status: Status,
    /// Its process, by its number here; none where it cannot be seen from here.
    pub(super) pid: Option<u32>,
    /// What its flags came to, from its command line and its environment.
    pub(super) settings: Option<Settings>,
    /// It lives in another network namespace than we do.
    pub(super) is_elsewhere: bool,
    /// The unit of systemd that it belongs to: not ours, where it took flannel's place there.
    pub(super) unit: Option<String>,
}

/// No daemon, or one that does not answer.
#[derive(Debug, Default)]
pub(super) struct Absent {
    pub(super) reason: String,
    /// We may not ask.
    is_denied: bool,
    /// There is one.
    is_there: bool,
    /// As a daemon's that answers.
    settings: Option<Box<Settings>>,
    unit: Option<String>,
}

/// The chain FORWARD as one program shows it.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct Filter {
    /// As in "iptables" or "ip6tables-legacy".
    pub(super) program: String,
    pub(super) ipv6: bool,
    /// What no rule knows is dropped.
    pub(super) drops: bool,
    /// weft's or flannel's chain is jumped to.
    pub(super) passes_ours: bool,
    pub(super) docker: DockerRules,
}

/// Bridges of Docker's whose containers nobody outside reaches by their own addresses.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct DockerRules {
    /// By a rule of the chain DOCKER, and none of DOCKER-USER that accepts anything.
    pub(super) shut: Vec<String>,
    /// By a rule of the table raw, which no other can overrule.
    pub(super) raw: Vec<String>,
}

/// A chain of nftables.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct Chain {
    pub(super) family: String,
    pub(super) table: String,
    pub(super) name: String,
    pub(super) hook: String,
    pub(super) policy: String,
}

/// A registry, as the daemon's flags or ours reach it.
#[derive(Debug)]
pub(super) struct RegistrySeen {
    pub(super) name: String,
    /// The flags by which `weft registry`, and etcdctl, get there.
    pub(super) weft_flags: String,
    pub(super) etcdctl_flags: String,
    /// etcd's servers, none for a directory.
    pub(super) servers: Vec<(String, Result<Server, String>)>,
    /// What is in it, and how long reading it took.
    pub(super) content: Result<(Snapshot, Duration), RegistryError>,
    /// The network config that a daemon here last read from it.
    pub(super) last_config: Option<String>,
}

/// What is looked for where no daemon tells.
#[derive(Debug)]
pub(super) struct Fallback {
    pub(super) registry: RegistrySettings,
    /// It is no default.
    pub(super) is_named: bool,
    pub(super) subnet_file: PathBuf,
    pub(super) state_dir: PathBuf,
}

impl Seen {
    /// Looks at everything. What cannot be seen is left out; the checks say so.
    pub(super) async fn look(
        daemon: Result<Daemon, Absent>,
        fallback: &Fallback,
    ) -> anyhow::Result<Self> {
        let mut seen = Self { has_tun: Path::new("/dev/net/tun").exists(), ..Self::default() };
        match daemon {
            Ok(daemon) => seen.daemon = Some(daemon),
            Err(absent) => seen.absent = absent,
        }
        let known = match &seen.daemon {
            Some(daemon) => daemon.settings.as_ref(),
            None => seen.absent.settings.as_deref(),
        };
        // Where a daemon keeps them elsewhere, the defaults would tell of another overlay.
        let may_fall_back = seen.daemon.is_none() && (seen.absent.is_gone() || fallback.is_named);
        let places = known.map(|it| (&it.registry, &it.subnet_file, &it.state_dir));
        let places = places.or_else(|| {
            let places = (&fallback.registry, &fallback.subnet_file, &fallback.state_dir);
            may_fall_back.then_some(places)
        });
        if let Some((registry, subnet_file, state_dir)) = places {
            seen.subnet_env = Some(SubnetEnv::read(subnet_file));
            seen.registry = Some(RegistrySeen::look(registry, state_dir).await);
        }
        seen.look_at_netlink().await?;
        let devices = seen.links.iter().map(|link| link.name.as_str()).chain(["all"]);
        seen.sysctls = sysctls(devices);
        seen.filters = filters();
        seen.chains = chains();
        if seen.chains.iter().any(|chain| chain.table == "firewalld") {
            seen.firewalld = output("nft", &["list", "table", "inet", "firewalld"]);
        }
        if let Some(pid) = seen.daemon.as_ref().and_then(|daemon| daemon.pid) {
            seen.sockets = sockets(pid);
        }
        Ok(seen)
    }

    async fn look_at_netlink(&mut self) -> anyhow::Result<()> {
        let peers = self.daemon.as_ref().map(|daemon| daemon.status.peers.as_slice());
        let addresses = peers
            .unwrap_or_default()
            .iter()
            .flat_map(|peer| peer.subnets.iter().map(IpNetwork::network).chain([peer.public_ip]));
        let addresses: BTreeSet<IpAddr> = addresses.collect();
        let (links, routes, ways) = tokio::task::spawn_blocking(move || {
            let netlink = Netlink::open().context("cannot open a netlink socket")?;
            let way = |ip| (ip, netlink.way_out(ip).ok().and_then(|way| way.link));
            let ways = addresses.into_iter().map(way).collect();
            anyhow::Ok((netlink.links()?, netlink.routes()?, ways))
        })
        .await??;
        (self.links, self.routes, self.ways) = (links, routes, ways);
        Ok(())
    }

    pub(super) fn status(&self) -> Option<&Status> {
        self.daemon.as_ref().map(|daemon| &daemon.status)
    }

    pub(super) fn settings(&self) -> Option<&Settings> {
        self.daemon.as_ref()?.settings.as_ref()
    }

    /// Whether a daemon answers that does not forward yet.
    pub(super) fn waits(&self) -> bool {
        self.status().is_some_and(|status| !status.forwards())
    }

    /// What is said of what only a daemon could tell.
    pub(super) fn unknown(&self) -> &'static str {
        match &self.daemon {
            None => "not known while no weftd answers",
            Some(_) if self.waits() => "not known while weftd waits",
            Some(_) => "not known while the flags of weftd cannot be read",
        }
    }

    /// What gets a daemon to tell it.
    pub(super) fn cure_of_silence(&self) -> String {
        match &self.daemon {
            Some(_) => "sudo weft doctor   # or in the container of weftd".into(),
            None if self.absent.is_denied => "sudo weft doctor".into(),
            None if self.absent.is_there => self.restart(),
            None => format!("systemctl start {}", self.unit()),
        }
    }

    /// The daemon's unit; while none runs, the one that weft comes with.
    pub(super) fn unit(&self) -> &str {
        let unit = match &self.daemon {
            Some(daemon) => daemon.unit.as_deref(),
            None => self.absent.unit.as_deref(),
        };
        unit.unwrap_or("weftd")
    }

    /// What starts the daemon anew.
    pub(super) fn restart(&self) -> String {
        format!("systemctl restart {}", self.unit())
    }

    pub(super) fn link(&self, name: &str) -> Option<&Link> {
        self.links.iter().find(|link| link.name == name)
    }

    pub(super) fn sysctl(&self, path: &str) -> Option<&str> {
        self.sysctls.get(path).map(String::as_str)
    }

    /// The overlay's networks, by the daemon or by what it left.
    pub(super) fn networks(&self) -> &[IpNetwork] {
        match (self.status(), &self.subnet_env) {
            (Some(status), _) if !status.networks.is_empty() => &status.networks,
            (_, Some(Ok(env))) => &env.networks,
            _ => &[],
        }
    }

    /// Our own subnets, by the daemon or by what it left.
    pub(super) fn subnets(&self) -> Vec<IpNetwork> {
        match (self.status(), &self.subnet_env) {
            (Some(status), _) if !status.subnets.is_empty() => status.subnets.clone(),
            (_, Some(Ok(env))) => {
                let gateways = env.gateways.iter();
                gateways.filter_map(|it| IpNetwork::new(it.network(), it.prefix()).ok()).collect()
            }
            _ => Vec::new(),
        }
    }

    /// The same as a lease has them.
    pub(super) fn lease_key(&self) -> Option<LeaseKey> {
        let subnets = self.subnets();
        (!subnets.is_empty()).then(|| subnets.into_iter().collect())
    }

    /// The network config, where the registry has one that can be used.
    pub(super) fn config(&self) -> Option<NetworkConfig> {
        let (snapshot, _) = self.registry.as_ref()?.content.as_ref().ok()?;
        snapshot.network_config()
    }
}

impl Daemon {
    /// Who has given this status at this socket.
    pub(super) fn look(socket: &Path, status: Status) -> Self {
        let Some(pid) = socket::listener(socket).ok().flatten() else {
            return Self { status, ..Self::default() };
        };
        let is_elsewhere = started::is_elsewhere(pid);
        let (settings, unit) = process(pid);
        Self { status, pid: Some(pid), settings, is_elsewhere, unit }
    }
}

impl Absent {
    /// None that could be asked.
    pub(super) fn none(error: &anyhow::Error) -> Self {
        let reason = format!("{error:#}");
        Self { reason, is_denied: is_denied(error), ..Self::default() }
    }

    /// The one at this socket. Where it hangs, the kernel still tells whose that is, until too many have asked;
    /// then its lock file does.
    pub(super) fn silent(socket: &Path, error: &anyhow::Error) -> Self {
        let reason = format!("{error:#}");
        let listener = socket::listener(socket);
        let is_denied = listener.as_ref().is_err_and(is_denied);
        let locked = || fs::read_to_string(socket.with_extension("lock")).ok()?.trim().parse().ok();
        let pid = listener.ok().flatten().or_else(locked);
        let (settings, unit) = pid.map(process).unwrap_or_default();
        Self { reason, is_denied, is_there: true, settings: settings.map(Box::new), unit }
    }

    /// Whether there is none, as far as we may see.
    fn is_gone(&self) -> bool {
        !self.is_there && !self.is_denied
    }
}

fn is_denied(error: &anyhow::Error) -> bool {
    let error = error.root_cause().downcast_ref::<io::Error>();
    error.is_some_and(|error| error.kind() == io::ErrorKind::PermissionDenied)
}

/// What the flags of a daemon came to, and its unit.
fn process(pid: u32) -> (Option<Settings>, Option<String>) {
    let settings = started::settings(pid)
        .inspect_err(|error| tracing::debug!("the daemon's flags: {error:#}"))
        .ok();
    let unit = fs::read_to_string(format!("/proc/{pid}/cgroup")).ok();
    (settings, unit.and_then(|cgroups| unit_of(&cgroups).map(str::to_owned)))
}

/// The service of an overlay that a process belongs to, by its cgroups (cgroups(7), /proc/PID/cgroup).
/// Who was started by hand may be in sshd's.
fn unit_of(cgroups: &str) -> Option<&str> {
    let names = cgroups.lines().filter_map(|line| line.rsplit('/').next());
    let mut services = names.filter_map(|name| name.strip_suffix(".service"));
    services.find(|name| name.contains("weft") || name.contains("flannel"))
}

impl RegistrySeen {
    async fn look(settings: &RegistrySettings, state_dir: &Path) -> Self {
        let (name, servers) = match settings {
            RegistrySettings::Directory(path) => (format!("dir:{}", path.display()), Vec::new()),
            RegistrySettings::Etcd { access, .. } => {
                (access.endpoints.join(","), servers(access).await)
            }
        };
        let (content, identity) = match open_now(settings, state_dir).await {
            Ok(registry) => {
                // To find out which API has the config may have taken as long again.
                let begun = Instant::now();
                let snapshot = registry.snapshot().await;
                (snapshot.map(|snapshot| (snapshot, begun.elapsed())), registry.identity())
            }
            // Only a directory cannot be opened, and that is known by its name.
            Err(error) => (Err(error), name.clone()),
        };
        // Daemons of several registries may share the state directory.
        let last_config = StateFile::new(config_path(state_dir, &identity)).load();
        Self {
            name,
            weft_flags: settings.weft_flags(),
            etcdctl_flags: settings.etcdctl_flags(),
            servers,
            content,
            last_config: last_config.map(|(text, _)| text),
        }
    }

    /// A command of `weft registry` that finds this one.
    pub(super) fn weft(&self, rest: &str) -> String {
        format!("weft registry{} {rest}", self.weft_flags)
    }

    /// A command of etcdctl that asks these servers.
    pub(super) fn etcdctl(&self, endpoints: &str, rest: &str) -> String {
        format!("etcdctl --endpoints {endpoints}{} {rest}", self.etcdctl_flags)
    }
}

#[cfg(test)]
impl RegistrySeen {
    /// A directory with this in it.
    pub(super) fn example(snapshot: Snapshot) -> Self {
        Self {
            name: "dir:/r".into(),
            weft_flags: " --registry dir:/r".into(),
            etcdctl_flags: String::new(),
            servers: Vec::new(),
            content: Ok((snapshot, Duration::ZERO)),
            last_config: None,
        }
    }
}

fn sysctls<'a>(devices: impl Iterator<Item = &'a str>) -> BTreeMap<String, String> {
    let of_devices = devices.flat_map(|device| {
        DEVICE_SYSCTLS.iter().map(move |name| format!("net/ipv4/conf/{device}/{name}"))
    });
    let paths = SYSCTLS.iter().map(ToString::to_string).chain(of_devices);
    let read = |path: String| {
        let value = fs::read_to_string(Path::new("/proc/sys").join(&path)).ok()?;
        Some((path, value.trim().to_owned()))
    };
    paths.filter_map(read).collect()
}

/// What a program writes; nothing if it is missing or fails.
fn output(program: &str, arguments: &[&str]) -> Option<String> {
    let output = Command::new(program).args(arguments).env("LC_ALL", "C").output().ok()?;
    output.status.success().then(|| String::from_utf8_lossy(&output.stdout).into_owned())
}

/// Of both kinds of tables in the kernel. To look into the older kind would make its tables, so only
/// those that are there are looked into.
fn filters() -> Vec<Filter> {
    let mut filters = Vec::new();
    for ipv6 in [false, true] {
        let name = if ipv6 { "ip6tables" } else { "iptables" };
        let save = |kind: &str| {
            let program = format!("{name}{kind}");
            let saved = |table| output(&format!("{program}-save"), &["-t", table]);
            let may_look = kind == "-nft" || has_legacy("raw", ipv6);
            let raw = may_look.then(|| saved("raw")).flatten().unwrap_or_default();
            let saved = saved("filter")?;
            Some(filter(program, ipv6, &saved, &raw))
        };
        // Before there were two kinds, the one had no name.
        filters.extend(save("-nft").or_else(|| save("")));
        filters.extend(has_legacy("filter", ipv6).then(|| save("-legacy")).flatten());
    }
    filters
}

fn filter(program: String, ipv6: bool, saved: &str, raw: &str) -> Filter {
    // `-A DOCKER ! -i docker0 -o docker0 -j DROP`, `-A PREROUTING -d 10.42.7.2/32 ! -i docker0 -j DROP`
    let kept_in = |saved: &str, chain: &str| -> Vec<String> {
        let lines =
            saved.lines().filter(|line| line.starts_with(chain) && line.ends_with(" -j DROP"));
        let bridges = lines.filter_map(|line| line.split_once("! -i ")?.1.split(' ').next());
        bridges.map(str::to_owned).collect()
    };
    let accepts = |line: &str| line.ends_with(" -j ACCEPT") && !line.contains(" -p ");
    // Of new connections, which answers to our own are not.
    let lets_in = |line: &str| {
        accepts(line) && line.starts_with("-A DOCKER-USER ") && !line.contains("state ")
    };
    let is_open = saved.lines().any(lets_in);
    // As where Docker was told to trust an interface.
    let trusts =
        |line: &str| accepts(line) && line.starts_with("-A PREROUTING ") && line.contains(" -i ");
    let is_trusted = raw.lines().any(|line| trusts(line) && !line.contains(" -i lo "));
    Filter {
        program,
        ipv6,
        drops: saved.lines().any(|line| line.starts_with(":FORWARD DROP")),
        passes_ours: saved
            .lines()
            .any(|line| line.starts_with("-A FORWARD ") && line.ends_with("-j FLANNEL-FWD")),
        docker: DockerRules {
            shut: if is_open { Vec::new() } else { kept_in(saved, "-A DOCKER ") },
            raw: if is_trusted { Vec::new() } else { kept_in(raw, "-A PREROUTING -d ") },
        },
    }
}

/// Of nft's list only the chains are asked for: rules of others may be of kinds that this nft does
/// not know.
fn chains() -> Vec<Chain> {
    let listed = output("nft", &["-j", "list", "chains"]);
    let listed: Option<Value> = listed.and_then(|text| serde_json::from_str(&text).ok());
    let Some(entries) = listed.as_ref().and_then(|it| it["nftables"].as_array()) else {
        return Vec::new();
    };
    let chains = entries.iter().filter_map(|entry| entry.get("chain"));
    let text = |chain: &Value, key: &str| chain[key].as_str().unwrap_or_default().to_owned();
    chains
        .map(|chain| Chain {
            family: text(chain, "family"),
            table: text(chain, "table"),
            name: text(chain, "name"),
            hook: text(chain, "hook"),
            policy: text(chain, "policy"),
        })
        .collect()
}

/// By ss(8): UDP, numeric, all, memory, processes, no header, one line a socket.
fn sockets(pid: u32) -> Vec<(u64, u64)> {
    let listed = output("ss", &["-uanmpHO"]).unwrap_or_default();
    let process = format!("pid={pid},");
    let ours = listed.lines().filter(|line| line.contains(&process));
    ours.filter_map(buffers).collect()
}

/// Of `skmem:(r0,rb16777216,t0,tb16777216,…)`.
fn buffers(line: &str) -> Option<(u64, u64)> {
    let (_, memory) = line.split_once("skmem:(")?;
    let mut fields = memory.split(')').next()?.split(',');
    let receive = fields.find_map(|field| field.strip_prefix("rb"))?.parse().ok()?;
    let send = fields.find_map(|field| field.strip_prefix("tb"))?.parse().ok()?;
    Some((receive, send))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_daemons_unit_is_read_where_it_has_one() {
        assert_eq!(unit_of("0::/system.slice/flanneld.service\n"), Some("flanneld"));
        let first_version = "4:memory:/system.slice\n1:name=systemd:/system.slice/weftd.service\n";
        assert_eq!(unit_of(first_version), Some("weftd"));
        assert_eq!(unit_of("0::/user.slice/user-0.slice/session-1.scope\n"), None);
        assert_eq!(unit_of("0::/system.slice/ssh.service\n"), None);
    }

    #[test]
    fn the_buffers_of_a_socket_are_read() {
        let line = "UNCONN 0 0 10.0.0.1:8285 0.0.0.0:* users:((\"weftd\",pid=7,fd=9)) \
                    skmem:(r0,rb16777216,t0,tb425984,f0,w0,o0,bl0,d3)";
        assert_eq!(buffers(line), Some((16_777_216, 425_984)));
        assert_eq!(buffers("UNCONN 0 0"), None);
    }

    #[test]
    fn a_chain_that_drops_is_told_from_one_that_lets_ours_pass() {
        let saved = "*filter\n:INPUT ACCEPT [0:0]\n:FORWARD DROP [1:60]\n:FLANNEL-FWD - [0:0]\n\
                     -A FORWARD -m comment --comment \"flanneld forward\" -j FLANNEL-FWD\nCOMMIT\n";
        let filter = |saved, raw| filter("iptables-nft".into(), false, saved, raw);
        let found = filter(saved, "");
        assert!(found.drops && found.passes_ours);
        let found = filter(":FORWARD ACCEPT [0:0]\n-N FLANNEL-FWD\n", "");
        assert!(!found.drops && !found.passes_ours);

        let docker = "-A DOCKER -d 10.42.7.2/32 ! -i docker0 -o docker0 -p tcp -j ACCEPT\n\
                      -A DOCKER ! -i docker0 -o docker0 -j DROP\n";
        let raw = "-A PREROUTING -d 10.42.7.2/32 ! -i docker0 -j DROP\n";
        let found = filter(docker, raw).docker;
        assert_eq!((found.shut, found.raw), (vec!["docker0".into()], vec!["docker0".into()]));
        let opened = format!("-A DOCKER-USER -i flannel0 -o docker0 -j ACCEPT\n{docker}");
        assert_eq!(filter(&opened, "").docker, DockerRules::default());
        let answers =
            "-A DOCKER-USER -i eth0 -m conntrack --ctstate RELATED,ESTABLISHED -j ACCEPT\n";
        let answered = format!("{answers}{docker}");
        assert_eq!(filter(&answered, "").docker.shut, ["docker0"]);
        let trusted = format!("-A PREROUTING -d 10.42.7.2/32 -i flannel0 -j ACCEPT\n{raw}");
        assert_eq!(filter("", &trusted).docker, DockerRules::default());
    }
}
