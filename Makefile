# weft: `make lab` shows it working, `make test` proves it. Both as root; nothing else to set up.

BACKEND ?= udp-tun
CARGO ?= cargo

.PHONY: build lab test bench lint deps

build: deps
	$(CARGO) build --release --locked

# Three hosts in network namespaces, a weftd in each, traffic between all pairs.
lab: build
	target/release/weft lab --backend $(BACKEND)

test: build
	$(CARGO) test --release --locked --workspace

# Nanoseconds a packet, of the engine's pure parts.
bench: deps
	$(CARGO) bench --locked --package weft-benches

lint: deps
	$(CARGO) fmt --check
	$(CARGO) clippy --release --locked --workspace --all-targets -- --deny warnings
	RUSTDOCFLAGS='--deny warnings' $(CARGO) doc --release --locked --workspace --no-deps \
		--document-private-items

# Debian packages, only where missing.
deps:
	packaging/install-debian-packages
