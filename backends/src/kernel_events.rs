//! Hears when anybody changes what the kernel forwards by: links, addresses, routes and neighbours,
//! or nftables, which newer iptables write to as well.

use std::fmt;
use std::io;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use rtnetlink::sys::protocols::{NETLINK_NETFILTER, NETLINK_ROUTE};
use rtnetlink::sys::{AsyncSocket, AsyncSocketExt, SocketAddr, TokioSocket};
use tokio::time::Instant;

/// NFNLGRP_NFTABLES (include/uapi/linux/netfilter/nfnetlink.h).
const NFTABLES: u32 = 7;
/// RTNLGRP_LINK, RTNLGRP_NEIGH, RTNLGRP_IPV4_IFADDR, RTNLGRP_IPV4_ROUTE, RTNLGRP_IPV6_IFADDR and
/// RTNLGRP_IPV6_ROUTE (include/uapi/linux/rtnetlink.h).
const ROUTING: [u32; 6] = [1, 3, 5, 7, 9, 11];
/// RTM_NEWNEIGH and RTM_DELNEIGH, of neighbours and of forwarding entries (FDB) alike.
const NEIGHBOUR: [u16; 2] = [28, 29];

/// Changes come in groups; all of a group are told at once.
const GROUP: Duration = Duration::from_millis(200);

/// A socket that the kernel tells of each change.
pub struct KernelEvents {
    socket: TokioSocket,
    /// When to tell of a change that was heard of, and is not told yet.
    due: Mutex<Option<Instant>>,
    /// By index.
    neighbours_of: Mutex<Vec<u32>>,
}

impl fmt::Debug for KernelEvents {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("KernelEvents").finish_non_exhaustive()
    }
}

impl KernelEvents {
    /// About nftables, in the network namespace of the calling thread.
    ///
    /// # Errors
    /// The kernel has no nftables, or refused the socket.
    pub fn of_nftables() -> io::Result<Self> {
        Self::listen(NETLINK_NETFILTER, &[NFTABLES])
    }

    /// About links, addresses, routes and, once asked for, neighbours, in the network namespace of
    /// the calling thread.
    ///
    /// # Errors
    /// The kernel refused the socket.
    pub fn of_routing() -> io::Result<Self> {
        Self::listen(NETLINK_ROUTE, &ROUTING)
    }

    fn listen(protocol: isize, groups: &[u32]) -> io::Result<Self> {
        let mut socket = TokioSocket::new(protocol)?;
        socket.socket_mut().bind(&SocketAddr::new(0, 0))?;
        for group in groups {
            socket.socket_mut().add_membership(*group)?;
        }
        Ok(Self { socket, due: Mutex::default(), neighbours_of: Mutex::default() })
    }

    /// Tells of neighbours on these links, and no others: elsewhere each conversation changes some.
    pub fn hear_neighbours_of(&self, links: Vec<u32>) {
        *locked(&self.neighbours_of) = links;
    }

    /// Waits until something has changed. What it was does not matter: whoever listens looks at
    /// everything anew. Cancel safe.
    pub async fn changed(&self) {
        let mut scrap = Vec::with_capacity(4096);
        let due = *locked(&self.due);
        let due = match due {
            Some(due) => due,
            None => {
                // An error says that there were more changes than the kernel could tell of.
                while self.socket.recv(&mut scrap).await.is_ok() && !self.matters(&scrap) {
                    scrap.clear();
                }
                *locked(&self.due).insert(Instant::now() + GROUP)
            }
        };
        tokio::time::sleep_until(due).await;
        scrap.clear();
        while self.socket.socket_ref().recv(&mut scrap, 0).is_ok() {
            scrap.clear();
        }
        *locked(&self.due) = None;
    }

    fn matters(&self, message: &[u8]) -> bool {
        let links = locked(&self.neighbours_of);
        link_of_neighbour(message).is_none_or(|link| links.contains(&link))
    }
}

/// Of a message about a neighbour (struct nlmsghdr, then struct ndmsg); `None` of any other. The
/// kernel puts one message into a datagram.
fn link_of_neighbour(message: &[u8]) -> Option<u32> {
    let (kind, link) = (message.get(4..6)?, message.get(20..24)?);
    let kind = u16::from_ne_bytes(kind.try_into().ok()?);
    NEIGHBOUR.contains(&kind).then(|| link.try_into().ok().map(u32::from_ne_bytes))?
}

fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_message_about_a_neighbour_tells_its_link() {
        let message = |kind: u16| {
            let mut message = [0; 28];
            message[4..6].copy_from_slice(&kind.to_ne_bytes());
            message[20..24].copy_from_slice(&7u32.to_ne_bytes());
            message
        };
        assert_eq!(link_of_neighbour(&message(28)), Some(7));
        assert_eq!(link_of_neighbour(&message(29)), Some(7));
        assert_eq!(link_of_neighbour(&message(24)), None, "a route");
        assert_eq!(link_of_neighbour(&message(28)[..22]), None, "cut short");
    }
}
