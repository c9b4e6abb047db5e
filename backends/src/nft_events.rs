//! Hears when anybody changes the kernel's nftables, which newer iptables write to as well.

use std::fmt;
use std::io;
use std::time::Duration;

use rtnetlink::sys::protocols::NETLINK_NETFILTER;
use rtnetlink::sys::{AsyncSocket, AsyncSocketExt, SocketAddr, TokioSocket};

/// NFNLGRP_NFTABLES (include/uapi/linux/netfilter/nfnetlink.h).
const NFTABLES_GROUP: u32 = 7;

/// Changes come in groups; all of a group are told at once.
const GROUP: Duration = Duration::from_millis(200);

/// A socket that the kernel tells of each change.
pub struct NftEvents(TokioSocket);

impl fmt::Debug for NftEvents {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("NftEvents").finish_non_exhaustive()
    }
}

impl NftEvents {
    /// Listens in the network namespace of the calling thread.
    ///
    /// # Errors
    /// The kernel has no nftables, or refused the socket.
    pub fn listen() -> io::Result<Self> {
        let mut socket = TokioSocket::new(NETLINK_NETFILTER)?;
        socket.socket_mut().bind(&SocketAddr::new(0, 0))?;
        socket.socket_mut().add_membership(NFTABLES_GROUP)?;
        Ok(Self(socket))
    }

    /// Waits until something has changed. What it was does not matter: whoever listens looks at
    /// everything anew. Dropped midway, it may lose a change.
    pub async fn changed(&self) {
        let mut scrap = Vec::with_capacity(4096);
        // An error says that there were more changes than the kernel could tell of.
        let _ = self.0.recv(&mut scrap).await;
        tokio::time::sleep(GROUP).await;
        while self.0.socket_ref().recv(&mut scrap, 0).is_ok() {
            scrap.clear();
        }
    }
}
