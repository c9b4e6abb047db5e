//! Leases in a real etcd: what is written there, who owns what, and what goes on while it is away.

use std::cmp::Ordering::{Equal, Greater, Less};
use std::collections::HashSet;
use std::fs;
use std::io::{Read, Write};
use std::net::{IpAddr, Shutdown, SocketAddr, TcpListener, TcpStream};
use std::sync::mpsc;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use etcd_client::{AlarmAction, AlarmType};
use ipnetwork::IpNetwork;
use rustix::process::{Pid, Signal, kill_process};
use weft_control::keeper::{Identity, Plan, plan};
use weft_control::lease::{Expiry, Snapshot};
use weft_control::subnet_env::Previous;
use weft_control::{LeaseAttrs, NetworkConfig};
use weft_daemon::lab::{Lab, PingOptions};
use weft_daemon::netns::NetNs;
use weft_tests::etcd::{
    client, connections, count_connections, cut, delete, forget_history, get, get_one, hosts,
    inside, is_v2, keep_subnets_free, leader, mend, put, put_without, registry,
    wait_until_it_serves, weftd,
};
use weft_tests::{DEADLINE, Weftd, all_acquainted, bring_up, health, until};

const DAY: Duration = Duration::from_secs(86_400);

fn subnet(lab: &Lab, host: usize) -> Result<IpNetwork> {
    lab.status(host)?.subnets.first().copied().context("no subnet")
}

/// The key of a host's lease, below the prefix.
fn lease_path(lab: &Lab, host: usize) -> Result<String> {
    let subnet = subnet(lab, host)?;
    Ok(format!("subnets/{}-{}", subnet.network(), subnet.prefix()))
}

fn log(lab: &Lab, host: usize) -> Result<String> {
    Ok(fs::read_to_string(&lab.host(host).log)?)
}

fn logs(lab: &Lab, host: usize, text: &str) -> Result<()> {
    until(&format!("host {host} logs {text:?}"), || Ok(log(lab, host)?.contains(text)))
        .with_context(|| log(lab, host).unwrap_or_default())
}

fn pings(lab: &Lab) -> Result<()> {
    for (from, to) in [(0, 1), (1, 0)] {
        let report = lab.ping(from, to, &PingOptions::default())?;
        assert!(report.complete(), "{report:?}");
    }
    Ok(())
}

fn attrs(last: u8) -> LeaseAttrs {
    LeaseAttrs { public_ip: Some([192, 0, 2, last].into()), ..LeaseAttrs::default() }
}

#[test]
fn keys_and_values_are_flannels() -> Result<()> {
    let mut lab = hosts(2, 1)?;
    bring_up(&mut lab, &[])?;
    pings(&lab)?;
    assert_eq!(get_one(&lab, "config")?.value, r#"{"Network":"10.42.0.0/16"}"#);
    for host in 0..2 {
        let found = get_one(&lab, &lease_path(&lab, host)?)?;
        let address = lab.host(host).address;
        let value = format!(r#"{{"PublicIP":"{address}","PublicIPv6":null}}"#);
        assert_eq!((found.value, found.ends), (value, true));
    }
    assert_eq!(get(&lab, "subnets/")?.len(), 2);
    until("both have their records", || Ok(get(&lab, "weft/nodes/")?.len() == 2))?;
    lab.remove()
}

#[test]
fn writes_are_conditional() -> Result<()> {
    let lab = hosts(1, 1)?;
    let registry = registry(&lab);
    inside(&lab.host(0).netns, || async {
        let key = "10.3.1.0-24".parse()?;
        let first = registry.create(&key, &attrs(1), Some(DAY)).await?.context("it is free")?;
        assert_eq!(registry.create(&key, &attrs(2), Some(DAY)).await?, None);
        let renewed = registry.renew(&first, &attrs(1), Some(DAY)).await?.context("it is ours")?;
        assert!(renewed.revision > first.revision);
        assert_eq!(
            registry.renew(&first, &attrs(1), Some(DAY)).await?,
            None,
            "it was written since"
        );
        assert!(!registry.remove(&first).await?);
        let found = registry.snapshot().await?.leases;
        assert_eq!((found[0].revision, found[0].expires), (renewed.revision, Expiry::Unknown));
        assert!(registry.remove(&found[0]).await?);
        assert!(registry.snapshot().await?.leases.is_empty());
        assert!(registry.init_config("{}").await?);
        assert!(!registry.init_config("x").await?);
        assert_eq!(registry.snapshot().await?.config.as_deref(), Some("{}"));
        Ok(())
    })?;
    lab.remove()
}

/// A reservation is kept without a time to live, also when it is taken up and when it is written.
#[test]
fn a_reservation_stays_one() -> Result<()> {
    let mut lab = hosts(2, 1)?;
    let address = lab.host(0).address;
    put(&lab, "subnets/10.42.7.0-24", format!(r#"{{"PublicIP":"{address}"}}"#))?;
    bring_up(&mut lab, &["--subnet-lease-ttl=10s"])?;
    assert_eq!(subnet(&lab, 0)?.to_string(), "10.42.7.0/24");
    assert_eq!(lab.status(0)?.lease_expires, None);
    assert!(lab.status(0)?.lease_reserved);
    assert!(lab.status(1)?.lease_expires > lab.status(1)?.lease_renewal);
    let other = get_one(&lab, &lease_path(&lab, 1)?)?;
    until("the other lease is renewed", || {
        Ok(get_one(&lab, &lease_path(&lab, 1)?)?.revision > other.revision)
    })?;
    let found = get_one(&lab, "subnets/10.42.7.0-24")?;
    assert!(!found.ends);
    assert_eq!(found.value, format!(r#"{{"PublicIP":"{address}","PublicIPv6":null}}"#));
    pings(&lab)?;
    lab.remove()
}

#[test]
fn fifty_keepers_race_for_fifty_subnets() -> Result<()> {
    let lab = hosts(1, 1)?;
    let config: NetworkConfig =
        r#"{"Network":"10.3.0.0/16","SubnetMin":"10.3.1.0","SubnetMax":"10.3.50.0"}"#.parse()?;
    inside(&lab.host(0).netns, || async {
        let mut keepers = tokio::task::JoinSet::new();
        for last in 0..50 {
            let (registry, config) = (registry(&lab), config.clone());
            keepers.spawn(async move {
                let identity = Identity { node_id: last.to_string(), attrs: attrs(last) };
                let mut rng = fastrand_seeded(last);
                loop {
                    let leases = registry.snapshot().await?.leases;
                    let next = plan(&config, &identity, &Previous::default(), &leases, &mut rng);
                    let Plan::Create(key) = next else { anyhow::bail!("{next:?}") };
                    if let Some(lease) = registry.create(&key, &identity.attrs, Some(DAY)).await? {
                        return Ok(lease.key);
                    }
                }
            });
        }
        let mut found = HashSet::new();
        while let Some(key) = keepers.join_next().await {
            assert!(found.insert(key??), "a subnet was given twice");
        }
        assert_eq!(found.len(), 50);
        Ok(())
    })?;
    lab.remove()
}

fn fastrand_seeded(seed: u8) -> fastrand::Rng {
    fastrand::Rng::with_seed(seed.into())
}

#[test]
fn garbage_is_skipped_and_named() -> Result<()> {
    let mut lab = hosts(2, 1)?;
    keep_subnets_free(&lab)?;
    bring_up(&mut lab, &[])?;
    let own = subnet(&lab, 0)?;
    let half = format!("subnets/{}-25", own.network());
    let ours = format!(r#"{{"PublicIP":"{}"}}"#, lab.host(0).address);
    let long = format!(r#"{{"PublicIP":"192.0.2.9"}}{}"#, " ".repeat(1 << 20));
    for (path, value, said) in [
        ("subnets/10.42.9.0-24", "garbage", "skipped"),
        ("subnets/10.42.9.0-24", long.as_str(), "longer than"),
        ("subnets/what", "{}", "skipped"),
        ("subnets/192.0.2.0-24", r#"{"PublicIP":"192.0.2.9"}"#, "outside of the Network"),
        (half.as_str(), r#"{"PublicIP":"192.0.2.9"}"#, "overlaps our own"),
        ("subnets/10.42.9.0-24", r#"{"PublicIP":"10.42.9.9"}"#, "inside the overlay"),
        ("subnets/10.42.9.0-24", ours.as_str(), "it has our own address"),
    ] {
        put(&lab, path, value)?;
        until(&format!("{path} is told of: {said}"), || {
            Ok(lab.status(0)?.problems.iter().any(|problem| problem.contains(said)))
        })?;
        // Half of our subnet is another node's to others: the longer prefix wins there.
        if path != half {
            pings(&lab)?;
        }
        delete(&lab, path)?;
        until("it is forgotten", || Ok(lab.status(0)?.problems.is_empty()))?;
    }
    assert_eq!(lab.status(0)?.peers.len(), 1);
    lab.remove()
}

/// What an operator removes by mistake comes back, with the same subnet.
#[test]
fn a_deleted_lease_is_claimed_again() -> Result<()> {
    let mut lab = hosts(2, 1)?;
    bring_up(&mut lab, &[])?;
    let (before, path) = (subnet(&lab, 0)?, lease_path(&lab, 0)?);
    delete(&lab, &path)?;
    until("the lease is back", || Ok(get_one(&lab, &path).is_ok()))?;
    delete(&lab, "weft/nodes/")?;
    until("the records are back", || Ok(get(&lab, "weft/nodes/")?.len() == 2))?;
    logs(&lab, 0, "our lease is gone; claiming it again")?;
    assert_eq!(subnet(&lab, 0)?, before);
    all_acquainted(&lab)?;
    pings(&lab)?;
    lab.remove()
}

/// A lease that ran out while its node was down, and that another node got: it is not stolen back.
#[test]
fn a_lease_that_was_given_away_is_not_stolen_back() -> Result<()> {
    let mut lab = hosts(2, 1)?;
    bring_up(&mut lab, &["--subnet-lease-ttl=10s"])?;
    let (lost, path) = (subnet(&lab, 0)?, lease_path(&lab, 0)?);
    lab.kill_daemon(0)?;
    until("the lease expires", || Ok(get(&lab, &path)?.is_empty()))?;
    put(&lab, &path, r#"{"PublicIP":"10.168.0.200","PublicIPv6":null}"#)?;
    lab.start_daemon(0, &[])?;
    lab.wait_ready(0, DEADLINE)?;
    assert_ne!(subnet(&lab, 0)?, lost);
    assert!(get_one(&lab, &path)?.value.contains("10.168.0.200"));
    lab.remove()
}

/// Somebody takes the subnet of a node that runs: that node moves on and says so.
#[test]
fn a_node_whose_subnet_is_taken_moves_to_another() -> Result<()> {
    let mut lab = hosts(2, 1)?;
    bring_up(&mut lab, &[])?;
    let (lost, path) = (subnet(&lab, 0)?, lease_path(&lab, 0)?);
    put(&lab, &path, r#"{"PublicIP":"10.168.0.200","PublicIPv6":null}"#)?;
    logs(&lab, 0, "our subnet has another owner")?;
    until("it has another subnet", || Ok(subnet(&lab, 0)? != lost))?;
    assert!(get_one(&lab, &path)?.value.contains("10.168.0.200"));
    lab.remove()
}

#[test]
fn a_second_node_with_our_address_is_named_and_waits() -> Result<()> {
    let mut lab = hosts(2, 1)?;
    let address = lab.host(0).address.to_string();
    let ready = |lab: &Lab, host: usize| -> Result<bool> {
        Ok(health(&lab.host(host).netns, "/readyz")?.0 == 200)
    };
    lab.start_daemon(0, &["--healthz-port=8081"])?;
    lab.wait_ready(0, DEADLINE)?;
    until("its record is there", || Ok(get(&lab, "weft/nodes/")?.len() == 1))?;
    let path = lease_path(&lab, 0)?;
    let before = get_one(&lab, &path)?.revision;
    let twin = ["--iface=eth0", &format!("--public-ip={address}"), "--healthz-port=8081"];
    lab.start_daemon(1, &twin)?;
    logs(&lab, 1, "lives with our public address")?;
    let id = lab.status(0)?.node_id;
    assert!(log(&lab, 1)?.contains(&format!("(id {id})")));
    assert_eq!(get_one(&lab, &path)?.revision, before, "the lease was not touched");
    assert!(!lab.host(1).subnet_file.exists());
    assert!(ready(&lab, 0)? && !ready(&lab, 1)?);
    // One that does not wait, and lives on.
    let record = format!(
        r#"{{"Id":"ab","Name":"twin","PublicIP":"{address}","PublicIPv6":null,"Addresses":[],"Version":"0","Mtu":1472}}"#
    );
    put(&lab, "weft/nodes/ab", record)?;
    let told = "the node twin (id ab) lives with our public address";
    logs(&lab, 0, told)?;
    assert!(lab.status(0)?.problems.iter().any(|problem| problem.starts_with(told)));
    until("it is not ready any more", || Ok(!ready(&lab, 0)?))?;
    delete(&lab, "weft/nodes/ab")?;
    until("it is ready again", || ready(&lab, 0))?;
    // As if the first were gone for a minute.
    lab.kill_daemon(0)?;
    delete(&lab, "weft/nodes/")?;
    lab.wait_ready(1, DEADLINE)?;
    assert_eq!(lease_path(&lab, 1)?, path);
    lab.remove()
}

/// CPU time of a host's daemon, in seconds.
fn cpu_seconds(lab: &Lab, host: usize) -> Result<f64> {
    weft_benches::cpu::process_seconds(lab.status(host)?.pid)
}

/// The lines of a log that somebody should see.
fn alarms(log: &str) -> Vec<&str> {
    log.lines().filter(|line| line.contains(" WARN ") || line.contains(" ERROR ")).collect()
}

/// Longer than the leases live: nothing is torn down, and afterwards all is as it was. A line when it
/// begins and one when it ends; meanwhile nobody is asked but to find out whether somebody answers.
#[test]
fn an_outage_is_not_noticed() -> Result<()> {
    let mut lab = hosts(2, 1)?;
    bring_up(&mut lab, &["--subnet-lease-ttl=10s"])?;
    let before = [subnet(&lab, 0)?, subnet(&lab, 1)?];
    let read = [log(&lab, 0)?.len(), log(&lab, 1)?.len()];
    lab.etcd(0).kill()?;
    for host in 0..2 {
        logs(&lab, host, "is away, going on with what was last read")?;
    }
    count_connections(&lab.etcd(0).netns)?;
    let (since, used) = (Instant::now(), cpu_seconds(&lab, 0)?);
    until("the leases would have run out", || Ok(since.elapsed() > Duration::from_secs(14)))?;
    let share = (cpu_seconds(&lab, 0)? - used) / since.elapsed().as_secs_f64();
    assert!(share < 0.01, "{share} of a core");
    let asked = connections(&lab.etcd(0).netns)?;
    pings(&lab)?;
    lab.start_etcd(0)?;
    for host in 0..2 {
        logs(&lab, host, " is back after ")?;
    }
    all_acquainted(&lab)?;
    assert_eq!([subnet(&lab, 0)?, subnet(&lab, 1)?], before);
    until("the leases are there", || Ok(get(&lab, "subnets/")?.len() == 2))?;
    pings(&lab)?;
    let mut tries = 0;
    for host in 0..2 {
        let log = log(&lab, host)?;
        let mut told = alarms(&log[read[host]..]);
        // By the v2 API a lease's time runs on while etcd is away.
        told.retain(|line| !is_v2() || !line.contains("our lease is gone; claiming it again"));
        let [away, back] = told[..] else { panic!("{told:#?}") };
        assert!(away.contains("is away") && back.contains("is back after"), "{told:#?}");
        let count = back.split(" and ").nth(1).and_then(|rest| rest.split(' ').next());
        tries += count.context("no number of tries")?.parse::<u64>()?;
    }
    assert!((2..=tries).contains(&asked), "{asked} connections, {tries} tries");
    lab.remove()
}

/// A node that etcd could not be reached from for longer than its lease lives goes on by itself, while
/// the others act on what they can read: somebody else takes the subnet, and the node takes another
/// one when it is back.
#[test]
fn a_subnet_lost_while_cut_off_is_not_taken_back() -> Result<()> {
    let mut lab = hosts(3, 1)?;
    for host in 0..2 {
        lab.start_daemon(host, &["--subnet-lease-ttl=10s"])?;
    }
    for host in 0..2 {
        lab.wait_ready(host, DEADLINE)?;
    }
    for host in 0..2 {
        until("each knows the other", || Ok(lab.status(host)?.peers.len() == 1))?;
    }
    let (lost, path) = (subnet(&lab, 0)?, lease_path(&lab, 0)?);
    cut(&lab.host(0).netns)?;
    logs(&lab, 0, "is away, going on with what was last read")?;
    until("the others forget it", || Ok(lab.status(1)?.peers.is_empty()))?;
    assert_eq!((subnet(&lab, 0)?, lab.status(0)?.peers.len()), (lost, 1));
    // It had the subnet before, and nobody has it now.
    let gateway = lost.iter().nth(1).context("a subnet of one address")?;
    fs::write(&lab.host(2).subnet_file, format!("FLANNEL_SUBNET={gateway}/{}\n", lost.prefix()))?;
    lab.start_daemon(2, &["--subnet-lease-ttl=10s"])?;
    until("the third host has the subnet", || Ok(subnet(&lab, 2)? == lost))?;
    mend(&lab.host(0).netns)?;
    logs(&lab, 0, "our subnet has another owner")?;
    until("the first has another one", || Ok(subnet(&lab, 0)? != lost))?;
    all_acquainted(&lab)?;
    let owner = lab.host(2).address.to_string();
    assert!(get_one(&lab, &path)?.value.contains(&owner));
    assert_eq!(subnet(&lab, 2)?, lost);
    lab.remove()
}

/// An endpoint that is dead from the beginning costs one connection that comes to nothing, and is
/// left alone from then on.
#[test]
fn a_dead_endpoint_costs_one_connection() -> Result<()> {
    let mut lab = hosts(1, 3)?;
    cut(&lab.etcd(0).netns)?;
    // The choice by itself would ask by both at once.
    let api = if is_v2() { "--etcd-api=v2" } else { "--etcd-api=v3" };
    lab.start_daemon(0, &["--subnet-lease-ttl=10s", api])?;
    lab.wait_ready(0, DEADLINE)?;
    // Within the two seconds of one the kernel asks twice, or once more on a busy machine.
    let asked = connections(&lab.etcd(0).netns)?;
    assert!((1..=3).contains(&asked), "{asked}");
    for _ in 0..2 {
        let before = lab.status(0)?.lease_expires;
        until("the lease is renewed", || Ok(lab.status(0)?.lease_expires > before))?;
    }
    assert_eq!(connections(&lab.etcd(0).netns)?, asked);
    let log = log(&lab, 0)?;
    assert!(alarms(&log).is_empty(), "{log}");
    lab.remove()
}

/// etcd can be read but not written to, as when its disk is full.
#[test]
fn what_cannot_be_written_is_told_until_it_can() -> Result<()> {
    if is_v2() {
        // The alarm is for the v3 API's store.
        return Ok(());
    }
    let mut lab = hosts(1, 1)?;
    lab.start_daemon(0, &["--subnet-lease-ttl=20s"])?;
    lab.wait_ready(0, DEADLINE)?;
    let alarm = |action: AlarmAction| {
        client(&lab, |mut client| async move {
            client.alarm(action, AlarmType::Nospace, None).await?;
            Ok(())
        })
    };
    alarm(AlarmAction::Activate)?;
    until("it is told", || {
        let problems = lab.status(0)?.problems;
        Ok(problems.iter().any(|it| it.starts_with("cannot renew the lease, trying again: ")))
    })?;
    let log = log(&lab, 0)?;
    let told = alarms(&log);
    assert!(told[0].contains("space exceeded"), "{told:#?}");
    assert!(!log.contains("is away"), "{log}");
    alarm(AlarmAction::Deactivate)?;
    until("all is well", || Ok(lab.status(0)?.problems.is_empty()))?;
    lab.remove()
}

#[test]
fn a_restart_during_an_outage_goes_on_with_what_was_known() -> Result<()> {
    let mut lab = hosts(2, 1)?;
    bring_up(&mut lab, &[])?;
    let before = subnet(&lab, 0)?;
    lab.etcd(0).kill()?;
    logs(&lab, 0, "is away")?;
    lab.kill_daemon(0)?;
    lab.start_daemon(0, &[])?;
    lab.wait_ready(0, DEADLINE)?;
    logs(&lab, 0, "starting with the lease and the 1 peers known at")?;
    assert_eq!((subnet(&lab, 0)?, lab.status(0)?.peers.len()), (before, 1));
    pings(&lab)?;
    lab.start_etcd(0)?;
    until("the lease is renewed", || Ok(lab.status(0)?.lease_expires.is_some()))?;
    assert_eq!(subnet(&lab, 0)?, before);
    pings(&lab)?;
    lab.remove()
}

/// An etcd that comes back empty gets all leases again, with the same subnets.
#[test]
fn wiped_data_are_written_again() -> Result<()> {
    let mut lab = hosts(2, 1)?;
    bring_up(&mut lab, &[])?;
    let before = [subnet(&lab, 0)?, subnet(&lab, 1)?];
    lab.etcd(0).kill()?;
    fs::remove_dir_all(&lab.etcd(0).data)?;
    lab.start_etcd(0)?;
    wait_until_it_serves(&lab)?;
    until("both leases are there", || Ok(get(&lab, "subnets/")?.len() == 2))?;
    all_acquainted(&lab)?;
    assert_eq!([subnet(&lab, 0)?, subnet(&lab, 1)?], before);
    until("the config is missed", || {
        Ok(lab.status(0)?.problems.iter().any(|problem| problem.contains("config is gone")))
    })?;
    pings(&lab)?;
    lab.remove()
}

/// What may happen to a member.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Failure {
    Killed,
    Frozen,
    CutOff,
    /// Its host loses power: connections that it knows nothing of any more, and whose other ends do.
    HalfOpen,
    /// And it is the one that leads.
    KilledAsLeader,
}

/// Each member in turn fails, so that it is the one that daemons talk to, and then the one that leads;
/// another one serves, and what happens meanwhile is seen.
#[test]
fn one_member_of_three_may_fail() -> Result<()> {
    use Failure::{CutOff, Frozen, HalfOpen, Killed, KilledAsLeader};
    let mut lab = hosts(2, 3)?;
    keep_subnets_free(&lab)?;
    bring_up(&mut lab, &[])?;
    let drop_all = "add table ip cut { chain in { type filter hook input priority 0; policy drop; }; \
                    chain out { type filter hook output priority 0; policy drop; }; }";
    for (number, failure) in [Killed, Frozen, CutOff, HalfOpen, KilledAsLeader].iter().enumerate() {
        let leader = leader(&lab)?;
        let member = if *failure == KilledAsLeader { leader } else { number % 3 };
        match failure {
            Killed | KilledAsLeader => lab.etcd(member).kill()?,
            Frozen => lab.etcd(member).freeze()?,
            CutOff | HalfOpen => lab.etcd(member).netns.tool("nft", &[drop_all]).map(drop)?,
        }
        let lease = format!(r#"{{"PublicIP":"10.168.0.{}"}}"#, 200 + number);
        let path = format!("subnets/10.42.{}.0-24", 200 + number);
        until("the others take the write", || {
            put_without(&lab, member, &path, &lease).map(|()| true)
        })?;
        for host in 0..2 {
            until(&format!("host {host} sees it ({failure:?})"), || {
                Ok(lab.status(host)?.peers.len() == 2 + number)
            })?;
        }
        pings(&lab)?;
        match failure {
            Killed | KilledAsLeader => lab.start_etcd(member)?,
            Frozen => lab.etcd(member).thaw()?,
            CutOff => mend(&lab.etcd(member).netns)?,
            HalfOpen => {
                lab.etcd(member).kill()?;
                mend(&lab.etcd(member).netns)?;
                lab.start_etcd(member)?;
            }
        }
        wait_until_it_serves(&lab)?;
    }
    for host in 0..2 {
        assert!(!log(&lab, host)?.contains("is away"), "{}", log(&lab, host)?);
    }
    lab.remove()
}

/// Two of three members gone: the third can decide nothing, which is as good as away.
#[test]
fn a_lost_majority_is_an_outage() -> Result<()> {
    let mut lab = hosts(2, 3)?;
    bring_up(&mut lab, &[])?;
    let before = [subnet(&lab, 0)?, subnet(&lab, 1)?];
    for member in 1..3 {
        lab.etcd(member).kill()?;
    }
    for host in 0..2 {
        logs(&lab, host, "is away, going on with what was last read")?;
    }
    pings(&lab)?;
    for member in 1..3 {
        lab.start_etcd(member)?;
    }
    for host in 0..2 {
        logs(&lab, host, " is back after ")?;
    }
    assert_eq!([subnet(&lab, 0)?, subnet(&lab, 1)?], before);
    all_acquainted(&lab)?;
    pings(&lab)?;
    lab.remove()
}

/// Each answer takes two seconds: everything still comes, only later.
#[test]
fn slow_answers_are_waited_for() -> Result<()> {
    let mut lab = hosts(2, 1)?;
    keep_subnets_free(&lab)?;
    let server = SocketAddr::new(lab.etcd(0).address, 2379);
    let proxy = SlowProxy::start(&lab.host(1).netns, server, Duration::from_secs(1))?;
    lab.start_daemon(0, &[])?;
    lab.start_daemon(1, &[&format!("--etcd-endpoints=http://{}", proxy.address)])?;
    for host in 0..2 {
        lab.wait_ready(host, 3 * DEADLINE)?;
        lab.attach_container(host)?;
    }
    all_acquainted(&lab)?;
    pings(&lab)?;
    put(&lab, "subnets/10.42.200.0-24", r#"{"PublicIP":"10.168.1.1"}"#)?;
    until("the slow one hears of it", || Ok(lab.status(1)?.peers.len() == 2))?;
    assert!(!log(&lab, 1)?.contains("is away"), "{}", log(&lab, 1)?);
    lab.remove()
}

/// Hands bytes on, each a while after it came, in both directions.
struct SlowProxy {
    address: SocketAddr,
}

impl SlowProxy {
    fn start(netns: &NetNs, server: SocketAddr, delay: Duration) -> Result<Self> {
        let listener = netns.run(|| TcpListener::bind("127.0.0.1:0"))??;
        let address = listener.local_addr()?;
        let netns = NetNs::open(netns.name());
        // Threads end with the connections, and those with the daemon.
        thread::spawn(move || {
            for client in listener.incoming().map_while(Result::ok) {
                let Ok(Ok(server)) = netns.run(|| TcpStream::connect(server)) else { continue };
                for (from, to) in [(&client, &server), (&server, &client)] {
                    if let (Ok(from), Ok(to)) = (from.try_clone(), to.try_clone()) {
                        thread::spawn(move || slow_copy(from, to, delay));
                    }
                }
            }
        });
        Ok(Self { address })
    }
}

fn slow_copy(mut from: TcpStream, mut to: TcpStream, delay: Duration) {
    let (sender, receiver) = mpsc::channel::<(Instant, Vec<u8>)>();
    thread::spawn(move || {
        for (due, bytes) in receiver {
            thread::sleep(due.saturating_duration_since(Instant::now()));
            if to.write_all(&bytes).is_err() {
                break;
            }
        }
        // Fails where the other side is gone already.
        let _ = to.shutdown(Shutdown::Both);
    });
    let mut buffer = vec![0; 65_536];
    while let Ok(len @ 1..) = from.read(&mut buffer) {
        if sender.send((Instant::now() + delay, buffer[..len].to_vec())).is_err() {
            break;
        }
    }
}

/// A daemon that slept through a compaction of what it watched lists anew, and compares: somebody has
/// come, somebody has gone, and somebody has moved.
#[test]
fn compaction_past_our_revision_loses_nothing() -> Result<()> {
    let mut lab = hosts(2, 1)?;
    keep_subnets_free(&lab)?;
    bring_up(&mut lab, &[])?;
    put(&lab, "subnets/10.42.202.0-24", r#"{"PublicIP":"10.168.2.1"}"#)?;
    until("it is known", || Ok(lab.status(0)?.peers.len() == 2))?;
    let pid = i32::try_from(lab.status(0)?.pid)?;
    let pid = Pid::from_raw(pid).context("no pid")?;
    kill_process(pid, Signal::STOP)?;
    for number in 1..=100_u8 {
        put(&lab, "subnets/10.42.200.0-24", format!(r#"{{"PublicIP":"10.168.1.{number}"}}"#))?;
    }
    forget_history(&lab)?;
    delete(&lab, "subnets/10.42.200.0-24")?;
    put(&lab, "subnets/10.42.201.0-24", r#"{"PublicIP":"10.168.1.1"}"#)?;
    put(&lab, "subnets/10.42.202.0-24", r#"{"PublicIP":"10.168.2.2"}"#)?;
    kill_process(pid, Signal::CONT)?;
    until("it has caught up", || {
        let peers = lab.status(0)?.peers;
        let at = |text: &str| {
            let peer = peers.iter().find(|peer| peer.subnets[0].to_string() == text);
            peer.map(|peer| peer.public_ip.to_string())
        };
        let found = ["10.42.200.0/24", "10.42.201.0/24", "10.42.202.0/24"].map(at);
        Ok(found == [None, Some("10.168.1.1".into()), Some("10.168.2.2".into())])
    })?;
    pings(&lab)?;
    lab.remove()
}

/// Peers that change their address are followed.
#[test]
fn a_peer_that_moves_is_followed() -> Result<()> {
    let mut lab = hosts(2, 1)?;
    keep_subnets_free(&lab)?;
    bring_up(&mut lab, &[])?;
    let path = "subnets/10.42.200.0-24";
    put(&lab, path, r#"{"PublicIP":"10.168.1.1"}"#)?;
    let address = |text: &'static str| {
        until(&format!("the peer is at {text}"), || {
            let peers = lab.status(0)?.peers;
            Ok(peers.iter().any(|peer| peer.public_ip.to_string() == text))
        })
    };
    address("10.168.1.1")?;
    put(&lab, path, r#"{"PublicIP":"10.168.1.2"}"#)?;
    address("10.168.1.2")?;
    lab.remove()
}

/// Started in one instant, again and again: all know each other.
#[test]
fn all_that_start_at_once_know_each_other() -> Result<()> {
    let mut lab = hosts(3, 1)?;
    for _ in 0..50 {
        for host in 0..3 {
            lab.start_daemon(host, &[])?;
        }
        for host in 0..3 {
            lab.wait_ready(host, DEADLINE)?;
        }
        all_acquainted(&lab)?;
        for host in 0..3 {
            lab.stop_daemon(host)?;
        }
        delete(&lab, "subnets/")?;
        delete(&lab, "weft/nodes/")?;
        for host in 0..3 {
            fs::remove_file(&lab.host(host).subnet_file)?;
        }
    }
    lab.remove()
}

/// A clock that is set back and forth by a year: leases are renewed in time, and nobody is forgotten.
#[test]
fn a_clock_that_jumps_is_not_followed() -> Result<()> {
    let mut lab = hosts(2, 1)?;
    let ttl = "--subnet-lease-ttl=10s";
    let clock = lab.registry()?.with_file_name("clock");
    fs::write(&clock, "+0")?;
    let host = lab.host(0);
    let mut command = weftd(&lab, 0, &[ttl])?;
    // libfaketime's, which Debian's dynamic linker finds by this name.
    command.env("LD_PRELOAD", "/usr/$LIB/faketime/libfaketime.so.1");
    command.env("FAKETIME_TIMESTAMP_FILE", &clock);
    command.envs([("FAKETIME_NO_CACHE", "1"), ("FAKETIME_DONT_FAKE_MONOTONIC", "1")]);
    let daemon = Weftd::start_command(&host.netns, &host.log, &mut command)?;
    lab.start_daemon(1, &[ttl])?;
    lab.wait_ready(1, DEADLINE)?;
    daemon.logs("forwarding")?;
    all_acquainted(&lab)?;
    for host in 0..2 {
        lab.attach_container(host)?;
    }
    let (own, path) = (subnet(&lab, 0)?, lease_path(&lab, 0)?);
    let year = |line: Option<&str>| line.and_then(|line| line.get(..4)?.parse::<i32>().ok());
    let now = year(daemon.log()?.lines().next());
    for (jump, order) in [("-400d", Less), ("+400d", Greater), ("+0", Equal)] {
        fs::write(&clock, jump)?;
        for _ in 0..3 {
            let before = get_one(&lab, &path)?.revision;
            until("the lease is renewed", || Ok(get_one(&lab, &path)?.revision > before))?;
        }
        let log = daemon.log()?;
        assert_eq!(year(log.lines().last()).cmp(&now), order, "{log}");
        assert!(!log.contains("claiming it again"), "{log}");
        assert_eq!(subnet(&lab, 0)?, own);
        all_acquainted(&lab)?;
        pings(&lab)?;
    }
    drop(daemon);
    lab.remove()
}

/// A range of subnets that becomes another one is gone by at once; another Network on a restart.
#[test]
fn a_changed_config_is_gone_by_where_it_can_be() -> Result<()> {
    let mut lab = hosts(2, 1)?;
    keep_subnets_free(&lab)?;
    bring_up(&mut lab, &[])?;
    let (own, path) = (subnet(&lab, 0)?, lease_path(&lab, 0)?);
    let other = subnet(&lab, 1)?;
    let third = |subnet: IpNetwork| match subnet.ip() {
        IpAddr::V4(ip) => ip.octets()[2],
        IpAddr::V6(_) => unreachable!("the lab is IPv4"),
    };
    // Its own subnet and one beside it that is free.
    let first = if third(other) == third(own) + 1 { third(own) - 1 } else { third(own) };
    let config = format!(
        r#"{{"Network":"10.42.0.0/16","SubnetMin":"10.42.{first}.0","SubnetMax":"10.42.{}.0"}}"#,
        first + 1
    );
    put(&lab, "config", config)?;
    logs(&lab, 0, "in the network config has changed; going by it")?;
    assert!(lab.status(0)?.problems.is_empty());
    put(&lab, &path, r#"{"PublicIP":"10.168.0.200","PublicIPv6":null}"#)?;
    until("it has another subnet", || Ok(subnet(&lab, 0)? != own))?;
    assert!((first..=first + 1).contains(&third(subnet(&lab, 0)?)));

    put(&lab, "config", r#"{"Network":"10.44.0.0/16"}"#)?;
    for host in 0..2 {
        until("a restart is asked for", || {
            let problems = lab.status(host)?.problems;
            Ok(problems.iter().any(|problem| problem.contains("restart weftd to go by it")))
        })?;
    }
    lab.remove()
}

/// What a watch sees of an etcd, from an empty one on.
#[test]
fn a_watch_begins_unread_and_follows() -> Result<()> {
    let mut lab = hosts(1, 1)?;
    let registry = registry(&lab);
    put(&lab, "subnets/10.42.1.0-24", r#"{"PublicIP":"10.168.1.1"}"#)?;
    inside(&lab.host(0).netns, || async {
        let mut watch = registry.watch(Snapshot::default());
        assert!(!watch.borrow().readable);
        let found = watch.wait_for(|view| view.readable && view.snapshot.leases.len() == 1);
        tokio::time::timeout(DEADLINE, found).await??;
        let key = "10.42.2.0-24".parse()?;
        registry
            .create(&key, &attrs(2), Some(Duration::from_secs(2)))
            .await?
            .context("it is free")?;
        let found = watch.wait_for(|view| view.snapshot.leases.len() == 2);
        tokio::time::timeout(DEADLINE, found).await??;
        let gone = watch.wait_for(|view| view.snapshot.leases.len() == 1);
        tokio::time::timeout(DEADLINE, gone).await??;
        Ok(())
    })?;
    lab.etcd(0).kill()?;
    lab.remove()
}
