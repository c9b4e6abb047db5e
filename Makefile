# weft: `make lab` shows it working, `make test` proves it. Both as root; nothing else to set up.

BACKEND ?= udp-tun
CARGO ?= cargo

.PHONY: build lab test bench bench-quick lint deps

build: deps
	$(CARGO) build --release --locked

# Three hosts in network namespaces, a weftd in each, traffic between all pairs.
lab: build
	target/release/weft lab --backend $(BACKEND)

test: build
	$(CARGO) test --release --locked --workspace

# weft beside what else carries packets, in namespaces; writes target/bench/report.html.
bench: build
	target/release/weft-bench run

# The same in less than three minutes: only the ratios that have a target.
bench-quick: build
	target/release/weft-bench run --quick

lint: deps
	$(CARGO) fmt --check
	$(CARGO) clippy --release --locked --workspace --all-targets -- --deny warnings
	RUSTDOCFLAGS='--deny warnings' $(CARGO) doc --release --locked --workspace --no-deps \
		--document-private-items

# Debian packages, only where missing.
deps:
	packaging/install-debian-packages
