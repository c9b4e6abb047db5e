//! The sockets on the underlay: one a worker to receive, all on one address and port (SO_REUSEPORT),
//! and perhaps some on other ports, to send from only.
//!
//! The kernel gives all datagrams of one sender's address and port to one socket of the group. So a
//! peer that sends from several ports, each flow from one, uses several of our workers, and its
//! flows keep their order.
//!
//! They are not connected, so that a peer's ICMP errors do not fail sends to others. They send with
//! DF set and let the kernel track each path's MTU, so that a smaller path shows as EMSGSIZE here
//! and not as a silent loss on the way (RFC 1191, ip(7) IP_MTU_DISCOVER).

use std::io;
use std::net::{IpAddr, SocketAddr};
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use rustix::net::sockopt::{self, Ipv4PathMtuDiscovery, Ipv6PathMtuDiscovery};
use socket2::{Domain, Protocol, SockFilter, Socket, Type};

use crate::batch::{Outer, Transmit};
use crate::features::{Feature, FeatureState, Features};
use crate::sys;

/// Ports that flows are spread over, where they are: so many that they hardly ever all fall to one
/// of the peer's workers.
const SOURCE_PORTS: usize = 16;

/// Bytes asked for each socket buffer. flannel's default of 208 KiB loses a tenth of the packets
/// of one TCP stream.
pub const SOCKET_BUFFER_LEN: u32 = 8 << 20;
/// Past the limit that `net.core.rmem_max` sets for everybody, where we may (CAP_NET_ADMIN in the
/// machine's own user namespace); up to it, where not.
const BUFFER_LEN: usize = SOCKET_BUFFER_LEN as usize;

/// How long the sockets of a process that has just ended may keep the port busy; see
/// [`crate::tun`].
const BUSY_GRACE: Duration = Duration::from_secs(2);

/// A UDP socket on the underlay.
#[derive(Debug)]
pub(crate) struct UdpSocket {
    socket: Socket,
    local: SocketAddr,
    /// Held by whoever has it send fragments.
    fragments: Mutex<()>,
}

impl UdpSocket {
    /// Binds `count` sockets to one address, after making sure that nobody else has it: with
    /// SO_REUSEPORT alone, a second daemon would silently get half of the datagrams.
    ///
    /// # Errors
    /// EADDRINUSE: somebody else has the port. EADDRNOTAVAIL: no interface has the address.
    pub(crate) fn bind_group(
        local: SocketAddr,
        count: usize,
        features: &Features,
    ) -> io::Result<Vec<Self>> {
        wait_until_free(local)?;
        (0..count).map(|_| Self::bind_to_receive(local, features)).collect()
    }

    fn bind_to_receive(local: SocketAddr, features: &Features) -> io::Result<Self> {
        let socket = Self::new(local)?;
        socket.socket.set_reuse_port(true)?;
        sockopt::set_socket_recv_buffer_size_force(&socket, BUFFER_LEN)
            .or_else(|_| sockopt::set_socket_recv_buffer_size(&socket, BUFFER_LEN))?;
        match local.ip() {
            IpAddr::V4(_) => sockopt::set_ip_recvtos(&socket, true)?,
            IpAddr::V6(_) => sockopt::set_ipv6_recvtclass(&socket, true)?,
        }
        // Datagrams of one length that come in a row are then received as one (udp(7)).
        if features.has(Feature::UdpGro)
            && sys::set_option(socket.as_fd(), libc::SOL_UDP, libc::UDP_GRO, 1).is_err()
        {
            features.fall(Feature::UdpGro, FeatureState::Missing);
        }
        if sys::option(socket.as_fd(), libc::SOL_UDP, libc::UDP_SEGMENT).is_err() {
            features.fall(Feature::UdpSegment, FeatureState::Missing);
        }
        socket.socket.bind(&local.into())?;
        Ok(socket)
    }

    /// Sockets on ports of the kernel's choice, which nobody reads and which take nothing in.
    ///
    /// # Errors
    /// EADDRINUSE: no port is left.
    pub(crate) fn bind_sources(local: IpAddr) -> io::Result<Arc<[Self]>> {
        let bind = || {
            let local = SocketAddr::new(local, 0);
            let socket = Self::new(local)?;
            // One instruction (Documentation/networking/filter.rst), BPF_RET: keep no byte.
            socket.socket.attach_filter(&[SockFilter::new(0x06, 0, 0, 0)])?;
            socket.socket.bind(&local.into())?;
            Ok(socket)
        };
        (0..SOURCE_PORTS).map(|_| bind()).collect()
    }

    fn new(local: SocketAddr) -> io::Result<Self> {
        let socket = Socket::new(Domain::for_address(local), Type::DGRAM, Some(Protocol::UDP))?;
        sockopt::set_socket_send_buffer_size_force(&socket, BUFFER_LEN)
            .or_else(|_| sockopt::set_socket_send_buffer_size(&socket, BUFFER_LEN))?;
        let socket = Self { socket, local, fragments: Mutex::default() };
        socket.set_dont_fragment(true)?;
        Ok(socket)
    }

    /// The same socket again.
    pub(crate) fn try_clone(&self) -> io::Result<Self> {
        let socket = self.socket.try_clone()?;
        Ok(Self { socket, local: self.local, fragments: Mutex::default() })
    }

    /// Bytes of an IP packet that the path to this peer carries, as far as the kernel knows.
    pub(crate) fn path_mtu(&self, peer: SocketAddr) -> io::Result<u32> {
        // IP_MTU answers for connected sockets only, so ask through one that nobody sends on.
        let probe = Socket::new(self.socket.domain()?, Type::DGRAM, Some(Protocol::UDP))?;
        probe.bind(&SocketAddr::new(self.local.ip(), 0).into())?;
        probe.connect(&peer.into())?;
        Ok(match self.local.ip() {
            IpAddr::V4(_) => sockopt::ip_mtu(&probe)?,
            IpAddr::V6(_) => sockopt::ipv6_mtu(&probe)?,
        })
    }

    /// Sends one packet, outside of any batch.
    pub(crate) fn send(&self, packet: &[u8], peer: SocketAddr) -> io::Result<()> {
        self.send_in(packet, &Outer { peer, socket: 0, traffic_class: 0, segments: false })
    }

    fn send_in(&self, packet: &[u8], outer: &Outer) -> io::Result<()> {
        let (packets, segment_len) = (0..packet.len(), packet.len());
        sys::send(self, packet, &Transmit { outer: *outer, packets, segment_len })
    }

    /// Sends one packet in as many fragments as the path needs.
    pub(crate) fn send_fragmented(&self, packet: &[u8], outer: &Outer) -> io::Result<()> {
        // The option belongs to the socket, so a packet that another thread sends in between may
        // lose its DF: no harm is done. Two that set and unset it would undo each other's.
        let _fragments = self.fragments.lock().unwrap_or_else(PoisonError::into_inner);
        self.set_dont_fragment(false)?;
        let sent = self.send_in(packet, outer);
        self.set_dont_fragment(true)?;
        sent
    }

    fn set_dont_fragment(&self, on: bool) -> io::Result<()> {
        match (self.local.ip(), on) {
            (IpAddr::V4(_), true) => sockopt::set_ip_mtu_discover(self, Ipv4PathMtuDiscovery::DO)?,
            (IpAddr::V4(_), false) => {
                sockopt::set_ip_mtu_discover(self, Ipv4PathMtuDiscovery::WANT)?
            }
            (IpAddr::V6(_), true) => {
                sockopt::set_ipv6_mtu_discover(self, Ipv6PathMtuDiscovery::DO)?
            }
            (IpAddr::V6(_), false) => {
                sockopt::set_ipv6_mtu_discover(self, Ipv6PathMtuDiscovery::WANT)?
            }
        }
        Ok(())
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
