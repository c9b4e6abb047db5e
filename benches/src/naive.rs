//! The simplest forwarder there is: one packet a call, what flannel's udp backend does. The engine
//! is measured against it, and its output must be the same.

use std::io::{self, Read, Write};
use std::net::{SocketAddr, UdpSocket};
use std::thread;

use anyhow::Context;
use tun::{Configuration, Device};
use weft_engine::RouteTable;
use weft_engine::packet::{IpView, decrement_ttl};
use weft_engine::routes::Target;

/// flannel's proxy has room for no larger packet.
const PACKET_LEN_MAX: usize = 65_535;

/// A TUN device without offloads, and a socket.
#[expect(missing_debug_implementations, reason = "the device has none")]
pub struct Naive {
    tun: Device,
    udp: UdpSocket,
    routes: RouteTable,
}

impl Naive {
    /// Makes the device, up, in the namespace of the calling thread, and binds the socket.
    ///
    /// # Errors
    /// The name or the port is taken, or a privilege is missing.
    pub fn open(
        device: &str,
        mtu: u16,
        listen: SocketAddr,
        routes: RouteTable,
    ) -> anyhow::Result<Self> {
        let mut config = Configuration::default();
        config.tun_name(device).mtu(mtu).up();
        let tun = tun::create(&config).with_context(|| format!("cannot make {device}"))?;
        let udp = UdpSocket::bind(listen).with_context(|| format!("cannot listen on {listen}"))?;
        Ok(Self { tun, udp, routes })
    }

    /// Forwards for ever, each way on a thread of its own: that is more than flannel's one.
    ///
    /// # Errors
    /// The device is gone.
    pub fn run(self) -> io::Result<()> {
        let Self { tun, udp, routes } = self;
        let (mut reader, mut writer) = tun.split();
        thread::scope(|scope| {
            scope.spawn(|| {
                let mut packet = vec![0; PACKET_LEN_MAX];
                while let Ok((len, _)) = udp.recv_from(&mut packet) {
                    let packet = &mut packet[..len];
                    if IpView::check(packet).is_ok_and(|view| view.ttl() > 1) {
                        decrement_ttl(packet);
                        // Refused, it is lost like any other packet.
                        let _ = writer.write(packet);
                    }
                }
            });
            let mut packet = vec![0; PACKET_LEN_MAX];
            loop {
                let len = reader.read(&mut packet)?;
                send(&udp, &routes, &mut packet[..len]);
            }
        })
    }
}

fn send(udp: &UdpSocket, routes: &RouteTable, packet: &mut [u8]) {
    if let Ok(view) = IpView::check(packet)
        && let Some(Target::Peer(peer)) = routes.lookup(view.destination())
        && view.ttl() > 1
    {
        decrement_ttl(packet);
        // As above.
        let _ = udp.send_to(packet, peer.endpoint);
    }
}
