//! The choice of the interface that overlay traffic leaves by (flannel section 9). Pure: links and
//! routes come in as data.

use std::fmt;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use regex::Regex;
use weft_backends::ExternalInterface;
use weft_backends::netlink::{KernelRoute, Link, LinkAddress};

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

/// What the kernel's routes say of the way to an address.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Way {
    /// The interface that packets leave by.
    pub link: Option<u32>,
    /// The address that they leave from.
    pub source: Option<IpAddr>,
}

/// The address families of the overlay. An interface with addresses of one family alone carries both
/// over it, as far as the backend can.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Families {
    pub ipv4: bool,
    pub ipv6: bool,
}

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

/// An address family.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Family {
    Ipv4,
    Ipv6,
}

impl Family {
    fn holds(self, ip: IpAddr) -> bool {
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
    fn has(self, family: Family) -> bool {
        match family {
            Family::Ipv4 => self.ipv4,
            Family::Ipv6 => self.ipv6,
        }
    }
}

/// Chooses the interface: the first match of `--iface`, `--iface-regex` and `--iface-can-reach`, in
/// this order; without any of them, the owner of the public address; without that too, the interface
/// of the first default route. `way` is the one to the wish's `can_reach`.
///
/// # Errors
/// No interface can be used, and why.
pub fn choose(
    wish: &Wish,
    families: Families,
    links: &[Link],
    routes: &[KernelRoute],
    way: Way,
) -> Result<Chosen, InterfaceError> {
    if !families.ipv4 && !families.ipv6 {
        return Err(InterfaceError::NoFamily);
    }
    let chooser = Chooser { wish, families, links, routes, way };
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
    way: Way,
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
            let usable = link.addresses.iter().filter(|address| {
                let ip = address.network.ip();
                let in_use = if ip.is_ipv6() { self.families.ipv6 } else { self.families.ipv4 };
                in_use && can_send(address) && !address.deprecated
            });
            usable.map(move |address| (link, address.network.ip()))
        });
        let mut matching = addresses.filter(|(_, ip)| pattern.0.is_match(&ip.to_string()));
        let by_address = matching.next().map(|(link, ip)| (link, Some(ip)));
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
        let [ipv4, ipv6] = self.addresses(link, own)?;
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
        if !link.up {
            why += "; it is down now";
        }
        let taken = [ipv4.map(IpAddr::V4), ipv6.map(IpAddr::V6)];
        let others = link.addresses.iter().filter(|it| can_send(it) && !is_link_local(it));
        let others = others.map(|it| it.network.ip()).filter(|ip| !taken.contains(&Some(*ip)));
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

    /// The addresses to use, IPv4's first: of the families in use; where those have none, that of the
    /// other one, which carries them. Addresses that only the own link knows come last.
    fn addresses(&self, link: &Link, own: Option<IpAddr>) -> Result<[Option<IpAddr>; 2], Miss> {
        let both = [Family::Ipv4, Family::Ipv6];
        let any = |family: Family| {
            own.filter(|ip| family.holds(*ip)).or_else(|| best_address(link, family))
        };
        let global = |family| any(family).filter(|ip| own == Some(*ip) || !is_local(link, *ip));
        let choices = [
            both.map(|family| global(family).filter(|_| self.families.has(family))),
            both.map(global),
            both.map(|family| any(family).filter(|_| self.families.has(family))),
        ];
        let found = choices.into_iter().find(|choice| choice.iter().any(Option::is_some));
        found.ok_or_else(|| {
            let family = if self.families.ipv4 { Family::Ipv4 } else { Family::Ipv6 };
            Miss::NoAddress { family, interface: link.name.clone() }
        })
    }
}

/// Global before link-local, permanent before dynamic, lasting before temporary, else the kernel's
/// order; deprecated ones not at all.
fn best_address(link: &Link, family: Family) -> Option<IpAddr> {
    let usable = link.addresses.iter().filter(|address| {
        family.holds(address.network.ip()) && can_send(address) && !address.deprecated
    });
    let best = usable.min_by_key(|it| (is_link_local(it), !it.permanent, it.temporary));
    best.map(|address| address.network.ip())
}

/// Whether packets to other hosts may bear the address.
fn can_send(address: &LinkAddress) -> bool {
    let ip = address.network.ip();
    !(ip.is_loopback() || ip.is_multicast() || ip.is_unspecified())
}

/// Whether only the own link knows the address.
fn is_local(link: &Link, ip: IpAddr) -> bool {
    link.addresses.iter().any(|address| address.network.ip() == ip && is_link_local(address))
}

fn is_link_local(address: &LinkAddress) -> bool {
    let by_number = match address.network.ip() {
        IpAddr::V4(ip) => ip.is_link_local(),
        IpAddr::V6(ip) => ip.is_unicast_link_local(),
    };
    by_number || address.link_local
}

#[cfg(test)]
mod tests {
    use super::*;

    const V4: Families = Families { ipv4: true, ipv6: false };
    const V6: Families = Families { ipv4: false, ipv6: true };
    const BOTH: Families = Families { ipv4: true, ipv6: true };

    /// Addresses are global and permanent unless words behind them say otherwise.
    fn link(index: u32, name: &str, addresses: &[&str]) -> Link {
        let addresses = addresses.iter().map(|text| {
            let mut words = text.split(' ');
            let network = words.next().unwrap().parse().unwrap();
            let words: Vec<&str> = words.collect();
            LinkAddress {
                network,
                link_local: words.contains(&"link"),
                permanent: !words.contains(&"dynamic"),
                temporary: words.contains(&"temporary"),
                deprecated: words.contains(&"deprecated"),
            }
        });
        let addresses = addresses.collect();
        let name = name.into();
        Link { index, name, mtu: 1500, up: true, addresses, ..Link::default() }
    }

    fn host() -> Vec<Link> {
        vec![
            link(1, "lo", &["127.0.0.1/8 link", "::1/128 link"]),
            link(2, "eth0", &["192.0.2.10/24", "2001:db8::10/64", "fe80::10/64 link"]),
            link(
                3,
                "dummy0",
                &[
                    "1.10.100.1/24",
                    "192.168.200.128/24",
                    "172.16.30.18/24",
                    "172.16.31.200/24",
                    "172.16.32.100/24",
                ],
            ),
        ]
    }

    fn route(ipv6: bool, link: u32) -> KernelRoute {
        let destination = if ipv6 { "::/0" } else { "0.0.0.0/0" };
        let destination = destination.parse().unwrap();
        KernelRoute { destination, gateway: None, link: Some(link), protocol: 3 }
    }

    fn pattern(text: &str) -> Wish {
        Wish { patterns: vec![Pattern::new(text).unwrap()], ..Wish::default() }
    }

    fn iface(names: &[&str]) -> Wish {
        Wish { iface: names.iter().map(ToString::to_string).collect(), ..Wish::default() }
    }

    fn public_ip(text: &str) -> Wish {
        Wish { public_ip: Some(text.parse().unwrap()), ..Wish::default() }
    }

    fn chosen(wish: &Wish, families: Families) -> Chosen {
        choose(wish, families, &host(), &[route(false, 2), route(true, 2)], Way::default()).unwrap()
    }

    fn refused(wish: &Wish, families: Families) -> String {
        choose(wish, families, &host(), &[], Way::default()).unwrap_err().to_string()
    }

    fn ip<T: std::str::FromStr<Err: fmt::Debug>>(text: &str) -> Option<T> {
        Some(text.parse().unwrap())
    }

    #[test]
    fn a_name_yields_the_first_address_and_an_address_itself() {
        let cases = [
            ("dummy0", "1.10.100.1"),
            ("192.168.200.128", "192.168.200.128"),
            ("172.16.30.18", "172.16.30.18"),
            ("172.16.32.100", "172.16.32.100"),
        ];
        for (wanted, expected) in cases {
            let interface = chosen(&iface(&[wanted]), V4).interface;
            assert_eq!((interface.name.as_str(), interface.index), ("dummy0", 3), "{wanted}");
            assert_eq!(interface.ipv4, ip(expected), "{wanted}");
            assert_eq!(interface.public_ipv4, ip(expected), "{wanted}");
            assert_eq!(interface.ipv6, None, "{wanted}");
        }
    }

    #[test]
    fn a_public_address_replaces_the_interfaces_own() {
        let wish = Wish { public_ip: ip("172.16.31.200"), ..iface(&["172.16.30.18"]) };
        let interface = chosen(&wish, V4).interface;
        assert_eq!(interface.ipv4, ip("172.16.30.18"));
        assert_eq!(interface.public_ipv4, ip("172.16.31.200"));
        // Behind address translation no interface has it.
        let wish = Wish { public_ip: ip("198.51.100.1"), ..iface(&["eth0"]) };
        let interface = chosen(&wish, V4).interface;
        assert_eq!(interface.ipv4, ip("192.0.2.10"));
        assert_eq!(interface.public_ipv4, ip("198.51.100.1"));
    }

    #[test]
    fn the_first_match_is_taken_and_misses_are_told() {
        let Chosen { interface, why } =
            chosen(&iface(&["eth9", "10.9.9.9", "lo", "dummy0", "eth0"]), V4);
        assert_eq!(interface.name, "dummy0");
        for told in [
            "matching --iface eth9: no such network interface",
            "matching --iface 10.9.9.9: no interface with given IP found",
            "matching --iface lo: failed to find IPv4 address for interface lo",
            "it matches --iface dummy0",
        ] {
            assert!(why.contains(told), "{told}: {why}");
        }
    }

    #[test]
    fn no_match_does_not_fall_back_to_the_default_route() {
        let routes = [route(false, 2)];
        let error = choose(&iface(&["eth9"]), V4, &host(), &routes, Way::default())
            .unwrap_err()
            .to_string();
        assert!(
            error.starts_with(
                "Failed to find interface to use that matches the interfaces and/or regexes \
                 provided: Could not find valid interface matching --iface eth9: no such network \
                 interface"
            ),
            "{error}"
        );
        assert!(error.contains("eth0:[192.0.2.10 2001:db8::10 fe80::10]"), "{error}");
    }

    #[test]
    fn loopback_addresses_reach_nobody() {
        let error = refused(&iface(&["127.0.0.1"]), V4);
        assert!(
            error.contains("matching --iface 127.0.0.1: no interface with given IP"),
            "{error}"
        );
    }

    #[test]
    fn the_owner_of_the_public_address_comes_before_the_default_route() {
        let Chosen { interface, why } = chosen(&public_ip("172.16.31.200"), V4);
        assert_eq!((interface.name.as_str(), interface.ipv4), ("dummy0", ip("172.16.31.200")));
        assert_eq!(why, "it has the public address 172.16.31.200");
        let error = refused(&public_ip("198.51.100.1"), V4);
        assert!(
            error.starts_with(
                "Failed to find any valid interface to use: error looking up interface \
                 198.51.100.1: no interface with given IP found"
            ),
            "{error}"
        );
        assert!(error.contains("--iface"), "{error}");
    }

    #[test]
    fn a_public_ipv6_address_serves_too_if_ipv6_is_in_use() {
        let wish = Wish { public_ipv6: ip("2001:db8::10"), ..Wish::default() };
        let interface = choose(&wish, V6, &host(), &[], Way::default()).unwrap().interface;
        assert_eq!((interface.ipv4, interface.ipv6), (None, ip("2001:db8::10")));
        assert!(refused(&wish, V4).starts_with("unable to find default route"));
    }

    #[test]
    fn the_first_default_route_of_the_family_decides() {
        let routes = [route(true, 3), route(false, 2), route(false, 3)];
        let found = choose(&Wish::default(), V4, &host(), &routes, Way::default()).unwrap();
        assert_eq!(found.interface.name, "eth0");
        assert_eq!(found.why, "it has the default route");
    }

    #[test]
    fn default_routes_that_do_not_serve() {
        let multipath = KernelRoute { link: None, ..route(false, 0) };
        let cases = [
            (V4, vec![], "unable to find default route for IPv4"),
            (BOTH, vec![], "unable to find default route for IPv4"),
            (
                V4,
                vec![multipath, route(false, 2)],
                "found default route for IPv4 but could not determine interface",
            ),
            (
                BOTH,
                vec![route(false, 2), route(true, 3)],
                "v6 default route interface dummy0 must be the same with v4 default route \
                 interface eth0",
            ),
            (V4, vec![route(false, 9)], "the interface of the default route does not serve"),
            (V6, vec![route(true, 1)], "the interface of the default route does not serve"),
        ];
        for (families, routes, expected) in cases {
            let error =
                choose(&Wish::default(), families, &host(), &routes, Way::default()).unwrap_err();
            let error = error.to_string();
            assert!(error.starts_with(expected) && error.contains("--iface"), "{error}");
        }
    }

    #[test]
    fn both_families_come_from_one_interface() {
        let interface = chosen(&Wish::default(), BOTH).interface;
        assert_eq!(interface.ipv4, ip("192.0.2.10"));
        assert_eq!(interface.ipv6, ip("2001:db8::10"));
        // An address names the interface; that of the other family is the best one there.
        let wish = Wish { public_ipv6: ip("2001:db8::ff"), ..iface(&["192.0.2.10"]) };
        let interface = chosen(&wish, BOTH).interface;
        assert_eq!(interface.ipv6, ip("2001:db8::10"));
        assert_eq!(interface.public_ipv6, ip("2001:db8::ff"));
    }

    #[test]
    fn one_family_carries_the_other_where_that_has_no_address() {
        let Chosen { interface, why } = chosen(&iface(&["dummy0"]), BOTH);
        assert_eq!((interface.ipv4, interface.ipv6), (ip("1.10.100.1"), None));
        assert!(why.ends_with("IPv6 goes over the other family, having no address there"), "{why}");
        let Chosen { interface, .. } = chosen(&iface(&["dummy0"]), V6);
        assert_eq!((interface.ipv4, interface.ipv6), (ip("1.10.100.1"), None));
        let links = [link(2, "eth0", &["2001:db8::1/64", "fe80::1/64 link"])];
        let over_v6 = |families, routes: &[KernelRoute]| {
            choose(&Wish::default(), families, &links, routes, Way::default())
        };
        let found = over_v6(V4, &[route(true, 2)]).unwrap();
        assert_eq!((found.interface.ipv4, found.interface.ipv6), (None, ip("2001:db8::1")));
        let found = over_v6(BOTH, &[route(true, 2)]).unwrap();
        assert_eq!(found.interface.public_ipv6, ip("2001:db8::1"));
        let links = [link(2, "eth0", &["192.0.2.1/24", "fe80::1/64 link"])];
        let found = choose(&iface(&["eth0"]), V6, &links, &[], Way::default()).unwrap();
        assert_eq!((found.interface.ipv4, found.interface.ipv6), (ip("192.0.2.1"), None));
        let found = choose(&iface(&["fe80::1"]), V6, &links, &[], Way::default()).unwrap();
        assert_eq!(found.interface.ipv6, ip("fe80::1"), "asked for");
        // An address that only the own link knows is no way out for another family.
        let links = [link(2, "eth0", &["fe80::1/64 link"])];
        let error = choose(&iface(&["eth0"]), V4, &links, &[], Way::default()).unwrap_err();
        assert!(error.to_string().contains("failed to find IPv4 address"), "{error}");
    }

    #[test]
    fn the_best_address_of_a_family_is_taken() {
        let cases: &[(&[&str], &str)] = &[
            (&["fe80::1/64 link", "2001:db8::1/64 dynamic temporary"], "2001:db8::1"),
            (&["2001:db8::1/64 dynamic", "2001:db8::2/64"], "2001:db8::2"),
            (&["2001:db8::1/64 dynamic temporary", "2001:db8::2/64 dynamic"], "2001:db8::2"),
            (&["2001:db8::1/64 deprecated", "fe80::1/64 link"], "fe80::1"),
            (&["2001:db8::1/64", "2001:db8::2/64"], "2001:db8::1"),
            (&["ff02::1/64", "::1/128", "2001:db8::2/64 dynamic"], "2001:db8::2"),
        ];
        for (addresses, expected) in cases {
            let links = [link(2, "eth0", addresses)];
            let interface =
                choose(&iface(&["eth0"]), V6, &links, &[], Way::default()).unwrap().interface;
            assert_eq!(interface.ipv6, ip(expected), "{addresses:?}");
        }
    }

    #[test]
    fn other_global_addresses_are_told() {
        let addresses = [
            "192.0.2.10/24",
            "169.254.1.1/16 link",
            "192.0.2.11/24 dynamic",
            "2001:db8::1/64 dynamic",
            "2001:db8::2/64 dynamic temporary deprecated",
            "fe80::1/64 link",
        ];
        let links = [link(2, "eth0", &addresses)];
        let interface =
            choose(&iface(&["192.0.2.11"]), BOTH, &links, &[], Way::default()).unwrap().interface;
        let expected: Vec<IpAddr> =
            ["192.0.2.10", "2001:db8::2"].map(|text| text.parse().unwrap()).into();
        assert_eq!((interface.other_addresses, interface.link_local), (expected, None));
    }

    #[test]
    fn a_link_local_address_is_told_where_there_is_no_better_one() {
        let addresses = ["192.0.2.10/24", "fe80::7/64 link", "fe80::1/64 link"];
        let links = [link(2, "eth0", &addresses)];
        let interface =
            choose(&iface(&["eth0"]), BOTH, &links, &[], Way::default()).unwrap().interface;
        assert_eq!((interface.ipv6, interface.link_local), (None, ip("fe80::1")));
    }

    #[test]
    fn without_an_mtu_or_a_family_there_is_no_interface() {
        let mut links = host();
        links[1].mtu = 0;
        let error =
            choose(&iface(&["eth0"]), V4, &links, &[], Way::default()).unwrap_err().to_string();
        assert!(error.contains("failed to determine MTU for eth0 interface"), "{error}");
        let none = Families { ipv4: false, ipv6: false };
        assert!(refused(&iface(&["eth0"]), none).starts_with("none defined stack"));
    }

    #[test]
    fn an_interface_that_is_down_is_taken_and_told() {
        let mut links = host();
        links[1].up = false;
        let found = choose(&iface(&["eth0"]), V4, &links, &[], Way::default()).unwrap();
        assert!(found.why.ends_with("it is down now"), "{}", found.why);
    }

    #[test]
    fn a_pattern_matches_addresses_before_names() {
        let own = |text: &str| chosen(&pattern(text), V4).interface.ipv4.unwrap().to_string();
        assert_eq!(own(r"192\.168\.200\.\d+"), "192.168.200.128");
        assert_eq!(own(r"dummy\d+"), "1.10.100.1");
        assert_eq!(own("200"), "192.168.200.128");
        let wish = Wish { public_ip: ip("172.16.31.200"), ..pattern(r"172\.16\.30\.\d+") };
        let interface = chosen(&wish, V4).interface;
        assert_eq!(
            (interface.ipv4, interface.public_ipv4),
            (ip("172.16.30.18"), ip("172.16.31.200"))
        );
        let error = refused(&pattern("^eth9$"), V4);
        assert!(error.contains("matching --iface-regex ^eth9$: neither"), "{error}");
        // An address that cannot be used is none.
        assert!(refused(&pattern(r"^127\."), V4).contains("neither an address"));
    }

    #[test]
    fn the_way_to_an_address_decides_where_nothing_else_matches() {
        let wish = Wish { can_reach: ip("172.16.32.254"), ..iface(&["eth9"]) };
        let way = Way { link: Some(3), source: ip("172.16.32.100") };
        let found = choose(&wish, V4, &host(), &[], way).unwrap();
        assert_eq!(found.interface.ipv4, ip("172.16.32.100"));
        assert!(found.why.ends_with("it matches --iface-can-reach 172.16.32.254"), "{}", found.why);
        assert!(refused(&wish, V4).contains("no route leads there"));
    }
}
