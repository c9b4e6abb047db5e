//! ICMP echoes, and what hosts say of ports where nothing listens (RFC 792, RFC 4443).

use std::io;
use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use socket2::{Domain, Protocol, SockFilter, Socket, Type};
use tokio::net::UdpSocket;
use weft_backends::checksum;

/// Before the nonce in an echo.
const MAGIC: [u8; 8] = *b"weftecho";
const HEADER_LEN: usize = 8;
const UDP: u8 = 17;
/// After an error of the socket.
const PAUSE: Duration = Duration::from_millis(10);

/// Types: echo, its answer, and "unreachable", with the code for "port".
struct Numbers {
    echo: u8,
    answer: u8,
    unreachable: u8,
    port: u8,
}

const V4: Numbers = Numbers { echo: 8, answer: 0, unreachable: 3, port: 3 };
const V6: Numbers = Numbers { echo: 128, answer: 129, unreachable: 1, port: 4 };

/// What came.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Heard {
    Answer {
        from: IpAddr,
        nonce: u64,
    },
    /// Nothing listens at this UDP port of this host.
    Refused {
        from: IpAddr,
        port: u16,
    },
}

/// A raw socket of one family. It is sent to and received from as a UDP socket is, so the runtime's
/// type for those serves.
#[derive(Debug)]
pub(super) struct Icmp {
    socket: UdpSocket,
    ipv6: bool,
}

impl Icmp {
    /// # Errors
    /// EPERM: the process has no CAP_NET_RAW.
    pub(super) fn open(ipv6: bool) -> io::Result<Self> {
        let (domain, protocol) =
            if ipv6 { (Domain::IPV6, Protocol::ICMPV6) } else { (Domain::IPV4, Protocol::ICMPV4) };
        let socket = Socket::new(domain, Type::RAW, Some(protocol))?;
        socket.set_nonblocking(true)?;
        socket.attach_filter(&if ipv6 { meant(&V6, HEADERLESS) } else { meant(&V4, PAST_IPV4) })?;
        Ok(Self { socket: UdpSocket::from_std(socket.into())?, ipv6 })
    }

    /// Sends an echo. A loss is what echoes are there to find.
    pub(super) fn echo(&self, to: IpAddr, nonce: u64) {
        if to.is_ipv6() == self.ipv6 {
            let _ = self.socket.try_send_to(&echo(self.ipv6, nonce), SocketAddr::new(to, 0));
        }
    }

    /// The next one that means something. Cancel safe.
    pub(super) async fn next(&self) -> Heard {
        let mut buffer = [0; 256];
        loop {
            match self.socket.recv_from(&mut buffer).await {
                Ok((len, from)) => {
                    if let Some(heard) = self.understand(&buffer[..len], from.ip()) {
                        return heard;
                    }
                }
                // A host or a net that cannot be reached, told of an echo; nothing to go by.
                Err(_) => tokio::time::sleep(PAUSE).await,
            }
        }
    }

    fn understand(&self, packet: &[u8], from: IpAddr) -> Option<Heard> {
        if self.ipv6 {
            understand(&V6, packet, from, v6_udp_destination)
        } else {
            // There the IP header comes along.
            understand(&V4, v4_payload(packet)?, from, v4_udp_destination)
        }
    }
}

/// What sets X to the length of what comes before the ICMP header: IPv4's, or nothing.
const PAST_IPV4: SockFilter = SockFilter::new(0xb1, 0, 0, 0); // ldxb 4*([0]&0xf)
const HEADERLESS: SockFilter = SockFilter::new(0x01, 0, 0, 0); // ldx #0

/// Lets through what [`understand`] makes sense of: everything else that comes to this host by ICMP
/// would wake us in vain (Documentation/networking/filter.rst).
fn meant(numbers: &Numbers, past_header: SockFilter) -> [SockFilter; 8] {
    let [answer, unreachable, port] =
        [numbers.answer, numbers.unreachable, numbers.port].map(u32::from);
    [
        past_header,
        SockFilter::new(0x50, 0, 0, 0),           // ldb [x + 0]
        SockFilter::new(0x15, 4, 0, answer),      // jeq answer, to the last
        SockFilter::new(0x15, 0, 2, unreachable), // jne unreachable, to the last but one
        SockFilter::new(0x50, 0, 0, 1),           // ldb [x + 1]
        SockFilter::new(0x15, 1, 0, port),        // jeq port, to the last
        SockFilter::new(0x06, 0, 0, 0),           // ret 0: nothing of it
        SockFilter::new(0x06, 0, 0, u32::MAX),    // ret -1: all of it
    ]
}

fn echo(ipv6: bool, nonce: u64) -> Vec<u8> {
    let kind = if ipv6 { V6.echo } else { V4.echo };
    let mut packet = vec![kind, 0, 0, 0];
    // Identifier and sequence number; we go by the nonce.
    packet.extend([MAGIC[0], MAGIC[1], 0, 1]);
    packet.extend(MAGIC);
    packet.extend(nonce.to_be_bytes());
    if !ipv6 {
        // For IPv6 the kernel does that (RFC 3542, 3.1).
        let sum = checksum(&packet);
        packet[2..4].copy_from_slice(&sum.to_be_bytes());
    }
    packet
}

fn understand(
    numbers: &Numbers,
    icmp: &[u8],
    from: IpAddr,
    destination: fn(&[u8]) -> Option<(IpAddr, u16)>,
) -> Option<Heard> {
    let (header, rest) = icmp.split_at_checked(HEADER_LEN)?;
    if header[0] == numbers.answer {
        let nonce = rest.strip_prefix(&MAGIC)?.get(..8)?;
        return Some(Heard::Answer { from, nonce: u64::from_be_bytes(nonce.try_into().ok()?) });
    }
    let is_refusal = (header[0], header[1]) == (numbers.unreachable, numbers.port);
    if !is_refusal {
        return None;
    }
    let (to, port) = destination(rest)?;
    // Said by the host itself of a packet to itself.
    (to == from).then_some(Heard::Refused { from, port })
}

/// What is in an IPv4 packet.
fn v4_payload(packet: &[u8]) -> Option<&[u8]> {
    packet.get(usize::from(packet.first()? & 0xf) * 4..)
}

/// Where a UDP datagram was going to, by its headers.
fn v4_udp_destination(packet: &[u8]) -> Option<(IpAddr, u16)> {
    let to: [u8; 4] = packet.get(16..20)?.try_into().ok()?;
    let port = udp_port(v4_payload(packet)?)?;
    (packet[9] == UDP).then_some((to.into(), port))
}

fn v6_udp_destination(packet: &[u8]) -> Option<(IpAddr, u16)> {
    let to: [u8; 16] = packet.get(24..40)?.try_into().ok()?;
    let port = udp_port(packet.get(40..)?)?;
    (packet[6] == UDP).then_some((to.into(), port))
}

fn udp_port(udp: &[u8]) -> Option<u16> {
    Some(u16::from_be_bytes(udp.get(2..4)?.try_into().ok()?))
}

#[cfg(test)]
mod tests {
    use super::*;

    const HOST: IpAddr = IpAddr::V4(std::net::Ipv4Addr::new(192, 0, 2, 7));

    fn from_host(protocol: u8, destination: [u8; 4], icmp: &[u8]) -> Vec<u8> {
        let mut packet = vec![0; 20];
        (packet[0], packet[9]) = (0x45, protocol);
        packet[12..16].copy_from_slice(&[192, 0, 2, 7]);
        packet[16..20].copy_from_slice(&destination);
        [packet, icmp.to_vec()].concat()
    }

    fn heard(packet: &[u8]) -> Option<Heard> {
        understand(&V4, v4_payload(packet)?, HOST, v4_udp_destination)
    }

    #[test]
    fn answers_and_refusals_come_past_the_filter() {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        let hear = async |icmp: &Icmp, wanted: Heard| {
            let others = async { while icmp.next().await != wanted {} };
            tokio::time::timeout(Duration::from_secs(15), others)
                .await
                .unwrap_or_else(|_| panic!("{wanted:?}"));
        };
        for from in ["127.0.0.1", "::1"].map(|it| it.parse::<IpAddr>().unwrap()) {
            runtime.block_on(async {
                let icmp = Icmp::open(from.is_ipv6()).unwrap();
                let nonce = fastrand::u64(..);
                // The runtime knows only once it has looked.
                icmp.socket.writable().await.unwrap();
                icmp.echo(from, nonce);
                hear(&icmp, Heard::Answer { from, nonce }).await;
                let closed = UdpSocket::bind((from, 0)).await.unwrap().local_addr().unwrap();
                let socket = UdpSocket::bind((from, 0)).await.unwrap();
                socket.send_to(b"", closed).await.unwrap();
                hear(&icmp, Heard::Refused { from, port: closed.port() }).await;
            });
        }
    }

    #[test]
    fn an_answer_to_our_echo_is_known_by_its_nonce() {
        let mut answer = echo(false, 77);
        assert_eq!(checksum(&answer), 0, "it includes itself");
        answer[0] = V4.answer;
        let packet = from_host(1, [192, 0, 2, 1], &answer);
        assert_eq!(heard(&packet), Some(Heard::Answer { from: HOST, nonce: 77 }));
        answer[9] ^= 1;
        assert_eq!(heard(&from_host(1, [192, 0, 2, 1], &answer)), None, "somebody else's ping");
    }

    #[test]
    fn a_refusal_counts_where_the_host_speaks_of_itself() {
        let said = |of: [u8; 4], protocol| {
            let inner = from_host(protocol, of, &[0, 1, 0x20, 0x5d, 0, 8, 0, 0]);
            from_host(1, [192, 0, 2, 1], &[&[3, 3, 0, 0, 0, 0, 0, 0], inner.as_slice()].concat())
        };
        let refused = Some(Heard::Refused { from: HOST, port: 8285 });
        assert_eq!(heard(&said([192, 0, 2, 7], UDP)), refused);
        assert_eq!(heard(&said([192, 0, 2, 9], UDP)), None);
        assert_eq!(heard(&said([192, 0, 2, 7], 6)), None);
        let packet = said([192, 0, 2, 7], UDP);
        for len in 0..packet.len() - 9 {
            let _ = heard(&packet[..len]);
        }
    }
}
