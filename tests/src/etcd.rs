//! An etcd in the lab, and a client that looks at it and meddles with it as an operator would, by the
//! API that the lab's daemons use: `LAB_WEFT_ETCD_API=v2` is for both.

use std::env;
use std::future::Future;
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use etcd_client::{Client, ConnectOptions, DeleteOptions, GetOptions, PutOptions};
use serde_json::Value;
use tokio::task::JoinSet;
use ureq::Agent;
use weft_control::{Access, Etcd2Registry, Etcd3Registry, Registry};
use weft_daemon::lab::{EtcdOptions, Lab, LabOptions};
use weft_daemon::netns::NetNs;

use crate::{SUBNETS_KEPT_FREE, program, subnet, until};

/// flannel's default.
pub const PREFIX: &str = "/coreos.com/network";
/// More events than etcd keeps by its v2 API, and than it has in store for one who watches by v3;
/// and so long that the connection holds but some of them.
const WRITES: usize = 2_000;
const PADDING: usize = 8 << 10;
const WRITES_AT_ONCE: usize = 50;
/// Watches are told every now and then that nothing has happened; by default every ten minutes.
const PROGRESS: &str = "--experimental-watch-progress-notify-interval=500ms";

/// A key's value, and what else is known of it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Entry {
    pub value: String,
    /// Whether it has a time to live.
    pub ends: bool,
    pub revision: u64,
}

/// Whether daemons use the v2 API.
pub fn is_v2() -> bool {
    env::var("LAB_WEFT_ETCD_API").is_ok_and(|api| api == "v2")
}

/// Hosts, and an etcd that serves.
pub fn hosts(hosts: usize, members: usize) -> Result<Lab> {
    hosts_of("udp-tun", hosts, members)
}

/// The same with this backend.
pub fn hosts_of(backend: &str, hosts: usize, members: usize) -> Result<Lab> {
    let arguments = ["--enable-v2", PROGRESS].map(str::to_owned).to_vec();
    let etcd = EtcdOptions { members, arguments, tls: false };
    let lab =
        Lab::new(LabOptions { hosts, backend: backend.into(), etcd, ..LabOptions::default() })?;
    wait_until_it_serves(&lab)?;
    Ok(lab)
}

/// Waits until etcd answers.
pub fn wait_until_it_serves(lab: &Lab) -> Result<()> {
    until("etcd serves", || get(lab, "").map(|_| true))
}

/// A weftd for a host of this lab, as the lab would start it, to be changed further.
pub fn weftd(lab: &Lab, host: usize, flags: &[&str]) -> Result<Command> {
    let host = lab.host(host);
    let mut command = Command::new(program("weftd")?);
    command.arg("--network=10.42.0.0/16");
    command.arg(format!("--etcd-endpoints={}", lab.etcd_urls().join(",")));
    command.arg(if is_v2() { "--etcd-api=v2" } else { "--etcd-api=v3" });
    for (flag, path) in [
        ("--subnet-file", &host.subnet_file),
        ("--state-dir", &host.state_dir),
        ("--run-dir", &host.run_dir),
    ] {
        command.arg(flag).arg(path);
    }
    command.args(flags);
    Ok(command)
}

/// Keeps packets of etcd's clients from crossing the border of a namespace, and counts those with
/// which they ask for a connection.
pub fn cut(netns: &NetNs) -> Result<()> {
    let chain = |hook: &str| {
        format!(
            "chain {hook} {{ type filter hook {hook} priority 0; \
             tcp dport 2379 tcp flags & (syn | ack) == syn counter drop; \
             tcp dport 2379 drop; tcp sport 2379 drop; }};"
        )
    };
    netns.tool(
        "nft",
        &[&format!("add table ip cut {{ {} {} }}", chain("input"), chain("output"))],
    )?;
    Ok(())
}

/// Undoes [`cut`].
pub fn mend(netns: &NetNs) -> Result<()> {
    netns.tool("nft", &["delete table ip cut"]).map(drop)
}

/// Counts from now on how often clients ask for a connection to the etcd in this namespace.
pub fn count_connections(netns: &NetNs) -> Result<()> {
    let chain = "chain input { type filter hook input priority 0; \
                 tcp dport 2379 tcp flags & (syn | ack) == syn counter; }";
    netns.tool("nft", &[&format!("add table ip count {{ {chain}; }}")]).map(drop)
}

/// What the rules of [`cut`] or [`count_connections`] have counted.
pub fn connections(netns: &NetNs) -> Result<u64> {
    let rules = netns.tool("nft", &["list", "ruleset"])?;
    let counts = rules.split("counter packets ").skip(1);
    counts.map(|rest| Ok(rest.split(' ').next().context("no count")?.parse::<u64>()?)).sum()
}

/// Does asynchronous work inside a namespace.
pub fn inside<T: Send, F: Future<Output = Result<T>>>(
    netns: &NetNs,
    work: impl FnOnce() -> F + Send,
) -> Result<T> {
    netns.run(|| {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        runtime.block_on(work())
    })?
}

/// The registry that daemons of this lab use, for use on its first host.
pub fn registry(lab: &Lab) -> Box<dyn Registry> {
    let access = Access { endpoints: lab.etcd_urls(), ..Access::default() };
    if is_v2() {
        Box::new(Etcd2Registry::new(&access, PREFIX))
    } else {
        Box::new(Etcd3Registry::new(&access, PREFIX))
    }
}

/// Works with etcd itself by its v3 API, from the first host.
pub fn client<T: Send, F: Future<Output = Result<T>>>(
    lab: &Lab,
    work: impl FnOnce(Client) -> F + Send,
) -> Result<T> {
    client_of(lab, lab.etcd_urls(), work)
}

fn client_of<T: Send, F: Future<Output = Result<T>>>(
    lab: &Lab,
    urls: Vec<String>,
    work: impl FnOnce(Client) -> F + Send,
) -> Result<T> {
    inside(&lab.host(0).netns, || async move {
        let options = ConnectOptions::new().with_timeout(Duration::from_secs(5));
        work(Client::connect(urls, Some(options)).await?).await
    })
}

/// The member that leads the others, once all serve.
pub fn leader(lab: &Lab) -> Result<usize> {
    let mut leader = 0;
    until("a member of etcd leads", || {
        leader = who_leads(lab)?;
        Ok(true)
    })?;
    Ok(leader)
}

fn who_leads(lab: &Lab) -> Result<usize> {
    let urls = lab.etcd_urls();
    let asked = inside(&lab.host(0).netns, || async move {
        let mut leads = Vec::new();
        for url in urls {
            let status = Client::connect([url], None).await?.status().await?;
            let member = status.header().context("no header")?.member_id();
            leads.push(member == status.leader());
        }
        Ok(leads)
    });
    asked?.iter().position(|leads| *leads).context("nobody leads")
}

/// Asks by the v2 API: the first member that answers.
fn v2(lab: &Lab, ask: impl Fn(&Agent, String) -> Result<Value> + Sync) -> Result<Value> {
    let mut outcome = Err(anyhow::anyhow!("there is no etcd"));
    for url in lab.etcd_urls() {
        outcome = lab.host(0).netns.run(|| {
            let config = Agent::config_builder().http_status_as_error(false);
            let agent = config.timeout_global(Some(Duration::from_secs(3))).build().into();
            ask(&agent, format!("{url}/v2/keys{PREFIX}"))
        })?;
        if outcome.is_ok() {
            break;
        }
    }
    let answer = outcome?;
    match answer["errorCode"].as_u64() {
        None | Some(100) => Ok(answer),
        Some(_) => bail!("{answer}"),
    }
}

fn json(response: ureq::http::Response<ureq::Body>) -> Result<Value> {
    Ok(serde_json::from_str(&response.into_body().read_to_string()?)?)
}

fn put_by_v2(agent: &Agent, url: &str, value: &str) -> Result<Value> {
    json(agent.put(url).send_form([("value", value)])?)
}

/// What lies below the prefix and `path`.
pub fn get(lab: &Lab, path: &str) -> Result<Vec<Entry>> {
    if is_v2() {
        let query = "recursive=true&quorum=true";
        let answer =
            v2(lab, |agent, url| json(agent.get(format!("{url}/{path}?{query}")).call()?))?;
        let mut found = Vec::new();
        collect(&answer["node"], &mut found);
        return Ok(found);
    }
    let key = format!("{PREFIX}/{path}");
    client(lab, |mut client| async move {
        let found = client.get(key, Some(GetOptions::new().with_prefix())).await?;
        let entry = |kv: &etcd_client::KeyValue| {
            Ok(Entry {
                value: kv.value_str()?.to_owned(),
                ends: kv.lease() != 0,
                revision: u64::try_from(kv.mod_revision())?,
            })
        };
        found.kvs().iter().map(entry).collect()
    })
}

fn collect(node: &Value, found: &mut Vec<Entry>) {
    node["nodes"].as_array().into_iter().flatten().for_each(|node| collect(node, found));
    if let Some(value) = node["value"].as_str() {
        found.push(Entry {
            value: value.to_owned(),
            ends: node["expiration"].is_string(),
            revision: node["modifiedIndex"].as_u64().unwrap_or(0),
        });
    }
}

/// The key of a host's lease, below the prefix.
pub fn lease_path(lab: &Lab, host: usize) -> Result<String> {
    let subnet = subnet(lab, host)?;
    Ok(format!("subnets/{}-{}", subnet.network(), subnet.prefix()))
}

/// Writes a key below the prefix, without a time to live.
pub fn put(lab: &Lab, path: &str, value: impl Into<String>) -> Result<()> {
    let value = value.into();
    if is_v2() {
        let put = |agent: &Agent, url| put_by_v2(agent, &format!("{url}/{path}"), &value);
        return v2(lab, put).map(drop);
    }
    let key = format!("{PREFIX}/{path}");
    client(lab, |mut client| async move {
        client.put(key, value, Some(PutOptions::new())).await?;
        Ok(())
    })
}

/// The same by way of the other members: etcd's client goes to any, and one that hangs takes its time.
pub fn put_without(lab: &Lab, member: usize, path: &str, value: &str) -> Result<()> {
    if is_v2() {
        return put(lab, path, value);
    }
    let mut urls = lab.etcd_urls();
    urls.remove(member);
    let (key, value) = (format!("{PREFIX}/{path}"), value.to_owned());
    client_of(lab, urls, |mut client| async move {
        client.put(key, value, Some(PutOptions::new())).await?;
        Ok(())
    })
}

/// Removes what lies below the prefix and `path`.
pub fn delete(lab: &Lab, path: &str) -> Result<()> {
    if is_v2() {
        let path = path.trim_end_matches('/');
        let delete =
            |agent: &Agent, url| json(agent.delete(format!("{url}/{path}?recursive=true")).call()?);
        return v2(lab, delete).map(drop);
    }
    let key = format!("{PREFIX}/{path}");
    client(lab, |mut client| async move {
        client.delete(key, Some(DeleteOptions::new().with_prefix())).await?;
        Ok(())
    })
}

/// Writes a key so often, and so much each time, that who watches without reading falls behind, and
/// has etcd forget it.
pub fn outrun_watchers(lab: &Lab, path: &str, value: &str) -> Result<()> {
    let value = value.to_owned() + &" ".repeat(PADDING);
    if is_v2() {
        return v2(lab, |agent, url| {
            let url = format!("{url}/{path}");
            (1..WRITES).try_for_each(|_| put_by_v2(agent, &url, &value).map(drop))?;
            put_by_v2(agent, &url, &value)
        })
        .map(drop);
    }
    let key = format!("{PREFIX}/{path}");
    client(lab, |mut client| async move {
        let mut writes = JoinSet::new();
        for _ in 0..WRITES {
            let (mut client, key, value) = (client.clone(), key.clone(), value.clone());
            writes.spawn(async move { client.put(key, value, None).await });
            if writes.len() == WRITES_AT_ONCE {
                writes.join_next().await.context("no write")???;
            }
        }
        while let Some(written) = writes.join_next().await {
            written??;
        }
        let revision = client.get("x", None).await?.header().context("no header")?.revision();
        client.compact(revision, None).await?;
        Ok(())
    })
}

/// Puts [`SUBNETS_KEPT_FREE`] into the registry.
pub fn keep_subnets_free(lab: &Lab) -> Result<()> {
    put(lab, "config", SUBNETS_KEPT_FREE)
}

/// What those who watch a key are told first of what happened to it after a revision, all of which is over.
pub fn next_event(lab: &Lab, path: &str, after: u64) -> Result<Entry> {
    if !is_v2() {
        // The last one; a lease that is kept alive is none.
        let found = get_one(lab, path)?;
        ensure!(found.revision > after, "nothing has happened to it");
        return Ok(found);
    }
    let answer = next_change(lab, path, after)?;
    let mut found = Vec::new();
    collect(&answer["node"], &mut found);
    found.pop().with_context(|| format!("no value in {answer}"))
}

/// The same as the v2 API tells it.
fn next_change(lab: &Lab, path: &str, after: u64) -> Result<Value> {
    let query = format!("wait=true&waitIndex={}", after + 1);
    v2(lab, |agent, url| json(agent.get(format!("{url}/{path}?{query}")).call()?))
}

/// What the v2 API calls all that happened to a key after a revision, up to its end.
pub fn actions(lab: &Lab, path: &str, mut after: u64) -> Result<Vec<String>> {
    let mut actions = Vec::new();
    loop {
        let change = next_change(lab, path, after)?;
        actions.push(change["action"].as_str().context("no action")?.to_owned());
        if change["node"]["value"].is_null() {
            return Ok(actions);
        }
        after = change["node"]["modifiedIndex"].as_u64().context("no index")?;
    }
}

/// The one key below the prefix and `path`.
pub fn get_one(lab: &Lab, path: &str) -> Result<Entry> {
    if is_v2() {
        let query = "quorum=true";
        let answer =
            v2(lab, |agent, url| json(agent.get(format!("{url}/{path}?{query}")).call()?))?;
        let mut found = Vec::new();
        collect(&answer["node"], &mut found);
        return found.pop().with_context(|| format!("no key {path}"));
    }
    get(lab, path)?.into_iter().next().with_context(|| format!("no key {path}"))
}
