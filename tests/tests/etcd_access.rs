//! etcd with TLS and with users.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, ensure};
use etcd_client::{Client, ConnectOptions};
use rcgen::{BasicConstraints, CertificateParams, IsCa, Issuer, KeyPair};
use rustix::process::Signal;
use tempfile::TempDir;
use weft_daemon::lab::{EtcdOptions, Lab, LabOptions, PingOptions};
use weft_tests::etcd::{
    PREFIX, client, get, hosts, inside, put as put_by_v3, wait_until_it_serves, weftd,
};
use weft_tests::terminal::Terminal;
use weft_tests::{
    DEADLINE, Weftd, bring_up, doctor, free_subnet, log, logs, output_of, program, renews, subnet,
    until,
};

/// Where the lab's first member of etcd lives.
const ADDRESS: &str = "10.168.0.1";

const CONFIG: &str = r#"{"Network":"10.42.0.0/16"}"#;
const APIS: [&str; 2] = ["--etcd-api=v3", "--etcd-api=v2"];
const WAITING: &str = "waiting for the network config: https://10.168.0.1:2379: ";

/// An authority, a server's certificate and a client's, as files.
struct Certificates {
    dir: TempDir,
}

impl Certificates {
    fn make() -> Result<Self> {
        let it = Self { dir: tempfile::tempdir()? };
        it.issue()?;
        Ok(it)
    }

    /// Puts new ones in place of those that are there.
    fn issue(&self) -> Result<()> {
        let mut params = CertificateParams::new(Vec::new())?;
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        let key = KeyPair::generate()?;
        fs::write(self.path("ca.pem"), params.self_signed(&key)?.pem())?;
        let issuer = Issuer::new(params, key);
        for (name, subject) in [("server", ADDRESS), ("client", "weft")] {
            let key = KeyPair::generate()?;
            let params = CertificateParams::new(vec![subject.to_owned()])?;
            fs::write(self.path(&format!("{name}.pem")), params.signed_by(&key, &issuer)?.pem())?;
            fs::write(self.path(&format!("{name}-key.pem")), key.serialize_pem())?;
        }
        Ok(())
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn flag(&self, flag: &str, name: &str) -> String {
        format!("--{flag}={}", self.path(name).display())
    }

    fn lab(&self, mutual: bool) -> Result<Lab> {
        let mut arguments =
            vec![self.flag("cert-file", "server.pem"), self.flag("key-file", "server-key.pem")];
        arguments.push("--enable-v2".into());
        if mutual {
            arguments.push("--client-cert-auth".into());
            arguments.push(self.flag("trusted-ca-file", "ca.pem"));
        }
        let etcd = EtcdOptions { members: 1, arguments, tls: true };
        Lab::new(LabOptions { hosts: 2, etcd, ..LabOptions::default() })
    }
}

/// Starts a daemon that gets nothing from etcd, and waits for the reason.
fn is_told(lab: &mut Lab, flags: &[&str], reason: &str) -> Result<()> {
    // An earlier daemon may have told the same.
    let before = log(lab, 0).map_or(0, |log| log.len());
    lab.start_daemon(0, flags)?;
    until(&format!("{reason:?} is logged"), || Ok(log(lab, 0)?[before..].contains(reason)))
        .with_context(|| log(lab, 0).unwrap_or_default())?;
    lab.stop_daemon(0)?;
    Ok(())
}

#[test]
fn the_authority_alone_is_enough_and_a_wrong_one_is_told() -> Result<()> {
    let (right, wrong) = (Certificates::make()?, Certificates::make()?);
    for api in APIS {
        let mut lab = right.lab(false)?;
        let flag = wrong.flag("etcd-cafile", "ca.pem");
        is_told(&mut lab, &[api, &flag], "invalid peer certificate")?;
        let nowhere = "cannot read /nowhere, which --etcd-cafile";
        is_told(&mut lab, &[api, "--etcd-cafile=/nowhere"], nowhere)?;
        bring_up(&mut lab, &[api, &right.flag("etcd-cafile", "ca.pem")])?;
        assert!(lab.ping(0, 1, &PingOptions::default())?.complete());
        lab.remove()?;
    }
    Ok(())
}

#[test]
fn a_client_certificate_is_shown_and_its_lack_is_told() -> Result<()> {
    let certificates = Certificates::make()?;
    for api in APIS {
        let mut lab = certificates.lab(true)?;
        let ca = certificates.flag("etcd-cafile", "ca.pem");
        is_told(&mut lab, &[api, &ca], WAITING)?;
        let cert = certificates.flag("etcd-certfile", "client.pem");
        // As in the middle of a rotation.
        let other = certificates.flag("etcd-keyfile", "server-key.pem");
        is_told(&mut lab, &[api, &ca, &cert, &other], "(--etcd-keyfile) cannot be used together")?;
        assert!(!log(&lab, 0)?.contains("panicked"), "{}", log(&lab, 0)?);
        let key = certificates.flag("etcd-keyfile", "client-key.pem");
        bring_up(&mut lab, &[api, &ca, &cert, &key])?;
        assert!(lab.ping(0, 1, &PingOptions::default())?.complete());
        // Without an authority of its own the system's count; this variable names other ones.
        lab.stop_daemon(1)?;
        let host = lab.host(1);
        let mut command = weftd(&lab, 1, &[api, &cert, &key])?;
        let unknown = Weftd::start_command(&host.netns, &host.log, &mut command)?;
        unknown.logs("invalid peer certificate")?;
        unknown.end(Signal::TERM)?;
        command.env("SSL_CERT_FILE", certificates.path("ca.pem"));
        let known = Weftd::start_command(&host.netns, &host.log, &mut command)?;
        known.logs("forwarding")?;
        known.end(Signal::TERM)?;
        lab.remove()?;
    }
    Ok(())
}

/// Authority, server and clients, all at once: a daemon that runs reads them anew.
#[test]
fn rotated_certificates_are_taken_up() -> Result<()> {
    let certificates = Certificates::make()?;
    let flags =
        [("etcd-cafile", "ca"), ("etcd-certfile", "client"), ("etcd-keyfile", "client-key")];
    let flags = flags.map(|(flag, name)| certificates.flag(flag, &format!("{name}.pem")));
    for api in APIS {
        let mut lab = certificates.lab(true)?;
        let flags = flags.each_ref().map(String::as_str);
        lab.start_daemon(0, &[&[api, "--subnet-lease-ttl=10s"], &flags[..]].concat())?;
        lab.wait_ready(0, DEADLINE)?;
        certificates.issue()?;
        lab.etcd(0).kill()?;
        lab.start_etcd(0)?;
        renews(&lab, 0)?;
        lab.remove()?;
    }
    Ok(())
}

fn put_config_by_v2(lab: &Lab) -> Result<()> {
    let url = format!("{}/v2/keys{PREFIX}/config", lab.etcd_urls()[0]);
    let put = || ureq::put(&url).send_form([("value", CONFIG)]);
    lab.host(0).netns.run(put)??;
    Ok(())
}

/// flannel up to 0.17 knows the v2 API only; a config there is found, and where each API has one,
/// that is told.
#[test]
fn the_api_is_the_one_that_has_a_config() -> Result<()> {
    let mut lab = hosts(2, 1)?;
    put_config_by_v2(&lab)?;
    bring_up(&mut lab, &[])?;
    assert!(lab.ping(0, 1, &PingOptions::default())?.complete());
    assert!(lab.status(0)?.registry.contains("v2 API"), "{}", lab.status(0)?.registry);
    assert!(get(&lab, "")?.is_empty(), "nothing is written by v3");

    lab.stop_daemon(1)?;
    put_by_v3(&lab, "config", CONFIG)?;
    lab.start_daemon(1, &[])?;
    logs(&lab, 1, "and one by its v2 API; taking v3's")?;
    lab.wait_ready(1, DEADLINE)?;

    // A fleet that has moved to v3 does not go back to what it left behind because somebody takes v3's
    // config away for a moment.
    lab.stop_daemon(1)?;
    client(&lab, |mut client| async move {
        Ok(client.delete(format!("{PREFIX}/config"), None).await.map(drop)?)
    })?;
    let host = lab.host(1);
    let flags = [
        ("etcd-endpoints", lab.etcd_urls()[0].clone()),
        ("state-dir", host.state_dir.display().to_string()),
        ("run-dir", host.run_dir.display().to_string()),
        ("subnet-file", host.subnet_file.display().to_string()),
    ];
    let flags = flags.map(|(name, value)| format!("--{name}={value}"));
    let flags: Vec<&str> = flags.iter().map(String::as_str).collect();
    let weftd = Weftd::start(&host.netns, &host.log, &flags)?;
    weftd.logs("there is one by its v2 API, which --etcd-api v2 takes")?;
    // Nor does the operator's command.
    let mut weft = Command::new(program("weft")?);
    weft.args(["registry", flags[0], flags[1], "show"]);
    let shown = String::from_utf8(output_of(&host.netns, &mut weft)?.stdout)?;
    assert!(!shown.is_empty() && !shown.contains("10.42.0.0/16"), "{shown}");
    put_by_v3(&lab, "config", CONFIG)?;
    weftd.logs("wrote subnet.env")?;
    assert!(!lab.status(1)?.registry.contains("v2 API"), "{}", lab.status(1)?.registry);
    drop(weftd);
    lab.remove()
}

/// From now on whoever shows no password is let do nothing; root's is hunter2.
fn protect_v3(lab: &Lab) -> Result<()> {
    client(lab, |mut client| async move {
        client.user_add("root", "hunter2", None).await?;
        client.role_add("root").await?;
        client.user_grant_role("root", "root").await?;
        Ok(client.auth_enable().await.map(drop)?)
    })
}

/// The same of the v2 API, which has users of its own.
fn protect_v2(lab: &Lab) -> Result<()> {
    let url = format!("{}/v2/auth", lab.etcd_urls()[0]);
    let ask = |path: &str, body: &str| -> Result<()> {
        let request = ureq::put(format!("{url}/{path}"))
            .header("Content-Type", "application/json")
            .header("Authorization", "Basic cm9vdDpodW50ZXIy");
        lab.host(0).netns.run(|| request.send(body))??;
        Ok(())
    };
    ask("users/root", r#"{"user":"root","password":"hunter2"}"#)?;
    ask("enable", "")?;
    ask("roles/guest", r#"{"role":"guest","revoke":{"kv":{"read":["/*"],"write":["/*"]}}}"#)
}

/// Where its v2 API is switched on and was never used, that says nothing of the config.
#[test]
fn who_is_refused_by_v3_goes_on_with_what_it_knew() -> Result<()> {
    let mut lab = hosts(1, 1)?;
    lab.start_daemon(0, &[])?;
    lab.wait_ready(0, DEADLINE)?;
    lab.stop_daemon(0)?;
    protect_v3(&lab)?;
    lab.start_daemon(0, &[])?;
    logs(&lab, 0, "starting with the network config known at")?;
    lab.wait_ready(0, DEADLINE)?;
    lab.remove()
}

/// A token lasts for two seconds, and a restarted etcd knows none any more: daemons show who they are
/// again, and go on as nobody where authentication is switched off.
#[test]
fn users_are_known_by_password_and_again_when_tokens_are_gone() -> Result<()> {
    let arguments = ["--enable-v2", "--auth-token-ttl=2"].map(str::to_owned).to_vec();
    let etcd = EtcdOptions { members: 1, arguments, tls: false };
    let mut lab = Lab::new(LabOptions { hosts: 2, etcd, ..LabOptions::default() })?;
    wait_until_it_serves(&lab)?;
    // What a fleet left behind that moved to v3 is not taken up where v3 refuses.
    put_config_by_v2(&lab)?;
    put_by_v3(&lab, "config", CONFIG)?;
    protect_v3(&lab)?;
    is_told(&mut lab, &[], "refuses: etcdserver: user name is empty")?;
    let wrong = ["--etcd-username=root", "--etcd-password=hunter3"];
    is_told(&mut lab, &wrong, "refuses: etcdserver: authentication failed")?;
    let url = lab.etcd_urls()[0].clone();
    let flags = [&["--etcd-endpoints", &url], &wrong[..]].concat();
    let told = String::from_utf8(doctor::run(&lab, 0, &flags)?.stdout)?;
    assert!(told.contains("FAIL registry") && told.contains("does not let weft in"), "{told}");
    let password = tempfile::NamedTempFile::new()?;
    fs::write(password.path(), "hunter2\n")?;
    let file = format!("--etcd-password-file={}", password.path().display());
    bring_up(&mut lab, &["--etcd-username=root", &file, "--subnet-lease-ttl=10s"])?;
    // Between two renewals nothing is asked for twice as long as the token lasts.
    renews(&lab, 0)?;
    renews(&lab, 0)?;
    // Another password, and no token that the former one has brought.
    inside(&lab.host(0).netns, || async {
        let user = ConnectOptions::new().with_user("root", "hunter2");
        let mut client = Client::connect([&url], Some(user)).await?;
        Ok(client.user_change_password("root", "hunter4").await.map(drop)?)
    })?;
    fs::write(password.path(), "hunter4\n")?;
    lab.etcd(0).kill()?;
    lab.start_etcd(0)?;
    renews(&lab, 0)?;
    inside(&lab.host(0).netns, || async {
        let user = ConnectOptions::new().with_user("root", "hunter4");
        Ok(Client::connect([&url], Some(user)).await?.auth_disable().await.map(drop)?)
    })?;
    lab.etcd(0).kill()?;
    lab.start_etcd(0)?;
    renews(&lab, 0)?;
    assert!(lab.ping(0, 1, &PingOptions::default())?.complete());
    for host in 0..2 {
        assert!(!log(&lab, host)?.contains("hunter"));
    }
    lab.remove()
}

/// The v2 API has users of its own, and asks for the password with every request.
#[test]
fn users_are_known_by_password_by_the_v2_api_too() -> Result<()> {
    let mut lab = hosts(1, 1)?;
    protect_v2(&lab)?;
    let [_, api] = APIS;
    let refused = "refuses: 110: The request requires user authentication";
    is_told(&mut lab, &[api], refused)?;
    is_told(&mut lab, &[api, "--etcd-username=root", "--etcd-password=hunter3"], refused)?;
    bring_up(&mut lab, &[api, "--etcd-username=root", "--etcd-password=hunter2"])?;
    assert!(!log(&lab, 0)?.contains("hunter"));
    lab.remove()
}

/// A user that may do no more than docs/etcd.md gives it, by the lines that stand there.
#[test]
fn the_user_of_the_document_is_enough() -> Result<()> {
    for (api, comment) in APIS.into_iter().zip(["# v3", "# v2 (ETCDCTL_API=2)"]) {
        let mut lab = hosts(1, 1)?;
        make_user(&lab, api, lines(comment)?)?;
        if comment == "# v3" {
            protect_v3(&lab)?
        } else {
            protect_v2(&lab)?
        }
        let password = tempfile::NamedTempFile::new()?;
        fs::write(password.path(), PASSWORD)?;
        let file = format!("--etcd-password-file={}", password.path().display());
        let user = [api, "--etcd-username=weft", &file];
        let endpoints = format!("--etcd-endpoints={}", lab.etcd_urls()[0]);
        let flags = [&[&endpoints[..]], &user[..]].concat();
        let registry = |lab: &Lab, arguments: &[&str]| -> Result<String> {
            let mut weft = Command::new(program("weft")?);
            weft.arg("registry").args(&flags).args(arguments);
            let output = output_of(&lab.host(0).netns, &mut weft)?;
            ensure!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
            Ok(String::from_utf8(output.stdout)?)
        };

        registry(&lab, &["init", "10.42.0.0/16"])?;
        bring_up(&mut lab, &[&user[..], &["--subnet-lease-ttl=10s"]].concat())?;
        renews(&lab, 0)?;
        let peer = free_subnet(&lab)?.to_string();
        registry(&lab, &["reserve", &peer, "10.168.0.99"])?;
        until("the peer is there", || Ok(lab.status(0)?.peers.len() == 1))?;
        let shown = registry(&lab, &["show"])?;
        assert!(shown.contains(&peer) && shown.contains(&subnet(&lab, 0)?.to_string()), "{shown}");
        registry(&lab, &["release", &peer])?;
        until("the peer is gone", || Ok(lab.status(0)?.peers.is_empty()))?;
        let (checks, _) = doctor::doctor(&lab, 0, &flags)?;
        let check = checks.iter().find(|check| check.name == "registry").context("no check")?;
        assert_eq!(check.verdict, "OK", "{api}: {check:?}");
        assert!(lab.status(0)?.problems.is_empty(), "{api}: {:?}", lab.status(0)?.problems);
        lab.remove()?;
    }
    Ok(())
}

const DOCUMENT: &str = include_str!("../../docs/etcd.md");
const PASSWORD: &str = "hunter2";

/// The commands of the document, the first of which has this comment.
fn lines(comment: &str) -> Result<&'static str> {
    let blocks = DOCUMENT.split("\n\n").filter(|block| block.starts_with("    etcdctl "));
    let mut named =
        blocks.filter(|block| block.lines().next().is_some_and(|line| line.ends_with(comment)));
    named.next().with_context(|| format!("no commands {comment}"))
}

/// Has an operator type them.
fn make_user(lab: &Lab, api: &str, lines: &str) -> Result<()> {
    let [v3, _] = APIS;
    let (number, questions) = if api == v3 {
        (3, &["Password of weft:", "again"][..])
    } else {
        (2, &["New password:"][..])
    };
    // That of the etcd that the lab has, as LAB_ETCD names it.
    let mut path = std::env::var("PATH")?;
    if let Some(etcd) = std::env::var_os("LAB_ETCD") {
        let directory = Path::new(&etcd).parent().context("LAB_ETCD is no program's path")?;
        path = format!("{}:{path}", directory.display());
    }
    let mut shell = Command::new("env");
    shell.arg(format!("PATH={path}")).arg(format!("ETCDCTL_API={number}"));
    shell.arg(format!("ETCDCTL_ENDPOINTS={}", lab.etcd_urls()[0]));
    shell.args(["sh", "-ec", lines]);
    let mut terminal = Terminal::start(&lab.host(0).netns, &shell)?;
    for question in questions {
        terminal.shows(&[question])?;
        terminal.press(&format!("{PASSWORD}\n"))?;
    }
    let outcome = terminal.shows(&["ranted"]).map(|()| terminal.screen());
    ensure!(terminal.end()?.success(), "{outcome:?}");
    Ok(())
}
