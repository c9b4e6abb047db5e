//! The one place that speaks rtnetlink: links, addresses, routes and neighbours of the network
//! namespace that the process lives in.
//!
//! Calls block; each drives a small runtime of this module's own, so backends stay plain code.

mod neighbours;
mod routes;
mod vxlan;

use std::fmt;
use std::fs;
use std::io;

use futures_util::{StreamExt, TryStreamExt, future, stream};
use ipnetwork::IpNetwork;
use rtnetlink::packet_route::address::{
    AddressAttribute, AddressFlags, AddressHeaderFlags, AddressMessage, AddressScope,
};
use rtnetlink::packet_route::link::{InfoData, LinkAttribute, LinkFlags, LinkInfo, LinkMessage};
use rtnetlink::{Handle, LinkUnspec};
use rustix::io::Errno;
use tokio::runtime::{Builder, Runtime};

use crate::mac::Mac;

pub use self::neighbours::{FdbEntry, Neighbour};
pub(crate) use self::routes::metric;
pub use self::routes::{GatewayRoute, KernelRoute, WayOut};
pub use self::vxlan::VxlanShape;

/// Marks the routes that weft made (`ip route` shows it as `proto 119`). No routing daemon in
/// iproute2's `rt_protos` uses this number.
pub const ROUTE_PROTOCOL: u8 = 119;

/// Marks the links that weft made (`ip link` shows it as `alias weft`).
pub const LINK_ALIAS: &str = "weft";

/// Requests that wait for an answer at one time.
const IN_FLIGHT: usize = 64;

/// A network interface.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Link {
    pub index: u32,
    pub name: String,
    /// Bytes of an IP packet.
    pub mtu: u32,
    /// Administratively up; says nothing about the carrier.
    pub up: bool,
    /// Up, with a cable in it or what stands for one (IFF_LOWER_UP).
    pub carrier: bool,
    /// Packets that may wait in it.
    pub queue_len: u32,
    pub alias: Option<String>,
    pub mac: Option<Mac>,
    /// What it is, where it is more than a network card: `vxlan`, `bridge`, …
    pub kind: Option<String>,
    /// What it was made with, if it is a VXLAN device.
    pub vxlan: Option<VxlanShape>,
    /// In the kernel's order.
    pub addresses: Vec<LinkAddress>,
}

impl Link {
    /// What keeps packets from leaving by it, if anything does.
    pub fn fault(&self) -> Option<&'static str> {
        match (self.up, self.carrier) {
            (false, _) => Some("is down"),
            (true, false) => Some("has no carrier"),
            (true, true) => None,
        }
    }
}

/// What a link of ours has besides weft's mark; what is absent stays as it is.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct LinkSettings {
    pub mtu: Option<u32>,
    /// Packets that may wait in it.
    pub queue_len: Option<u32>,
}

impl LinkSettings {
    fn are_those_of(self, link: &Link) -> bool {
        self.mtu.is_none_or(|mtu| mtu == link.mtu)
            && self.queue_len.is_none_or(|len| len == link.queue_len)
    }
}

/// An address of a link, with what makes one address a better choice than another.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LinkAddress {
    /// The address (not the base of its network) and the prefix length.
    pub network: IpNetwork,
    /// Reaches the own link only.
    pub link_local: bool,
    /// Set by hand, not by DHCP or router advertisements.
    pub permanent: bool,
    /// An IPv6 privacy address, replaced after some hours.
    pub temporary: bool,
    /// Its preferred lifetime is over.
    pub deprecated: bool,
}

/// What the kernel has counted at a link: `tx` is what it was given to send.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct LinkCounters {
    pub rx_packets: u64,
    pub tx_packets: u64,
    pub rx_bytes: u64,
    pub tx_bytes: u64,
    pub rx_dropped: u64,
    pub tx_dropped: u64,
}

/// A request that the kernel refused, in the words of the `ip` command that would do the same.
#[derive(Debug, thiserror::Error)]
#[error("`ip {command}` was refused by the kernel: {reason}")]
pub struct NetlinkError {
    command: String,
    reason: io::Error,
}

/// A connection to the kernel's rtnetlink.
pub struct Netlink {
    runtime: Runtime,
    handle: Handle,
}

impl fmt::Debug for Netlink {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Netlink").finish_non_exhaustive()
    }
}

impl Netlink {
    /// Opens a netlink socket in the network namespace of the calling thread.
    ///
    /// # Errors
    /// The kernel refused the socket.
    pub fn open() -> io::Result<Self> {
        let runtime = Builder::new_current_thread().enable_io().build()?;
        let handle = {
            let _entered = runtime.enter();
            let (connection, handle, _events) = rtnetlink::new_connection()?;
            runtime.spawn(connection);
            handle
        };
        Ok(Self { runtime, handle })
    }

    /// All links with their addresses, in the kernel's order.
    pub fn links(&self) -> Result<Vec<Link>, NetlinkError> {
        self.call("address show", async {
            let mut links: Vec<Link> =
                self.handle.link().get().execute().map_ok(link).try_collect().await?;
            let mut addresses = self.handle.address().get().execute();
            while let Some(message) = addresses.try_next().await? {
                let owner = links.iter_mut().find(|link| link.index == message.header.index);
                if let (Some(owner), Some(address)) = (owner, link_address(&message)) {
                    owner.addresses.push(address);
                }
            }
            Ok(links)
        })
    }

    /// What the kernel has counted at a link.
    pub fn link_counters(&self, name: &str) -> Result<LinkCounters, NetlinkError> {
        let found = self.call(&format!("-s link show {name}"), async {
            self.handle.link().get().match_name(name.to_owned()).execute().try_next().await
        })?;
        let attributes = found.into_iter().flat_map(|message| message.attributes);
        let mut counters = attributes.filter_map(|attribute| {
            let LinkAttribute::Stats64(found) = attribute else { return None };
            Some(LinkCounters {
                rx_packets: found.rx_packets,
                tx_packets: found.tx_packets,
                rx_bytes: found.rx_bytes,
                tx_bytes: found.tx_bytes,
                rx_dropped: found.rx_dropped,
                tx_dropped: found.tx_dropped,
            })
        });
        Ok(counters.next().unwrap_or_default())
    }

    /// Gives the link an address, and says whether it had not got it yet.
    pub fn set_address(&self, link: &Link, address: IpNetwork) -> Result<bool, NetlinkError> {
        if link.addresses.iter().any(|it| it.network == address) {
            return Ok(false);
        }
        if address.is_ipv6() {
            allow_ipv6(&link.name);
        }
        self.call(&format!("address replace {address} dev {}", link.name), async {
            let request = self.handle.address().add(link.index, address.ip(), address.prefix());
            request.replace().execute().await
        })?;
        Ok(true)
    }

    /// Takes an address from the link.
    pub fn remove_address(&self, link: &Link, address: IpNetwork) -> Result<(), NetlinkError> {
        self.call(&format!("address del {address} dev {}", link.name), async {
            let mut request = self.handle.address().add(link.index, address.ip(), address.prefix());
            let message = request.message_mut().clone();
            self.handle.address().del(message).execute().await
        })
    }

    /// Brings the link up, sets what it is to have, and marks it as weft's; says whether it was not
    /// so yet.
    pub fn claim_link(&self, link: &Link, settings: LinkSettings) -> Result<bool, NetlinkError> {
        let is_ours = link.alias.as_deref() == Some(LINK_ALIAS);
        if is_ours && link.up && settings.are_those_of(link) {
            return Ok(false);
        }
        let mut command = format!("link set {} alias {LINK_ALIAS} up", link.name);
        let mut message = LinkUnspec::new_with_index(link.index).alias(LINK_ALIAS).up();
        if let Some(mtu) = settings.mtu {
            command += &format!(" mtu {mtu}");
            message = message.mtu(mtu);
        }
        if let Some(len) = settings.queue_len {
            command += &format!(" txqueuelen {len}");
            message = message.txqueuelen(len);
        }
        self.call(&command, self.handle.link().set(message.build()).execute())?;
        Ok(true)
    }

    /// Removes the link.
    pub fn remove_link(&self, link: &Link) -> Result<(), NetlinkError> {
        let request = self.handle.link().del(link.index).execute();
        self.call(&format!("link del {}", link.name), request)
    }

    /// Does one request for each, many at once; says what the kernel refused, and why.
    fn each<'a, T: Copy, W, C>(
        &self,
        items: &'a [T],
        request: impl Fn(&'a T) -> (W, C),
    ) -> Vec<(T, NetlinkError)>
    where
        W: Future<Output = Result<(), rtnetlink::Error>>,
        C: FnOnce() -> String,
    {
        self.many(items.iter().map(|item| {
            let (work, command) = request(item);
            async move {
                let refused = work.await.err()?;
                Some((*item, NetlinkError { command: command(), reason: reason(refused) }))
            }
        }))
    }

    fn many<T, F: Future<Output = Option<T>>>(&self, requests: impl Iterator<Item = F>) -> Vec<T> {
        let answers = stream::iter(requests).buffer_unordered(IN_FLIGHT);
        self.runtime.block_on(answers.filter_map(future::ready).collect())
    }

    fn call<T>(
        &self,
        command: &str,
        work: impl Future<Output = Result<T, rtnetlink::Error>>,
    ) -> Result<T, NetlinkError> {
        self.runtime
            .block_on(work)
            .map_err(|error| NetlinkError { command: command.into(), reason: reason(error) })
    }
}

/// Where a host has IPv6 off by default, a device of ours would take no address (ip-sysctl.rst,
/// disable_ipv6). If that cannot be changed, the kernel refuses the address.
fn allow_ipv6(device: &str) {
    let path = format!("/proc/sys/net/ipv6/conf/{device}/disable_ipv6");
    if fs::read_to_string(&path).is_ok_and(|value| value.trim() == "1")
        && let Err(error) = fs::write(&path, "0")
    {
        tracing::debug!("cannot set {path} to 0: {error}");
    }
}

/// What is to be removed is not there any more, or its device is not.
fn is_gone(reason: &io::Error) -> bool {
    let gone = [Errno::SRCH, Errno::NOENT, Errno::NODEV];
    gone.iter().any(|errno| reason.raw_os_error() == Some(errno.raw_os_error()))
}

fn reason(error: rtnetlink::Error) -> io::Error {
    if let rtnetlink::Error::NetlinkError(message) = error {
        return message.to_io();
    }
    io::Error::other(error)
}

fn link(message: LinkMessage) -> Link {
    let mut link = Link {
        index: message.header.index,
        up: message.header.flags.contains(LinkFlags::Up),
        carrier: message.header.flags.contains(LinkFlags::LowerUp),
        ..Link::default()
    };
    for attribute in message.attributes {
        if let LinkAttribute::IfName(name) = attribute {
            link.name = name;
        } else if let LinkAttribute::Mtu(mtu) = attribute {
            link.mtu = mtu;
        } else if let LinkAttribute::TxQueueLen(len) = attribute {
            link.queue_len = len;
        } else if let LinkAttribute::IfAlias(alias) = attribute {
            link.alias = Some(alias);
        } else if let LinkAttribute::Address(bytes) = attribute {
            link.mac = <[u8; 6]>::try_from(bytes.as_slice()).ok().map(Mac);
        } else if let LinkAttribute::LinkInfo(infos) = attribute {
            infos.iter().for_each(|info| take_kind(&mut link, info));
        }
    }
    link
}

fn take_kind(link: &mut Link, info: &LinkInfo) {
    if let LinkInfo::Kind(kind) = info {
        link.kind = Some(kind.to_string());
    } else if let LinkInfo::Data(InfoData::Vxlan(infos)) = info {
        link.vxlan = Some(VxlanShape::of(infos));
    }
}

/// IFA_LOCAL is the address itself; IFA_ADDRESS is the peer's on point-to-point links
/// (rtnetlink(7)).
fn link_address(message: &AddressMessage) -> Option<LinkAddress> {
    let (mut local, mut address, mut flags) = (None, None, AddressFlags::empty());
    for attribute in &message.attributes {
        if let AddressAttribute::Local(ip) = attribute {
            local = Some(*ip);
        } else if let AddressAttribute::Address(ip) = attribute {
            address = Some(*ip);
        } else if let AddressAttribute::Flags(bits) = attribute {
            flags = *bits;
        }
    }
    // Another host has it.
    if message.header.flags.contains(AddressHeaderFlags::Dadfailed) {
        return None;
    }
    let ip = local.or(address)?;
    let network = IpNetwork::new(ip, message.header.prefix_len).ok()?;
    Some(LinkAddress {
        network,
        link_local: message.header.scope == AddressScope::Link,
        permanent: message.header.flags.contains(AddressHeaderFlags::Permanent),
        temporary: ip.is_ipv6() && flags.contains(AddressFlags::Secondary),
        deprecated: message.header.flags.contains(AddressHeaderFlags::Deprecated),
    })
}
