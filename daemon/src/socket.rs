//! The Unix socket in the run directory: one request, a line of JSON, and one document as its answer.
//!
//! ```text
//! echo '{"request":"status"}' | socat - UNIX-CONNECT:/run/weft/weftd-0123456789ab.sock
//! ```
//!
//! Root may ask, and the group `weft` where there is one.

use std::fs::{self, Permissions};
use std::io::{self, Read, Write};
use std::net::IpAddr;
use std::os::fd::OwnedFd;
use std::os::unix::fs::{MetadataExt, PermissionsExt, chown};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, bail, ensure};
use nix::sys::socket::{getsockopt, sockopt::PeerCredentials};
use nix::unistd::Group;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use serde_json::value::{RawValue, to_raw_value};
use socket2::{Domain, SockAddr, Type};
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::net::UnixListener;
use tokio::task::JoinHandle;
use tokio::task::spawn_blocking;

use crate::board::Board;
use crate::made::files_of;
use crate::{metrics, trace};

/// The group that may ask besides root.
const GROUP: &str = "weft";
/// How long a request or an answer may be on its way.
const PATIENCE: Duration = Duration::from_secs(2);
/// Bytes of the longest request.
const REQUEST_LEN_MAX: u64 = 64 << 10;

/// What can be asked.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "request", rename_all = "kebab-case")]
pub enum Request {
    /// A [`crate::status::Status`].
    Status,
    /// The levels of the log, as in `--log-level`, once they are these; as they are, if there are
    /// none.
    LogLevel { levels: Option<String> },
    /// What `/metrics` answers, as one text.
    Metrics,
    /// A [`crate::trace::Trace`] of a packet.
    Trace { to: IpAddr, from: Option<IpAddr> },
}

/// What comes back: its text as it is, for thousands of peers make megabytes of it.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
enum Answer {
    Ok(Box<RawValue>),
    Error(String),
}

/// Asks the daemon at `socket`.
///
/// # Errors
/// None is there ([`is_gone`]), it does not answer in time, or its answer is no.
pub fn ask<T: DeserializeOwned>(socket: &Path, request: &Request) -> anyhow::Result<T> {
    let context = || format!("weftd does not answer at {}", socket.display());
    let answer = exchange(socket, request);
    let failure = answer.as_ref().err().map(io::Error::kind);
    if failure == Some(io::ErrorKind::PermissionDenied) {
        bail!("only root and the group {GROUP} may ask the weftd at {}", socket.display());
    }
    if failure == Some(io::ErrorKind::WouldBlock) {
        bail!("weftd does not answer at {} within {PATIENCE:?}", socket.display());
    }
    match answer.with_context(context)? {
        Answer::Ok(value) => serde_json::from_str(value.get()).with_context(context),
        Answer::Error(reason) => bail!("weftd at {}: {reason}", socket.display()),
    }
}

fn connect(socket: &Path) -> io::Result<UnixStream> {
    let stream = socket2::Socket::new(Domain::UNIX, Type::STREAM, None)?;
    // Before it connects: that waits, too, where a frozen daemon's queue is full (unix(7)).
    stream.set_write_timeout(Some(PATIENCE))?;
    stream.connect(&SockAddr::unix(socket)?)?;
    Ok(UnixStream::from(OwnedFd::from(stream)))
}

fn exchange(socket: &Path, request: &Request) -> io::Result<Answer> {
    let mut stream = connect(socket)?;
    stream.set_read_timeout(Some(PATIENCE))?;
    let mut line = serde_json::to_string(request)?;
    line.push('\n');
    stream.write_all(line.as_bytes())?;
    let mut text = String::new();
    stream.read_to_string(&mut text)?;
    Ok(serde_json::from_str(&text)?)
}

/// What the daemons of a run directory said.
#[derive(Debug)]
pub struct Answers<T> {
    pub given: Vec<T>,
    /// Why others did not.
    missing: Vec<String>,
}

impl<T> Answers<T> {
    /// To be asked once what was given has been dealt with.
    ///
    /// # Errors
    /// A daemon did not answer, or said no.
    pub fn complete(&self) -> anyhow::Result<()> {
        ensure!(self.missing.is_empty(), "{}", self.missing.join("; "));
        Ok(())
    }
}

/// Asks all daemons with this run directory. One that does not answer keeps no others from being
/// heard; those that are gone are passed over.
///
/// # Errors
/// None runs.
pub fn ask_all<T: DeserializeOwned>(
    run_dir: &Path,
    request: &Request,
) -> anyhow::Result<Answers<T>> {
    let mut answers = Answers { given: Vec::new(), missing: Vec::new() };
    for (_, answer) in ask_each(run_dir, request)? {
        match answer {
            Ok(given) => answers.given.push(given),
            Err(error) => answers.missing.push(format!("{error:#}")),
        }
    }
    Ok(answers)
}

/// A daemon's socket, and what the daemon said.
pub type Answered<T> = (PathBuf, anyhow::Result<T>);

/// The same, one by one.
///
/// # Errors
/// As for [`ask_all`].
pub fn ask_each<T: DeserializeOwned>(
    run_dir: &Path,
    request: &Request,
) -> anyhow::Result<Vec<Answered<T>>> {
    let sockets = sockets(run_dir)?.into_iter();
    let answers = sockets.map(|socket| {
        let answer = ask(&socket, request);
        (socket, answer)
    });
    let is_there = |(_, answer): &Answered<T>| !answer.as_ref().is_err_and(is_gone);
    let answers: Vec<Answered<T>> = answers.filter(is_there).collect();
    if answers.is_empty() {
        bail!(
            "no weftd runs with --run-dir {}; start it, or name its --run-dir",
            run_dir.display()
        );
    }
    Ok(answers)
}

/// The sockets there, in the order of their names; none where there is no such directory.
///
/// # Errors
/// The directory cannot be read.
pub fn sockets(run_dir: &Path) -> anyhow::Result<Vec<PathBuf>> {
    files_of(run_dir, |name| name.ends_with(".sock"))
}

/// The process that listens at a socket, by its number where we are: a daemon in a container tells
/// another one. None if nobody does.
///
/// # Errors
/// The socket is not for us, or the process cannot be seen from here (unix(7), `SO_PEERCRED`;
/// pid_namespaces(7)).
pub fn listener(socket: &Path) -> anyhow::Result<Option<u32>> {
    let stream = match connect(socket).map_err(anyhow::Error::new) {
        Err(error) if is_gone(&error) => return Ok(None),
        stream => stream.with_context(|| format!("cannot ask at {}", socket.display()))?,
    };
    let pid = u32::try_from(getsockopt(&stream, PeerCredentials)?.pid()).unwrap_or_default();
    ensure!(pid != 0, "the process at {} cannot be seen from here", socket.display());
    Ok(Some(pid))
}

/// Whether nobody listens: the daemon was killed, or it moved its socket this instant.
pub fn is_gone(error: &anyhow::Error) -> bool {
    let kind = error.downcast_ref::<io::Error>().map(io::Error::kind);
    matches!(kind, Some(io::ErrorKind::ConnectionRefused | io::ErrorKind::NotFound))
}

/// The daemon's end. The file goes when this is dropped.
#[derive(Debug)]
pub(crate) struct Socket {
    path: PathBuf,
    task: Option<JoinHandle<()>>,
}

impl Socket {
    /// Answers from now on, until it is dropped, by what is on the board; under a name of its own
    /// until [`Socket::move_to`] gives it the node's.
    ///
    /// # Errors
    /// The directory cannot be written to.
    pub(crate) fn open(run_dir: &Path, board: Board) -> anyhow::Result<Self> {
        fs::create_dir_all(run_dir)
            .with_context(|| format!("cannot make {}; see --run-dir", run_dir.display()))?;
        remove_abandoned(run_dir);
        let name: String = (0..12).map(|_| fastrand::digit(16)).collect();
        // Only what is called .sock is asked, so nobody finds it before it answers.
        let new = run_dir.join(format!("weftd-starting-{name}.new"));
        let listener = UnixListener::bind(&new)
            .with_context(|| format!("cannot listen at {}; see --run-dir", new.display()))?;
        let mut socket = Self { path: new, task: None };
        restrict(&socket.path)
            .with_context(|| format!("cannot restrict {}", socket.path.display()))?;
        socket.move_to(&socket.path.with_extension("sock"))?;
        socket.task = Some(tokio::spawn(serve(listener, board)));
        Ok(socket)
    }

    /// Gives it another name. What a killed daemon left there goes: the caller holds the lock that
    /// belongs to the name.
    ///
    /// # Errors
    /// The directory cannot be written to.
    pub(crate) fn move_to(&mut self, path: &Path) -> anyhow::Result<()> {
        fs::rename(&self.path, path)
            .with_context(|| format!("cannot write {}; see --run-dir", path.display()))?;
        path.clone_into(&mut self.path);
        Ok(())
    }
}

impl Drop for Socket {
    fn drop(&mut self) {
        // Left behind, it is removed by the next start.
        let _ = fs::remove_file(&self.path);
        self.task.iter().for_each(JoinHandle::abort);
    }
}

/// For root, and the group where there is one, if the socket can be given to it: nothing else depends
/// on that.
fn restrict(path: &Path) -> io::Result<()> {
    let mut mode = 0o600;
    if let Some(group) = Group::from_name(GROUP).ok().flatten() {
        let gid = group.gid.as_raw();
        // A daemon of that group needs neither a privilege nor the system call.
        let is_theirs = fs::metadata(path)?.gid() == gid;
        let given = if is_theirs { Ok(()) } else { chown(path, None, Some(gid)) };
        match given {
            Ok(()) => mode = 0o660,
            Err(error) => tracing::warn!(
                "only root may ask, since the socket cannot be given to the group {GROUP}: {error}; \
                 run weftd in that group (systemd: Group={GROUP})"
            ),
        }
    }
    fs::set_permissions(path, Permissions::from_mode(mode))
}

/// Removes what daemons left that were killed before they had a name.
fn remove_abandoned(run_dir: &Path) {
    let is_starting = |path: &PathBuf| {
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        name.starts_with("weftd-starting-")
    };
    for path in sockets(run_dir).unwrap_or_default().into_iter().filter(is_starting) {
        let outcome = UnixStream::connect(&path);
        if outcome.is_err_and(|error| error.kind() == io::ErrorKind::ConnectionRefused) {
            // Whoever looks next tries again.
            let _ = fs::remove_file(&path);
        }
    }
}

async fn serve(listener: UnixListener, board: Board) {
    loop {
        match listener.accept().await {
            Ok((stream, _)) => {
                let board = board.clone();
                tokio::spawn(async move {
                    // Whoever hangs up or stalls misses the answer; nobody else is concerned.
                    let _ = answer(stream, &board).await;
                });
            }
            Err(error) => {
                // Out of files, say: that passes.
                tracing::debug!("cannot take a request: {error}");
                tokio::time::sleep(PATIENCE).await;
            }
        }
    }
}

async fn answer(mut stream: tokio::net::UnixStream, board: &Board) -> anyhow::Result<()> {
    let (reader, mut writer) = stream.split();
    let mut line = String::new();
    let mut reader = BufReader::new(reader.take(REQUEST_LEN_MAX));
    tokio::time::timeout(PATIENCE, reader.read_line(&mut line)).await??;
    let answer = match serde_json::from_str(&line) {
        Ok(request) => match carry_out(request, board.clone()).await {
            Ok(value) => Answer::Ok(value),
            Err(error) => Answer::Error(format!("{error:#}")),
        },
        Err(error) => Answer::Error(format!("it does not understand the request: {error}")),
    };
    let mut text = serde_json::to_vec(&answer)?;
    text.push(b'\n');
    tokio::time::timeout(PATIENCE, writer.write_all(&text)).await??;
    Ok(())
}

async fn carry_out(request: Request, board: Board) -> anyhow::Result<Box<RawValue>> {
    tracing::debug!(?request, "somebody asks");
    let answer = match request {
        Request::Status => to_raw_value(&board.read()),
        // Both ask the kernel.
        Request::Metrics => to_raw_value(&spawn_blocking(move || metrics::read(&board)).await?),
        Request::Trace { to, from } => {
            let trace = spawn_blocking(move || {
                trace::trace(&board.read(), board.rules().as_ref(), to, from)
            });
            to_raw_value(&trace.await??)
        }
        Request::LogLevel { levels } => {
            let log = board.log();
            if let Some(levels) = levels {
                log.set_levels(&levels).map_err(anyhow::Error::msg)?;
            }
            to_raw_value(&log.levels())
        }
    };
    Ok(answer?)
}
