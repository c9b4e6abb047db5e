//! A proxy that takes its time.

use std::io::{Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::sync::mpsc;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::Result;
use socket2::SockRef;
use weft_daemon::netns::NetNs;

/// Hands bytes on, each a while after it came, in both directions.
#[derive(Debug)]
pub struct SlowProxy {
    /// Where it is found, in its namespace.
    pub address: SocketAddr,
    listener: TcpListener,
}

impl SlowProxy {
    /// Starts it in a namespace.
    pub fn start(netns: &NetNs, server: SocketAddr, delay: Duration) -> Result<Self> {
        let listener = netns.run(|| TcpListener::bind("127.0.0.1:0"))??;
        let address = listener.local_addr()?;
        let netns = NetNs::open(netns.name());
        let accepting = listener.try_clone()?;
        // Threads end with the connections, and those with the daemon.
        thread::spawn(move || {
            for client in accepting.incoming().map_while(Result::ok) {
                let Ok(Ok(server)) = netns.run(|| TcpStream::connect(server)) else { continue };
                for (from, to) in [(&client, &server), (&server, &client)] {
                    if let (Ok(from), Ok(to)) = (from.try_clone(), to.try_clone()) {
                        thread::spawn(move || slow_copy(from, to, delay));
                    }
                }
            }
        });
        Ok(Self { address, listener })
    }
}

impl Drop for SlowProxy {
    fn drop(&mut self) {
        // Ends the accepting, and its thread; fails only where that has ended.
        let _ = SockRef::from(&self.listener).shutdown(Shutdown::Both);
    }
}

fn slow_copy(mut from: TcpStream, mut to: TcpStream, delay: Duration) {
    let (sender, receiver) = mpsc::channel::<(Instant, Vec<u8>)>();
    thread::spawn(move || {
        for (due, bytes) in receiver {
            thread::sleep(due.saturating_duration_since(Instant::now()));
            if to.write_all(&bytes).is_err() {
                break;
            }
        }
        // Fails where the other side is gone already.
        let _ = to.shutdown(Shutdown::Both);
    });
    let mut buffer = vec![0; 65_536];
    while let Ok(len @ 1..) = from.read(&mut buffer) {
        if sender.send((Instant::now() + delay, buffer[..len].to_vec())).is_err() {
            break;
        }
    }
}
