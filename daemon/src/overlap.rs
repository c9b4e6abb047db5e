//! What on this host lies inside the overlay's Network and must not, or should lie elsewhere in it.

use std::net::IpAddr;

use weft_backends::ExternalInterface;
use weft_backends::netlink::{KernelRoute, Link};
use weft_control::{LeaseKey, NetworkConfig};

use crate::flags::RegistrySettings;

/// Why the overlay would cut this host off: packets to the address that is named would go into it.
pub(crate) fn conflict(
    config: &NetworkConfig,
    interface: &ExternalInterface,
    routes: &[KernelRoute],
    registry: &RegistrySettings,
) -> Option<String> {
    let name = &interface.name;
    let own = interface.addresses().chain(interface.other_addresses.iter().copied());
    let own = own.map(|ip| (ip, format!("an address of the external interface {name}")));
    let gateways = routes.iter().filter(|route| route.link == Some(interface.index));
    let gateways = gateways.filter_map(|route| route.gateway);
    let gateways = gateways.map(|ip| (ip, format!("a gateway on {name}")));
    let servers = servers(registry).into_iter().map(|ip| (ip, "an endpoint of etcd".to_owned()));
    own.chain(gateways).chain(servers).find_map(|(ip, what)| {
        let network = config.networks().find(|it| it.contains(ip))?;
        Some(format!(
            "the Network {network} of the network config contains {ip}, {what}: packets to it would \
             go into the overlay; choose another Network"
        ))
    })
}

/// The endpoints that are named by address.
fn servers(registry: &RegistrySettings) -> Vec<IpAddr> {
    let RegistrySettings::Etcd { access, .. } = registry else {
        return Vec::new();
    };
    let address = |endpoint: &String| {
        let rest = endpoint.split_once("://").map_or(endpoint.as_str(), |(_, rest)| rest);
        let host = rest.split('/').next()?;
        let host = host.strip_prefix('[').map_or_else(
            || host.rsplit_once(':').map_or(host, |(host, _)| host),
            |ipv6| ipv6.split(']').next().unwrap_or(ipv6),
        );
        host.parse().ok()
    };
    access.endpoints.iter().filter_map(address).collect()
}

/// Devices, but for ours, whose containers nobody reaches: their addresses lie in the Network, but not in our
/// subnet, as after a change of the lease.
pub(crate) fn strays(
    config: &NetworkConfig,
    lease: &LeaseKey,
    links: &[Link],
    ours: &[&str],
) -> Vec<String> {
    let mut strays = Vec::new();
    for link in links.iter().filter(|link| !ours.contains(&link.name.as_str())) {
        for address in &link.addresses {
            let ip = address.network.ip();
            let in_network = config.networks().any(|network| network.contains(ip));
            if in_network && !lease.networks().any(|subnet| subnet.contains(ip)) {
                strays.push(format!(
                    "{} has the address {ip}, which lies in the Network but not in our subnet {lease}: \
                     its containers cannot be reached; restart the container runtime with the subnet \
                     in subnet.env",
                    link.name
                ));
            }
        }
    }
    strays
}

#[cfg(test)]
mod tests {
    use weft_backends::netlink::LinkAddress;
    use weft_control::Access;

    use super::*;
    use crate::flags::EtcdApi;

    fn config() -> NetworkConfig {
        r#"{"Network":"10.0.0.0/8"}"#.parse().unwrap()
    }

    fn etcd(endpoint: &str) -> RegistrySettings {
        let access = Access { endpoints: vec![endpoint.into()], ..Access::default() };
        RegistrySettings::Etcd { access, prefix: "/x".into(), api: EtcdApi::Auto }
    }

    fn interface(ip: [u8; 4]) -> ExternalInterface {
        ExternalInterface {
            name: "eth0".into(),
            index: 2,
            mtu: 1500,
            ipv4: Some(ip.into()),
            ipv6: None,
            public_ipv4: Some(ip.into()),
            public_ipv6: None,
            other_addresses: Vec::new(),
            link_local: None,
        }
    }

    #[test]
    fn what_the_overlay_would_swallow_is_named() {
        let route = |gateway: &str, link| KernelRoute {
            destination: "0.0.0.0/0".parse().unwrap(),
            gateway: gateway.parse().ok(),
            link: Some(link),
            protocol: 3,
            metric: 0,
        };
        let found = |interface, gateway, link, endpoint| {
            conflict(&config(), &interface, &[route(gateway, link)], &etcd(endpoint))
        };
        let (inside, outside) = (interface([10, 1, 2, 3]), interface([192, 0, 2, 3]));
        let server = "http://192.0.2.1:2379";
        assert!(
            found(inside, "", 2, server).unwrap().contains("10.1.2.3, an address of the external")
        );
        let gateway = found(outside.clone(), "10.0.0.1", 2, server).unwrap();
        assert!(gateway.contains("10.0.0.1, a gateway on eth0"), "{gateway}");
        assert_eq!(found(outside.clone(), "10.0.0.1", 7, server), None, "not the external one");
        for endpoint in ["http://10.9.9.9:2379", "10.9.9.9:2379", "https://10.9.9.9:2379/"] {
            let etcd = found(outside.clone(), "", 2, endpoint).unwrap();
            assert!(etcd.contains("10.9.9.9, an endpoint of etcd"), "{etcd}");
        }
        for endpoint in ["http://[2001:db8::1]:2379", "https://etcd.example:2379"] {
            assert_eq!(found(outside.clone(), "192.0.2.1", 2, endpoint), None);
        }
    }

    #[test]
    fn a_bridge_of_an_earlier_lease_is_named() {
        let link = |name: &str, address: &str| Link {
            index: 3,
            name: name.into(),
            mtu: 1500,
            up: true,
            addresses: vec![LinkAddress {
                network: address.parse().unwrap(),
                link_local: false,
                permanent: true,
                temporary: false,
                deprecated: false,
            }],
            ..Link::default()
        };
        let links = [
            link("docker0", "10.3.7.1/24"),
            link("cni0", "10.3.8.1/24"),
            link("eth0", "192.0.2.1/24"),
            link("flannel0", "10.3.9.0/32"),
        ];
        let strays = strays(&config(), &"10.3.7.0-24".parse().unwrap(), &links, &["flannel0"]);
        assert_eq!(strays.len(), 1);
        assert!(strays[0].starts_with("cni0 has the address 10.3.8.1"), "{strays:?}");
    }
}
