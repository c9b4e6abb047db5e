//! Probes of the peers through the overlay: whether packets get there and back, how fast, how large
//! they may be, and whether what cuts packets on the way does it right.
//!
//! Each weft node answers probes at its address on the overlay, at a port that its record in the
//! registry names. flannel's nodes have no record; they get ICMP echoes, which they need not answer.

mod blame;
mod course;
mod found;
mod icmp;
mod known;
pub(crate) mod packet;
pub(crate) mod socket;

use std::collections::BTreeSet;
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::pin::pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use ipnetwork::IpNetwork;
use tokio::net::UdpSocket;
use tokio::sync::{Notify, watch};
use tokio::task::JoinHandle;
use weft_backends::{BackendKind, DesiredPeer, Offload, Towards};
use weft_control::lease::{NodeRecord, by_address};

use self::course::{INTERVAL, Send};
use self::icmp::{Heard, Icmp};
use self::known::{Known, Peer};
use self::packet::Packet;
use self::socket::ProbeSocket;
use crate::or_never::or_never;

pub(crate) use self::found::{FAULTS, Found, Path, RTT_BOUNDS_US, Reach, Totals, status};

/// Payload bytes of a small probe: an odd number, which checksums have a special case for.
pub(crate) const SMALL_LEN: usize = packet::LEN_MIN + 5;
/// What is due within so little is done together: waking up costs as much as a probe.
const TICK: Duration = Duration::from_millis(50);
/// Datagrams that are taken in before anybody else of the daemon has a turn.
const TOGETHER_MAX: u32 = 64;

/// A peer to be probed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Target {
    /// Its address on the overlay.
    pub(crate) inner: IpAddr,
    /// Its address on the underlay.
    pub(crate) outer: IpAddr,
    /// Where it answers probes; none if it does not know them.
    pub(crate) port: Option<u16>,
}

/// Probes peers until it is dropped.
#[derive(Debug)]
pub(crate) struct Prober {
    port: u16,
    targets: watch::Sender<Vec<Target>>,
    findings: Findings,
    news: Arc<Notify>,
    task: JoinHandle<()>,
}

/// What probes found, to be read at any time.
#[derive(Debug, Clone, Default)]
pub(crate) struct Findings(Arc<Mutex<Known>>);

impl Prober {
    /// Answers probes at `local` from now on, at `port` where that is free; `mtu`: bytes of the largest
    /// packet that containers send; `overlay_port`: where peers take the backend's packets. Without a socket
    /// weft works as well, and says that it does not probe.
    pub(crate) fn start(
        local: IpAddr,
        port: Option<u16>,
        mtu: u32,
        overlay_port: Option<u16>,
    ) -> Option<Self> {
        let started = Self::try_start(local, port, mtu, overlay_port);
        started.inspect_err(|error| tracing::warn!("peers are not probed: {error}")).ok()
    }

    fn try_start(
        local: IpAddr,
        port: Option<u16>,
        mtu: u32,
        overlay_port: Option<u16>,
    ) -> io::Result<Self> {
        let socket = ProbeSocket::bind(local, port)?;
        let port = socket.local()?.port();
        let icmp = Icmp::open(local.is_ipv6()).inspect_err(|error| {
            tracing::warn!("peers are not pinged: {error}; weftd needs CAP_NET_RAW for that");
        });
        let (targets, wanted) = watch::channel(Vec::new());
        let news = Arc::new(Notify::new());
        let findings = Findings::default();
        let work = Work {
            reader: UdpSocket::from_std(socket.reader()?)?,
            socket,
            icmp: icmp.ok(),
            mtu: u16::try_from(mtu).unwrap_or(u16::MAX),
            overlay_port,
            findings: findings.clone(),
            news: Arc::clone(&news),
        };
        let task = tokio::spawn(work.run(wanted));
        Ok(Self { port, targets, findings, news, task })
    }

    /// The port where we answer.
    pub(crate) fn port(&self) -> u16 {
        self.port
    }

    /// Probes these peers from now on.
    pub(crate) fn aim(&self, targets: Vec<Target>) {
        self.targets.send_if_modified(|known| {
            let differs = *known != targets;
            *known = targets;
            differs
        });
    }

    /// What is known of the peers.
    pub(crate) fn findings(&self) -> &Findings {
        &self.findings
    }

    /// Waits until something is found that an offload may be to blame for. Cancel safe.
    pub(crate) async fn changed(&self) {
        self.news.notified().await;
    }

    /// Has the paths that are not known to be whole probed at once.
    pub(crate) fn probe_paths(&self) {
        let now = Instant::now();
        let Known { peers, agenda, .. } = &mut *self.findings.lock();
        for peer in peers.values_mut().filter(|it| it.course.found().path != Path::Full) {
            peer.course.probe_path_soon(now);
            peer.note(agenda);
        }
        // Has the work look at what is due.
        self.targets.send_modify(|_| ());
    }
}

impl Drop for Prober {
    fn drop(&mut self) {
        self.task.abort();
    }
}

/// The work behind [`Prober`].
struct Work {
    socket: ProbeSocket,
    reader: UdpSocket,
    icmp: Option<Icmp>,
    mtu: u16,
    overlay_port: Option<u16>,
    findings: Findings,
    news: Arc<Notify>,
}

impl Work {
    async fn run(self, mut wanted: watch::Receiver<Vec<Target>>) {
        let mut buffer = vec![0; usize::from(u16::MAX)];
        let mut timer = pin!(tokio::time::sleep(INTERVAL));
        loop {
            let deadline = timer.deadline().into_std();
            // What came may bring one peer forward, and puts no other off.
            let forward = |due: Option<Instant>| due.map_or(deadline, |due| due.min(deadline));
            let due = tokio::select! {
                () = &mut timer => self.step(),
                received = self.reader.recv_from(&mut buffer) => match received {
                    Ok((len, from)) => {
                        let mut due = self.received(&buffer[..len], from);
                        // Those that came meanwhile.
                        for _ in 0..TOGETHER_MAX {
                            let Ok((len, from)) = self.reader.try_recv_from(&mut buffer) else {
                                break;
                            };
                            due = self.received(&buffer[..len], from).into_iter().chain(due).min();
                        }
                        forward(due)
                    }
                    // Out of memory, perhaps.
                    Err(_) => {
                        tokio::time::sleep(TICK).await;
                        deadline
                    }
                },
                heard = or_never(self.icmp.as_ref().map(Icmp::next)) => forward(self.heard(heard)),
                changed = wanted.changed() => {
                    if changed.is_err() {
                        return;
                    }
                    let targets = wanted.borrow_and_update();
                    self.findings.lock().aim(&targets, self.icmp.is_some(), self.mtu, Instant::now());
                    drop(targets);
                    self.step()
                }
            };
            if due != deadline {
                timer.as_mut().reset(due.into());
            }
        }
    }

    /// Sends what is due, and says when something is due again.
    fn step(&self) -> Instant {
        let now = Instant::now();
        self.findings.lock().step(now, |peer| {
            let before = *peer.course.found();
            for send in peer.course.step(now, || fastrand::u64(..)) {
                self.send(&peer.target, send);
            }
            self.tell(peer, &before);
        })
    }

    fn send(&self, target: &Target, send: Send) {
        let payload = |len: u16| usize::from(len).saturating_sub(headers(target.inner));
        let port = target.port.unwrap_or(0);
        let to = SocketAddr::new(target.inner, port);
        match send {
            Send::Small(nonce) => self.socket.send(&packet::probe(nonce, SMALL_LEN), to),
            Send::Sized(nonce, len) => self.socket.send(&packet::probe(nonce, payload(len)), to),
            Send::Pair(pair, len) => {
                let pair = pair.map(|nonce| packet::probe(nonce, payload(len)));
                self.socket.send_pair(&pair, to);
            }
            Send::Echo(nonce) => self.echo(target.inner, nonce),
            Send::OuterEcho(nonce) => self.echo(target.outer, nonce),
        }
    }

    fn echo(&self, to: IpAddr, nonce: u64) {
        if let Some(icmp) = &self.icmp {
            icmp.echo(to, nonce);
        }
    }

    /// Answers a peer's probe, or takes in its answer; says what is due for that peer.
    fn received(&self, datagram: &[u8], from: SocketAddr) -> Option<Instant> {
        let understood = packet::read(datagram)?;
        let now = Instant::now();
        let Known { peers, agenda, .. } = &mut *self.findings.lock();
        let peer = peers.get_mut(&from.ip())?;
        match understood {
            Packet::Probe { nonce, intact } => {
                self.socket.send(&packet::answer(nonce, intact), from);
                peer.course.hurry(now);
            }
            Packet::Answer { nonce, intact } => {
                let before = *peer.course.found();
                peer.course.answered(nonce, intact, now);
                self.tell(peer, &before);
            }
        }
        peer.note(agenda);
        Some(peer.course.due())
    }

    fn heard(&self, heard: Heard) -> Option<Instant> {
        let Known { peers, by_outer, agenda, .. } = &mut *self.findings.lock();
        match heard {
            Heard::Answer { from, nonce } => {
                if let Some(peer) = peers.get_mut(&from) {
                    let before = *peer.course.found();
                    peer.course.answered(nonce, true, Instant::now());
                    self.tell(peer, &before);
                    peer.note(agenda);
                    return Some(peer.course.due());
                }
                for inner in by_outer.get(&from).into_iter().flatten() {
                    if let Some(peer) = peers.get_mut(inner) {
                        peer.course.outer_answered(nonce);
                    }
                }
            }
            Heard::Refused { from, port } => {
                if let Some(peer) = peers.get_mut(&from).filter(|it| it.target.port == Some(port)) {
                    peer.course.probe_refused();
                } else if self.overlay_port == Some(port) {
                    for inner in by_outer.get(&from).into_iter().flatten() {
                        if let Some(peer) = peers.get_mut(inner) {
                            peer.course.refused();
                        }
                    }
                }
            }
        }
        None
    }

    /// Says what is news of a peer.
    fn tell(&self, peer: &Peer, before: &Found) {
        let found = peer.course.found();
        if (found.reach, found.path) == (before.reach, before.path) {
            return;
        }
        let Target { inner, outer, .. } = peer.target;
        if found.reach != before.reach {
            match found.reach.problem() {
                Some(problem) => tracing::warn!(peer = %outer, "{inner} {problem}"),
                // That a peer works is news only of one that did not.
                None if before.reach == Reach::Unknown => {
                    tracing::debug!(peer = %outer, "{inner} answers");
                }
                None => tracing::info!(peer = %outer, "{inner} answers"),
            }
        }
        if found.path != before.path
            && let Some(problem) = found.path.problem()
        {
            tracing::warn!(peer = %outer, "{problem}");
        }
        // One that answered may have spoken for an offload that another one blames.
        if found.blamed().next().is_some() || before.reach == Reach::Reachable {
            self.news.notify_one();
        }
    }
}

impl Findings {
    /// The offloads that may be what loses packets, and to whom.
    pub(crate) fn blamed(&self) -> BTreeSet<(Offload, Towards)> {
        blame::blamed(self.lock().peers.values().map(|it| (&it.target, it.course.found())))
    }

    /// Of the peer with this address on the overlay.
    pub(crate) fn at(&self, inner: IpAddr) -> Option<(Target, Found)> {
        self.lock().peers.get(&inner).map(|peer| (peer.target, *peer.course.found()))
    }

    /// What all probes came to.
    pub(crate) fn totals(&self) -> Totals {
        let known = self.lock();
        let mut totals = known.left;
        known.peers.values().for_each(|peer| totals.add(peer.course.found()));
        totals
    }

    fn lock(&self) -> MutexGuard<'_, Known> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Bytes of IP and UDP headers in front of a probe.
pub(crate) fn headers(inner: IpAddr) -> usize {
    if inner.is_ipv6() { 40 + 8 } else { 20 + 8 }
}

/// A node's address for probes. host-gw's overlay has no addresses of its own.
pub(crate) fn local(
    kind: BackendKind,
    public_ip: IpAddr,
    mut subnets: impl Iterator<Item = IpNetwork>,
) -> Option<IpAddr> {
    match kind {
        BackendKind::HostGw => Some(public_ip),
        BackendKind::UdpTun | BackendKind::Vxlan => Some(subnets.next()?.network()),
    }
}

/// Where peers are probed.
pub(crate) fn targets(
    kind: BackendKind,
    public_ip: IpAddr,
    peers: &[DesiredPeer],
    nodes: &[NodeRecord],
) -> Vec<Target> {
    let nodes = by_address(nodes);
    let target = |peer: &DesiredPeer| {
        let outer = peer.lease.attrs.address_of(public_ip.is_ipv6())?;
        let inner = local(kind, outer, peer.lease.key.networks())?;
        Some(Target { inner, outer, port: nodes.get(&outer).and_then(|node| node.probe_port) })
    };
    peers.iter().filter(|peer| kind.is_of(&peer.lease.attrs)).filter_map(target).collect()
}

#[cfg(test)]
mod tests {
    use std::net::Ipv4Addr;

    use super::*;

    const LOCAL: IpAddr = IpAddr::V4(Ipv4Addr::LOCALHOST);

    fn runtime() -> tokio::runtime::Runtime {
        tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap()
    }

    /// As `weft doctor` finds them under PublicIP.
    #[test]
    fn two_leases_with_one_public_address_are_two_peers() {
        let targets = [2, 3].map(|at| Target {
            inner: [10, 42, at, 0].into(),
            outer: LOCAL,
            port: Some(4711),
        });
        let findings = Findings::default();
        findings.lock().aim(&targets, true, 1472, Instant::now());
        assert_eq!(
            targets.map(|it| findings.at(it.inner).map(|(found, _)| found)),
            targets.map(Some)
        );
    }

    #[test]
    fn strangers_get_no_answer() {
        let stranger = std::net::UdpSocket::bind((LOCAL, 0)).unwrap();
        runtime().block_on(async {
            let prober = Prober::start(LOCAL, None, 1472, None).unwrap();
            stranger.send_to(&packet::probe(1, 100), (LOCAL, prober.port())).unwrap();
            stranger.set_nonblocking(true).unwrap();
            let stranger = UdpSocket::from_std(stranger).unwrap();
            let wait = Duration::from_millis(200);
            assert!(tokio::time::timeout(wait, stranger.recv_from(&mut [0; 64])).await.is_err());
            let target = Target { inner: LOCAL, outer: LOCAL, port: None };
            prober.aim(vec![target]);
            let mut buffer = [0; 64];
            let answered = async {
                loop {
                    stranger.send_to(&packet::probe(2, 100), (LOCAL, prober.port())).await.unwrap();
                    let answer = stranger.recv_from(&mut buffer);
                    if let Ok(Ok((len, _))) = tokio::time::timeout(wait, answer).await {
                        return packet::read(&buffer[..len]);
                    }
                }
            };
            assert_eq!(answered.await, Some(Packet::Answer { nonce: 2, intact: true }));
        });
    }
}
