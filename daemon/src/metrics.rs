//! `/metrics`: what the board and the kernel know, as OpenMetrics. Every family is here whatever the
//! daemon does; those that have nothing to say have no samples. `docs/metrics.md` tells of each.

mod family;

use prometheus_client::encoding::text;
use prometheus_client::metrics::MetricType;
use prometheus_client::registry::Registry;
use weft_backends::netlink::{LinkCounters, Netlink};
use weft_backends::{BUCKETS, Counter, Direction, Distribution, EngineMeter, Histogram};

use crate::board::Board;
use crate::output::float;
use crate::probe::{FAULTS, RTT_BOUNDS_US, Totals};
use crate::status::Status;
use crate::usage::{self, Usage};
use family::{Families, Family, Sample, Value, counted, counter, gauge};

/// What an HTTP client is told of the form.
pub(crate) const CONTENT_TYPE: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";

const PREFIX: &str = "weft";
/// The ways to a peer, so that one without peers is zero and not missing.
const WAYS: [&str; 2] = ["tunnel", "direct"];

/// All metrics as they are now. Asks the kernel, so it blocks.
pub(crate) fn read(board: &Board) -> String {
    let status = board.read();
    let netlink = Netlink::open().ok();
    let devices = status.devices().filter_map(|name| {
        let counters = netlink.as_ref()?.link_counters(name);
        // It may be gone this instant.
        let counters =
            counters.inspect_err(|error| tracing::debug!("no counters of {name}: {error}"));
        Some((name.clone(), counters.ok()?))
    });
    let devices: Vec<(String, LinkCounters)> = devices.collect();
    let (engine, probes) = (board.engine(), board.probe_totals());
    let process = (usage::now(), usage::open_files());
    let families = families(&status, &probes, engine.as_ref(), &devices, &process);
    let mut registry = Registry::with_prefix(PREFIX);
    registry.register_collector(Box::new(Families(families)));
    let mut text = String::new();
    // Writing to a string does not fail.
    let _ = text::encode(&mut text, &registry);
    text
}

fn yes_or_no(yes: bool) -> f64 {
    f64::from(u8::from(yes))
}

fn families(
    status: &Status,
    probes: &Totals,
    engine: Option<&EngineMeter>,
    devices: &[(String, LinkCounters)],
    process: &(Usage, u64),
) -> Vec<Family> {
    let mut families = of_daemon(status);
    families.extend(of_probes(status, probes));
    families.extend(of_registry(status));
    families.extend(of_engine(status, engine));
    families.extend(of_devices(devices));
    families.extend(of_process(process));
    families
}

fn of_daemon(status: &Status) -> Vec<Family> {
    let way = |way: &str| {
        let peers = status.peers.iter().filter(|peer| peer.way == way).count();
        let labels = vec![("way", way.to_owned())];
        Sample { labels, value: Value::Gauge(float(peers as u64)) }
    };
    let unreachable =
        status.peers.iter().filter(|peer| peer.probe.reachable == Some(false)).count();
    let once = |count| vec![counted(&[], count)];
    let version = Sample { labels: vec![("version", status.version.clone())], value: Value::Info };
    vec![
        Family {
            name: "build",
            labels: &["version"],
            help: "Which weft it is",
            kind: MetricType::Info,
            samples: vec![version],
        },
        gauge(
            "ready",
            "Whether the daemon forwards and nothing that belongs to it is wrong, as /readyz has it",
            [yes_or_no(status.ready)],
        ),
        gauge(
            "problems",
            "What could not be done; `weft status` names them",
            [float(status.problems.len() as u64)],
        ),
        Family {
            name: "peers",
            labels: &["way"],
            help: "Nodes that packets go to",
            kind: MetricType::Gauge,
            samples: WAYS.map(way).into(),
        },
        gauge(
            "peers_unreachable",
            "Nodes that cannot be reached; `weft status` names them",
            [float(unreachable as u64)],
        ),
        gauge(
            "mtu_bytes",
            "The largest packet that containers may send",
            status.mtu.map(f64::from),
        ),
        counter(
            "reconciliations",
            &[],
            "Times that everything was compared with what it should be",
            once(status.reconciliations),
        ),
        counter(
            "repairs",
            &[],
            "Times that links or routes that somebody else changed were put right",
            once(status.repairs),
        ),
        gauge(
            "firewall_in_place",
            "Whether the firewall's rules are as they should be",
            status.firewall_in_place.map(yes_or_no),
        ),
        counter(
            "firewall_repairs",
            &[],
            "Times that firewall rules that somebody else changed were put back",
            once(status.firewall_repairs),
        ),
    ]
}

fn of_registry(status: &Status) -> Vec<Family> {
    let seconds = |at: jiff::Timestamp| at.as_duration().as_secs_f64();
    vec![
        gauge(
            "registry_readable",
            "Whether the registry can be read; while it cannot, all stays as it was",
            [yes_or_no(status.registry_readable)],
        ),
        gauge(
            "registry_answered_timestamp_seconds",
            "When the registry last answered, in seconds since 1970",
            status.registry_answered.map(seconds),
        ),
        gauge(
            "lease_expiry_timestamp_seconds",
            "When the lease ends unless it is renewed, in seconds since 1970; missing for a \
             reservation, and while it is not known",
            status.lease_expires.map(seconds),
        ),
        gauge(
            "lease_renewal_timestamp_seconds",
            "When the lease is due to be renewed, in seconds since 1970; missing for a reservation",
            status.lease_renewal.map(seconds),
        ),
    ]
}

fn of_probes(status: &Status, totals: &Totals) -> Vec<Family> {
    let fault = |fault: &str| {
        let peers = status.peers.iter().filter(|peer| peer.probe.fault.as_deref() == Some(fault));
        let value = Value::Gauge(float(peers.count() as u64));
        Sample { labels: vec![("fault", fault.to_owned())], value }
    };
    let bounds = RTT_BOUNDS_US.map(|us| float(us) * 1e-6).into_iter().chain([f64::MAX]);
    let rtt = Value::Histogram {
        buckets: bounds.zip(totals.rtt_counts).collect(),
        sum: totals.rtt_total.as_secs_f64(),
    };
    vec![
        Family {
            name: "peers_faulty",
            labels: &["fault"],
            help: "Nodes that probes find something wrong with; `weft status` names them",
            kind: MetricType::Gauge,
            samples: FAULTS.map(fault).into(),
        },
        counter(
            "probes",
            &["outcome"],
            "Small probes of peers, by what became of them",
            vec![
                counted(&[("outcome", "answered")], totals.answered),
                counted(&[("outcome", "lost")], totals.lost),
            ],
        ),
        Family {
            name: "probe_round_trip_seconds",
            labels: &[],
            help: "Round trips of small probes through the overlay",
            kind: MetricType::Histogram,
            samples: vec![Sample { labels: Vec::new(), value: rtt }],
        },
    ]
}

/// The families that counters of the engine are samples of.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Engine {
    Input,
    Packets,
    Bytes,
    Operations,
    SuperPackets,
    Refusals,
    Dropped(&'static str),
    Fragmented,
    Stalls,
    Icmp(&'static str),
    /// In a histogram already.
    Nowhere,
}

/// Where a counter belongs, and its direction.
fn place(counter: Counter) -> (Engine, Direction) {
    use Direction::{TunToUdp, UdpToTun};
    match counter {
        Counter::TunToUdpReads => (Engine::Input, TunToUdp),
        Counter::TunToUdpPackets => (Engine::Packets, TunToUdp),
        Counter::TunToUdpBytes => (Engine::Bytes, TunToUdp),
        Counter::TunToUdpSends => (Engine::Operations, TunToUdp),
        Counter::TunToUdpSuperPackets => (Engine::SuperPackets, TunToUdp),
        Counter::TunToUdpSegmentRefused => (Engine::Refusals, TunToUdp),
        Counter::TunToUdpBatches => (Engine::Nowhere, TunToUdp),
        Counter::TunToUdpMalformed => (Engine::Dropped("malformed"), TunToUdp),
        Counter::TunToUdpNoRoute => (Engine::Dropped("no_route"), TunToUdp),
        Counter::TunToUdpTtlExpired => (Engine::Dropped("ttl_expired"), TunToUdp),
        Counter::TunToUdpTooBig => (Engine::Dropped("too_big"), TunToUdp),
        Counter::TunToUdpFragmented => (Engine::Fragmented, TunToUdp),
        Counter::TunToUdpStalls => (Engine::Stalls, TunToUdp),
        Counter::TunToUdpFull => (Engine::Dropped("full"), TunToUdp),
        Counter::TunToUdpOvertaken => (Engine::Dropped("overtaken"), TunToUdp),
        Counter::TunToUdpSendFailed => (Engine::Dropped("send_failed"), TunToUdp),
        Counter::UdpToTunDatagrams => (Engine::Input, UdpToTun),
        Counter::UdpToTunPackets => (Engine::Packets, UdpToTun),
        Counter::UdpToTunBytes => (Engine::Bytes, UdpToTun),
        Counter::UdpToTunWrites => (Engine::Operations, UdpToTun),
        Counter::UdpToTunSuperPackets => (Engine::SuperPackets, UdpToTun),
        Counter::UdpToTunCoalesceRefused => (Engine::Refusals, UdpToTun),
        Counter::UdpToTunBatches => (Engine::Nowhere, UdpToTun),
        Counter::UdpToTunMalformed => (Engine::Dropped("malformed"), UdpToTun),
        Counter::UdpToTunOversized => (Engine::Dropped("oversized"), UdpToTun),
        Counter::UdpToTunUnknownSender => (Engine::Dropped("unknown_sender"), UdpToTun),
        Counter::UdpToTunForeignSource => (Engine::Dropped("foreign_source"), UdpToTun),
        Counter::UdpToTunForeignDestination => (Engine::Dropped("foreign_destination"), UdpToTun),
        Counter::UdpToTunTtlExpired => (Engine::Dropped("ttl_expired"), UdpToTun),
        Counter::UdpToTunCongestion => (Engine::Dropped("congestion"), UdpToTun),
        Counter::UdpToTunWriteFailed => (Engine::Dropped("write_failed"), UdpToTun),
        // Both directions send them.
        Counter::IcmpSent => (Engine::Icmp("sent"), TunToUdp),
        Counter::IcmpLimited => (Engine::Icmp("limited"), TunToUdp),
    }
}

/// Whether the counter of this name counts packets that were dropped.
pub(crate) fn is_drop(name: &str) -> bool {
    let counter = Counter::ALL.iter().find(|counter| counter.name() == name);
    counter.is_some_and(|counter| matches!(place(*counter).0, Engine::Dropped(_)))
}

fn of_engine(status: &Status, engine: Option<&EngineMeter>) -> Vec<Family> {
    let counters: Vec<(Engine, Direction, u64)> = engine
        .into_iter()
        .flat_map(EngineMeter::counters)
        .map(|(it, count)| (place(it).0, place(it).1, count))
        .collect();
    let by_direction = |wanted: Engine| {
        let of_family = counters.iter().filter(|(it, ..)| *it == wanted);
        of_family.map(|(_, way, count)| counted(&[("direction", way.name())], *count)).collect()
    };
    let dropped = counters.iter().filter_map(|(it, way, count)| {
        let Engine::Dropped(reason) = *it else { return None };
        Some(counted(&[("direction", way.name()), ("reason", reason)], *count))
    });
    let icmp = counters.iter().filter_map(|(it, _, count)| {
        let Engine::Icmp(outcome) = *it else { return None };
        Some(counted(&[("outcome", outcome)], *count))
    });
    let offloads = status.offloads.iter().map(|(name, state)| Sample {
        labels: vec![("offload", name.clone()), ("state", state.clone())],
        value: Value::Gauge(yes_or_no(state == "on")),
    });
    let io =
        status.io.iter().map(|io| Sample { labels: vec![("io", io.clone())], value: Value::Info });
    vec![
        Family {
            name: "engine",
            labels: &["io"],
            help: "How the packet engine does input and output: uring or mmsg",
            kind: MetricType::Info,
            samples: io.collect(),
        },
        Family {
            name: "offload_in_use",
            labels: &["offload", "state"],
            help: "Whether the kernel does this for many packets at once, and why not: off by a flag, \
                   missing in it, refused by it, or lossy",
            kind: MetricType::Gauge,
            samples: offloads.collect(),
        },
        counter(
            "input_packets",
            &["direction"],
            "What came in: from the TUN device, where a super-packet is one, and datagrams from \
             the network",
            by_direction(Engine::Input),
        ),
        counter(
            "packets",
            &["direction"],
            "Packets handed on: sent to peers, and written to the TUN device",
            by_direction(Engine::Packets),
        ),
        counter(
            "bytes",
            &["direction"],
            "Their bytes, without the outer headers; those of joined packets with one set of \
             headers",
            by_direction(Engine::Bytes),
        ),
        counter(
            "operations",
            &["direction"],
            "Sends and writes that carried them",
            by_direction(Engine::Operations),
        ),
        counter(
            "super_packets",
            &["direction"],
            "Super-packets that were cut, or that packets were joined to",
            by_direction(Engine::SuperPackets),
        ),
        counter(
            "refused_operations",
            &["direction"],
            "Sends and writes of several packets that the kernel refused, and that went packet by \
             packet",
            by_direction(Engine::Refusals),
        ),
        counter(
            "dropped_packets",
            &["direction", "reason"],
            "Packets dropped, by reason",
            dropped.collect(),
        ),
        counter(
            "fragmented_packets",
            &["direction"],
            "Packets sent in outer fragments, the path being smaller than the MTU",
            by_direction(Engine::Fragmented),
        ),
        counter(
            "stalls",
            &["direction"],
            "Times that sends waited for room in the socket's send buffer",
            by_direction(Engine::Stalls),
        ),
        counter(
            "icmp_errors",
            &["outcome"],
            "ICMP errors owed to senders: sent, or held back by the rate limit",
            icmp.collect(),
        ),
        histogram(
            "batch_packets",
            "Packets that were found at once",
            (engine, Distribution::BatchPackets),
            (0..=8, 1.0),
        ),
        histogram(
            "segment_packets",
            "Packets that one send to a peer, or one write to the TUN device, carried",
            (engine, Distribution::SegmentPackets),
            (0..=7, 1.0),
        ),
        histogram(
            "batch_duration_seconds",
            "From waking up until all that had come in was handed on; for tun_to_udp without the \
             system calls that send",
            (engine, Distribution::BatchNanos),
            (10..=25, 1e-9),
        ),
    ]
}

/// `shown` are the powers of two that bound the buckets; `unit` is what one of the engine's numbers
/// is in the metric's unit.
fn histogram(
    name: &'static str,
    help: &'static str,
    (engine, distribution): (Option<&EngineMeter>, Distribution),
    (shown, unit): (std::ops::RangeInclusive<usize>, f64),
) -> Family {
    let sample = |direction: Direction| {
        let Histogram { buckets, sum } = engine?.distribution(direction, distribution);
        let below: u64 = buckets[..*shown.start()].iter().sum();
        let above: u64 = buckets[shown.end() + 1..BUCKETS].iter().sum();
        let mut counts: Vec<(f64, u64)> = shown
            .clone()
            .map(|power| (float(1 << power) * unit, buckets[power]))
            .chain([(f64::MAX, above)])
            .collect();
        counts[0].1 += below;
        Some(Sample {
            labels: vec![("direction", direction.name().to_owned())],
            value: Value::Histogram { buckets: counts, sum: float(sum) * unit },
        })
    };
    let samples = Direction::BOTH.into_iter().filter_map(sample).collect();
    Family { name, labels: &["direction"], help, kind: MetricType::Histogram, samples }
}

fn of_devices(devices: &[(String, LinkCounters)]) -> Vec<Family> {
    let both = |pick: fn(&LinkCounters) -> (u64, u64)| -> Vec<Sample> {
        let of_device = |(name, device): &(String, LinkCounters)| {
            let (transmitted, received) = pick(device);
            let ways = [("transmit", transmitted), ("receive", received)];
            ways.map(|(way, count)| counted(&[("device", name), ("way", way)], count))
        };
        devices.iter().flat_map(of_device).collect()
    };
    vec![
        counter(
            "device_packets",
            &["device", "way"],
            "The kernel's count of the overlay devices' packets: transmit is from the containers; \
             for host-gw the external interface's, with all of its traffic",
            both(|it| (it.tx_packets, it.rx_packets)),
        ),
        counter(
            "device_bytes",
            &["device", "way"],
            "The kernel's count of their bytes",
            both(|it| (it.tx_bytes, it.rx_bytes)),
        ),
        counter(
            "device_dropped_packets",
            &["device", "way"],
            "What the kernel dropped at the device: in transmit of udp-tun's, its queue was full",
            both(|it| (it.tx_dropped, it.rx_dropped)),
        ),
    ]
}

fn of_process((usage, open_files): &(Usage, u64)) -> Vec<Family> {
    let Usage { cpu_millis, resident_bytes, threads } = *usage;
    let cpu = Sample { labels: Vec::new(), value: Value::Seconds(float(cpu_millis) / 1000.0) };
    vec![
        counter("process_cpu_seconds", &[], "CPU time that the daemon has used", vec![cpu]),
        gauge("process_resident_memory_bytes", "Memory in use", [float(resident_bytes)]),
        gauge("process_threads", "Threads", [float(threads)]),
        gauge("process_open_fds", "Open files", [float(*open_files)]),
    ]
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The families with their types and meanings, as rows of a table.
    fn rows() -> Vec<String> {
        let families =
            families(&Status::default(), &Totals::default(), None, &[], &<(Usage, u64)>::default());
        let row = |family: &Family| {
            let behind = match family.kind {
                MetricType::Counter => "_total",
                MetricType::Info => "_info",
                MetricType::Gauge | MetricType::Histogram | MetricType::Unknown => "",
            };
            let Family { name, labels, help, kind, .. } = family;
            let labels = labels.join(", ");
            format!("| `{PREFIX}_{name}{behind}` | {} | {labels} | {help} |", kind.as_str())
        };
        families.iter().map(row).collect()
    }

    #[test]
    fn every_metric_is_documented_and_nothing_else() {
        let document = include_str!("../../docs/metrics.md");
        let documented: Vec<&str> =
            document.lines().filter(|line| line.starts_with("| `weft_")).collect();
        assert_eq!(documented, rows(), "what docs/metrics.md should say:\n{}", rows().join("\n"));
    }

    #[test]
    fn each_device_has_its_samples() {
        let devices = ["flannel.1", "flannel-v6.1"].map(|it| (it.into(), LinkCounters::default()));
        for family in of_devices(&devices) {
            let of: Vec<&str> = family.samples.iter().map(|it| it.labels[0].1.as_str()).collect();
            assert_eq!(of, ["flannel.1", "flannel.1", "flannel-v6.1", "flannel-v6.1"]);
        }
    }

    #[test]
    fn every_counter_of_the_engine_is_documented_and_nothing_else() {
        let document = include_str!("../../docs/metrics.md");
        let rows = document.lines().filter(|line| !line.starts_with("| `weft_"));
        let rows = rows.filter_map(|line| line.strip_prefix("| `"));
        let documented: Vec<&str> = rows.filter_map(|row| row.split('`').next()).collect();
        let counters: Vec<&str> = Counter::ALL.iter().map(|counter| counter.name()).collect();
        assert_eq!(documented, counters);
    }
}
