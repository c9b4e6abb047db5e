//! Neighbours and, for VXLAN devices, forwarding entries (FDB): one kind of message to the kernel.

use std::net::IpAddr;

use futures_util::TryStreamExt;
use rtnetlink::packet_route::AddressFamily;
use rtnetlink::packet_route::neighbour::{
    NeighbourAddress, NeighbourAttribute, NeighbourFlags, NeighbourMessage,
};

use super::{Netlink, NetlinkError, is_gone};
use crate::mac::Mac;

/// NUD_NOARP and NUD_PERMANENT: set by somebody, not learned (include/uapi/linux/neighbour.h).
const STATIC: u16 = 0xc0;
/// NUD_PERMANENT. The kernel itself has neighbours of NUD_NOARP, such as multicast groups.
const PERMANENT: u16 = 0x80;

/// The MAC of an address on a link.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Neighbour {
    pub link: u32,
    pub ip: IpAddr,
    pub mac: Mac,
}

/// Where a VXLAN device sends packets for a MAC.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct FdbEntry {
    pub link: u32,
    pub mac: Mac,
    pub destination: IpAddr,
}

impl Netlink {
    /// The neighbours of these links that somebody has set.
    pub fn neighbours(&self, links: &[u32]) -> Result<Vec<Neighbour>, NetlinkError> {
        self.call("neighbour show nud permanent", async {
            let mut found = Vec::new();
            for family in [AddressFamily::Inet, AddressFamily::Inet6] {
                for link in links {
                    let mut request = self.handle.neighbours().get().set_address_family(family);
                    request.message_mut().attributes.push(NeighbourAttribute::IfIndex(*link));
                    let mut answers = request.execute();
                    while let Some(message) = answers.try_next().await? {
                        found.extend(neighbour(&message).filter(|it| it.link == *link));
                    }
                }
            }
            Ok(found)
        })
    }

    /// Adds, or replaces, neighbours, many at once. Goes on past those that the kernel refuses, and
    /// says which and why.
    pub fn set_neighbours(&self, neighbours: &[Neighbour]) -> Vec<(Neighbour, NetlinkError)> {
        self.each(neighbours, |it| {
            let command =
                move || format!("neighbour replace {} lladdr {} nud permanent", it.ip, it.mac);
            let request = self.handle.neighbours().add(it.link, it.ip);
            (request.link_layer_address(&it.mac.0).replace().execute(), command)
        })
    }

    /// Removes neighbours; one that is gone already is no error.
    pub fn remove_neighbours(&self, neighbours: &[Neighbour]) -> Vec<(Neighbour, NetlinkError)> {
        let refused = self.each(neighbours, |it| {
            let mut message = NeighbourMessage::default();
            message.header.family =
                if it.ip.is_ipv6() { AddressFamily::Inet6 } else { AddressFamily::Inet };
            message.header.ifindex = it.link;
            message.attributes.push(NeighbourAttribute::Destination(it.ip.into()));
            let command = move || format!("neighbour del {}", it.ip);
            (self.handle.neighbours().del(message).execute(), command)
        });
        refused.into_iter().filter(|(_, error)| !is_gone(&error.reason)).collect()
    }

    /// The forwarding entries of these links that somebody has set.
    pub fn fdb(&self, links: &[u32]) -> Result<Vec<FdbEntry>, NetlinkError> {
        self.call("neighbour show (bridge fdb show)", async {
            let request = self.handle.neighbours().get().set_address_family(AddressFamily::Bridge);
            let mut answers = request.execute();
            let mut found = Vec::new();
            while let Some(message) = answers.try_next().await? {
                found.extend(fdb_entry(&message).filter(|it| links.contains(&it.link)));
            }
            Ok(found)
        })
    }

    /// As [`Self::set_neighbours`]. An entry takes the place of one of the same MAC.
    pub fn set_fdb(&self, entries: &[FdbEntry]) -> Vec<(FdbEntry, NetlinkError)> {
        self.each(entries, |it| {
            let command = move || format!("bridge fdb replace {} dst {}", it.mac, it.destination);
            let request = self.handle.neighbours().add_bridge(it.link, &it.mac.0);
            let request = request.flags(NeighbourFlags::Own).destination(it.destination);
            (request.replace().execute(), command)
        })
    }

    /// As [`Self::remove_neighbours`].
    pub fn remove_fdb(&self, entries: &[FdbEntry]) -> Vec<(FdbEntry, NetlinkError)> {
        let refused = self.each(entries, |it| {
            let mut message = NeighbourMessage::default();
            message.header.family = AddressFamily::Bridge;
            message.header.ifindex = it.link;
            message.header.flags = NeighbourFlags::Own;
            message.attributes.push(NeighbourAttribute::LinkLayerAddress(it.mac.0.to_vec()));
            message.attributes.push(NeighbourAttribute::Destination(it.destination.into()));
            let command = move || format!("bridge fdb del {} dst {}", it.mac, it.destination);
            (self.handle.neighbours().del(message).execute(), command)
        });
        refused.into_iter().filter(|(_, error)| !is_gone(&error.reason)).collect()
    }
}

fn neighbour(message: &NeighbourMessage) -> Option<Neighbour> {
    let ip = if let NeighbourAddress::Inet(ip) = destination(message)? {
        IpAddr::V4(*ip)
    } else if let NeighbourAddress::Inet6(ip) = destination(message)? {
        IpAddr::V6(*ip)
    } else {
        return None;
    };
    let is_set = u16::from(message.header.state) & PERMANENT != 0;
    is_set.then_some(Neighbour { link: message.header.ifindex, ip, mac: mac(message)? })
}

fn fdb_entry(message: &NeighbourMessage) -> Option<FdbEntry> {
    // The family says bridge, so the address is bytes of either.
    let NeighbourAddress::Other(bytes) = destination(message)? else { return None };
    let ipv4 = <[u8; 4]>::try_from(bytes.as_slice()).map(IpAddr::from);
    let destination =
        ipv4.or_else(|_| <[u8; 16]>::try_from(bytes.as_slice()).map(IpAddr::from)).ok()?;
    let mac = mac(message)?;
    let is_set = u16::from(message.header.state) & STATIC != 0;
    let link = message.header.ifindex;
    (is_set && mac.is_unicast()).then_some(FdbEntry { link, mac, destination })
}

fn destination(message: &NeighbourMessage) -> Option<&NeighbourAddress> {
    message.attributes.iter().find_map(|attribute| {
        if let NeighbourAttribute::Destination(address) = attribute { Some(address) } else { None }
    })
}

fn mac(message: &NeighbourMessage) -> Option<Mac> {
    message.attributes.iter().find_map(|attribute| {
        if let NeighbourAttribute::LinkLayerAddress(bytes) = attribute {
            <[u8; 6]>::try_from(bytes.as_slice()).ok().map(Mac)
        } else {
            None
        }
    })
}
