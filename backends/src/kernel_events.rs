//! Hears when anybody changes what the kernel forwards by: links, addresses, routes and neighbours,
//! or nftables, which newer iptables write to as well.

use std::fmt;
use std::io;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use rtnetlink::MulticastGroup as Group;
use rtnetlink::sys::protocols::{NETLINK_NETFILTER, NETLINK_ROUTE};
use rtnetlink::sys::{AsyncSocket, AsyncSocketExt, SocketAddr, TokioSocket};
use socket2::{SockFilter, SockRef};
use tokio::time::Instant;

/// NFNLGRP_NFTABLES (include/uapi/linux/netfilter/nfnetlink.h).
const NFTABLES: u32 = 7;
const ROUTING: [Group; 6] = [
    Group::Link,
    Group::Neigh,
    Group::Ipv4Ifaddr,
    Group::Ipv4Route,
    Group::Ipv6Ifaddr,
    Group::Ipv6Route,
];
/// RTM_NEWNEIGH and RTM_DELNEIGH, of neighbours and of forwarding entries (FDB) alike.
const NEIGHBOUR: [u16; 2] = [28, 29];

/// Changes come in groups; all of a group are told at once.
const GROUP: Duration = Duration::from_millis(200);

/// A socket that the kernel tells of each change.
pub struct KernelEvents {
    socket: TokioSocket,
    /// When to tell of a change that was heard of, and is not told yet.
    due: Mutex<Option<Instant>>,
    /// The links whose neighbours it is told of, by index.
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
        let events = Self::listen(NETLINK_ROUTE, &ROUTING.map(|group| group as u32))?;
        events.filter(&[])?;
        Ok(events)
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
        let mut known = locked(&self.neighbours_of);
        if *known != links {
            if let Err(error) = self.filter(&links) {
                tracing::warn!("changes of neighbours are seen each 30 s only: {error}");
            }
            *known = links;
        }
    }

    /// In the kernel: with many peers there are hundreds of such changes a second, which would wake us
    /// in vain, and overrun the socket.
    fn filter(&self, links: &[u32]) -> io::Result<()> {
        SockRef::from(&self.socket.socket_ref()).attach_filter(&neighbours_only_of(links))
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
                let _ = self.socket.recv(&mut scrap).await;
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
}

/// Instructions that let pass what is not about a neighbour, and what is about one on these links
/// (Documentation/networking/filter.rst). A message is a struct nlmsghdr and, about a neighbour, a
/// struct ndmsg; the kernel puts one into a datagram.
fn neighbours_only_of(links: &[u32]) -> Vec<SockFilter> {
    // What is loaded is taken for big endian.
    let [new, gone] = NEIGHBOUR.map(|kind| u16::from_be_bytes(kind.to_ne_bytes()).into());
    let link = |link: &u32| u32::from_be_bytes(link.to_ne_bytes());
    let count = u8::try_from(links.len()).unwrap_or(u8::MAX - 2);
    let mut filter = vec![
        SockFilter::new(0x28, 0, 0, 4),            // ldh [4]: its type
        SockFilter::new(0x15, 1, 0, new),          // jeq new, to the link
        SockFilter::new(0x15, 0, count + 2, gone), // jeq gone, to the link, else to the last
        SockFilter::new(0x20, 0, 0, 20),           // ld [20]: its link
    ];
    let links = links.iter().zip((1..=count).rev());
    filter.extend(links.map(|(it, left)| SockFilter::new(0x15, left, 0, link(it)))); // jeq, to the last
    filter.push(SockFilter::new(0x06, 0, 0, 0)); // ret 0: nothing of it
    filter.push(SockFilter::new(0x06, 0, 0, u32::MAX)); // ret -1: all of it
    filter
}

fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
