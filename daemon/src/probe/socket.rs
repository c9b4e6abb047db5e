//! The socket that probes and their answers go through.

use std::io::{self, IoSlice};
use std::net::{IpAddr, SocketAddr, UdpSocket};
use std::os::fd::{AsFd, AsRawFd};

use nix::sys::socket::{ControlMessage, MsgFlags, SockaddrStorage, sendmsg};
use rustix::net::sockopt::{
    Ipv4PathMtuDiscovery, Ipv6PathMtuDiscovery, set_ip_mtu_discover, set_ipv6_mtu_discover,
};
use socket2::{Domain, Protocol, Socket, Type};

/// A socket at this node's address on the overlay. Probes come from the port that answers come from,
/// so that a firewall which lets answers in lets in the peer's probes as well.
#[derive(Debug)]
pub(crate) struct ProbeSocket(UdpSocket);

impl ProbeSocket {
    /// Binds to `local`, also if the device that has it is not there at the moment; to `port` where
    /// that is free.
    ///
    /// # Errors
    /// No port is left.
    pub(crate) fn bind(local: IpAddr, port: Option<u16>) -> io::Result<Self> {
        let socket = Socket::new(
            Domain::for_address(SocketAddr::new(local, 0)),
            Type::DGRAM,
            Some(Protocol::UDP),
        )?;
        // Not in fragments, however narrow the kernel believes the path to be (ip(7)).
        if local.is_ipv6() {
            socket.set_freebind_v6(true)?;
            set_ipv6_mtu_discover(&socket, Ipv6PathMtuDiscovery::PROBE)?;
        } else {
            socket.set_freebind_v4(true)?;
            set_ip_mtu_discover(&socket, Ipv4PathMtuDiscovery::PROBE)?;
        }
        socket.set_nonblocking(true)?;
        let bind = |port| socket.bind(&SocketAddr::new(local, port).into());
        bind(port.unwrap_or(0)).or_else(|_| bind(0))?;
        Ok(Self(socket.into()))
    }

    /// For whoever waits for what comes in.
    pub(crate) fn reader(&self) -> io::Result<UdpSocket> {
        self.0.try_clone()
    }

    pub(crate) fn local(&self) -> io::Result<SocketAddr> {
        self.0.local_addr()
    }

    /// Sends one packet. What is refused is lost, as on the way.
    pub(crate) fn send(&self, packet: &[u8], to: SocketAddr) {
        let _ = self.0.send_to(packet, to);
    }

    /// Sends two packets of one length in one call, for the kernel or a card to cut (udp(7),
    /// UDP_SEGMENT).
    pub(crate) fn send_pair(&self, pair: &[Vec<u8>; 2], to: SocketAddr) {
        let Ok(len) = u16::try_from(pair[0].len()) else { return };
        let pieces = [IoSlice::new(&pair[0]), IoSlice::new(&pair[1])];
        let segment = [ControlMessage::UdpGsoSegments(&len)];
        let to_storage = SockaddrStorage::from(to);
        let fd = self.0.as_fd().as_raw_fd();
        let sent = sendmsg(fd, &pieces, &segment, MsgFlags::empty(), Some(&to_storage));
        if sent.is_err() {
            pair.iter().for_each(|packet| self.send(packet, to));
        }
    }
}
