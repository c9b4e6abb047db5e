//! A real etcd that is away, in part, for a while or for longer, and what goes on meanwhile.

use std::fs;
use std::net::SocketAddr;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use etcd_client::{AlarmAction, AlarmType};
use rustix::process::{Pid, Signal, kill_process};
use weft_daemon::lab::{Lab, PingOptions};
use weft_daemon::netns::NetNs;
use weft_tests::etcd::{
    client, connections, count_connections, cut, delete, get, get_one, hosts, hosts_of, is_v2,
    keep_subnets_free, leader, lease_path, mend, outrun_watchers, put, put_without,
    wait_until_it_serves,
};
use weft_tests::slow_proxy::SlowProxy;
use weft_tests::{
    DEADLINE, all_acquainted, bring_up, log, logs, pings, renews, subnet, tells, until,
};

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
        let of_ends = ["our lease is gone; claiming it again", "together with ours"];
        told.retain(|line| !is_v2() || !of_ends.iter().any(|it| line.contains(it)));
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
    renews(&lab, 0)?;
    renews(&lab, 0)?;
    assert_eq!(connections(&lab.etcd(0).netns)?, asked);
    let log = log(&lab, 0)?;
    assert!(alarms(&log).is_empty(), "{log}");
    lab.remove()
}

/// etcd can be read but not written to, as when its disk is full: leases live on all the same.
#[test]
fn what_cannot_be_written_is_told_until_it_can() -> Result<()> {
    if is_v2() {
        // The alarm is for the v3 API's store.
        return Ok(());
    }
    let mut lab = hosts(1, 1)?;
    lab.start_daemon(0, &["--subnet-lease-ttl=10s"])?;
    lab.wait_ready(0, DEADLINE)?;
    let alarm = |action: AlarmAction| {
        client(&lab, |mut client| async move {
            client.alarm(action, AlarmType::Nospace, None).await?;
            Ok(())
        })
    };
    alarm(AlarmAction::Activate)?;
    let (own, path) = (subnet(&lab, 0)?, lease_path(&lab, 0)?);
    let revision = get_one(&lab, &path)?.revision;
    for _ in 0..3 {
        renews(&lab, 0)?;
    }
    assert_eq!(get_one(&lab, &path)?.revision, revision);
    assert_eq!(alarms(&log(&lab, 0)?), Vec::<&str>::new());
    delete(&lab, &path)?;
    logs(&lab, 0, "space exceeded")?;
    assert!(!log(&lab, 0)?.contains("is away"));
    alarm(AlarmAction::Deactivate)?;
    until("it has its lease again", || Ok(get_one(&lab, &path)?.revision > revision))?;
    until("all is well", || Ok(lab.status(0)?.problems.is_empty()))?;
    assert_eq!(subnet(&lab, 0)?, own);
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
    // Peers could not hear of another port.
    let answered = lab.status(1)?.peers[0].probe.answered;
    until("probes are answered as before", || {
        Ok(lab.status(1)?.peers[0].probe.answered > answered)
    })?;
    assert_eq!(lab.status(1)?.peers[0].probe.fault, None);
    lab.start_etcd(0)?;
    until("the lease is renewed", || Ok(lab.status(0)?.lease_expires.is_some()))
        .with_context(|| log(&lab, 0).unwrap_or_default())?;
    assert_eq!(subnet(&lab, 0)?, before);
    pings(&lab)?;
    lab.remove()
}

/// Nobody could be told of its address.
#[test]
fn a_host_that_moved_during_an_outage_starts_with_what_it_knew() -> Result<()> {
    let mut lab = hosts(2, 1)?;
    bring_up(&mut lab, &[])?;
    let before = subnet(&lab, 0)?;
    lab.etcd(0).kill()?;
    let host = NetNs::open(lab.host(0).netns.name());
    host.ip(&["-4", "address", "flush", "dev", "eth0"])?;
    host.ip(&["address", "add", "10.168.0.60/24", "dev", "eth0"])?;
    host.ip(&["route", "add", "default", "dev", "eth0"])?;
    let here = Some("10.168.0.60".parse()?);
    until("it has moved", || Ok(lab.status(0)?.public_ip == here))?;
    lab.kill_daemon(0)?;
    lab.start_daemon(0, &[])?;
    lab.wait_ready(0, DEADLINE)?;
    logs(&lab, 0, "starting with the lease and the 1 peers known at")?;
    assert_eq!((subnet(&lab, 0)?, lab.status(0)?.public_ip), (before, here));
    lab.start_etcd(0)?;
    until("peers know", || Ok(lab.status(1)?.peers.iter().any(|it| Some(it.public_ip) == here)))?;
    lab.remove()
}

/// The range of subnets was widened while the node ran, which took one beyond the former range.
#[test]
fn a_restart_during_an_outage_goes_by_the_config_that_was_followed() -> Result<()> {
    let mut lab = hosts(1, 1)?;
    let config = |last: u8| {
        format!(
            r#"{{"Network":"10.42.0.0/16","SubnetMin":"10.42.7.0","SubnetMax":"10.42.{last}.0"}}"#
        )
    };
    put(&lab, "config", config(7))?;
    lab.start_daemon(0, &[])?;
    lab.wait_ready(0, DEADLINE)?;
    put(&lab, "config", config(8))?;
    logs(&lab, 0, "in the network config has changed; going by it")?;
    put(&lab, "subnets/10.42.7.0-24", r#"{"PublicIP":"10.168.0.200","PublicIPv6":null}"#)?;
    until("it has the other subnet", || Ok(subnet(&lab, 0)?.to_string() == "10.42.8.0/24"))?;
    until("both are written down", || {
        let files = fs::read_dir(&lab.host(0).state_dir)?;
        let texts = files.map(|file| Ok(fs::read_to_string(file?.path())?));
        let text = texts.collect::<Result<String>>()?;
        Ok(text.contains(r#"SubnetMax\":\"10.42.8.0"#) && text.contains(r#""key":"10.42.8.0-24"#))
    })?;
    lab.etcd(0).kill()?;
    logs(&lab, 0, "is away")?;
    lab.kill_daemon(0)?;
    lab.start_daemon(0, &[])?;
    lab.wait_ready(0, DEADLINE)?;
    assert_eq!(subnet(&lab, 0)?.to_string(), "10.42.8.0/24");
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
    tells(&lab, 0, "config is gone")?;
    pings(&lab)?;
    lab.remove()
}

/// A restored backup, or another cluster, knows nobody: who claims anew does not wait for the others.
#[test]
fn peers_that_the_registry_lost_are_sent_packets_for_a_while() -> Result<()> {
    let mut lab = hosts_of("vxlan", 2, 1)?;
    bring_up(&mut lab, &[])?;
    let frozen = Pid::from_raw(lab.status(1)?.pid.try_into()?).context("no process")?;
    lab.etcd(0).kill()?;
    kill_process(frozen, Signal::STOP)?;
    fs::remove_dir_all(&lab.etcd(0).data)?;
    lab.start_etcd(0)?;
    until("the lease is there again", || Ok(get(&lab, "subnets/")?.len() == 1))?;
    tells(&lab, 0, "the registry has lost leases of peers together with ours")?;
    assert_eq!(lab.status(0)?.peers.len(), 1);
    assert!(lab.ping(0, 1, &PingOptions::default())?.complete());
    kill_process(frozen, Signal::CONT)?;
    until("both leases are there", || Ok(get(&lab, "subnets/")?.len() == 2))?;
    until("nobody is missing", || {
        let problems = lab.status(0)?.problems;
        Ok(!problems.iter().any(|it| it.contains("together with ours")))
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
    bring_up(&mut lab, &["--log-level=debug"])?;
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
        let log = log(&lab, host)?;
        assert!(!log.contains("is away"), "{log}");
        // By v3, another member goes on where the first left off.
        assert!(is_v2() || log.contains("following etcd"), "{log}");
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

/// A daemon that slept through a compaction of what it watched lists anew, and compares: somebody has
/// come, somebody has gone, and somebody has moved.
#[test]
fn compaction_past_our_revision_loses_nothing() -> Result<()> {
    let mut lab = hosts(2, 1)?;
    keep_subnets_free(&lab)?;
    bring_up(&mut lab, &["--log-level=debug"])?;
    put(&lab, "subnets/10.42.202.0-24", r#"{"PublicIP":"10.168.2.1"}"#)?;
    until("it is known", || Ok(lab.status(0)?.peers.len() == 2))?;
    let pid = i32::try_from(lab.status(0)?.pid)?;
    let pid = Pid::from_raw(pid).context("no pid")?;
    kill_process(pid, Signal::STOP)?;
    outrun_watchers(&lab, "subnets/10.42.200.0-24", r#"{"PublicIP":"10.168.1.1"}"#)?;
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
    let why = if is_v2() {
        "the index to wait for is cleared"
    } else {
        "the revision to watch from is compacted"
    };
    logs(&lab, 0, &format!(" anew: {why}"))?;
    pings(&lab)?;
    lab.remove()
}
