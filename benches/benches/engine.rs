//! What the engine's own code costs a packet; the system calls come on top.

use divan::{Bencher, black_box};
use weft_benches::{inner_address, outer_address, packet, route_table};
use weft_engine::guard::{Guard, GuardMode};
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
    let guard = Guard { mode: GuardMode::Strict, mtu: 1472 };
    let mut hosts = scattered(peers);
    bencher
        .with_inputs(|| {
            let host = hosts.next().unwrap_or(1);
            (outer_address(host), packet(host, 0, 64))
        })
        .bench_local_values(|(sender, packet)| guard.judge(&table, sender, &packet));
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
