"""Tokens per second of the bare engine, without Ray, HTTP and money, against what this machine could do.

    OMP_WAIT_POLICY=PASSIVE GOMP_SPINCOUNT=0 python -m tests.bench.serving.engine_speed --home .openledger

W1 and W2 of ``workloads.py`` in turn, medians over ``--repeat`` runs of each; ``--torch`` leaves our kernels
out. The ceiling is that of ``ceiling.py``, in the engine's type, measured in this run. Prints one JSON object
with its conditions and lines ``goal NAME VALUE TARGET met|short``."""

import argparse
import json
import os
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from attribution.hashing import sha256
from attribution.types import ZERO_ID
from cluster.adapters import pack, store_adapter
from cluster.config import Settings
from cluster.models import base_model, linear_shapes, load_base, native_dtype
from cluster.storage import open_storage
from serve_apps.engine.engine import Engine
from serve_apps.engine.loading import EngineConfig, build_engine
from serve_apps.engine.scheduler import Limits
from serve_apps.engine.types import EngineRequest, SamplingParams
from tests import toy_models
from tests.bench.serving.ceiling import ceiling, rates
from tests.bench.serving.report import Goal
from tests.bench.serving.workloads import RANKS, W1, W2, Run, Workload, asks, row_of, summary

TARGET_OF_CEILING = 0.60
TARGET_W1_OVER_W2 = 0.80


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--home", type=Path, default=Path(".openledger"))
    parser.add_argument("--requests", type=int, default=W1.num_requests)
    parser.add_argument("--prompt-tokens", type=int, default=W1.prompt_tokens)
    parser.add_argument("--shared-prefix", type=int, default=0)
    parser.add_argument("--max-tokens", type=int, default=W1.max_tokens)
    parser.add_argument("--adapters", type=int, default=W1.num_adapters)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--torch", action="store_true", help="without our kernels")
    given = parser.parse_args()
    torch.set_num_threads(given.threads or os.cpu_count() or 1)
    settings = Settings(home=given.home)
    base, storage = base_model(settings), open_storage(settings.storage_url)
    shapes, dtype = linear_shapes(base.path), native_dtype()
    adapters = [
        store_adapter(storage, pack(toy_models.random_adapter(base.base_id, shapes, RANKS[i % 2], i, 0.01)))
        for i in range(given.adapters)
    ]
    asked = {
        "num_requests": given.requests,
        "prompt_tokens": given.prompt_tokens,
        "shared_prefix": given.shared_prefix,
        "max_tokens": given.max_tokens,
    }
    w1, w2 = replace(W1, num_adapters=given.adapters, **asked), replace(W2, **asked)
    limits = Limits(max_running=given.requests)
    engine = build_engine(base, storage, EngineConfig(dtype=dtype, limits=limits, is_native=not given.torch))
    load_before = os.getloadavg()[0]
    run(engine, adapters, replace(w1, prompt_tokens=8, shared_prefix=0, max_tokens=2), turn=-1)
    runs: dict[str, list[Run]] = {"w1": [], "w2": []}
    for turn in range(given.repeat):
        runs["w1"].append(run(engine, adapters, w1, turn))
        runs["w2"].append(run(engine, adapters, w2, turn))
    load = engine.load()
    engine.close()
    config = load_base(base.path, torch.bfloat16).config
    of = rates(config, dtype)
    best = {work.name: ceiling(config, shapes, work, of, dtype) for work in (w1, w2)}
    found = {work.name: row_of(runs[work.name], work) for work in (w1, w2)}
    result = {
        **found,
        "ceiling_tokens_per_s": best,
        "multiply_gflop_per_s": round(of.multiply / 1e9, 1),
        "read_gb_per_s": round(of.read / 1e9, 1),
        "prefilled_tokens": load.num_prefilled,
        "reused_tokens": load.num_reused,
        "dtype": str(dtype),
        "kernels": "torch" if given.torch else torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "cores": os.cpu_count(),
        "load_before": round(load_before, 1),
    }
    print(json.dumps(result))
    speeds = {name: row["tokens_per_s"] for name, row in found.items()}
    print(Goal("w1_of_ceiling", speeds["w1"] / best["w1"], TARGET_OF_CEILING))
    print(Goal("w1_over_w2", speeds["w1"] / speeds["w2"], TARGET_W1_OVER_W2))


def run(engine: Engine, adapters: Sequence[bytes], work: Workload, turn: int) -> Run:
    asked = asks(work, turn)
    for number, ask in enumerate(asked):
        params = SamplingParams(ask.max_tokens, temperature=0, ignore_eos=True)
        request_id = sha256(f"{work.name}/{turn}/{number}".encode())
        adapter_id = ZERO_ID if ask.adapter is None else adapters[ask.adapter]
        engine.submit(EngineRequest(request_id, "bench", "bench", ask.prompt, params, adapter_id))
    started, num_done = time.perf_counter(), 0
    seen: dict[bytes, list[float]] = {}
    while num_done < len(asked):
        for event in engine.step().events:
            seen.setdefault(event.request_id, []).append(time.perf_counter() - started)
            num_done += event.finish is not None
    seconds = time.perf_counter() - started
    return summary(list(seen.values()), sum(map(len, seen.values())), seconds)


if __name__ == "__main__":
    main()
