//! `/metrics`: what the board and the kernel know, as OpenMetrics. Every metric is here whatever the
//! daemon does; those that have nothing to say have no samples. `docs/metrics.md` tells of each.

mod metric;

use std::mem::discriminant;

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
use metric::{Metric, Metrics, Sample, Value, counted, counter, gauge, gauged, gauges, info};

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
    let metrics = metrics(&status, &probes, engine.as_ref(), &devices, &process);
    let mut registry = Registry::with_prefix(PREFIX);
    registry.register_collector(Box::new(Metrics(metrics)));
    let mut text = String::new();
    // Writing to a string does not fail.
    let _ = text::encode(&mut text, &registry);
    text
}

fn yes_or_no(yes: bool) -> f64 {
    f64::from(u8::from(yes))
}

fn metrics(
    status: &Status,
    probes: &Totals,
    engine: Option<&EngineMeter>,
    devices: &[(String, LinkCounters)],
    process: &(Usage, u64),
) -> Vec<Metric> {
    let mut metrics = of_daemon(status);
    metrics.extend(of_probes(status, probes));
    metrics.extend(of_registry(status));
    metrics.extend(of_engine(status, engine));
    metrics.extend(of_devices(devices));
    metrics.extend(of_process(process));
    metrics
}

fn of_daemon(status: &Status) -> Vec<Metric> {
    let way = |way: &str| {
        let peers = status.peers.iter().filter(|peer| peer.way == way).count();
        gauged(&[("way", way)], float(peers as u64))
    };
    let unreachable =
        status.peers.iter().filter(|peer| peer.probe.reachable == Some(false)).count();
    let once = |count| vec![counted(&[], count)];
    vec![
        info("build", &["version"], "Which weft it is", Some(&status.version)),
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
        gauges("peers", &["way"], "Nodes that packets go to", WAYS.map(way).into()),
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

fn of_registry(status: &Status) -> Vec<Metric> {
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

fn of_probes(status: &Status, totals: &Totals) -> Vec<Metric> {
    let fault = |fault: &str| {
        let peers = status.peers.iter().filter(|peer| peer.probe.fault.as_deref() == Some(fault));
        gauged(&[("fault", fault)], float(peers.count() as u64))
    };
    let bounds = RTT_BOUNDS_US.map(|us| float(us) * 1e-6).into_iter().chain([f64::MAX]);
    let rtt = Value::Histogram {
        buckets: bounds.zip(totals.rtt_counts).collect(),
        sum: totals.rtt_total.as_secs_f64(),
    };
    vec![
        gauges(
            "peers_faulty",
            &["fault"],
            "Nodes that probes find something wrong with; `weft status` names them",
            FAULTS.map(fault).into(),
        ),
        counter(
            "probes",
            &["outcome"],
            "Small probes of peers, by what became of them",
            vec![
                counted(&[("outcome", "answered")], totals.answered),
                counted(&[("outcome", "lost")], totals.lost),
            ],
        ),
        Metric {
            name: "probe_round_trip_seconds",
            labels: &[],
            help: "Round trips of small probes through the overlay",
            kind: MetricType::Histogram,
            samples: vec![Sample { labels: Vec::new(), value: rtt }],
        },
    ]
}

/// The metrics that counters of the engine are samples of.
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

/// These in their order, with their names, labels and meanings.
const ENGINE: [(Engine, &str, &[&str], &str); 10] = [
    (
        Engine::Input,
        "input_packets",
        &["direction"],
        "What came in: from the TUN device, where a super-packet is one, and datagrams from \
         the network",
    ),
    (
        Engine::Packets,
        "packets",
        &["direction"],
        "Packets handed on: sent to peers, and written to the TUN device",
    ),
    (
        Engine::Bytes,
        "bytes",
        &["direction"],
        "Their bytes, without the outer headers; those of joined packets with one set of \
         headers",
    ),
    (Engine::Operations, "operations", &["direction"], "Sends and writes that carried them"),
    (
        Engine::SuperPackets,
        "super_packets",
        &["direction"],
        "Super-packets that were cut, or that packets were joined to",
    ),
    (
        Engine::Refusals,
        "refused_operations",
        &["direction"],
        "Sends and writes of several packets that the kernel refused, and that went packet by \
         packet",
    ),
    (
        Engine::Dropped(""),
        "dropped_packets",
        &["direction", "reason"],
        "Packets dropped, by reason",
    ),
    (
        Engine::Fragmented,
        "fragmented_packets",
        &["direction"],
        "Packets sent in outer fragments, the path being smaller than the MTU",
    ),
    (
        Engine::Stalls,
        "stalls",
        &["direction"],
        "Times that sends waited for room in the socket's send buffer",
    ),
    (
        Engine::Icmp(""),
        "icmp_errors",
        &["outcome"],
        "ICMP errors owed to senders: sent, or held back by the rate limit",
    ),
];

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

fn of_engine(status: &Status, engine: Option<&EngineMeter>) -> Vec<Metric> {
    let counters: Vec<(Engine, Direction, u64)> = engine
        .into_iter()
        .flat_map(EngineMeter::counters)
        .map(|(it, count)| (place(it).0, place(it).1, count))
        .collect();
    let mut metrics = of_engine_state(status);
    metrics.extend(
        ENGINE.map(|(it, name, labels, help)| counter(name, labels, help, samples(&counters, it))),
    );
    metrics.extend(of_batches(engine));
    metrics
}

fn of_engine_state(status: &Status) -> Vec<Metric> {
    let offload = |(name, state): (&String, &String)| {
        gauged(&[("offload", name), ("state", state)], yes_or_no(state == "on"))
    };
    vec![
        info(
            "engine",
            &["io"],
            "How the packet engine does input and output: uring or mmsg",
            status.io.as_deref(),
        ),
        gauges(
            "offload_in_use",
            &["offload", "state"],
            "Whether the kernel does this for many packets at once, and why not: off by a flag, \
             missing in it, refused by it, or lossy",
            status.offloads.iter().map(offload).collect(),
        ),
    ]
}

/// Those of one metric. Which reason or outcome it is does not matter in `wanted`.
fn samples(counters: &[(Engine, Direction, u64)], wanted: Engine) -> Vec<Sample> {
    let of_it = counters.iter().filter(|(it, ..)| discriminant(it) == discriminant(&wanted));
    let sample = |(it, way, count): &(Engine, Direction, u64)| {
        let direction = ("direction", way.name());
        if let Engine::Dropped(reason) = *it {
            counted(&[direction, ("reason", reason)], *count)
        } else if let Engine::Icmp(outcome) = *it {
            counted(&[("outcome", outcome)], *count)
        } else {
            counted(&[direction], *count)
        }
    };
    of_it.map(sample).collect()
}

fn of_batches(engine: Option<&EngineMeter>) -> [Metric; 3] {
    [
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
) -> Metric {
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
    Metric { name, labels: &["direction"], help, kind: MetricType::Histogram, samples }
}

fn of_devices(devices: &[(String, LinkCounters)]) -> Vec<Metric> {
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

fn of_process((usage, open_files): &(Usage, u64)) -> Vec<Metric> {
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

    /// The metrics with their types and meanings, as rows of a table.
    fn rows() -> Vec<String> {
        let metrics =
            metrics(&Status::default(), &Totals::default(), None, &[], &<(Usage, u64)>::default());
        let row = |metric: &Metric| {
            let behind = match metric.kind {
                MetricType::Counter => "_total",
                MetricType::Info => "_info",
                MetricType::Gauge | MetricType::Histogram | MetricType::Unknown => "",
            };
            let Metric { name, labels, help, kind, .. } = metric;
            let labels = labels.join(", ");
            format!("| `{PREFIX}_{name}{behind}` | {} | {labels} | {help} |", kind.as_str())
        };
        metrics.iter().map(row).collect()
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
        for metric in of_devices(&devices) {
            let of: Vec<&str> = metric.samples.iter().map(|it| it.labels[0].1.as_str()).collect();
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
