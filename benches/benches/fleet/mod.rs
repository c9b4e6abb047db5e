//! The leases of a whole fleet, in a real etcd.

use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use etcd_client::{Client, Txn, TxnOp};
use weft_control::Lease;

pub(crate) const PREFIX: &str = "/coreos.com/network";
/// etcd takes 128 operations a transaction.
const WRITES: usize = 100;
/// How long etcd may take to start.
const PATIENCE: Duration = Duration::from_secs(20);

/// Writes the network config and the leases.
pub(crate) async fn write(urls: &[String], config: &str, leases: &[Lease]) -> Result<()> {
    let begun = Instant::now();
    let mut client = Client::connect(urls, None).await?;
    while let Err(error) = client.put(format!("{PREFIX}/config"), config, None).await {
        ensure!(begun.elapsed() < PATIENCE, "{error}");
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    for some in leases.chunks(WRITES) {
        let mut puts = Vec::new();
        for lease in some {
            let key = format!("{PREFIX}/subnets/{}", lease.key);
            puts.push(TxnOp::put(key, serde_json::to_string(&lease.attrs)?, None));
        }
        client.txn(Txn::new().and_then(puts)).await?;
    }
    Ok(())
}
