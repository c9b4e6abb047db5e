//! What the engine's own code costs a packet; the system calls come on top.

use divan::{Bencher, black_box};
use weft_benches::{inner_address, outer_address, packet, route_table, segments, super_packet};
use weft_engine::guard::{Guard, GuardMode};
use weft_engine::offload::coalesce::{Run, Segment};
use weft_engine::offload::segment::Cut;
use weft_engine::packet::{checksum, decrement_ttl};

fn main() {
    divan::main();
}

/// Destinations in an order that no cache can guess.
fn scattered(peers: u32) -> impl Iterator<Item = u32> {
    (0u32..).map(move |step| 1 + step.wrapping_mul(2_654_435_761) % peers)
}

#[divan::bench(args = [1, 100, 10_000, 65_000])]
fn route_lookup(bencher: Bencher<'_, '_>, peers: u32) {
    let table = route_table(peers);
    let mut hosts = scattered(peers);
    bencher
        .with_inputs(|| inner_address(hosts.next().unwrap_or(1)))
        .bench_local_values(|address| table.lookup(black_box(address.into())).is_some());
}

#[divan::bench(args = [1, 65_000])]
fn guard_strict(bencher: Bencher<'_, '_>, peers: u32) {
    let table = route_table(peers);
    let guard = Guard { mode: GuardMode::Strict, mtu: 1472, own: outer_address(0) };
    let mut hosts = scattered(peers);
    bencher
        .with_inputs(|| {
            let host = hosts.next().unwrap_or(1);
            (outer_address(host), packet(host, 0, 64))
        })
        .bench_local_refs(|(sender, packet)| guard.judge(&table, *sender, packet));
}

#[divan::bench]
fn ttl(bencher: Bencher<'_, '_>) {
    bencher
        .with_inputs(|| packet(1, 0, 64))
        .bench_local_refs(|packet| decrement_ttl(black_box(packet)));
}

#[divan::bench(args = [64, 1472])]
fn checksum_of(bencher: Bencher<'_, '_>, len: u16) {
    let packet = packet(1, 0, len);
    bencher.bench_local(|| checksum(black_box(&packet)));
}

/// One super-packet of 44 full segments; divide by 44 for a packet.
#[divan::bench]
fn segment_44(bencher: Bencher<'_, '_>) {
    let (header, packet) = super_packet(44);
    let mut out = [0; 1500];
    bencher.bench_local(|| {
        let cut = Cut::plan(&header, black_box(&packet)).ok().flatten();
        let Some(cut) = cut else { return };
        for number in 0..cut.count() {
            cut.write(&packet, number, &mut out[..cut.len_of(number)]);
        }
    });
}

/// The same back again.
#[divan::bench]
fn coalesce_44(bencher: Bencher<'_, '_>) {
    let packets = segments(44);
    let mut run = Run::default();
    bencher.bench_local(|| {
        for packet in &packets {
            let segment = Segment::parse(black_box(packet));
            if let Some(segment) = segment.filter(|it| !run.join(it, packet)) {
                run.begin(&segment, packet);
            }
        }
        run.finish().map(<[u8]>::len)
    });
}
