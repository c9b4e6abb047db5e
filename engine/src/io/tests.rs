//! One suite for every way to do input and output: they behave the same.

use std::fs::File;
use std::io::Write;
use std::net::{SocketAddr, UdpSocket};
use std::os::fd::AsFd;
use std::time::Duration;

use rustix::event::{EventfdFlags, eventfd};
use socket2::{Domain, SockRef, Socket, Type};

use super::mmsg::Mmsg;
use super::uring::Ring;
use super::*;
use crate::batch::Outer;
use crate::sys;

/// Makes an [`Io`] for one test.
type Make = fn(Direction, &Files<'_>) -> Box<dyn Io>;

const ALL: [(&str, Make); 2] = [
    ("uring", |direction, files| Box::new(Ring::new(direction, files).unwrap())),
    ("mmsg", |direction, files| Box::new(Mmsg::new(direction, files).unwrap())),
];

/// An [`Io`] between a socket pair, which keeps packets apart as a TUN does, and a UDP socket.
struct Fixture {
    name: &'static str,
    io: Box<dyn Io>,
    /// Where the kernel would be, behind the TUN.
    kernel: Socket,
    peer: UdpSocket,
    ours: SocketAddr,
    bell: File,
    completions: Vec<Completion>,
    udp: UdpSocket,
    _tun: Socket,
}

fn each(direction: Direction, test: impl Fn(Fixture)) {
    for (name, make) in ALL {
        let (tun, kernel) = Socket::pair(Domain::UNIX, Type::SEQPACKET, None).unwrap();
        let [udp, peer] = [0, 1].map(|_| UdpSocket::bind("127.0.0.1:0").unwrap());
        // The default holds fewer small datagrams than there are buffers.
        SockRef::from(&udp).set_recv_buffer_size(1 << 20).unwrap();
        sys::set_option(udp.as_fd(), libc::IPPROTO_IP, libc::IP_RECVTOS, 1).unwrap();
        let timeout = Some(Duration::from_secs(10));
        kernel.set_read_timeout(timeout).unwrap();
        peer.set_read_timeout(timeout).unwrap();
        let bell = eventfd(0, EventfdFlags::CLOEXEC).unwrap();
        let (source, sockets) = match direction {
            Direction::TunToUdp => (tun.as_fd(), vec![udp.as_fd()]),
            Direction::UdpToTun => (udp.as_fd(), Vec::new()),
        };
        let io = make(direction, &Files { source, bell: bell.as_fd(), sockets });
        let ours = udp.local_addr().unwrap();
        let completions = Vec::new();
        let bell = bell.into();
        test(Fixture { name, io, kernel, peer, ours, bell, completions, udp, _tun: tun });
    }
}

impl Fixture {
    /// The next thing that happens.
    fn next(&mut self) -> Completion {
        while self.completions.is_empty() {
            self.io.submit(Wait::Sleep).unwrap();
            self.io.reap(&mut self.completions);
        }
        self.completions.remove(0)
    }

    fn next_received(&mut self) -> Received {
        let next = self.next();
        let Completion::Received(received) = next else { panic!("{}: {next:?}", self.name) };
        received
    }

    fn next_sent(&mut self) -> Sent {
        let next = self.next();
        let Completion::Sent(sent) = next else { panic!("{}: {next:?}", self.name) };
        sent
    }

    fn to_peer(&self, packets: Range<usize>, segment_len: usize) -> Transmit {
        let peer = self.peer.local_addr().unwrap();
        Transmit {
            outer: Outer { peer, socket: 0, traffic_class: 0, segments: true },
            packets,
            segment_len,
        }
    }

    fn receive_at_peer(&self) -> Vec<u8> {
        let mut bytes = [0; 2048];
        let len = self.peer.recv(&mut bytes).unwrap();
        bytes[..len].to_vec()
    }
}

/// Packets of many lengths, each beginning with its number.
fn packet(number: usize) -> Vec<u8> {
    let mut packet = vec![0xab; 4 + number * 7 % 1400];
    packet[..4].copy_from_slice(&u32::try_from(number).unwrap().to_ne_bytes());
    packet
}

#[test]
fn packets_keep_their_order_and_bytes_from_the_tun() {
    each(Direction::TunToUdp, |mut it| {
        // Often enough that every buffer comes round a few times.
        for round in 0..20 {
            let numbers = round * 50..(round + 1) * 50;
            for number in numbers.clone() {
                it.kernel.send(&packet(number)).unwrap();
            }
            let mut sent = 0;
            while sent < 50 {
                match it.next() {
                    Completion::Received(Received {
                        buffer, packets, segment_len, sender, ..
                    }) => {
                        assert_eq!((segment_len, sender), (packets.len(), None));
                        let out = it.io.take_buffer().unwrap();
                        let (from, to) =
                            it.io.two_packets((&buffer, &packets), (&out, &(0..packets.len())));
                        to.copy_from_slice(from);
                        let transmit = it.to_peer(0..packets.len(), packets.len());
                        it.io.send(out, transmit);
                        it.io.recycle(buffer);
                    }
                    Completion::Sent(one) => {
                        one.result.unwrap();
                        it.io.recycle(one.buffer);
                        sent += 1;
                    }
                    Completion::Woken => panic!("nobody rang"),
                }
            }
            for number in numbers {
                assert_eq!(it.receive_at_peer(), packet(number), "{}", it.name);
            }
        }
    });
}

/// More than there are buffers: input goes on once they have come back, and nothing is lost.
#[test]
fn datagrams_keep_their_order_bytes_sender_and_mark() {
    each(Direction::UdpToTun, |mut it| {
        sys::set_option(it.peer.as_fd(), libc::IPPROTO_IP, libc::IP_TOS, 0xb9).unwrap();
        for round in 0..5 {
            let numbers = round * 200..(round + 1) * 200;
            for number in numbers.clone() {
                it.peer.send_to(&packet(number), it.ours).unwrap();
            }
            for number in numbers {
                let received = it.next_received();
                assert_eq!(it.io.packet(&received.buffer, &received.packets), packet(number));
                assert_eq!(received.segment_len, packet(number).len());
                assert_eq!(received.sender, Some("127.0.0.1".parse().unwrap()));
                assert_eq!(received.traffic_class, 0xb9);
                it.io.recycle(received.buffer);
            }
        }
    });
}

#[test]
fn an_empty_datagram_parts_nothing() {
    each(Direction::UdpToTun, |mut it| {
        for bytes in [&b"one"[..], b"", b"", b"two"] {
            it.peer.send_to(bytes, it.ours).unwrap();
        }
        it.io.submit(Wait::Sleep).unwrap();
        it.io.reap(&mut it.completions);
        let lens = it.completions.iter().map(|it| match it {
            Completion::Received(received) => received.packets.len(),
            Completion::Sent(_) | Completion::Woken => panic!("{it:?}"),
        });
        assert_eq!(lens.collect::<Vec<_>>(), [3, 0, 0, 3], "{}", it.name);
    });
}

#[test]
fn the_largest_datagram_fits() {
    each(Direction::UdpToTun, |mut it| {
        it.peer.send_to(&[7; 65_507], it.ours).unwrap();
        let received = it.next_received();
        assert_eq!(it.io.packet(&received.buffer, &received.packets), [7; 65_507]);
    });
}

#[test]
fn many_datagrams_in_one_receive_are_told_apart() {
    each(Direction::UdpToTun, |mut it| {
        let socket = Socket::new(Domain::IPV4, Type::DGRAM, None).unwrap();
        // Loopback hands a segmented send over whole to whoever asks for that.
        sys::set_option(socket.as_fd(), libc::SOL_UDP, libc::UDP_SEGMENT, 100).unwrap();
        sys::set_option(it.udp.as_fd(), libc::SOL_UDP, libc::UDP_GRO, 1).unwrap();
        let mut bytes = [1; 250];
        bytes[200..].fill(2);
        socket.send_to(&bytes, &it.ours.into()).unwrap();
        let received = it.next_received();
        assert_eq!((received.packets.len(), received.segment_len), (250, 100), "{}", it.name);
        assert_eq!(it.io.packet(&received.buffer, &received.packets), bytes);
    });
}

#[test]
fn the_bell_wakes_it() {
    each(Direction::TunToUdp, |mut it| {
        for _ in 0..2 {
            it.bell.write_all(&1u64.to_ne_bytes()).unwrap();
            assert!(matches!(it.next(), Completion::Woken), "{}", it.name);
        }
    });
}

#[test]
fn to_look_is_not_to_sleep() {
    each(Direction::TunToUdp, |mut it| {
        let mut completions = Vec::new();
        for _ in 0..3 {
            it.io.submit(Wait::Look).unwrap();
            it.io.reap(&mut completions);
        }
        assert!(completions.is_empty());
        it.kernel.send(b"packet").unwrap();
        while completions.is_empty() {
            it.io.submit(Wait::Look).unwrap();
            it.io.reap(&mut completions);
        }
        assert!(matches!(completions[..], [Completion::Received(_)]), "{completions:?}");
    });
}

#[test]
fn a_refused_send_brings_the_buffer_back_with_its_reason() {
    each(Direction::TunToUdp, |mut it| {
        let buffer = it.io.take_buffer().unwrap();
        it.io.packet_mut(&buffer, &(0..6)).copy_from_slice(b"packet");
        // An IPv6 address on an IPv4 socket.
        let peer = "[::1]:9".parse().unwrap();
        let outer = Outer { peer, socket: 0, traffic_class: 0, segments: false };
        let transmit = Transmit { outer, packets: 0..6, segment_len: 6 };
        it.io.send(buffer, transmit.clone());
        let sent = it.next_sent();
        assert_eq!(sent.result.unwrap_err().raw_os_error(), Some(libc::EAFNOSUPPORT));
        assert_eq!(sent.transmit, transmit);
        assert_eq!(it.io.packet(&sent.buffer, &sent.transmit.packets), b"packet");
    });
}

#[test]
fn one_send_carries_many_datagrams_and_their_mark() {
    each(Direction::TunToUdp, |mut it| {
        sys::set_option(it.peer.as_fd(), libc::IPPROTO_IP, libc::IP_RECVTOS, 1).unwrap();
        let buffer = it.io.take_buffer().unwrap();
        let packets = it.io.packet_mut(&buffer, &(0..2500));
        for (number, segment) in (0u8..).zip(packets.chunks_mut(1000)) {
            segment.fill(number);
        }
        let mut transmit = it.to_peer(0..2500, 1000);
        transmit.outer.traffic_class = 0xb9;
        it.io.send(buffer, transmit);
        it.next_sent().result.unwrap();
        let mut many = sys::ReceiveMany::new(3);
        for (number, len) in [(0u8, 1000), (1, 1000), (2, 500)] {
            let mut bytes = [0; 2048];
            let mut received = many.receive(&it.peer, [&mut bytes[..]].into_iter());
            while received.is_err() {
                received = many.receive(&it.peer, [&mut bytes[..]].into_iter());
            }
            assert_eq!(received.unwrap(), 1);
            let (got, sender, marks) = many.message(0);
            assert_eq!((got, sender), (len, Some(it.ours.ip())));
            assert_eq!(marks.traffic_class, 0xb9, "{}", it.name);
            assert_eq!(bytes[..got], vec![number; len]);
        }
    });
}
