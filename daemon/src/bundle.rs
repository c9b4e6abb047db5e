//! `weft support-bundle`: what somebody far away needs to know of this host, in one archive without
//! secrets.

use std::collections::BTreeSet;
use std::fs::{self, File};
use std::io::{self, Write};
use std::path::{Component, Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, bail};
use clap::Args;
use flate2::Compression;
use flate2::write::GzEncoder;
use jiff::Timestamp;
use regex::bytes::{NoExpand, Regex};

use crate::directories::Directories;
use crate::made::Made;
use crate::node::{self, RUN_FILES, STATE_FILES};
use crate::socket::{self, Answered, Request};
use crate::status::Status;
use crate::status_command;

/// What stands in place of a secret.
const STRIPPED: &str = "[stripped]";
/// A shorter secret would be found in every other word of a text.
const SECRET_LEN_MIN: usize = 4;
/// Flags and variables that hold a secret, or name a file that does.
const SECRET_FLAG: &str = "etcd-password";
const SECRET_FILE_FLAG: &str = "etcd-password-file";

/// The kernel's state, and how to ask for it.
const COMMANDS: [(&str, &str); 18] = [
    ("kernel/uname", "uname -a"),
    ("kernel/addresses", "ip -details -statistics address show"),
    ("kernel/rules", "ip rule show"),
    ("kernel/routes", "ip route show table all"),
    ("kernel/routes-ipv6", "ip -6 route show table all"),
    ("kernel/neighbours", "ip neighbour show"),
    ("kernel/forwarding-database", "bridge fdb show"),
    ("kernel/sockets", "ss --udp --tcp --all --numeric --processes --memory"),
    ("kernel/counters", "nstat --zeros --ignore --noupdate --json"),
    (
        "kernel/sysctl",
        "sysctl net.ipv4 net.ipv6.conf.all net.bridge net.core kernel.io_uring_disabled",
    ),
    ("kernel/modules", "lsmod"),
    ("kernel/conntrack", "sysctl net.netfilter"),
    ("firewall/nft", "nft --stateless list ruleset"),
    ("firewall/iptables", "iptables-save --counters"),
    ("firewall/ip6tables", "ip6tables-save --counters"),
    ("kernel/messages", "dmesg --time-format iso --level err,warn"),
    // By flannel's name where weftd is in its place.
    (
        "log/journal",
        "journalctl --unit weftd --unit flanneld --lines 2000 --no-pager --output short-iso-precise",
    ),
    ("log/journal-docker", "journalctl --unit docker --lines 200 --no-pager --output short-iso"),
];

/// Collect what there is to know of this host's daemons, network and kernel in one archive, without
/// passwords and keys.
#[derive(Debug, Args)]
pub struct BundleArgs {
    /// The archive to write, which must not exist yet [default: weft-HOST-TIME.tar.gz here].
    #[arg(value_name = "FILE")]
    file: Option<PathBuf>,
}

/// Writes the archive, and says where it is. What cannot be had is missing in it, with the reason.
///
/// # Errors
/// The archive cannot be written.
pub fn run(
    arguments: &BundleArgs,
    directories: &Directories,
    out: &mut dyn Write,
) -> anyhow::Result<()> {
    let time = Timestamp::now().strftime("%Y%m%dT%H%M%SZ").to_string();
    let name = format!("weft-{}-{time}", node::host_name());
    let path = arguments.file.clone().unwrap_or_else(|| format!("{name}.tar.gz").into());
    let daemons = ask(directories);
    let bundle = match Bundle::create(&path, name, secrets(&daemons)) {
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {
            bail!("{} is there already; remove it, or name another file", path.display())
        }
        bundle => bundle.with_context(|| format!("cannot write {}", path.display()))?,
    };
    if let Err(error) = bundle.fill(directories, &daemons) {
        // Half of it would be in the way of the next one.
        let _ = fs::remove_file(&path);
        return Err(error).with_context(|| format!("cannot write {}", path.display()));
    }
    Ok(writeln!(out, "wrote {}", path.display())?)
}

/// Asks each daemon, once: whose secrets are not known must not be written about.
fn ask(directories: &Directories) -> Vec<Answered<Status>> {
    let sockets = socket::sockets(&directories.run_dir).unwrap_or_default();
    let asked = sockets.into_iter().map(|socket| {
        let status = socket::ask(&socket, &Request::Status);
        (socket, status)
    });
    asked.collect()
}

/// An archive that is being written.
struct Bundle {
    archive: tar::Builder<GzEncoder<File>>,
    /// The directory that all of it is in.
    name: String,
    secrets: BTreeSet<Vec<u8>>,
    /// What URLs have before the host.
    user_in_url: Regex,
    /// What flannel logs at its start, which the journal still has after a migration.
    flannels_password: Regex,
}

impl Bundle {
    fn create(path: &Path, name: String, secrets: BTreeSet<Vec<u8>>) -> io::Result<Self> {
        // Without secrets it still tells much; it is the owner's to hand on. A file that is there
        // would keep the mode that it has.
        let mut options = File::options();
        std::os::unix::fs::OpenOptionsExt::mode(&mut options, 0o600);
        let file = options.write(true).create_new(true).open(path)?;
        let archive = tar::Builder::new(GzEncoder::new(file, Compression::default()));
        let regex = |pattern| Regex::new(pattern).map_err(io::Error::other);
        let user_in_url = regex("://[^/@\\s\"']+@")?;
        // It may hold anything but the end of a line.
        let flannels_password = regex("etcdPassword:[^\\n]*")?;
        Ok(Self { archive, name, secrets, user_in_url, flannels_password })
    }

    fn fill(mut self, directories: &Directories, daemons: &[Answered<Status>]) -> io::Result<()> {
        self.daemons(daemons)?;
        for (name, line) in COMMANDS {
            let mut words = line.split_whitespace();
            let mut command = Command::new(words.next().unwrap_or_default());
            let mut output = output_of(line, command.args(words));
            if line.starts_with("sysctl ") {
                output = without_keys(&output);
            }
            self.add(name, &output)?;
        }
        let mut doctor = Command::new(std::env::current_exe()?);
        doctor.arg("doctor").arg("--run-dir").arg(&directories.run_dir);
        doctor.arg("--state-dir").arg(&directories.state_dir);
        self.add("doctor", &output_of("weft doctor", &mut doctor))?;
        self.directory(&directories.state_dir, &STATE_FILES)?;
        self.directory(&directories.run_dir, &[RUN_FILES])?;
        let subnet_files = Made::read_all(&directories.state_dir).unwrap_or_default();
        let subnet_files = subnet_files.into_iter().map(|made| made.subnet_file);
        let others = ["/run/flannel/subnet.env", "/etc/os-release", "/proc/net/softnet_stat"];
        let paths: BTreeSet<PathBuf> = subnet_files.chain(others.map(PathBuf::from)).collect();
        for path in &paths {
            self.file(&name_of(path), path)?;
        }
        self.archive.into_inner()?.finish()?.sync_all()
    }

    /// What each daemon says of itself, and was started with.
    fn daemons(&mut self, daemons: &[Answered<Status>]) -> io::Result<()> {
        for (number, (socket, status)) in daemons.iter().enumerate() {
            let name = format!("daemon-{}", number + 1);
            let status = match status {
                Ok(status) => status,
                Err(error) => {
                    self.add(&format!("{name}/unreachable"), format!("{error:#}\n").as_bytes())?;
                    continue;
                }
            };
            let json = serde_json::to_vec_pretty(status)?;
            self.add(&format!("{name}/status.json"), &json)?;
            let mut text = Vec::new();
            status_command::write_text(status, Timestamp::now(), &mut text)?;
            self.add(&format!("{name}/status"), &text)?;
            let metrics = socket::ask::<String>(socket, &Request::Metrics);
            let metrics = metrics.unwrap_or_else(|error| format!("{error:#}\n"));
            self.add(&format!("{name}/metrics"), metrics.as_bytes())?;
            let Some(process) = process_of(socket) else { continue };
            let words = fs::read(process.join("cmdline")).unwrap_or_default();
            self.add(&format!("{name}/process-cmdline"), &without_values(&words))?;
            for part in ["limits", "status", "cgroup"] {
                self.file(&format!("{name}/process-{part}"), &process.join(part))?;
            }
        }
        Ok(())
    }

    /// Weft's own files in a directory, by what their names begin with: others may be keys.
    fn directory(&mut self, path: &Path, ours: &[&str]) -> io::Result<()> {
        let Ok(entries) = fs::read_dir(path) else { return Ok(()) };
        for entry in entries.filter_map(Result::ok) {
            let name = entry.file_name();
            let is_ours = ours.iter().any(|start| name.to_string_lossy().starts_with(start));
            if is_ours && entry.file_type()?.is_file() {
                self.file(&name_of(&entry.path()), &entry.path())?;
            }
        }
        Ok(())
    }

    fn file(&mut self, name: &str, path: &Path) -> io::Result<()> {
        match fs::read(path) {
            Ok(bytes) => self.add(name, &bytes),
            Err(error) => self.add(&format!("{name}.missing"), format!("{error}\n").as_bytes()),
        }
    }

    fn add(&mut self, name: &str, bytes: &[u8]) -> io::Result<()> {
        let bytes = self.strip(bytes);
        let mut header = tar::Header::new_gnu();
        header.set_size(bytes.len() as u64);
        header.set_mode(0o644);
        header.set_mtime(u64::try_from(Timestamp::now().as_second()).unwrap_or_default());
        self.archive.append_data(&mut header, format!("{}/{name}", self.name), &*bytes)
    }

    /// Takes out every secret, wherever it stands.
    fn strip(&self, bytes: &[u8]) -> Vec<u8> {
        let with = format!("://{STRIPPED}@");
        let bytes = self.user_in_url.replace_all(bytes, NoExpand(with.as_bytes()));
        let with = format!("etcdPassword:{STRIPPED}");
        let bytes = self.flannels_password.replace_all(&bytes, NoExpand(with.as_bytes()));
        let mut bytes = bytes.into_owned();
        // The longest first: one may be part of another.
        let mut secrets: Vec<&Vec<u8>> = self.secrets.iter().collect();
        secrets.sort_by_key(|secret| std::cmp::Reverse(secret.len()));
        for secret in secrets {
            bytes = replace(&bytes, secret, STRIPPED.as_bytes());
        }
        bytes
    }
}

/// A path as archives may have it: below where they are unpacked.
fn name_of(path: &Path) -> String {
    let parts = path.components().filter(|part| matches!(part, Component::Normal(_)));
    parts.collect::<PathBuf>().to_string_lossy().into_owned()
}

fn replace(bytes: &[u8], what: &[u8], with: &[u8]) -> Vec<u8> {
    let mut out = Vec::with_capacity(bytes.len());
    let mut rest = bytes;
    while let Some(at) = rest.windows(what.len()).position(|window| window == what) {
        out.extend_from_slice(&rest[..at]);
        out.extend_from_slice(with);
        rest = &rest[at + what.len()..];
    }
    out.extend_from_slice(rest);
    out
}

/// What a command writes, or why it cannot be had.
fn output_of(line: &str, command: &mut Command) -> Vec<u8> {
    let mut text = format!("$ {line}\n").into_bytes();
    match command.stdin(Stdio::null()).output() {
        Ok(output) => {
            text.extend(output.stdout);
            text.extend(output.stderr);
        }
        Err(error) => text.extend(format!("{error}\n").into_bytes()),
    }
    text
}

/// What sysctl writes, but for the lines of keys: that of TCP Fast Open, say.
fn without_keys(output: &[u8]) -> Vec<u8> {
    let output = String::from_utf8_lossy(output);
    let is_key = |line: &&str| {
        let name = line.split('=').next().unwrap_or_default();
        name.contains("key") || name.contains("secret")
    };
    output.split_inclusive('\n').filter(|line| !is_key(line)).collect::<String>().into_bytes()
}

/// A command line without the passwords in it, however short they are.
fn without_values(cmdline: &[u8]) -> Vec<u8> {
    let words: Vec<&[u8]> = cmdline.split(|byte| *byte == 0).collect();
    let mut shown: Vec<Vec<u8>> = words.iter().map(|word| word.to_vec()).collect();
    for (word, at) in places(&words, SECRET_FLAG) {
        shown[word].truncate(at);
        shown[word].extend(STRIPPED.as_bytes());
    }
    shown.join(&0)
}

/// The process of the daemon behind a socket, in /proc.
fn process_of(socket: &Path) -> Option<PathBuf> {
    let pid = socket::listener(socket).ok().flatten()?;
    Some(PathBuf::from(format!("/proc/{pid}")))
}

/// The passwords that these daemons were given: by a flag, a variable or a file.
fn secrets(daemons: &[Answered<Status>]) -> BTreeSet<Vec<u8>> {
    let mut found = BTreeSet::new();
    for process in daemons.iter().filter_map(|(socket, _)| process_of(socket)) {
        let read = |part: &str| fs::read(process.join(part)).unwrap_or_default();
        let words = [read("cmdline"), read("environ")].concat();
        let words: Vec<&[u8]> = words.split(|byte| *byte == 0).collect();
        found.extend(values(&words, SECRET_FLAG));
        for path in values(&words, SECRET_FILE_FLAG) {
            let text = fs::read(String::from_utf8_lossy(&path).as_ref()).unwrap_or_default();
            found.insert(text.trim_ascii().to_owned());
        }
    }
    found.retain(|secret| secret.len() >= SECRET_LEN_MIN);
    found
}

/// The values that a flag is given.
fn values(words: &[&[u8]], flag: &str) -> Vec<Vec<u8>> {
    places(words, flag).into_iter().map(|(word, at)| words[word][at..].to_vec()).collect()
}

/// Where the values stand that `--flag value`, `-flag=value` and `FLANNELD_FLAG=value` give: in which
/// word, and from which byte on.
fn places(words: &[&[u8]], flag: &str) -> Vec<(usize, usize)> {
    let variable = flag.to_uppercase().replace('-', "_");
    let mut places = Vec::new();
    for (number, word) in words.iter().enumerate() {
        let mut parts = word.splitn(2, |byte| *byte == b'=');
        let (name, value) = (parts.next().unwrap_or_default(), parts.next());
        let start = name.len() + 1;
        let name = String::from_utf8_lossy(name);
        let is_flag = name.starts_with('-') && name.trim_start_matches('-') == flag;
        let is_variable = ["FLANNELD_", "WEFT_"]
            .iter()
            .any(|it| name.strip_prefix(it) == Some(variable.as_str()));
        match value {
            Some(_) if is_flag || is_variable => places.push((number, start)),
            None if is_flag && number + 1 < words.len() => places.push((number + 1, 0)),
            _ => {}
        }
    }
    places
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn secrets_are_found_however_they_are_given() {
        let words: [&[u8]; 6] = [
            b"weftd",
            b"--etcd-password",
            b"one two",
            b"-etcd-password=three=",
            b"FLANNELD_ETCD_PASSWORD=four",
            b"--etcd-password-file=/etc/five",
        ];
        let found: [&[u8]; 3] = [b"one two", b"three=", b"four"];
        assert_eq!(values(&words, SECRET_FLAG), found);
        assert_eq!(values(&words, SECRET_FILE_FLAG), [b"/etc/five"]);
    }

    #[test]
    fn a_command_line_is_shown_without_passwords() {
        let words = b"weftd\0--etcd-password\0p\0-etcd-password=pw\0--etcd-username=p\0";
        let shown =
            b"weftd\0--etcd-password\0[stripped]\0-etcd-password=[stripped]\0--etcd-username=p\0";
        assert_eq!(without_values(words), shown);
        assert_eq!(without_values(b"weftd\0--etcd-password"), b"weftd\0--etcd-password");
    }

    #[test]
    fn keys_of_the_kernel_are_left_out() {
        let told = b"$ sysctl net\nnet.ipv4.tcp_fastopen_key = 1\nnet.ipv4.ip_forward = 1\n\
                     net.ipv6.conf.all.stable_secret = fe80::1\n";
        assert_eq!(without_keys(told), b"$ sysctl net\nnet.ipv4.ip_forward = 1\n");
    }

    #[test]
    fn every_occurrence_goes() {
        let directory = tempfile::tempdir().unwrap();
        let secrets = [b"hunter".to_vec(), b"hunter2".to_vec()].into();
        let bundle = Bundle::create(&directory.path().join("a"), "a".into(), secrets).unwrap();
        let text = b"a hunter2, hunterhunter; https://me:pw@192.0.2.1:2379/x http://192.0.2.1/\n\
                     CLI flags config: {etcdUsername:u etcdPassword:a b version:false}\nc";
        let stripped = String::from_utf8(bundle.strip(text)).unwrap();
        let wanted = "a [stripped], [stripped][stripped]; https://[stripped]@192.0.2.1:2379/x \
                      http://192.0.2.1/\n\
                      CLI flags config: {etcdUsername:u etcdPassword:[stripped]\nc";
        assert_eq!(stripped, wanted);
    }
}
