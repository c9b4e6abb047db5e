//! Which of an interface's addresses overlay traffic uses. Pure.

use std::fmt;
use std::net::IpAddr;

use weft_backends::netlink::{Link, LinkAddress};

/// The address families of the overlay. An interface with addresses of one family alone carries both
/// over it, as far as the backend can.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Families {
    pub ipv4: bool,
    pub ipv6: bool,
}

/// An address family.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Family {
    Ipv4,
    Ipv6,
}

impl Family {
    pub(super) fn holds(self, ip: IpAddr) -> bool {
        match self {
            Self::Ipv4 => ip.is_ipv4(),
            Self::Ipv6 => ip.is_ipv6(),
        }
    }
}

impl fmt::Display for Family {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Ipv4 => "IPv4",
            Self::Ipv6 => "IPv6",
        })
    }
}

impl Families {
    /// Whether an address is of one of them.
    pub(super) fn include(self, ip: IpAddr) -> bool {
        if ip.is_ipv6() { self.ipv6 } else { self.ipv4 }
    }

    pub(super) fn has(self, family: Family) -> bool {
        match family {
            Family::Ipv4 => self.ipv4,
            Family::Ipv6 => self.ipv6,
        }
    }
}

/// The addresses to use, IPv4's first: of the families in use; where those have none, that of the
/// other one, which carries them. Addresses that only the own link knows come last.
pub(super) fn addresses(
    link: &Link,
    families: Families,
    own: Option<IpAddr>,
    held: &[IpAddr],
) -> Option<[Option<IpAddr>; 2]> {
    let both = [Family::Ipv4, Family::Ipv6];
    let any = |family: Family| {
        own.filter(|ip| family.holds(*ip)).or_else(|| best_address(link, family, held))
    };
    let global = |family| any(family).filter(|ip| own == Some(*ip) || !is_local(link, *ip));
    let choices = [
        both.map(|family| global(family).filter(|_| families.has(family))),
        both.map(global),
        both.map(|family| any(family).filter(|_| families.has(family))),
    ];
    choices.into_iter().find(|choice| choice.iter().any(Option::is_some))
}

/// Global before link-local, those that are not deprecated before those that are, lasting before temporary, the
/// one that is held, permanent before dynamic, else the kernel's order.
fn best_address(link: &Link, family: Family, held: &[IpAddr]) -> Option<IpAddr> {
    let usable = link.addresses.iter().filter(|it| family.holds(it.network.ip()) && can_send(it));
    let best = usable.min_by_key(|it| {
        let is_held = held.contains(&it.network.ip());
        (is_link_local(it), it.deprecated, it.temporary, !is_held, !it.permanent)
    });
    best.map(|address| address.network.ip())
}

/// Whether new connections may use the address.
pub(super) fn is_usable(address: &LinkAddress) -> bool {
    can_send(address) && !address.deprecated
}

/// Whether packets to other hosts may bear the address.
pub(super) fn can_send(address: &LinkAddress) -> bool {
    let ip = address.network.ip();
    !(ip.is_loopback() || ip.is_multicast() || ip.is_unspecified())
}

/// Whether only the own link knows the address.
fn is_local(link: &Link, ip: IpAddr) -> bool {
    link.addresses.iter().any(|address| address.network.ip() == ip && is_link_local(address))
}

pub(super) fn is_link_local(address: &LinkAddress) -> bool {
    let by_number = match address.network.ip() {
        IpAddr::V4(ip) => ip.is_link_local(),
        IpAddr::V6(ip) => ip.is_unicast_link_local(),
    };
    by_number || address.link_local
}
