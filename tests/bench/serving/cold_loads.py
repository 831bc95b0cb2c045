"""What a cold adapter costs: its own first token, and the streams that are running while it is loaded.

    python -m tests.bench.serving.cold_loads --out OUT.json [--adapters 8] [--streams 8]

On the engine alone, with adapters of rank 16 in a directory, none asked for before. First token: of each
adapter's first request against its second, at rest. Running streams: the time from one step to the next with
and without an adapter being loaded, in turn, so that a noisy machine disturbs both alike."""

import argparse
import json
import os
import statistics
import tempfile
import time
from collections.abc import Sequence
from itertools import count
from pathlib import Path

import torch

from cluster.adapters import pack, store_adapter
from cluster.config import load_settings
from cluster.models import base_model, linear_shapes, native_dtype
from cluster.storage import DirectoryStorage
from serve_apps.engine.engine import Engine
from serve_apps.engine.loading import EngineConfig, build_engine
from serve_apps.engine.scheduler import Limits
from serve_apps.engine.types import EngineRequest, SamplingParams
from tests import toy_models
from tests.bench.serving.report import Goal

RANK, PROMPT_TOKENS, STEPS_PER_LOAD = 16, 128, 12

_numbers = count(1)


def ask(engine: Engine, adapter_id: bytes, max_tokens: int) -> bytes:
    number = next(_numbers)
    prompt = tuple((number * 7919 + i * 31) % 40_000 + 1_000 for i in range(PROMPT_TOKENS))
    sampling = SamplingParams(max_tokens=max_tokens, temperature=0.0, ignore_eos=True)
    request = EngineRequest(number.to_bytes(32, "big"), "bench", "bench", prompt, sampling, adapter_id)
    engine.submit(request)
    return request.request_id


def first_token_ms(engine: Engine, adapter_id: bytes) -> float:
    started = time.perf_counter()
    request_id, took = ask(engine, adapter_id, 1), 0.0
    while not took:
        if any(event.request_id == request_id and event.finish for event in engine.step().events):
            took = 1e3 * (time.perf_counter() - started)
    return took


def gaps_ms(engine: Engine, num_streams: int, cold: Sequence[bytes]) -> tuple[list[float], list[float]]:
    """Of steps without and of steps with a load under way."""
    for _ in range(num_streams):
        ask(engine, bytes(32), STEPS_PER_LOAD * (2 * len(cold) + 3))
    while engine.load().num_running < num_streams:
        engine.step()
    calm, loading = list[float](), list[float]()
    for number in range(STEPS_PER_LOAD * 2 * len(cold)):
        turn, is_loading = number // STEPS_PER_LOAD // 2, number // STEPS_PER_LOAD % 2
        if is_loading and number % STEPS_PER_LOAD == 0:
            engine.prefetch(cold[turn])
        started = time.perf_counter()
        engine.step()
        (loading if is_loading else calm).append(1e3 * (time.perf_counter() - started))
    return calm, loading


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--adapters", type=int, default=8)
    parser.add_argument("--streams", type=int, default=8)
    options = parser.parse_args()
    base = base_model(load_settings())
    torch.set_num_threads(os.cpu_count() or 1)
    with tempfile.TemporaryDirectory() as folder:
        storage, shapes = DirectoryStorage(Path(folder)), linear_shapes(base.path)
        ids = [
            store_adapter(storage, pack(toy_models.random_adapter(base.base_id, shapes, RANK, seed, 0.01)))
            for seed in range(2 * options.adapters)
        ]
        engine = build_engine(base, storage, EngineConfig(dtype=native_dtype(), limits=Limits()))
        for _ in range(3):
            first_token_ms(engine, bytes(32))
        cold, cold_later = ids[: options.adapters], ids[options.adapters :]
        first = [(first_token_ms(engine, each), first_token_ms(engine, each)) for each in cold]
        calm, loading = gaps_ms(engine, options.streams, cold_later)
        assert engine.load().num_adapters == len(ids)
        engine.close()
    extra_ms = statistics.median(one - two for one, two in first)
    found = {
        "cold_extra_ms": round(extra_ms, 1),
        "warm_first_token_ms": round(statistics.median(two for _, two in first), 1),
        "gap_ms": {name: summary(gaps) for name, gaps in (("calm", calm), ("loading", loading))},
        "conditions": {"cores": os.cpu_count(), "load_before": round(os.getloadavg()[0], 1)},
    }
    options.out.write_text(json.dumps(found, indent=1) + "\n")
    print(json.dumps(found, indent=1))
    print(Goal("cold_extra_ms", extra_ms, 10, is_at_most=True))
    step = statistics.median(calm)
    print(Goal("steps_a_gap_grows_by", (max(loading) - max(calm)) / step, 1, is_at_most=True))


def summary(gaps: list[float]) -> dict[str, float]:
    ordered = sorted(gaps)
    at = {"p50": 0.5, "p95": 0.95, "max": 1.0}
    return {name: round(ordered[int(share * (len(ordered) - 1))], 1) for name, share in at.items()}


if __name__ == "__main__":
    main()
