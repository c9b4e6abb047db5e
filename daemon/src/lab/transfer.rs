//! One TCP transfer between two containers, checked by hash.
//!
//! A socket stays in the namespace in which it was made, so only listening and connecting happen
//! inside; two plain threads then move the data. Hashes are taken before and after, not while the
//! clock runs: on a small machine they would compete with the daemons for the cores.

use std::io::{ErrorKind, Read, Write};
use std::net::{IpAddr, Shutdown, SocketAddr, TcpListener, TcpStream};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use sha2::{Digest, Sha256};
use socket2::SockRef;

use super::bytes::Bytes;
use super::cancel::Cancel;
use crate::netns::NetNs;

/// The most that one transfer may carry; both ends hold it in memory.
pub(super) const MAX_TRANSFER: Bytes = Bytes(1 << 30);

/// How much one call to the kernel moves.
const CHUNK: usize = 256 * 1024;

/// How often a waiting end looks at the cancel flag.
const SLICE: Duration = Duration::from_millis(100);

/// How long one connection request is given before a fresh one is made.
const CONNECT_SLICE: Duration = Duration::from_secs(1);

/// What was moved.
#[derive(Debug, Clone, PartialEq)]
pub struct Transfer {
    /// Bytes of data.
    pub bytes: u64,
    /// From the first byte written to the last byte read.
    pub elapsed: Duration,
    /// SHA-256 of the data sent.
    pub sent: [u8; 32],
    /// SHA-256 of the data that was read at the other end.
    pub received: [u8; 32],
}

impl Transfer {
    /// Whether what arrived is what was sent.
    pub fn intact(&self) -> bool {
        self.sent == self.received
    }

    /// Throughput in Gbit/s (10⁹ bits), of the data alone without headers.
    pub fn gbit_per_second(&self) -> f64 {
        let bits = (self.bytes * 8) as f64;
        bits / self.elapsed.as_secs_f64().max(1e-9) / 1e9
    }
}

/// Waiting for progress, but not for ever.
#[derive(Debug, Clone)]
pub struct Patience {
    /// How long nothing may move.
    pub stall: Duration,
    /// Ends the wait early.
    pub cancel: Cancel,
}

impl Default for Patience {
    fn default() -> Self {
        Self { stall: Duration::from_secs(20), cancel: Cancel::default() }
    }
}

/// Sends `bytes` of pseudo-random data from `from` to `address`, which is an address in `to`.
///
/// # Errors
/// No connection, or nothing moved for as long as `patience` lasts; or the transfer is cancelled.
pub fn transfer(
    from: &NetNs,
    to: &NetNs,
    address: IpAddr,
    bytes: Bytes,
    patience: &Patience,
) -> anyhow::Result<Transfer> {
    if bytes > MAX_TRANSFER {
        bail!("{bytes} are too much for one transfer; the most is {MAX_TRANSFER}");
    }
    let size = usize::try_from(bytes.0).context("more than this machine can address")?;
    let listener = to
        .run(|| TcpListener::bind(SocketAddr::new(address, 0)))?
        .with_context(|| format!("cannot listen on {address} in {}", to.name()))?;
    let target = listener.local_addr().context("a listener without an address")?;
    let data = pseudo_random(size, target.port());
    let sent = Sha256::digest(&data).into();

    let mut sender = connect(from, target, patience)?;
    let mut receiver = accept(&listener, patience)?;
    // Filled with something, so that its pages are there before the clock runs.
    let mut arrived = vec![1; size];
    let began = Instant::now();
    let (written, read) = thread::scope(|scope| {
        let writing = scope.spawn(|| write_all(&mut sender, &data, patience));
        let read = read_all(&mut receiver, &mut arrived, patience).map(|()| began.elapsed());
        (writing.join(), read)
    });
    let elapsed = read.with_context(|| format!("receiving in {}", to.name()))?;
    written
        .unwrap_or_else(|panicked| std::panic::resume_unwind(panicked))
        .with_context(|| format!("sending in {}", from.name()))?;
    Ok(Transfer { bytes: bytes.0, elapsed, sent, received: Sha256::digest(&arrived).into() })
}

/// The same data for the same port, so that a failure can be looked into; other data in the next
/// transfer, so that a late packet of this one does not pass there.
fn pseudo_random(size: usize, port: u16) -> Vec<u8> {
    let mut data = vec![0; size];
    fastrand::Rng::with_seed(port.into()).fill(&mut data);
    data
}

fn connect(from: &NetNs, target: SocketAddr, patience: &Patience) -> anyhow::Result<TcpStream> {
    let began = Instant::now();
    loop {
        patience.cancel.check()?;
        let slice = CONNECT_SLICE.min(patience.stall);
        match from.run(|| TcpStream::connect_timeout(&target, slice))? {
            Ok(stream) => return prepared(stream),
            Err(error)
                if error.kind() == ErrorKind::TimedOut && began.elapsed() < patience.stall => {}
            Err(error) => {
                return Err(error)
                    .with_context(|| format!("cannot connect to {target} from {}", from.name()));
            }
        }
    }
}

fn accept(listener: &TcpListener, patience: &Patience) -> anyhow::Result<TcpStream> {
    listener.set_nonblocking(true).context("cannot make the listener non-blocking")?;
    let began = Instant::now();
    loop {
        patience.cancel.check()?;
        match listener.accept() {
            Ok((stream, _)) => {
                stream.set_nonblocking(false).context("cannot make the socket blocking")?;
                return prepared(stream);
            }
            Err(error) if error.kind() != ErrorKind::WouldBlock => {
                return Err(error).context("cannot accept the connection");
            }
            Err(_) if began.elapsed() > patience.stall => bail!("the connection never arrived"),
            Err(_) => thread::sleep(Duration::from_millis(1)),
        }
    }
}

fn prepared(stream: TcpStream) -> anyhow::Result<TcpStream> {
    let set = || {
        stream.set_read_timeout(Some(SLICE))?;
        stream.set_write_timeout(Some(SLICE))?;
        // A socket with unsent data would keep its namespace alive for minutes after the close.
        // Both ends are closed only when both are done.
        SockRef::from(&stream).set_linger(Some(Duration::ZERO))
    };
    set().context("cannot set socket options")?;
    Ok(stream)
}

fn write_all(stream: &mut TcpStream, data: &[u8], patience: &Patience) -> anyhow::Result<()> {
    let size = data.len();
    progress(size, patience, |at| stream.write(&data[at..size.min(at + CHUNK)]))?;
    stream.shutdown(Shutdown::Write).context("cannot end the stream")
}

fn read_all(stream: &mut TcpStream, into: &mut [u8], patience: &Patience) -> anyhow::Result<()> {
    let size = into.len();
    progress(size, patience, |at| stream.read(&mut into[at..size.min(at + CHUNK)]))
}

/// Takes steps from 0 to `size`; each says how far it came.
fn progress(
    size: usize,
    patience: &Patience,
    mut step: impl FnMut(usize) -> std::io::Result<usize>,
) -> anyhow::Result<()> {
    let mut at = 0;
    let mut moved = Instant::now();
    while at < size {
        match step(at) {
            Ok(0) => bail!("the connection ended after {at} of {size} bytes"),
            Ok(count) => {
                at += count;
                moved = Instant::now();
            }
            Err(error) if is_pause(error.kind()) => {
                if moved.elapsed() > patience.stall {
                    let stall = patience.stall.as_secs_f64();
                    bail!("nothing moved for {stall} s, after {at} of {size} bytes");
                }
            }
            Err(error) => {
                return Err(error).with_context(|| format!("after {at} of {size} bytes"));
            }
        }
        patience.cancel.check()?;
    }
    Ok(())
}

fn is_pause(kind: ErrorKind) -> bool {
    [ErrorKind::WouldBlock, ErrorKind::TimedOut, ErrorKind::Interrupted].contains(&kind)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn namespace() -> NetNs {
        let netns = NetNs::create(format!("weft-test-{:08x}", fastrand::u32(..)))
            .expect("needs root and iproute2");
        netns.ip(&["link", "set", "lo", "up"]).unwrap();
        netns
    }

    fn patience(stall: Duration) -> Patience {
        Patience { stall, cancel: Cancel::default() }
    }

    const LOCALHOST: IpAddr = IpAddr::V4(std::net::Ipv4Addr::LOCALHOST);

    #[test]
    fn data_arrives_as_it_was_sent() {
        let netns = namespace();
        let patience = patience(Duration::from_secs(20));
        for bytes in [Bytes(0), Bytes(1), Bytes(3 * CHUNK as u64 + 7)] {
            let done = transfer(&netns, &netns, LOCALHOST, bytes, &patience).unwrap();
            assert!(done.intact());
            assert_eq!(done.bytes, bytes.0);
        }
    }

    #[test]
    fn a_path_that_does_not_exist_ends_in_an_error() {
        let (from, to) = (namespace(), namespace());
        to.ip(&["address", "add", "192.0.2.1/32", "dev", "lo"]).unwrap();
        let address = "192.0.2.1".parse().unwrap();
        let patience = patience(Duration::from_secs(1));
        let error = transfer(&from, &to, address, Bytes(1), &patience).unwrap_err();
        assert!(format!("{error:#}").contains("cannot connect to 192.0.2.1"), "{error:#}");
    }

    #[test]
    fn cancelling_ends_it() {
        let netns = namespace();
        let patience = patience(Duration::from_secs(20));
        patience.cancel.raise(2);
        let error = transfer(&netns, &netns, LOCALHOST, Bytes(1), &patience).unwrap_err();
        assert_eq!(error.downcast_ref(), Some(&super::super::cancel::Cancelled { signal: 2 }));
    }
}
