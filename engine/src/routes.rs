//! Which peer an overlay address belongs to: an immutable table, longest prefix first.
//!
//! The prefixes of one family are cut into disjoint ranges when the table is built, whatever their
//! lengths are, so a lookup is the search for one range.

use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;

use ipnetwork::IpNetwork;

use crate::ecn::EcnMode;
use crate::traffic::Traffic;

/// A remote host.
#[derive(Debug, Clone)]
pub struct Peer {
    /// Where its datagrams are sent.
    pub endpoint: SocketAddr,
    /// Where its datagrams may come from, besides the endpoint's address.
    pub outer: Vec<IpAddr>,
    /// What lies behind it.
    pub subnets: Vec<IpNetwork>,
    /// Which congestion marks its packets get on the underlay.
    pub ecn: EcnMode,
    /// Whether the kernel may cut several packets to it out of one send ([`Feature::UdpSegment`]).
    ///
    /// [`Feature::UdpSegment`]: crate::features::Feature::UdpSegment
    pub segments: bool,
    /// What goes to it and comes from it, also under the routes to come.
    pub traffic: Arc<Traffic>,
}

impl Peer {
    /// Whether a datagram from `sender` may be this peer's.
    pub fn sends_from(&self, sender: IpAddr) -> bool {
        // The usual case first: the rest lies elsewhere in memory.
        self.endpoint.ip() == sender || self.outer.contains(&sender)
    }
}

/// Where an overlay address leads.
#[derive(Debug, Clone, Copy)]
pub enum Target<'a> {
    /// Into our own subnet.
    Local,
    Peer(&'a Peer),
}

/// The routes at one moment. Published as a whole; never changed.
#[derive(Debug, Default)]
pub struct RouteTable {
    peers: Vec<Peer>,
    /// Every peer's outer addresses, sorted.
    senders: Vec<IpAddr>,
    /// Every peer's endpoint and index, sorted.
    endpoints: Vec<(IpAddr, usize)>,
    v4: Ranges<u32>,
    v6: Ranges<u128>,
}

impl RouteTable {
    /// A table of our own subnets and the peers'. Where prefixes overlap the longer one wins; of
    /// equal ones ours, then the earlier peer's.
    pub fn new(local: &[IpNetwork], peers: Vec<Peer>) -> Self {
        let ours = local.iter().map(|subnet| (*subnet, LOCAL));
        let theirs = peers
            .iter()
            .zip(LOCAL + 1..)
            .flat_map(|(peer, slot)| peer.subnets.iter().map(move |subnet| (*subnet, slot)));
        let (mut v4, mut v6) = (Vec::new(), Vec::new());
        for (subnet, slot) in ours.chain(theirs) {
            match subnet {
                IpNetwork::V4(net) => v4.push(Prefix {
                    first: net.network().to_bits(),
                    last: net.broadcast().to_bits(),
                    slot,
                }),
                IpNetwork::V6(net) => v6.push(Prefix {
                    first: net.network().to_bits(),
                    last: net.broadcast().to_bits(),
                    slot,
                }),
            }
        }
        let mut senders: Vec<IpAddr> = peers
            .iter()
            .flat_map(|it| it.outer.iter().copied().chain([it.endpoint.ip()]))
            .collect();
        senders.sort_unstable();
        senders.dedup();
        let mut endpoints: Vec<(IpAddr, usize)> =
            peers.iter().enumerate().map(|(index, peer)| (peer.endpoint.ip(), index)).collect();
        endpoints.sort_unstable();
        Self { senders, endpoints, v4: Ranges::new(v4), v6: Ranges::new(v6), peers }
    }

    /// Where packets to `address` go, if anywhere.
    pub fn lookup(&self, address: IpAddr) -> Option<Target<'_>> {
        match self.slot(address) {
            NOWHERE => None,
            LOCAL => Some(Target::Local),
            slot => self.peer(number(slot)).map(Target::Peer),
        }
    }

    /// Which peer has the address in its subnets, by its number in this table.
    pub(crate) fn peer_number(&self, address: IpAddr) -> Option<usize> {
        Some(self.slot(address)).filter(|slot| *slot > LOCAL).map(number)
    }

    /// Which peer a packet with this source is from, be it a container's or the host's own.
    pub(crate) fn sender_number(&self, source: IpAddr) -> Option<usize> {
        self.peer_number(source).or_else(|| self.numbers_at(source).next())
    }

    pub(crate) fn peer(&self, number: usize) -> Option<&Peer> {
        self.peers.get(number)
    }

    fn slot(&self, address: IpAddr) -> u32 {
        match address {
            IpAddr::V4(ip) => self.v4.find(ip.to_bits()),
            IpAddr::V6(ip) => self.v6.find(ip.to_bits()),
        }
    }

    /// Whether any peer sends from this address.
    pub fn knows_sender(&self, sender: IpAddr) -> bool {
        self.senders.binary_search(&sender).is_ok()
    }

    /// The peers whose datagrams are sent to this address; more than one behind one NAT.
    pub fn peers_at(&self, endpoint: IpAddr) -> impl Iterator<Item = &Peer> {
        self.numbers_at(endpoint).filter_map(|number| self.peer(number))
    }

    fn numbers_at(&self, endpoint: IpAddr) -> impl Iterator<Item = usize> {
        let first = self.endpoints.partition_point(|(ip, _)| *ip < endpoint);
        let at = self.endpoints[first..].iter().take_while(move |(ip, _)| *ip == endpoint);
        at.map(|(_, number)| *number)
    }
}

/// A range's meaning: one of these two, or `LOCAL + 1 +` the peer's index.
const NOWHERE: u32 = 0;
const LOCAL: u32 = 1;

/// Which peer a slot stands for.
fn number(slot: u32) -> usize {
    (slot - LOCAL - 1) as usize
}

#[derive(Debug, Clone, Copy)]
struct Prefix<A> {
    first: A,
    last: A,
    slot: u32,
}

/// Disjoint ranges that cover every address from the first start on; each ends where the next one
/// starts.
///
/// The addresses from the first start to the last are divided into about as many equal buckets as
/// there are ranges, each of which knows its first range. Where prefixes lie evenly, as leases in
/// a Network do, a bucket holds one range or two, and a lookup is two reads of memory.
#[derive(Debug)]
struct Ranges<A> {
    /// Start and meaning of each, sorted.
    ranges: Vec<(A, u32)>,
    /// For each bucket, and for the end, the number of the range that its first address is in.
    buckets: Vec<u32>,
    /// The logarithm of a bucket's length.
    shift: u32,
}

impl<A> Default for Ranges<A> {
    fn default() -> Self {
        Self { ranges: Vec::new(), buckets: Vec::new(), shift: 0 }
    }
}

/// An address as a number.
trait Bits: Copy + Ord {
    /// The next address; `None` behind the last one.
    fn successor(self) -> Option<Self>;

    /// Which bucket of `1 << shift` addresses from `first` on this one is in.
    fn bucket(self, first: Self, shift: u32) -> usize;

    /// The smallest `shift` for which there are at most `buckets` from `first` to this one.
    fn shift_for(self, first: Self, buckets: usize) -> u32;
}

macro_rules! bits {
    ($number:ty) => {
        impl Bits for $number {
            fn successor(self) -> Option<Self> {
                self.checked_add(1)
            }

            fn bucket(self, first: Self, shift: u32) -> usize {
                usize::try_from(self.saturating_sub(first) >> shift).unwrap_or(usize::MAX)
            }

            fn shift_for(self, first: Self, buckets: usize) -> u32 {
                let fits = |shift: &u32| self.bucket(first, *shift) < buckets;
                (0..Self::BITS).find(fits).unwrap_or(Self::BITS - 1)
            }
        }
    };
}

bits!(u32);
bits!(u128);

impl<A: Bits> Ranges<A> {
    /// Prefixes nest or are disjoint, never cross; so, sorted by start with the outer one first, a
    /// stack of the open ones tells at each boundary which is the innermost.
    fn new(mut prefixes: Vec<Prefix<A>>) -> Self {
        prefixes.sort_by(|a, b| a.first.cmp(&b.first).then(b.last.cmp(&a.last)));
        prefixes.dedup_by(|later, kept| (later.first, later.last) == (kept.first, kept.last));
        let mut ranges = Self::default();
        let mut open: Vec<Prefix<A>> = Vec::new();
        for prefix in prefixes {
            ranges.close_before(Some(prefix.first), &mut open);
            ranges.start(prefix.first, prefix.slot);
            open.push(prefix);
        }
        ranges.close_before(None, &mut open);
        ranges.fill_buckets();
        ranges
    }

    fn fill_buckets(&mut self) {
        let (Some((first, _)), Some((last, _))) = (self.ranges.first(), self.ranges.last()) else {
            return;
        };
        self.shift = last.shift_for(*first, self.ranges.len());
        let mut last_number = 0;
        for (number, (start, _)) in (0u32..).zip(&self.ranges) {
            let bucket = start.bucket(*first, self.shift);
            // Buckets that begin behind the range before and up to this start, which is in the
            // middle of its bucket unless it is the very first.
            self.buckets.resize(bucket + 1, number.saturating_sub(1));
            last_number = number;
        }
        self.buckets.push(last_number);
    }

    /// Ends the open prefixes that end before `bound` (all of them, where there is none), each
    /// handing over to the one around it.
    fn close_before(&mut self, bound: Option<A>, open: &mut Vec<Prefix<A>>) {
        while let Some(ended) = open.pop_if(|prefix| bound.is_none_or(|bound| prefix.last < bound))
        {
            if let Some(next) = ended.last.successor() {
                self.start(next, open.last().map_or(NOWHERE, |outer| outer.slot));
            }
        }
    }

    fn start(&mut self, at: A, slot: u32) {
        // A prefix that begins where the last range began leaves that range empty.
        self.ranges.pop_if(|(start, _)| *start == at);
        self.ranges.push((at, slot));
    }

    fn find(&self, address: A) -> u32 {
        let Some((first, _)) = self.ranges.first().filter(|(first, _)| *first <= address) else {
            return NOWHERE;
        };
        let bucket = address.bucket(*first, self.shift).min(self.buckets.len() - 2);
        let (from, to) = (self.buckets[bucket] as usize, self.buckets[bucket + 1] as usize);
        // The range where the bucket begins, and those that begin inside of it.
        let inside = &self.ranges[from..=to];
        let behind = inside.partition_point(|(start, _)| *start <= address);
        inside[behind - 1].1
    }
}

#[cfg(test)]
mod tests {
    use std::net::{Ipv4Addr, Ipv6Addr};

    use proptest::prelude::*;

    use super::*;

    fn peer(index: usize, subnet: IpNetwork) -> Peer {
        let outer = Ipv4Addr::from_bits(0xc0a8_0000 + u32::try_from(index).unwrap());
        Peer {
            endpoint: SocketAddr::new(outer.into(), 8285),
            outer: vec![outer.into()],
            subnets: vec![subnet],
            ecn: EcnMode::Compatibility,
            segments: true,
            traffic: Arc::default(),
        }
    }

    fn table(local: &[&str], peers: &[&str]) -> RouteTable {
        let net = |text: &&str| text.parse().unwrap();
        let peers = peers.iter().enumerate().map(|(i, text)| peer(i, net(text))).collect();
        RouteTable::new(&local.iter().map(net).collect::<Vec<_>>(), peers)
    }

    fn subnet_of(table: &RouteTable, address: &str) -> Option<String> {
        match table.lookup(address.parse().unwrap())? {
            Target::Local => Some("local".into()),
            Target::Peer(peer) => Some(peer.subnets[0].to_string()),
        }
    }

    #[test]
    fn the_longest_prefix_wins() {
        let table = table(&["10.1.2.0/24"], &["10.1.0.0/16", "10.1.3.0/24", "10.1.3.128/25"]);
        assert_eq!(subnet_of(&table, "10.1.2.9").unwrap(), "local");
        assert_eq!(subnet_of(&table, "10.1.3.9").unwrap(), "10.1.3.0/24");
        assert_eq!(subnet_of(&table, "10.1.3.200").unwrap(), "10.1.3.128/25");
        assert_eq!(subnet_of(&table, "10.1.4.1").unwrap(), "10.1.0.0/16");
        assert_eq!(subnet_of(&table, "10.2.0.0"), None);
        assert_eq!(subnet_of(&table, "10.0.255.255"), None);
        assert_eq!(subnet_of(&table, "fd00::1"), None);
    }

    #[test]
    fn the_whole_address_space_is_a_prefix_too() {
        let table = table(&[], &["0.0.0.0/0", "::/0", "255.255.255.255/32"]);
        assert_eq!(subnet_of(&table, "0.0.0.0").unwrap(), "0.0.0.0/0");
        assert_eq!(subnet_of(&table, "255.255.255.255").unwrap(), "255.255.255.255/32");
        assert_eq!(subnet_of(&table, "ffff::").unwrap(), "::/0");
    }

    #[test]
    fn of_equal_prefixes_ours_wins() {
        assert_eq!(
            subnet_of(&table(&["10.1.2.0/24"], &["10.1.2.0/24"]), "10.1.2.3").unwrap(),
            "local"
        );
    }

    #[test]
    fn knows_every_outer_address() {
        let table = table(&[], &["10.1.0.0/24", "10.1.1.0/24"]);
        assert!(table.knows_sender("192.168.0.1".parse().unwrap()));
        assert!(!table.knows_sender("192.168.0.2".parse().unwrap()));
    }

    /// Few distinct bits, so that prefixes nest, touch and repeat.
    fn prefixes() -> impl Strategy<Value = Vec<IpNetwork>> {
        let v4 = (0u32..64, 24u8..=32).prop_map(|(low, len)| {
            IpNetwork::new(Ipv4Addr::from_bits(0x0a00_0000 | low << 2).into(), len).unwrap()
        });
        let v6 = (0u128..64, 120u8..=128).prop_map(|(low, len)| {
            IpNetwork::new(Ipv6Addr::from_bits(0xfd00 << 112 | low << 2).into(), len).unwrap()
        });
        proptest::collection::vec(prop_oneof![v4, v6], 0..40)
    }

    proptest! {
        #[test]
        fn equals_a_linear_scan(subnets in prefixes(), low in 0u32..300) {
            let peers: Vec<Peer> = subnets.iter().enumerate().map(|(i, n)| peer(i, *n)).collect();
            let table = RouteTable::new(&[], peers.clone());
            let v4 = IpAddr::from(Ipv4Addr::from_bits(0x0a00_0000 | low));
            let v6 = IpAddr::from(Ipv6Addr::from_bits(0xfd00 << 112 | u128::from(low)));
            for address in [v4, v6] {
                let mut best: Option<&Peer> = None;
                for peer in peers.iter().filter(|peer| peer.subnets[0].contains(address)) {
                    if best.is_none_or(|best| best.subnets[0].prefix() < peer.subnets[0].prefix()) {
                        best = Some(peer);
                    }
                }
                let best = best.map(|peer| peer.endpoint);
                let found = match table.lookup(address) {
                    Some(Target::Peer(peer)) => Some(peer.endpoint),
                    Some(Target::Local) | None => None,
                };
                prop_assert_eq!(found, best);
                let numbered = table.peer_number(address).and_then(|number| table.peer(number));
                prop_assert_eq!(numbered.map(|peer| peer.endpoint), best);
            }
        }
    }
}
