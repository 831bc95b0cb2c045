"""What the serving bench rests on: the same is asked of everybody, and rows are measured once."""

from importlib import import_module
from pathlib import Path

import pytest

from tests.bench.serving.report import Goal, goals
from tests.bench.serving.rows import Plan, Rows, repeated
from tests.bench.serving.workloads import SWEEP, W1, W2, W4, Workload, asks, part, summary

ROOT = Path(__file__).parent.parent
OPTIONAL = ("matplotlib", "triton", "vllm")  # some of which a benchmark may want
MODULES = sorted(
    path.relative_to(ROOT).with_suffix("").as_posix().replace("/", ".")
    for path in (ROOT / "tests/bench").rglob("[!_]*.py")
)


@pytest.mark.parametrize("module", MODULES)
def test_every_benchmark_finds_what_it_imports(module: str) -> None:
    """Those that want a device or an hour run rarely; what they share moves meanwhile."""
    try:
        import_module(module)
    except ModuleNotFoundError as error:
        if error.name not in OPTIONAL:
            raise
        pytest.skip(f"no {error.name}")


@pytest.mark.parametrize("work", [W1, W2, W4, *SWEEP, part(W4, 4)], ids=lambda work: work.name)
def test_every_turn_asks_the_same_adapters_for_prompts_that_no_turn_had(work: Workload) -> None:
    first, again, other = asks(work, 0), asks(work, 0), asks(work, 1)
    assert first == again
    assert [ask.adapter for ask in first] == [ask.adapter for ask in other]
    assert {ask.adapter for ask in first} == set(range(work.num_adapters) if work.num_adapters else [None])
    assert len({ask.prompt for ask in (*first, *other)}) == 2 * work.num_requests
    assert len({ask.prompt[: work.shared_prefix] for ask in first}) == 1
    if work.shared_prefix:
        assert first[0].prompt[: work.shared_prefix] != other[0].prompt[: work.shared_prefix]
    assert {len(ask.prompt) for ask in first} == {work.shared_prefix + work.prompt_tokens}


def test_a_row_is_measured_once_and_found_by_the_next_start(tmp_path: Path) -> None:
    file = tmp_path / "rows.json"
    Rows(file, is_fresh=False).measure("a", lambda: {"value": 1})
    again = Rows(file, is_fresh=False)
    again.measure("a", lambda: {"value": 2})
    assert again.found["a"]["value"] == 1 and again.missing(["a", "b"]) == ["b"]
    fresh = Rows(file, is_fresh=True)
    fresh.measure("a", lambda: {"value": 3})
    assert fresh.found["a"]["value"] == 3


def test_a_slow_row_is_repeated_less_often_but_measured_once_at_least() -> None:
    assert repeated(lambda turn: turn, Plan(repeat=3, limit_s=1e9)) == [0, 1, 2]
    assert repeated(lambda turn: turn, Plan(repeat=3, limit_s=0.0)) == [0]


def test_a_summary_counts_what_clients_saw() -> None:
    run = summary([[1.0, 1.1, 1.3], [2.0, 2.1, 2.2]], num_tokens=6, seconds=3.0)
    assert (run.tokens_per_s, run.first_p50_s, run.gap_p50_ms) == (2.0, 1.5, 100.0)


def test_goals_say_what_is_met_and_what_is_missing() -> None:
    assert str(Goal("fast", 2.0, 1.5)) == "goal fast 2.00 1.5 met"
    assert str(Goal("small", 2.0, 1.5, is_at_most=True)) == "goal small 2.00 1.5 short"
    found = {"ours/w1": {"tokens_per_s": 90.0}, "machine": {"w1_ceiling": 100.0}, "vllm": {"error": "no AVX"}}
    lines = {line.split()[1]: line for line in map(str, goals(found))}
    assert lines["w1_of_ceiling"] == "goal w1_of_ceiling 0.90 0.55 met"
    assert lines["w1_over_vllm"] == "goal w1_over_vllm - 4.5 short  # no vllm/w1.tokens_per_s"
