//! The registry, and what nodes claim in it.

use std::collections::BTreeMap;
use std::io;
use std::net::IpAddr;
use std::time::Duration;

use ipnetwork::IpNetwork;
use serde_json::{Map, Value, json};
use weft_control::RegistryError;
use weft_control::lease::Snapshot;
use weft_control::peers::untaken;

use super::check::Check;
use super::seen::{RegistrySeen, Seen};
use super::version;
use crate::flags::registry::quoted;
use crate::network_config::usable;
use crate::status::Status;

/// Reading everything should not take longer.
const SLOW: Duration = Duration::from_millis(500);
/// Clocks further apart make leases and certificates end at other times than others think.
const SKEW_MAX_SECS: i64 = 5;
/// The first etcd whose v3 API has all that weft asks.
const ETCD_SINCE: (u32, u32) = (3, 4);

/// Whether it answers, lets us in, is quick and has a network config.
pub(super) fn registry(seen: &Seen) -> Option<Check> {
    let registry = seen.registry.as_ref()?;
    let name = &registry.name;
    let is_etcd = !registry.servers.is_empty();
    let (snapshot, took) = match &registry.content {
        Ok(content) => content,
        Err(error @ RegistryError::Refused { .. }) => {
            let what = format!("{name} does not let weft in: {error}");
            let cure = "user get USER   # the one of --etcd-username, or the certificate's";
            let cure = registry.etcdctl(name, cure);
            return Check::fail(what, cure);
        }
        Err(error) if is_etcd => {
            let cure = registry.etcdctl(name, "endpoint health");
            return Check::fail(error.to_string(), cure);
        }
        Err(RegistryError::File { source, .. }) if source.kind() == io::ErrorKind::NotFound => {
            let cure = init(registry, seen.status()) + "   # unless its disk is not mounted";
            return Check::fail(format!("{name} is no registry yet"), cure);
        }
        Err(error) => {
            return Check::fail(error.to_string(), format!("ls -ld {}", path_of(name)));
        }
    };
    let Some(config) = &snapshot.config else {
        let what = format!("{name} has no network config");
        return Check::fail(what, init(registry, seen.status()));
    };
    if let Err(error) = usable(config) {
        let what = format!("{name} has a network config that weftd does not start with: {error}");
        return Check::fail(what, registry.weft("show"));
    }
    let of_servers = servers(registry);
    if of_servers.is_some() {
        return of_servers;
    }
    if *took > SLOW {
        let what = format!("{name} takes {} ms to be read", took.as_millis());
        let cure = if is_etcd {
            registry.etcdctl(name, "check perf")
        } else {
            format!("findmnt -T {}   # a disk of this host, not busy or full", path_of(name))
        };
        return Check::warn(what, cure);
    }
    let version = registry.servers.iter().find_map(|(_, server)| server.as_ref().ok());
    let version = version.map(|server| format!(", etcd {}", server.version)).unwrap_or_default();
    let leases = snapshot.leases.len();
    Check::ok(format!("{name}{version}: {leases} leases, read in {} ms", took.as_millis()))
}

/// What gives it back the network config that a daemon here went by, or goes by. Where nothing tells, no
/// example stands in: a fleet that follows it gives up its subnets.
fn init(registry: &RegistrySeen, status: Option<&Status>) -> String {
    if let Some(config) = &registry.last_config {
        return registry.weft(&format!("init {}", quoted(config)));
    }
    match status.filter(|status| !status.networks.is_empty()) {
        Some(status) => {
            let config = quoted(&config_by(status).to_string());
            registry.weft(&format!("init {config}   # and what else it had"))
        }
        None => registry.weft("init NETWORK"),
    }
}

/// What a daemon's status tells of its network config.
fn config_by(status: &Status) -> Value {
    let mut config = Map::new();
    for ipv6 in [false, true] {
        let of_family = |it: &&IpNetwork| it.is_ipv6() == ipv6;
        let Some(network) = status.networks.iter().find(of_family) else { continue };
        let [key, length] =
            if ipv6 { ["IPv6Network", "IPv6SubnetLen"] } else { ["Network", "SubnetLen"] };
        config.insert(key.into(), json!(network));
        if let Some(subnet) = status.subnets.iter().find(of_family) {
            config.insert(length.into(), json!(subnet.prefix()));
        }
    }
    if config.contains_key("IPv6Network") {
        config.insert("EnableIPv4".into(), json!(config.contains_key("Network")));
        config.insert("EnableIPv6".into(), json!(true));
    }
    if let Some(backend) = &status.backend {
        config.insert("Backend".into(), json!({ "Type": backend }));
    }
    config.into()
}

/// Where a directory registry is.
fn path_of(name: &str) -> &str {
    name.trim_start_matches("dir:")
}

/// What is wrong with single servers of etcd.
fn servers(registry: &RegistrySeen) -> Option<Check> {
    let mut servers = registry.servers.iter();
    if let Some((url, Err(reason))) = servers.clone().find(|(_, server)| server.is_err()) {
        let answer = servers.filter(|(_, server)| server.is_ok()).count();
        let all = registry.servers.len();
        let what = format!("{answer} of {all} endpoints answer; {url} does not: {reason}");
        return Check::warn(what, registry.etcdctl(url, "endpoint health"));
    }
    servers.find_map(|(url, server)| {
        let server = server.as_ref().ok()?;
        version(&server.version).filter(|it| *it < ETCD_SINCE)?;
        let what = format!("{url} is etcd {}, older than weft is tried with", server.version);
        Check::warn(what, "apt-get install etcd-server   # 3.4 or newer")
    })
}

/// Whether our clock and the servers' are the same.
pub(super) fn clock(seen: &Seen) -> Option<Check> {
    let registry = seen.registry.as_ref()?;
    if registry.servers.is_empty() {
        return Check::ok("the registry goes by this host's own");
    }
    let skews = registry.servers.iter().filter_map(|(url, server)| {
        let server = server.as_ref().ok()?;
        Some((server.asked.as_second() - server.clock?.as_second(), url))
    });
    match skews.max_by_key(|(skew, _)| skew.abs()) {
        None => Check::warn("no server tells its clock", "timedatectl"),
        Some((skew, url)) if skew.abs() > SKEW_MAX_SECS => {
            let side = if skew > 0 { "ahead of" } else { "behind" };
            let what = format!("this host is {} s {side} {url}", skew.abs());
            Check::warn(what, "timedatectl set-ntp true   # on both hosts")
        }
        Some(_) => Check::ok("as etcd's"),
    }
}

/// Whether two nodes, or two leases, have one address.
pub(super) fn public_ip(seen: &Seen) -> Option<Check> {
    let registry = seen.registry.as_ref()?;
    let Ok((snapshot, _)) = &registry.content else {
        return Check::unread(registry);
    };
    let own = seen.status().map(|status| status.node_id.as_str());
    if let Some((ip, nodes)) = nodes_by_address(snapshot, own).into_iter().find(is_shared) {
        let what = format!("{ip} is claimed by {}", nodes.join(" and "));
        let cure = "weftd --public-ip ADDRESS   # on one of them, with an address of its own";
        return Check::fail(what, cure);
    }
    if let Some((ip, leases)) = leases_by_address(snapshot).into_iter().find(is_shared) {
        let what = format!("{ip} has several leases: {}", leases.join(" and "));
        let cure = registry.weft("show   # then release the one that its node does not use");
        return Check::fail(what, cure);
    }
    Check::ok(format!("each node has its own, with {} leases", snapshot.leases.len()))
}

fn is_shared((_, owners): &(IpAddr, Vec<String>)) -> bool {
    owners.len() > 1
}

fn nodes_by_address(snapshot: &Snapshot, own: Option<&str>) -> BTreeMap<IpAddr, Vec<String>> {
    let mut nodes: BTreeMap<IpAddr, Vec<String>> = BTreeMap::new();
    for node in &snapshot.nodes {
        let here = if Some(node.id.as_str()) == own { ", which is this one" } else { "" };
        for ip in node.public_addresses() {
            let name = format!("the node {} (id {}{here})", node.name, node.id);
            nodes.entry(ip).or_default().push(name);
        }
    }
    nodes
}

fn leases_by_address(snapshot: &Snapshot) -> BTreeMap<IpAddr, Vec<String>> {
    let mut leases: BTreeMap<IpAddr, Vec<String>> = BTreeMap::new();
    // A reservation may wait for its node's next start.
    let untaken = untaken(None, false, &snapshot.leases);
    for lease in snapshot.leases.iter().filter(|it| !untaken.contains_key(&it.key)) {
        let subnet = lease.key.networks().next().map(|it| it.to_string()).unwrap_or_default();
        for ip in lease.attrs.public_addresses() {
            leases.entry(ip).or_default().push(subnet.clone());
        }
    }
    leases
}

#[cfg(test)]
mod tests {
    use jiff::{SignedDuration, Timestamp};
    use weft_control::NetworkConfig;
    use weft_control::registry::server::Server;

    use super::*;
    use crate::doctor::check::Verdict;
    use crate::doctor::seen::Daemon;

    fn server(version: &str, behind: i64) -> Result<Server, String> {
        let asked = Timestamp::UNIX_EPOCH + SignedDuration::from_hours(1000);
        Ok(Server {
            version: version.into(),
            clock: Some(asked - SignedDuration::from_secs(behind)),
            asked,
        })
    }

    fn seen(servers: Vec<Result<Server, String>>, took: Duration) -> Seen {
        let snapshot = Snapshot {
            config: Some(r#"{"Network":"10.42.0.0/16"}"#.into()),
            ..Snapshot::default()
        };
        Seen {
            registry: Some(RegistrySeen {
                name: "http://etcd:2379".into(),
                weft_flags: " --etcd-endpoints http://etcd:2379".into(),
                etcdctl_flags: String::new(),
                servers: servers.into_iter().map(|it| ("http://etcd:2379".into(), it)).collect(),
                content: Ok((snapshot, took)),
                last_config: None,
            }),
            ..Seen::default()
        }
    }

    #[test]
    fn a_slow_old_or_missing_server_is_told() {
        let quick = Duration::from_millis(3);
        assert_eq!(registry(&seen(vec![server("3.5.1", 0)], quick)).unwrap().verdict, Verdict::Ok);
        let slow = registry(&seen(vec![server("3.5.1", 0)], Duration::from_secs(2))).unwrap();
        assert!(slow.verdict == Verdict::Warn && slow.seen.contains("2000 ms"), "{slow:?}");
        let mut directory = seen(vec![], Duration::from_secs(2));
        directory.registry.as_mut().unwrap().name = "dir:/r".into();
        let slow = registry(&directory).unwrap();
        assert!(slow.cure.is_some_and(|cure| cure.starts_with("findmnt -T /r ")));
        let old = registry(&seen(vec![server("3.3.27", 0)], quick)).unwrap();
        assert!(old.verdict == Verdict::Warn && old.seen.contains("3.3.27"), "{old:?}");
        let one = registry(&seen(vec![server("3.5.1", 0), Err("refused".into())], quick)).unwrap();
        assert!(one.verdict == Verdict::Warn && one.seen.contains("1 of 2"), "{one:?}");
    }

    #[test]
    fn a_config_that_no_daemon_starts_with_is_told() {
        for (backend, told) in [
            (r#""pigeon""#, "unknown backend type"),
            (r#""vxlan","VNI":99999999"#, "VNI must be at most"),
            (r#""vxlan","VNI":"1""#, "VNI must be a whole number"),
            (r#""udp","Port":99999"#, "Port must be a whole number from 0 to 65535"),
        ] {
            let mut seen = seen(vec![server("3.5.1", 0)], Duration::ZERO);
            let config = format!(r#"{{"Network":"10.42.0.0/16","Backend":{{"Type":{backend}}}}}"#);
            if let Ok((snapshot, _)) = &mut seen.registry.as_mut().unwrap().content {
                snapshot.config = Some(config);
            }
            let found = registry(&seen).unwrap();
            assert!(found.verdict == Verdict::Fail && found.seen.contains(told), "{found:?}");
        }
    }

    /// Somebody will paste it.
    #[test]
    fn a_lost_config_is_given_back_by_what_is_known_of_it() {
        let mut seen = seen(vec![server("3.5.1", 0)], Duration::ZERO);
        let registry = |seen: &Seen| registry(seen).unwrap().cure.unwrap();
        if let Ok((snapshot, _)) = &mut seen.registry.as_mut().unwrap().content {
            snapshot.config = None;
        }
        assert!(registry(&seen).ends_with(" init NETWORK"));
        let status = Status {
            networks: vec!["10.9.0.0/16".parse().unwrap(), "fd00:9::/48".parse().unwrap()],
            subnets: vec!["10.9.7.0/25".parse().unwrap()],
            backend: Some("vxlan".into()),
            ..Status::default()
        };
        let told = config_by(&status).to_string();
        let config: NetworkConfig = told.parse().unwrap();
        assert!(config.networks().eq(status.networks.iter().copied()), "{told}");
        assert_eq!(config.ipv4.map(|it| it.subnet_len), Some(25));
        seen.daemon = Some(Daemon { status, ..Daemon::default() });
        assert!(registry(&seen).contains(&format!("init '{told}'   # and what else")));
        let last = r#"{"Network":"10.9.0.0/16"}"#;
        seen.registry.as_mut().unwrap().last_config = Some(last.into());
        assert!(registry(&seen).ends_with(&format!(" init '{last}'")));
    }

    #[test]
    fn who_is_not_let_in_learns_it() {
        let mut seen = seen(vec![server("3.5.1", 0)], Duration::ZERO);
        let (endpoint, reason) =
            ("http://etcd:2379".into(), "etcdserver: permission denied".into());
        let refused = RegistryError::Refused { endpoint, reason };
        seen.registry.as_mut().unwrap().content = Err(refused);
        let found = registry(&seen).unwrap();
        assert!(found.verdict == Verdict::Fail && found.seen.contains("does not let weft in"));
    }

    #[test]
    fn clocks_apart_are_told_with_their_direction() {
        let by = |behind| clock(&seen(vec![server("3.5.1", behind)], Duration::ZERO));
        assert_eq!(by(1).unwrap().verdict, Verdict::Ok);
        assert!(by(3600).unwrap().seen.contains("3600 s ahead of"), "{:?}", by(3600));
        assert!(by(-60).unwrap().seen.contains("60 s behind"), "{:?}", by(-60));
    }
}
