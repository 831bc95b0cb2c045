"""Tokens per second of the bare engine: paid-question-like prompts over 0 or more adapters, all sent at once.

    OMP_WAIT_POLICY=PASSIVE python -m tests.bench.serving.engine_speed --home .openledger --adapters 4

Prints one JSON object with its conditions and a line ``goal NAME VALUE TARGET met|short``."""

import argparse
import json
import os
import time
from pathlib import Path

import torch

from attribution.types import ZERO_ID
from cluster.adapters import pack, store_adapter
from cluster.config import Settings
from cluster.models import ask, base_model, linear_shapes, load_tokenizer, native_dtype
from cluster.storage import open_storage
from serve_apps.engine.loading import EngineConfig, build_engine
from serve_apps.engine.scheduler import Limits
from serve_apps.engine.types import EngineRequest, SamplingParams
from tests import toy_models

TARGET_TOKENS_PER_S = 150
QUESTION = "What is the name of lint rule {i}, which looks for things a module defines and never uses?"


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--home", type=Path, default=Path(".openledger"))
    parser.add_argument("--requests", type=int, default=32)
    parser.add_argument("--adapters", type=int, default=4)
    parser.add_argument("--max-tokens", type=int, default=64)
    parser.add_argument("--threads", type=int, default=0)
    given = parser.parse_args()
    torch.set_num_threads(given.threads or os.cpu_count() or 1)
    settings = Settings(home=given.home)
    base, storage = base_model(settings), open_storage(settings.storage_url)
    shapes = linear_shapes(base.path)
    adapters = [
        store_adapter(storage, pack(toy_models.random_adapter(base.base_id, shapes, 16, seed, 0.01)))
        for seed in range(given.adapters)
    ] or [ZERO_ID]
    config = EngineConfig(dtype=native_dtype(), limits=Limits(max_running=32))
    engine, tokenizer = build_engine(base, storage, config), load_tokenizer(base.path)
    for i in range(given.requests):
        prompt = tuple(ask(tokenizer, QUESTION.format(i=i)))
        params = SamplingParams(given.max_tokens, temperature=0, ignore_eos=True)
        number = i.to_bytes(32, "big")
        engine.submit(EngineRequest(number, "bench", "bench", prompt, params, adapters[i % len(adapters)]))
    load_before, started, first_s = os.getloadavg()[0], time.monotonic(), 0.0
    num_tokens = num_steps = num_done = 0
    while num_done < given.requests:
        for event in engine.step().events:
            num_tokens += len(event.token_ids)
            num_done += event.finish is not None
        num_steps += 1
        first_s = first_s or (time.monotonic() - started if num_tokens else 0.0)
    wall_s = time.monotonic() - started
    engine.close()
    rate = num_tokens / wall_s
    result = {
        "tokens_per_s": round(rate, 1),
        "first_token_s": round(first_s, 2),
        "wall_s": round(wall_s, 1),
        "steps": num_steps,
        "requests": given.requests,
        "prompt_tokens": len(prompt),
        "adapters": given.adapters,
        "rank": 16,
        "dtype": str(config.dtype),
        "threads": torch.get_num_threads(),
        "cores": os.cpu_count(),
        "load_before": round(load_before, 1),
    }
    print(json.dumps(result))
    verdict = "met" if rate >= TARGET_TOKENS_PER_S else "short"
    print(f"goal engine_tokens_per_s {rate:.0f} {TARGET_TOKENS_PER_S} {verdict}")


if __name__ == "__main__":
    main()
