//! The commands by which an operator looks into a running daemon, and what `make install` puts in
//! place for them.

use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::Path;
use std::process::{Command, Stdio};

use anyhow::{Context, Result, ensure};
use serde_json::Value;
use weft_daemon::lab::{Bytes, Lab};
use weft_tests::terminal::Terminal;
use weft_tests::{bring_up, hosts, install, output_of, program, until, write_sysctl};

const PASSWORD: &str = "hunter2hunter2";

/// What `weft` with these arguments answers about a host's daemon: whether it succeeded, and all that
/// it wrote.
fn weft(lab: &Lab, arguments: &[&str]) -> Result<(bool, String)> {
    let output = output_of(&lab.host(0).netns, &mut command(lab, arguments)?)?;
    let text = String::from_utf8_lossy(&[output.stdout, output.stderr].concat()).into_owned();
    Ok((output.status.success(), text))
}

fn command(lab: &Lab, arguments: &[&str]) -> Result<Command> {
    let host = lab.host(0);
    let mut command = Command::new(program("weft")?);
    command.args(arguments).arg("--run-dir").arg(&host.run_dir);
    command.arg("--state-dir").arg(&host.state_dir);
    Ok(command)
}

#[test]
fn an_operator_sees_ways_rates_levels_and_takes_all_of_it_away() -> Result<()> {
    let mut lab = hosts(2)?;
    let password = format!("--etcd-password={PASSWORD}");
    let flags = ["--etcd-username=weft", &password, "--ip-masq"];
    bring_up(&mut lab, &flags)?;
    assert!(lab.transfer(0, 1, Bytes(1 << 20))?.intact());
    ways(&lab)?;
    rates(&lab)?;
    a_reader_that_has_enough(&lab)?;
    rates_on_a_terminal(&mut lab, &flags)?;
    levels(&lab)?;
    bundle(&lab)?;
    lab.remove()
}

fn ways(lab: &Lab) -> Result<()> {
    let to = lab.container(1)?.address()?.to_string();
    let (ok, text) = weft(lab, &["trace", &to])?;
    ensure!(ok, "{text}");
    for part in [
        &format!("of the peer {}", lab.host(1).address),
        "backend  udp-tun",
        "device   flannel0",
        "MTU      1472",
        "forward: accept from 10.42.0.0/16",
        "postrouting: leave alone",
    ] {
        assert!(text.contains(part), "no {part:?} in {text}");
    }
    let (ok, text) = weft(lab, &["trace", "10.42.0.1", "-o", "json"])?;
    assert!(!ok);
    assert_eq!(serde_json::from_str::<Value>(&text)?[0]["target"], "nobody");
    let own = lab.container(0)?.address()?.to_string();
    let (ok, text) = weft(lab, &["trace", &own])?;
    assert!(ok && text.contains("a container of this host"), "{text}");

    // Another route comes first.
    let netns = &lab.host(0).netns;
    netns.ip(&["route", "add", &to, "dev", "eth0"])?;
    let (ok, text) = weft(lab, &["trace", &to])?;
    assert!(
        !ok && text.contains("PROBLEM  the kernel sends it out of eth0, not flannel0"),
        "{text}"
    );
    netns.ip(&["route", "del", &to])?;
    write_sysctl(netns, "net/ipv4/ip_forward", "0")?;
    let (ok, text) = weft(lab, &["trace", &to])?;
    assert!(!ok && text.contains("PROBLEM  this host does not forward packets"), "{text}");
    write_sysctl(netns, "net/ipv4/ip_forward", "1")
}

fn rates(lab: &Lab) -> Result<()> {
    let (ok, text) = weft(lab, &["top", "--once", "--sort", "total"])?;
    ensure!(ok, "{text}");
    assert!(text.lines().all(|line| line.chars().count() <= 80), "{text}");
    for part in ["forwarding", "udp-tun", "direction", "tun_to_udp_bytes", "10.168.0.95"] {
        assert!(text.contains(part), "no {part:?} in {text}");
    }
    let (ok, text) = weft(lab, &["top"])?;
    assert!(!ok && text.contains("--once writes text"), "{text}");
    Ok(())
}

/// As `head` reads.
fn a_reader_that_has_enough(lab: &Lab) -> Result<()> {
    for arguments in [&["status"][..], &["top", "--once"], &["doctor"]] {
        let mut weft = command(lab, arguments)?;
        let mut weft =
            lab.host(0).netns.spawn(weft.stdout(Stdio::piped()).stderr(Stdio::piped()))?;
        drop(weft.stdout.take());
        let output = weft.wait_with_output()?;
        let told = String::from_utf8_lossy(&output.stderr);
        ensure!(told.is_empty() && output.status.code() == Some(141), "{arguments:?}: {output:?}");
    }
    Ok(())
}

fn rates_on_a_terminal(lab: &mut Lab, flags: &[&str]) -> Result<()> {
    let mut terminal = Terminal::start(&lab.host(0).netns, &command(lab, &["top"])?)?;
    terminal.shows(&["forwarding", "direction", "10.168.0.95", "sorted by rate"])?;
    let moved = || -> Result<bool> { Ok(lab.transfer(0, 1, Bytes(1 << 20))?.intact()) };
    until("what moves is to be seen", || {
        ensure!(moved()?);
        let screen = terminal.screen();
        let peer = screen.lines().find(|line| line.starts_with("10.168.0.95")).unwrap_or_default();
        let is_large =
            |word: &&str| word.starts_with(char::is_numeric) && word.ends_with(['k', 'M']);
        Ok(peer.split_whitespace().filter(is_large).count() >= 2)
    })?;
    for (key, order) in [("t", "total"), ("n", "name"), ("r", "rate")] {
        terminal.press(key)?;
        terminal.shows(&[&format!("sorted by {order};")])?;
    }
    lab.stop_daemon(0)?;
    terminal.shows(&["no weftd answers"])?;
    lab.start_daemon(0, flags)?;
    terminal.shows(&["forwarding", "10.168.0.95"])?;
    terminal.press("q")?;
    assert!(terminal.end()?.success());
    Ok(())
}

fn levels(lab: &Lab) -> Result<()> {
    assert_eq!(weft(lab, &["log-level"])?, (true, "info\n".into()));
    assert!(!weft(lab, &["log-level", "loud"])?.0);
    let asked =
        || -> Result<bool> { Ok(fs::read_to_string(&lab.host(0).log)?.contains("somebody asks")) };
    assert!(!asked()?);
    assert_eq!(weft(lab, &["log-level", "debug"])?, (true, "debug\n".into()));
    until("more is logged", || {
        weft(lab, &["trace", "10.42.0.1"])?;
        asked()
    })?;
    assert_eq!(weft(lab, &["log-level", "info"])?.1, "info\n");
    Ok(())
}

fn bundle(lab: &Lab) -> Result<()> {
    let directory = tempfile::tempdir()?;
    let archive = directory.path().join("bundle.tar.gz");
    let archive_name = archive.to_str().context("a path that is no text")?;
    for directory in [&lab.host(0).state_dir, &lab.host(0).run_dir] {
        fs::write(directory.join("etcd.key"), PASSWORD)?;
    }
    let (ok, text) = weft(lab, &["support-bundle", archive_name])?;
    ensure!(ok, "{text}");
    assert_eq!(fs::metadata(&archive)?.mode() & 0o777, 0o600);
    let (ok, text) = weft(lab, &["support-bundle", archive_name])?;
    assert!(!ok && text.contains("remove it, or name another file"), "{text}");
    let tar = Command::new("tar").arg("-xzf").arg(&archive).current_dir(&directory).status()?;
    ensure!(tar.success());
    fs::remove_file(&archive)?;
    let root = fs::read_dir(&directory)?.next().context("an empty archive")??.path();
    let read = |name: &str| {
        fs::read_to_string(root.join(name)).with_context(|| format!("no {name} in the bundle"))
    };
    let status: Value = serde_json::from_str(&read("daemon-1/status.json")?)?;
    assert_eq!(status["state"], "forwarding");
    assert!(read("daemon-1/metrics")?.contains("weft_build_info"));
    assert!(read("kernel/counters")?.contains("IpInReceives"));
    let sysctl = read("kernel/sysctl")?;
    assert!(sysctl.contains("net.ipv4.ip_forward") && !sysctl.contains("tcp_fastopen_key"));
    assert!(read("doctor")?.contains("ip_forward"));
    assert!(read("kernel/routes")?.contains("10.42.0.0/16 dev flannel0 proto 119"));
    assert!(read("firewall/iptables")?.contains("10.42.0.0/16"));
    assert!(read("daemon-1/process-cmdline")?.contains("--etcd-password=[stripped]"));
    let found = Command::new("grep").args(["--recursive", PASSWORD]).arg(&root).output()?;
    assert_eq!(found.status.code(), Some(1), "{}", String::from_utf8_lossy(&found.stdout));
    let found = Command::new("find").arg(&root).args(["-name", "etcd.key"]).output()?;
    assert_eq!(String::from_utf8_lossy(&found.stdout), "");
    let found = Command::new("find").arg(&root).args(["-name", "last-known-*"]).output()?;
    assert_ne!(String::from_utf8_lossy(&found.stdout), "");
    Ok(())
}

#[test]
fn a_log_of_json_is_one_object_a_line() -> Result<()> {
    let mut lab = hosts(1)?;
    bring_up(&mut lab, &["--log-format=json"])?;
    let log = fs::read_to_string(&lab.host(0).log)?;
    let lines: Vec<Value> =
        log.lines().map(serde_json::from_str).collect::<serde_json::Result<_>>()?;
    let forwarding = lines.iter().find(|line| line["message"] == "forwarding");
    let forwarding = forwarding.with_context(|| log.clone())?;
    assert_eq!((&forwarding["level"], &forwarding["backend"]), (&"INFO".into(), &"udp-tun".into()));
    lab.remove()
}

fn shell(shell: &str, script: &str, directory: &Path) -> Result<String> {
    let output = Command::new(shell).args(["-c", script]).current_dir(directory).output()?;
    let text = String::from_utf8_lossy(&[output.stdout, output.stderr].concat()).into_owned();
    ensure!(output.status.success(), "{shell}: {text}");
    Ok(text)
}

#[test]
fn make_install_puts_everything_in_place() -> Result<()> {
    let root = tempfile::tempdir()?;
    install(root.path(), "/usr")?;
    let usr = root.path().join("usr");
    for (file, mode) in [
        ("bin/weftd", 0o755),
        ("bin/weft", 0o755),
        ("bin/mk-docker-opts.sh", 0o755),
        ("lib/systemd/system/weftd.service", 0o644),
        ("share/weft/docker-weft.conf", 0o644),
        ("share/weft/weft-dashboard.json", 0o644),
        ("share/weft/weft-alerts.yml", 0o644),
        ("share/man/man8/weftd.8", 0o644),
        ("share/man", 0o755),
    ] {
        let found = fs::metadata(usr.join(file)).with_context(|| format!("no {file}"))?;
        assert_eq!(found.permissions().mode() & 0o777, mode, "{file}");
    }
    for file in ["lib/systemd/system/weftd.service", "share/weft/docker-weft.conf"] {
        let text = fs::read_to_string(usr.join(file))?;
        assert!(text.contains("/usr/bin/weft") && !text.contains("/usr/local"), "{text}");
    }
    let man = "MANWIDTH=100 man --local-file --warnings --no-justification share/man/";
    let page = shell("sh", &format!("{man}man1/weft-trace.1"), &usr)?;
    assert!(page.contains("Tell which route") && !page.contains("warning"), "{page}");
    let page = shell("sh", &format!("{man}man8/weftd.8"), &usr)?;
    assert!(page.contains("--etcd-endpoints"), "{page}");

    let bash = "source share/bash-completion/completions/weft.bash
        COMP_WORDS=(weft tr) COMP_CWORD=1; _weft weft tr weft; echo ${COMPREPLY[@]}";
    assert_eq!(shell("bash", bash, &usr)?, "trace\n");
    let fish = "source share/fish/vendor_completions.d/weft.fish; complete --do-complete 'weft tr'";
    assert!(shell("fish", fish, &usr)?.starts_with("trace\t"));
    let zsh = "fpath=($PWD/share/zsh/site-functions $fpath); autoload -U compinit; compinit -D -u
        echo ${_comps[weft]} ${_comps[weftd]}; autoload +X _weft && echo loads";
    assert_eq!(shell("zsh", zsh, &usr)?, "_weft _weftd\nloads\n");
    Ok(())
}

/// weftd's unit has the umask 0077.
#[test]
fn what_others_read_they_get_to() -> Result<()> {
    let directory = tempfile::tempdir()?;
    let at = directory.path().display();
    fs::write(
        directory.path().join("subnet.env"),
        "FLANNEL_SUBNET=10.1.7.1/24\nFLANNEL_MTU=1472\n",
    )?;
    let weft = program("weft")?;
    let files = format!("-f {at}/subnet.env -d {at}/new/inner/docker.env");
    shell("sh", &format!("umask 077; {} docker-opts {files}", weft.display()), directory.path())?;
    for (path, mode) in [("new", 0o755), ("new/inner", 0o755), ("new/inner/docker.env", 0o644)] {
        let found = fs::metadata(directory.path().join(path))?.permissions().mode();
        assert_eq!(found & 0o777, mode, "{path}");
    }
    Ok(())
}
