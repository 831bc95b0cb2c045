"""What the rows come to: the issue's goals, ratios against the best peer of the same run."""

from collections.abc import Mapping
from dataclasses import dataclass

from tests.bench.serving.rows import Row
from tests.bench.serving.workloads import SWEEP

Found = Mapping[str, Row]


@dataclass(frozen=True, slots=True)
class Goal:
    """``value`` is None where a row is missing, ours or a peer's; ``why`` then says which."""

    name: str
    value: float | None
    target: float
    is_at_most: bool = False
    why: str = ""

    def __str__(self) -> str:
        if self.value is None:
            return f"goal {self.name} - {self.target} short  # {self.why}"
        is_met = self.value <= self.target if self.is_at_most else self.value >= self.target
        return f"goal {self.name} {self.value:.2f} {self.target} {'met' if is_met else 'short'}"


def goals(found: Found) -> list[Goal]:
    """Every figure of the serving table, in its order."""

    def ratio(name: str, upper: str, lower: str, target: float) -> Goal:
        above, below = _value(found, upper), _value(found, lower)
        if above is None or below is None:
            return Goal(name, None, target, why=f"no {upper if above is None else lower}")
        return Goal(name, above / below, target)

    def most(name: str, of: str, target: float) -> Goal:
        return Goal(name, _value(found, of), target, is_at_most=True, why=f"no {of}")

    sweep = [f"ours/{work.name}.tokens_per_s" for work in SWEEP]
    return [
        ratio("w1_of_ceiling", "ours/w1.tokens_per_s", "machine.w1_ceiling", 0.55),
        ratio("w1_over_vllm", "ours/w1.tokens_per_s", "vllm/w1.tokens_per_s", 4.5),
        ratio("bare_w1_of_ceiling", "bare.w1_tokens_per_s", "machine.w1_ceiling", 0.60),
        most("w1_first_p50_s", "ours/w1.first_p50_s", 2.5),
        most("w1_gap_p50_ms", "ours/w1.gap_p50_ms", 60),
        ratio("w1_over_w2", "ours/w1.tokens_per_s", "ours/w2.tokens_per_s", 0.80),
        ratio("w2_of_ceiling", "ours/w2.tokens_per_s", "machine.w2_ceiling", 0.65),
        ratio("w2_over_vllm", "ours/w2.tokens_per_s", "vllm/w2.tokens_per_s", 1.05),
        most("cold_extra_ms", "ours/cold.cold_extra_ms", 10),
        most("cold_grows_gaps_by_steps", "ours/stall.grown_steps", 1),
        ratio("registered_10000_over_w1", sweep[0], "ours/w1.tokens_per_s", 0.95),
        Goal("w4_tokens_per_s", _value(found, "ours/w4.tokens_per_s"), 400, why="no ours/w4"),
        ratio("w4_over_without_cache", "ours/w4.tokens_per_s", "ours/w4_without_cache.tokens_per_s", 1.35),
        most("w4_prefilled_share", "ours/w4.prefilled_share", 0.55),
        most("engine_pss_gib", "ours/w1.engine_pss_gib", 1.5),
        ratio("deterministic_over_default", "ours/deterministic.tokens_per_s", "ours/w1.tokens_per_s", 0.60),
        most("request_p50_ms", "ours/request.p50_ms", 5),
    ]


def _value(found: Found, path: str) -> float | None:
    row, _, field = path.partition(".")
    value = found.get(row, {}).get(field)
    return None if value is None else float(value)


def best_peer(found: Found, work: str) -> str | None:
    """The row of the fastest engine that is not ours."""
    peers = {name: row for name, row in found.items() if name.endswith(f"/{work}") and name[:5] != "ours/"}
    fast = {name: row["tokens_per_s"] for name, row in peers.items() if "tokens_per_s" in row}
    return max(fast, key=lambda name: fast[name], default=None)


def show(found: Found, of: list[Goal]) -> None:
    """Every row with a speed, against the best peer's, then the goals."""
    print(f"{'row':22} tokens/s  first token s  gap ms  runs  against the best peer")
    for name, row in found.items():
        work = name.partition("/")[2]
        best = best_peer(found, work.split("_")[0] if work.startswith("w") else "w1")
        if "first_p50_s" in row:
            times = f"{row['tokens_per_s'] / found[best]['tokens_per_s']:.2f} x {best}" if best else ""
            figures = f"{row['tokens_per_s']:8.1f} {row['first_p50_s']:14.2f} {row['gap_p50_ms']:7.1f}"
            print(f"{name:22} {figures} {len(row['runs']):5}  {times}")
    for goal in of:
        print(goal)
