//! What a running weftd says of itself: one JSON document per connection to a Unix socket in its
//! run directory.

use std::collections::BTreeMap;
use std::fs::{self, Permissions};
use std::io::{self, Read};
use std::net::IpAddr;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, bail};
use ipnetwork::IpNetwork;
use serde::{Deserialize, Serialize};
use tokio::io::AsyncWriteExt;
use tokio::net::UnixListener;

/// How long either end of the socket waits for the other.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(2);

/// The state of one daemon at one moment.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Status {
    /// Process id.
    pub pid: u32,
    /// weft's version.
    pub version: String,
    /// This node's id, made once and kept in the state directory.
    pub node_id: String,
    /// What the daemon is doing: "waiting for the network config", "forwarding", …
    pub state: String,
    /// Where leases are kept, as in `--registry`.
    pub registry: String,
    /// The backend in use.
    pub backend: Option<String>,
    /// The external interface.
    pub interface: Option<String>,
    /// The address that other nodes send to.
    pub public_ip: Option<IpAddr>,
    /// The overlay device.
    pub device: Option<String>,
    /// The MTU handed to containers.
    pub mtu: Option<u32>,
    /// The subnets of our lease.
    pub subnets: Vec<IpNetwork>,
    /// When the lease expires if it is not renewed, RFC 3339; absent for a reservation.
    pub lease_expires: Option<String>,
    /// Peers that traffic is forwarded to.
    pub peers: Vec<PeerStatus>,
    /// Leases that are in the registry but not forwarded to, and what else could not be done.
    pub problems: Vec<String>,
    /// What writes the firewall's rules.
    pub firewall: Option<String>,
    /// How often rules that somebody else changed were put back.
    pub firewall_repairs: u64,
    /// How the packet engine does input and output: "uring" or "mmsg".
    pub io: Option<String>,
    /// What the kernel does for many packets at once, by the names of `--offload`, and whether it is
    /// in use: switched off, refused, or never there is `false`.
    pub offloads: BTreeMap<String, bool>,
    /// The backend's counters by name, summed over workers.
    pub counters: BTreeMap<String, u64>,
}

/// One peer.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct PeerStatus {
    /// The peer's subnets.
    pub subnets: Vec<IpNetwork>,
    /// The address that we send to.
    pub public_ip: IpAddr,
}

/// Asks the one daemon whose run directory this is.
///
/// # Errors
/// No daemon, or more than one, answers there.
pub fn read(run_dir: &Path) -> anyhow::Result<Status> {
    let mut daemons = read_all(run_dir)?.into_iter();
    match (daemons.next(), daemons.next()) {
        (Some(daemon), None) => Ok(daemon),
        _ => bail!("not exactly one weftd answers in {}", run_dir.display()),
    }
}

/// Asks all daemons with this run directory. Sockets of daemons that are gone are passed over.
///
/// # Errors
/// None runs, or one does not answer within two seconds.
pub fn read_all(run_dir: &Path) -> anyhow::Result<Vec<Status>> {
    let mut answers = Vec::new();
    for socket in sockets(run_dir)? {
        let context = || format!("weftd does not answer at {}", socket.display());
        match ask(&socket) {
            Ok(answer) => answers.push(answer),
            Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => {}
            Err(error) => return Err(error).with_context(context),
        }
    }
    if answers.is_empty() {
        bail!(
            "no weftd runs with --run-dir {}; start it, or name its --run-dir",
            run_dir.display()
        );
    }
    Ok(answers)
}

/// The sockets there, in the order of their names.
fn sockets(run_dir: &Path) -> anyhow::Result<Vec<PathBuf>> {
    let context = || format!("no weftd runs with --run-dir {}", run_dir.display());
    let entries = fs::read_dir(run_dir).with_context(context)?;
    let paths = entries.filter_map(|entry| Some(entry.ok()?.path()));
    let mut sockets: Vec<PathBuf> =
        paths.filter(|path| path.extension().is_some_and(|ext| ext == "sock")).collect();
    sockets.sort();
    Ok(sockets)
}

fn ask(socket: &Path) -> io::Result<Status> {
    let mut stream = UnixStream::connect(socket)?;
    stream.set_read_timeout(Some(ANSWER_TIMEOUT))?;
    let mut text = String::new();
    stream.read_to_string(&mut text)?;
    Ok(serde_json::from_str(&text)?)
}

/// The daemon's end: whoever connects gets one [`Status`].
#[derive(Debug)]
pub(crate) struct StatusSocket {
    listener: UnixListener,
    path: PathBuf,
}

impl StatusSocket {
    /// Listens at `path`, which only root may connect to. What a killed daemon left there goes:
    /// the caller holds the lock that belongs to the name.
    pub(crate) fn open(path: &Path) -> anyhow::Result<Self> {
        if path.exists() {
            fs::remove_file(path).with_context(|| format!("cannot remove {}", path.display()))?;
        }
        let listener = UnixListener::bind(path)
            .with_context(|| format!("cannot listen at {}; see --run-dir", path.display()))?;
        fs::set_permissions(path, Permissions::from_mode(0o600))
            .with_context(|| format!("cannot restrict {}", path.display()))?;
        Ok(Self { listener, path: path.to_owned() })
    }

    /// The next one who asks.
    pub(crate) async fn accept(&self) -> io::Result<tokio::net::UnixStream> {
        Ok(self.listener.accept().await?.0)
    }
}

impl Drop for StatusSocket {
    fn drop(&mut self) {
        // Left behind, it is removed by the next start.
        let _ = fs::remove_file(&self.path);
    }
}

/// Answers one who asked, without waiting for one who does not listen.
pub(crate) fn answer(mut stream: tokio::net::UnixStream, status: &Status) {
    let Ok(text) = serde_json::to_vec(status) else {
        return;
    };
    tokio::spawn(async move {
        // Whoever hangs up or stalls misses the answer; nobody else is concerned.
        let _ = tokio::time::timeout(ANSWER_TIMEOUT, stream.write_all(&text)).await;
    });
}
