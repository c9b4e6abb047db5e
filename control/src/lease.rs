//! A lease: which node owns a subnet, in the registry's own form.

use std::collections::HashMap;
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

/// The subnets of one lease, one of each family at most; without any it is no lease's. Its text form is the
/// last part of the registry key, `10.1.2.0-24&fd00:1::-64` (flannel: subnet.MakeSubnetKey).
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Hash, PartialOrd, Ord)]
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
        self.networks().any(|net| other.networks().any(|other| overlap(net, other)))
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

/// Of each family, the last.
impl FromIterator<IpNetwork> for LeaseKey {
    fn from_iter<T: IntoIterator<Item = IpNetwork>>(networks: T) -> Self {
        let mut key = Self::default();
        for network in networks {
            match network {
                IpNetwork::V4(net) => key.ipv4 = Some(net),
                IpNetwork::V6(net) => key.ipv6 = Some(net),
            }
        }
        key
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
        addresses(self.public_ip, self.public_ipv6)
    }

    /// The one of a family.
    pub fn address_of(&self, ipv6: bool) -> Option<IpAddr> {
        self.public_addresses().find(|ip| ip.is_ipv6() == ipv6)
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
    /// When that is, where it is known.
    pub fn end(self) -> Option<Timestamp> {
        match self {
            Self::At(end) => Some(end),
            Self::Never | Self::Unknown => None,
        }
    }

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
        addresses(self.public_ip, self.public_ipv6)
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
            let key = it.name.strip_prefix("subnets/")?.parse().ok()?;
            Some((key, it))
        })
    }

    /// The network config, if it can be used.
    pub fn network_config(&self) -> Option<NetworkConfig> {
        self.config.as_ref()?.parse().ok()
    }

    /// With this lease in it, in place of one with its key.
    #[must_use]
    pub fn with(mut self, lease: Lease) -> Self {
        self.leases.retain(|it| it.key != lease.key);
        self.leases.push(lease);
        self.leases.sort_by_key(|it| it.key);
        self
    }
}

/// An entry that is there but cannot be read.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Skipped {
    /// Its path, as in `subnets/10.42.7.0-24`.
    pub name: String,
    pub reason: String,
}

/// The nodes by their public addresses; of two with one address, the last.
pub fn by_address(nodes: &[NodeRecord]) -> HashMap<IpAddr, &NodeRecord> {
    nodes.iter().flat_map(|node| node.public_addresses().map(move |ip| (ip, node))).collect()
}

/// Those that there are, IPv4 first.
pub fn addresses(
    ipv4: Option<Ipv4Addr>,
    ipv6: Option<Ipv6Addr>,
) -> impl Iterator<Item = IpAddr> + use<> {
    ipv4.map(IpAddr::V4).into_iter().chain(ipv6.map(IpAddr::V6))
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

    proptest! {
        #[test]
        fn arbitrary_text_never_panics(text in ".{0,60}") {
            let _ = text.parse::<LeaseKey>();
            let _ = serde_json::from_str::<LeaseAttrs>(&text);
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
