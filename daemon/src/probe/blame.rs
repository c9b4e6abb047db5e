//! Which offloads may be what loses packets.

use std::collections::BTreeSet;
use std::net::IpAddr;

use weft_backends::{Offload, Towards};

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

/// The same of all peers, with whom packets get lost to. Where checksums go wrong here, no probe is answered:
/// one that is tells that who does not answer hangs, or is firewalled. flannel's nodes answer echoes only,
/// which fare better. Where one gets what was cut, and nobody is there who could not say, it may be others
/// that lose it.
pub(super) fn blamed<'a>(
    findings: impl Iterator<Item = (&'a Target, &'a Found)>,
) -> BTreeSet<(Offload, Towards)> {
    let (mut cut, mut summed) = (BTreeSet::new(), BTreeSet::new());
    let (mut is_any_reachable, mut is_any_whole, mut is_any_mute) = (false, false, false);
    for (target, found) in findings {
        let is_reachable = target.port.is_some() && found.reach == Reach::Reachable;
        is_any_reachable |= is_reachable;
        is_any_whole |= is_reachable && found.path == Path::Full;
        is_any_mute |= target.port.is_none();
        for offload in found.blamed() {
            match offload {
                Offload::Segmentation => cut.insert(target.outer),
                Offload::Checksum => summed.insert(target.outer),
            };
        }
    }
    let all = |peers: &BTreeSet<IpAddr>| peers.first().map(|peer| Towards::All(*peer));
    let summed = all(&summed).filter(|_| !is_any_reachable);
    let summed = summed.map(|towards| (Offload::Checksum, towards));
    let is_theirs = is_any_whole && !is_any_mute;
    let one_by_one = cut.iter().filter(|_| is_theirs).map(|peer| Towards::One(*peer));
    let together = all(&cut).filter(|_| !is_theirs);
    let cut = one_by_one.chain(together).map(|towards| (Offload::Segmentation, towards));
    cut.chain(summed).collect()
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
        let checksum = (Offload::Checksum, Towards::All(of(2)));
        let of_all =
            |findings: &[(Target, Found)]| blamed(findings.iter().map(|(at, it)| (at, it)));
        let everybodys = (Offload::Segmentation, Towards::All(of(2)));
        assert_eq!(of_all(&findings[..2]), BTreeSet::from([everybodys, checksum]));
        assert_eq!(of_all(&findings[..3]), BTreeSet::from([everybodys, checksum]), "long ago");
        assert_eq!(of_all(&findings), BTreeSet::from([everybodys]), "flannel's would lose it");
        let theirs = (Offload::Segmentation, Towards::One(of(2)));
        let without_flannel = [findings[1], findings[4]];
        assert_eq!(of_all(&without_flannel), BTreeSet::from([theirs]), "one gets them right");
        assert!(of_all(&findings[2..]).is_empty());
    }
}
