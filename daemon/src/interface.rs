//! The choice of the interface that overlay traffic leaves by (flannel section 9). Pure: links and
//! routes come in as data.

mod address;
#[cfg(test)]
mod tests;

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

pub use address::{Families, Family};
use address::{addresses, can_send, is_link_local, is_usable};
use regex::Regex;
use weft_backends::ExternalInterface;
use weft_backends::netlink::{KernelRoute, Link, LinkAddress, WayOut};
use weft_control::lease;

/// What the operator asks for.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Wish {
    /// Names or addresses of interfaces; the first that matches is taken.
    pub iface: Vec<String>,
    /// What an address or a name of an interface matches, where none of `iface` serves.
    pub patterns: Vec<Pattern>,
    /// What packets leave by the interface to, where none of those serves.
    pub can_reach: Option<IpAddr>,
    /// The address that other nodes send to. Where no interface is named, its owner is taken.
    pub public_ip: Option<Ipv4Addr>,
    /// As `public_ip`, which comes first.
    pub public_ipv6: Option<Ipv6Addr>,
}

/// A regular expression that matches anywhere in a text.
#[derive(Debug, Clone)]
pub struct Pattern(Regex);

impl Pattern {
    /// # Errors
    /// It is no regular expression.
    pub fn new(text: &str) -> Result<Self, regex::Error> {
        Regex::new(text).map(Self)
    }
}

impl PartialEq for Pattern {
    fn eq(&self, other: &Self) -> bool {
        self.0.as_str() == other.0.as_str()
    }
}

impl Eq for Pattern {}

/// The choice.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Chosen {
    pub interface: ExternalInterface,
    /// Why this one, and why not those that were asked for before it.
    pub why: String,
}

/// Why there is no interface to use.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum InterfaceError {
    #[error("none defined stack: enable IPv4 or IPv6 in the network config")]
    NoFamily,
    #[error(
        "Failed to find interface to use that matches the interfaces and/or regexes provided: \
         {misses}there are {existing}; correct the flag, or leave it out to use the default route's"
    )]
    NoMatch { misses: String, existing: String },
    #[error(
        "Failed to find any valid interface to use: error looking up interface {public_ip}: \
         {miss}; there are {existing}; where addresses are translated on the way here, give \
         --iface beside --public-ip"
    )]
    PublicIp { public_ip: IpAddr, miss: Miss, existing: String },
    #[error("unable to find default route for {0}; add one, or name the interface with --iface")]
    NoDefaultRoute(Family),
    #[error(
        "found default route for {0} but could not determine interface, as it has several next \
         hops; name the interface with --iface"
    )]
    MultipathDefaultRoute(Family),
    #[error(
        "v6 default route interface {ipv6} must be the same with v4 default route interface \
         {ipv4}; change a route, or name the interface with --iface"
    )]
    DifferentDefaultRoutes { ipv4: String, ipv6: String },
    #[error("the interface of the default route does not serve: {0}; name another with --iface")]
    DefaultRoute(Miss),
}

/// Why one interface is not taken.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Miss {
    #[error("no such network interface")]
    NoSuchName,
    #[error("no interface with given IP found")]
    NoSuchAddress,
    #[error("neither an address nor a name of any matches")]
    NoPattern,
    #[error("no route leads there")]
    NoWay,
    #[error("no interface has the index {0} any more")]
    Gone(u32),
    #[error("failed to find {family} address for interface {interface}")]
    NoAddress { family: Family, interface: String },
    #[error("failed to determine MTU for {interface} interface")]
    NoMtu { interface: String },
}

/// Chooses the interface: the first match of `--iface`, `--iface-regex` and `--iface-can-reach`, in
/// this order; without any of them, the owner of the public address; without that too, the interface
/// of the first default route. `way` is the one to the wish's `can_reach`; `held` are the addresses that
/// are in use, which no further one displaces: a virtual router's, say, moves from host to host.
///
/// # Errors
/// No interface can be used, and why.
pub fn choose(
    wish: &Wish,
    families: Families,
    links: &[Link],
    routes: &[KernelRoute],
    way: WayOut,
    held: &[IpAddr],
) -> Result<Chosen, InterfaceError> {
    if !families.ipv4 && !families.ipv6 {
        return Err(InterfaceError::NoFamily);
    }
    let chooser = Chooser { wish, families, links, routes, way, held };
    let candidates = chooser.candidates();
    if !candidates.is_empty() {
        return chooser.first_of(candidates);
    }
    match chooser.public_ip() {
        Some(public_ip) => chooser.by_public_ip(public_ip),
        None => chooser.by_default_route(),
    }
}

struct Chooser<'a> {
    wish: &'a Wish,
    families: Families,
    links: &'a [Link],
    routes: &'a [KernelRoute],
    way: WayOut,
    held: &'a [IpAddr],
}

/// What a flag asks for, and the link that is it, by which of its addresses.
type Candidate<'a> = (String, Result<(&'a Link, Option<IpAddr>), Miss>);

impl<'a> Chooser<'a> {
    fn candidates(&self) -> Vec<Candidate<'a>> {
        let by_iface = self.wish.iface.iter().map(|wanted| {
            let ip = wanted.parse().ok();
            let link = ip.map_or_else(|| self.named(wanted), |ip| self.owner(ip));
            (format!("--iface {wanted}"), link.map(|link| (link, ip)))
        });
        let by_pattern = self.wish.patterns.iter().map(|pattern| {
            (format!("--iface-regex {}", pattern.0), self.matching(pattern).ok_or(Miss::NoPattern))
        });
        let by_way = self.wish.can_reach.iter().map(|ip| {
            let link = self.links.iter().find(|link| Some(link.index) == self.way.link);
            let found = link.map(|link| (link, self.way.source)).ok_or(Miss::NoWay);
            (format!("--iface-can-reach {ip}"), found)
        });
        by_iface.chain(by_pattern).chain(by_way).collect()
    }

    fn first_of(&self, candidates: Vec<Candidate<'_>>) -> Result<Chosen, InterfaceError> {
        let mut misses = String::new();
        for (asked, found) in candidates {
            let why = format!("{misses}it matches {asked}");
            match found.and_then(|(link, ip)| self.take(link, ip, why)) {
                Ok(chosen) => return Ok(chosen),
                Err(miss) => {
                    misses += &format!("Could not find valid interface matching {asked}: {miss}; ");
                }
            }
        }
        Err(InterfaceError::NoMatch { misses, existing: self.existing() })
    }

    /// All addresses come before any name.
    fn matching(&self, pattern: &Pattern) -> Option<(&'a Link, Option<IpAddr>)> {
        let addresses = self.links.iter().flat_map(|link| {
            let usable = link.addresses.iter();
            let usable =
                usable.filter(|it| self.families.include(it.network.ip()) && is_usable(it));
            usable.map(move |address| (link, address.network.ip()))
        });
        let matching = addresses.filter(|(_, ip)| pattern.0.is_match(&ip.to_string()));
        let by_address = matching.min_by_key(|(_, ip)| !self.held.contains(ip));
        let by_address = by_address.map(|(link, ip)| (link, Some(ip)));
        let named = || self.links.iter().find(|link| pattern.0.is_match(&link.name));
        by_address.or_else(|| named().map(|link| (link, None)))
    }

    fn by_public_ip(&self, public_ip: IpAddr) -> Result<Chosen, InterfaceError> {
        let why = format!("it has the public address {public_ip}");
        self.owner(public_ip).and_then(|link| self.take(link, Some(public_ip), why)).map_err(
            |miss| {
                let existing = self.existing();
                InterfaceError::PublicIp { public_ip, miss, existing }
            },
        )
    }

    fn by_default_route(&self) -> Result<Chosen, InterfaceError> {
        let both = [Family::Ipv4, Family::Ipv6];
        let wanted = both.into_iter().filter(|family| self.families.has(*family));
        let (found, misses): (Vec<_>, Vec<_>) =
            wanted.map(|family| self.default_link(family)).partition(Result::is_ok);
        let mut found: Vec<&Link> = found.into_iter().flatten().collect();
        if found.is_empty() {
            // The other family's way out serves as well.
            found.extend(both.iter().find_map(|family| self.default_link(*family).ok()));
        }
        if let [ipv4, ipv6] = found[..]
            && ipv4.index != ipv6.index
        {
            let (ipv4, ipv6) = (ipv4.name.clone(), ipv6.name.clone());
            return Err(InterfaceError::DifferentDefaultRoutes { ipv4, ipv6 });
        }
        let Some(link) = found.first() else {
            let miss = misses.into_iter().find_map(Result::err);
            return Err(miss.unwrap_or(InterfaceError::NoFamily));
        };
        let why = "it has the default route".into();
        self.take(link, None, why).map_err(InterfaceError::DefaultRoute)
    }

    /// The public address that stands for an interface, of a family that is in use.
    fn public_ip(&self) -> Option<IpAddr> {
        let ipv4 = self.wish.public_ip.filter(|_| self.families.ipv4).map(IpAddr::V4);
        ipv4.or(self.wish.public_ipv6.filter(|_| self.families.ipv6).map(IpAddr::V6))
    }

    /// The interface of the family's first default route.
    fn default_link(&self, family: Family) -> Result<&'a Link, InterfaceError> {
        let is_default = |route: &&KernelRoute| {
            let to = route.destination;
            to.prefix() == 0 && family.holds(to.ip())
        };
        let route = self.routes.iter().find(is_default);
        let route = route.ok_or(InterfaceError::NoDefaultRoute(family))?;
        let index = route.link.ok_or(InterfaceError::MultipathDefaultRoute(family))?;
        let link = self.links.iter().find(|link| link.index == index);
        link.ok_or(InterfaceError::DefaultRoute(Miss::Gone(index)))
    }

    fn named(&self, name: &str) -> Result<&'a Link, Miss> {
        let link = self.links.iter().find(|link| link.name == name);
        link.ok_or(Miss::NoSuchName)
    }

    fn owner(&self, ip: IpAddr) -> Result<&'a Link, Miss> {
        let is_it = |address: &LinkAddress| address.network.ip() == ip && can_send(address);
        let link = self.links.iter().find(|link| link.addresses.iter().any(is_it));
        link.ok_or(Miss::NoSuchAddress)
    }

    /// What there is to choose from, for whoever chose something else.
    fn existing(&self) -> String {
        let links = self.links.iter().map(|link| {
            let ips: Vec<String> =
                link.addresses.iter().map(|address| address.network.ip().to_string()).collect();
            format!("{}:[{}]", link.name, ips.join(" "))
        });
        links.collect::<Vec<_>>().join(", ")
    }

    /// Chooses the addresses of the link; `own`, which it has, comes before the best one of its
    /// family.
    fn take(&self, link: &Link, own: Option<IpAddr>, mut why: String) -> Result<Chosen, Miss> {
        let [ipv4, ipv6] = addresses(link, self.families, own, self.held).ok_or_else(|| {
            let family = if self.families.ipv4 { Family::Ipv4 } else { Family::Ipv6 };
            Miss::NoAddress { family, interface: link.name.clone() }
        })?;
        for (family, address) in [(Family::Ipv4, ipv4), (Family::Ipv6, ipv6)] {
            if self.families.has(family) && address.is_none() {
                why += &format!("; {family} goes over the other family, having no address there");
            }
        }
        let ipv4 = ipv4.and_then(|ip| if let IpAddr::V4(ip) = ip { Some(ip) } else { None });
        let ipv6 = ipv6.and_then(|ip| if let IpAddr::V6(ip) = ip { Some(ip) } else { None });
        if link.mtu == 0 {
            return Err(Miss::NoMtu { interface: link.name.clone() });
        }
        if let Some(fault) = link.fault() {
            why += &format!("; it {fault} now");
        }
        let taken: Vec<IpAddr> = lease::addresses(ipv4, ipv6).collect();
        let others = link.addresses.iter().filter(|it| can_send(it) && !is_link_local(it));
        let others = others.map(|it| it.network.ip()).filter(|ip| !taken.contains(ip));
        // The kernel has the latest first, such as a virtual router's, which moves to other hosts.
        let mut oldest_first = link.addresses.iter().rev().filter(|it| !it.deprecated);
        let link_local = oldest_first.find_map(|address| match address.network.ip() {
            IpAddr::V6(ip) => ip.is_unicast_link_local().then_some(ip),
            IpAddr::V4(_) => None,
        });
        let interface = ExternalInterface {
            name: link.name.clone(),
            index: link.index,
            mtu: link.mtu,
            ipv4,
            ipv6,
            public_ipv4: ipv4.map(|ip| self.wish.public_ip.unwrap_or(ip)),
            public_ipv6: ipv6.map(|ip| self.wish.public_ipv6.unwrap_or(ip)),
            other_addresses: others.collect(),
            link_local: link_local.filter(|_| self.families.ipv6 && ipv6.is_none()),
        };
        Ok(Chosen { interface, why })
    }
}
