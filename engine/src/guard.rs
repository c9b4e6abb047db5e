//! Who may send what to whom: the verdict on a datagram from the network, before any byte of it
//! reaches the TUN.
//!
//! There is no table of rules: the routes are the rules. A packet may come from a peer exactly if
//! we would send a packet to its source through that peer.

use std::net::IpAddr;

use crate::packet::IpView;
use crate::routes::{RouteTable, Target};

/// How much is checked.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum GuardMode {
    /// The outer sender, the inner source and the inner destination.
    Strict,
    /// The outer sender and the inner destination: for fleets whose hosts forward packets of
    /// others into the overlay without masquerading.
    Peer,
    /// Well-formed packets from anywhere to anywhere, as flannel does; but none that claim to come from our
    /// subnet or our address on the underlay, which the kernel would drop if our own ICMP errors did not need
    /// it to let them in.
    Off,
}

/// What becomes of a datagram. Each verdict has its own counter.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Verdict {
    Deliver,
    /// Well-formed and allowed, but out of hops: the sender is owed an ICMP error.
    TtlExpired,
    /// No IP packet, or a header that lies.
    Malformed,
    /// Larger than the overlay's MTU: no peer of ours has read it from a TUN.
    Oversized,
    /// The outer sender is no peer.
    UnknownSender,
    /// The inner source belongs to somebody else.
    ForeignSource,
    /// The inner destination is not in our subnet.
    ForeignDestination,
}

/// The guard's settings.
#[derive(Debug, Clone, Copy)]
pub struct Guard {
    pub mode: GuardMode,
    /// The largest inner packet, in bytes.
    pub mtu: usize,
    /// Our own address on the underlay.
    pub own: IpAddr,
}

impl Guard {
    /// Judges one datagram by its outer sender and its bytes.
    pub fn judge(&self, routes: &RouteTable, sender: IpAddr, datagram: &[u8]) -> Verdict {
        let verdict = self.judge_packet(routes, sender, datagram);
        let is_bad = !matches!(verdict, Verdict::Deliver | Verdict::TtlExpired);
        // A packet from nowhere is told apart from a wrong one of a peer's. A source that is the
        // sender's has proven in `strict` that it is a peer, so only what fails pays for this.
        let unproven = is_bad || self.mode == GuardMode::Peer;
        if unproven && self.mode != GuardMode::Off && !routes.knows_sender(sender) {
            return Verdict::UnknownSender;
        }
        verdict
    }

    fn judge_packet(&self, routes: &RouteTable, sender: IpAddr, datagram: &[u8]) -> Verdict {
        if datagram.len() > self.mtu {
            return Verdict::Oversized;
        }
        let Ok(packet) = IpView::check(datagram) else {
            return Verdict::Malformed;
        };
        if !packet.header_is_intact() {
            return Verdict::Malformed;
        }
        let is_ours = || matches!(routes.lookup(packet.destination()), Some(Target::Local));
        if self.mode != GuardMode::Off && !is_ours() {
            return Verdict::ForeignDestination;
        }
        let is_foreign = match self.mode {
            GuardMode::Strict => !may_come_from(routes, packet.source(), sender),
            GuardMode::Peer | GuardMode::Off => {
                packet.source() == self.own
                    || matches!(routes.lookup(packet.source()), Some(Target::Local))
            }
        };
        if is_foreign {
            return Verdict::ForeignSource;
        }
        if packet.ttl() <= 1 { Verdict::TtlExpired } else { Verdict::Deliver }
    }
}

/// A peer may send from its subnets and, for processes of the host itself, from the address that
/// we know it by.
fn may_come_from(routes: &RouteTable, source: IpAddr, sender: IpAddr) -> bool {
    match routes.lookup(source) {
        Some(Target::Peer(peer)) => peer.sends_from(sender),
        Some(Target::Local) => false,
        None => routes.peers_at(source).any(|peer| peer.sends_from(sender)),
    }
}

#[cfg(test)]
mod tests {
    use std::net::SocketAddr;
    use std::sync::Arc;

    use super::*;
    use crate::ecn::EcnMode;
    use crate::packet::tests::udp;
    use crate::routes::Peer;

    const MTU: usize = 1472;

    fn routes() -> RouteTable {
        let peer = |public: &str, other: &str, subnet: &str| Peer {
            endpoint: SocketAddr::new(public.parse().unwrap(), 8285),
            outer: vec![public.parse().unwrap(), other.parse().unwrap()],
            subnets: vec![subnet.parse().unwrap()],
            ecn: EcnMode::Compatibility,
            segments: true,
            traffic: Arc::default(),
        };
        RouteTable::new(
            &["10.42.1.0/24".parse().unwrap()],
            vec![
                peer("192.0.2.2", "198.51.100.2", "10.42.2.0/24"),
                peer("192.0.2.3", "198.51.100.3", "10.42.3.0/24"),
            ],
        )
    }

    fn guard(mode: GuardMode) -> Guard {
        Guard { mode, mtu: MTU, own: "192.0.2.1".parse().unwrap() }
    }

    fn verdict(mode: GuardMode, sender: &str, source: &str, destination: &str) -> Verdict {
        let packet = udp(source, destination, 62, b"x");
        guard(mode).judge(&routes(), sender.parse().unwrap(), &packet)
    }

    #[test]
    fn strict_binds_source_sender_and_destination() {
        let strict = |sender, source, to| verdict(GuardMode::Strict, sender, source, to);
        let peer = "192.0.2.2";
        assert_eq!(strict(peer, "10.42.2.9", "10.42.1.9"), Verdict::Deliver);
        assert_eq!(strict("198.51.100.2", "10.42.2.9", "10.42.1.9"), Verdict::Deliver);
        assert_eq!(strict(peer, "192.0.2.2", "10.42.1.9"), Verdict::Deliver);
        assert_eq!(strict(peer, "192.0.2.3", "10.42.1.9"), Verdict::ForeignSource);
        assert_eq!(strict(peer, "10.42.3.9", "10.42.1.9"), Verdict::ForeignSource);
        assert_eq!(strict(peer, "10.42.1.7", "10.42.1.9"), Verdict::ForeignSource);
        assert_eq!(strict(peer, "8.8.8.8", "10.42.1.9"), Verdict::ForeignSource);
        assert_eq!(strict(peer, "10.42.2.9", "10.42.3.9"), Verdict::ForeignDestination);
        assert_eq!(strict(peer, "10.42.2.9", "192.0.2.1"), Verdict::ForeignDestination);
        assert_eq!(strict("192.0.2.9", "10.42.2.9", "10.42.1.9"), Verdict::UnknownSender);
    }

    #[test]
    fn peer_mode_lets_any_source_of_a_peer_through() {
        let peer = |sender, source, to| verdict(GuardMode::Peer, sender, source, to);
        assert_eq!(peer("192.0.2.2", "8.8.8.8", "10.42.1.9"), Verdict::Deliver);
        assert_eq!(peer("192.0.2.2", "8.8.8.8", "10.42.3.9"), Verdict::ForeignDestination);
        assert_eq!(peer("192.0.2.9", "10.42.2.9", "10.42.1.9"), Verdict::UnknownSender);
        assert_eq!(peer("192.0.2.2", "10.42.1.7", "10.42.1.9"), Verdict::ForeignSource);
        assert_eq!(peer("192.0.2.2", "192.0.2.1", "10.42.1.9"), Verdict::ForeignSource);
    }

    #[test]
    fn off_still_refuses_what_is_no_packet_or_claims_to_be_ours() {
        let off = guard(GuardMode::Off);
        let sender = "192.0.2.9".parse().unwrap();
        let packet = udp("1.2.3.4", "5.6.7.8", 62, b"x");
        assert_eq!(off.judge(&routes(), sender, &packet), Verdict::Deliver);
        assert_eq!(off.judge(&routes(), sender, &packet[..27]), Verdict::Malformed);
        for ours in ["10.42.1.7", "192.0.2.1"] {
            let packet = udp(ours, "5.6.7.8", 62, b"x");
            assert_eq!(off.judge(&routes(), sender, &packet), Verdict::ForeignSource);
        }
    }

    #[test]
    fn shape_comes_before_addresses() {
        let guard = guard(GuardMode::Strict);
        let sender = "192.0.2.2".parse().unwrap();
        let judge = |packet: &[u8]| guard.judge(&routes(), sender, packet);
        let mut packet = udp("10.42.2.9", "10.42.1.9", 62, &[0; MTU - 28]);
        assert_eq!(judge(&packet), Verdict::Deliver);
        packet[13] ^= 1;
        assert_eq!(judge(&packet), Verdict::Malformed, "header checksum");
        let larger = udp("10.42.2.9", "10.42.1.9", 62, &[0; MTU - 27]);
        assert_eq!(judge(&larger), Verdict::Oversized);
        for ttl in [0, 1] {
            let packet = udp("10.42.2.9", "10.42.1.9", ttl, b"x");
            assert_eq!(judge(&packet), Verdict::TtlExpired);
        }
    }
}
