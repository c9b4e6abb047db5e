//! Ethernet addresses of the overlay.

use ipnetwork::IpNetwork;
use weft_backends::Mac;
use weft_control::lease::Snapshot;

use super::check::Check;
use super::seen::Seen;

/// Whether vxlan's device has the MAC that the other nodes send to.
pub(super) fn mac(seen: &Seen) -> Option<Check> {
    let status = seen.status()?;
    let backend = status.backend.as_deref().unwrap_or_default();
    if backend != "vxlan" {
        return Check::ok(format!("of no matter to {backend}"));
    }
    let device = status.device.as_deref()?;
    let Some(mac) = seen.link(device).and_then(|link| link.mac) else {
        let what = format!("the device {device:?} is gone");
        return Check::fail(what, seen.restart());
    };
    let registry = seen.registry.as_ref()?;
    let Ok((snapshot, _)) = &registry.content else {
        return Check::unread(registry);
    };
    match leased(snapshot, &status.subnets) {
        Some(leased) if leased != mac => Check::fail(
            format!(
                "{device} has the MAC {mac}, but this node's lease says {leased}: what others send \
                 is dropped"
            ),
            format!("ip link set {device} address {leased}"),
        ),
        Some(_) => Check::ok(format!("{device} has the MAC of the lease, {mac}")),
        None => Check::warn("this node's lease names none", seen.restart()),
    }
}

/// The MAC in our lease.
fn leased(snapshot: &Snapshot, subnets: &[IpNetwork]) -> Option<Mac> {
    let is_ours = |key: weft_control::LeaseKey| key.networks().any(|net| subnets.contains(&net));
    let lease = snapshot.leases.iter().find(|lease| is_ours(lease.key))?;
    let data = lease.attrs.backend_data.as_ref().or(lease.attrs.backend_v6_data.as_ref())?;
    data["VtepMAC"].as_str()?.parse().ok()
}

#[cfg(test)]
mod tests {
    use weft_backends::netlink::Link;
    use weft_control::RegistryError;

    use super::*;
    use crate::doctor::check::Verdict;
    use crate::doctor::seen::{Daemon, RegistrySeen};
    use crate::status::Status;

    #[test]
    fn a_mac_that_the_lease_does_not_name_is_told() {
        let lease = r#"{"key":"10.42.7.0-24","expires":"Never","revision":1,"attrs":{
            "PublicIP":"192.0.2.1","BackendType":"vxlan",
            "BackendData":{"VNI":1,"VtepMAC":"02:00:00:00:00:01"}}}"#;
        let leases = vec![serde_json::from_str(lease).unwrap()];
        let snapshot = Snapshot { leases, ..Snapshot::default() };
        let status = Status {
            backend: Some("vxlan".into()),
            device: Some("flannel.1".into()),
            subnets: vec!["10.42.7.0/24".parse().unwrap()],
            ..Status::default()
        };
        let link = |mac: &str| Link {
            index: 3,
            name: "flannel.1".into(),
            mtu: 1450,
            up: true,
            mac: mac.parse().ok(),
            kind: Some("vxlan".into()),
            ..Link::default()
        };
        let mut seen = Seen {
            daemon: Some(Daemon { status, ..Daemon::default() }),
            registry: Some(RegistrySeen::example(snapshot)),
            links: vec![link("02:00:00:00:00:01")],
            ..Seen::default()
        };
        assert_eq!(mac(&seen).unwrap().verdict, Verdict::Ok);
        seen.links = vec![link("02:00:00:00:00:02")];
        let found = mac(&seen).unwrap();
        assert_eq!(found.verdict, Verdict::Fail);
        let cure = found.cure.unwrap();
        assert_eq!(cure, "ip link set flannel.1 address 02:00:00:00:00:01");
        let away = RegistryError::Away("no etcd answers".into());
        seen.registry.as_mut().unwrap().content = Err(away);
        assert!(mac(&seen).unwrap().seen.contains("registry cannot be read"));
    }
}
