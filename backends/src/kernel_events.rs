//! Hears when anybody changes what the kernel forwards by: links, addresses and routes, or nftables,
//! which newer iptables write to as well.

use std::fmt;
use std::io;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use rtnetlink::sys::protocols::{NETLINK_NETFILTER, NETLINK_ROUTE};
use rtnetlink::sys::{AsyncSocket, AsyncSocketExt, SocketAddr, TokioSocket};
use tokio::time::Instant;

/// NFNLGRP_NFTABLES (include/uapi/linux/netfilter/nfnetlink.h).
const NFTABLES: u32 = 7;
/// RTNLGRP_LINK, RTNLGRP_IPV4_IFADDR, RTNLGRP_IPV4_ROUTE, RTNLGRP_IPV6_IFADDR and RTNLGRP_IPV6_ROUTE
/// (include/uapi/linux/rtnetlink.h).
const ROUTING: [u32; 5] = [1, 5, 7, 9, 11];

/// Changes come in groups; all of a group are told at once.
const GROUP: Duration = Duration::from_millis(200);

/// A socket that the kernel tells of each change.
pub struct KernelEvents {
    socket: TokioSocket,
    /// When to tell of a change that was heard of, and is not told yet.
    due: Mutex<Option<Instant>>,
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

    /// About links, addresses and routes, in the network namespace of the calling thread.
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
        Ok(Self { socket, due: Mutex::new(None) })
    }

    /// Waits until something has changed. What it was does not matter: whoever listens looks at
    /// everything anew. Cancel safe.
    pub async fn changed(&self) {
        let mut scrap = Vec::with_capacity(4096);
        let due = *self.due();
        let due = match due {
            Some(due) => due,
            None => {
                // An error says that there were more changes than the kernel could tell of.
                let _ = self.socket.recv(&mut scrap).await;
                *self.due().insert(Instant::now() + GROUP)
            }
        };
        tokio::time::sleep_until(due).await;
        scrap.clear();
        while self.socket.socket_ref().recv(&mut scrap, 0).is_ok() {
            scrap.clear();
        }
        *self.due() = None;
    }

    fn due(&self) -> MutexGuard<'_, Option<Instant>> {
        self.due.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
