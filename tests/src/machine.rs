//! A host that systemd has booted: a container of systemd-nspawn(1) in a network namespace of the
//! lab, with a root of its own and, as its /usr, this machine's with what a test adds.

use std::fs;
use std::io::ErrorKind;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, Result, ensure};
use rustix::process::{Pid, Signal, kill_process};
use tempfile::TempDir;
use weft_daemon::netns::NetNs;

use crate::{Killed, install, output_of, until};

/// What systemd gives to services, and login(1) to root.
const PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// What this machine has in /etc that programs in /usr want: where Debian's iptables leads to, and
/// how openssl makes certificates.
const SETTINGS: [&str; 2] = ["/etc/alternatives", "/etc/ssl"];

/// Joins the control groups that the first argument names, and becomes the rest.
const IN_CGROUPS: &str =
    "set -e; for group in $1; do echo $$ > \"$group/cgroup.procs\"; done; shift; exec \"$@\"";

/// A host with weft installed. Dropped, it loses its power.
#[derive(Debug)]
pub struct Machine {
    netns: NetNs,
    directory: TempDir,
    power: Option<Power>,
}

/// What there is of it while it is on.
#[derive(Debug)]
struct Power {
    _nspawn: Killed,
    /// systemd, as seen from outside; 0 until it is known.
    init: i32,
}

impl Machine {
    /// One in this namespace that is still off. What belongs below its /usr is put below
    /// [`Machine::path`] before it boots.
    pub fn new(netns: &NetNs) -> Result<Self> {
        let netns = NetNs::open(netns.name());
        let it = Self { netns, directory: tempfile::tempdir()?, power: None };
        install(it.directory.path(), "/usr/local")?;
        let root = it.root();
        for directory in ["etc", "opt", "usr"] {
            fs::create_dir_all(root.join(directory))?;
        }
        for link in ["bin", "lib", "lib64", "sbin"] {
            symlink(Path::new("usr").join(link), root.join(link))?;
        }
        fs::copy("/etc/os-release", root.join("etc/os-release"))?;
        // Without one, systemd takes it for the first boot and enables all there is.
        let id = format!("{:032x}\n", fastrand::u128(1..));
        fs::write(root.join("etc/machine-id"), id)?;
        Ok(it)
    }

    /// The namespace that it is in.
    pub fn netns(&self) -> &NetNs {
        &self.netns
    }

    fn root(&self) -> PathBuf {
        self.directory.path().join("root")
    }

    /// Where this machine finds a file of it. /run is there while it is on.
    pub fn path(&self, path: &str) -> PathBuf {
        let path = path.trim_start_matches('/');
        match &self.power {
            Some(power) => Path::new(&format!("/proc/{}/root", power.init)).join(path),
            None if path.starts_with("usr/") => self.directory.path().join(path),
            None => self.root().join(path),
        }
    }

    /// Writes a file, and makes its directory.
    pub fn write(&self, path: &str, text: &str) -> Result<()> {
        let path = self.path(path);
        fs::create_dir_all(path.parent().context("no directory")?)?;
        fs::write(&path, text).with_context(|| path.display().to_string())
    }

    /// Switches it on; returns when systemd has no more to do.
    pub fn boot(&mut self) -> Result<()> {
        let name = self.netns.name();
        let groups = cgroups(name)?;
        let mut named = Vec::new();
        for group in &groups {
            fs::create_dir(group).with_context(|| group.display().to_string())?;
            named.push(group.display().to_string());
        }
        let usr = self.directory.path().join("usr");
        let log = fs::File::create(self.directory.path().join("console"))?;
        let mut command = Command::new("sh");
        command.args(["-c", IN_CGROUPS, "sh", &named.join(" ")]);
        command.args(["systemd-nspawn", "--quiet", "--register=no", "--keep-unit", "--boot"]);
        command.arg(format!("--directory={}", self.root().display()));
        command.arg(format!("--overlay=/usr:{}:/usr", usr.display()));
        command.args(SETTINGS.map(|path| format!("--bind-ro={path}")));
        command.arg(format!("--machine={name}"));
        command.arg(format!("--network-namespace-path=/run/netns/{name}"));
        command.args(["--capability=CAP_NET_ADMIN", "--resolv-conf=off", "--timezone=off"]);
        command.args(["--link-journal=no", "--console=pipe", "systemd.unit=basic.target"]);
        let command = command.stdin(Stdio::null()).stdout(log.try_clone()?).stderr(log);
        let nspawn = Killed(command.spawn().context("install systemd-container")?);
        let pid = nspawn.0.id();
        self.power = Some(Power { _nspawn: nspawn, init: 0 });
        let is_up = until("systemd is up", || {
            let children = fs::read_to_string(format!("/proc/{pid}/task/{pid}/children"))?;
            let init = children.split_whitespace().next().context("it has no process")?.parse()?;
            // Before that it is in none of its namespaces.
            ensure!(fs::read_to_string(format!("/proc/{init}/comm"))? == "systemd\n", "not yet");
            if let Some(power) = &mut self.power {
                power.init = init;
            }
            // "degraded" fails, and is told all the same.
            let state = self.shell("systemctl is-system-running || true")?;
            Ok(["running\n", "degraded\n"].contains(&state.as_str()))
        });
        let console = || fs::read_to_string(self.directory.path().join("console"));
        is_up.with_context(|| console().unwrap_or_default())
    }

    /// A command of the operator's shell, for [`output_of`] and the like.
    pub fn command(&self, commands: &str) -> Result<Command> {
        let power = self.power.as_ref().context("the host is off")?;
        let mut command = Command::new("nsenter");
        command.args(["--all", &format!("--target={}", power.init)]);
        command.args(["bash", "-e", "-u", "-o", "pipefail", "-c", commands]);
        command.env_clear().env("PATH", PATH);
        Ok(command)
    }

    /// Runs commands as the operator's shell does, and returns what they write to stdout.
    pub fn shell(&self, commands: &str) -> Result<String> {
        let output = output_of(&self.netns, &mut self.command(commands)?)?;
        let text = String::from_utf8_lossy(&output.stdout);
        let told = String::from_utf8_lossy(&output.stderr);
        ensure!(output.status.success(), "{commands}: {told}{text}");
        Ok(text.into_owned())
    }

    /// What systemd knows of a unit (systemctl(1), show).
    pub fn property(&self, unit: &str, name: &str) -> Result<String> {
        let value = self.shell(&format!("systemctl show --value --property={name} {unit}"))?;
        Ok(value.trim_end().to_owned())
    }

    /// What the journal has of a unit so far, systemd's messages about it among them, by further options of
    /// journalctl.
    pub fn journal(&self, unit: &str, options: &str) -> Result<String> {
        self.shell(&format!("journalctl --sync; journalctl --unit={unit} --no-pager {options}"))
    }

    /// Waits until a unit is in this state, such as "active".
    pub fn is(&self, unit: &str, state: &str) -> Result<()> {
        until(&format!("{unit} is {state}"), || Ok(self.property(unit, "ActiveState")? == state))
            .with_context(|| self.journal(unit, "--output=cat").unwrap_or_default())
    }

    /// Waits until a service says of itself what contains `text`.
    pub fn says(&self, unit: &str, text: &str) -> Result<()> {
        let said = || Ok(self.property(unit, "StatusText")?.contains(text));
        until(&format!("{unit} says {text:?}"), said)
            .with_context(|| self.journal(unit, "--output=cat").unwrap_or_default())
    }

    /// Cuts its power, and removes what nspawn then leaves behind.
    pub fn cut_power(&mut self) -> Result<()> {
        // systemd goes on without nspawn.
        drop(self.power.take());
        let name = self.netns.name();
        for group in cgroups(name)? {
            until("its processes are gone", || remove_tree(&group).map(|()| true))?;
        }
        let propagated = PathBuf::from(format!("/run/systemd/nspawn/propagate/{name}"));
        gone(fs::remove_dir(&propagated)).with_context(|| propagated.display().to_string())
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        if let Err(error) = self.cut_power() {
            eprintln!("{}: {error:#}", self.netns.name());
        }
    }
}

/// A control group of this name below our own, in each hierarchy that systemd uses (cgroups(7)).
fn cgroups(name: &str) -> Result<Vec<PathBuf>> {
    let ours = fs::read_to_string("/proc/self/cgroup")?;
    let groups = ours.lines().filter_map(|line| {
        let (_, rest) = line.split_once(':')?;
        let (controllers, path) = rest.split_once(':')?;
        let unified = Path::new("/sys/fs/cgroup/unified");
        let mount = match controllers {
            "name=systemd" => Path::new("/sys/fs/cgroup/systemd"),
            "" if unified.exists() => unified,
            "" => Path::new("/sys/fs/cgroup"),
            _ => return None,
        };
        Some(mount.join(path.trim_start_matches('/')).join(name))
    });
    Ok(groups.collect())
}

/// Ends the processes of a control group and of those in it, and removes it, unless one has yet to end.
fn remove_tree(group: &Path) -> Result<()> {
    let processes = fs::read_to_string(group.join("cgroup.procs")).unwrap_or_default();
    for process in processes.lines().filter_map(|line| Pid::from_raw(line.parse().ok()?)) {
        // Fails for one that has ended.
        let _ = kill_process(process, Signal::KILL);
    }
    match fs::read_dir(group) {
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(()),
        entries => {
            for entry in entries? {
                let entry = entry?;
                if entry.file_type()?.is_dir() {
                    remove_tree(&entry.path())?;
                }
            }
        }
    }
    gone(fs::remove_dir(group)).with_context(|| group.display().to_string())
}

/// It is as well if there is none.
fn gone(removed: std::io::Result<()>) -> Result<()> {
    match removed {
        Err(error) if error.kind() != ErrorKind::NotFound => Err(error.into()),
        Err(_) | Ok(()) => Ok(()),
    }
}
