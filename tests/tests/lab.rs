//! `weft lab` as an operator runs it, and that nothing of a lab is left behind, however it ends.

use std::env;
use std::fs;
use std::io::{BufRead, BufReader, Read};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::{self, Receiver, RecvTimeoutError};
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use rustix::process::{Pid, Signal, kill_process, test_kill_process};
use weft_tests::{overlay, program, until};

/// How long a lab may take from one line of its progress to the next.
const PATIENCE: Duration = Duration::from_secs(120);

/// A `weft lab` that runs, of which the progress is read as it comes.
struct Running {
    child: Child,
    /// Lines of its progress; closed when it ends.
    progress: Receiver<String>,
    id: String,
}

impl Running {
    fn start(arguments: &[&str]) -> Result<Self> {
        Self::start_with(arguments, &[])
    }

    fn start_with(arguments: &[&str], variables: &[(&str, &str)]) -> Result<Self> {
        let mut command = Command::new(program("weft")?);
        command.envs(variables.iter().copied());
        command.arg("lab").args(arguments).stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut child = command.spawn()?;
        let stderr = BufReader::new(child.stderr.take().context("stderr is piped")?);
        let (sender, progress) = mpsc::channel();
        thread::spawn(move || stderr.lines().map_while(|it| sender.send(it.ok()?).ok()).count());
        let mut running = Self { child, progress, id: String::new() };
        let line = running.wait_for("namespaces weft-")?;
        let id = line.split("weft-").nth(1).and_then(|rest| rest.split('-').next());
        running.id = id.context("the lab's id")?.to_owned();
        Ok(running)
    }

    /// Reads on until a line has this text.
    fn wait_for(&self, text: &str) -> Result<String> {
        loop {
            let line = self.progress.recv_timeout(PATIENCE);
            let line = line.with_context(|| format!("the lab never said {text:?}"))?;
            if line.contains(text) {
                return Ok(line);
            }
        }
    }

    /// Waits for the end: exit status, stdout, and the rest of stderr.
    fn end(&mut self) -> Result<(Option<i32>, String, String)> {
        let (mut stderr, mut stdout) = (String::new(), String::new());
        loop {
            match self.progress.recv_timeout(PATIENCE) {
                Ok(line) => stderr += &(line + "\n"),
                Err(RecvTimeoutError::Disconnected) => break,
                Err(RecvTimeoutError::Timeout) => bail!("the lab does not end; it said:\n{stderr}"),
            }
        }
        let mut output = self.child.stdout.take().context("stdout is piped")?;
        output.read_to_string(&mut stdout)?;
        Ok((self.child.wait()?.code(), stdout, stderr))
    }

    fn namespace(&self, what: &str) -> String {
        format!("weft-{}-{what}", self.id)
    }
}

/// Takes away what a test leaves that fails midway.
impl Drop for Running {
    fn drop(&mut self) {
        if matches!(self.child.try_wait(), Ok(None)) {
            let _ = kill_process(Pid::from_child(&self.child), Signal::TERM);
            let _ = self.child.wait();
        }
        if let (Ok(weft), false) = (program("weft"), self.id.is_empty()) {
            let _ = Command::new(weft).args(["lab", "down", &self.id]).output();
        }
    }
}

/// Nothing that bears the lab's id is in the system any more.
fn nothing_is_left_of(id: &str) -> Result<()> {
    let (namespaces, directories) = (Path::new("/run/netns").to_owned(), env::temp_dir());
    for (directory, mark) in
        [(namespaces, format!("weft-{id}-")), (directories, format!("weft-lab-{id}-"))]
    {
        for entry in fs::read_dir(directory)? {
            let path = entry?.path();
            assert!(!path.to_string_lossy().contains(&mark), "{} is left", path.display());
        }
    }
    assert!(!Path::new(&format!("/run/weft-lab/{id}.json")).exists());
    for entry in fs::read_dir("/proc")? {
        let path = entry?.path().join("cmdline");
        // Processes that end meanwhile leave nothing to read.
        let line = fs::read(&path).unwrap_or_default();
        let line = String::from_utf8_lossy(&line).into_owned();
        assert!(!line.contains(&format!("weft-lab-{id}")), "left running: {line}");
    }
    Ok(())
}

#[test]
fn shows_that_all_pairs_reach_each_other() -> Result<()> {
    let mut running = Running::start(&["--hosts", "2", "--bytes", "4MiB"])?;
    let id = running.id.clone();
    let (status, stdout, stderr) = running.end()?;
    assert_eq!(status, Some(0), "{stdout}\n{stderr}");
    for text in ["10.168.0.94", "10.168.0.95", "flannel0", "1472", "ok", "tun_to_udp_packets"] {
        assert!(stdout.contains(text), "no {text} in\n{stdout}");
    }
    assert!(!stdout.contains("MISMATCH"), "{stdout}");
    nothing_is_left_of(&id)
}

/// As `make lab REGISTRY=etcd` does.
#[test]
fn leases_may_be_in_an_etcd_of_the_labs_own() -> Result<()> {
    let mut running =
        Running::start(&["--hosts", "2", "--bytes", "1MiB", "--registry", "etcd", "--keep"])?;
    let id = running.id.clone();
    let (etcd, host) = (running.namespace("e1"), running.namespace("h1"));
    let (status, stdout, stderr) = running.end()?;
    assert_eq!(status, Some(0), "{stdout}\n{stderr}");
    let mut show = Command::new("ip");
    show.args(["netns", "exec", &host]).arg(program("weft")?);
    show.args(["registry", "--etcd-endpoints=http://10.168.0.1:2379", "show"]);
    let shown = String::from_utf8(show.output()?.stdout)?;
    for address in ["10.168.0.94", "10.168.0.95"] {
        assert!(shown.contains(address), "{shown}");
    }
    assert!(Path::new("/run/netns").join(etcd).exists());
    let down = Command::new(program("weft")?).args(["lab", "down", &id]).output()?;
    assert!(down.status.success(), "{}", String::from_utf8_lossy(&down.stderr));
    nothing_is_left_of(&id)
}

#[test]
fn names_the_pairs_of_a_host_that_is_cut_off() -> Result<()> {
    let mut running = Running::start(&["--hosts", "3", "--bytes", "64MiB"])?;
    running.wait_for("transfer of")?;
    let cut_off = running.namespace("h3");
    let status =
        Command::new("ip").args(["-n", &cut_off, "link", "set", "eth0", "down"]).status()?;
    assert!(status.success());
    let id = running.id.clone();
    let (status, stdout, stderr) = running.end()?;
    assert_eq!(status, Some(1), "{stdout}\n{stderr}");
    let failed =
        stderr.lines().find(|line| line.contains("failed pairs")).context(stderr.clone())?;
    for pair in ["h2->h3", "h3->h1", "h3->h2"] {
        assert!(failed.contains(pair), "{failed}");
    }
    for pair in ["h1->h2", "h2->h1"] {
        assert!(!failed.contains(pair), "{failed}");
    }
    nothing_is_left_of(&id)
}

#[test]
fn a_signal_ends_it_and_removes_everything() -> Result<()> {
    for (signal, moment, status) in
        [(Signal::INT, "starting weftd", 130), (Signal::TERM, "transfer of", 143)]
    {
        let mut running = Running::start(&["--hosts", "2", "--bytes", "256MiB"])?;
        running.wait_for(moment)?;
        kill_process(Pid::from_child(&running.child), signal)?;
        let id = running.id.clone();
        let (ended, _, stderr) = running.end()?;
        assert_eq!(ended, Some(status), "{stderr}");
        nothing_is_left_of(&id)?;
    }
    Ok(())
}

#[test]
fn a_kept_lab_stays_until_it_is_taken_down() -> Result<()> {
    let mut running = Running::start(&["--hosts", "2", "--bytes", "1MiB", "--keep"])?;
    let (id, container) = (running.id.clone(), running.namespace("c1"));
    let (status, stdout, stderr) = running.end()?;
    assert_eq!(status, Some(0), "{stderr}");
    let hint = stdout.lines().chain(stderr.lines()).find(|line| line.contains("ping 10.42."));
    let address = hint.and_then(|line| line.split_whitespace().last()).context(stdout.clone())?;
    let ping = ["netns", "exec", &container, "ping", "-c", "1", "-W", "2", address];
    assert!(Command::new("ip").args(ping).output()?.status.success());

    let down = Command::new(program("weft")?).args(["lab", "down", &id]).output()?;
    assert!(down.status.success(), "{}", String::from_utf8_lossy(&down.stderr));
    assert!(String::from_utf8(down.stdout)?.contains(&container));
    nothing_is_left_of(&id)
}

#[test]
fn a_daemon_that_does_not_come_up_is_told_with_its_log() -> Result<()> {
    let mut running = Running::start_with(&["--hosts", "2"], &[("LAB_WEFT_IO", "pigeons")])?;
    let id = running.id.clone();
    let (status, _, stderr) = running.end()?;
    assert_eq!(status, Some(1));
    assert!(stderr.contains("pigeons"), "{stderr}");
    nothing_is_left_of(&id)
}

/// The library's labs, which every other test stands on.
#[test]
fn a_dropped_lab_leaves_nothing() -> Result<()> {
    let lab = overlay(2)?;
    let id = lab.id().to_owned();
    let pids = [lab.status(0)?.pid, lab.status(1)?.pid];
    drop(lab);
    nothing_is_left_of(&id)?;
    for pid in pids {
        let pid = Pid::from_raw(i32::try_from(pid)?).context("a pid")?;
        until("the daemon has ended", || Ok(test_kill_process(pid).is_err()))?;
    }
    Ok(())
}
