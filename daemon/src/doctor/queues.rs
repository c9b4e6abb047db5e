//! Where packets wait, or are counted, and there may be no room.

use weft_backends::SOCKET_BUFFER_LEN;

use super::check::Check;
use super::seen::Seen;

/// Percent of the connection tracking table, from which there is soon no room.
const NEARLY_FULL: u64 = 90;

/// Whether connection tracking has room for new flows.
pub(super) fn conntrack(seen: &Seen) -> Option<Check> {
    let number = |name: &str| {
        seen.sysctl(&format!("net/netfilter/nf_conntrack_{name}")).and_then(|it| it.parse().ok())
    };
    let (Some(count), Some(max)) = (number("count"), number("max")) else {
        return Check::ok("not in use");
    };
    let count: u64 = count;
    let max: u64 = max;
    let what = format!("{count} of {max} connections");
    let cure = format!("sysctl -w net.netfilter.nf_conntrack_max={}", max.saturating_mul(2));
    // 0 is no limit.
    match count.saturating_mul(100).checked_div(max) {
        Some(100..) => Check::fail(format!("full, {what}: new flows are dropped"), cure),
        Some(NEARLY_FULL..) => Check::warn(format!("nearly full, {what}"), cure),
        Some(_) | None => Check::ok(what),
    }
}

/// Whether the kernel gave the engine's sockets the buffers it asked for.
pub(super) fn socket_buffers(seen: &Seen) -> Option<Check> {
    let status = seen.status()?;
    if status.io.is_none() {
        return Check::ok("the backend has none");
    }
    let largest = |buffers: &mut dyn Iterator<Item = u64>| buffers.max().unwrap_or(0);
    let receive = largest(&mut seen.sockets.iter().map(|(receive, _)| *receive));
    let send = largest(&mut seen.sockets.iter().map(|(_, send)| *send));
    if receive == 0 {
        return Check::warn("cannot be seen without ss", "apt-get install iproute2");
    }
    // The kernel doubles what is asked for (socket(7)).
    let wanted = 2 * u64::from(SOCKET_BUFFER_LEN);
    for (buffer, what, name) in [(receive, "receive", "rmem_max"), (send, "send", "wmem_max")] {
        if buffer < wanted {
            return Check::warn(
                format!(
                    "the {what} buffers are clamped to {} KiB, of {} KiB asked for: bursts get lost",
                    buffer >> 10,
                    wanted >> 10
                ),
                format!("sysctl -w net.core.{name}={SOCKET_BUFFER_LEN} && {}", seen.restart()),
            );
        }
    }
    Check::ok(format!("buffers of {} KiB", wanted >> 10))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::doctor::check::Verdict;
    use crate::doctor::seen::Daemon;
    use crate::status::Status;

    #[test]
    fn a_table_that_fills_up_is_told_before_and_after() {
        let found = |count: &str| {
            let sysctls = [("count", count), ("max", "1000")];
            let path = |name| format!("net/netfilter/nf_conntrack_{name}");
            let sysctls = sysctls.map(|(name, value)| (path(name), value.to_owned())).into();
            conntrack(&Seen { sysctls, ..Seen::default() })
        };
        assert_eq!(found("899").unwrap().verdict, Verdict::Ok);
        assert_eq!(found("900").unwrap().verdict, Verdict::Warn);
        assert_eq!(found("1000").unwrap().verdict, Verdict::Fail);
        assert!(found("1000").unwrap().cure.unwrap().ends_with("nf_conntrack_max=2000"));
        assert_eq!(conntrack(&Seen::default()).unwrap().verdict, Verdict::Ok);
    }

    #[test]
    fn clamped_buffers_are_told() {
        let with = |buffers| {
            let status = Status { io: Some("uring".into()), ..Status::default() };
            let daemon = Some(Daemon { status, ..Daemon::default() });
            socket_buffers(&Seen { daemon, sockets: vec![buffers, (0, 0)], ..Seen::default() })
        };
        assert_eq!(with((16 << 20, 16 << 20)).unwrap().verdict, Verdict::Ok);
        let found = with((425_984, 16 << 20)).unwrap();
        assert_eq!(found.verdict, Verdict::Warn);
        assert!(found.cure.unwrap().starts_with("sysctl -w net.core.rmem_max=8388608"));
    }
}
