//! Leases in a real etcd: what is written there, and who owns what.

use std::collections::HashSet;
use std::fs;
use std::net::IpAddr;
use std::process::{Command, Stdio};
use std::time::Duration;

use anyhow::{Context, Result};
use ipnetwork::IpNetwork;
use tokio::runtime::Builder;
use weft_control::keeper::{Identity, Plan, plan};
use weft_control::lease::{Expiry, NodeRecord, Snapshot};
use weft_control::{LeaseAttrs, LeaseKey, NetworkConfig};
use weft_daemon::lab::Lab;
use weft_tests::etcd::{
    actions, delete, get, get_one, hosts, inside, is_v2, keep_subnets_free, lease_path, next_event,
    put, registry, wait_until_it_serves,
};
use weft_tests::{
    DEADLINE, Killed, all_acquainted, bring_up, health, log, logs, pings, renews, subnet, tells,
    until,
};

const DAY: Duration = Duration::from_secs(86_400);

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
        let renewed = registry.renew(&first, &attrs(2), Some(DAY)).await?.context("it is ours")?;
        assert!(renewed.revision > first.revision);
        for last in [1, 2] {
            let again = registry.renew(&first, &attrs(last), Some(DAY)).await?;
            assert_eq!(again, None, "it was written since");
        }
        let renewed = registry.renew(&renewed, &attrs(2), Some(2 * DAY)).await?.context("ours")?;
        let left = registry.time_left(&renewed).await?.context("it ends")?;
        assert!(left > DAY, "{left:?}");
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

/// By the v2 API, flannel understands "delete" and "expire", and takes anything else for a lease.
#[test]
fn flannel_understands_that_a_lease_is_removed() -> Result<()> {
    if !is_v2() {
        return Ok(());
    }
    let lab = hosts(1, 1)?;
    let registry = registry(&lab);
    let lease = inside(&lab.host(0).netns, || async {
        let lease = registry.create(&"10.3.1.0-24".parse()?, &attrs(1), Some(DAY)).await?;
        let lease = lease.context("it is free")?;
        assert!(registry.remove(&lease).await?);
        Ok(lease)
    })?;
    let actions = actions(&lab, "subnets/10.3.1.0-24", lease.revision)?;
    assert_eq!(actions, ["compareAndSwap", "expire"]);
    lab.remove()
}

/// All watch all records: each node that refreshes its own would wake the whole fleet.
#[test]
fn a_record_that_is_published_again_wakes_nobody() -> Result<()> {
    let lab = hosts(1, 1)?;
    lab.host(0).netns.run(|| publish_again_and_again(&lab))??;
    lab.remove()
}

fn publish_again_and_again(lab: &Lab) -> Result<()> {
    let (registry, runtime) = (registry(lab), Builder::new_current_thread().enable_all().build()?);
    let mut node = NodeRecord {
        id: "ab".repeat(16),
        name: "host".into(),
        public_ip: Some([192, 0, 2, 2].into()),
        public_ipv6: None,
        addresses: Vec::new(),
        version: "0".into(),
        mtu: 1472,
        probe_port: None,
    };
    let path = format!("weft/nodes/{}", node.id);
    let publish =
        |node: &NodeRecord| runtime.block_on(registry.publish_node(node, Duration::from_secs(60)));
    publish(&node)?;
    let first = get_one(lab, &path)?;
    assert!(first.ends && first.value.contains("1472"));
    publish(&node)?;
    let again = get_one(lab, &path)?;
    assert!(again.ends && again.value == first.value, "{again:?}");
    // By v2 the key's index grows with each refresh, and only those who watch see no event.
    assert!(is_v2() || again.revision == first.revision, "{again:?}");
    node.mtu = 1400;
    publish(&node)?;
    let told = next_event(lab, &path, first.revision)?;
    assert!(told.value.contains("1400"), "{told:?}");
    delete(lab, &path)?;
    publish(&node)?;
    let found = get_one(lab, &path)?;
    assert!(found.ends && found.value == told.value, "{found:?}");
    Ok(())
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
    renews(&lab, 1)?;
    let found = get_one(&lab, "subnets/10.42.7.0-24")?;
    assert!(!found.ends);
    assert_eq!(found.value, format!(r#"{{"PublicIP":"{address}","PublicIPv6":null}}"#));
    pings(&lab)?;
    lab.remove()
}

/// Two leases of one node would be two peers to all others, of which one never answers.
#[test]
fn who_takes_up_a_reservation_gives_up_the_lease() -> Result<()> {
    let mut lab = hosts(2, 1)?;
    bring_up(&mut lab, &[])?;
    let former = lease_path(&lab, 0)?;
    let held = [former.clone(), lease_path(&lab, 1)?];
    let mut free = (7..10).map(|at| format!("subnets/10.42.{at}.0-24"));
    let reserved = free.find(|path| !held.contains(path)).context("three are more than two")?;
    put(&lab, &reserved, format!(r#"{{"PublicIP":"{}"}}"#, lab.host(0).address))?;
    // Until then only its own node says anything of it.
    tells(&lab, 0, "is reserved for this node; restart weftd to take it")?;
    let config = get_one(&lab, "config")?.value;
    delete(&lab, "config")?;
    tells(&lab, 1, "the network config is gone")?;
    let other = lab.status(1)?;
    assert_eq!((other.peers.len(), other.problems.len()), (1, 1), "{other:?}");
    put(&lab, "config", config)?;
    logs(&lab, 1, "resolved: the network config is gone")?;
    lab.stop_daemon(0)?;
    lab.start_daemon(0, &[])?;
    until("it has the reservation", || {
        Ok(lab.status(0)?.lease_reserved && lease_path(&lab, 0)? == reserved)
    })?;
    assert!(get(&lab, &former)?.is_empty());
    all_acquainted(&lab)?;
    logs(&lab, 1, "a peer has left")?;
    logs(&lab, 1, "a peer has joined")?;
    lab.remove()
}

/// What is told of it; that it is renewed when that is due, `a_reservation_stays_one` shows.
#[test]
fn a_lease_is_renewed_by_the_margin_before_it_ends() -> Result<()> {
    let mut lab = hosts(1, 1)?;
    // In minutes; half of the lease is the most.
    for (margin, minutes) in [(20, 20), (100, 90)] {
        let margin = format!("--subnet-lease-renew-margin={margin}");
        lab.start_daemon(0, &["--subnet-lease-ttl=3h", &margin])?;
        lab.wait_ready(0, DEADLINE)?;
        let status = lab.status(0)?;
        let renewal = status.lease_renewal.context("no renewal")?;
        let left = status.lease_expires.context("no end")?.duration_since(renewal).as_secs();
        assert!((left - minutes * 60).abs() < 60, "{margin}: {left} s before the end");
        lab.stop_daemon(0)?;
    }
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
                let mut rng = fastrand::Rng::with_seed(last.into());
                loop {
                    let leases = registry.snapshot().await?.leases;
                    let next =
                        plan(&config, &identity, &LeaseKey::default(), &leases, &[], &mut rng);
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
        (
            "subnets/10.42.9.0-24",
            ours.as_str(),
            "is reserved for this node, and the network config does not allow it",
        ),
    ] {
        put(&lab, path, value)?;
        tells(&lab, 0, said).with_context(|| path.to_owned())?;
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

/// etcd's grpc-proxy tells whoever joins a watch that it has less than the first.
#[test]
fn a_watch_through_a_proxy_lasts() -> Result<()> {
    if is_v2() {
        return Ok(());
    }
    let mut lab = hosts(2, 1)?;
    wait_until_it_serves(&lab)?;
    let mut proxy = Command::new("etcd");
    proxy.args(["grpc-proxy", "start", "--endpoints=http://10.168.0.1:2379"]);
    proxy.arg("--listen-addr=10.168.0.1:23790");
    proxy.stdout(Stdio::null()).stderr(Stdio::null());
    let _proxy = Killed(lab.etcd(0).netns.spawn(&mut proxy)?);
    bring_up(&mut lab, &["--etcd-endpoints=http://10.168.0.1:23790", "--log-level=debug"])?;
    all_acquainted(&lab)?;
    for host in 0..2 {
        assert!(lab.status(host)?.registry.contains("10.168.0.1:23790"));
        let log = log(&lab, host)?;
        assert!(!log.contains("listing etcd"), "{log}");
    }
    lab.remove()
}

/// Nobody can tell whose it is, so it is nobody's to overwrite; another subnet would cut containers off.
#[test]
fn a_lease_of_ours_that_cannot_be_read_is_told_and_waited_for() -> Result<()> {
    let mut lab = hosts(2, 1)?;
    bring_up(&mut lab, &[])?;
    let (before, path) = (subnet(&lab, 0)?, lease_path(&lab, 0)?);
    put(&lab, &path, "reserved")?;
    logs(&lab, 0, "cannot be read")?;
    assert!(lab.status(0)?.state.contains("correct or delete that entry"));
    assert_eq!((subnet(&lab, 0)?, get_one(&lab, &path)?.value), (before, "reserved".into()));
    delete(&lab, &path)?;
    until("the lease is back", || Ok(get_one(&lab, &path)?.value.contains("PublicIP")))?;
    until("all is well", || Ok(lab.status(0)?.problems.is_empty()))?;
    all_acquainted(&lab)?;
    assert_eq!(subnet(&lab, 0)?, before);
    pings(&lab)?;
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
            let host = lab.host(host);
            fs::remove_file(&host.subnet_file)?;
            fs::remove_dir_all(&host.state_dir)?;
        }
    }
    lab.remove()
}

/// A backend that cannot start, for another program has its route, costs no lease.
#[test]
fn a_lease_is_kept_while_nothing_forwards() -> Result<()> {
    let mut lab = hosts(1, 1)?;
    // Between two tries to start there are five seconds.
    lab.start_daemon(0, &["--subnet-lease-ttl=16s"])?;
    lab.wait_ready(0, DEADLINE)?;
    let (own, netns) = (subnet(&lab, 0)?, &lab.host(0).netns);
    netns.ip(&["link", "del", "flannel0"])?;
    until("its route is another's", || {
        // Until then it is weft's own again and again.
        let _ = netns.ip(&["route", "add", "10.42.0.0/16", "dev", "eth0"]);
        let _ = netns.ip(&["link", "del", "flannel0"]);
        Ok(lab.status(0)?.state.contains("already leads to eth0"))
    })?;
    for _ in 0..3 {
        renews(&lab, 0)?;
    }
    assert!(lab.status(0)?.state.contains("already leads to eth0"));
    netns.ip(&["route", "del", "10.42.0.0/16"])?;
    lab.wait_ready(0, DEADLINE)?;
    assert_eq!(subnet(&lab, 0)?, own);
    assert!(!log(&lab, 0)?.contains("claiming it again"));
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
        tells(&lab, host, "restart weftd to go by it")?;
    }
    for (config, why) in [
        (
            r#"{"Network":"10.42.0.0/16","Backend":{"Type":"ipip"}}"#,
            "there are udp, vxlan and host-gw",
        ),
        (r#"{"Network":"10.42.0.0/16","Backend":{"Type":"udp","Port":"x"}}"#, "Port must be"),
        (r#"{"Network":"10.0.0.0/8"}"#, "choose another Network"),
    ] {
        put(&lab, "config", config)?;
        tells(&lab, 0, "has become one that weftd would not start with")?;
        tells(&lab, 0, why)?;
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
