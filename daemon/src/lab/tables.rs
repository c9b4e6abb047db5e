//! The lab's results as tables.

use std::collections::BTreeSet;
use std::fmt::Display;

use comfy_table::{CellAlignment, Table, presets};

use super::Bytes;
use super::measure::Pair;
use crate::output::joined;
use crate::status::Status;

/// What a cell says where there is nothing to say.
const NONE: &str = "-";

/// One host and what its daemon says of itself, if it answered.
pub(super) type HostStatus = (usize, Option<Status>);

/// Who has which subnet.
pub(super) fn leases(hosts: &[HostStatus]) -> Table {
    let mut table = table(["host", "public IP", "subnet", "device", "MTU", "peers"]);
    for (host, status) in hosts {
        let name = format!("h{}", host + 1);
        let Some(status) = status else {
            table.add_row([name.as_str(), NONE, NONE, NONE, NONE, NONE]);
            continue;
        };
        table.add_row([
            name,
            or_none(status.public_ip),
            joined(&status.subnets, ", "),
            or_none(status.device.as_ref()),
            or_none(status.mtu),
            status.peers.len().to_string(),
        ]);
    }
    table
}

/// How traffic fared.
pub(super) fn pairs(pairs: &[Pair]) -> Table {
    let mut table = table(["from", "to", "RTT", "TTL", "transferred", "Gbit/s", "hash"]);
    for pair in pairs {
        let ping = pair.ping.as_ref().ok();
        let rtt = ping.and_then(|ping| ping.rtt);
        let ttl = ping.and_then(|ping| ping.replies.first()).map(|reply| reply.ttl);
        let transfer = pair.transfer.as_ref();
        let rate = transfer.map(|transfer| format!("{:.2}", transfer.gbit_per_second()));
        table.add_row([
            format!("h{}", pair.from + 1),
            format!("h{}", pair.to + 1),
            or_none(rtt.map(|rtt| format!("{:.3} ms", rtt.as_secs_f64() * 1000.0))),
            or_none(ttl),
            or_none(transfer.ok().map(|transfer| Bytes(transfer.bytes))),
            or_none(rate.ok()),
            match transfer {
                Ok(transfer) if transfer.intact() => "ok",
                Ok(_) => "MISMATCH",
                Err(_) => "error",
            }
            .to_owned(),
        ]);
    }
    for column in 2..6 {
        align_right(&mut table, column);
    }
    table
}

/// The engines' counters, a column a host; those that are zero everywhere are left out. None where the kernel
/// moves the packets.
pub(super) fn counters(hosts: &[HostStatus]) -> Option<Table> {
    let answered: Vec<_> = hosts
        .iter()
        .filter_map(|(host, status)| Some((host, &status.as_ref()?.counters)))
        .collect();
    let header = answered.iter().map(|(host, _)| format!("h{}", *host + 1));
    let mut table = table(std::iter::once("counter".to_owned()).chain(header));
    let counted = answered.iter().flat_map(|(_, counters)| counters.iter());
    let names: BTreeSet<_> =
        counted.filter(|(_, count)| **count > 0).map(|(name, _)| name.clone()).collect();
    if names.is_empty() {
        return None;
    }
    for name in names {
        let counts = answered.iter().map(|(_, counters)| or_none(counters.get(&name)));
        let row: Vec<_> = std::iter::once(name.clone()).chain(counts).collect();
        table.add_row(row);
    }
    for column in 1..=answered.len() {
        align_right(&mut table, column);
    }
    Some(table)
}

fn table<T: Into<comfy_table::Cell>>(header: impl IntoIterator<Item = T>) -> Table {
    let mut table = Table::new();
    table.load_preset(presets::UTF8_FULL_CONDENSED);
    table.set_header(header.into_iter().map(Into::<comfy_table::Cell>::into).collect::<Vec<_>>());
    table
}

fn align_right(table: &mut Table, column: usize) {
    if let Some(column) = table.column_mut(column) {
        column.set_cell_alignment(CellAlignment::Right);
    }
}

fn or_none(value: Option<impl Display>) -> String {
    value.map_or(NONE.to_owned(), |value| value.to_string())
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::super::{PingReport, Reply, Transfer};
    use super::*;

    fn status() -> Status {
        Status {
            public_ip: Some("10.168.0.94".parse().unwrap()),
            subnets: vec!["10.42.7.0/24".parse().unwrap()],
            device: Some("flannel0".into()),
            mtu: Some(1472),
            counters: [("sent".to_owned(), 7), ("idle".to_owned(), 0)].into(),
            ..Status::default()
        }
    }

    fn line_with<'a>(text: &'a str, word: &str) -> Vec<&'a str> {
        let line = text.lines().find(|line| line.contains(word)).unwrap();
        line.split(['│', '┆']).map(str::trim).filter(|cell| !cell.is_empty()).collect()
    }

    #[test]
    fn leases_name_all_hosts() {
        let text = leases(&[(0, Some(status())), (1, None)]).to_string();
        let wanted = ["h1", "10.168.0.94", "10.42.7.0/24", "flannel0", "1472", "0"];
        assert_eq!(line_with(&text, "h1"), wanted);
        assert_eq!(line_with(&text, "h2"), ["h2", "-", "-", "-", "-", "-"]);
    }

    #[test]
    fn pairs_show_what_was_measured() {
        let rtt = Duration::from_micros(250);
        let ping = PingReport {
            sent: 1,
            received: 1,
            rtt: Some(rtt),
            replies: vec![Reply { sequence: 1, ttl: 60, rtt }],
            errors: Vec::new(),
        };
        let second = Duration::from_secs(1);
        let transfer =
            |received| Transfer { bytes: 125_000_000, elapsed: second, sent: [1; 32], received };
        let pair = |from, ping, transfer| Pair { from, to: 4, ping, transfer };
        let text = pairs(&[
            pair(0, Ok(ping.clone()), Ok(transfer([1; 32]))),
            pair(1, Ok(ping), Ok(transfer([2; 32]))),
            pair(2, Err("x".into()), Err("x".into())),
        ])
        .to_string();
        let good = ["h1", "h5", "0.250 ms", "60", "125000000 B", "1.00", "ok"];
        assert_eq!(line_with(&text, "h1"), good);
        assert!(line_with(&text, "h2").contains(&"MISMATCH"));
        assert_eq!(line_with(&text, "h3"), ["h3", "h5", "-", "-", "-", "-", "error"]);
    }

    #[test]
    fn counters_that_never_moved_are_left_out() {
        let text = counters(&[(0, Some(status())), (2, Some(status()))]).unwrap().to_string();
        assert_eq!(line_with(&text, "counter"), ["counter", "h1", "h3"]);
        assert_eq!(line_with(&text, "sent"), ["sent", "7", "7"]);
        assert!(!text.contains("idle"));
        assert!(counters(&[(0, Some(Status::default()))]).is_none());
    }
}
