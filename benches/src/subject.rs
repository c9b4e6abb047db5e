//! Who carries the packets: weft, what it is compared with, and how each is set up.

use std::fs::{self, File};
use std::net::{IpAddr, SocketAddr, UdpSocket};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use serde::{Deserialize, Serialize};
use tempfile::TempDir;
use weft_daemon::lab::{self, PingOptions};
use weft_daemon::netns::NetNs;
use weft_daemon::status;

use crate::cpu;
use crate::is_installed;
use crate::topology::{
    Mode, SCATTERED, Topology, WIRE_MTU, inner, outer, scattered, scattered_network, subnet,
};

/// How long a subject may take until packets pass.
const READY: Duration = Duration::from_secs(15);
/// flannel's port, which weft and the forwarders listen on.
pub const PORT: u16 = 8285;
/// Where files live in memory, on most systems: 65,000 leases on a disk take many seconds.
const IN_MEMORY: &str = "/dev/shm";
/// VXLAN's headers over IPv4 (RFC 7348).
const VXLAN_OVERHEAD: u16 = 50;
/// What a fleet of flannel's largest size has: a /24 each, in a /8.
const MANY_ROUTES: u32 = 65_000;
/// IPv4 and UDP headers.
const UDP_OVERHEAD: u16 = 28;

/// One of them.
#[derive(
    Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize, clap::ValueEnum,
)]
#[serde(rename_all = "kebab-case")]
pub enum Subject {
    /// Plain routing, as flannel's host-gw.
    HostGw,
    /// The kernel's VXLAN, as flannel sets it up.
    Vxlan,
    /// The same by weft's host-gw: what it makes of the kernel must cost nothing more.
    WeftHostGw,
    /// The same by weft's vxlan.
    WeftVxlan,
    /// weft's udp-tun on io_uring.
    WeftUring,
    /// weft's udp-tun without io_uring.
    WeftMmsg,
    /// weft's udp-tun, busy polling, for round trips.
    WeftBusy,
    /// weft's udp-tun on io_uring, for random destinations: one route to all of them.
    WeftOneRoute,
    /// The same destinations behind 65,000 routes.
    WeftManyRoutes,
    /// One packet a call, as flannel's udp.
    Naive,
    /// The same job on tokio-uring, with the same offloads.
    TokioUring,
    /// fastd without cipher.
    Fastd,
    /// tinc without cipher.
    Tinc,
}

impl Subject {
    pub const ALL: [Self; 13] = [
        Self::HostGw,
        Self::Vxlan,
        Self::WeftHostGw,
        Self::WeftVxlan,
        Self::WeftUring,
        Self::WeftMmsg,
        Self::WeftBusy,
        Self::WeftOneRoute,
        Self::WeftManyRoutes,
        Self::Naive,
        Self::TokioUring,
        Self::Fastd,
        Self::Tinc,
    ];

    pub const fn name(self) -> &'static str {
        match self {
            Self::HostGw => "host-gw",
            Self::Vxlan => "vxlan",
            Self::WeftHostGw => "weft-host-gw",
            Self::WeftVxlan => "weft-vxlan",
            Self::WeftUring => "weft-uring",
            Self::WeftMmsg => "weft-mmsg",
            Self::WeftBusy => "weft-busy",
            Self::WeftOneRoute => "weft-one-route",
            Self::WeftManyRoutes => "weft-many-routes",
            Self::Naive => "naive",
            Self::TokioUring => "tokio-uring",
            Self::Fastd => "fastd",
            Self::Tinc => "tinc",
        }
    }

    /// The program that must be installed, where it is not ours.
    fn program(self) -> Option<&'static str> {
        match self {
            Self::Fastd => Some("fastd"),
            Self::Tinc => Some("tincd"),
            Self::HostGw
            | Self::Vxlan
            | Self::WeftHostGw
            | Self::WeftVxlan
            | Self::WeftUring
            | Self::WeftMmsg
            | Self::WeftBusy
            | Self::WeftOneRoute
            | Self::WeftManyRoutes
            | Self::Naive
            | Self::TokioUring => None,
        }
    }

    /// Whether we answer for it.
    pub fn is_ours(self) -> bool {
        self.program().is_none()
    }

    /// Whether it can be measured here.
    pub fn is_installed(self) -> bool {
        self.program().is_none_or(is_installed)
    }

    /// Whether it is there for random destinations only. Routes are looked up alike in all modes,
    /// so one is enough.
    pub fn is_scattered(self) -> bool {
        matches!(self, Self::WeftOneRoute | Self::WeftManyRoutes)
    }

    /// Whether there is anything to measure in a mode.
    pub fn is_for(self, mode: Mode) -> bool {
        mode == Mode::Wire || !self.is_scattered()
    }

    /// Sets it up on both hosts, and waits until packets pass.
    ///
    /// # Errors
    /// With what the subject's processes have logged.
    pub fn start(self, net: &Topology) -> anyhow::Result<Running<'_>> {
        let mut running = Running::new(net)?;
        let mtu = match self {
            Self::HostGw => running.host_gw()?,
            Self::Vxlan => running.vxlan()?,
            Self::WeftHostGw => {
                running.weft_in_kernel("host-gw", "route flush proto 119")?;
                WIRE_MTU
            }
            Self::WeftVxlan => {
                running.weft_in_kernel("vxlan", "link del flannel.1")?;
                WIRE_MTU - VXLAN_OVERHEAD
            }
            Self::WeftUring => running.weft(&["--io=uring"])?,
            Self::WeftMmsg => running.weft(&["--io=mmsg"])?,
            Self::WeftBusy => running.weft(&["--io=uring", "--busy-poll=500", "--workers=1"])?,
            Self::WeftOneRoute => running.weft_routes(1)?,
            Self::WeftManyRoutes => running.weft_routes(MANY_ROUTES)?,
            Self::Naive => running.forwarder("naive")?,
            Self::TokioUring => {
                let mtu = running.forwarder("tokio-uring")?;
                // As weft's, or bursts are lost in it.
                for side in [0, 1] {
                    running.ip(side, "link set tokio-uring txqueuelen 2000", None)?;
                }
                mtu
            }
            Self::Fastd => running.fastd()?,
            Self::Tinc => running.tinc()?,
        };
        let far = if self.is_scattered() { scattered(0).into() } else { inner(1) };
        running.serve(mtu, far).with_context(|| format!("{} does not work", self.name()))
    }
}

/// A subject that carries packets. Dropped, its processes are killed and its devices removed.
#[derive(Debug)]
pub struct Running<'a> {
    net: &'a Topology,
    children: Vec<Child>,
    /// Arguments of `ip` that take back what was set up, and where.
    undo: Vec<(&'a NetNs, Vec<String>)>,
    directory: TempDir,
}

impl<'a> Running<'a> {
    fn new(net: &'a Topology) -> anyhow::Result<Self> {
        let mut builder = tempfile::Builder::new();
        builder.prefix("weft-bench-");
        let directory = builder.tempdir_in(IN_MEMORY).or_else(|_| builder.tempdir())?;
        Ok(Self { net, children: Vec::new(), undo: Vec::new(), directory })
    }

    /// weft with flags of the caller's.
    ///
    /// # Errors
    /// As [`Subject::start`].
    pub fn weft_with(net: &'a Topology, flags: &[&str]) -> anyhow::Result<Self> {
        let mut running = Self::new(net)?;
        let mtu = running.weft(flags)?;
        running.serve(mtu, inner(1))
    }

    /// Gives containers their MTU, and waits until packets pass from the first to `far`.
    fn serve(self, mtu: u16, far: IpAddr) -> anyhow::Result<Self> {
        self.net.set_mtu(mtu)?;
        self.wait(far)?;
        Ok(self)
    }

    /// Its processes, by their numbers; none where the kernel does the work.
    pub fn processes(&self) -> Vec<u32> {
        self.children.iter().map(Child::id).collect()
    }

    fn ip(&mut self, side: usize, line: &str, undo: Option<&str>) -> anyhow::Result<()> {
        self.ip_in(&self.net.hosts[side], line, undo)
    }

    fn ip_in(&mut self, netns: &'a NetNs, line: &str, undo: Option<&str>) -> anyhow::Result<()> {
        self.net.command(netns, &format!("ip {line}"))?;
        let words = |line: &str| line.split_whitespace().map(str::to_owned).collect();
        self.undo.extend(undo.map(|line| (netns, words(line))));
        Ok(())
    }

    fn route(&mut self, side: usize, how: &str) -> anyhow::Result<()> {
        let far = subnet(1 - side);
        let line = format!("route replace {far} {how}");
        self.ip(side, &line, Some(&format!("route del {far}")))
    }

    fn host_gw(&mut self) -> anyhow::Result<u16> {
        for side in [0, 1] {
            self.route(side, &format!("via {}", outer(1 - side)))?;
        }
        Ok(WIRE_MTU)
    }

    fn vxlan(&mut self) -> anyhow::Result<u16> {
        let mtu = WIRE_MTU - VXLAN_OVERHEAD;
        let mac = |side: usize| format!("02:77:00:00:00:0{}", side + 1);
        for side in [0, 1] {
            let (near, far) = (outer(side), outer(1 - side));
            let add = format!(
                "link add flannel.1 address {} mtu {mtu} type vxlan id 1 dev eth0 local {near} \
                 dstport 8472 nolearning",
                mac(side)
            );
            self.ip(side, &add, Some("link del flannel.1"))?;
            let base = |side: usize| subnet(side).replace("/24", "");
            self.ip(side, &format!("address add {}/32 dev flannel.1", base(side)), None)?;
            self.ip(side, "link set flannel.1 up", None)?;
            let other = base(1 - side);
            let neighbour = format!(
                "neigh replace {other} lladdr {} dev flannel.1 nud permanent",
                mac(1 - side)
            );
            self.ip(side, &neighbour, None)?;
            let entry = format!(
                "bridge fdb append {} dev flannel.1 dst {far} self permanent",
                mac(1 - side)
            );
            self.net.command(&self.net.hosts[side], &entry)?;
            let route =
                format!("route replace {} via {other} dev flannel.1 onlink", subnet(1 - side));
            self.ip(side, &route, None)?;
        }
        Ok(mtu)
    }

    fn weft(&mut self, flags: &[&str]) -> anyhow::Result<u16> {
        let leases = [0, 1].map(|side| (subnet(side), outer(side)));
        self.registry("registry", r#"{"Network":"10.77.0.0/16"}"#, leases)?;
        for side in [0, 1] {
            self.weftd(side, "registry", flags)?;
        }
        Ok(WIRE_MTU - UDP_OVERHEAD)
    }

    /// weft where the kernel moves the packets; `undo` takes away what it leaves for its next start.
    fn weft_in_kernel(&mut self, kind: &str, undo: &str) -> anyhow::Result<()> {
        let leases = [0, 1].map(|side| (subnet(side), outer(side)));
        let config = format!(r#"{{"Network":"10.77.0.0/16","Backend":{{"Type":"{kind}"}}}}"#);
        self.registry("registry", &config, leases)?;
        for side in [0, 1] {
            let words = undo.split_whitespace().map(str::to_owned).collect();
            self.undo.push((&self.net.hosts[side], words));
            self.weftd(side, "registry", &[])?;
        }
        Ok(())
    }

    /// weft where the first host has `count` routes to the scattered addresses, which are all the
    /// second's one subnet. Only with a registry for each can both be true.
    fn weft_routes(&mut self, count: u32) -> anyhow::Result<u16> {
        let (base, all) = (scattered(0), scattered_network());
        let far: Vec<(String, IpAddr)> = if count == 1 {
            vec![(all.to_string(), outer(1))]
        } else {
            let each = SCATTERED / count;
            let prefix = 32 - each.ilog2();
            let at = |number| format!("{}/{prefix}", scattered(number * each));
            (0..count).map(|number| (at(number), outer(1))).collect()
        };
        let near = [(subnet(0), outer(0))];
        self.registry("near", r#"{"Network":"10.0.0.0/8"}"#, near.clone().into_iter().chain(far))?;
        let config = format!(r#"{{"Network":"10.0.0.0/8","SubnetLen":{}}}"#, all.prefix());
        let own = (all.to_string(), outer(1));
        self.registry("far", &config, near.into_iter().chain([own]))?;
        self.weftd(0, "near", &["--io=uring"])?;
        self.weftd(1, "far", &["--io=uring"])?;
        let net = self.net;
        self.ip(
            1,
            &format!("route add {all} via {}", inner(1)),
            Some(&format!("route del {all}")),
        )?;
        let undo = format!("route del local {all} dev lo");
        self.ip_in(&net.containers[1], &format!("route add local {all} dev lo"), Some(&undo))?;
        let run = self.path("0/run");
        self.until(&format!("{count} routes from {base} on"), || {
            status::read(&run).is_ok_and(|status| status.peers.len() >= count as usize)
        })?;
        self.until_at_rest()?;
        Ok(WIRE_MTU - UDP_OVERHEAD)
    }

    /// A directory registry with reservations: the node with an address gets its subnet.
    fn registry(
        &self,
        name: &str,
        config: &str,
        leases: impl IntoIterator<Item = (String, IpAddr)>,
    ) -> anyhow::Result<()> {
        let registry = self.path(name);
        fs::create_dir_all(registry.join("subnets"))?;
        fs::write(registry.join("config"), config)?;
        for (subnet, public_ip) in leases {
            let lease = format!(r#"{{"PublicIP":"{public_ip}"}}"#);
            fs::write(registry.join("subnets").join(subnet.replace('/', "-")), lease)?;
        }
        Ok(())
    }

    fn weftd(&mut self, side: usize, registry: &str, flags: &[&str]) -> anyhow::Result<()> {
        let path = |name: &str| self.path(&format!("{side}/{name}")).display().to_string();
        let arguments = [
            format!("--registry=dir:{}", self.path(registry).display()),
            "--iface=eth0".into(),
            // Nobody else has rules that each packet is held against.
            "--iptables-forward-rules=false".into(),
            format!("--subnet-file={}", path("subnet.env")),
            format!("--state-dir={}", path("state")),
            format!("--run-dir={}", path("run")),
        ];
        let flags = flags.iter().map(|flag| (*flag).to_owned());
        self.spawn(side, &beside("weftd")?, arguments.into_iter().chain(flags))
    }

    /// One of our own, which this very program is, too; its device is called by its name.
    fn forwarder(&mut self, name: &str) -> anyhow::Result<u16> {
        let mtu = WIRE_MTU - UDP_OVERHEAD;
        for side in [0, 1] {
            let arguments = [name.to_owned(), side.to_string(), mtu.to_string()];
            self.spawn(side, &beside("weft-bench")?, arguments)?;
            self.up(side, name, mtu)?;
        }
        Ok(mtu)
    }

    fn fastd(&mut self) -> anyhow::Result<u16> {
        let mtu = WIRE_MTU - 52;
        let keys: Vec<(String, String)> =
            (0..2).map(|_| fastd_keys()).collect::<anyhow::Result<_>>()?;
        for side in [0, 1] {
            let config = format!(
                "mode tun;\nmethod \"null\";\nbind {near}:10000;\nmtu {mtu};\n\
                 interface \"fastd0\";\nsecret \"{secret}\";\nlog level warn;\n\
                 peer \"far\" {{ key \"{key}\"; remote {far}:10000; }}\n",
                near = outer(side),
                far = outer(1 - side),
                secret = keys[side].0,
                key = keys[1 - side].1,
            );
            let path = self.path(&format!("fastd-{side}.conf"));
            fs::write(&path, config)?;
            let arguments = ["--config".to_owned(), path.display().to_string()];
            self.spawn(side, Path::new("fastd"), arguments)?;
            self.up(side, "fastd0", mtu)?;
        }
        Ok(mtu)
    }

    fn tinc(&mut self) -> anyhow::Result<u16> {
        let mtu = WIRE_MTU - 82;
        for side in [0, 1] {
            let directory = self.path(&format!("tinc-{side}"));
            fs::create_dir_all(directory.join("hosts"))?;
            let config = format!(
                "Name = h{side}\nDeviceType = tun\nInterface = tinc0\nMode = router\n\
                 ConnectTo = h{}\nBindToAddress = {} 655\n",
                1 - side,
                outer(side)
            );
            fs::write(directory.join("tinc.conf"), config)?;
            for host in [0, 1] {
                let host_file = format!(
                    "Address = {}\nSubnet = {}\nCipher = none\nDigest = none\nCompression = 0\n",
                    outer(host),
                    subnet(host)
                );
                fs::write(directory.join(format!("hosts/h{host}")), host_file)?;
            }
            self.net.note(&self.net.hosts[side], "tincd -K2048 -c $DIR");
            let status = Command::new("tincd")
                .args(["-K2048", "-c"])
                .arg(&directory)
                .stdin(Stdio::null())
                .stdout(Stdio::null())
                .stderr(Stdio::null())
                .status()
                .context("cannot run tincd")?;
            if !status.success() {
                bail!("tincd made no key");
            }
        }
        for side in [0, 1] {
            // Each needs the other's public key, which is in the host file of its owner.
            let own = self.path(&format!("tinc-{side}/hosts/h{side}"));
            fs::copy(own, self.path(&format!("tinc-{}/hosts/h{side}", 1 - side)))?;
        }
        for side in [0, 1] {
            let directory = self.path(&format!("tinc-{side}")).display().to_string();
            let pid = self.path(&format!("tinc-{side}.pid")).display().to_string();
            let arguments =
                ["-D".to_owned(), "-c".into(), directory, format!("--pidfile={pid}"), "-d0".into()];
            self.spawn(side, Path::new("tincd"), arguments)?;
            self.up(side, "tinc0", mtu)?;
        }
        Ok(mtu)
    }

    fn up(&mut self, side: usize, device: &str, mtu: u16) -> anyhow::Result<()> {
        self.wait_for_device(side, device)?;
        self.ip(side, &format!("link set {device} mtu {mtu} up"), None)?;
        self.ip(side, &format!("route replace {} dev {device}", subnet(1 - side)), None)
    }

    fn spawn(
        &mut self,
        side: usize,
        program: &Path,
        arguments: impl IntoIterator<Item = String>,
    ) -> anyhow::Result<()> {
        let log = File::options().create(true).append(true).open(self.path("log"))?;
        let arguments: Vec<String> = arguments.into_iter().collect();
        let name = program.file_name().unwrap_or_default().to_string_lossy();
        let directory = self.directory.path().display().to_string();
        let line = format!("{name} {}", arguments.join(" ")).replace(&directory, "$DIR");
        self.net.note(&self.net.hosts[side], &line);
        let mut command = Command::new(program);
        lab::forget_settings(&mut command);
        // Out of the terminal's reach: Ctrl-C is answered by us, and ends these in order.
        command.process_group(0);
        command.args(arguments).stdin(Stdio::null()).stdout(log.try_clone()?).stderr(log);
        self.children.push(self.net.hosts[side].spawn(&mut command)?);
        Ok(())
    }

    fn wait_for_device(&self, side: usize, device: &str) -> anyhow::Result<()> {
        let there = || self.net.hosts[side].ip(&["link", "show", "dev", device]).is_ok();
        self.until(device, there)
    }

    fn wait(&self, far: IpAddr) -> anyhow::Result<()> {
        let from = &self.net.containers[0];
        let once = PingOptions { count: 1, ..PingOptions::default() };
        self.until("a ping's answer", || {
            lab::ping(from, far, &once).is_ok_and(|report| report.received == 1)
        })
    }

    /// What daemons do besides carrying packets is not to be measured: reading many leases takes
    /// seconds of a processor.
    fn until_at_rest(&self) -> anyhow::Result<()> {
        let used = || {
            let each = self.processes().into_iter().map(cpu::process_seconds);
            each.sum::<anyhow::Result<f64>>().unwrap_or(0.0)
        };
        let mut before = used();
        self.until("rest", || {
            thread::sleep(Duration::from_millis(200));
            let now = used();
            now - std::mem::replace(&mut before, now) < 0.02
        })
    }

    fn until(&self, what: &str, mut there: impl FnMut() -> bool) -> anyhow::Result<()> {
        let deadline = Instant::now() + READY;
        while !there() {
            if Instant::now() > deadline {
                let log = fs::read_to_string(self.path("log")).unwrap_or_default();
                bail!("no {what} within {} s; its log:\n{log}", READY.as_secs());
            }
            thread::sleep(Duration::from_millis(20));
        }
        Ok(())
    }

    fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }
}

impl Drop for Running<'_> {
    fn drop(&mut self) {
        for child in &mut self.children {
            // Both fail only for a process that has ended.
            let _ = child.kill();
            let _ = child.wait();
        }
        // io_uring lets go of a port some 20 to 80 ms after its process has ended.
        let ports = [0, 1].map(|side| (side, SocketAddr::new(outer(side), PORT)));
        for (side, address) in ports {
            let is_free = || self.net.hosts[side].run(|| UdpSocket::bind(address).is_ok());
            if self.until("free port", || is_free().unwrap_or(true)).is_err() {
                eprintln!("{address} stays in use");
            }
        }
        for (netns, line) in self.undo.iter().rev() {
            let line: Vec<&str> = line.iter().map(String::as_str).collect();
            if let Err(error) = netns.ip(&line) {
                eprintln!("left behind in the namespace: {error:#}");
            }
        }
    }
}

/// Secret and public key.
fn fastd_keys() -> anyhow::Result<(String, String)> {
    let output = Command::new("fastd").arg("--generate-key").output()?;
    let text = String::from_utf8_lossy(&output.stdout).into_owned()
        + &String::from_utf8_lossy(&output.stderr);
    let key = |name: &str| {
        let line = text.lines().find_map(|line| line.strip_prefix(name));
        line.map(|it| it.trim().to_owned()).with_context(|| format!("fastd made no key: {text}"))
    };
    Ok((key("Secret:")?, key("Public:")?))
}

/// A program that was built beside this one; test programs are one directory further down.
fn beside(name: &str) -> anyhow::Result<PathBuf> {
    let this = std::env::current_exe()?;
    let found = this.ancestors().skip(1).take(2).map(|dir| dir.join(name)).find(|it| it.is_file());
    found.with_context(|| format!("no {name} beside {}: `make build` makes it", this.display()))
}
