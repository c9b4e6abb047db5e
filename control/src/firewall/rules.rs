//! The rules, with flannel's meaning: which packet gets which verdict, and in which order.

use std::fmt;
use std::net::IpAddr;

use ipnetwork::{IpNetwork, Ipv4Network, Ipv6Network};

use crate::config::NetworkConfig;
use crate::lease::LeaseKey;

/// kube-proxy marks so what it masquerades itself.
pub const KUBE_MARK: u32 = 0x4000;

/// What is asked of the firewall.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Rules {
    pub ipv4: FamilyRules,
    pub ipv6: FamilyRules,
    /// Whether masqueraded connections get ports that nobody can guess, which also keeps two that
    /// begin in one instant from getting the same one.
    pub random_fully: bool,
}

/// The rules of one family. A chain without rules is not there at all.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct FamilyRules {
    /// For packets that are about to leave the host.
    pub postrouting: Vec<Rule>,
    /// For packets that pass through the host.
    pub forward: Vec<Rule>,
}

/// One rule: packets that are all of this get the verdict.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Rule {
    /// The interface that they come in by.
    pub input: Option<String>,
    pub from: Option<Side>,
    pub to: Option<Side>,
    /// Bits that are all set in the packet's mark.
    pub mark: Option<u32>,
    pub verdict: Verdict,
}

impl Rule {
    /// Whether it takes a packet of a container's that nobody has marked.
    pub fn takes(&self, from: IpAddr, to: IpAddr) -> bool {
        let is = |side: Option<Side>, ip: IpAddr| match side {
            None => true,
            Some(Side::In(network)) => network.contains(ip),
            Some(Side::Out(network)) => !network.contains(ip),
        };
        self.mark.is_none() && self.input.is_none() && is(self.from, from) && is(self.to, to)
    }
}

impl fmt::Display for Rule {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self.verdict {
            Verdict::Return => "leave alone",
            Verdict::Masquerade => "masquerade",
            Verdict::Accept => "accept",
            Verdict::Drop => "drop",
        })?;
        if let Some(input) = &self.input {
            write!(f, " by {input}")?;
        }
        for (side, word) in [(self.from, "from"), (self.to, "to")] {
            match side {
                None => {}
                Some(Side::In(network)) => write!(f, " {word} {network}")?,
                Some(Side::Out(network)) => write!(f, " not {word} {network}")?,
            }
        }
        match self.mark {
            Some(mark) => write!(f, " with mark {mark:#x}"),
            None => Ok(()),
        }
    }
}

/// Inside of a network, or outside of it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Side {
    In(IpNetwork),
    Out(IpNetwork),
}

/// What becomes of a packet.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Verdict {
    /// As if our rules were not there.
    #[default]
    Return,
    Masquerade,
    Accept,
    Drop,
}

/// What an operator switches.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Switches {
    /// `--ip-masq`
    pub masquerade: bool,
    /// `--iptables-forward-rules`
    pub forward: bool,
    /// Not `--ip-masq-fully-random-disable`
    pub random_fully: bool,
}

impl Rules {
    /// For a node with this lease. `outside`: the interface by which packets between containers come wrapped
    /// only, if there is one.
    pub fn new(
        config: &NetworkConfig,
        lease: &LeaseKey,
        switches: Switches,
        outside: Option<&str>,
    ) -> Self {
        let mut rules = Self { random_fully: switches.random_fully, ..Self::default() };
        for subnet in lease.networks() {
            let Some(family) = config.family(subnet.is_ipv6()) else { continue };
            let own = rules.family_mut(subnet.is_ipv6());
            if switches.masquerade {
                own.postrouting = postrouting(family.network, subnet);
            }
            if switches.forward {
                own.forward = forward(family.network, outside);
            }
        }
        rules
    }

    /// Whether nothing is asked.
    pub fn is_empty(&self) -> bool {
        [&self.ipv4, &self.ipv6].iter().all(|it| it.postrouting.is_empty() && it.forward.is_empty())
    }

    /// The rules of a family.
    pub fn family(&self, ipv6: bool) -> &FamilyRules {
        if ipv6 { &self.ipv6 } else { &self.ipv4 }
    }

    fn family_mut(&mut self, ipv6: bool) -> &mut FamilyRules {
        if ipv6 { &mut self.ipv6 } else { &mut self.ipv4 }
    }
}

fn rule(from: Side, to: Side, verdict: Verdict) -> Rule {
    Rule { from: Some(from), to: Some(to), verdict, ..Rule::default() }
}

/// Containers of the overlay see each other's own addresses; the world outside sees the host's.
fn postrouting(network: IpNetwork, subnet: IpNetwork) -> Vec<Rule> {
    use Side::{In, Out};
    use Verdict::{Masquerade, Return};
    vec![
        Rule { mark: Some(KUBE_MARK), verdict: Return, ..Rule::default() },
        // From our containers to the overlay, and back.
        rule(In(subnet), In(network), Return),
        rule(In(network), In(subnet), Return),
        // To our containers from outside: they see who it is.
        rule(Out(network), In(subnet), Return),
        // From our containers to the outside, but for multicast.
        rule(In(network), Out(multicast(network.is_ipv6())), Masquerade),
        // From outside to other hosts' containers, whose answers are to come back this way.
        rule(Out(network), In(network), Masquerade),
    ]
}

/// Hosts that drop what they are not told to forward still forward for the overlay; but not what claims to come
/// from a container elsewhere and has passed no guard.
fn forward(network: IpNetwork, outside: Option<&str>) -> Vec<Rule> {
    let accept = |from, to| Rule { from, to, verdict: Verdict::Accept, ..Rule::default() };
    let inside = Side::In(network);
    let forged = outside
        .filter(|name| is_plain(name))
        .map(|name| Rule { input: Some(name.to_owned()), ..rule(inside, inside, Verdict::Drop) });
    let accepts = [accept(Some(inside), None), accept(None, Some(inside))];
    forged.into_iter().chain(accepts).collect()
}

/// Whether an interface's name means itself to iptables and nft, which read patterns and quotes.
fn is_plain(name: &str) -> bool {
    name.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"._-@".contains(&byte))
}

/// 224.0.0.0/4 and ff00::/8 (RFC 5771, RFC 4291).
fn multicast(ipv6: bool) -> IpNetwork {
    if ipv6 {
        let base = std::net::Ipv6Addr::new(0xff00, 0, 0, 0, 0, 0, 0, 0);
        Ipv6Network::new_checked(base, 8).expect("valid by construction").into()
    } else {
        let base = std::net::Ipv4Addr::new(224, 0, 0, 0);
        Ipv4Network::new_checked(base, 4).expect("valid by construction").into()
    }
}
