//! The load: streams, floods, paced datagrams and round trips between two containers.
//!
//! Sockets are made inside the containers' namespaces and used from threads of this process, so
//! that everything that is measured shares one clock. TCP runs on tokio-uring, sender and receiver
//! on a thread each. Datagrams and round trips use plain sockets: tokio-uring's own latency of 20
//! to 40 µs, and its timer's grain of a millisecond, would be measured instead.

use std::fs;
use std::io;
use std::net::{Shutdown, TcpListener, TcpStream, UdpSocket};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use anyhow::Context;
use hdrhistogram::Histogram;
use socket2::SockRef;
use weft_daemon::netns::NetNs;

use crate::topology::{Topology, inner};

/// Congestion control of all streams: what most kernels have by default.
pub const CONGESTION: &str = "cubic";
/// Bytes of one TCP send or receive.
const CHUNK: usize = 128 << 10;
/// What is not measured yet: slow start, and threads that wake up.
const WARM_UP: Duration = Duration::from_millis(300);
/// How often paced datagrams are sent, as many as are due.
const PACE: Duration = Duration::from_micros(500);
/// So large that the receiving end of a flood loses nothing itself.
const RECEIVE_BUFFER: usize = 32 << 20;
/// IPv4 and UDP headers: a datagram of 64 bytes is an IP packet of 64.
const HEADERS: usize = 28;

/// What the machine was doing while the load ran; called at its beginning and end.
pub trait Meter {
    fn begin(&mut self) -> anyhow::Result<()>;
    fn end(&mut self) -> anyhow::Result<()>;
}

/// What streams came to.
#[derive(Debug, Clone, Copy)]
pub struct Streamed {
    pub bytes: u64,
    pub seconds: f64,
    pub retransmits: u64,
}

/// Sends over `streams` connections, as fast as they go, for `time`.
///
/// # Errors
/// No connection, or a socket that fails on the way.
pub fn streams(
    net: &Topology,
    streams: usize,
    time: Duration,
    meter: &mut dyn Meter,
) -> anyhow::Result<Streamed> {
    let [from, to] = &net.containers;
    let (mut senders, mut receivers) = (Vec::new(), Vec::new());
    let listener = to.run(|| TcpListener::bind((inner(1), 0)))??;
    for _ in 0..streams {
        let sender = from.run(|| TcpStream::connect(listener.local_addr()?))??;
        SockRef::from(&sender).set_tcp_congestion(CONGESTION.as_bytes())?;
        senders.push(sender);
        receivers.push(listener.accept()?.0);
    }
    let (stop, received) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicU64::new(0)));
    let sending = spawn_streams(senders, {
        let stop = Arc::clone(&stop);
        move |socket| send_until(socket, Arc::clone(&stop))
    });
    let receiving = spawn_streams(receivers, {
        let received = Arc::clone(&received);
        move |socket| receive_to_end(socket, Arc::clone(&received))
    });
    thread::sleep(WARM_UP);
    let before = (received.load(Ordering::Relaxed), retransmits(from)?, Instant::now());
    meter.begin()?;
    thread::sleep(time);
    let outcome = Streamed {
        bytes: received.load(Ordering::Relaxed) - before.0,
        seconds: before.2.elapsed().as_secs_f64(),
        retransmits: retransmits(from)? - before.1,
    };
    meter.end()?;
    stop.store(true, Ordering::Relaxed);
    sending.join().expect("the sender panicked").context("sending")?;
    receiving.join().expect("the receiver panicked").context("receiving")?;
    Ok(outcome)
}

/// Runs one task a socket on a tokio-uring of their own, on a thread of its own.
fn spawn_streams<F: Future<Output = io::Result<()>> + 'static>(
    sockets: Vec<TcpStream>,
    task: impl Fn(tokio_uring::net::TcpStream) -> F + Send + 'static,
) -> JoinHandle<io::Result<()>> {
    thread::spawn(move || {
        tokio_uring::start(async {
            let wrap = tokio_uring::net::TcpStream::from_std;
            let tasks: Vec<_> =
                sockets.into_iter().map(|it| tokio_uring::spawn(task(wrap(it)))).collect();
            for task in tasks {
                task.await.map_err(io::Error::other)??;
            }
            Ok(())
        })
    })
}

async fn send_until(socket: tokio_uring::net::TcpStream, stop: Arc<AtomicBool>) -> io::Result<()> {
    let mut chunk = vec![0x5a; CHUNK];
    while !stop.load(Ordering::Relaxed) {
        let (outcome, returned) = socket.write_all(chunk).await;
        outcome?;
        chunk = returned;
    }
    socket.shutdown(Shutdown::Write)
}

async fn receive_to_end(
    socket: tokio_uring::net::TcpStream,
    received: Arc<AtomicU64>,
) -> io::Result<()> {
    let mut chunk = vec![0; CHUNK];
    loop {
        let (outcome, returned) = socket.read(chunk).await;
        let len = outcome?;
        if len == 0 {
            return Ok(());
        }
        received.fetch_add(len as u64, Ordering::Relaxed);
        chunk = returned;
    }
}

/// What datagrams came to.
#[derive(Debug, Clone, Copy)]
pub struct Delivered {
    pub sent: u64,
    pub received: u64,
    pub seconds: f64,
}

impl Delivered {
    /// The part that was lost.
    pub fn loss(&self) -> f64 {
        1.0 - self.received as f64 / self.sent.max(1) as f64
    }

    /// Packets a second that arrived.
    pub fn rate(&self) -> f64 {
        self.received as f64 / self.seconds
    }
}

/// Sends IP packets of `len` bytes, `rate` a second or as fast as they go, for `time`.
///
/// # Errors
/// A socket that cannot be made.
pub fn datagrams(
    net: &Topology,
    len: usize,
    rate: Option<f64>,
    time: Duration,
    meter: &mut dyn Meter,
) -> anyhow::Result<Delivered> {
    let (sender, receiver) = socket_pair(net)?;
    // Root may go past net.core.rmem_max only with an option that needs more than a plain socket,
    // so the kernel may grant less; the reader keeps up.
    SockRef::from(&receiver).set_recv_buffer_size(RECEIVE_BUFFER)?;
    receiver.set_read_timeout(Some(Duration::from_millis(300)))?;
    let receiving = thread::spawn(move || {
        let (mut packet, mut count) = ([0; 2048], 0u64);
        while receiver.recv(&mut packet).is_ok() {
            count += 1;
        }
        count
    });
    let payload = vec![0x5a; len - HEADERS];
    meter.begin()?;
    let begin = Instant::now();
    let sent = match rate {
        Some(rate) => send_paced(&sender, &payload, rate, time),
        None => send_flood(&sender, &payload, time),
    };
    let seconds = begin.elapsed().as_secs_f64();
    meter.end()?;
    let received = receiving.join().expect("the receiver panicked");
    Ok(Delivered { sent, received, seconds })
}

fn send_flood(sender: &UdpSocket, payload: &[u8], time: Duration) -> u64 {
    let begin = Instant::now();
    let mut sent = 0;
    while begin.elapsed() < time {
        // The clock is read once for a few, and a full queue is what a flood is for.
        sent += (0..32).filter(|_| sender.send(payload).is_ok()).count() as u64;
    }
    sent
}

fn send_paced(sender: &UdpSocket, payload: &[u8], rate: f64, time: Duration) -> u64 {
    let begin = Instant::now();
    let (mut sent, mut tried) = (0, 0u64);
    while begin.elapsed() < time {
        let due = begin.elapsed().as_secs_f64() * rate;
        while (tried as f64) < due {
            sent += u64::from(sender.send(payload).is_ok());
            tried += 1;
        }
        thread::sleep(PACE);
    }
    sent
}

/// The time from a small datagram to its answer, one after the other, in nanoseconds.
///
/// # Errors
/// Nothing comes back at all.
pub fn round_trips(net: &Topology, time: Duration) -> anyhow::Result<Histogram<u64>> {
    let (client, server) = socket_pair(net)?;
    let server_patience = Some(Duration::from_millis(500));
    server.set_read_timeout(server_patience)?;
    client.set_read_timeout(Some(Duration::from_millis(200)))?;
    let answering = thread::spawn(move || {
        let mut packet = [0; 64];
        while let Ok((len, from)) = server.recv_from(&mut packet) {
            // A lost answer is a lost round trip.
            let _ = server.send_to(&packet[..len], from);
        }
    });
    let mut histogram = Histogram::new_with_bounds(100, 1_000_000_000, 3)?;
    let begin = Instant::now();
    let mut packet = [0; 64];
    while begin.elapsed() < time {
        let sent = Instant::now();
        if client.send(&packet).is_ok() && client.recv(&mut packet).is_ok() {
            let nanoseconds = u64::try_from(sent.elapsed().as_nanos()).unwrap_or(u64::MAX);
            histogram.saturating_record(nanoseconds);
        }
    }
    answering.join().expect("the answering thread panicked");
    anyhow::ensure!(!histogram.is_empty(), "no datagram came back");
    Ok(histogram)
}

/// A connected sender in the first container, a receiver in the second.
fn socket_pair(net: &Topology) -> anyhow::Result<(UdpSocket, UdpSocket)> {
    let [from, to] = &net.containers;
    let receiver = to.run(|| UdpSocket::bind((inner(1), 0)))??;
    let sender = from.run(|| UdpSocket::bind((inner(0), 0)))??;
    sender.connect(receiver.local_addr()?)?;
    Ok((sender, receiver))
}

/// TCP segments that the namespace has sent again (RFC 4022 tcpRetransSegs).
fn retransmits(netns: &NetNs) -> anyhow::Result<u64> {
    let text = netns.run(|| fs::read_to_string("/proc/thread-self/net/snmp"))??;
    let mut tcp = text.lines().filter_map(|line| line.strip_prefix("Tcp:"));
    let (names, values) = (tcp.next().context("no Tcp")?, tcp.next().context("no Tcp")?);
    let at = names.split_whitespace().position(|name| name == "RetransSegs");
    let value = at.and_then(|at| values.split_whitespace().nth(at)?.parse().ok());
    value.context("the kernel does not count RetransSegs")
}
