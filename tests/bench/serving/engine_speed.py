"""Tokens per second of the bare engine with many adapters, against the same requests on the base model and
against what this machine could do at best.

    OMP_WAIT_POLICY=PASSIVE GOMP_SPINCOUNT=0 python -m tests.bench.serving.engine_speed --home .openledger

W1: 64 requests, all sent at once, of 128 prompt tokens and 64 new ones, over 16 adapters of ranks 8 and 16
whose popularity falls as 1/n. W2: the same without adapters. Medians over ``--repeat`` runs of each, in turn,
every run with prompts of its own: nothing is found in the prefix cache but a ``--shared-prefix``.

The ceiling: a prompt token costs two operations a weight at the rate at which torch multiplies matrices here
in the engine's type; a decode step costs its operations at that rate and, not overlapped, its bytes (keys and
values, the adapters in use) at the rate at which memory is read, both measured in this run.
Prints one JSON object with its conditions and lines ``goal NAME VALUE TARGET met|short``."""

import argparse
import json
import os
import random
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path

import torch
import torch.nn.functional as F

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

TARGET_OF_CEILING = 0.60
TARGET_W1_OVER_W2 = 0.80
RANKS = (8, 16)


@dataclass(frozen=True, slots=True)
class Workload:
    num_requests: int
    prompt_tokens: int
    shared_prefix: int
    max_tokens: int


@dataclass(frozen=True, slots=True)
class Run:
    tokens_per_s: float
    first_token_p50_s: float
    next_token_p50_ms: float
    next_token_p95_ms: float
    steps: int


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--home", type=Path, default=Path(".openledger"))
    parser.add_argument("--requests", type=int, default=64)
    parser.add_argument("--prompt-tokens", type=int, default=128)
    parser.add_argument("--shared-prefix", type=int, default=0)
    parser.add_argument("--max-tokens", type=int, default=64)
    parser.add_argument("--adapters", type=int, default=16)
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
    limits = Limits(max_running=given.requests)
    engine = build_engine(base, storage, EngineConfig(dtype=dtype, limits=limits, is_native=not given.torch))
    work = Workload(given.requests, given.prompt_tokens, given.shared_prefix, given.max_tokens)
    load_before = os.getloadavg()[0]
    run(engine, Workload(len(adapters), 8, 0, 2), adapters or [ZERO_ID], seed=-1)  # loads the adapters
    w1, w2 = [], []
    for seed in range(given.repeat):
        w1.append(run(engine, work, popular(adapters, given.requests), 2 * seed))
        w2.append(run(engine, work, [ZERO_ID] * given.requests, 2 * seed + 1))
    load = engine.load()
    engine.close()
    model = load_base(base.path, torch.bfloat16)
    best = ceiling(model, work, shapes, given.adapters, dtype)
    w1_rate, w2_rate = median(w1, "tokens_per_s"), median(w2, "tokens_per_s")
    result = {
        "w1": medians(w1),
        "w2": medians(w2),
        "w1_runs": [round(each.tokens_per_s, 1) for each in w1],
        "w2_runs": [round(each.tokens_per_s, 1) for each in w2],
        "prefilled_tokens": load.num_prefilled,
        "reused_tokens": load.num_reused,
        **best,
        "workload": asdict(work),
        "adapters": given.adapters,
        "ranks": RANKS,
        "dtype": str(dtype),
        "kernels": "torch" if given.torch else torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "cores": os.cpu_count(),
        "load_before": round(load_before, 1),
    }
    print(json.dumps(result))
    goal("w1_of_ceiling", w1_rate / best["w1_ceiling_tokens_per_s"], TARGET_OF_CEILING)
    goal("w1_over_w2", w1_rate / w2_rate, TARGET_W1_OVER_W2)


def popular(adapters: Sequence[bytes], num: int) -> list[bytes]:
    """Every adapter once, the rest drawn with weights 1, 1/2, 1/3 …"""
    weights = [1 / (i + 1) for i in range(len(adapters))]
    draw = random.Random(7)
    picks = [*adapters[:num], *draw.choices(adapters, weights, k=max(0, num - len(adapters)))]
    draw.shuffle(picks)
    return picks


def run(engine: Engine, work: Workload, picks: Sequence[bytes], seed: int) -> Run:
    draw = random.Random(seed)
    shared = tuple(draw.randrange(1000, 40000) for _ in range(work.shared_prefix))
    params = SamplingParams(work.max_tokens, temperature=0, ignore_eos=True)
    for i, adapter_id in enumerate(picks):
        prompt = shared + tuple(draw.randrange(1000, 40000) for _ in range(work.prompt_tokens))
        number = draw.getrandbits(128).to_bytes(16, "big") + i.to_bytes(16, "big")
        engine.submit(EngineRequest(number, "bench", "bench", prompt, params, adapter_id))
    started, num_done, num_steps = time.perf_counter(), 0, 0
    seen: dict[bytes, list[float]] = {}
    while num_done < len(picks):
        for event in engine.step().events:
            seen.setdefault(event.request_id, []).append(time.perf_counter() - started)
            num_done += event.finish is not None
        num_steps += 1
    gaps = sorted(b - a for times in seen.values() for a, b in pairwise(times))
    return Run(
        tokens_per_s=sum(map(len, seen.values())) / (time.perf_counter() - started),
        first_token_p50_s=statistics.median(times[0] for times in seen.values()),
        next_token_p50_ms=1e3 * statistics.median(gaps or [0.0]),
        next_token_p95_ms=1e3 * gaps[int(0.95 * len(gaps))] if gaps else 0.0,
        steps=num_steps,
    )


def ceiling(
    model: object, work: Workload, shapes: dict[str, tuple[int, int]], num_adapters: int, dtype: torch.dtype
) -> dict[str, float]:
    """Tokens per second of W1 and W2 at best, and the rates that this follows from."""
    config = model.config  # type: ignore[attr-defined]
    body = sum(d_out * d_in for d_out, d_in in shapes.values())
    head = config.vocab_size * config.hidden_size
    lora = sum(d_out + d_in for d_out, d_in in shapes.values()) * sum(RANKS) / len(RANKS)
    flops = multiply_rate(config.hidden_size, 2 * config.intermediate_size, dtype)
    read = read_rate()
    prompt = work.shared_prefix + work.prompt_tokens
    head_dim = config.hidden_size // config.num_attention_heads
    kv_bytes = 2 * config.num_hidden_layers * config.num_key_value_heads * head_dim * dtype.itemsize
    past = prompt + work.max_tokens / 2
    rates = {}
    for name, in_use, per_token in (("w1", num_adapters, lora), ("w2", 0, 0.0)):
        prefill_s = 2 * (work.num_requests * prompt * (body + per_token) + work.num_requests * head) / flops
        compute_s = 2 * work.num_requests * (body + head + per_token) / flops
        memory_s = (2 * in_use * lora + work.num_requests * past * kv_bytes) / read
        decode_s = (work.max_tokens - 1) * (compute_s + memory_s)
        tokens = work.num_requests * work.max_tokens
        rates[f"{name}_ceiling_tokens_per_s"] = round(tokens / (prefill_s + decode_s), 1)
    return {**rates, "gemm_gflop_per_s": round(flops / 1e9, 1), "read_gb_per_s": round(read / 1e9, 1)}


@torch.inference_mode()
def multiply_rate(d_in: int, d_out: int, dtype: torch.dtype) -> float:
    """Operations per second of torch on 512 rows, weights rotating through more than a cache."""
    x, weights = torch.randn(512, d_in).to(dtype), [torch.randn(d_out, d_in).to(dtype) for _ in range(12)]
    return 2 * 512 * d_in * d_out / fastest(lambda: [F.linear(x, weight) for weight in weights]) * 12


def read_rate() -> float:
    """Bytes per second of reading 256 MiB."""
    data = torch.ones(64 * 2**20)
    return data.nbytes / fastest(data.sum)


def fastest(call: Callable[[], object]) -> float:
    """Seconds of the fastest of seven calls: what the machine can do, not what its neighbours leave."""
    times = []
    for _ in range(7):
        started = time.perf_counter()
        call()
        times.append(time.perf_counter() - started)
    return min(times)


def median(runs: Sequence[Run], name: str) -> float:
    return statistics.median(getattr(each, name) for each in runs)


def medians(runs: Sequence[Run]) -> dict[str, float]:
    return {name: round(median(runs, name), 2) for name in Run.__slots__}


def goal(name: str, value: float, target: float, *, at_most: bool = False) -> None:
    is_met = value <= target if at_most else value >= target
    print(f"goal {name} {value:.2f} {target} {'met' if is_met else 'short'}")


if __name__ == "__main__":
    main()
