//! A lease: which node owns a subnet, in the registry's own form.

use std::collections::{BTreeMap, HashSet};
use std::fmt;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::str::FromStr;
use std::time::Duration;

use ipnetwork::{IpNetwork, Ipv4Network, Ipv6Network};
use jiff::{SignedDuration, Timestamp};
use serde::de::Error as _;
use serde::{Deserialize, Deserializer, Serialize, Serializer};
use serde_json::Value;

use crate::config::NetworkConfig;

/// The subnets of one lease, one of each family at most and one at least. Its text form is the last
/// part of the registry key, `10.1.2.0-24&fd00:1::-64` (flannel: subnet.MakeSubnetKey).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct LeaseKey {
    pub ipv4: Option<Ipv4Network>,
    pub ipv6: Option<Ipv6Network>,
}

/// The text is no lease key: two networks at most, joined by `&`, each `address-length` with no
/// bits set behind the length.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0:?} is not the name of a subnet, such as 10.1.2.0-24 or 10.1.2.0-24&fd00:1::-64")]
pub struct BadKey(String);

impl LeaseKey {
    /// The key of these subnets.
    pub fn new(ipv4: Option<Ipv4Network>, ipv6: Option<Ipv6Network>) -> Self {
        Self { ipv4, ipv6 }
    }

    /// The subnets, IPv4 first.
    pub fn networks(&self) -> impl Iterator<Item = IpNetwork> + use<> {
        let ipv4 = self.ipv4.map(IpNetwork::V4);
        ipv4.into_iter().chain(self.ipv6.map(IpNetwork::V6))
    }

    /// Whether any address belongs to both.
    pub fn overlaps(&self, other: &Self) -> bool {
        let ours: Vec<IpNetwork> = other.networks().collect();
        self.networks().any(|net| ours.iter().any(|other| overlap(net, *other)))
    }
}

impl From<IpNetwork> for LeaseKey {
    fn from(network: IpNetwork) -> Self {
        match network {
            IpNetwork::V4(net) => Self::new(Some(net), None),
            IpNetwork::V6(net) => Self::new(None, Some(net)),
        }
    }
}

impl fmt::Display for LeaseKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.ipv4 {
            Some(net) => write!(f, "{}-{}", net.network(), net.prefix())?,
            // flannel's form for nodes without IPv4.
            None => f.write_str("0.0.0.0-0")?,
        }
        match self.ipv6 {
            Some(net) => write!(f, "&{}-{}", net.network(), net.prefix()),
            None => Ok(()),
        }
    }
}

impl FromStr for LeaseKey {
    type Err = BadKey;

    fn from_str(text: &str) -> Result<Self, BadKey> {
        parse_key(text)
            // One subnet, one name: a second spelling would be a second lease of it.
            .filter(|key| key.to_string() == text)
            .ok_or_else(|| BadKey(text.chars().take(80).collect()))
    }
}

fn parse_key(text: &str) -> Option<LeaseKey> {
    let (v4, v6) = match text.split_once('&') {
        Some((v4, v6)) => (v4, Some(v6)),
        None => (text, None),
    };
    let (address, len) = split_len(v4, 31)?;
    let net = Ipv4Network::new(address.parse().ok()?, len).ok()?;
    let ipv4 = (net.ip() == net.network()).then_some(net)?;
    let ipv6 = match v6 {
        Some(text) => {
            let (address, len) = split_len(text, 127)?;
            let net = Ipv6Network::new(address.parse().ok()?, len).ok()?;
            Some((net.ip() == net.network()).then_some(net)?)
        }
        None => None,
    };
    let no_ipv4 = ipv4.prefix() == 0;
    if no_ipv4 && ipv6.is_none() {
        return None;
    }
    Some(LeaseKey::new((!no_ipv4).then_some(ipv4), ipv6))
}

fn split_len(text: &str, max: u8) -> Option<(&str, u8)> {
    let (address, len) = text.split_once('-')?;
    let digits = !len.is_empty() && len.bytes().all(|byte| byte.is_ascii_digit());
    let len: u8 = digits.then(|| len.parse().ok()).flatten()?;
    (len <= max).then_some((address, len))
}

impl Serialize for LeaseKey {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for LeaseKey {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        String::deserialize(deserializer)?.parse().map_err(D::Error::custom)
    }
}

/// What a node publishes with its subnet; flannel's LeaseAttrs, byte for byte.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "PascalCase")]
pub struct LeaseAttrs {
    /// The address to send to; 0.0.0.0 in the registry where there is none.
    #[serde(rename = "PublicIP", with = "unspecified_is_none")]
    pub public_ip: Option<Ipv4Addr>,
    #[serde(rename = "PublicIPv6", default)]
    pub public_ipv6: Option<Ipv6Addr>,
    /// Empty, and left out, for flannel's udp backend.
    #[serde(default, skip_serializing_if = "String::is_empty", deserialize_with = "short_text")]
    pub backend_type: String,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub backend_data: Option<Value>,
    #[serde(rename = "BackendV6Data", default, skip_serializing_if = "Option::is_none")]
    pub backend_v6_data: Option<Value>,
}

/// Bytes of a text from the registry that people are shown.
pub(crate) const TEXT_LEN_MAX: usize = 256;

/// Whether a text from the registry may go to logs and terminals.
pub(crate) fn is_fit_to_be_shown(text: &str) -> bool {
    text.len() <= TEXT_LEN_MAX && !text.contains(char::is_control)
}

fn short_text<'de, D: Deserializer<'de>>(deserializer: D) -> Result<String, D::Error> {
    let text = String::deserialize(deserializer)?;
    let wrong = || D::Error::custom("its BackendType is none that is fit to be shown");
    if is_fit_to_be_shown(&text) { Ok(text) } else { Err(wrong()) }
}

impl LeaseAttrs {
    /// The addresses to send to, IPv4 first.
    pub fn public_addresses(&self) -> impl Iterator<Item = IpAddr> + use<> {
        let ipv4 = self.public_ip.map(IpAddr::V4);
        ipv4.into_iter().chain(self.public_ipv6.map(IpAddr::V6))
    }

    /// Whether both name the same node: by IPv4 address, or by IPv6 where neither has IPv4.
    pub fn same_node(&self, other: &Self) -> bool {
        match (self.public_ip, other.public_ip) {
            (Some(ours), Some(theirs)) => ours == theirs,
            (None, None) => self.public_ipv6.is_some() && self.public_ipv6 == other.public_ipv6,
            _ => false,
        }
    }
}

/// JSON's form of "no IPv4 address" in leases.
mod unspecified_is_none {
    use std::net::Ipv4Addr;

    use serde::{Deserialize, Deserializer, Serialize, Serializer};

    #[expect(clippy::ref_option, reason = "the shape that serde asks for")]
    pub(super) fn serialize<S: Serializer>(
        ip: &Option<Ipv4Addr>,
        serializer: S,
    ) -> Result<S::Ok, S::Error> {
        ip.unwrap_or(Ipv4Addr::UNSPECIFIED).serialize(serializer)
    }

    pub(super) fn deserialize<'de, D: Deserializer<'de>>(
        deserializer: D,
    ) -> Result<Option<Ipv4Addr>, D::Error> {
        let ip = Ipv4Addr::deserialize(deserializer)?;
        Ok((!ip.is_unspecified()).then_some(ip))
    }
}

/// A lease as the registry has it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Lease {
    pub key: LeaseKey,
    pub attrs: LeaseAttrs,
    pub expires: Expiry,
    /// What tells this state of the entry from others, where the registry numbers them: etcd v3's
    /// mod_revision, etcd v2's modifiedIndex; else 0.
    pub revision: u64,
}

impl Lease {
    /// Whether it is the node's that is `attrs` now, and was `former` before its address changed: who
    /// looks just after that may still see it so.
    pub(crate) fn is_of(&self, attrs: &LeaseAttrs, former: &[LeaseAttrs]) -> bool {
        former.iter().chain([attrs]).any(|attrs| self.attrs.same_node(attrs))
    }
}

/// When a lease ends, unless it is renewed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum Expiry {
    /// A reservation.
    Never,
    At(Timestamp),
    /// Some day; only the registry knows when.
    Unknown,
}

impl Expiry {
    /// So long from now; a reservation has no time to live.
    pub(crate) fn after(ttl: Option<Duration>) -> Self {
        ttl.map_or(Self::Never, |ttl| Self::At(end_of(ttl)))
    }
}

/// When a time to live ends that begins now.
pub(crate) fn end_of(ttl: Duration) -> Timestamp {
    let ttl = SignedDuration::try_from(ttl).unwrap_or(SignedDuration::MAX);
    Timestamp::now().checked_add(ttl).unwrap_or(Timestamp::MAX)
}

/// What weft nodes tell each other beside the leases.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "PascalCase")]
pub struct NodeRecord {
    /// Made once by the node, 32 hexadecimal digits.
    pub id: String,
    /// The host's name, for people.
    #[serde(default)]
    pub name: String,
    #[serde(rename = "PublicIP")]
    pub public_ip: Option<Ipv4Addr>,
    #[serde(rename = "PublicIPv6")]
    pub public_ipv6: Option<Ipv6Addr>,
    /// Where its packets may come from, besides the public addresses.
    pub addresses: Vec<IpAddr>,
    /// weft's version.
    pub version: String,
    /// The MTU it hands to containers, in bytes.
    pub mtu: u32,
    /// The UDP port where it answers probes, at its address on the overlay.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub probe_port: Option<u16>,
}

impl NodeRecord {
    /// The addresses that its lease has, IPv4 first.
    pub fn public_addresses(&self) -> impl Iterator<Item = IpAddr> + use<> {
        let ipv4 = self.public_ip.map(IpAddr::V4);
        ipv4.into_iter().chain(self.public_ipv6.map(IpAddr::V6))
    }
}

/// Everything in the registry at one moment, in order of the keys.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Snapshot {
    /// The network config's text.
    pub config: Option<String>,
    pub leases: Vec<Lease>,
    pub nodes: Vec<NodeRecord>,
    pub skipped: Vec<Skipped>,
}

impl Snapshot {
    /// The leases that are there but cannot be read: somebody's, though nobody can tell whose.
    pub fn unreadable(&self) -> impl Iterator<Item = (LeaseKey, &Skipped)> {
        self.skipped.iter().filter_map(|it| {
            let name = it.name.strip_prefix("subnets/").unwrap_or(&it.name);
            name.parse().ok().map(|key| (key, it))
        })
    }
}

/// An entry that is there but cannot be read.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Skipped {
    pub name: String,
    pub reason: String,
}

/// The leases that may be forwarded to, and those that must not.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Peers {
    pub accepted: Vec<Lease>,
    pub refused: Vec<(LeaseKey, Refusal)>,
}

/// Why a lease is not forwarded to.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Refusal {
    #[error("it lies outside of the Network {0}")]
    OutsideNetwork(IpNetwork),
    #[error("the network config has no network of its family")]
    FamilyOff,
    #[error("it overlaps our own subnet")]
    OverlapsOurs,
    #[error("it names no address to send to")]
    NoAddress,
    #[error("packets cannot be sent to its address {0}")]
    UnusableAddress(IpAddr),
    #[error("its address {0} lies inside the overlay itself")]
    AddressInsideOverlay(IpAddr),
    #[error("it has our own address {0}: a second lease of this node, or a node with our address")]
    OurAddress(IpAddr),
    #[error("the lease {other} has {subnet} too; remove one of them")]
    Overlaps { subnet: IpNetwork, other: LeaseKey },
}

/// Sorts everybody else's leases; our own is in neither list, nor as it was `former`ly. `further`: what else
/// this host is reached by.
pub fn peers(
    config: &NetworkConfig,
    own: &Lease,
    former: &[LeaseAttrs],
    further: &[IpAddr],
    leases: &[Lease],
) -> Peers {
    let ours: HashSet<IpAddr> =
        own.attrs.public_addresses().chain(further.iter().copied()).collect();
    let mut peers = Peers::default();
    let is_ours = |lease: &Lease| lease.key == own.key && lease.is_of(&own.attrs, former);
    for lease in leases.iter().filter(|lease| !is_ours(lease)) {
        match refusal(config, own, &ours, lease) {
            Some(refusal) => peers.refused.push((lease.key, refusal)),
            None => peers.accepted.push(lease.clone()),
        }
    }
    refuse_overlaps(config, &mut peers);
    peers
}

/// Of two leases that share addresses one stays, since packets cannot go both ways: the one whose subnet is as
/// large as those that are given out, else the larger one, of equal ones the first key's. So nobody takes over
/// a part of another node's subnet, and nobody has all others refused. One node may have both.
fn refuse_overlaps(config: &NetworkConfig, peers: &mut Peers) {
    let is_usual = |subnet: IpNetwork| {
        config.family(subnet.is_ipv6()).is_some_and(|family| family.subnet_len == subnet.prefix())
    };
    let leases = &peers.accepted;
    let subnets = leases
        .iter()
        .enumerate()
        .flat_map(|(at, lease)| lease.key.networks().map(move |subnet| (subnet, lease.key, at)));
    let mut subnets: Vec<_> = subnets.collect();
    // Whatever has a subnet inside comes before it.
    subnets.sort_unstable();
    let mut lost: BTreeMap<usize, (IpNetwork, LeaseKey)> = BTreeMap::new();
    let mut outer: Vec<(IpNetwork, LeaseKey, usize)> = Vec::new();
    for inner in subnets {
        outer.retain(|(network, ..)| contains(*network, inner.0));
        for outer in &outer {
            let is_same = outer.0 == inner.0;
            if outer.1 == inner.1
                || !is_same && leases[outer.2].attrs.same_node(&leases[inner.2].attrs)
            {
                continue;
            }
            let outer_loses = !is_same && is_usual(inner.0) && !is_usual(outer.0);
            let (winner, loser) = if outer_loses { (inner, *outer) } else { (*outer, inner) };
            let found = (inner.0, winner.1);
            lost.entry(loser.2).and_modify(|first| *first = found.min(*first)).or_insert(found);
        }
        outer.push(inner);
    }
    let mut number = 0..;
    peers.accepted.retain(|lease| {
        let lost = number.next().and_then(|number| lost.remove(&number));
        let refusal = lost.map(|(subnet, other)| Refusal::Overlaps { subnet, other });
        let is_accepted = refusal.is_none();
        peers.refused.extend(refusal.map(|refusal| (lease.key, refusal)));
        is_accepted
    });
}

fn refusal(
    config: &NetworkConfig,
    own: &Lease,
    ours: &HashSet<IpAddr>,
    lease: &Lease,
) -> Option<Refusal> {
    for subnet in lease.key.networks() {
        let Some(family) = config.family(subnet.is_ipv6()) else {
            return Some(Refusal::FamilyOff);
        };
        if !contains(family.network, subnet) {
            return Some(Refusal::OutsideNetwork(family.network));
        }
    }
    if lease.key.overlaps(&own.key) {
        return Some(Refusal::OverlapsOurs);
    }
    let addresses: Vec<IpAddr> = lease.attrs.public_addresses().collect();
    if addresses.is_empty() {
        return Some(Refusal::NoAddress);
    }
    for address in addresses {
        // ::ffff:127.0.0.1 is 127.0.0.1 to whoever sends to it.
        let address = address.to_canonical();
        if ours.contains(&address) {
            return Some(Refusal::OurAddress(address));
        }
        if is_unusable(address) {
            return Some(Refusal::UnusableAddress(address));
        }
        if config.networks().any(|network| network.contains(address)) {
            return Some(Refusal::AddressInsideOverlay(address));
        }
    }
    None
}

/// Whether nobody can be sent to by this address.
pub fn is_unusable(address: IpAddr) -> bool {
    let broadcast = matches!(address, IpAddr::V4(ip) if ip.is_broadcast());
    broadcast || address.is_unspecified() || address.is_multicast() || address.is_loopback()
}

/// Whether `inner` lies wholly inside `outer`.
pub fn contains(outer: IpNetwork, inner: IpNetwork) -> bool {
    outer.prefix() <= inner.prefix() && outer.contains(inner.network())
}

/// Networks nest or are disjoint.
pub(crate) fn overlap(a: IpNetwork, b: IpNetwork) -> bool {
    contains(a, b) || contains(b, a)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn key(text: &str) -> LeaseKey {
        text.parse().unwrap()
    }

    fn lease(key: &str, public_ip: &str) -> Lease {
        let attrs = LeaseAttrs { public_ip: public_ip.parse().ok(), ..LeaseAttrs::default() };
        Lease { key: key.parse().unwrap(), attrs, expires: Expiry::Never, revision: 0 }
    }

    #[test]
    fn keys_are_flannels() {
        for text in ["10.12.13.0-24", "10.12.13.0-24&fd00:12:13::-56", "0.0.0.0-0&fd00:12:13::-56"]
        {
            assert_eq!(key(text).to_string(), text);
        }
        assert_eq!(key("0.0.0.0-0&fd00::-64").ipv4, None);
        for text in [
            "",
            "10.12.13.0",
            "10.12.13.0/24",
            "10.12.13.0-32",
            "10.12.13.0-+24",
            "10.12.13.0-024",
            "10.12.13.0-24&FD00::-64",
            "10.12.13.0-24&fd00:0:0::-64",
            "0.0.0.0-0",
            "10.12.13.1-24",
            "x10.12.13.0-24",
            "10.12.13.0-24&",
            "10.12.13.0-24&fd00::-128",
            "fd00::-64",
            "10.12.13.0-24&fd00::1-64",
        ] {
            assert!(text.parse::<LeaseKey>().is_err(), "{text}");
        }
    }

    #[test]
    fn values_are_flannels_byte_for_byte() {
        for text in [
            r#"{"PublicIP":"1.2.3.4","PublicIPv6":null}"#,
            r#"{"PublicIP":"192.168.64.3","PublicIPv6":null,"BackendType":"vxlan","BackendData":{"VNI":1,"VtepMAC":"c6:d2:32:6f:8f:44"}}"#,
            r#"{"PublicIP":"10.1.1.1","PublicIPv6":"2001:db8::5","BackendType":"vxlan","BackendData":{"VNI":1,"VtepMAC":"00:00:00:00:00:01"},"BackendV6Data":{"VNI":1,"VtepMAC":"00:00:00:00:00:02"}}"#,
            r#"{"PublicIP":"10.1.1.1","PublicIPv6":null,"BackendType":"host-gw"}"#,
            r#"{"PublicIP":"0.0.0.0","PublicIPv6":"2001:db8::5"}"#,
        ] {
            let attrs: LeaseAttrs = serde_json::from_str(text).unwrap();
            assert_eq!(serde_json::to_string(&attrs).unwrap(), text);
        }
        let old: LeaseAttrs = serde_json::from_str(r#"{"PublicIP":"1.2.3.4","Other":1}"#).unwrap();
        assert_eq!(old.public_ipv6, None);
        for text in ["", "{}", r#"{"PublicIP":"2001:db8::1"}"#, r#"{"PublicIP":7}"#, "null"] {
            assert!(serde_json::from_str::<LeaseAttrs>(text).is_err(), "{text}");
        }
    }

    #[test]
    fn networks_nest_or_are_apart() {
        let net = |text: &str| text.parse::<IpNetwork>().unwrap();
        assert!(overlap(net("1.2.3.0/24"), net("1.2.0.0/16")));
        assert!(overlap(net("1.2.0.0/16"), net("1.2.3.0/24")));
        assert!(!overlap(net("1.2.3.0/24"), net("1.2.4.0/24")));
        assert!(!overlap(net("1.2.3.0/24"), net("7.2.4.0/22")));
        assert!(!overlap(net("0.0.0.0/0"), net("::/0")));
    }

    #[test]
    fn the_registry_is_not_trusted() {
        let config: NetworkConfig = r#"{"Network":"10.3.0.0/16"}"#.parse().unwrap();
        let own = lease("10.3.4.0-24", "192.0.2.9");
        let refused = |key: &str, public_ip: &str| {
            let found = peers(&config, &own, &[], &[], &[own.clone(), lease(key, public_ip)]);
            assert_eq!(found.accepted.len() + found.refused.len(), 1);
            found.refused.into_iter().next().map(|(_, why)| why)
        };
        let ip = |text: &str| text.parse::<IpAddr>().unwrap();
        assert_eq!(refused("10.3.5.0-24", "192.0.2.1"), None);
        assert!(matches!(refused("10.4.5.0-24", "192.0.2.1"), Some(Refusal::OutsideNetwork(_))));
        assert!(matches!(refused("0.0.0.0-1", "192.0.2.1"), Some(Refusal::OutsideNetwork(_))));
        assert_eq!(refused("10.3.4.128-25", "192.0.2.1"), Some(Refusal::OverlapsOurs));
        assert_eq!(refused("10.3.0.0-16", "192.0.2.1"), Some(Refusal::OverlapsOurs));
        assert_eq!(refused("10.3.5.0-24&fd00::-64", "192.0.2.1"), Some(Refusal::FamilyOff));
        assert_eq!(refused("10.3.5.0-24", ""), Some(Refusal::NoAddress));
        assert_eq!(
            refused("10.3.5.0-24", "127.0.0.1"),
            Some(Refusal::UnusableAddress(ip("127.0.0.1")))
        );
        assert_eq!(refused("10.3.4.0-24", "192.0.2.1"), Some(Refusal::OverlapsOurs));
        let mut mapped = lease("10.3.5.0-24", "");
        mapped.attrs.public_ipv6 = "::ffff:10.3.9.9".parse().ok();
        assert_eq!(peers(&config, &own, &[], &[], &[mapped]).accepted, []);
        assert_eq!(
            refused("10.3.5.0-24", "10.3.9.9"),
            Some(Refusal::AddressInsideOverlay(ip("10.3.9.9")))
        );
        assert_eq!(refused("10.3.5.0-24", "192.0.2.9"), Some(Refusal::OurAddress(ip("192.0.2.9"))));
        let other = [lease("10.3.5.0-24", "192.0.2.8")];
        assert_eq!(peers(&config, &own, &[], &[ip("192.0.2.8")], &other).accepted, []);
    }

    #[test]
    fn our_lease_is_ours_also_while_it_tells_a_former_address() {
        let config: NetworkConfig = r#"{"Network":"10.3.0.0/16"}"#.parse().unwrap();
        let [own, before, first] =
            ["192.0.2.9", "192.0.2.8", "192.0.2.7"].map(|ip| lease("10.3.4.0-24", ip));
        let sorted = |told: &Lease, former: &[LeaseAttrs]| {
            peers(&config, &own, former, &[], std::slice::from_ref(told))
        };
        let former = [first.attrs.clone(), before.attrs.clone()];
        assert_eq!(sorted(&before, &former), Peers::default());
        assert_eq!(sorted(&first, &former), Peers::default());
        assert_eq!(sorted(&before, &[]).refused, [(own.key, Refusal::OverlapsOurs)]);
    }

    #[test]
    fn of_two_that_share_a_subnet_one_is_forwarded_to() {
        let config = r#"{"EnableIPv6":true,"Network":"10.3.0.0/16","IPv6Network":"fd00::/48"}"#;
        let config: NetworkConfig = config.parse().unwrap();
        let own = lease("10.3.4.0-24&fd00:0:0:4::-64", "192.0.2.4");
        let mut leases = [
            lease("10.3.1.0-24&fd00:0:0:1::-64", "192.0.2.1"),
            lease("10.3.1.0-24&fd00:0:0:2::-64", "192.0.2.2"),
            lease("10.3.3.0-24&fd00:0:0:3::-64", "192.0.2.3"),
        ];
        for _ in 0..2 {
            let found = peers(&config, &own, &[], &[], &leases);
            let keys: Vec<LeaseKey> = found.accepted.iter().map(|lease| lease.key).collect();
            assert_eq!(keys.len(), 2);
            assert!(keys.contains(&key("10.3.1.0-24&fd00:0:0:1::-64")));
            let told: Vec<String> =
                found.refused.iter().map(|(key, why)| format!("{key}: {why}")).collect();
            assert_eq!(
                told,
                ["10.3.1.0-24&fd00:0:0:2::-64: the lease 10.3.1.0-24&fd00:0:0:1::-64 has \
                  10.3.1.0/24 too; remove one of them"]
            );
            leases.reverse();
        }
    }

    #[test]
    fn nobody_takes_a_part_of_anothers_subnet_or_has_all_others_refused() {
        let config: NetworkConfig = r#"{"Network":"10.3.0.0/16"}"#.parse().unwrap();
        let own = lease("10.3.4.0-24", "192.0.2.4");
        let leases = [
            lease("10.3.1.0-24", "192.0.2.1"),
            lease("10.3.1.64-26", "192.0.2.66"),
            lease("10.3.1.128-26", "192.0.2.1"),
            lease("10.3.2.0-24", "192.0.2.2"),
            lease("10.3.2.0-23", "192.0.2.66"),
            lease("10.3.8.0-22", "192.0.2.8"),
            lease("10.3.9.0-25", "192.0.2.9"),
        ];
        let found = peers(&config, &own, &[], &[], &leases);
        let accepted: Vec<String> = found.accepted.iter().map(|it| it.key.to_string()).collect();
        assert_eq!(accepted, ["10.3.1.0-24", "10.3.1.128-26", "10.3.2.0-24", "10.3.8.0-22"]);
        let told: Vec<String> =
            found.refused.iter().map(|(key, why)| format!("{key}: {why}")).collect();
        let too = |lease: &str, other: &str, subnet: &str| {
            format!("{lease}: the lease {other} has {subnet} too; remove one of them")
        };
        assert_eq!(
            told,
            [
                too("10.3.1.64-26", "10.3.1.0-24", "10.3.1.64/26"),
                too("10.3.2.0-23", "10.3.2.0-24", "10.3.2.0/24"),
                too("10.3.9.0-25", "10.3.8.0-22", "10.3.9.0/25"),
            ]
        );
    }

    proptest! {
        #[test]
        fn arbitrary_text_never_panics(text in ".{0,60}") {
            let _ = text.parse::<LeaseKey>();
            let _ = serde_json::from_str::<LeaseAttrs>(&text);
        }

        /// Whom we forward to is a function of the config and the leases: not of their order, of what
        /// was there before, or of how it became so.
        #[test]
        fn peers_depend_on_nothing_but_the_leases(
            entries in proptest::collection::vec((0u8..12, 0u8..8, 23u8..=25), 0..12),
            order in any::<u64>(),
        ) {
            let config: NetworkConfig = r#"{"Network":"10.3.0.0/16"}"#.parse().unwrap();
            let own = lease("10.3.4.0-24", "192.0.2.4");
            let entry = |(subnet, owner, len): (u8, u8, u8)| {
                let base = Ipv4Network::new(Ipv4Addr::new(10, 3, subnet, 0), len).unwrap();
                lease(&format!("{}-{len}", base.network()), &format!("192.0.2.{owner}"))
            };
            let mut leases: Vec<Lease> = entries.into_iter().map(entry).collect();
            let found = peers(&config, &own, &[], &[], &leases);
            for peer in &found.accepted {
                prop_assert!(!peer.key.overlaps(&own.key) && !peer.attrs.same_node(&own.attrs));
            }
            let ours = leases.iter().filter(|it| it.key == own.key && it.attrs == own.attrs).count();
            prop_assert_eq!(found.accepted.len() + found.refused.len() + ours, leases.len());
            fastrand::Rng::with_seed(order).shuffle(&mut leases);
            let again = peers(&config, &own, &[], &[], &leases);
            let names = |found: &Peers| {
                let mut names: Vec<String> =
                    found.accepted.iter().map(|it| format!("{} {:?}", it.key, it.attrs)).collect();
                names.extend(found.refused.iter().map(|(key, why)| format!("{key}: {why}")));
                names.sort();
                names
            };
            prop_assert_eq!(names(&again), names(&found));
        }

        #[test]
        fn keys_round_trip(low in any::<u32>(), len in 1u8..=31, v6 in any::<u128>(), len6 in 0u8..=127) {
            let net = Ipv4Network::new(Ipv4Addr::from_bits(low), len).unwrap();
            let ipv4 = Ipv4Network::new(net.network(), len).unwrap();
            let net = Ipv6Network::new(Ipv6Addr::from_bits(v6), len6).unwrap();
            let ipv6 = Ipv6Network::new(net.network(), len6).unwrap();
            for key in [LeaseKey::new(Some(ipv4), None), LeaseKey::new(Some(ipv4), Some(ipv6))] {
                prop_assert_eq!(key.to_string().parse::<LeaseKey>(), Ok(key));
            }
        }
    }
}
