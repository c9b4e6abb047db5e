//! What a container runtime takes from subnet.env: addresses and the MTU (flannel section 4).

use std::fs;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::path::Path;

use anyhow::{Context, bail};
use ipnetwork::IpNetwork;

/// The values for `--bip` and `--mtu`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct SubnetEnv {
    /// The bridge's addresses with their prefix length, IPv4 first.
    pub(super) gateways: Vec<IpNetwork>,
    /// The MTU of bridge and container.
    pub(super) mtu: u32,
}

impl SubnetEnv {
    /// Reads the file that a daemon wrote.
    pub(super) fn read(path: &Path) -> anyhow::Result<Self> {
        let text =
            fs::read_to_string(path).with_context(|| format!("cannot read {}", path.display()))?;
        parse(&text).with_context(|| format!("cannot use {}", path.display()))
    }
}

fn parse(text: &str) -> anyhow::Result<SubnetEnv> {
    let value = |key: &str| {
        let mut pairs = text.lines().filter_map(|line| line.trim().split_once('='));
        pairs.find_map(|(name, value)| (name == key).then_some(value))
    };
    let mut gateways = Vec::new();
    for key in ["FLANNEL_SUBNET", "FLANNEL_IPV6_SUBNET"] {
        let Some(text) = value(key) else { continue };
        gateways.push(text.parse().with_context(|| format!("{key}={text} is no subnet"))?);
    }
    if gateways.is_empty() {
        bail!("it has neither FLANNEL_SUBNET nor FLANNEL_IPV6_SUBNET");
    }
    let mtu = value("FLANNEL_MTU").context("it has no FLANNEL_MTU")?;
    let mtu = mtu.parse().with_context(|| format!("FLANNEL_MTU={mtu} is no number"))?;
    Ok(SubnetEnv { gateways, mtu })
}

/// The address that the first container behind `gateway` gets.
pub(super) fn first_container(gateway: IpNetwork) -> anyhow::Result<IpNetwork> {
    let next: Option<IpAddr> = match gateway.ip() {
        IpAddr::V4(ip) => u32::from(ip).checked_add(1).map(|bits| Ipv4Addr::from(bits).into()),
        IpAddr::V6(ip) => u128::from(ip).checked_add(1).map(|bits| Ipv6Addr::from(bits).into()),
    };
    next.filter(|address| gateway.contains(*address))
        .and_then(|address| IpNetwork::new(address, gateway.prefix()).ok())
        .with_context(|| format!("{gateway} has no room for a container"))
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
        let containers: Vec<_> =
            found.gateways.iter().map(|gw| first_container(*gw).unwrap().to_string()).collect();
        assert_eq!(containers, ["10.42.7.2/24", "fd00:42:0:7::2/64"]);
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

    #[test]
    fn a_subnet_of_one_address_holds_no_container() {
        assert!(first_container("10.42.7.1/32".parse().unwrap()).is_err());
        assert!(first_container("255.255.255.255/24".parse().unwrap()).is_err());
    }
}
