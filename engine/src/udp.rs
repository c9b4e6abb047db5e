//! The sockets on the underlay: one a worker, all on one address and port (SO_REUSEPORT).
//!
//! They are not connected, so that a peer's ICMP errors do not fail sends to others. They send with
//! DF set and let the kernel track each path's MTU, so that a smaller path shows as EMSGSIZE here
//! and not as a silent loss on the way (RFC 1191, ip(7) IP_MTU_DISCOVER).

use std::io;
use std::net::{IpAddr, SocketAddr};
use std::os::fd::{AsFd, BorrowedFd};
use std::thread;
use std::time::{Duration, Instant};

use socket2::{Domain, Protocol, SockAddr, Socket, Type};

use crate::sys;

/// Bytes asked for each socket buffer. flannel's default of 208 KiB loses a tenth of the packets
/// of one TCP stream.
const SOCKET_BUFFER_LEN: libc::c_int = 8 << 20;

/// How long the sockets of a process that has just ended may keep the port busy; see
/// [`crate::tun`].
const BUSY_GRACE: Duration = Duration::from_millis(500);

/// A UDP socket on the underlay.
#[derive(Debug)]
pub(crate) struct UdpSocket {
    socket: Socket,
    local: SocketAddr,
}

impl UdpSocket {
    /// Binds `count` sockets to one address, after making sure that nobody else has it: with
    /// SO_REUSEPORT alone, a second daemon would silently get half of the datagrams.
    ///
    /// # Errors
    /// EADDRINUSE: somebody else has the port. EADDRNOTAVAIL: no interface has the address.
    pub(crate) fn bind_group(local: SocketAddr, count: usize) -> io::Result<Vec<Self>> {
        wait_until_free(local)?;
        (0..count).map(|_| Self::bind(local)).collect()
    }

    fn bind(local: SocketAddr) -> io::Result<Self> {
        let socket = Socket::new(Domain::for_address(local), Type::DGRAM, Some(Protocol::UDP))?;
        socket.set_reuse_port(true)?;
        force_buffer(&socket, libc::SO_RCVBUFFORCE, libc::SO_RCVBUF)?;
        force_buffer(&socket, libc::SO_SNDBUFFORCE, libc::SO_SNDBUF)?;
        let socket = Self { socket, local };
        socket.set_dont_fragment(true)?;
        // Datagrams of one length that come in a row are then received as one (UDP_GRO, udp(7)).
        sys::set_option(socket.as_fd(), libc::SOL_UDP, libc::UDP_GRO, 1)?;
        socket.socket.bind(&local.into())?;
        Ok(socket)
    }

    /// Bytes of an IP packet that the path to this peer carries, as far as the kernel knows.
    pub(crate) fn path_mtu(&self, peer: SocketAddr) -> io::Result<u32> {
        // IP_MTU answers for connected sockets only, so ask through one that nobody sends on.
        let probe = Socket::new(self.socket.domain()?, Type::DGRAM, Some(Protocol::UDP))?;
        probe.bind(&SocketAddr::new(self.local.ip(), 0).into())?;
        probe.connect(&peer.into())?;
        let mtu = match self.local.ip() {
            IpAddr::V4(_) => sys::option(probe.as_fd(), libc::IPPROTO_IP, libc::IP_MTU)?,
            IpAddr::V6(_) => sys::option(probe.as_fd(), libc::IPPROTO_IPV6, libc::IPV6_MTU)?,
        };
        u32::try_from(mtu).map_err(io::Error::other)
    }

    /// Sends one packet, outside of any batch.
    pub(crate) fn send(&self, packet: &[u8], peer: SocketAddr) -> io::Result<usize> {
        self.socket.send_to_with_flags(packet, &SockAddr::from(peer), libc::MSG_DONTWAIT)
    }

    /// Sends one packet in as many fragments as the path needs.
    pub(crate) fn send_fragmented(&self, packet: &[u8], peer: SocketAddr) -> io::Result<usize> {
        // The option belongs to the socket, so a packet that the worker's other thread sends in
        // between may lose its DF: no harm is done.
        self.set_dont_fragment(false)?;
        let sent = self.send(packet, peer);
        self.set_dont_fragment(true)?;
        sent
    }

    fn set_dont_fragment(&self, on: bool) -> io::Result<()> {
        let (level, option, value) = match (self.local.ip(), on) {
            (IpAddr::V4(_), true) => {
                (libc::IPPROTO_IP, libc::IP_MTU_DISCOVER, libc::IP_PMTUDISC_DO)
            }
            (IpAddr::V4(_), false) => {
                (libc::IPPROTO_IP, libc::IP_MTU_DISCOVER, libc::IP_PMTUDISC_WANT)
            }
            (IpAddr::V6(_), true) => {
                (libc::IPPROTO_IPV6, libc::IPV6_MTU_DISCOVER, libc::IPV6_PMTUDISC_DO)
            }
            (IpAddr::V6(_), false) => {
                (libc::IPPROTO_IPV6, libc::IPV6_MTU_DISCOVER, libc::IPV6_PMTUDISC_WANT)
            }
        };
        sys::set_option(self.socket.as_fd(), level, option, value)
    }
}

impl AsFd for UdpSocket {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

fn wait_until_free(local: SocketAddr) -> io::Result<()> {
    let deadline = Instant::now() + BUSY_GRACE;
    loop {
        let alone = Socket::new(Domain::for_address(local), Type::DGRAM, Some(Protocol::UDP))?;
        match alone.bind(&local.into()) {
            Err(error) if error.kind() == io::ErrorKind::AddrInUse && Instant::now() < deadline => {
                thread::sleep(Duration::from_millis(10));
            }
            answer => return answer,
        }
    }
}

/// Past the limit that `net.core.rmem_max` sets for everybody, where we may (CAP_NET_ADMIN in the
/// machine's own user namespace); up to it, where not.
fn force_buffer(socket: &Socket, force: libc::c_int, plain: libc::c_int) -> io::Result<()> {
    let set = |option| sys::set_option(socket.as_fd(), libc::SOL_SOCKET, option, SOCKET_BUFFER_LEN);
    set(force).or_else(|_| set(plain))
}
