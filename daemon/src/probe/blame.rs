//! Which offloads may be what loses packets.

use std::collections::BTreeMap;
use std::net::IpAddr;

use weft_backends::Offload;

use super::Target;
use super::found::{Found, Path, Reach};

impl Found {
    /// What this tells against.
    pub(super) fn blamed(&self) -> impl Iterator<Item = Offload> {
        let by_path = (self.path == Path::NoOffload).then_some(Offload::Segmentation);
        let by_reach = (self.reach == Reach::EchoOnly).then_some(Offload::Checksum);
        by_path.into_iter().chain(by_reach)
    }
}

/// The same of all peers, each with a peer on the way to which packets are lost. Where checksums go wrong
/// here, no probe is answered: one that is tells that who does not answer hangs, or is firewalled. flannel's
/// nodes answer echoes only, which fare better.
pub(super) fn blamed<'a>(
    findings: impl Iterator<Item = (&'a Target, &'a Found)>,
) -> BTreeMap<Offload, IpAddr> {
    let mut blamed = BTreeMap::new();
    let mut is_any_reachable = false;
    for (target, found) in findings {
        is_any_reachable |= target.port.is_some() && found.reach == Reach::Reachable;
        for offload in found.blamed() {
            let peer = blamed.entry(offload).or_insert(target.outer);
            *peer = target.outer.min(*peer);
        }
    }
    if is_any_reachable {
        blamed.remove(&Offload::Checksum);
    }
    blamed
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_offload_is_blamed_whatever_else_is_wrong() {
        let target = |last: u8| {
            let outer = IpAddr::from([192, 0, 2, last]);
            Target { inner: IpAddr::from([10, 42, last, 0]), outer, port: Some(8286) }
        };
        let found = |reach, path| {
            let mut found = Found::default();
            (found.reach, found.path) = (reach, path);
            found
        };
        let findings = [
            (target(3), found(Reach::EchoOnly, Path::Unknown)),
            (target(2), found(Reach::EchoOnly, Path::NoOffload)),
            (target(1), found(Reach::Silent, Path::Full)),
            (Target { port: None, ..target(5) }, found(Reach::Reachable, Path::Unknown)),
            (target(4), found(Reach::Reachable, Path::Full)),
        ];
        let of = |last| IpAddr::from([192, 0, 2, last]);
        let wanted = [(Offload::Segmentation, of(2)), (Offload::Checksum, of(2))];
        let of_all =
            |findings: &[(Target, Found)]| blamed(findings.iter().map(|(at, it)| (at, it)));
        assert_eq!(of_all(&findings[..4]), BTreeMap::from(wanted));
        assert_eq!(of_all(&findings), BTreeMap::from([wanted[0]]), "one gets them right");
        assert!(of_all(&findings[2..]).is_empty());
    }
}
