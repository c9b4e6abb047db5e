//! Named network namespaces that we made ourselves, and work inside them.
//!
//! A namespace belongs to a thread, not to a process (setns(2)), so work runs on a fresh thread
//! that enters the namespace and ends with the work. Sockets and child processes made there stay
//! in the namespace wherever they are used later.

use std::fs::File;
use std::io::ErrorKind;
use std::os::unix::process::CommandExt;
use std::panic;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;

use anyhow::{Context, bail};
use nix::sched::{CloneFlags, setns};

/// Where ip-netns(8) keeps the names.
const NAMES: &str = "/run/netns";

/// A named network namespace, removed on drop.
#[derive(Debug)]
pub struct NetNs {
    name: String,
    /// False once the namespace is removed, or left to somebody else.
    ours: AtomicBool,
}

impl NetNs {
    /// Makes a namespace, as `ip netns add` does.
    ///
    /// # Errors
    /// The name is taken, privileges are missing, or iproute2 is not installed.
    pub fn create(name: impl Into<String>) -> anyhow::Result<Self> {
        let name = name.into();
        run_ip(&["netns", "add", &name])?;
        Ok(Self { name, ours: AtomicBool::new(true) })
    }

    /// A namespace that has its owner elsewhere.
    pub fn open(name: impl Into<String>) -> Self {
        Self { name: name.into(), ours: AtomicBool::new(false) }
    }

    /// The name, as `ip netns list` shows it.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Does `work` on a thread of its own inside the namespace and returns its value. A panic in
    /// `work` goes on in the caller.
    ///
    /// # Errors
    /// The namespace cannot be entered; `work` was not begun.
    pub fn run<T: Send>(&self, work: impl FnOnce() -> T + Send) -> anyhow::Result<T> {
        let path = path(&self.name);
        let entrance =
            File::open(&path).with_context(|| format!("cannot open {}", path.display()))?;
        let inside = || {
            setns(&entrance, CloneFlags::CLONE_NEWNET)?;
            Ok::<T, nix::Error>(work())
        };
        thread::scope(|scope| scope.spawn(inside).join())
            .unwrap_or_else(|panicked| panic::resume_unwind(panicked))
            .with_context(|| format!("cannot enter the network namespace {}", self.name))
    }

    /// Starts `command` inside the namespace. The process is the program itself, not a wrapper.
    ///
    /// # Errors
    /// The namespace cannot be entered or the program cannot be started.
    pub fn spawn(&self, command: &mut Command) -> anyhow::Result<Child> {
        let program = command.get_program().to_string_lossy().into_owned();
        self.run(|| command.spawn())?
            .with_context(|| format!("cannot start {program} in the namespace {}", self.name))
    }

    /// Runs `command` inside the namespace to its end and returns what it wrote.
    ///
    /// # Errors
    /// As [`NetNs::spawn`]; the program's own exit status is left to the caller.
    pub fn output(&self, command: &mut Command) -> anyhow::Result<Output> {
        let program = command.get_program().to_string_lossy().into_owned();
        self.run(|| command.output())?
            .with_context(|| format!("cannot run {program} in the namespace {}", self.name))
    }

    /// Runs a program inside the namespace to its end and returns what it wrote to stdout.
    ///
    /// # Errors
    /// It cannot be started, or failed; the command line and what it wrote to stderr are told.
    pub fn tool(&self, program: &str, arguments: &[&str]) -> anyhow::Result<String> {
        let output = self.output(Command::new(program).args(arguments))?;
        if !output.status.success() {
            let told = String::from_utf8_lossy(&output.stderr);
            bail!("`{program} {}` in {}: {}", arguments.join(" "), self.name, told.trim());
        }
        String::from_utf8(output.stdout).with_context(|| format!("{program} wrote no text"))
    }

    /// Runs `ip -n <name> <arguments>`.
    ///
    /// # Errors
    /// With the command line and what it wrote to stderr.
    pub fn ip(&self, arguments: &[&str]) -> anyhow::Result<()> {
        run_ip(&[&["-n", &self.name], arguments].concat()).map(drop)
    }

    /// Runs `ip -n <name> -json <arguments>` and parses the answer.
    ///
    /// # Errors
    /// As [`NetNs::ip`].
    pub fn ip_json(&self, arguments: &[&str]) -> anyhow::Result<serde_json::Value> {
        let line = [&["-n", &self.name, "-json"], arguments].concat();
        let output = run_ip(&line)?;
        // Some commands write nothing at all where the list is empty.
        let text = if output.is_empty() { b"[]" } else { output.as_slice() };
        serde_json::from_slice(text)
            .with_context(|| format!("`ip {}` wrote no JSON", line.join(" ")))
    }

    /// Removes the namespace now, unless it is removed or left already.
    ///
    /// # Errors
    /// The name is gone without our doing, or cannot be removed.
    pub fn remove(&self) -> anyhow::Result<()> {
        if self.ours.swap(false, Ordering::Relaxed) { delete(&self.name) } else { Ok(()) }
    }

    /// Lets the namespace live on after the drop.
    pub fn leave(&self) {
        self.ours.store(false, Ordering::Relaxed);
    }
}

impl Drop for NetNs {
    fn drop(&mut self) {
        if let Err(error) = self.remove() {
            eprintln!("{error:#}");
        }
    }
}

/// Whether a network namespace has this name.
pub(crate) fn exists(name: &str) -> bool {
    path(name).exists()
}

/// Removes the name. Devices and routes go when the last process inside has ended.
pub(crate) fn delete(name: &str) -> anyhow::Result<()> {
    run_ip(&["netns", "delete", name]).map(drop)
}

/// Keeps a command's process out of the terminal's reach: Ctrl-C is answered by us, in order, and
/// must not end a child in the middle of something.
pub(crate) fn apart(command: &mut Command) -> &mut Command {
    command.process_group(0).stdin(Stdio::null()).env("LC_ALL", "C")
}

fn path(name: &str) -> PathBuf {
    Path::new(NAMES).join(name)
}

fn run_ip(arguments: &[&str]) -> anyhow::Result<Vec<u8>> {
    let line = || format!("ip {}", arguments.join(" "));
    let output = match apart(&mut Command::new("ip")).args(arguments).output() {
        Err(error) if error.kind() == ErrorKind::NotFound => {
            bail!("the program `ip` is missing; install iproute2")
        }
        outcome => outcome.with_context(|| format!("cannot run `{}`", line()))?,
    };
    if !output.status.success() {
        let reason = String::from_utf8_lossy(&output.stderr);
        bail!("`{}` failed ({}): {}", line(), output.status, reason.trim());
    }
    Ok(output.stdout)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What tunnel modules, once loaded, make in every namespace.
    const FALLBACK_TUNNELS: [&str; 9] = [
        "tunl0", "gre0", "gretap0", "erspan0", "sit0", "ip6tnl0", "ip6gre0", "ip_vti0", "ip6_vti0",
    ];

    fn scratch() -> NetNs {
        let name = format!("weft-test-{:08x}", fastrand::u32(..));
        NetNs::create(name).expect("needs root and iproute2")
    }

    #[test]
    fn work_inside_sees_only_loopback() {
        let netns = scratch();
        let links = netns.run(|| std::fs::read_to_string("/proc/thread-self/net/dev")).unwrap();
        let links: Vec<_> = links
            .unwrap()
            .lines()
            .filter_map(|line| line.split_once(':').map(|(name, _)| name.trim().to_owned()))
            .filter(|name| !FALLBACK_TUNNELS.contains(&name.as_str()))
            .collect();
        assert_eq!(links, ["lo"]);
    }

    #[test]
    fn a_namespace_ends_with_its_owner() {
        let netns = scratch();
        let name = netns.name().to_owned();
        assert!(exists(&name));
        drop(netns);
        assert!(!exists(&name));
    }

    #[test]
    fn a_child_runs_inside_under_its_own_pid() {
        let netns = scratch();
        let outside = std::fs::read_link("/proc/self/ns/net").unwrap();
        let mut child = netns.spawn(Command::new("sleep").arg("60")).unwrap();
        let inside = std::fs::read_link(format!("/proc/{}/ns/net", child.id()));
        let program = std::fs::read_to_string(format!("/proc/{}/comm", child.id()));
        child.kill().unwrap();
        child.wait().unwrap();
        assert_ne!(inside.unwrap(), outside);
        assert_eq!(program.unwrap().trim(), "sleep");
    }

    #[test]
    fn a_failure_of_ip_names_command_and_reason() {
        let netns = scratch();
        let error = netns.ip(&["link", "set", "nosuch", "up"]).unwrap_err().to_string();
        assert!(error.contains("link set nosuch up"), "{error}");
        assert!(error.contains("Cannot find device"), "{error}");
        assert_eq!(netns.ip_json(&["route"]).unwrap(), serde_json::json!([]));
    }

    #[test]
    fn a_panic_inside_reaches_the_caller() {
        let netns = scratch();
        let caught = panic::catch_unwind(|| netns.run(|| panic!("from inside")));
        assert_eq!(caught.unwrap_err().downcast_ref::<&str>(), Some(&"from inside"));
    }
}
