//! The lease that this node has: what has become of it, and when to write it again. Pure.

use std::time::Duration;

use jiff::Timestamp;

use crate::lease::{Expiry, Lease, LeaseAttrs};

/// What has become of our lease.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Own {
    /// It is there, as the registry has it now.
    Held(Lease),
    Missing,
    /// Another node has the subnet.
    TakenBy(Lease),
}

/// Looks our lease up among the registry's. `former` is what we published there before our address
/// changed.
pub fn check_own(own: &Lease, former: &[LeaseAttrs], leases: &[Lease]) -> Own {
    match leases.iter().find(|lease| lease.key == own.key) {
        None => Own::Missing,
        Some(found) if found.is_of(&own.attrs, former) => Own::Held(found.clone()),
        Some(found) => Own::TakenBy(found.clone()),
    }
}

/// When our lease ends, which some registries tell only those who write it: known for the revision at
/// which we did.
#[derive(Debug, Clone, Copy)]
pub struct KnownEnd {
    revision: u64,
    end: Expiry,
}

impl KnownEnd {
    /// As the lease has it.
    pub fn of(lease: &Lease) -> Self {
        Self { revision: lease.revision, end: lease.expires }
    }

    /// Our lease as it was told, with its end where we know it. What is told may be from before our
    /// last write, which makes that no less known.
    pub fn complete(&mut self, mut told: Lease) -> Lease {
        match told.expires {
            Expiry::Unknown if told.revision == self.revision => told.expires = self.end,
            Expiry::Unknown => {}
            Expiry::Never | Expiry::At(_) => *self = Self::of(&told),
        }
        told
    }
}

/// How long a lease that is written again is to live: a reservation stays one.
pub fn ttl(lease: &Lease, ttl: Duration) -> Option<Duration> {
    (lease.expires != Expiry::Never).then_some(ttl)
}

/// How long after `now` to renew: `margin` before the end; at once where nobody knows it, or where
/// the lease does not say `attrs`, which is what we are. `None` for a reservation that does.
pub fn renew_in(
    lease: &Lease,
    attrs: &LeaseAttrs,
    margin: Duration,
    now: Timestamp,
) -> Option<Duration> {
    if lease.attrs != *attrs {
        return Some(Duration::ZERO);
    }
    match lease.expires {
        Expiry::Never => None,
        Expiry::At(end) => {
            let left = Duration::try_from(end.duration_since(now)).unwrap_or_default();
            Some(left.saturating_sub(margin))
        }
        Expiry::Unknown => Some(Duration::ZERO),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn lease(key: &str, public_ip: &str) -> Lease {
        let attrs = LeaseAttrs { public_ip: public_ip.parse().ok(), ..LeaseAttrs::default() };
        Lease { key: key.parse().unwrap(), attrs, expires: Expiry::Never, revision: 0 }
    }

    #[test]
    fn knows_what_became_of_our_lease() {
        let own = lease("10.3.4.0-24", "192.0.2.9");
        assert_eq!(check_own(&own, &[], &[]), Own::Missing);
        assert_eq!(check_own(&own, &[], std::slice::from_ref(&own)), Own::Held(own.clone()));
        let other = lease("10.3.4.0-24", "192.0.2.1");
        let seen = std::slice::from_ref(&other);
        assert_eq!(check_own(&own, &[], seen), Own::TakenBy(other.clone()));
        assert_eq!(
            check_own(&own, std::slice::from_ref(&other.attrs), seen),
            Own::Held(other.clone())
        );
    }

    #[test]
    fn the_end_is_known_for_what_we_wrote_whatever_is_told_in_between() {
        let told =
            |revision, expires| Lease { revision, expires, ..lease("10.3.4.0-24", "192.0.2.9") };
        let at = |time: &str| Expiry::At(time.parse().unwrap());
        let [first, second] = ["2026-11-23T12:00:00Z", "2026-11-24T12:00:00Z"].map(at);
        let mut known = KnownEnd::of(&told(7, first));
        let mut end = |revision, expires| known.complete(told(revision, expires)).expires;
        assert_eq!(end(7, Expiry::Unknown), first);
        assert_eq!(end(9, second), second, "we renew");
        assert_eq!(end(7, Expiry::Unknown), Expiry::Unknown, "from before that");
        assert_eq!(end(9, Expiry::Unknown), second);
        assert_eq!(end(10, Expiry::Unknown), Expiry::Unknown, "somebody else wrote it");
        assert_eq!(end(10, Expiry::Never), Expiry::Never);
    }

    #[test]
    fn renewal_comes_a_margin_before_the_end() {
        let mut own = lease("10.3.4.0-24", "192.0.2.9");
        let attrs = own.attrs.clone();
        let left = |own: &Lease, now: &str| {
            let margin = Duration::from_secs(3600);
            renew_in(own, &attrs, margin, now.parse().unwrap()).map(|it| it.as_secs())
        };
        assert_eq!(left(&own, "2026-11-23T12:00:00Z"), None);
        own.expires = Expiry::Unknown;
        assert_eq!(left(&own, "2026-11-23T12:00:00Z"), Some(0));
        own.expires = Expiry::At("2026-11-23T12:00:00Z".parse().unwrap());
        assert_eq!(left(&own, "2026-11-23T10:30:00Z"), Some(1800));
        assert_eq!(left(&own, "2026-11-23T11:30:00Z"), Some(0));
        assert_eq!(left(&own, "2026-11-23T12:30:00Z"), Some(0));
        own = lease("10.3.4.0-24", "192.0.2.8");
        assert_eq!(left(&own, "2026-11-23T10:30:00Z"), Some(0), "it has to say our address");
    }
}
