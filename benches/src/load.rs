//! The load: streams, floods, paced datagrams and round trips between two containers.
//!
//! Sockets are made inside the containers' namespaces and used from threads of this process, so
//! that everything that is measured shares one clock. TCP runs on tokio-uring, sender and receiver
//! on a thread each. Datagrams and round trips use plain sockets: tokio-uring's own latency of 20
//! to 40 µs, and its timer's grain of a millisecond, would be measured instead.

use std::fs;
use std::io;
use std::net::{Ipv4Addr, Shutdown, TcpListener, TcpStream, UdpSocket};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use anyhow::{Context, ensure};
use crossbeam::utils::CachePadded;
use hdrhistogram::Histogram;
use socket2::SockRef;
use weft_daemon::netns::NetNs;

use crate::topology::{self, Topology, inner};

/// Congestion control of all streams: what most kernels have by default.
pub const CONGESTION: &str = "cubic";
/// Bytes of one TCP send or receive.
const CHUNK: usize = 128 << 10;
/// What is not measured yet: slow start, and threads that wake up.
pub const WARM_UP: Duration = Duration::from_millis(300);
/// How often paced datagrams are sent, as many as are due.
const PACE: Duration = Duration::from_micros(500);
/// How long streams may take to drain, and to connect.
const GRACE: Duration = Duration::from_secs(3);
/// How long an answer is waited for.
const ANSWER: Duration = Duration::from_millis(200);
/// No datagram for this long: there are none on the way any more. Longer than [`ANSWER`].
const SILENCE: Duration = Duration::from_millis(400);
/// So large that the receiving end of a flood loses nothing itself.
const RECEIVE_BUFFER: usize = 32 << 20;
/// IPv4 and UDP headers: a datagram of 64 bytes is an IP packet of 64.
const HEADERS: usize = 28;

/// What streams came to.
#[derive(Debug, Clone, Copy)]
pub struct Streamed {
    pub bytes: u64,
    pub seconds: f64,
    pub retransmits: u64,
}

/// Sends over `streams` connections, as fast as they go, for `time`; calls `mark` at its beginning and end.
///
/// # Errors
/// No connection, or a socket that fails on the way.
pub fn streams(
    net: &Topology,
    streams: usize,
    time: Duration,
    mark: &mut dyn FnMut() -> anyhow::Result<()>,
) -> anyhow::Result<Streamed> {
    let (senders, receivers) = connections(net, streams)?;
    let all = senders.iter().chain(&receivers).map(TcpStream::try_clone);
    let all: Vec<TcpStream> = all.collect::<io::Result<_>>()?;
    let (stop, received) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicU64::new(0)));
    let sending = spawn_streams(senders, {
        let stop = Arc::clone(&stop);
        move |socket| send_until(socket, Arc::clone(&stop))
    });
    let receiving = spawn_streams(receivers, {
        let received = Arc::clone(&received);
        move |socket| receive_to_end(socket, Arc::clone(&received))
    });
    let outcome = meter_streams(&net.containers[0], &received, time, mark);
    stop.store(true, Ordering::Relaxed);
    let drained = wait_for(|| sending.is_finished() && receiving.is_finished());
    if !drained {
        abort(&all);
    }
    let (sent, read) = (join(sending), join(receiving));
    ensure!(drained, "the streams came to a stand: nothing carries packets any more");
    sent.context("sending")?;
    read.context("receiving")?;
    outcome
}

/// Both ends of each connection.
fn connections(net: &Topology, streams: usize) -> anyhow::Result<(Vec<TcpStream>, Vec<TcpStream>)> {
    let [from, to] = &net.containers;
    let listener = to.run(|| TcpListener::bind((inner(1), 0)))??;
    let address = listener.local_addr()?;
    let (mut senders, mut receivers) = (Vec::new(), Vec::new());
    for _ in 0..streams {
        let sender = from.run(|| TcpStream::connect_timeout(&address, GRACE))?;
        let sender = sender.context("no connection between the containers")?;
        SockRef::from(&sender).set_tcp_congestion(CONGESTION.as_bytes())?;
        senders.push(sender);
        receivers.push(listener.accept()?.0);
    }
    Ok((senders, receivers))
}

/// What arrives from the end of the warm-up on, for `time`.
fn meter_streams(
    from: &NetNs,
    received: &AtomicU64,
    time: Duration,
    mark: &mut dyn FnMut() -> anyhow::Result<()>,
) -> anyhow::Result<Streamed> {
    thread::sleep(WARM_UP);
    // Takes a thread, and so a while on busy processors: outside of what is timed.
    let resent = retransmits(from)?;
    mark()?;
    let (before, begun) = (received.load(Ordering::Relaxed), Instant::now());
    thread::sleep(time);
    let (bytes, seconds) = (received.load(Ordering::Relaxed) - before, begun.elapsed());
    mark()?;
    let retransmits = retransmits(from)? - resent;
    Ok(Streamed { bytes, seconds: seconds.as_secs_f64(), retransmits })
}

/// Ends connections that no longer move, at once: a send in flight would wait for ever, and unsent
/// data would keep the namespace alive for minutes.
fn abort(sockets: &[TcpStream]) {
    for socket in sockets {
        // Both fail only for a connection that has ended.
        let _ = SockRef::from(socket).set_linger(Some(Duration::ZERO));
        let _ = socket.shutdown(Shutdown::Both);
    }
}

fn wait_for(mut done: impl FnMut() -> bool) -> bool {
    let deadline = Instant::now() + GRACE;
    while !done() {
        if Instant::now() > deadline {
            return false;
        }
        thread::sleep(Duration::from_millis(5));
    }
    true
}

fn join<T>(thread: JoinHandle<T>) -> T {
    thread.join().unwrap_or_else(|panicked| std::panic::resume_unwind(panicked))
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
#[derive(Debug, Clone, Copy, Default)]
pub struct Delivered {
    /// All, from first to last; those in flight at the end are waited for.
    pub sent: u64,
    pub received: u64,
    /// Of those received, how many came after a later one.
    pub reordered: u64,
    /// What was sent and received from the end of the warm-up on, for `seconds`: queues are full by
    /// then, so that what lies in them does not count as delivered.
    pub sent_steadily: u64,
    pub received_steadily: u64,
    pub seconds: f64,
}

impl Delivered {
    /// The part that was lost.
    pub fn loss(&self) -> f64 {
        1.0 - self.received as f64 / self.sent.max(1) as f64
    }

    /// Packets a second that arrived.
    pub fn rate(&self) -> f64 {
        self.received_steadily as f64 / self.seconds
    }

    /// Packets a second that were sent.
    pub fn offered(&self) -> f64 {
        self.sent_steadily as f64 / self.seconds
    }
}

/// What datagrams to send.
#[derive(Debug, Clone, Copy)]
pub struct Datagrams {
    /// Bytes of the IP packet of each.
    pub len: usize,
    /// How many a second; as fast as they go if there is none.
    pub rate: Option<f64>,
    /// To random addresses of the second container, not only one.
    pub scattered: bool,
}

/// Sends datagrams, each with a call of its own, and measures for `time` once that is steady; calls `mark` at
/// its beginning and end.
///
/// # Errors
/// A socket that cannot be made.
pub fn datagrams(
    net: &Topology,
    what: Datagrams,
    time: Duration,
    mark: &mut dyn FnMut() -> anyhow::Result<()>,
) -> anyhow::Result<Delivered> {
    let (sender, receiver) = socket_pair(net)?;
    let port = receiver.local_addr()?.port();
    // Root may go past net.core.rmem_max only with an option that needs more than a plain socket,
    // so the kernel may grant less; the reader keeps up.
    SockRef::from(&receiver).set_recv_buffer_size(RECEIVE_BUFFER)?;
    receiver.set_read_timeout(Some(SILENCE))?;
    let (counts, stop) = (Arc::new(Counts::default()), Arc::new(AtomicBool::new(false)));
    let receiving = thread::spawn({
        let counts = Arc::clone(&counts);
        move || receive_datagrams(&receiver, &counts)
    });
    let sending = thread::spawn({
        let (counts, stop) = (Arc::clone(&counts), Arc::clone(&stop));
        move || send_datagrams(&sender, what, port, &counts, &stop)
    });
    thread::sleep(WARM_UP);
    let begun = mark();
    let (before, begin) = (counts.now(), Instant::now());
    thread::sleep(time);
    let (after, seconds) = (counts.now(), begin.elapsed().as_secs_f64());
    let ended = mark();
    stop.store(true, Ordering::Relaxed);
    join(sending);
    let reordered = join(receiving);
    begun.and(ended)?;
    let (sent, received) = counts.now();
    Ok(Delivered {
        sent,
        received,
        reordered,
        sent_steadily: after.0 - before.0,
        received_steadily: after.1 - before.1,
        seconds,
    })
}

/// How far sender and receiver are, each on its own cache line.
#[derive(Debug, Default)]
struct Counts {
    sent: CachePadded<AtomicU64>,
    received: CachePadded<AtomicU64>,
}

impl Counts {
    fn now(&self) -> (u64, u64) {
        (self.sent.load(Ordering::Relaxed), self.received.load(Ordering::Relaxed))
    }
}

/// Sends until told to stop. The clock is read once for a few, and a full queue is what a flood is
/// for: what the socket refuses was not sent.
fn send_datagrams(
    socket: &UdpSocket,
    what: Datagrams,
    port: u16,
    counts: &Counts,
    stop: &AtomicBool,
) {
    let Datagrams { len, rate, scattered } = what;
    let mut payload = vec![0x5a; len - HEADERS];
    let begin = Instant::now();
    let mut tried = 0u64;
    while !stop.load(Ordering::Relaxed) {
        let due = rate.map_or(tried as f64 + 32.0, |rate| begin.elapsed().as_secs_f64() * rate);
        // One that is behind has more to send than the time that is left allows.
        while (tried as f64) < due && !stop.load(Ordering::Relaxed) {
            tried += 1;
            payload[..8].copy_from_slice(&tried.to_be_bytes());
            let outcome = if scattered {
                socket.send_to(&payload, (topology::scattered(fastrand::u32(..)), port))
            } else {
                socket.send(&payload)
            };
            counts.sent.fetch_add(outcome.is_ok().into(), Ordering::Relaxed);
        }
        if rate.is_some() {
            thread::sleep(PACE);
        }
    }
}

/// Counts what arrives until nothing has for a while; returns how many came after a later one.
fn receive_datagrams(socket: &UdpSocket, counts: &Counts) -> u64 {
    let (mut packet, mut latest, mut reordered) = ([0; 2048], 0, 0);
    while socket.recv(&mut packet).is_ok() {
        let number = number_of(&packet);
        reordered += u64::from(number < latest);
        latest = latest.max(number);
        counts.received.fetch_add(1, Ordering::Relaxed);
    }
    reordered
}

fn number_of(packet: &[u8]) -> u64 {
    packet.first_chunk().map_or(0, |bytes| u64::from_be_bytes(*bytes))
}

/// Round trips, one after the other.
#[derive(Debug)]
pub struct RoundTrips {
    /// Nanoseconds from a datagram to its answer.
    pub times: Histogram<u64>,
    /// How many were never answered; their time is not in `times`.
    pub lost: u64,
}

/// Sends small datagrams and waits for the answer to each.
///
/// # Errors
/// Nothing comes back at all.
pub fn round_trips(net: &Topology, time: Duration) -> anyhow::Result<RoundTrips> {
    let (client, server) = socket_pair(net)?;
    server.set_read_timeout(Some(SILENCE))?;
    client.set_read_timeout(Some(ANSWER))?;
    let answering = thread::spawn(move || {
        let mut packet = [0; 64];
        while let Ok((len, from)) = server.recv_from(&mut packet) {
            // A lost answer is a lost round trip.
            let _ = server.send_to(&packet[..len], from);
        }
    });
    let mut trips =
        RoundTrips { times: Histogram::new_with_bounds(100, 1_000_000_000, 3)?, lost: 0 };
    let begin = Instant::now();
    for number in 1u64.. {
        if begin.elapsed() > time {
            break;
        }
        let sent = Instant::now();
        if is_answered(&client, number) {
            let nanoseconds = u64::try_from(sent.elapsed().as_nanos()).unwrap_or(u64::MAX);
            trips.times.saturating_record(nanoseconds);
        } else {
            trips.lost += 1;
        }
    }
    join(answering);
    ensure!(!trips.times.is_empty(), "no datagram came back");
    Ok(trips)
}

/// Late answers to earlier ones are passed over.
fn is_answered(client: &UdpSocket, number: u64) -> bool {
    let mut packet = [0; 64];
    packet[..8].copy_from_slice(&number.to_be_bytes());
    if client.send(&packet).is_err() {
        return false;
    }
    while client.recv(&mut packet).is_ok() {
        if number_of(&packet) == number {
            return true;
        }
    }
    false
}

/// A connected sender in the first container, a receiver in the second.
fn socket_pair(net: &Topology) -> anyhow::Result<(UdpSocket, UdpSocket)> {
    let [from, to] = &net.containers;
    // At any of its addresses: it may have scattered ones.
    let receiver = to.run(|| UdpSocket::bind((Ipv4Addr::UNSPECIFIED, 0)))??;
    let sender = from.run(|| UdpSocket::bind((inner(0), 0)))??;
    sender.connect((inner(1), receiver.local_addr()?.port()))?;
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
