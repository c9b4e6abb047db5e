//! The engine does what the simplest forwarder does: the same packets out for the same packets in,
//! on the wire and behind the other host's TUN device, however they are batched on the way.

use std::collections::BTreeMap;
use std::io::{ErrorKind, IoSlice, Read};
use std::net::{IpAddr, SocketAddr, UdpSocket};
use std::os::fd::AsRawFd;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{self, Receiver};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use etherparse::{IpNumber, Ipv4Header, Ipv4HeaderSlice, PacketBuilder};
use nix::sys::socket::{ControlMessage, MsgFlags, SockaddrStorage, sendmsg};
use socket2::{Domain, Protocol, Socket, Type};
use weft_benches::subject::{Running, Subject};
use weft_benches::topology::{Mode, Topology, inner, outer};
use weft_tests::DEADLINE;
use weft_tests::load::Over;

const WEFT_PORT: u16 = 8285;
/// The time to live with which a packet arrives: one for the kernel and the engine of each host.
const HOPS: u8 = 4;
/// The source port of super-packets.
const SUPER_PORT: u16 = 6000;
/// The destination port of the datagram that says that all others have been sent.
const END_PORT: u16 = 65_000;
/// How long a capture waits for a packet before it sees whether all have been sent.
const LOOK: Duration = Duration::from_millis(100);
/// IPPROTO_RAW (raw(7)): we write the IP header.
const RAW: i32 = 255;

/// In the field of IPv4's flags and fragment offset (RFC 791).
const DONT_FRAGMENT: u16 = 0x4000;
const MORE_FRAGMENTS: u16 = 0x2000;

/// The packets of each flow, in their order.
type Flows = BTreeMap<Vec<u8>, Vec<Vec<u8>>>;

fn v4(ip: IpAddr) -> [u8; 4] {
    let IpAddr::V4(ip) = ip else { panic!("the topology is IPv4") };
    ip.octets()
}

fn filler(len: usize, seed: usize) -> Vec<u8> {
    (0..len).map(|at| u8::try_from((at * 7 + seed) % 256).expect("valid by construction")).collect()
}

/// Packets made by hand, each with an id of its own.
#[derive(Default)]
struct Packets(Vec<Vec<u8>>);

impl Packets {
    fn push(&mut self, mut packet: Vec<u8>, flags: u16) {
        let id = u16::try_from(self.0.len() + 1).expect("valid by construction");
        packet[4..6].copy_from_slice(&id.to_be_bytes());
        packet[6..8].copy_from_slice(&flags.to_be_bytes());
        self.0.push(packet);
    }

    /// A flow of TCP with whatever may end a run in the middle of it.
    fn tcp(&mut self, round: u32) {
        let mut sequence = round * 1_000_000;
        for step in 0..30usize {
            let len = [1000, 1000, 1000, 1000, 333][step % 5] + usize::from(step == 7);
            let tcp = PacketBuilder::ipv4(v4(inner(0)), v4(inner(1)), 64);
            let tcp = tcp.tcp(4000, 80, sequence, if step == 26 { 501 } else { 500 }).ack(7);
            let tcp = match step {
                9 => tcp.psh(),
                13 => tcp.fin(),
                17 => tcp.cwr(),
                19 => tcp.ece(),
                21 => tcp.urg(9),
                _ => tcp,
            };
            let mut packet = Vec::new();
            tcp.write(&mut packet, &filler(len, step)).expect("valid by construction");
            if step == 28 {
                packet[60] ^= 1;
            }
            self.push(packet, DONT_FRAGMENT);
            sequence += u32::try_from(len).expect("valid by construction") + u32::from(step == 23);
        }
    }

    /// Datagrams of one length, but for one; one without a checksum, one with a wrong one.
    fn udp(&mut self) {
        for step in 0..30usize {
            let mut packet = datagram(5000, &filler(if step == 11 { 77 } else { 200 }, step), 64);
            match step {
                15 => packet[26..28].fill(0),
                20 => packet[26] ^= 0x55,
                _ => {}
            }
            self.push(packet, if step < 25 { DONT_FRAGMENT } else { 0 });
        }
    }

    fn odd_ones(&mut self) {
        for (offset, more) in [(0u16, MORE_FRAGMENTS), (50, MORE_FRAGMENTS), (100, 0)] {
            let (from, to) = (v4(inner(0)), v4(inner(1)));
            let header =
                Ipv4Header::new(400, 64, IpNumber::UDP, from, to).expect("valid by construction");
            let mut packet = Vec::new();
            header.write(&mut packet).expect("valid by construction");
            packet.extend(filler(400, offset.into()));
            self.push(packet, offset | more);
        }
        let icmp = PacketBuilder::ipv4(v4(inner(0)), v4(inner(1)), 64).icmpv4_echo_request(7, 1);
        let mut packet = Vec::new();
        icmp.write(&mut packet, b"ping").expect("valid by construction");
        self.push(packet, 0);
        // They end at the first host's kernel, at the first engine, and at the second.
        for ttl in [1, 2, 3] {
            self.push(datagram(5001, b"old", ttl), DONT_FRAGMENT);
        }
    }
}

fn datagram(port: u16, payload: &[u8], ttl: u8) -> Vec<u8> {
    let mut packet = Vec::new();
    let udp = PacketBuilder::ipv4(v4(inner(0)), v4(inner(1)), ttl).udp(port, 53);
    udp.write(&mut packet, payload).expect("valid by construction");
    packet
}

/// Sends everything from the first container to the second, in bursts: the next one follows when
/// the last one has arrived, so that no queue on the way is ever full.
fn send_all(net: &Topology, arrived: &Receiver<()>) -> Result<()> {
    let open_raw = || Socket::new(Domain::IPV4, Type::RAW, Some(Protocol::from(RAW)));
    let raw = net.containers[0].run(open_raw)??;
    let mut packets = Packets::default();
    for round in 0..40 {
        let begin = packets.0.len();
        packets.tcp(round);
        packets.udp();
        packets.odd_ones();
        let burst = &packets.0[begin..];
        for packet in burst {
            raw.send_to(packet, &SocketAddr::new(inner(1), 0).into())?;
        }
        let arriving = burst.iter().filter(|packet| packet[8] >= HOPS).count();
        wait_for(arriving, arrived).with_context(|| format!("in round {round}"))?;
    }
    // Super-packets, which the kernel cuts where nobody else does.
    let udp = net.containers[0].run(|| UdpSocket::bind((inner(0), SUPER_PORT)))??;
    for segment in [64u16, 500, 1400] {
        let to = SockaddrStorage::from(SocketAddr::new(inner(1), SUPER_PORT + segment));
        let bytes = filler(usize::from(segment) * 20 + 9, 3);
        let control = [ControlMessage::UdpGsoSegments(&segment)];
        let none = MsgFlags::empty();
        sendmsg(udp.as_raw_fd(), &[IoSlice::new(&bytes)], &control, none, Some(&to))?;
        wait_for(21, arrived).with_context(|| format!("of segments of {segment} bytes"))?;
    }
    udp.send_to(b"end", (inner(1), END_PORT))?;
    Ok(())
}

fn wait_for(count: usize, arrived: &Receiver<()>) -> Result<()> {
    for number in 0..count {
        let arrival = arrived.recv_timeout(DEADLINE);
        arrival.with_context(|| format!("only {number} of {count} packets have arrived"))?;
    }
    Ok(())
}

/// Everything that a namespace sees of IPv4, on all its devices.
fn open_capture(net: &Topology, container: bool) -> Result<Socket> {
    let netns = if container { &net.containers[1] } else { &net.hosts[1] };
    let socket = weft_tests::capture(netns)?;
    socket.set_read_timeout(Some(LOOK))?;
    Ok(socket)
}

/// Sorts captured packets by flow until the last one has come, and tells of each. Others' packets, such
/// as probes, never end.
fn capture(
    mut socket: &Socket,
    pick: fn(&[u8]) -> Option<Vec<u8>>,
    tell: impl Fn(),
    all_sent: &AtomicBool,
) -> Result<Flows> {
    let mut flows = Flows::new();
    let mut bytes = [0; 66_000];
    let mut waiting_since = None;
    loop {
        if all_sent.load(Ordering::Relaxed) {
            let since = waiting_since.get_or_insert_with(Instant::now);
            ensure!(since.elapsed() < DEADLINE, "the last packet has not come");
        }
        let len = match socket.read(&mut bytes) {
            Ok(len) => len,
            Err(error)
                if [ErrorKind::Interrupted, ErrorKind::WouldBlock].contains(&error.kind()) =>
            {
                continue;
            }
            Err(error) => return Err(error.into()),
        };
        let Some(packet) = pick(&bytes[..len]) else { continue };
        let flow = flow(&packet)?;
        if flow.ends_with(&END_PORT.to_be_bytes()) {
            return Ok(flows);
        }
        flows.entry(flow).or_default().push(packet);
        tell();
    }
}

/// Protocol, and ports where there are any.
fn flow(packet: &[u8]) -> Result<Vec<u8>> {
    let header = Ipv4HeaderSlice::from_slice(packet)?;
    let mut flow = vec![header.protocol().0];
    if !header.is_fragmenting_payload() {
        flow.extend(packet[header.slice().len()..].iter().take(4));
    }
    Ok(flow)
}

fn is_between(packet: &[u8], from: IpAddr, to: IpAddr) -> bool {
    packet.len() >= 20 && packet[12..16] == v4(from) && packet[16..20] == v4(to)
}

/// A datagram's content, where it is one from host to host.
fn on_the_wire(packet: &[u8]) -> Option<Vec<u8>> {
    let is_ours = is_between(packet, outer(0), outer(1))
        && packet[9] == 17
        && packet[22..24] == WEFT_PORT.to_be_bytes();
    is_ours.then(|| packet[28..].to_vec()).filter(|it| is_between(it, inner(0), inner(1)))
}

/// A packet from container to container. The ids of datagrams that nobody may cut mean nothing
/// (RFC 6864), and what is joined and cut again has new ones.
fn behind_the_tun(packet: &[u8]) -> Option<Vec<u8>> {
    if !is_between(packet, inner(0), inner(1)) {
        return None;
    }
    let mut packet = packet.to_vec();
    let is_atomic = u16::from_be_bytes([packet[6], packet[7]]) == DONT_FRAGMENT;
    if packet[9] == 17 && is_atomic {
        packet[4..6].fill(0);
        packet[10..12].fill(0);
    }
    Some(packet)
}

/// Nobody in the second container answers: at its first answer the kernel moves a flow to the queue
/// that this came by (tun_flow_update() in drivers/net/tun.c), past what still waits in another.
const SILENCE: &str =
    "table ip silence { chain out { type filter hook output priority 0; policy drop; }; }";

/// What goes over the wire and what comes out behind the TUN device.
fn what_comes_of_it(net: &Topology) -> Result<(Flows, Flows)> {
    net.containers[1].tool("nft", &["add", SILENCE])?;
    let flows = flows_of_it(net);
    net.containers[1].tool("nft", &["delete", "table", "ip", "silence"])?;
    flows
}

fn flows_of_it(net: &Topology) -> Result<(Flows, Flows)> {
    let (wire, container) = (open_capture(net, false)?, open_capture(net, true)?);
    let all_sent = AtomicBool::new(false);
    thread::scope(|scope| {
        let (tell, arrived) = mpsc::channel();
        let tell = move || {
            // Nobody listens any more only when the test has failed.
            let _ = tell.send(());
        };
        let over = Over(&all_sent);
        let wire = scope.spawn(|| capture(&wire, on_the_wire, || {}, &all_sent));
        let container = scope.spawn(|| capture(&container, behind_the_tun, tell, &all_sent));
        send_all(net, &arrived)?;
        drop(over);
        let mut wire = wire.join().expect("a capture panicked")?;
        let mut container = container.join().expect("a capture panicked")?;
        wire.values_mut().chain(container.values_mut()).for_each(|packets| rebase_ids(packets));
        Ok((wire, container))
    })
}

/// The kernel numbers what comes of a super-packet from a number of its own choice on.
fn rebase_ids(packets: &mut [Vec<u8>]) {
    let Some(first) = packets.first().filter(|it| it[20..22] == SUPER_PORT.to_be_bytes()) else {
        return;
    };
    let base = u16::from_be_bytes([first[4], first[5]]);
    for packet in packets {
        let id = u16::from_be_bytes([packet[4], packet[5]]).wrapping_sub(base);
        packet[4..6].copy_from_slice(&id.to_be_bytes());
        packet[10..12].fill(0);
    }
}

#[test]
fn the_engine_equals_the_naive_forwarder() -> Result<()> {
    let net = Topology::new(Mode::Wire)?;
    // The kernel cuts super-packets before the container, and leaves no checksum to it.
    for (netns, device) in [(&net.hosts[1], "c"), (&net.containers[0], "eth0")] {
        let off = ["tso", "gso", "tx", "tx-udp-segmentation"].map(|kind| [kind, "off"]).concat();
        netns.tool("ethtool", &[&["-K", device], &off[..]].concat())?;
    }
    net.containers[0].tool("ethtool", &["-K", "eth0", "gso", "on", "tx", "on"])?;
    let naive = Subject::Naive.start(&net)?;
    let (wire, container) = what_comes_of_it(&net)?;
    drop(naive);

    for flags in [
        &["--io=uring"][..],
        &["--io=mmsg"],
        &["--io=uring", "--udp-source-port=fixed", "--workers=1"],
        &["--io=uring", "--offload=tun-uso=off"],
        &["--io=uring", "--offload=tcp-coalesce=off,udp-segment=off"],
        &["--io=mmsg", "--offload=tun-tso=off,udp-gro=off,udp-coalesce=off"],
    ] {
        let running = Running::weft_with(&net, flags)?;
        let (our_wire, our_container) = what_comes_of_it(&net)?;
        same(&wire, &our_wire, &format!("{flags:?}, on the wire"));
        same(&container, &our_container, &format!("{flags:?}, behind the TUN"));
        drop(running);
    }
    Ok(())
}

fn same(wanted: &Flows, found: &Flows, what: &str) {
    assert_eq!(wanted.keys().collect::<Vec<_>>(), found.keys().collect::<Vec<_>>(), "{what}");
    for (flow, packets) in wanted {
        let found = &found[flow];
        assert_eq!(packets.len(), found.len(), "{what}: packets of {flow:?}");
        for (number, (wanted, found)) in packets.iter().zip(found).enumerate() {
            assert_eq!(wanted, found, "{what}: packet {number} of {flow:?}");
        }
    }
}
