//! What the end-to-end tests share: hosts that are up, deadlines, daemons started by hand, and
//! packets made by hand.

pub mod doctor;
pub mod etcd;
pub mod fuzz;
pub mod load;
pub mod machine;
pub mod refusing;
pub mod slow_proxy;
pub mod terminal;
pub mod vxlan;

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::net::{IpAddr, SocketAddr, UdpSocket};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Output, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use etherparse::PacketBuilder;
use ipnetwork::IpNetwork;
use rustix::net::sockopt::set_socket_recv_buffer_size_force;
use rustix::process::{Pid, Signal, kill_process};
use socket2::{Domain, Protocol, Socket, Type};
use weft_daemon::lab::{Lab, LabOptions, PingOptions, ping};
use weft_daemon::netns::NetNs;

/// How long anything may take on a machine that is busy with other tests.
pub const DEADLINE: Duration = Duration::from_secs(20);

/// What waits for whoever captures packets, while the machine is busy.
const CAPTURE_BUFFER_LEN: usize = 4 << 20;

/// Hosts on a switch, nothing running yet.
pub fn hosts(hosts: usize) -> Result<Lab> {
    Lab::new(LabOptions { hosts, ..LabOptions::default() })
}

/// The same, for another backend than the lab's usual one.
pub fn hosts_of(backend: &str, hosts: usize) -> Result<Lab> {
    Lab::new(LabOptions { hosts, backend: backend.into(), ..LabOptions::default() })
}

/// Hosts with a weftd and a container each, all of which know each other.
pub fn overlay(hosts: usize) -> Result<Lab> {
    let mut lab = self::hosts(hosts)?;
    bring_up(&mut lab, &[])?;
    Ok(lab)
}

/// Starts a weftd with these further flags and a container on each host of a lab, and waits until
/// all know each other.
pub fn bring_up(lab: &mut Lab, flags: &[&str]) -> Result<()> {
    for host in 0..lab.hosts() {
        lab.start_daemon(host, flags)?;
    }
    for host in 0..lab.hosts() {
        lab.wait_ready(host, DEADLINE)?;
        lab.attach_container(host)?;
    }
    all_acquainted(lab)
}

/// Gives hosts without daemons IPv6 addresses too, and an overlay of both families.
pub fn dual_stack(lab: &Lab) -> Result<()> {
    for host in 0..lab.hosts() {
        let address = format!("fd00:168::{}/64", 94 + host);
        lab.host(host).netns.ip(&["address", "add", &address, "dev", "eth0", "nodad"])?;
        lab.host(host).netns.ip(&["-6", "route", "add", "default", "dev", "eth0"])?;
    }
    write_config(
        lab,
        r#"{"EnableIPv6":true,"Network":"10.42.0.0/16","IPv6Network":"fd00:42::/48"}"#,
    )
}

/// Puts a network config into a lab's directory registry.
pub fn write_config(lab: &Lab, config: &str) -> Result<()> {
    fs::create_dir_all(lab.registry()?)?;
    Ok(fs::write(lab.registry()?.join("config"), config)?)
}

/// A network config by which daemons choose among 10.42.20.0 to 10.42.99.0, so that a test's own leases
/// are in nobody's way.
pub const SUBNETS_KEPT_FREE: &str =
    r#"{"Network":"10.42.0.0/16","SubnetMin":"10.42.20.0","SubnetMax":"10.42.99.0"}"#;

/// A subnet that no host of the lab has got.
pub fn free_subnet(lab: &Lab) -> Result<IpNetwork> {
    let taken = (0..lab.hosts()).map(|host| subnet(lab, host)).collect::<Result<Vec<_>>>()?;
    let all = (1..=u8::MAX).map(|number| format!("10.42.{number}.0/24").parse());
    let mut free = all.map_while(Result::ok).filter(|subnet| !taken.contains(subnet));
    free.next().context("all subnets are taken")
}

/// Waits until each host has all the others as peers.
pub fn all_acquainted(lab: &Lab) -> Result<()> {
    let others = lab.hosts() - 1;
    for host in 0..lab.hosts() {
        until(&format!("host {host} knows {others} peers"), || {
            Ok(lab.status(host)?.peers.len() == others)
        })?;
    }
    Ok(())
}

/// A socket in a host's container, on its address.
pub fn udp_socket(lab: &Lab, host: usize) -> Result<UdpSocket> {
    let container = lab.container(host)?;
    let address = SocketAddr::new(container.address()?, 0);
    Ok(container.netns.run(|| UdpSocket::bind(address))??)
}

/// Fields of proc_pid_stat(5), by the numbers there, of a thread of a host's daemon.
pub fn thread_stat<const N: usize>(
    lab: &Lab,
    host: usize,
    name: &str,
    fields: [usize; N],
) -> Result<[u64; N]> {
    for task in fs::read_dir(format!("/proc/{}/task", lab.status(host)?.pid))? {
        let stat = fs::read_to_string(task?.path().join("stat"))?;
        let (its, rest) = stat.rsplit_once(')').context("no name")?;
        if its.ends_with(&format!("({name}")) {
            let rest: Vec<&str> = rest.split_whitespace().collect();
            let mut values = [0; N];
            for (value, field) in values.iter_mut().zip(fields) {
                // The state, behind the name, is the third.
                *value = rest.get(field - 3).context("no such field")?.parse()?;
            }
            return Ok(values);
        }
    }
    bail!("the daemon of host {host} has no thread {name}")
}

/// Asks until the answer is yes.
///
/// # Errors
/// The deadline passed; the last error or `what` says what was waited for.
pub fn until(what: &str, ask: impl FnMut() -> Result<bool>) -> Result<()> {
    until_within(DEADLINE, what, ask)
}

/// The same with another deadline. A yes that comes after it is one too late.
pub fn until_within(
    limit: Duration,
    what: &str,
    mut ask: impl FnMut() -> Result<bool>,
) -> Result<()> {
    let begun = Instant::now();
    loop {
        let answer = ask();
        let is_late = begun.elapsed() > limit;
        match answer {
            Ok(true) if !is_late => return Ok(()),
            Ok(_) if is_late => bail!("not within {limit:?}: {what}"),
            Err(error) if is_late => return Err(error.context(what.to_owned())),
            Ok(_) | Err(_) => thread::sleep(Duration::from_millis(20)),
        }
    }
}

/// Has every packet cross the underlay alone, at no more than the wire's MTU, as on a plain network
/// card: no segmentation offload, and none of the kernel's joining.
pub fn plain_wire(lab: &Lab) -> Result<()> {
    let off = ["tso", "gso", "gro", "tx-udp-segmentation"].map(|kind| [kind, "off"]).concat();
    for host in 0..lab.hosts() {
        lab.host(host).netns.tool("ethtool", &[&["-K", "eth0"], &off[..]].concat())?;
    }
    Ok(())
}

/// Writes a sysctl of a namespace, by its path below /proc/sys.
pub fn write_sysctl(netns: &NetNs, name: &str, value: &str) -> Result<()> {
    let path = format!("/proc/sys/{name}");
    netns.run(|| fs::write(&path, value))?.with_context(|| format!("cannot write {path}"))
}

/// A number that a host's kernel keeps of the overlay's device.
pub fn link_count(lab: &Lab, host: usize, way: &str, name: &str) -> Result<u64> {
    let device = lab.status(host)?.device.context("no device")?;
    let links = lab.host(host).netns.ip_json(&["-s", "link", "show", "dev", &device])?;
    links[0]["stats64"][way][name].as_u64().with_context(|| format!("no {way} {name}: {links}"))
}

/// A counter of a host's daemon.
pub fn counter(lab: &Lab, host: usize, name: &str) -> Result<u64> {
    let counters = lab.status(host)?.counters;
    counters.get(name).copied().with_context(|| format!("no counter {name}"))
}

/// What an HTTP server in a namespace answers at this port of 127.0.0.1: the code and the body.
pub fn http_get(netns: &NetNs, port: u16, path: &str, accept: &str) -> Result<(u16, String)> {
    let config = ureq::Agent::config_builder().http_status_as_error(false);
    let agent = ureq::Agent::from(config.timeout_global(Some(DEADLINE)).build());
    let url = format!("http://127.0.0.1:{port}{path}");
    let response = netns.run(|| agent.get(&url).header("Accept", accept).call())??;
    Ok((response.status().as_u16(), response.into_body().read_to_string()?))
}

/// A daemon's metrics, with labels as they are written: `weft_packets_total{direction="tun_to_udp"}`.
pub fn metrics(netns: &NetNs, port: u16) -> Result<BTreeMap<String, f64>> {
    let (code, text) = http_get(netns, port, "/metrics", "*/*")?;
    ensure!(code == 200 && text.ends_with("# EOF\n"), "{code}: {text}");
    let samples = text.lines().filter(|line| !line.starts_with('#'));
    samples
        .map(|line| {
            let (name, value) = line.rsplit_once(' ').with_context(|| line.to_owned())?;
            Ok((name.to_owned(), value.parse()?))
        })
        .collect()
}

/// Waits until a metric of a host's daemon, which answers at port 8081, is this.
pub fn measures(lab: &Lab, host: usize, name: &str, value: u32) -> Result<()> {
    let mut last = None;
    let is_it = || {
        last = metrics(&lab.host(host).netns, 8081)?.get(name).copied();
        Ok(last.map(f64::to_bits) == Some(f64::from(value).to_bits()))
    };
    until(&format!("{name} is {value}"), is_it).with_context(|| format!("it is {last:?}"))
}

/// The first of a host's subnets.
pub fn subnet(lab: &Lab, host: usize) -> Result<IpNetwork> {
    lab.status(host)?.subnets.first().copied().context("no subnet")
}

/// Pings between the first two hosts' containers, both ways; all echoes come back.
pub fn pings(lab: &Lab) -> Result<()> {
    for (from, to) in [(0, 1), (1, 0)] {
        let report = lab.ping(from, to, &PingOptions::default())?;
        ensure!(report.complete(), "{report:?}");
    }
    Ok(())
}

/// Waits until each address of a container answers another's echo requests.
pub fn reaches(lab: &Lab, from: usize, to: usize) -> Result<()> {
    let from = lab.container(from)?;
    for address in &lab.container(to)?.addresses {
        until(&format!("{address} answers"), || {
            Ok(ping(&from.netns, address.ip(), &PingOptions::default())?.complete())
        })?;
    }
    Ok(())
}

/// Stops a host's daemon and starts it with these flags, until it is ready.
pub fn restart(lab: &mut Lab, host: usize, flags: &[&str]) -> Result<()> {
    lab.stop_daemon(host)?;
    lab.start_daemon(host, flags)?;
    lab.wait_ready(host, DEADLINE)
}

/// Waits until a problem that contains `text` is in a host's status.
pub fn tells(lab: &Lab, host: usize, text: &str) -> Result<()> {
    let is_told = || Ok(lab.status(host)?.problems.iter().any(|problem| problem.contains(text)));
    until(&format!("host {host} tells {text:?}"), is_told)
        .with_context(|| format!("{:?}", lab.status(host)))
}

/// Waits until a host's lease ends at another time than before, by that host's clock.
pub fn renews(lab: &Lab, host: usize) -> Result<()> {
    let end = || lab.status(host)?.lease_expires.context("nobody knows when the lease ends");
    let before = end()?;
    until("the lease is renewed", || Ok(end()? != before))
}

/// Everything that a host's daemons have logged so far.
pub fn log(lab: &Lab, host: usize) -> Result<String> {
    Ok(fs::read_to_string(&lab.host(host).log)?)
}

/// Waits until a host's daemon logs a line that contains `text`.
pub fn logs(lab: &Lab, host: usize, text: &str) -> Result<()> {
    until(&format!("host {host} logs {text:?}"), || Ok(log(lab, host)?.contains(text)))
        .with_context(|| log(lab, host).unwrap_or_default())
}

/// The base of a host's subnet, which is also its address on the overlay device.
pub fn base(lab: &Lab, host: usize) -> Result<IpAddr> {
    Ok(subnet(lab, host)?.network())
}

/// What a health check at port 8081 gets: the code and the body.
pub fn health(netns: &NetNs, path: &str) -> Result<(u16, String)> {
    http_get(netns, 8081, path, "*/*")
}

/// Whether a namespace has a device of this name.
pub fn has_device(netns: &NetNs, name: &str) -> Result<bool> {
    let links = netns.ip_json(&["link", "show"])?;
    let links = links.as_array().context("no list of links")?;
    Ok(links.iter().any(|link| link["ifname"] == name))
}

/// Where the workspace lies.
pub fn repository() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("..")
}

/// Where cargo put a program of this workspace.
pub fn program(name: &str) -> Result<PathBuf> {
    let this = std::env::current_exe()?;
    let path = this.parent().and_then(Path::parent).context("no target directory")?.join(name);
    if path.is_file() {
        return Ok(path);
    }
    bail!("{} is missing: run the tests by `make test`, which builds it first", path.display())
}

/// What `make install` puts in place below `root`, of what was built beside the tests.
pub fn install(root: &Path, prefix: &str) -> Result<()> {
    let programs = program("weft")?;
    let programs = programs.parent().context("no directory")?.display();
    // As careful as some administrators' is.
    let mut make = Command::new("sh");
    make.args(["-c", "umask 077; exec make \"$@\"", "make"]);
    make.current_dir(repository()).env_remove("MAKEFLAGS");
    make.args(["--old-file=build", "install"]).arg(format!("PREFIX={prefix}"));
    make.arg(format!("DESTDIR={}", root.display())).arg(format!("BIN={programs}"));
    let output = make.output()?;
    ensure!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    Ok(())
}

/// Runs weftd to its end and returns its exit status and what it wrote to stderr.
pub fn run_weftd(netns: &NetNs, arguments: &[&str]) -> Result<(Option<i32>, String)> {
    run_to_end(netns, Command::new(program("weftd")?).args(arguments))
}

/// Runs a command to its end and returns its exit status and what it wrote to stderr.
pub fn run_to_end(netns: &NetNs, command: &mut Command) -> Result<(Option<i32>, String)> {
    let Output { status, stderr, .. } = output_of(netns, command)?;
    Ok((status.code(), String::from_utf8_lossy(&stderr).into_owned()))
}

/// Runs a command to its end; a command that does not end in time is killed and is an error.
pub fn output_of(netns: &NetNs, command: &mut Command) -> Result<Output> {
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let child = netns.spawn(command)?;
    let pid = Pid::from_child(&child);
    let waiting = thread::spawn(move || child.wait_with_output());
    if until("the command ends", || Ok(waiting.is_finished())).is_err() {
        kill_process(pid, Signal::KILL)?;
        bail!("{command:?} did not end");
    }
    let Ok(output) = waiting.join() else { bail!("the waiting thread panicked") };
    Ok(output?)
}

/// Sends a child a signal and waits for its end.
pub fn end(child: &mut Child, signal: Signal) -> Result<ExitStatus> {
    kill_process(Pid::from_child(child), signal)?;
    ended(child)
}

/// Waits for a child's end.
pub fn ended(child: &mut Child) -> Result<ExitStatus> {
    let mut status = None;
    until("the child ends", || {
        status = child.try_wait()?;
        Ok(status.is_some())
    })?;
    status.context("it ended")
}

/// A weftd that a test starts with a command line of its own. Dropped, it is killed.
#[derive(Debug)]
pub struct Weftd {
    child: Killed,
    log: PathBuf,
}

impl Weftd {
    /// Starts it in a namespace, logging to this file.
    pub fn start(netns: &NetNs, log: &Path, arguments: &[&str]) -> Result<Self> {
        Self::start_command(netns, log, Command::new(program("weftd")?).args(arguments))
    }

    /// Starts it by a command that is ready but for the log.
    pub fn start_command(netns: &NetNs, log: &Path, command: &mut Command) -> Result<Self> {
        let child = netns.spawn(command.stderr(File::create(log)?))?;
        Ok(Self { child: Killed(child), log: log.to_owned() })
    }

    /// Its process.
    pub fn pid(&self) -> u32 {
        self.child.0.id()
    }

    /// Everything it has logged so far.
    pub fn log(&self) -> Result<String> {
        Ok(fs::read_to_string(&self.log)?)
    }

    /// Waits until it logs a line that contains `text`.
    pub fn logs(&self, text: &str) -> Result<()> {
        until(&format!("a log line with {text:?}"), || Ok(self.log()?.contains(text)))
            .with_context(|| self.log().unwrap_or_default())
    }

    /// Sends it a signal.
    pub fn signal(&self, signal: Signal) -> Result<()> {
        Ok(kill_process(Pid::from_child(&self.child.0), signal)?)
    }

    /// Sends it a signal and waits for its end.
    pub fn end(mut self, signal: Signal) -> Result<ExitStatus> {
        end(&mut self.child.0, signal)
    }
}

/// A process that is killed when this is dropped.
#[derive(Debug)]
pub struct Killed(pub Child);

impl Drop for Killed {
    fn drop(&mut self) {
        // Both fail only for a process that has ended.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// A socket that gets all of IPv4 that a namespace sees, on all its devices, from the IP header on.
pub fn capture(netns: &NetNs) -> Result<Socket> {
    // ETH_P_IP (include/uapi/linux/if_ether.h).
    let protocol = Protocol::from(i32::from(0x0800_u16.to_be()));
    let socket = netns.run(|| Socket::new(Domain::PACKET, Type::DGRAM, Some(protocol)))??;
    // SO_RCVBUF would be cut down to net.core.rmem_max, and nobody told (socket(7)).
    set_socket_recv_buffer_size_force(&socket, CAPTURE_BUFFER_LEN)?;
    Ok(socket)
}

/// An IP packet with a UDP datagram in it, valid in every field.
pub fn udp_packet(from: IpAddr, to: IpAddr, port: u16, ttl: u8, payload: &[u8]) -> Result<Vec<u8>> {
    let builder = match (from, to) {
        (IpAddr::V4(from), IpAddr::V4(to)) => PacketBuilder::ipv4(from.octets(), to.octets(), ttl),
        (IpAddr::V6(from), IpAddr::V6(to)) => PacketBuilder::ipv6(from.octets(), to.octets(), ttl),
        _ => bail!("{from} and {to} are of two families"),
    };
    let mut packet = Vec::new();
    builder.udp(40_000, port).write(&mut packet, payload)?;
    Ok(packet)
}
