"""Our own rows, at the HTTP door: speed, the prefix cache, cold adapters, what they cost others, memory."""

import asyncio
import statistics
from collections.abc import Sequence
from dataclasses import replace

from serve_apps.engine.native.library import load_kernels
from tests.bench.serving import http_client
from tests.bench.serving.http_client import Server
from tests.bench.serving.ours import Platform, platform
from tests.bench.serving.rows import Plan, Row, Rows
from tests.bench.serving.workloads import NUM_COLD, RANKS, SWEEP, W1, W2, W4, Ask, asks

NUM_REGISTERED = 10_000
NUM_STREAMS, STREAM_TOKENS = 8, 160
NUM_NEWCOMERS, NEWCOMER_EVERY_S = 4, 0.5


def measure_few(rows: Rows, plan: Plan) -> None:
    """W1 to W4 where sixteen adapters are in use and little more is known."""
    few = ("w1", "w2", "w4", "request", "cold", "stall", "w4_without_cache")
    if rows.missing([f"ours/{name}" for name in few]):
        num_cold = len(RANKS) * (NUM_COLD + plan.repeat * NUM_NEWCOMERS)
        with platform(W1.num_adapters + num_cold, 0) as opened:
            _measure_few(rows, plan, opened)


def measure_sweep(rows: Rows, plan: Plan) -> None:
    """W1 over more and more adapters where 10,000 are registered."""
    if rows.missing([f"ours/{work.name}" for work in SWEEP]):
        half = replace(plan, limit_s=plan.limit_s / 2)  # a curve needs fewer repetitions
        num_active = SWEEP[-1].num_adapters
        with platform(num_active, NUM_REGISTERED - num_active) as opened:
            http_client.warm_up(opened.server, SWEEP[0])
            opened.wait_until_idle()
            for work in SWEEP:
                rows.measure(
                    f"ours/{work.name}", lambda work=work: http_client.row(opened.server, work, half)
                )


def _measure_few(rows: Rows, plan: Plan, opened: Platform) -> None:
    server = opened.server
    http_client.warm_up(server, W1)
    opened.wait_until_idle()
    rows.measure("ours/w1", lambda: http_client.row(server, W1, plan) | opened.pss_gib())
    if load_kernels() is not None:
        rows.measure("ours/deterministic", lambda: _deterministic(rows.found["ours/w1"]))
    rows.measure("ours/w2", lambda: http_client.row(server, W2, plan))
    rows.measure("ours/w4", lambda: _counted_w4(opened, plan))
    rows.measure("ours/request", lambda: {"p50_ms": round(asyncio.run(opened.request_p50_ms()), 2)})
    cold = range(W1.num_adapters + 1, len(server.models), len(RANKS))  # of the higher rank
    rows.measure("ours/cold", lambda: _cold(server, cold[:NUM_COLD]))
    rows.measure("ours/stall", lambda: _stall(server, cold[NUM_COLD:], plan))
    if rows.missing(["ours/w4_without_cache"]):
        opened.redeploy(reuses_prefixes=False)
        http_client.warm_up(server, W1)
        rows.measure("ours/w4_without_cache", lambda: http_client.row(server, W4, plan))


def _deterministic(w1: Row) -> Row:
    """No second measurement: what our kernels compute of a request never depends on what shares its batch."""
    return {"tokens_per_s": w1["tokens_per_s"], "runs": w1["runs"], "is_default": True}


def _counted_w4(opened: Platform, plan: Plan) -> Row:
    """With the share of the prompts' tokens that the engine computed."""
    before = asyncio.run(opened.prefilled())
    row = http_client.row(opened.server, W4, plan)
    num = (asyncio.run(opened.prefilled()) - before) / len(row["runs"])
    asked = W4.num_requests * (W4.shared_prefix + W4.prompt_tokens)
    return row | {"prefilled_share": round(num / asked, 3)}


def _cold(server: Server, adapters: Sequence[int]) -> Row:
    asked = [Ask(i, ask.prompt, 2) for i, ask in zip(adapters, asks(W1, -2), strict=False)]
    extra = asyncio.run(http_client.cold_extra_ms(server, asked))
    return {
        "cold_extra_ms": round(statistics.median(extra), 1),
        "worst_ms": round(max(extra), 1),
        "n": len(extra),
    }


def _stall(server: Server, cold: Sequence[int], plan: Plan) -> Row:
    """Eight streams while four others come with adapters that are loaded, and with four that are not: by how
    many steps the longest gap between two tokens of a stream grows. Medians over the turns."""
    turns = []
    for turn in range(plan.repeat):
        prompts = [replace(ask, prompt=ask.prompt[:16]) for ask in asks(W1, -3 - turn)]
        streams = [Ask(i, ask.prompt, STREAM_TOKENS) for i, ask in enumerate(prompts[:NUM_STREAMS])]
        warm = range(NUM_STREAMS, NUM_STREAMS + NUM_NEWCOMERS)
        for newcomers in (warm, cold[turn * NUM_NEWCOMERS :][:NUM_NEWCOMERS]):
            come = [Ask(i, ask.prompt, 1) for i, ask in zip(newcomers, prompts[NUM_STREAMS:], strict=False)]
            gaps = asyncio.run(http_client.gaps_beside(server, streams, come, NEWCOMER_EVERY_S))
            turns.append((statistics.median(gaps), gaps[int(0.99 * len(gaps))], gaps[-1]))
    warm_turns, cold_turns = turns[::2], turns[1::2]
    step, warm_p99, warm_max = (statistics.median(part) for part in zip(*warm_turns, strict=True))
    _, cold_p99, cold_max = (statistics.median(part) for part in zip(*cold_turns, strict=True))
    return {
        "step_ms": round(step, 1),
        "warm_p99_ms": round(warm_p99, 1),
        "warm_max_ms": round(warm_max, 1),
        "cold_p99_ms": round(cold_p99, 1),
        "cold_max_ms": round(cold_max, 1),
        "grown_steps": round((cold_max - warm_max) / step, 2),
    }
