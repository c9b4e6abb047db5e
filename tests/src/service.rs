//! What systemd does for one service, as far as the units of this project ask for it
//! (systemd.service(5), systemd.exec(5), sd_notify(3)).

use std::fs::{self, File};
use std::io::ErrorKind;
use std::os::unix::net::UnixDatagram;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitStatus};

use anyhow::{Context, Result, ensure};
use rustix::process::Signal;
use tempfile::TempDir;
use weft_daemon::netns::NetNs;

use crate::{Killed, end, until};

/// What systemd gives to services.
const PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// What a unit file says of its service.
#[derive(Debug, Clone, Default)]
pub struct Unit {
    exec_start: String,
    environment_file: Option<String>,
    watchdog_seconds: Option<u64>,
    /// What it may do; everything, if that is not said.
    capabilities: Option<String>,
    group: Option<String>,
}

impl Unit {
    /// Reads a unit file.
    pub fn parse(text: &str) -> Result<Self> {
        let text = text.replace("\\\n", " ");
        let value = |key: &str| {
            let mut lines = text.lines().filter_map(|line| line.split_once('='));
            lines.find_map(|(name, value)| (name == key).then(|| value.trim().to_owned()))
        };
        ensure!(value("Type").as_deref() == Some("notify"), "it is not of Type=notify");
        Ok(Self {
            exec_start: value("ExecStart").context("it has no ExecStart=")?,
            environment_file: value("EnvironmentFile"),
            watchdog_seconds: value("WatchdogSec").map(|text| text.parse()).transpose()?,
            capabilities: value("CapabilityBoundingSet"),
            group: value("Group"),
        })
    }

    /// Its command, in its group and with its capabilities.
    fn words(&self, variables: &[(String, String)]) -> Vec<String> {
        let mut words = vec!["setpriv".to_owned()];
        if let Some(capabilities) = &self.capabilities {
            let kept = capabilities.to_lowercase().replace("cap_", "+").replace(' ', ",");
            words.push(format!("--bounding-set=-all,{kept}"));
        }
        if let Some(group) = &self.group {
            words.extend([format!("--regid={group}"), "--keep-groups".into()]);
        }
        words.extend(expand(&self.exec_start, variables));
        words
    }

    /// The variables of its EnvironmentFile, which lies below `root`.
    fn variables(&self, root: &Path) -> Result<Vec<(String, String)>> {
        let Some(file) = &self.environment_file else { return Ok(Vec::new()) };
        let may_lack = file.starts_with('-');
        let path = root.join(file.trim_start_matches(['-', '/']));
        let text = match fs::read_to_string(&path) {
            Err(error) if error.kind() == ErrorKind::NotFound && may_lack => String::new(),
            text => text.with_context(|| format!("EnvironmentFile={}", path.display()))?,
        };
        let lines = text.lines().filter(|line| !line.starts_with('#'));
        let pairs = lines.filter_map(|line| line.split_once('='));
        Ok(pairs
            .map(|(name, value)| (name.to_owned(), value.trim().trim_matches('"').to_owned()))
            .collect())
    }
}

/// Expands `${X}` within a word, and `$X` that is a word into as many words as there are in it. What
/// is not set becomes an empty word, or none.
fn expand(line: &str, variables: &[(String, String)]) -> Vec<String> {
    let value = |name: &str| {
        let found = variables.iter().rfind(|(known, _)| known == name);
        found.map(|(_, value)| value.as_str()).unwrap_or_default()
    };
    let mut words = Vec::new();
    for word in line.split_whitespace() {
        match word.strip_prefix('$').filter(|name| !name.starts_with('{')) {
            Some(name) => words.extend(value(name).split_whitespace().map(str::to_owned)),
            None => {
                let mut expanded = String::new();
                let mut rest = word;
                while let Some((before, name, after)) =
                    rest.split_once("${").and_then(|(before, rest)| {
                        rest.split_once('}').map(|(name, after)| (before, name, after))
                    })
                {
                    expanded += before;
                    expanded += value(name);
                    rest = after;
                }
                words.push(expanded + rest);
            }
        }
    }
    words
}

/// A service that runs. Dropped, it is killed.
#[derive(Debug)]
pub struct Service {
    child: Killed,
    socket: UnixDatagram,
    heard: Vec<String>,
    log: PathBuf,
    _directory: TempDir,
}

impl Service {
    /// Starts it in a namespace. `root` is what it takes for the root of the file system as far as
    /// [`enter`] goes; `more` variables come on top of its own.
    pub fn start(
        netns: &NetNs,
        unit: &Unit,
        root: &Path,
        more: &[(&str, &str)],
        log: &Path,
    ) -> Result<Self> {
        let directory = tempfile::tempdir()?;
        let path = directory.path().join("notify");
        let socket = UnixDatagram::bind(&path)?;
        socket.set_nonblocking(true)?;
        let mut variables = unit.variables(root)?;
        variables.extend(more.iter().map(|(name, value)| ((*name).into(), (*value).into())));
        let mut command = enter(root, &unit.words(&variables));
        command.env_clear().env("PATH", PATH).envs(variables).env("NOTIFY_SOCKET", &path);
        let micros = unit.watchdog_seconds.map(|seconds| (seconds * 1_000_000).to_string());
        command.envs(micros.map(|micros| ("WATCHDOG_USEC", micros)));
        let output = File::create(log)?;
        let child = netns.spawn(command.stdout(output.try_clone()?).stderr(output))?;
        let (heard, log) = (Vec::new(), log.to_owned());
        Ok(Self { child: Killed(child), socket, heard, log, _directory: directory })
    }

    /// Every line that it has sent so far.
    pub fn heard(&mut self) -> Result<&[String]> {
        let mut message = [0; 4096];
        loop {
            match self.socket.recv(&mut message) {
                Ok(len) => {
                    let text = String::from_utf8_lossy(&message[..len]);
                    self.heard.extend(text.lines().map(str::to_owned));
                }
                Err(error) if error.kind() == ErrorKind::WouldBlock => return Ok(&self.heard),
                Err(error) => return Err(error.into()),
            }
        }
    }

    /// Whether it has said that it is ready.
    pub fn is_ready(&mut self) -> Result<bool> {
        Ok(self.heard()?.iter().any(|line| line == "READY=1"))
    }

    /// Waits until it sends a line that contains `text`.
    pub fn says(&mut self, text: &str) -> Result<()> {
        let said = until(&format!("it says {text:?}"), || {
            Ok(self.heard()?.iter().any(|line| line.contains(text)))
        });
        said.with_context(|| self.log())
    }

    /// What it has written.
    pub fn log(&self) -> String {
        fs::read_to_string(&self.log).unwrap_or_default()
    }

    /// Ends it by SIGTERM.
    pub fn stop(&mut self) -> Result<ExitStatus> {
        end(&mut self.child.0, Signal::TERM)
    }
}

/// The parts of a file system that `root` has its own of.
const OWN: [&str; 4] = ["/opt", "/run", "/usr/local/bin", "/var/lib"];

/// The host's groups.
const GROUPS: &str = "/etc/group";

/// Makes a directory of what [`enter`] puts in place.
pub fn make_root(root: &Path) -> Result<()> {
    for path in OWN {
        fs::create_dir_all(root.join(path.trim_start_matches('/')))?;
    }
    Ok(())
}

/// A command in a mount namespace of its own, where `root` is in place of some directories, and of
/// the list of groups if it has one.
pub fn enter(root: &Path, words: &[String]) -> Command {
    let mut script = String::from("set -e\n");
    for path in OWN {
        script += &format!("mount --bind '{}{path}' {path}\n", root.display());
    }
    let groups = root.join(GROUPS.trim_start_matches('/'));
    if groups.exists() {
        script += &format!("mount --bind '{}' {GROUPS}\n", groups.display());
    }
    script += "exec \"$@\"\n";
    let mut command = Command::new("unshare");
    command.args(["--mount", "sh", "-c", &script, "sh"]).args(words);
    command
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn variables_are_expanded_as_systemd_does() {
        let variables = [("A", "one two"), ("B", "3")].map(|(a, b)| (a.into(), b.into()));
        let words = expand("x ${A} $A -b=${B}${C} ${C} $C", &variables);
        assert_eq!(words, ["x", "one two", "one", "two", "-b=3", ""]);
    }
}
