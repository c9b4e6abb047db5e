//! The choice by the wishes and the kernel's answers.

use std::fmt;

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
    Link { index, name, mtu: 1500, up: true, carrier: true, addresses, ..Link::default() }
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
    KernelRoute { destination, gateway: None, link: Some(link), protocol: 3, metric: 0 }
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
    choose(wish, families, &host(), &[route(false, 2), route(true, 2)], WayOut::default(), &[])
        .unwrap()
}

fn refused(wish: &Wish, families: Families) -> String {
    choose(wish, families, &host(), &[], WayOut::default(), &[]).unwrap_err().to_string()
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
    let error = choose(&iface(&["eth9"]), V4, &host(), &routes, WayOut::default(), &[])
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
    assert!(error.contains("matching --iface 127.0.0.1: no interface with given IP"), "{error}");
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
    let interface = choose(&wish, V6, &host(), &[], WayOut::default(), &[]).unwrap().interface;
    assert_eq!((interface.ipv4, interface.ipv6), (None, ip("2001:db8::10")));
    assert!(refused(&wish, V4).starts_with("unable to find default route"));
}

#[test]
fn the_first_default_route_of_the_family_decides() {
    let routes = [route(true, 3), route(false, 2), route(false, 3)];
    let found = choose(&Wish::default(), V4, &host(), &routes, WayOut::default(), &[]).unwrap();
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
        let error = choose(&Wish::default(), families, &host(), &routes, WayOut::default(), &[])
            .unwrap_err();
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
        choose(&Wish::default(), families, &links, routes, WayOut::default(), &[])
    };
    let found = over_v6(V4, &[route(true, 2)]).unwrap();
    assert_eq!((found.interface.ipv4, found.interface.ipv6), (None, ip("2001:db8::1")));
    let found = over_v6(BOTH, &[route(true, 2)]).unwrap();
    assert_eq!(found.interface.public_ipv6, ip("2001:db8::1"));
    let links = [link(2, "eth0", &["192.0.2.1/24", "fe80::1/64 link"])];
    let found = choose(&iface(&["eth0"]), V6, &links, &[], WayOut::default(), &[]).unwrap();
    assert_eq!((found.interface.ipv4, found.interface.ipv6), (ip("192.0.2.1"), None));
    let found = choose(&iface(&["fe80::1"]), V6, &links, &[], WayOut::default(), &[]).unwrap();
    assert_eq!(found.interface.ipv6, ip("fe80::1"), "asked for");
    // An address that only the own link knows is no way out for another family.
    let links = [link(2, "eth0", &["fe80::1/64 link"])];
    let error = choose(&iface(&["eth0"]), V4, &links, &[], WayOut::default(), &[]).unwrap_err();
    assert!(error.to_string().contains("failed to find IPv4 address"), "{error}");
}

#[test]
fn the_best_address_of_a_family_is_taken() {
    let cases: &[(&[&str], &str)] = &[
        (&["fe80::1/64 link", "2001:db8::1/64 dynamic temporary"], "2001:db8::1"),
        (&["2001:db8::1/64 dynamic", "2001:db8::2/64"], "2001:db8::2"),
        (&["2001:db8::1/64 dynamic temporary", "2001:db8::2/64 dynamic"], "2001:db8::2"),
        (&["2001:db8::1/64 deprecated", "fe80::1/64 link"], "2001:db8::1"),
        (&["2001:db8::1/64 deprecated", "2001:db8::2/64 temporary"], "2001:db8::2"),
        (&["2001:db8::1/64", "2001:db8::2/64"], "2001:db8::1"),
        (&["ff02::1/64", "::1/128", "2001:db8::2/64 dynamic"], "2001:db8::2"),
    ];
    for (addresses, expected) in cases {
        let links = [link(2, "eth0", addresses)];
        let interface =
            choose(&iface(&["eth0"]), V6, &links, &[], WayOut::default(), &[]).unwrap().interface;
        assert_eq!(interface.ipv6, ip(expected), "{addresses:?}");
    }
}

/// A better one may be a virtual router's, which leaves again.
#[test]
fn what_is_held_stays_while_it_can_be_used() {
    let held: [IpAddr; 2] = ["192.0.2.1", "2001:db8::1"].map(|it| it.parse().unwrap());
    let cases: &[(&[&str], &str, &str)] = &[
        (&["192.0.2.2/24", "192.0.2.1/24 dynamic", "2001:db8::2/64"], "192.0.2.1", "2001:db8::2"),
        (&["192.0.2.2/24", "2001:db8::2/64", "2001:db8::1/64 dynamic"], "192.0.2.2", "2001:db8::1"),
        (
            &[
                "192.0.2.1/24 link",
                "192.0.2.2/24 dynamic",
                "2001:db8::1/64 deprecated",
                "2001:db8::2/64",
            ],
            "192.0.2.2",
            "2001:db8::2",
        ),
        (
            &["192.0.2.1/24", "2001:db8::1/64 dynamic temporary", "2001:db8::2/64 dynamic"],
            "192.0.2.1",
            "2001:db8::2",
        ),
    ];
    for (addresses, ipv4, ipv6) in cases {
        let links = [link(2, "eth0", addresses)];
        let found = choose(&iface(&["eth0"]), BOTH, &links, &[], WayOut::default(), &held).unwrap();
        let taken = (found.interface.ipv4, found.interface.ipv6);
        assert_eq!(taken, (ip(ipv4), ip(ipv6)), "{addresses:?}");
    }
    let links = [link(2, "eth0", &["192.0.2.2/24", "192.0.2.1/24"])];
    let found = choose(&pattern("^192"), V4, &links, &[], WayOut::default(), &held).unwrap();
    assert_eq!(found.interface.ipv4, ip("192.0.2.1"));
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
    let interface = choose(&iface(&["192.0.2.11"]), BOTH, &links, &[], WayOut::default(), &[])
        .unwrap()
        .interface;
    let expected: Vec<IpAddr> =
        ["192.0.2.10", "2001:db8::2"].map(|text| text.parse().unwrap()).into();
    assert_eq!((interface.other_addresses, interface.link_local), (expected, None));
}

#[test]
fn a_link_local_address_is_told_where_there_is_no_better_one() {
    let addresses = ["192.0.2.10/24", "fe80::7/64 link", "fe80::1/64 link"];
    let links = [link(2, "eth0", &addresses)];
    let interface =
        choose(&iface(&["eth0"]), BOTH, &links, &[], WayOut::default(), &[]).unwrap().interface;
    assert_eq!((interface.ipv6, interface.link_local), (None, ip("fe80::1")));
}

#[test]
fn without_an_mtu_or_a_family_there_is_no_interface() {
    let mut links = host();
    links[1].mtu = 0;
    let error =
        choose(&iface(&["eth0"]), V4, &links, &[], WayOut::default(), &[]).unwrap_err().to_string();
    assert!(error.contains("failed to determine MTU for eth0 interface"), "{error}");
    let none = Families { ipv4: false, ipv6: false };
    assert!(refused(&iface(&["eth0"]), none).starts_with("none defined stack"));
}

#[test]
fn an_interface_that_is_down_is_taken_and_told() {
    let mut links = host();
    links[1].up = false;
    let found = choose(&iface(&["eth0"]), V4, &links, &[], WayOut::default(), &[]).unwrap();
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
    assert_eq!((interface.ipv4, interface.public_ipv4), (ip("172.16.30.18"), ip("172.16.31.200")));
    let error = refused(&pattern("^eth9$"), V4);
    assert!(error.contains("matching --iface-regex ^eth9$: neither"), "{error}");
    // An address that cannot be used is none.
    assert!(refused(&pattern(r"^127\."), V4).contains("neither an address"));
}

#[test]
fn the_way_to_an_address_decides_where_nothing_else_matches() {
    let wish = Wish { can_reach: ip("172.16.32.254"), ..iface(&["eth9"]) };
    let way = WayOut {
        link: Some(3),
        source: ip("172.16.32.100"),
        is_on_link: true,
        ..WayOut::default()
    };
    let found = choose(&wish, V4, &host(), &[], way, &[]).unwrap();
    assert_eq!(found.interface.ipv4, ip("172.16.32.100"));
    assert!(found.why.ends_with("it matches --iface-can-reach 172.16.32.254"), "{}", found.why);
    assert!(refused(&wish, V4).contains("no route leads there"));
}
