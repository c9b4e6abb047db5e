//! What goes to each peer, and what comes from it.

use std::sync::atomic::{AtomicU64, Ordering};

use crate::io::Direction;
use crate::routes::RouteTable;

/// Packets, and their bytes without the outer headers.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Amount {
    pub packets: u64,
    pub bytes: u64,
}

/// What one peer was sent, and what from it was let through. All threads add to it.
#[derive(Debug, Default)]
pub struct Traffic {
    sent: Sum,
    received: Sum,
}

#[derive(Debug, Default)]
struct Sum {
    packets: AtomicU64,
    bytes: AtomicU64,
}

impl Traffic {
    /// What went this way so far.
    pub fn read(&self, direction: Direction) -> Amount {
        let Sum { packets, bytes } = self.sum(direction);
        Amount { packets: packets.load(Ordering::Relaxed), bytes: bytes.load(Ordering::Relaxed) }
    }

    fn add(&self, direction: Direction, amount: Amount) {
        let Sum { packets, bytes } = self.sum(direction);
        packets.fetch_add(amount.packets, Ordering::Relaxed);
        bytes.fetch_add(amount.bytes, Ordering::Relaxed);
    }

    fn sum(&self, direction: Direction) -> &Sum {
        match direction {
            Direction::TunToUdp => &self.sent,
            Direction::UdpToTun => &self.received,
        }
    }
}

/// What one direction of a worker has moved for the peer that it met last. Threads would wait for each other's
/// additions, so they add when the peer changes, and when a batch ends.
#[derive(Debug)]
pub(crate) struct Tally {
    direction: Direction,
    /// Its number in the routes of this batch.
    peer: Option<usize>,
    amount: Amount,
}

impl Tally {
    pub(crate) fn new(direction: Direction) -> Self {
        Self { direction, peer: None, amount: Amount::default() }
    }

    /// Takes in what went to a peer, or came from it.
    pub(crate) fn add(&mut self, routes: &RouteTable, peer: Option<usize>, amount: Amount) {
        if self.peer != peer {
            self.settle(routes);
            self.peer = peer;
        }
        self.amount.packets += amount.packets;
        self.amount.bytes += amount.bytes;
    }

    /// To be called before the routes change.
    pub(crate) fn settle(&mut self, routes: &RouteTable) {
        let amount = std::mem::take(&mut self.amount);
        if let Some(peer) = self.peer.take().and_then(|number| routes.peer(number)) {
            peer.traffic.add(self.direction, amount);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::net::{IpAddr, SocketAddr};
    use std::sync::Arc;

    use super::*;
    use crate::ecn::EcnMode;
    use crate::routes::Peer;

    #[test]
    fn each_peer_gets_what_is_its_own() {
        let peers = [1, 2].map(|number| Peer {
            endpoint: SocketAddr::from(([192, 0, 2, number], 8285)),
            outer: Vec::new(),
            subnets: vec![format!("10.42.{number}.0/24").parse().unwrap()],
            ecn: EcnMode::Normal,
            segments: true,
            traffic: Arc::default(),
        });
        let routes = RouteTable::new(&[], peers.to_vec());
        let mut tally = Tally::new(Direction::UdpToTun);
        for (address, bytes) in [("10.42.1.1", 7), ("10.42.1.2", 8), ("10.42.2.1", 9)] {
            let peer = routes.peer_number(address.parse::<IpAddr>().unwrap());
            tally.add(&routes, peer, Amount { packets: 1, bytes });
        }
        tally.add(&routes, None, Amount { packets: 1, bytes: 100 });
        tally.settle(&routes);
        let received = peers.each_ref().map(|peer| peer.traffic.read(Direction::UdpToTun));
        assert_eq!(received, [Amount { packets: 2, bytes: 15 }, Amount { packets: 1, bytes: 9 }]);
        assert_eq!(peers[0].traffic.read(Direction::TunToUdp), Amount::default());
    }
}
