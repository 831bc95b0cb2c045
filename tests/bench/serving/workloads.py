"""What is asked in every row, the same of every engine, and what is counted of the answers.

W1: 64 requests, all sent at once, of 128 prompt tokens and 64 new ones, over 16 adapters of ranks 8 and 16
whose popularity falls as 1/n. W2: the same on the base model. W4: W1 behind one prefix of 256 tokens that no
earlier run had. A sweep is W1 over more adapters, each asked at least once, 64 requests under way at a time.
Prompts are random tokens, new ones in every turn: nothing but W4's prefix is ever found in a cache."""

import random
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from itertools import pairwise
from typing import Any

RANKS = (8, 16)  # of adapters, in turn
AT_ONCE = 64
NUM_COLD = 7  # adapters that nobody has asked for yet, asked one after the other on an idle engine


@dataclass(frozen=True, slots=True)
class Workload:
    """``num_adapters`` 0 is the base model."""

    name: str
    num_adapters: int
    num_requests: int = AT_ONCE
    prompt_tokens: int = 128
    shared_prefix: int = 0
    max_tokens: int = 64


W1, W2, W4 = Workload("w1", 16), Workload("w2", 0), Workload("w4", 16, shared_prefix=256)
SWEEP = tuple(Workload(f"sweep_{num}", num, max(AT_ONCE, num)) for num in (16, 32, 64, 128, 256))
WORKLOADS = {work.name: work for work in (W1, W2, W4, *SWEEP)}


def part(work: Workload, share: int) -> Workload:
    """A ``share``-th of the requests over as small a part of the adapters: as many requests of each."""
    return replace(work, num_requests=work.num_requests // share, num_adapters=work.num_adapters // share)


@dataclass(frozen=True, slots=True)
class Ask:
    """One greedy request that ignores the end token. ``adapter`` counts from the most popular one."""

    adapter: int | None
    prompt: tuple[int, ...]
    max_tokens: int


@dataclass(frozen=True, slots=True)
class Run:
    """One workload, once."""

    tokens_per_s: float
    first_p50_s: float
    gap_p50_ms: float
    gap_p95_ms: float


def asks(work: Workload, turn: int) -> list[Ask]:
    """The requests of one run. The adapters are the same in every turn, the prompts never."""
    draw = random.Random(f"{work.name}/{turn}")
    prefix = random_tokens(draw, work.shared_prefix)
    picks = popular(range(work.num_adapters), work.num_requests) if work.num_adapters else []
    return [
        Ask(adapter, prefix + random_tokens(draw, work.prompt_tokens), work.max_tokens)
        for adapter in picks or [None] * work.num_requests
    ]


def random_tokens(draw: random.Random, num: int) -> tuple[int, ...]:
    return tuple(draw.randrange(1000, 40000) for _ in range(num))


def popular(adapters: Sequence[int], num: int) -> list[int]:
    """Every adapter once, the rest drawn with weights 1, 1/2, 1/3 …"""
    weights = [1 / (i + 1) for i in range(len(adapters))]
    draw = random.Random(7)
    picks = [*adapters[:num], *draw.choices(adapters, weights, k=max(0, num - len(adapters)))]
    draw.shuffle(picks)
    return picks


def summary(answers: Sequence[Sequence[float]], num_tokens: int, seconds: float) -> Run:
    """``answers`` are the seconds from sending each request to each piece of its answer."""
    gaps = gaps_ms(answers)
    return Run(
        tokens_per_s=round(num_tokens / seconds, 2),
        first_p50_s=round(statistics.median(times[0] for times in answers), 3),
        gap_p50_ms=round(statistics.median(gaps or [0.0]), 2),
        gap_p95_ms=round(gaps[int(0.95 * len(gaps))] if gaps else 0.0, 2),
    )


def gaps_ms(answers: Sequence[Sequence[float]]) -> list[float]:
    """Between the pieces of each answer, sorted."""
    return sorted(1e3 * (later - earlier) for times in answers for earlier, later in pairwise(times))


def medians(runs: Sequence[Run]) -> dict[str, float]:
    """Field by field, and how the speeds of the single runs scatter."""
    found = {name: statistics.median(getattr(run, name) for run in runs) for name in Run.__slots__}
    return {name: round(value, 3) for name, value in found.items()}


def row_of(runs: Sequence[Run], work: Workload) -> dict[str, Any]:
    """A row as it is kept: medians, every run, and what was asked."""
    return {**medians(runs), "runs": [asdict(run) for run in runs], "workload": asdict(work)}
