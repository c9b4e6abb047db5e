//! Choosing a subnet that nobody has.

use std::net::IpAddr;

use ipnetwork::IpNetwork;

use crate::config::{FamilyConfig, from_bits, to_bits};

/// A subnet between SubnetMin and SubnetMax that overlaps none of `taken`, each free one as likely
/// as the others: nodes that start in one instant then seldom choose the same. `None` where all
/// are taken.
pub fn pick_subnet(
    config: &FamilyConfig,
    taken: &[IpNetwork],
    rng: &mut fastrand::Rng,
) -> Option<IpNetwork> {
    let gaps = gaps(config, taken);
    let free: u128 = gaps.iter().map(|(first, end)| end - first).sum();
    let mut nth = (free > 0).then(|| rng.u128(..free))?;
    let number = gaps.iter().find_map(|(first, end)| {
        let here = end - first;
        if nth < here {
            return Some(first + nth);
        }
        nth -= here;
        None
    })?;
    let base = from_bits(to_bits(config.subnet_min) + number * step(config), config.network);
    IpNetwork::new(base, config.subnet_len).ok()
}

/// Whether a subnet is one that [`pick_subnet`] could choose.
pub fn is_allowed(config: &FamilyConfig, subnet: IpNetwork) -> bool {
    let in_range = (config.subnet_min..=config.subnet_max).contains(&subnet.network());
    in_range && subnet.is_ipv6() == config.network.is_ipv6() && subnet.prefix() == config.subnet_len
}

/// The free subnets as ranges of their numbers, counted from SubnetMin, the end excluded.
fn gaps(config: &FamilyConfig, taken: &[IpNetwork]) -> Vec<(u128, u128)> {
    let min = to_bits(config.subnet_min);
    let max = to_bits(config.subnet_max);
    let Some(span) = max.checked_sub(min) else {
        return Vec::new();
    };
    let count = span / step(config) + 1;
    let last = max + (step(config) - 1);
    let number = |address: IpAddr| to_bits(address).saturating_sub(min) / step(config);
    let mut used: Vec<(u128, u128)> = taken
        .iter()
        .filter(|net| net.is_ipv6() == config.network.is_ipv6())
        .filter(|net| to_bits(net.broadcast()) >= min && to_bits(net.network()) <= last)
        .map(|net| (number(net.network()), number(net.broadcast()) + 1))
        .collect();
    used.sort_unstable();
    let mut gaps = Vec::new();
    let mut next = 0;
    for (first, end) in used {
        if first > next {
            gaps.push((next, first.min(count)));
        }
        next = next.max(end);
    }
    if next < count {
        gaps.push((next, count));
    }
    gaps
}

/// Addresses in a subnet.
fn step(config: &FamilyConfig) -> u128 {
    let bits = if config.network.is_ipv6() { 128 } else { 32 };
    1 << (bits - config.subnet_len)
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use proptest::prelude::*;

    use super::*;
    use crate::config::NetworkConfig;
    use crate::lease::overlap;

    fn config(text: &str) -> FamilyConfig {
        text.parse::<NetworkConfig>().unwrap().families().next().unwrap()
    }

    fn nets(texts: &[&str]) -> Vec<IpNetwork> {
        texts.iter().map(|text| text.parse().unwrap()).collect()
    }

    #[test]
    fn every_free_subnet_is_chosen_sooner_or_later() {
        let config =
            config(r#"{"Network":"10.3.0.0/16","SubnetMin":"10.3.1.0","SubnetMax":"10.3.25.0"}"#);
        let taken = nets(&["10.3.1.0/24", "10.3.2.0/24", "10.3.4.0/24", "10.3.5.0/24"]);
        let mut rng = fastrand::Rng::with_seed(1);
        let found: HashSet<IpNetwork> =
            (0..2000).map(|_| pick_subnet(&config, &taken, &mut rng).unwrap()).collect();
        assert_eq!(found.len(), 21);
        assert!(found.iter().all(|net| is_allowed(&config, *net) && !taken.contains(net)));
    }

    #[test]
    fn finds_the_last_one_and_then_none() {
        let config = config(r#"{"Network":"10.3.0.0/28"}"#);
        let mut rng = fastrand::Rng::with_seed(1);
        let mut taken = Vec::new();
        for _ in 0..3 {
            taken.push(pick_subnet(&config, &taken, &mut rng).unwrap());
        }
        assert_eq!(pick_subnet(&config, &taken, &mut rng), None);
        assert_eq!(pick_subnet(&config, &nets(&["10.0.0.0/8"]), &mut rng), None);
    }

    #[test]
    fn ipv6_has_room_without_counting_it() {
        let config = config(r#"{"EnableIPv4":false,"EnableIPv6":true,"IPv6Network":"fd00::/8"}"#);
        let mut rng = fastrand::Rng::with_seed(1);
        let taken = nets(&["fd00:1::/64", "0.0.0.0/0"]);
        let found = pick_subnet(&config, &taken, &mut rng).unwrap();
        assert!(is_allowed(&config, found));
    }

    proptest! {
        #[test]
        fn never_overlaps(
            lens in proptest::collection::vec((any::<u16>(), 18u8..=32), 0..30), seed in any::<u64>(),
        ) {
            let config = config(r#"{"Network":"10.3.0.0/16","SubnetLen":20}"#);
            let taken: Vec<IpNetwork> = lens.iter().map(|(low, len)| {
                let ip = std::net::Ipv4Addr::from_bits(0x0a03_0000 | u32::from(*low));
                let net = IpNetwork::new(ip.into(), *len).unwrap();
                IpNetwork::new(net.network(), *len).unwrap()
            }).collect();
            let all = (1..16u32).map(|n| IpNetwork::new(
                std::net::Ipv4Addr::from_bits(0x0a03_0000 | n << 12).into(), 20).unwrap());
            let free: Vec<IpNetwork> =
                all.filter(|net| !taken.iter().any(|other| overlap(*net, *other))).collect();
            match pick_subnet(&config, &taken, &mut fastrand::Rng::with_seed(seed)) {
                Some(found) => prop_assert!(free.contains(&found)),
                None => prop_assert!(free.is_empty()),
            }
        }
    }
}
