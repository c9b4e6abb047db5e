//! Routes: what leads to peers, what is discarded, and which way a packet would take.

use std::net::IpAddr;

use futures_util::TryStreamExt;
use ipnetwork::IpNetwork;
use rtnetlink::packet_route::AddressFamily;
use rtnetlink::packet_route::route::{
    RouteAddress, RouteAttribute, RouteFlags, RouteHeader, RouteMessage, RouteProtocol, RouteType,
    RouteVia,
};
use rtnetlink::{Handle, RouteMessageBuilder};
use weft_control::lease::contains;

use super::{Link, Netlink, NetlinkError, ROUTE_PROTOCOL, is_gone};

/// Whose a route is: weft's, or flannel's and whatever is made by hand.
const OURS: RouteProtocol = RouteProtocol::Other(ROUTE_PROTOCOL);
const FLANNELS: RouteProtocol = RouteProtocol::Boot;

/// A route with this metric comes after whatever else leads to the same network, such as a bridge
/// with the containers.
const LAST_METRIC: u32 = u32::MAX - 1;

/// The metric of IPv6 routes that are made without one (IP6_RT_PRIO_USER in linux/ipv6_route.h).
const IPV6_METRIC: u32 = 1024;

/// A route to a peer's subnet by way of a neighbour.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct GatewayRoute {
    pub destination: IpNetwork,
    pub gateway: IpAddr,
    /// The index of the link that the neighbour is on.
    pub link: u32,
    /// The neighbour is on the link though no other route says so.
    pub onlink: bool,
}

/// A route of the main table, as far as weft compares it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct KernelRoute {
    pub destination: IpNetwork,
    pub gateway: Option<IpAddr>,
    pub link: Option<u32>,
    /// The number in `/etc/iproute2/rt_protos`.
    pub protocol: u8,
    /// Of routes to one network, the one with the lowest is taken.
    pub metric: u32,
}

impl KernelRoute {
    /// Whether it is in the way of weft's route to the same network, and not merely behind it.
    pub fn precedes_ours(&self) -> bool {
        self.metric <= metric(self.destination)
    }
}

impl Netlink {
    /// The unicast routes of the main table, both families, in the kernel's order.
    pub fn routes(&self) -> Result<Vec<KernelRoute>, NetlinkError> {
        self.dump_routes("route show", main_unicast_route)
    }

    /// What `pick` makes of all routes of both families, in the kernel's order.
    fn dump_routes<T>(
        &self,
        command: &str,
        pick: impl Fn(&RouteMessage) -> Option<T>,
    ) -> Result<Vec<T>, NetlinkError> {
        self.call(command, async {
            let mut routes = Vec::new();
            for family in [AddressFamily::Inet, AddressFamily::Inet6] {
                let mut request = RouteMessage::default();
                request.header.address_family = family;
                let mut answers = self.handle.route().get(request).execute();
                while let Some(message) = answers.try_next().await? {
                    routes.extend(pick(&message));
                }
            }
            Ok(routes)
        })
    }

    /// Adds, or replaces, the route to `destination` out of `link`.
    pub fn set_route(&self, destination: IpNetwork, link: &Link) -> Result<(), NetlinkError> {
        self.call(&format!("route replace {destination} dev {}", link.name), async {
            let message =
                message_to(destination)?.output_interface(link.index).protocol(OURS).build();
            self.handle.route().add(message).replace().execute().await
        })
    }

    /// Adds, or replaces, routes by way of neighbours, many at once. Goes on past those that the
    /// kernel refuses, and says which and why.
    pub fn set_gateway_routes(&self, routes: &[GatewayRoute]) -> Vec<(GatewayRoute, NetlinkError)> {
        self.each(routes, |route| {
            let GatewayRoute { destination, gateway, link, onlink } = *route;
            let handle = self.handle.route();
            let set = async move { handle.add(gateway_route(route)?).replace().execute().await };
            let command = move || {
                let onlink = if onlink { " onlink" } else { "" };
                format!("route replace {destination} via {gateway} dev {}{onlink}", name_of(link))
            };
            (set, command)
        })
    }

    /// Removes routes, many at once; one that is gone already is no error.
    pub fn remove_routes(&self, routes: &[KernelRoute]) -> Vec<(KernelRoute, NetlinkError)> {
        let refused = self.each(routes, |route| {
            let handle = self.handle.route();
            let remove = async move { handle.del(kernel_route(route)?).execute().await };
            (remove, move || format!("route del {} proto {}", route.destination, route.protocol))
        });
        refused.into_iter().filter(|(_, error)| !is_gone(&error.reason)).collect()
    }

    /// The networks that weft has had discarded where no better route takes them.
    pub fn blackholes(&self) -> Result<Vec<IpNetwork>, NetlinkError> {
        let mut found = self.all_blackholes()?;
        found.retain(|(_, protocol)| *protocol == OURS);
        Ok(found.into_iter().map(|(network, _)| network).collect())
    }

    fn all_blackholes(&self) -> Result<Vec<(IpNetwork, RouteProtocol)>, NetlinkError> {
        self.dump_routes("route show type blackhole", main_blackhole)
    }

    /// Makes these networks, and no others that weft has in the `territory`, be discarded where no better
    /// route takes them. flannel's route for the same, which comes before any bridge that is made later, goes.
    pub fn keep_blackholes(
        &self,
        wanted: &[IpNetwork],
        territory: &[IpNetwork],
    ) -> Result<(), NetlinkError> {
        let found = self.all_blackholes()?;
        for network in wanted.iter().filter(|network| !found.contains(&(**network, OURS))) {
            let message = blackhole(*network);
            self.call(&format!("route add blackhole {network} metric {LAST_METRIC}"), async {
                self.handle.route().add(message?).execute().await
            })?;
        }
        for (network, protocol) in found {
            let is_inside = territory.iter().any(|territory| contains(*territory, network));
            match (protocol, wanted.contains(&network)) {
                (OURS, false) if is_inside => self.remove_blackhole(network)?,
                (FLANNELS, true) => self.delete_blackhole(network, flannels_blackhole(network))?,
                _ => {}
            }
        }
        Ok(())
    }

    /// Removes one of weft's.
    pub fn remove_blackhole(&self, network: IpNetwork) -> Result<(), NetlinkError> {
        self.delete_blackhole(network, blackhole(network))
    }

    fn delete_blackhole(
        &self,
        network: IpNetwork,
        message: Result<RouteMessage, rtnetlink::Error>,
    ) -> Result<(), NetlinkError> {
        self.call(&format!("route del blackhole {network}"), async {
            self.handle.route().del(message?).execute().await
        })
    }

    /// How packets to `ip` leave.
    pub fn way_out(&self, ip: IpAddr) -> Result<WayOut, NetlinkError> {
        self.call(&format!("route get {ip}"), way_out(&self.handle, ip))
    }

    /// For each address the link that it is on, where packets to it pass no router; many at once.
    pub fn links_of(&self, addresses: &[IpAddr]) -> Vec<(IpAddr, Option<u32>)> {
        self.many(addresses.iter().map(|ip| async move {
            // An address that no route leads to is on no link.
            let way = way_out(&self.handle, *ip).await.ok();
            Some((*ip, way.filter(|way| way.is_on_link).and_then(|way| way.link)))
        }))
    }
}

/// How the kernel would have packets to an address leave this host.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct WayOut {
    /// The link that they leave by.
    pub link: Option<u32>,
    /// The address that they leave from.
    pub source: Option<IpAddr>,
    /// The router that they are handed to.
    pub gateway: Option<IpAddr>,
    /// They pass no router, and do not stay on this host.
    pub is_on_link: bool,
}

async fn way_out(handle: &Handle, ip: IpAddr) -> Result<WayOut, rtnetlink::Error> {
    let mut answers = handle.route().get(message_to(ip.into())?.build()).execute();
    let mut way = WayOut::default();
    if let Some(message) = answers.try_next().await? {
        way.is_on_link = message.header.kind == RouteType::Unicast;
        for attribute in &message.attributes {
            if let RouteAttribute::Oif(index) = attribute {
                way.link = Some(*index);
            } else if let RouteAttribute::PrefSource(address) = attribute {
                way.source = self::ip(address);
            } else if let RouteAttribute::Gateway(address) = attribute {
                (way.gateway, way.is_on_link) = (self::ip(address), false);
            } else if let RouteAttribute::Via(via) = attribute {
                if let RouteVia::Inet6(address) = via {
                    way.gateway = Some(IpAddr::V6(*address));
                }
                way.is_on_link = false;
            }
        }
    }
    Ok(way)
}

/// A link's name, for people.
fn name_of(index: u32) -> String {
    use rustix::net::{AddressFamily, SocketType, netdevice::index_to_name, socket};
    let socket = socket(AddressFamily::INET, SocketType::DGRAM, None);
    let name = socket.and_then(|socket| index_to_name(socket, index));
    name.unwrap_or_else(|_| format!("(gone, it was number {index})"))
}

/// The metric that the kernel gives weft's route to this network.
pub(crate) fn metric(destination: IpNetwork) -> u32 {
    if destination.is_ipv6() { IPV6_METRIC } else { 0 }
}

/// Whether it is a route of the main table that counts for whatever goes to its network: not for packets of
/// one TOS only, and none of the exceptions (path MTUs, redirects) that the kernel lists among them
/// (rtnetlink(7), `RTM_F_CLONED`; fib_dump_info_fnhe in net/ipv4/route.c).
fn is_for_all(header: &RouteHeader) -> bool {
    let is_exception = header.flags.contains(RouteFlags::Cloned);
    header.table == RouteHeader::RT_TABLE_MAIN && header.tos == 0 && !is_exception
}

fn main_unicast_route(message: &RouteMessage) -> Option<KernelRoute> {
    let header = &message.header;
    if header.kind != RouteType::Unicast || !is_for_all(header) {
        return None;
    }
    let unspecified = if header.address_family == AddressFamily::Inet6 {
        IpAddr::from([0u16; 8])
    } else {
        IpAddr::from([0u8; 4])
    };
    let (mut destination, mut gateway, mut link, mut metric) = (unspecified, None, None, 0);
    for attribute in &message.attributes {
        if let RouteAttribute::Destination(address) = attribute {
            destination = ip(address)?;
        } else if let RouteAttribute::Gateway(address) = attribute {
            gateway = ip(address);
        } else if let RouteAttribute::Via(RouteVia::Inet6(address)) = attribute {
            // Of an IPv4 route.
            gateway = Some(IpAddr::V6(*address));
        } else if let RouteAttribute::Oif(index) = attribute {
            link = Some(*index);
        } else if let RouteAttribute::Priority(found) = attribute {
            metric = *found;
        }
    }
    let destination = IpNetwork::new(destination, header.destination_prefix_length).ok()?;
    Some(KernelRoute { destination, gateway, link, protocol: header.protocol.into(), metric })
}

/// About routes of the main table to a network.
fn message_to(network: IpNetwork) -> Result<RouteMessageBuilder<IpAddr>, rtnetlink::Error> {
    RouteMessageBuilder::<IpAddr>::new()
        .destination_prefix(network.network(), network.prefix())
        .map_err(|_| rtnetlink::Error::RequestFailed)
}

fn gateway_route(route: &GatewayRoute) -> Result<RouteMessage, rtnetlink::Error> {
    let message = message_to(route.destination)?
        .gateway(route.gateway)
        .map_err(|_| rtnetlink::Error::RequestFailed)?
        .output_interface(route.link)
        .protocol(OURS);
    Ok(if route.onlink { message.onlink() } else { message }.build())
}

fn kernel_route(route: &KernelRoute) -> Result<RouteMessage, rtnetlink::Error> {
    let KernelRoute { destination, gateway, link, protocol, metric } = *route;
    let mut message = message_to(destination)?.protocol(protocol.into()).priority(metric);
    if let Some(gateway) = gateway {
        message = message.gateway(gateway).map_err(|_| rtnetlink::Error::RequestFailed)?;
    }
    if let Some(link) = link {
        message = message.output_interface(link);
    }
    Ok(message.build())
}

fn blackhole(network: IpNetwork) -> Result<RouteMessage, rtnetlink::Error> {
    let mut message = flannels_blackhole(network)?;
    message.header.protocol = OURS;
    message.attributes.push(RouteAttribute::Priority(LAST_METRIC));
    Ok(message)
}

/// Of the kernel's own metric.
fn flannels_blackhole(network: IpNetwork) -> Result<RouteMessage, rtnetlink::Error> {
    Ok(message_to(network)?.kind(RouteType::BlackHole).protocol(FLANNELS).build())
}

fn main_blackhole(message: &RouteMessage) -> Option<(IpNetwork, RouteProtocol)> {
    let header = &message.header;
    if header.kind != RouteType::BlackHole || !is_for_all(header) {
        return None;
    }
    let destination = message.attributes.iter().find_map(|attribute| {
        if let RouteAttribute::Destination(address) = attribute { ip(address) } else { None }
    });
    let network = IpNetwork::new(destination?, header.destination_prefix_length).ok()?;
    Some((network, header.protocol))
}

fn ip(address: &RouteAddress) -> Option<IpAddr> {
    if let RouteAddress::Inet(ip) = address {
        Some(IpAddr::V4(*ip))
    } else if let RouteAddress::Inet6(ip) = address {
        Some(IpAddr::V6(*ip))
    } else {
        None
    }
}
