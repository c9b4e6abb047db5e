//! The directory registry: one file a lease, for the daemons of one host.
//!
//! `config` is the network config; `subnets/<key>` holds a lease's value as etcd would, with one
//! more key, `Expires`; `weft/nodes/<id>` holds the nodes' own records. Files that an operator puts
//! or removes by hand count.

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use jiff::Timestamp;
use tokio::sync::watch;
use tokio::time::Instant;

use super::notices::Notices;
use super::store::Store;
use super::{Registry, RegistryError, View};
use crate::keeper;
use crate::lease::{Expiry, Lease, LeaseAttrs, LeaseKey, NodeRecord, Snapshot, end_of};

/// Notices can get lost (inotify(7), queue overflow), so everything is read again this often.
const RESCAN_INTERVAL: Duration = Duration::from_secs(10);
/// Between looks at a directory that is away.
const AWAY_INTERVAL: Duration = Duration::from_millis(500);
/// Notices come in bursts; one look answers all of them.
const SETTLE: Duration = Duration::from_millis(5);

/// The registry in a directory.
#[derive(Debug, Clone)]
pub struct DirectoryRegistry {
    store: Arc<Store>,
}

impl DirectoryRegistry {
    /// Opens it.
    ///
    /// # Errors
    /// The directory is missing, or lies on a network file system.
    pub fn open(path: &Path) -> Result<Self, RegistryError> {
        Ok(Self { store: Arc::new(Store::open(path)?) })
    }

    /// Opens it, and makes what is missing.
    ///
    /// # Errors
    /// The directory cannot be made, or lies on a network file system.
    pub fn make(path: &Path) -> Result<Self, RegistryError> {
        Ok(Self { store: Arc::new(Store::make(path)?) })
    }

    /// Where the kernel gives no notices, the regular look stands in.
    fn follow(&self, notices: &mut Notices) {
        if let Err(error) = notices.follow() {
            tracing::warn!(
                "no notices of changes in {}: {error}; it is read every {} s instead (raise the \
                 sysctl fs.inotify.max_user_instances)",
                self.store.path().display(),
                RESCAN_INTERVAL.as_secs()
            );
        }
    }

    /// Runs file work on a thread that may block.
    async fn blocking<T: Send + 'static>(
        &self,
        work: impl FnOnce(&Store) -> Result<T, RegistryError> + Send + 'static,
    ) -> Result<T, RegistryError> {
        let store = Arc::clone(&self.store);
        tokio::task::spawn_blocking(move || work(&store))
            .await
            .map_err(|error| RegistryError::Task(error.to_string()))?
    }
}

#[async_trait]
impl Registry for DirectoryRegistry {
    fn describe(&self) -> String {
        format!("dir:{}", self.store.path().display())
    }

    fn identity(&self) -> String {
        self.describe()
    }

    async fn snapshot(&self) -> Result<Snapshot, RegistryError> {
        self.blocking(|store| Ok(store.scan()?.snapshot)).await
    }

    async fn init_config(&self, text: &str) -> Result<bool, RegistryError> {
        let text = text.to_owned();
        self.blocking(move |store| {
            let locked = store.lock()?;
            let is_free = Store::read(&store.config_path())?.is_none();
            if is_free {
                locked.write_config(&text)?;
            }
            Ok(is_free)
        })
        .await
    }

    async fn create(
        &self,
        key: &LeaseKey,
        attrs: &LeaseAttrs,
        ttl: Option<Duration>,
    ) -> Result<Option<Lease>, RegistryError> {
        let expires = Expiry::after(ttl);
        let lease = Lease { key: *key, attrs: attrs.clone(), expires, revision: 0 };
        self.blocking(move |store| {
            let locked = store.lock()?;
            locked.sweep()?;
            let snapshot = store.scan()?.snapshot;
            let config = snapshot.network_config();
            let is_in_the_way =
                |other: &LeaseKey| keeper::is_in_the_way(config.as_ref(), other, &lease.key);
            let mut others = snapshot.leases.iter();
            let is_free = !others.any(|it| it.key != lease.key && is_in_the_way(&it.key));
            let created = is_free && locked.create_lease(&lease)?;
            Ok(created.then_some(lease))
        })
        .await
    }

    async fn renew(
        &self,
        seen: &Lease,
        attrs: &LeaseAttrs,
        ttl: Option<Duration>,
    ) -> Result<Option<Lease>, RegistryError> {
        let (seen, attrs) = (seen.clone(), attrs.clone());
        self.blocking(move |store| {
            let locked = store.lock()?;
            let current = locked.lease(&seen.key);
            let Some(current) = current.filter(|it| it.attrs.same_node(&seen.attrs)) else {
                return Ok(None);
            };
            if (current.expires == Expiry::Never) != (seen.expires == Expiry::Never) {
                return Ok(None);
            }
            let expires = Expiry::after(ttl);
            let lease = Lease { key: seen.key, attrs, expires, revision: 0 };
            locked.write_lease(&lease)?;
            Ok(Some(lease))
        })
        .await
    }

    async fn remove(&self, seen: &Lease) -> Result<bool, RegistryError> {
        let seen = seen.clone();
        self.blocking(move |store| {
            let locked = store.lock()?;
            let is_it =
                locked.lease(&seen.key).is_some_and(|current| current.attrs.same_node(&seen.attrs));
            if is_it {
                locked.remove_lease(&seen.key)?;
            }
            Ok(is_it)
        })
        .await
    }

    async fn time_left(&self, lease: &Lease) -> Result<Option<Duration>, RegistryError> {
        let Some(end) = lease.expires.end() else { return Ok(None) };
        Ok(Duration::try_from(end.duration_since(Timestamp::now())).ok())
    }

    async fn publish_node(&self, node: &NodeRecord, ttl: Duration) -> Result<(), RegistryError> {
        let node = node.clone();
        self.blocking(move |store| {
            let locked = store.lock()?;
            locked.sweep()?;
            locked.write_node(&node, end_of(ttl))
        })
        .await
    }

    fn watch(&self, last: Snapshot) -> watch::Receiver<View> {
        let directories = [self.store.path(), self.store.subnets(), self.store.nodes()];
        let notices = Notices::new(directories.map(Path::to_owned).to_vec());
        let view = View { snapshot: Arc::new(last), readable: false };
        let (sender, receiver) = watch::channel(view);
        tokio::spawn(Watching { registry: self.clone(), notices, sender }.run());
        receiver
    }
}

/// The background of one [`Registry::watch`].
struct Watching {
    registry: DirectoryRegistry,
    notices: Notices,
    sender: watch::Sender<View>,
}

impl Watching {
    async fn run(mut self) {
        let mut away = false;
        let mut next_expiry = None;
        loop {
            // Notices that came meanwhile are answered by the look below, and before it, so that
            // nothing happens unnoticed between the two.
            self.notices.drain();
            self.registry.follow(&mut self.notices);
            match self.registry.blocking(Store::scan).await {
                Ok(scan) => {
                    if std::mem::take(&mut away) {
                        tracing::warn!("{} is back", self.registry.describe());
                    }
                    next_expiry = scan.next_expiry;
                    View::publish(&self.sender, scan.snapshot);
                }
                Err(error) => {
                    if !std::mem::replace(&mut away, true) {
                        tracing::error!(
                            "{} is away, going on with what was last read: {error}",
                            self.registry.describe()
                        );
                    }
                    self.sender.send_if_modified(|view| std::mem::take(&mut view.readable));
                }
            }
            tokio::select! {
                () = self.sender.closed() => return,
                () = self.notices.changed() => tokio::time::sleep(SETTLE).await,
                () = tokio::time::sleep_until(next_look(next_expiry, away)) => {}
            }
        }
    }
}

fn next_look(next_expiry: Option<Timestamp>, away: bool) -> Instant {
    if away {
        // What expires meanwhile cannot be looked at either.
        return Instant::now() + AWAY_INTERVAL;
    }
    let until_expiry = next_expiry
        .map(|end| Duration::try_from(end.duration_since(Timestamp::now())).unwrap_or_default());
    Instant::now() + until_expiry.map_or(RESCAN_INTERVAL, |left| left.min(RESCAN_INTERVAL) + SETTLE)
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;
    use std::fs;

    use super::super::minimal_config;
    use crate::config::NetworkConfig;
    use crate::keeper::{Identity, Plan, plan};

    use super::*;

    const DAY: Duration = Duration::from_secs(86_400);
    const DEADLINE: Duration = Duration::from_secs(15);

    struct Fixture {
        dir: tempfile::TempDir,
        registry: DirectoryRegistry,
    }

    fn fixture() -> Fixture {
        let dir = tempfile::tempdir().unwrap();
        let registry = DirectoryRegistry::make(&dir.path().join("registry")).unwrap();
        Fixture { dir, registry }
    }

    fn attrs(last: u8) -> LeaseAttrs {
        LeaseAttrs { public_ip: Some([192, 0, 2, last].into()), ..LeaseAttrs::default() }
    }

    fn key(text: &str) -> LeaseKey {
        text.parse().unwrap()
    }

    /// Waits for a snapshot of which `ask` holds.
    async fn until(
        watch: &mut watch::Receiver<View>,
        ask: impl Fn(&Snapshot) -> bool,
    ) -> Arc<Snapshot> {
        let found = watch.wait_for(|view| view.readable && ask(&view.snapshot));
        let view = tokio::time::timeout(DEADLINE, found).await.unwrap().unwrap().clone();
        view.snapshot
    }

    #[tokio::test]
    async fn a_lease_is_etcds_value_and_an_end() {
        let Fixture { dir, registry } = fixture();
        registry.create(&key("10.3.1.0-24"), &attrs(1), Some(DAY)).await.unwrap().unwrap();
        let path = dir.path().join("registry/subnets/10.3.1.0-24");
        let text = fs::read_to_string(&path).unwrap();
        assert!(
            text.starts_with(r#"{"PublicIP":"192.0.2.1","PublicIPv6":null,"Expires":"2"#),
            "{text}"
        );
        let listed: Vec<_> = fs::read_dir(path.parent().unwrap()).unwrap().collect();
        assert_eq!(listed.len(), 1, "nothing but leases");
    }

    #[tokio::test]
    async fn writes_are_conditional() {
        let Fixture { dir: _dir, registry } = fixture();
        let first =
            registry.create(&key("10.3.1.0-24"), &attrs(1), Some(DAY)).await.unwrap().unwrap();
        assert_eq!(registry.create(&key("10.3.1.0-24"), &attrs(2), Some(DAY)).await.unwrap(), None);
        let renewed = registry.renew(&first, &attrs(1), Some(DAY * 2)).await.unwrap().unwrap();
        let end = |lease: &Lease| match lease.expires {
            Expiry::At(end) => end,
            other @ (Expiry::Never | Expiry::Unknown) => panic!("{other:?}"),
        };
        assert!(end(&renewed) > end(&first));
        let others = Lease { attrs: attrs(2), ..first.clone() };
        assert_eq!(registry.renew(&others, &attrs(2), Some(DAY)).await.unwrap(), None);
        assert!(!registry.remove(&others).await.unwrap());
        assert!(registry.remove(&first).await.unwrap());
        assert!(!registry.remove(&first).await.unwrap());
        assert_eq!(registry.renew(&first, &attrs(1), Some(DAY)).await.unwrap(), None);
    }

    #[tokio::test]
    async fn a_reservation_stays_one() {
        let Fixture { dir, registry } = fixture();
        let path = dir.path().join("registry/subnets/10.3.1.0-24");
        fs::write(path, r#"{"PublicIP":"192.0.2.1"}"#).unwrap();
        let seen = registry.snapshot().await.unwrap().leases.remove(0);
        assert_eq!(seen.expires, Expiry::Never);
        let renewed = registry.renew(&seen, &attrs(1), None).await.unwrap().unwrap();
        assert_eq!(renewed.expires, Expiry::Never);
    }

    #[tokio::test]
    async fn an_expired_lease_may_be_had() {
        let Fixture { dir, registry } = fixture();
        let path = dir.path().join("registry/subnets/10.3.1.0-24");
        fs::write(path, r#"{"PublicIP":"192.0.2.1","Expires":"2020-01-01T00:00:00Z"}"#).unwrap();
        assert_eq!(registry.snapshot().await.unwrap().leases, []);
        let seen =
            Lease { key: key("10.3.1.0-24"), attrs: attrs(1), expires: Expiry::Never, revision: 0 };
        assert_eq!(registry.renew(&seen, &attrs(1), Some(DAY)).await.unwrap(), None);
        assert!(registry.create(&seen.key, &attrs(2), Some(DAY)).await.unwrap().is_some());
    }

    #[tokio::test]
    async fn what_cannot_be_read_is_named_and_harms_nobody() {
        let Fixture { dir, registry } = fixture();
        let subnets = dir.path().join("registry/subnets");
        registry.create(&key("10.3.1.0-24"), &attrs(1), Some(DAY)).await.unwrap();
        for (name, text) in [
            ("10.3.2.0-24", "{"),
            ("10.3.3.0-24", r#"{"PublicIP":"2001:db8::1"}"#),
            ("10.3.4.0-24", r#"{"PublicIP":"192.0.2.1","Expires":7}"#),
            ("notes.txt", "hello"),
            (".hidden", "hello"),
        ] {
            fs::write(subnets.join(name), text).unwrap();
        }
        fs::write(subnets.join("10.3.5.0-24"), vec![b' '; 1 << 20]).unwrap();
        fs::write(dir.path().join("registry/weft/nodes/10.3.7.0-24"), "{").unwrap();
        fs::create_dir(subnets.join("10.3.6.0-24")).unwrap();
        let snapshot = registry.snapshot().await.unwrap();
        assert_eq!(snapshot.leases.len(), 1);
        let names: Vec<_> = snapshot.skipped.iter().map(|it| it.name.as_str()).collect();
        assert_eq!(
            names,
            [
                "subnets/10.3.2.0-24",
                "subnets/10.3.3.0-24",
                "subnets/10.3.4.0-24",
                "subnets/10.3.5.0-24",
                "subnets/10.3.6.0-24",
                "subnets/notes.txt",
                "weft/nodes/10.3.7.0-24"
            ]
        );
        assert_eq!(snapshot.unreadable().count(), 5, "a node's record is no lease");
        let refused = registry.create(&key("10.3.2.0-24"), &attrs(2), Some(DAY)).await;
        let refused = refused.unwrap_err().to_string();
        assert!(refused.contains("subnets/10.3.2.0-24"), "{refused}");
        assert_eq!(fs::read(subnets.join("10.3.2.0-24")).unwrap(), b"{");
    }

    #[tokio::test(flavor = "multi_thread", worker_threads = 4)]
    async fn fifty_nodes_get_fifty_subnets() {
        let Fixture { dir: _dir, registry } = fixture();
        let config: Arc<NetworkConfig> =
            Arc::new(
                r#"{"Network":"10.3.0.0/16","SubnetMin":"10.3.1.0","SubnetMax":"10.3.50.0"}"#
                    .parse()
                    .unwrap(),
            );
        let mut nodes = tokio::task::JoinSet::new();
        for last in 0..50 {
            let (registry, config) = (registry.clone(), Arc::clone(&config));
            nodes.spawn(async move {
                let identity = Identity { node_id: last.to_string(), attrs: attrs(last) };
                let mut rng = fastrand::Rng::new();
                loop {
                    let leases = registry.snapshot().await.unwrap().leases;
                    let plan =
                        plan(&config, &identity, &LeaseKey::default(), &leases, &[], &mut rng);
                    let Plan::Create(key) = plan else { panic!("{plan:?}") };
                    if let Some(lease) =
                        registry.create(&key, &identity.attrs, Some(DAY)).await.unwrap()
                    {
                        return lease.key;
                    }
                }
            });
        }
        let found: HashSet<LeaseKey> = nodes.join_all().await.into_iter().collect();
        assert_eq!(found.len(), 50);
    }

    #[tokio::test]
    async fn a_watch_sees_what_hands_and_time_do() {
        let Fixture { dir, registry } = fixture();
        let mut watch = registry.watch(Snapshot::default());
        let path = dir.path().join("registry/subnets/10.3.1.0-24");
        fs::write(&path, r#"{"PublicIP":"192.0.2.1"}"#).unwrap();
        until(&mut watch, |it| it.leases.len() == 1).await;
        fs::remove_file(&path).unwrap();
        until(&mut watch, |it| it.leases.is_empty()).await;

        let short = Duration::from_millis(300);
        registry.create(&key("10.3.2.0-24"), &attrs(2), Some(short)).await.unwrap();
        until(&mut watch, |it| it.leases.len() == 1).await;
        until(&mut watch, |it| it.leases.is_empty()).await;

        let node = NodeRecord {
            id: "ab".repeat(16),
            name: "host".into(),
            public_ip: Some([192, 0, 2, 2].into()),
            public_ipv6: None,
            addresses: vec!["198.51.100.2".parse().unwrap()],
            version: "0".into(),
            mtu: 1472,
            probe_port: None,
        };
        registry.publish_node(&node, DAY).await.unwrap();
        until(&mut watch, |it| it.nodes == [node.clone()]).await;
        fs::remove_dir_all(dir.path().join("registry/weft")).unwrap();
        until(&mut watch, |it| it.nodes.is_empty()).await;
        registry.publish_node(&node, DAY).await.unwrap();
        until(&mut watch, |it| it.nodes == [node.clone()]).await;
    }

    #[tokio::test]
    async fn looking_wakes_nobody() {
        let Fixture { dir, registry } = fixture();
        registry.create(&key("10.3.1.0-24"), &attrs(1), Some(DAY)).await.unwrap();
        let mut notices = Notices::new(vec![dir.path().join("registry/subnets")]);
        notices.follow().unwrap();
        registry.snapshot().await.unwrap();
        let shortly = Duration::from_millis(200);
        tokio::time::timeout(shortly, notices.changed()).await.unwrap_err();
        registry.create(&key("10.3.2.0-24"), &attrs(2), Some(DAY)).await.unwrap();
        tokio::time::timeout(DEADLINE, notices.changed()).await.unwrap();
    }

    #[tokio::test]
    async fn a_directory_that_is_away_is_not_an_empty_one() {
        let Fixture { dir, registry } = fixture();
        registry.create(&key("10.3.1.0-24"), &attrs(1), Some(DAY)).await.unwrap();
        let mut watch = registry.watch(Snapshot::default());
        until(&mut watch, |it| it.leases.len() == 1).await;
        let (there, away) = (dir.path().join("registry"), dir.path().join("away"));
        fs::rename(&there, &away).unwrap();
        let unreadable = watch.wait_for(|view| !view.readable);
        let view = tokio::time::timeout(DEADLINE, unreadable).await.unwrap().unwrap().clone();
        assert_eq!(view.snapshot.leases.len(), 1);
        assert!(registry.snapshot().await.is_err());
        fs::rename(&away, &there).unwrap();
        registry.create(&key("10.3.2.0-24"), &attrs(2), Some(DAY)).await.unwrap();
        until(&mut watch, |it| it.leases.len() == 2).await;
    }

    #[tokio::test]
    async fn the_config_is_written_once() {
        let Fixture { dir: _dir, registry } = fixture();
        assert_eq!(registry.snapshot().await.unwrap().config, None);
        let text = minimal_config("10.3.0.0/16".parse().unwrap()).unwrap();
        assert!(registry.init_config(&text).await.unwrap());
        assert!(!registry.init_config("{}").await.unwrap());
        assert_eq!(registry.snapshot().await.unwrap().config, Some(text));
    }

    #[tokio::test]
    async fn a_fifo_among_the_leases_stops_nobody() {
        let Fixture { dir, registry } = fixture();
        let path = dir.path().join("registry/subnets/10.3.2.0-24");
        assert!(std::process::Command::new("mkfifo").arg(path).status().unwrap().success());
        registry.create(&key("10.3.1.0-24"), &attrs(1), Some(DAY)).await.unwrap().unwrap();
        let snapshot = tokio::time::timeout(DEADLINE, registry.snapshot()).await.unwrap().unwrap();
        assert_eq!((snapshot.leases.len(), snapshot.skipped.len()), (1, 1));
    }

    #[tokio::test]
    async fn a_node_record_stays_in_its_place() {
        let Fixture { dir: _dir, registry } = fixture();
        let node = NodeRecord {
            id: "../../config".into(),
            name: "host".into(),
            public_ip: None,
            public_ipv6: None,
            addresses: Vec::new(),
            version: "0".into(),
            mtu: 1472,
            probe_port: None,
        };
        assert!(registry.publish_node(&node, DAY).await.is_err());
        assert_eq!(registry.snapshot().await.unwrap().config, None);
    }

    #[test]
    fn a_network_that_no_config_can_have_makes_none() {
        let refused = minimal_config("10.3.0.0/29".parse().unwrap()).unwrap_err();
        assert!(refused.to_string().contains("10.3.0.0/29"), "{refused}");
        let text = minimal_config("10.3.0.0/16".parse().unwrap()).unwrap();
        assert_eq!(text, r#"{"Network":"10.3.0.0/16"}"#);
    }

    #[test]
    fn to_look_at_a_registry_makes_none() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("registry");
        let error = DirectoryRegistry::open(&path).unwrap_err().to_string();
        assert!(error.starts_with(&format!("cannot look at {}", path.display())), "{error}");
        assert!(!path.exists());
    }

    #[test]
    fn a_file_in_the_way_is_named() {
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join("file"), "").unwrap();
        let error = DirectoryRegistry::make(&dir.path().join("file")).unwrap_err().to_string();
        assert!(error.contains("file/subnets"), "{error}");
    }
}
