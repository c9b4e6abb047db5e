//! What a container runtime takes from subnet.env.

use std::fs;
use std::path::Path;

use anyhow::{Context, bail};
use ipnetwork::IpNetwork;

/// What the file hands to a container runtime.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Handed {
    /// The whole overlay, of each family.
    pub(crate) networks: Vec<IpNetwork>,
    /// The bridge's addresses with their prefix length, IPv4 first.
    pub(crate) gateways: Vec<IpNetwork>,
    /// The MTU of bridge and container.
    pub(crate) mtu: u32,
    /// Whether packets that leave the overlay are masqueraded already.
    pub(crate) ip_masq: bool,
}

impl Handed {
    /// Reads the file that weftd or flanneld wrote.
    ///
    /// # Errors
    /// It is missing, or lacks something, or something in it is not what it should be.
    pub(crate) fn read(path: &Path) -> anyhow::Result<Self> {
        let text = fs::read_to_string(path)
            .with_context(|| format!("cannot read {}, which weftd writes", path.display()))?;
        parse(&text).with_context(|| format!("cannot use {}", path.display()))
    }
}

fn parse(text: &str) -> anyhow::Result<Handed> {
    let value = |key: &str| {
        let mut pairs = text.lines().filter_map(|line| line.trim().split_once('='));
        pairs.find_map(|(name, value)| (name == key).then_some(value))
    };
    let both = |keys: [&str; 2]| -> anyhow::Result<Vec<IpNetwork>> {
        let found = keys.into_iter().filter_map(|key| Some((key, value(key)?)));
        found
            .map(|(key, text)| text.parse().with_context(|| format!("{key}={text} is no subnet")))
            .collect()
    };
    let networks = both(["FLANNEL_NETWORK", "FLANNEL_IPV6_NETWORK"])?;
    let gateways = both(["FLANNEL_SUBNET", "FLANNEL_IPV6_SUBNET"])?;
    if gateways.is_empty() {
        bail!("it has neither FLANNEL_SUBNET nor FLANNEL_IPV6_SUBNET");
    }
    let mtu = value("FLANNEL_MTU").context("it has no FLANNEL_MTU")?;
    let mtu = mtu.parse().with_context(|| format!("FLANNEL_MTU={mtu} is no number"))?;
    let ip_masq = value("FLANNEL_IPMASQ") == Some("true");
    Ok(Handed { networks, gateways, mtu, ip_masq })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_both_families() {
        let text = "FLANNEL_NETWORK=10.42.0.0/16\nFLANNEL_SUBNET=10.42.7.1/24\n\
                    FLANNEL_IPV6_NETWORK=fd00:42::/56\nFLANNEL_IPV6_SUBNET=fd00:42:0:7::1/64\n\
                    FLANNEL_MTU=1472\nFLANNEL_IPMASQ=false\n";
        let found = parse(text).unwrap();
        let gateways: Vec<_> = found.gateways.iter().map(ToString::to_string).collect();
        assert_eq!(gateways, ["10.42.7.1/24", "fd00:42:0:7::1/64"]);
        assert_eq!(found.mtu, 1472);
        assert_eq!(found.networks.len(), 2);
        assert!(!found.ip_masq);
    }

    #[test]
    fn says_what_is_missing_or_wrong() {
        for (text, complaint) in [
            ("", "neither FLANNEL_SUBNET"),
            ("FLANNEL_SUBNET=10.42.7.1/24\n", "no FLANNEL_MTU"),
            ("FLANNEL_SUBNET=ten/24\nFLANNEL_MTU=1472\n", "FLANNEL_SUBNET=ten/24"),
            ("FLANNEL_SUBNET=10.42.7.1/24\nFLANNEL_MTU=-1\n", "FLANNEL_MTU=-1"),
        ] {
            let error = parse(text).unwrap_err().to_string();
            assert!(error.contains(complaint), "{error}");
        }
    }
}
