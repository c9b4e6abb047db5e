//! What a running weftd says of itself, as a document with a version.

use std::collections::BTreeMap;
use std::net::{IpAddr, SocketAddr};
use std::path::Path;

use anyhow::bail;
use ipnetwork::IpNetwork;
use jiff::Timestamp;
use serde::{Deserialize, Serialize};
use weft_backends::{Direction, Traffic};
use weft_control::LeaseKey;

use crate::log::LogLine;
use crate::socket::{self, Request};

/// The version of the document. It grows when a field goes or changes its meaning; new fields alone
/// do not change it.
pub const SCHEMA: u32 = 1;

/// The state of a daemon under which packets move.
pub(crate) const FORWARDING: &str = "forwarding";

/// The state of one daemon at one moment; `docs/status.md` tells of each field.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Status {
    /// The version of this document: [`SCHEMA`].
    pub schema: u32,
    /// Process id.
    pub pid: u32,
    /// weft's version.
    pub version: String,
    /// When the daemon was started.
    pub started: Timestamp,
    /// This node's id, made once and kept in the state directory; empty until it is known.
    pub node_id: String,
    /// "forwarding", or what the daemon waits for.
    pub state: String,
    /// Whether it forwards and nothing is wrong, as `/readyz` has it.
    pub ready: bool,
    /// Leases that are in the registry but not forwarded to, and what else could not be done.
    pub problems: Vec<String>,
    /// Where leases are kept.
    pub registry: String,
    /// Whether the registry can be read; while it cannot, all stays as it was.
    pub registry_readable: bool,
    /// When the registry last answered.
    pub registry_answered: Option<Timestamp>,
    /// The backend in use.
    pub backend: Option<String>,
    /// The overlay's networks.
    pub networks: Vec<IpNetwork>,
    /// The external interface.
    pub interface: Option<String>,
    /// Why it is this one.
    pub interface_why: Option<String>,
    /// The address that other nodes send to.
    pub public_ip: Option<IpAddr>,
    /// The overlay device; for host-gw the external interface.
    pub device: Option<String>,
    /// The device of the other family, where vxlan has one for each.
    #[serde(default)]
    pub other_devices: Vec<String>,
    /// The MTU handed to containers.
    pub mtu: Option<u32>,
    /// How it was found.
    pub mtu_why: Option<String>,
    /// The subnets of our lease.
    pub subnets: Vec<IpNetwork>,
    /// Since when this daemon has had the lease.
    pub lease_since: Option<Timestamp>,
    /// When the lease expires if it is not renewed; absent for a reservation, and while it is not
    /// known.
    pub lease_expires: Option<Timestamp>,
    /// When the lease is due to be renewed; absent for a reservation.
    pub lease_renewal: Option<Timestamp>,
    /// Whether the lease is a reservation, which does not expire.
    #[serde(default)]
    pub lease_reserved: bool,
    /// Peers that traffic is forwarded to.
    pub peers: Vec<PeerStatus>,
    /// What writes the firewall's rules.
    pub firewall: Option<String>,
    /// Whether they are as they should be; absent until they were first written.
    pub firewall_in_place: Option<bool>,
    /// How often rules that somebody else changed were put back.
    pub firewall_repairs: u64,
    /// How often everything was compared with what it should be.
    pub reconciliations: u64,
    /// How often links or routes that somebody else changed were put right.
    pub repairs: u64,
    /// How the packet engine does input and output: "uring" or "mmsg".
    pub io: Option<String>,
    /// What the kernel does for many packets at once, by the names of `--offload`: "on", "off" by a
    /// flag, "missing" in this kernel, "refused" by it, or "lossy": packets got lost by it.
    pub offloads: BTreeMap<String, String>,
    /// Milliseconds of CPU time that the daemon has used.
    pub cpu_millis: u64,
    /// The packet engine's counters by name, summed over workers, since the backend started.
    pub counters: BTreeMap<String, u64>,
    /// The last changes of state, the newest last.
    pub changes: Vec<LogLine>,
}

impl Status {
    /// Whether packets move.
    pub(crate) fn forwards(&self) -> bool {
        self.state == FORWARDING
    }

    /// The first problem that is one of a subnet like this: they name it as a network, or as a lease's key.
    pub(crate) fn problem_of(&self, wanted: impl Fn(IpNetwork) -> bool) -> Option<&str> {
        let networks = |word: &str| {
            let word = word.trim_matches(|it: char| !it.is_ascii_alphanumeric());
            let key = word.parse::<LeaseKey>().ok();
            // A bare address is no subnet.
            let network = || word.contains('/').then(|| word.parse::<IpNetwork>().ok())?;
            let key = key.or_else(|| network().map(LeaseKey::from));
            key.into_iter().flat_map(|key| key.networks())
        };
        let is_of = |problem: &&String| {
            let mut named = problem.split_whitespace().flat_map(networks);
            named.any(|network| !self.networks.contains(&network) && wanted(network))
        };
        self.problems.iter().find(is_of).map(String::as_str)
    }

    /// The overlay's devices.
    pub(crate) fn devices(&self) -> impl Iterator<Item = &String> {
        self.device.iter().chain(&self.other_devices)
    }
}

/// One peer.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct PeerStatus {
    /// The peer's subnets.
    pub subnets: Vec<IpNetwork>,
    /// The address that we send to.
    pub public_ip: IpAddr,
    /// "tunnel", or "direct" where packets go unwrapped.
    pub way: String,
    /// The host's name, which only weft nodes publish.
    pub name: Option<String>,
    /// weft's version there; absent for a flannel node.
    pub version: Option<String>,
    /// What was carried; absent where not the packet engine does it, but the kernel.
    pub traffic: Option<TrafficStatus>,
    /// What probes of it found.
    #[serde(default)]
    pub probe: ProbeStatus,
}

#[cfg(test)]
impl PeerStatus {
    /// One of which nothing more is known.
    pub(crate) fn example(public_ip: &str, subnet: &str, way: &str) -> Self {
        Self {
            subnets: vec![subnet.parse().unwrap()],
            public_ip: public_ip.parse().unwrap(),
            way: way.into(),
            name: None,
            version: None,
            traffic: None,
            probe: ProbeStatus::default(),
        }
    }
}

/// What one peer was sent, and what was delivered from it; bytes without the outer headers.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct TrafficStatus {
    pub sent_packets: u64,
    pub sent_bytes: u64,
    pub received_packets: u64,
    pub received_bytes: u64,
}

impl From<&Traffic> for TrafficStatus {
    fn from(traffic: &Traffic) -> Self {
        let [sent, received] = Direction::BOTH.map(|it| traffic.read(it));
        Self {
            sent_packets: sent.packets,
            sent_bytes: sent.bytes,
            received_packets: received.packets,
            received_bytes: received.bytes,
        }
    }
}

/// What probes of a peer found.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ProbeStatus {
    /// Where they go to, through the overlay; none for a flannel node, which gets ICMP echoes.
    pub address: Option<SocketAddr>,
    /// Absent while it is not known, and for a flannel node that answers no echoes.
    pub reachable: Option<bool>,
    /// Why it is not reachable: `refused`, `blocked`, `silent` or `unanswered`; what is wrong otherwise,
    /// with it: `no-daemon` or `echo-only`; or with the path to it: `narrow`, `no-offload` or `damaged`.
    pub fault: Option<String>,
    /// The same, with what to look for.
    pub problem: Option<String>,
    /// The last round trip, in microseconds.
    pub rtt_us: Option<u64>,
    /// All round trips together.
    pub rtt_total_us: u64,
    /// How many round trips took up to the microseconds that are the key, and longer than those of
    /// the key before; the last key stands for all above.
    pub rtt_counts: BTreeMap<u64, u64>,
    /// Small probes, and those of them that were answered; of a flannel node only the latter.
    pub sent: u64,
    pub answered: u64,
    /// Of the last 64 of them.
    pub loss_percent: Option<u8>,
    /// The largest packet that is known to get through, in bytes.
    pub path_mtu: Option<u32>,
}

/// Asks the one daemon whose run directory this is.
///
/// # Errors
/// No daemon, or more than one, answers there.
pub fn read(run_dir: &Path) -> anyhow::Result<Status> {
    let answers = socket::ask_all(run_dir, &Request::Status)?;
    answers.complete()?;
    let mut daemons = answers.given.into_iter();
    match (daemons.next(), daemons.next()) {
        (Some(daemon), None) => Ok(daemon),
        _ => bail!("not exactly one weftd answers in {}", run_dir.display()),
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use serde_json::Value;

    use super::*;

    /// The names in the first column of a document's tables.
    fn documented(document: &str) -> BTreeSet<String> {
        let rows = document.lines().filter_map(|line| line.strip_prefix("| `"));
        rows.filter_map(|row| Some(row.split_once('`')?.0.to_owned())).collect()
    }

    fn names(prefix: &str, value: &Value) -> BTreeSet<String> {
        let fields = value.as_object().into_iter().flatten();
        fields.map(|(name, _)| format!("{prefix}{name}")).collect()
    }

    #[test]
    fn a_problem_is_found_by_the_subnet_that_it_names() {
        let problems = [
            "all of 10.42.0.0/16 is in trouble",
            "route replace 10.42.7.0/24 via 192.0.2.7: no such way; and 3 more like that",
            "the node of 10.42.8.0-24&fd00:42:0:8::-64 is of the backend vxlan, not host-gw",
        ];
        let status = Status {
            networks: vec!["10.42.0.0/16".parse().unwrap()],
            problems: problems.map(str::to_owned).into(),
            ..Status::default()
        };
        let of = |ip: &str| {
            let ip: IpAddr = ip.parse().unwrap();
            status.problem_of(|network| network.contains(ip))
        };
        assert_eq!(of("10.42.7.9"), Some(problems[1]));
        assert_eq!(of("fd00:42:0:8::1"), Some(problems[2]));
        assert_eq!(of("10.42.9.9"), None);
    }

    #[test]
    fn every_field_is_documented_and_nothing_else() {
        let line = LogLine { at: Timestamp::UNIX_EPOCH, level: String::new(), text: String::new() };
        let peer = PeerStatus {
            traffic: Some(TrafficStatus::default()),
            ..PeerStatus::example("192.0.2.1", "10.42.1.0/24", "tunnel")
        };
        let mut fields = names("", &serde_json::to_value(Status::default()).unwrap());
        let probe = serde_json::to_value(&peer.probe).unwrap();
        fields.extend(names("peers[].probe.", &probe));
        let traffic = serde_json::to_value(peer.traffic).unwrap();
        fields.extend(names("peers[].traffic.", &traffic));
        fields.extend(names("peers[].", &serde_json::to_value(peer).unwrap()));
        fields.extend(names("changes[].", &serde_json::to_value(line).unwrap()));
        let document = include_str!("../../docs/status.md");
        let document = document.split("## The socket").next().unwrap();
        assert_eq!(documented(document), fields);
    }
}
