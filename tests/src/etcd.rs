//! An etcd in the lab, and a client that looks at it and meddles with it as an operator would.

use std::future::Future;

use anyhow::{Context, Result};
use etcd_client::{Client, ConnectOptions, DeleteOptions, GetOptions, KeyValue, PutOptions};
use weft_control::{Access, Etcd3Registry};
use weft_daemon::lab::{EtcdOptions, Lab, LabOptions};
use weft_daemon::netns::NetNs;

use crate::until;

/// flannel's default.
pub const PREFIX: &str = "/coreos.com/network";

/// Hosts, and an etcd that serves.
pub fn hosts(hosts: usize, members: usize) -> Result<Lab> {
    let etcd = EtcdOptions { members, ..EtcdOptions::default() };
    let lab = Lab::new(LabOptions { hosts, etcd, ..LabOptions::default() })?;
    wait_until_it_serves(&lab)?;
    Ok(lab)
}

/// Waits until etcd answers.
pub fn wait_until_it_serves(lab: &Lab) -> Result<()> {
    until("etcd serves", || get(lab, "").map(|_| true))
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
pub fn registry(lab: &Lab) -> Etcd3Registry {
    Etcd3Registry::new(Access { endpoints: lab.etcd_urls(), ..Access::default() }, PREFIX)
}

/// Works with etcd itself, from the first host.
pub fn client<T: Send, F: Future<Output = Result<T>>>(
    lab: &Lab,
    work: impl FnOnce(Client) -> F + Send,
) -> Result<T> {
    let urls = lab.etcd_urls();
    inside(&lab.host(0).netns, || async move {
        let options = ConnectOptions::new().with_timeout(std::time::Duration::from_secs(5));
        work(Client::connect(urls, Some(options)).await?).await
    })
}

/// What lies below the prefix and `path`.
pub fn get(lab: &Lab, path: &str) -> Result<Vec<KeyValue>> {
    let key = format!("{PREFIX}/{path}");
    client(lab, |mut client| async move {
        let found = client.get(key, Some(GetOptions::new().with_prefix())).await?;
        Ok(found.kvs().to_vec())
    })
}

/// Writes a key below the prefix, with a time to live where one is given.
pub fn put(lab: &Lab, path: &str, value: impl Into<Vec<u8>>, ttl: Option<i64>) -> Result<()> {
    let (key, value) = (format!("{PREFIX}/{path}"), value.into());
    client(lab, |mut client| async move {
        let mut options = PutOptions::new();
        if let Some(ttl) = ttl {
            options = options.with_lease(client.lease_grant(ttl, None).await?.id());
        }
        client.put(key, value, Some(options)).await?;
        Ok(())
    })
}

/// Removes what lies below the prefix and `path`.
pub fn delete(lab: &Lab, path: &str) -> Result<()> {
    let key = format!("{PREFIX}/{path}");
    client(lab, |mut client| async move {
        client.delete(key, Some(DeleteOptions::new().with_prefix())).await?;
        Ok(())
    })
}

/// The one key below the prefix and `path`.
pub fn get_one(lab: &Lab, path: &str) -> Result<KeyValue> {
    get(lab, path)?.into_iter().next().with_context(|| format!("no key {path}"))
}
