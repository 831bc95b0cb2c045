# One command each. Every target does its own set-up; `make help` lists them.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.PHONY: help setup check format types contracts test test-cuda test-slow demo demo-fresh audit bench-serving bench-gateway bench-gpu soak clean

help:  ## what there is
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*##/\t/' | expand -t 12

setup: $(READY)  ## Python environment from the pinned constraints (a few minutes the first time)

$(READY): pyproject.toml constraints.txt
	PYTHON="$(PYTHON)" VENV="$(VENV)" sh configs/setup.sh
	@touch $@

check: $(READY) format types  ## lint, format, strict types, arrows
	$(BIN)/python -m pytest -q tests/test_architecture.py

format: $(READY)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .

types: $(READY)
	$(BIN)/mypy

contracts: $(READY)  ## recompile the contracts and compare with the checked-in artifacts
	$(BIN)/python -m chain.compile --check

test: $(READY)  ## everything but the slow suites: no GPU, no network beyond the registries
	$(BIN)/python -m pytest -m "not slow and not gpu and not ray"
	sh tests/ray_files.sh $(BIN)/python "ray and not slow and not gpu"

test-cuda: $(READY)  ## the CUDA kernels in Triton's interpreter, and compiled for an H100; no GPU needed
	$(BIN)/python -m pip install --quiet --no-deps --target $(VENV)/triton -c constraints.txt triton
	PYTHONPATH=$(VENV)/triton $(BIN)/python -m pytest tests/serve_apps/engine/test_cuda_*.py

test-slow: $(READY)  ## real model, killed processes, whole clusters
	$(BIN)/python -m pytest -m "slow and not gpu and not ray"
	sh tests/ray_files.sh $(BIN)/python "ray and slow and not gpu"

demo: $(READY)  ## from shard to claim, on real input, then leaves it running
	$(BIN)/openledger demo

demo-fresh: $(READY)  ## the demo with everything but the set-up redone
	$(BIN)/openledger demo --fresh

audit: $(READY)  ## recompute from the chain what everybody was charged and paid
	$(BIN)/openledger audit --provenance

bench-serving: $(READY)  ## peers and our HTTP door under load, against what this machine could do at best
	$(BIN)/python -m pip install --quiet -c constraints.txt -e ".[bench]"
	$(BIN)/python -m tests.bench.serving.bench --out tests/bench/serving/results $(BENCH)

soak: $(READY)  ## half an hour of load, cancels, bad adapters and kills, and then the books; MINUTES=30
	$(BIN)/python -m tests.bench.serving.soak --minutes $(or $(MINUTES),30)

bench-gateway: $(READY)  ## what the gateway costs where nothing is generated
	$(BIN)/python -m tests.bench.serving.gateway --out tests/bench/serving/gateway.json

bench-gpu: $(READY)  ## the bare engine on a CUDA device, at the shapes of an 8B Llama
	$(BIN)/python -m tests.bench.serving.gpu --out tests/bench/serving/gpu.json

clean:  ## forget everything but the sources
	rm -rf $(VENV) .openledger build dist *.egg-info
