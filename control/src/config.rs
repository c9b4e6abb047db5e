//! The network config that all nodes of an overlay share: flannel's JSON, by flannel's rules.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::str::FromStr;

use ipnetwork::IpNetwork;
use serde_json::{Map, Value};

use crate::lease::contains;

/// The config of an overlay.
#[derive(Debug, Clone, PartialEq)]
pub struct NetworkConfig {
    pub ipv4: Option<FamilyConfig>,
    pub ipv6: Option<FamilyConfig>,
    pub enable_nftables: bool,
    pub backend: BackendConfig,
}

/// The address space of one family.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct FamilyConfig {
    /// The whole overlay.
    pub network: IpNetwork,
    /// Prefix length of each node's subnet.
    pub subnet_len: u8,
    /// Base of the first subnet that may be leased.
    pub subnet_min: IpAddr,
    /// Base of the last one.
    pub subnet_max: IpAddr,
}

/// The `Backend` part.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct BackendConfig {
    /// `Type` in lower case. `None` where the config has no `Backend` at all; empty where it has
    /// one without a type, which flannel refuses.
    pub kind: Option<String>,
    options: Map<String, Value>,
}

/// What is wrong with a config; flannel's texts where flannel has one.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ConfigError {
    #[error("it is not JSON: {0}")]
    Json(String),
    #[error("it is not a JSON object")]
    NotAnObject,
    #[error("{key} must be {wanted}, not {found}")]
    Type { key: &'static str, wanted: &'static str, found: String },
    #[error("{key} must be at most {max}, not {number}")]
    OptionTooLarge { key: &'static str, number: u64, max: u32 },
    #[error("error decoding Backend property of config: {0}")]
    Backend(String),
    #[error("none defined stack: EnableIPv4 is false and EnableIPv6 is not true")]
    NoFamily,
    #[error("please define a correct {0} parameter in the flannel config")]
    NetworkMissing(&'static str),
    #[error("invalid {family} CIDR format: {text}")]
    Cidr { family: &'static str, text: String },
    #[error("SubnetLen must be less than /{0}")]
    SubnetLenTooLong(u8),
    #[error("network must be able to accommodate at least four subnets")]
    FourSubnets,
    #[error("{key} is too small. Minimum useful network prefix is /{prefix}")]
    NetworkTooSmall { key: &'static str, prefix: u8 },
    #[error("{bound} is not in the range of the {network}")]
    OutOfRange { bound: &'static str, network: &'static str },
    #[error("{bound} is not on a SubnetLen boundary: {address}")]
    Boundary { bound: &'static str, address: IpAddr },
}

impl NetworkConfig {
    /// The families in use, IPv4 first.
    pub fn families(&self) -> impl Iterator<Item = FamilyConfig> + use<> {
        self.ipv4.into_iter().chain(self.ipv6)
    }

    /// Those families' networks.
    pub fn networks(&self) -> impl Iterator<Item = IpNetwork> + use<> {
        self.families().map(|family| family.network)
    }

    /// Whether both are of one overlay, and differ at most in which of its subnets are given out.
    pub fn differs_in_bounds_only(&self, other: &Self) -> bool {
        self.networks().eq(other.networks())
            && self.enable_nftables == other.enable_nftables
            && self.backend == other.backend
    }

    /// The family's address space, if the overlay has it.
    pub fn family(&self, ipv6: bool) -> Option<FamilyConfig> {
        if ipv6 { self.ipv6 } else { self.ipv4 }
    }
}

impl BackendConfig {
    /// A number among the backend's options.
    ///
    /// # Errors
    /// It is there but not a whole number from 0 to 65535.
    pub fn u16_option(&self, key: &'static str) -> Result<Option<u16>, ConfigError> {
        typed(&self.options, key, "a whole number from 0 to 65535", |value| {
            u16::try_from(value.as_u64()?).ok()
        })
    }

    /// As [`Self::u16_option`], with a limit of its own.
    ///
    /// # Errors
    /// It is there but not a whole number from 0 to `max`.
    pub fn number_option(&self, key: &'static str, max: u32) -> Result<Option<u32>, ConfigError> {
        let Some(number) = whole_number(&self.options, key)? else {
            return Ok(None);
        };
        let within = u32::try_from(number).ok().filter(|number| *number <= max);
        within.map(Some).ok_or(ConfigError::OptionTooLarge { key, number, max })
    }

    /// A switch among the backend's options.
    ///
    /// # Errors
    /// It is there but neither true nor false.
    pub fn bool_option(&self, key: &'static str) -> Result<Option<bool>, ConfigError> {
        boolean(&self.options, key)
    }
}

impl FromStr for NetworkConfig {
    type Err = ConfigError;

    fn from_str(text: &str) -> Result<Self, ConfigError> {
        let value: Value =
            serde_json::from_str(text).map_err(|error| ConfigError::Json(error.to_string()))?;
        let Value::Object(fields) = value else {
            return Err(ConfigError::NotAnObject);
        };
        let enable_ipv4 = boolean(&fields, "EnableIPv4")?.unwrap_or(true);
        let enable_ipv6 = boolean(&fields, "EnableIPv6")?.unwrap_or(false);
        if !enable_ipv4 && !enable_ipv6 {
            return Err(ConfigError::NoFamily);
        }
        let family = |keys: &Keys, on: bool| on.then(|| family(&fields, keys)).transpose();
        Ok(Self {
            ipv4: family(&IPV4, enable_ipv4)?,
            ipv6: family(&IPV6, enable_ipv6)?,
            enable_nftables: boolean(&fields, "EnableNFTables")?.unwrap_or(false),
            backend: backend(&fields)?,
        })
    }
}

/// What the keys of a family are called, and its limits.
struct Keys {
    family: &'static str,
    network: &'static str,
    subnet_len: &'static str,
    subnet_min: &'static str,
    subnet_max: &'static str,
    /// Where the config gives no length: this, if the network leaves room for it.
    default_len: u8,
    longest_len: u8,
    longest_prefix: u8,
    bits: u8,
}

const IPV4: Keys = Keys {
    family: "IPv4",
    network: "Network",
    subnet_len: "SubnetLen",
    subnet_min: "SubnetMin",
    subnet_max: "SubnetMax",
    default_len: 24,
    longest_len: 30,
    longest_prefix: 28,
    bits: 32,
};

const IPV6: Keys = Keys {
    family: "IPv6",
    network: "IPv6Network",
    subnet_len: "IPv6SubnetLen",
    subnet_min: "IPv6SubnetMin",
    subnet_max: "IPv6SubnetMax",
    default_len: 64,
    longest_len: 126,
    longest_prefix: 124,
    bits: 128,
};

/// Every node gets one of at least four subnets, so each is two bits longer than the network.
pub(crate) const FOUR_SUBNETS_BITS: u8 = 2;

fn family(fields: &Map<String, Value>, keys: &Keys) -> Result<FamilyConfig, ConfigError> {
    let network = network(fields, keys)?;
    let subnet_len = subnet_len(fields, keys, network)?;
    let step = 1u128 << (keys.bits - subnet_len);
    let base = to_bits(network.network());
    let last = base + ((1u128 << (subnet_len - network.prefix())) - 1) * step;
    let at = |bits| from_bits(bits, network);
    let subnet_min = address(fields, keys.subnet_min, keys)?;
    let subnet_max = address(fields, keys.subnet_max, keys)?;
    for (bound, address) in [(keys.subnet_min, subnet_min), (keys.subnet_max, subnet_max)] {
        if address.is_some_and(|ip| !contains(network, IpNetwork::from(ip))) {
            return Err(ConfigError::OutOfRange { bound, network: keys.network });
        }
    }
    for (bound, address) in [(keys.subnet_min, subnet_min), (keys.subnet_max, subnet_max)] {
        if let Some(address) = address.filter(|ip| !to_bits(*ip).is_multiple_of(step)) {
            return Err(ConfigError::Boundary { bound, address });
        }
    }
    Ok(FamilyConfig {
        network,
        subnet_len,
        // The first subnet's base is the network's own address; flannel leaves it out.
        subnet_min: subnet_min.unwrap_or_else(|| at(base + step)),
        subnet_max: subnet_max.unwrap_or_else(|| at(last)),
    })
}

fn network(fields: &Map<String, Value>, keys: &Keys) -> Result<IpNetwork, ConfigError> {
    let text = text(fields, keys.network)?.unwrap_or_default();
    if text.is_empty() {
        return Err(ConfigError::NetworkMissing(keys.network));
    }
    let wrong = || ConfigError::Cidr { family: keys.family, text: text.to_owned() };
    let network: IpNetwork = text.parse().map_err(|_| wrong())?;
    // ipnetwork also takes a bare address and a netmask; Go's ParseCIDR takes neither.
    let has_length =
        text.split_once('/').is_some_and(|(_, len)| len.bytes().all(|byte| byte.is_ascii_digit()));
    if !has_length || network.is_ipv6() != (keys.bits == 128) {
        return Err(wrong());
    }
    IpNetwork::new(network.network(), network.prefix()).map_err(|_| wrong())
}

fn subnet_len(
    fields: &Map<String, Value>,
    keys: &Keys,
    network: IpNetwork,
) -> Result<u8, ConfigError> {
    let prefix = network.prefix();
    let Some(len) = whole_number(fields, keys.subnet_len)?.filter(|len| *len > 0) else {
        if prefix > keys.longest_prefix {
            return Err(ConfigError::NetworkTooSmall {
                key: if keys.bits == 32 { "network" } else { keys.network },
                prefix: keys.longest_prefix,
            });
        }
        let room_for_default = prefix + FOUR_SUBNETS_BITS <= keys.default_len;
        return Ok(if room_for_default { keys.default_len } else { prefix + FOUR_SUBNETS_BITS });
    };
    let Some(len) = u8::try_from(len).ok().filter(|len| *len <= keys.longest_len) else {
        return Err(ConfigError::SubnetLenTooLong(keys.longest_len + 1));
    };
    if len < prefix.saturating_add(FOUR_SUBNETS_BITS) {
        return Err(ConfigError::FourSubnets);
    }
    Ok(len)
}

fn backend(fields: &Map<String, Value>) -> Result<BackendConfig, ConfigError> {
    let options = match field(fields, "Backend") {
        None => return Ok(BackendConfig::default()),
        Some(Value::Null) => Map::new(),
        Some(Value::Object(options)) => options.clone(),
        Some(other) => {
            let (wanted, found) = ("an object", other.to_string());
            let wrong = ConfigError::Type { key: "Backend", wanted, found };
            return Err(ConfigError::Backend(wrong.to_string()));
        }
    };
    let kind = text(&options, "Type")
        .map_err(|error| ConfigError::Backend(error.to_string()))?
        .unwrap_or_default()
        .to_lowercase();
    Ok(BackendConfig { kind: Some(kind), options })
}

/// Go's JSON takes keys in any case, the exact one first.
fn field<'a>(fields: &'a Map<String, Value>, key: &str) -> Option<&'a Value> {
    let other_case = || fields.iter().find(|(name, _)| name.eq_ignore_ascii_case(key));
    fields.get(key).or_else(|| other_case().map(|(_, value)| value))
}

/// What `read` makes of a key; `None` where there is none, or null.
fn typed<'a, T>(
    fields: &'a Map<String, Value>,
    key: &'static str,
    wanted: &'static str,
    read: impl Fn(&'a Value) -> Option<T>,
) -> Result<Option<T>, ConfigError> {
    let value = field(fields, key).filter(|value| !value.is_null());
    let wrong = |found: &Value| ConfigError::Type { key, wanted, found: found.to_string() };
    value.map(|value| read(value).ok_or_else(|| wrong(value))).transpose()
}

fn text<'a>(
    fields: &'a Map<String, Value>,
    key: &'static str,
) -> Result<Option<&'a str>, ConfigError> {
    typed(fields, key, "a string", Value::as_str)
}

fn boolean(fields: &Map<String, Value>, key: &'static str) -> Result<Option<bool>, ConfigError> {
    typed(fields, key, "true or false", Value::as_bool)
}

fn whole_number(
    fields: &Map<String, Value>,
    key: &'static str,
) -> Result<Option<u64>, ConfigError> {
    typed(fields, key, "a whole number", Value::as_u64)
}

fn address(
    fields: &Map<String, Value>,
    key: &'static str,
    keys: &Keys,
) -> Result<Option<IpAddr>, ConfigError> {
    let Some(text) = text(fields, key)?.filter(|text| !text.is_empty()) else {
        return Ok(None);
    };
    let address = text.parse::<IpAddr>().ok().filter(|ip| ip.is_ipv6() == (keys.bits == 128));
    let wrong = || ConfigError::Type { key, wanted: "an address", found: format!("{text:?}") };
    address.map(Some).ok_or_else(wrong)
}

/// An address as a number, so that both families are counted alike.
pub(crate) fn to_bits(address: IpAddr) -> u128 {
    match address {
        IpAddr::V4(ip) => ip.to_bits().into(),
        IpAddr::V6(ip) => ip.to_bits(),
    }
}

/// The address of `like`'s family with this number.
pub(crate) fn from_bits(bits: u128, like: IpNetwork) -> IpAddr {
    match like {
        IpNetwork::V4(_) => {
            #[expect(clippy::cast_possible_truncation, reason = "it lies inside an IPv4 network")]
            let bits = bits as u32;
            Ipv4Addr::from_bits(bits).into()
        }
        IpNetwork::V6(_) => Ipv6Addr::from_bits(bits).into(),
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn parse(text: &str) -> Result<NetworkConfig, ConfigError> {
        text.parse()
    }

    fn ipv4(text: &str) -> FamilyConfig {
        parse(text).unwrap().ipv4.unwrap()
    }

    fn error(text: &str) -> String {
        parse(text).unwrap_err().to_string()
    }

    #[test]
    fn defaults_follow_the_network() {
        let found = ipv4(r#"{"Network":"10.3.5.7/16"}"#);
        assert_eq!(found.network, "10.3.0.0/16".parse().unwrap());
        assert_eq!(found.subnet_len, 24);
        assert_eq!(found.subnet_min.to_string(), "10.3.1.0");
        assert_eq!(found.subnet_max.to_string(), "10.3.255.0");
        for (prefix, len) in [(22, 24), (23, 25), (28, 30)] {
            let text = format!(r#"{{"Network":"10.0.0.0/{prefix}"}}"#);
            assert_eq!(ipv4(&text).subnet_len, len);
        }
    }

    #[test]
    fn given_bounds_are_kept() {
        let found = ipv4(
            r#"{ "Network": "10.3.0.0/16", "SubnetMin": "10.3.5.0", "SubnetMax": "10.3.8.0", "SubnetLen": 28 }"#,
        );
        assert_eq!(found.subnet_len, 28);
        assert_eq!(found.subnet_min.to_string(), "10.3.5.0");
        assert_eq!(found.subnet_max.to_string(), "10.3.8.0");
        let v6 = parse(
            r#"{"EnableIPv4":false,"EnableIPv6":true,"IPv6Network":"fc00::/48","IPv6SubnetLen":124,
                "IPv6SubnetMin":"fc00:0:0:1::","IPv6SubnetMax":"fc00:0:0:f::"}"#,
        );
        let v6 = v6.unwrap().ipv6.unwrap();
        assert_eq!(v6.subnet_len, 124);
        assert_eq!(v6.subnet_min.to_string(), "fc00:0:0:1::");
    }

    #[test]
    fn keys_have_any_case_and_unknown_ones_do_not_matter() {
        let found = parse(
            r#"{"network":"10.3.0.0/16","SUBNETLEN":26,"Foo":1,"backend":{"type":"VXLAN","port":7}}"#,
        );
        let found = found.unwrap();
        assert_eq!(found.ipv4.unwrap().subnet_len, 26);
        assert_eq!(found.backend.kind.as_deref(), Some("vxlan"));
        assert_eq!(found.backend.u16_option("Port"), Ok(Some(7)));
    }

    #[test]
    fn the_backend_may_be_absent_or_empty() {
        assert_eq!(parse(r#"{"Network":"10.3.0.0/16"}"#).unwrap().backend.kind, None);
        for empty in ["{}", "null"] {
            let text = format!(r#"{{"Network":"10.3.0.0/16","Backend":{empty}}}"#);
            assert_eq!(parse(&text).unwrap().backend.kind.as_deref(), Some(""));
        }
        assert!(error(r#"{"Network":"10.3.0.0/16","Backend":7}"#).contains("Backend must be"));
        let port = parse(r#"{"Network":"10.3.0.0/16","Backend":{"Type":"udp","Port":"x"}}"#);
        assert!(port.unwrap().backend.u16_option("Port").is_err());
        let port = parse(r#"{"Network":"10.3.0.0/16","Backend":{"Type":"udp","Port":null}}"#);
        assert_eq!(port.unwrap().backend.u16_option("Port"), Ok(None), "as Go reads it");
    }

    #[test]
    fn errors_say_what_flannel_says() {
        let cases = [
            (r#"{"EnableIPv4":false}"#, "none defined stack"),
            ("{}", "please define a correct Network parameter"),
            (r#"{"Network":"fc00::/48"}"#, "invalid IPv4 CIDR format"),
            (r#"{"Network":"10.0.0.0"}"#, "invalid IPv4 CIDR format"),
            (r#"{"Network":"10.3.0.0/255.255.0.0"}"#, "invalid IPv4 CIDR format"),
            (r#"{"Network":"10.0.0.0/29"}"#, "too small. Minimum useful network prefix is /28"),
            (r#"{"Network":"10.3.0.0/16","SubnetLen":31}"#, "must be less than /31"),
            (r#"{"Network":"10.3.0.0/16","SubnetLen":17}"#, "at least four subnets"),
            (r#"{"Network":"10.3.0.0/16","SubnetLen":24.0}"#, "SubnetLen must be a whole number"),
            (r#"{"Network":"10.3.0.0/16","SubnetLen":"24"}"#, "SubnetLen must be a whole number"),
            (r#"{"Network":"10.3.0.0/16","SubnetLen":-1}"#, "SubnetLen must be a whole number"),
            (
                r#"{"Network":"10.3.0.0/16","SubnetMin":"10.4.0.0"}"#,
                "SubnetMin is not in the range of the Network",
            ),
            (
                r#"{"Network":"10.3.0.0/16","SubnetMax":"10.4.0.0"}"#,
                "SubnetMax is not in the range of the Network",
            ),
            (
                r#"{"Network":"10.3.0.0/16","SubnetMin":"10.3.1.7"}"#,
                "SubnetMin is not on a SubnetLen boundary: 10.3.1.7",
            ),
            (r#"{"EnableIPv6":true,"Network":"10.3.0.0/16"}"#, "a correct IPv6Network parameter"),
            ("[]", "not a JSON object"),
            ("{", "not JSON"),
        ];
        for (text, wanted) in cases {
            assert!(error(text).contains(wanted), "{text}: {}", error(text));
        }
    }

    proptest! {
        #[test]
        fn arbitrary_text_never_panics(text in ".{0,80}") {
            let _ = parse(&text);
        }

        #[test]
        fn arbitrary_networks_never_panic(
            address in any::<u32>(), prefix in 0u8..=40, len in 0u64..=140, v6 in any::<bool>(),
        ) {
            let ip = Ipv4Addr::from_bits(address);
            let text = if v6 {
                format!(r#"{{"EnableIPv4":false,"EnableIPv6":true,"IPv6Network":"{}/{prefix}","IPv6SubnetLen":{len}}}"#,
                    ip.to_ipv6_compatible())
            } else {
                format!(r#"{{"Network":"{ip}/{prefix}","SubnetLen":{len}}}"#)
            };
            if let Ok(config) = parse(&text) {
                for family in config.families() {
                    prop_assert!(family.network.contains(family.subnet_min));
                    prop_assert!(family.network.contains(family.subnet_max));
                }
            }
        }
    }
}
