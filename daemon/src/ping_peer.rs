//! `weft ping-peer`: probes of peers through the overlay, now, beside those that the daemon sends by
//! itself.

use std::io::{self, Write};
use std::net::{IpAddr, SocketAddr};
use std::process::ExitCode;
use std::time::{Duration, Instant};

use anyhow::{Context, ensure};
use clap::Args;
use tokio::net::UdpSocket;
use tokio::time::timeout;
use weft_backends::BackendKind;

use crate::directories::Directories;
use crate::probe::packet::{self, Packet};
use crate::probe::socket::ProbeSocket;
use crate::probe::{self, SMALL_LEN, headers};
use crate::socket::{self, Request};
use crate::status::{PeerStatus, Status};

/// How long an answer may take.
const PATIENCE: Duration = Duration::from_secs(1);

/// Send probes to peers through the overlay now, small ones and such of full size.
///
/// Exit status: 0 if every probe was answered, else 1. flannel's nodes answer no probes; `ping` the
/// base of their subnet.
#[derive(Debug, Args)]
pub struct PingPeerArgs {
    /// The peer, by its address, an address in its subnet, or its name; all of them, if absent.
    peer: Option<String>,
    /// How many of each size.
    #[arg(short, long, default_value_t = 3, value_parser = clap::value_parser!(u16).range(1..=1000))]
    count: u16,
}

/// Sends them and writes what came back.
///
/// # Errors
/// No daemon answers, or none has such a peer that answers probes.
pub fn run(
    arguments: &PingPeerArgs,
    directories: &Directories,
    out: &mut dyn Write,
) -> anyhow::Result<ExitCode> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let answers = socket::ask_all::<Status>(&directories.run_dir, &Request::Status)?;
    let (mut pinged, mut lost) = (0, 0);
    for daemon in &answers.given {
        let wanted =
            |peer: &&PeerStatus| arguments.peer.as_ref().is_none_or(|it| is_called(peer, it));
        for peer in daemon.peers.iter().filter(wanted) {
            let Some(to) = peer.probe.address else { continue };
            pinged += 1;
            let pinging = Pinging::new(daemon, to).context("cannot send probes")?;
            lost += runtime.block_on(pinging.ping(peer.public_ip, arguments.count, out))?;
        }
    }
    answers.complete()?;
    ensure!(pinged > 0, "no such peer answers probes; `weft status` lists the peers");
    Ok(if lost == 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

fn is_called(peer: &PeerStatus, text: &str) -> bool {
    match text.parse::<IpAddr>() {
        Ok(ip) => peer.public_ip == ip || peer.subnets.iter().any(|subnet| subnet.contains(ip)),
        Err(_) => peer.name.as_deref() == Some(text),
    }
}

/// The pinging of one peer.
struct Pinging {
    socket: ProbeSocket,
    to: SocketAddr,
    mtu: usize,
}

impl Pinging {
    /// From the daemon's own address on the overlay, which the peer knows.
    fn new(daemon: &Status, to: SocketAddr) -> anyhow::Result<Self> {
        let kind = daemon.backend.as_deref().and_then(BackendKind::from_config);
        let local = kind.zip(daemon.public_ip);
        let local =
            local.and_then(|(kind, ip)| probe::local(kind, ip, daemon.subnets.iter().copied()));
        let socket = ProbeSocket::bind(local.context("the daemon has no subnet yet")?, None)?;
        let mtu = usize::try_from(daemon.mtu.unwrap_or_default())?;
        Ok(Self { socket, to, mtu })
    }

    /// Says how many probes were lost.
    async fn ping(&self, peer: IpAddr, count: u16, out: &mut dyn Write) -> anyhow::Result<u32> {
        let reader = UdpSocket::from_std(self.socket.reader()?)?;
        let full = self.mtu.saturating_sub(headers(self.to.ip()));
        let mut lost = 0;
        for number in 1..=count {
            for len in [SMALL_LEN, full] {
                let bytes = len + headers(self.to.ip());
                let what = match self.exchange(&reader, len).await? {
                    Some((took, true)) => format!("{:.3} ms", took.as_secs_f64() * 1e3),
                    Some((_, false)) => {
                        lost += 1;
                        "arrived damaged".into()
                    }
                    None => {
                        lost += 1;
                        "no answer".into()
                    }
                };
                writeln!(out, "{peer} ({}) {number}: {bytes} bytes, {what}", self.to.ip())?;
            }
        }
        Ok(lost)
    }

    /// One probe; how long its answer took, and whether it had come as it was sent.
    async fn exchange(
        &self,
        reader: &UdpSocket,
        len: usize,
    ) -> io::Result<Option<(Duration, bool)>> {
        let nonce = fastrand::u64(..);
        let begun = Instant::now();
        self.socket.send(&packet::probe(nonce, len), self.to);
        let answer = async {
            let mut buffer = [0; packet::LEN_MIN];
            loop {
                let (len, from) = reader.recv_from(&mut buffer).await?;
                if let Some(Packet::Answer { nonce: of, intact }) = packet::read(&buffer[..len])
                    && (of, from) == (nonce, self.to)
                {
                    return Ok((begun.elapsed(), intact));
                }
            }
        };
        timeout(PATIENCE, answer).await.ok().transpose()
    }
}
