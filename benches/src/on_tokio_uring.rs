//! A forwarder on tokio-uring, with the same offloads as the engine: what the choice of driving the
//! ring itself is worth.
//!
//! It has what tokio-uring 0.5 offers: one thread, with one read, one receive, one send and one write at
//! a time on one ring, without multishot, provided buffers or registered files. Its receive hands out no
//! control messages, so where the kernel has joined datagrams (UDP_GRO) they are told apart by the
//! lengths in their own IP headers.

use std::fs::File;
use std::io;
use std::net::SocketAddr;
use std::rc::Rc;

use anyhow::Context;
use nix::sys::socket::setsockopt;
use nix::sys::socket::sockopt::{RcvBufForce, SndBufForce, UdpGroSegment};
use weft_engine::features::Features;
use weft_engine::offload::coalesce::{Run, Segment};
use weft_engine::offload::segment::{Cut, finish_checksum};
use weft_engine::offload::{VirtioNetHdr, WHOLE};
use weft_engine::packet::{IpView, decrement_ttl};
use weft_engine::routes::Target;
use weft_engine::{RouteTable, SOCKET_BUFFER_LEN, TunDevice};

/// The largest super-packet, or datagrams joined by the kernel.
const LEN_MAX: usize = 65_535;
/// What one send may hold (udp(7)).
const SEND_LEN_MAX: usize = 65_507;
const SEGMENTS_MAX: usize = 64;
/// SOL_UDP and UDP_SEGMENT (include/uapi/linux/udp.h).
const UDP_SEGMENT: [i32; 2] = [17, 103];

/// Forwards for ever.
///
/// # Errors
/// The device or the socket cannot be made, or one of them is gone.
pub fn forward(
    device: &str,
    mtu: u16,
    listen: SocketAddr,
    routes: RouteTable,
) -> anyhow::Result<()> {
    let tun = TunDevice::open(device, 1, &Features::without(&[])).context("no device")?;
    tun.bring_up(mtu).context("the device does not come up")?;
    let queue = tun.into_queues().pop().context("no queue")?;
    let socket = std::net::UdpSocket::bind(listen)?;
    setsockopt(&socket, UdpGroSegment, &true)?;
    // As large as the engine's, or bursts are lost here for another reason.
    let len = SOCKET_BUFFER_LEN as usize;
    setsockopt(&socket, RcvBufForce, &len)?;
    setsockopt(&socket, SndBufForce, &len)?;
    tokio_uring::start(async move {
        let tun = Rc::new(tokio_uring::fs::File::from_std(File::from(queue)));
        let udp = Rc::new(tokio_uring::net::UdpSocket::from_std(socket));
        let back = tokio_uring::spawn(udp_to_tun(Rc::clone(&tun), Rc::clone(&udp)));
        tun_to_udp(&tun, &udp, &routes).await?;
        back.await?.context("udp_to_tun")
    })
}

async fn tun_to_udp(
    tun: &tokio_uring::fs::File,
    udp: &tokio_uring::net::UdpSocket,
    routes: &RouteTable,
) -> io::Result<()> {
    let mut buffer = vec![0; VirtioNetHdr::LEN + LEN_MAX];
    let mut out = Vec::with_capacity(SEND_LEN_MAX);
    loop {
        let (outcome, returned) = tun.read_at(buffer, 0).await;
        let len = outcome?;
        buffer = returned;
        let Some(header) = VirtioNetHdr::parse(&buffer[..len]) else { continue };
        let packet = &mut buffer[VirtioNetHdr::LEN..len];
        let Some(peer) = next_hop(packet, routes) else { continue };
        decrement_ttl(packet);
        let Ok(cut) = Cut::plan(&header, packet) else { continue };
        let Some(cut) = cut else {
            if finish_checksum(&header, packet).is_ok() {
                out.extend_from_slice(packet);
                out = send(udp, peer, out, packet.len()).await;
            }
            continue;
        };
        let segment_len = cut.len_of(0);
        for number in 0..cut.count() {
            let (start, len) = (out.len(), cut.len_of(number));
            out.resize(start + len, 0);
            cut.write(packet, number, &mut out[start..]);
            let is_full =
                out.len() + segment_len > SEND_LEN_MAX || out.len() >= SEGMENTS_MAX * segment_len;
            if is_full || number + 1 == cut.count() {
                out = send(udp, peer, out, segment_len).await;
            }
        }
    }
}

fn next_hop(packet: &[u8], routes: &RouteTable) -> Option<SocketAddr> {
    let view = IpView::check(packet).ok().filter(|view| view.ttl() > 1)?;
    match routes.lookup(view.destination())? {
        Target::Peer(peer) => Some(peer.endpoint),
        Target::Local => None,
    }
}

/// Sends what is there, as datagrams of this length; the buffer comes back empty.
async fn send(
    udp: &tokio_uring::net::UdpSocket,
    peer: SocketAddr,
    packets: Vec<u8>,
    segment_len: usize,
) -> Vec<u8> {
    let control = (packets.len() > segment_len).then(|| segment_control(segment_len));
    let (_, mut parts, _) = udp.sendmsg(vec![packets], Some(peer), control).await;
    let mut packets = parts.pop().unwrap_or_default();
    packets.clear();
    packets
}

/// One control message, as cmsg(3) has it on 64-bit machines.
fn segment_control(len: usize) -> Vec<u8> {
    let len = u16::try_from(len).unwrap_or(u16::MAX);
    let mut control = 18usize.to_ne_bytes().to_vec();
    control.extend(UDP_SEGMENT.iter().flat_map(|field| field.to_ne_bytes()));
    control.extend(len.to_ne_bytes());
    control.resize(24, 0);
    control
}

async fn udp_to_tun(
    tun: Rc<tokio_uring::fs::File>,
    udp: Rc<tokio_uring::net::UdpSocket>,
) -> io::Result<()> {
    let (mut buffer, mut run) = (vec![0; LEN_MAX], Run::default());
    loop {
        let (outcome, returned) = udp.recv_from(buffer).await;
        let (len, _) = outcome?;
        buffer = returned;
        let mut rest = &mut buffer[..len];
        while let Some(len) = packet_len(rest) {
            let (packet, behind) = rest.split_at_mut(len);
            rest = behind;
            if !IpView::check(packet).is_ok_and(|view| view.ttl() > 1) {
                continue;
            }
            decrement_ttl(packet);
            let segment = Segment::parse(packet);
            if segment.is_some_and(|segment| run.join(&segment, packet)) {
                continue;
            }
            write(&tun, run.finish().map(<[u8]>::to_vec)).await;
            match segment {
                Some(segment) => run.begin(&segment, packet),
                None => write(&tun, Some([&WHOLE[..], packet].concat())).await,
            }
        }
        write(&tun, run.finish().map(<[u8]>::to_vec)).await;
    }
}

/// Bytes of the IP packet that begins here, by its header; `None` where there is none.
fn packet_len(bytes: &[u8]) -> Option<usize> {
    let field = |at: usize| Some(usize::from(u16::from_be_bytes([*bytes.get(at)?, bytes[at + 1]])));
    let len = match bytes.first()? >> 4 {
        4 if bytes.len() >= 20 => field(2)?,
        6 if bytes.len() >= 40 => field(4)? + 40,
        _ => return None,
    };
    (20..=bytes.len()).contains(&len).then_some(len)
}

/// Owned, since tokio-uring wants what it writes for itself.
async fn write(tun: &tokio_uring::fs::File, bytes: Option<Vec<u8>>) {
    if let Some(bytes) = bytes {
        // Refused, it is lost like any other packet.
        let _ = tun.write_at(bytes, 0).submit().await;
    }
}
