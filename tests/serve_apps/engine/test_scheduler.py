"""Scheduling is arithmetic on integers: every theorem here runs without a tensor."""

import random
import sys
from dataclasses import replace

import pytest

from attribution.errors import Rejected, Unavailable
from attribution.types import ZERO_ID
from serve_apps.engine.kv_cache import NULL_BLOCK, BlockPool, slots
from serve_apps.engine.scheduler import Limits, Scheduler, StepPlan
from serve_apps.engine.types import EngineRequest, SamplingParams

ADAPTER = b"\x01" * 32


def request(number: int, num_prompt: int, max_tokens: int = 4, adapter_id: bytes = ZERO_ID) -> EngineRequest:
    prompt = (1000 + number, *range(1, num_prompt))[:num_prompt]
    return EngineRequest(
        number.to_bytes(32, "big"), "owner", "tenant", prompt, SamplingParams(max_tokens), adapter_id
    )


def scheduler(num_blocks: int = 33, block_size: int = 4, **limits: int) -> Scheduler:
    values = {"max_batch_tokens": 16, "max_running": 8, "max_waiting": 100, "max_length": 100, **limits}
    return Scheduler(Limits(**values), BlockPool(num_blocks, block_size))


def step(s: Scheduler, is_ready=lambda _: True) -> StepPlan:  # type: ignore[no-untyped-def]
    """One step in which every sampling row gets token 7, and a row at its last token leaves."""
    plan = s.schedule(is_ready)
    for row in plan.rows:
        if row.samples:
            sequence = s.sequence(row.request_id)
            sequence.tokens.append(7)
            if sequence.num_generated == sequence.request.sampling.max_tokens:
                s.remove(row.request_id)
    return plan


def test_the_scheduling_modules_need_no_torch() -> None:
    import subprocess

    code = (
        "import sys; sys.modules['torch'] = None;"
        "import serve_apps.engine.scheduler, serve_apps.engine.kv_cache, serve_apps.engine.types,"
        "serve_apps.engine.adapter_cache, serve_apps.engine.text"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_a_long_prompt_is_computed_in_chunks_under_the_budget() -> None:
    s = scheduler()
    s.add(request(1, num_prompt=40))
    plans = [step(s) for _ in range(4)]
    assert [plan.num_tokens for plan in plans] == [16, 16, 8, 1]
    assert [row.samples for plan in plans for row in plan.rows] == [False, False, True, True]
    assert plans[1].rows[0].token_ids == tuple(range(16, 32))


def test_decoding_goes_before_any_prompt() -> None:
    s = scheduler()
    s.add(request(1, num_prompt=2, max_tokens=10))
    step(s)
    s.add(request(2, num_prompt=60))
    plan = step(s)
    assert [len(row.token_ids) for row in plan.rows] == [1, 15]


def test_rows_of_one_token_come_first_and_adapters_lie_together() -> None:
    s = scheduler(max_batch_tokens=64)
    for number, adapter in enumerate((ZERO_ID, ADAPTER, ZERO_ID, ADAPTER)):
        s.add(request(number, num_prompt=3, adapter_id=adapter))
    assert [row.adapter_id for row in step(s).rows] == [ZERO_ID, ZERO_ID, ADAPTER, ADAPTER]


def test_whoever_waits_for_an_adapter_lets_others_pass() -> None:
    s = scheduler()
    s.add(request(1, 3, adapter_id=ADAPTER))
    s.add(request(2, 3))
    plan = step(s, lambda adapter_id: adapter_id == ZERO_ID)
    assert [row.request_id for row in plan.rows] == [(2).to_bytes(32, "big")]
    assert s.num_waiting == 1


def test_nobody_passes_a_prompt_that_waits_for_room() -> None:
    s = scheduler(num_blocks=9, max_batch_tokens=64, max_length=32)
    s.add(request(1, num_prompt=20))
    s.add(request(2, num_prompt=20))
    s.add(request(3, num_prompt=2))
    assert [row.request_id for row in step(s).rows] == [(1).to_bytes(32, "big")]


def test_removal_frees_blocks_at_once() -> None:
    s = scheduler()
    free = s.pool.num_free
    s.add(request(1, 10))
    step(s)
    assert s.pool.num_free < free
    s.remove((1).to_bytes(32, "big"))
    assert s.pool.num_free == free and s.num_running == 0


def test_a_full_cache_preempts_the_latest_comer_and_everybody_still_ends() -> None:
    s = scheduler(num_blocks=9, max_length=32)
    for number in range(3):
        s.add(request(number, num_prompt=8, max_tokens=20))
    preempted = False
    for _ in range(200):
        running = s.num_running
        plan = step(s)
        preempted |= s.num_running < running and bool(plan.rows)
        if not (s.num_running or s.num_waiting):
            break
    assert preempted and s.num_running == s.num_waiting == 0
    assert s.pool.num_free == 8


@pytest.mark.parametrize("seed", range(5))
def test_any_mix_ends_within_budget_and_nobody_else_reads_a_block_before_it_is_full(seed: int) -> None:
    rng = random.Random(seed)
    s = scheduler(num_blocks=12, block_size=3, max_length=33)
    for number in range(30):
        s.add(
            with_tokens(
                number, [rng.randint(1, 2), *range(rng.randint(0, 19))], max_tokens=rng.randint(1, 12)
            )
        )
    for _ in range(2000):
        plan = s.schedule(lambda _: True)
        writer = {row.blocks[i]: row for row in plan.rows for i in range(row.start // 3, -(-row.end // 3))}
        assert NULL_BLOCK not in writer
        for row in plan.rows:
            for index, block in enumerate(row.blocks):
                filled = writer.get(block, row)  # by another only what it fills, and only to begin after
                assert filled is row or (index + 1) * 3 <= min(filled.end, row.start)
        assert plan.num_tokens <= s.limits.max_batch_tokens
        for row in plan.rows:
            assert len(row.blocks) * 3 >= row.end
            if row.samples:
                sequence = s.sequence(row.request_id)
                sequence.tokens.append(0)
                if sequence.num_generated == sequence.request.sampling.max_tokens or rng.random() < 0.05:
                    s.remove(row.request_id)
        if not (s.num_running or s.num_waiting):
            break
    assert s.num_running == s.num_waiting == 0 and s.pool.num_free == 11


def test_every_block_is_announced_as_new_exactly_once_per_owner() -> None:
    s = scheduler()
    s.add(request(1, num_prompt=20, max_tokens=10))
    announced = [block for _ in range(11) for row in step(s).rows for block in row.new_blocks]
    assert len(announced) == len(set(announced)) == -(-29 // 4)


def test_what_could_never_run_is_refused_at_the_door() -> None:
    s = scheduler(max_waiting=2, max_running=1)
    with pytest.raises(Rejected) as too_long:
        s.check(request(1, num_prompt=90, max_tokens=11))
    assert too_long.value.code == "context_length_exceeded"
    assert "101" in too_long.value.message and "100" in too_long.value.message
    with pytest.raises(Rejected) as empty:
        s.check(request(1, num_prompt=0))
    assert empty.value.code == "prompt_empty"
    with pytest.raises(Rejected):
        scheduler(num_blocks=3).check(request(1, num_prompt=8, max_tokens=1))
    s.check(request(2, 1))
    s.add(request(2, 1))
    s.check(request(3, 1))
    s.add(request(3, 1))
    with pytest.raises(Unavailable) as full:
        s.check(request(4, 1))
    assert full.value.code == "engine_full"
    s.check(with_tokens(5, [1], tenant="other"))  # the last place is for those who have none


def test_slots_follow_the_block_table() -> None:
    assert slots([5, 2], 3, 6, 4) == [23, 8, 9]


def with_tokens(
    number: int,
    tokens: list[int],
    tenant: str = "tenant",
    adapter_id: bytes = ZERO_ID,
    max_tokens: int = 4,
) -> EngineRequest:
    params = SamplingParams(max_tokens)
    return EngineRequest(number.to_bytes(32, "big"), "owner", tenant, tuple(tokens), params, adapter_id)


def finish(s: Scheduler, each: EngineRequest) -> list[int]:
    """Run one request to its end; the tokens of each of its rows."""
    s.add(each)
    sizes = []
    while s.num_running or s.num_waiting:
        sizes += [len(row.token_ids) for row in step(s).rows]
    return sizes


def test_a_prompt_that_begins_like_an_earlier_one_computes_only_the_rest() -> None:
    s = scheduler(max_batch_tokens=64)
    prompt = list(range(18))
    assert finish(s, with_tokens(1, prompt)) == [18, 1, 1, 1]
    assert finish(s, with_tokens(2, [*prompt[:12], 99, 98])) == [2, 1, 1, 1]
    assert finish(s, with_tokens(3, prompt[:16])) == [4, 1, 1, 1]  # one token must be left to sample after
    assert finish(s, with_tokens(4, [*prompt, 7, 7, 7, 1, 2])) == [3, 1, 1, 1]  # the answer's blocks too
    assert (s.num_prefilled, s.num_reused) == (18 + 2 + 4 + 3, 12 + 12 + 20)


@pytest.mark.parametrize(
    "other",
    [{"tenant": "other"}, {"adapter_id": ADAPTER}, {"tokens": [5, *range(1, 18)]}],
    ids=["tenant", "adapter", "first token"],
)
def test_nothing_is_reused_across_tenants_adapters_or_different_pasts(other: dict[str, object]) -> None:
    s = scheduler(max_batch_tokens=64)
    finish(s, with_tokens(1, list(range(18))))
    assert finish(s, with_tokens(2, **{"tokens": list(range(18)), **other})) == [18, 1, 1, 1]
    assert s.num_reused == 0


def test_running_requests_share_the_blocks_of_their_common_beginning() -> None:
    s = scheduler(max_batch_tokens=64)
    prompt = list(range(16))
    s.add(with_tokens(1, prompt))
    step(s)
    s.add(with_tokens(2, [*prompt, 50]))
    rows = {row.request_id[-1]: row for row in step(s).rows}
    assert rows[1].blocks[:4] == rows[2].blocks[:4] and rows[2].start == 16
    assert not set(rows[2].blocks[:4]) & set(rows[2].new_blocks)  # what is shared is never cleared
    assert not set(rows[1].blocks[4:]) & set(rows[2].blocks[4:])
    s.remove((1).to_bytes(32, "big"))
    assert step(s).rows[0].blocks[:4] == rows[2].blocks[:4]
    s.remove((2).to_bytes(32, "big"))
    assert s.pool.num_free == 32


def test_requests_of_one_step_compute_their_common_beginning_once() -> None:
    """Sixty-four at once over sixteen adapters, each adapter with its own 256 tokens, and a cold cache."""
    s = scheduler(num_blocks=4000, block_size=16, max_batch_tokens=512, max_running=64, max_length=300)
    for number in range(64):
        beginning, rest = list(range(256)), [1000 + number] * 20
        s.add(with_tokens(number, beginning + rest, adapter_id=bytes([1 + number % 16]) * 32))
    while s.num_running or s.num_waiting:
        step(s)
    assert s.num_prefilled == 16 * 256 + 64 * 20
    assert s.num_reused == 48 * 256


def test_the_second_of_one_step_begins_behind_the_first() -> None:
    s = scheduler(max_batch_tokens=64)
    for number in range(2):
        s.add(with_tokens(number, [*range(16), 50 + number]))
    first, second = sorted(step(s).rows, key=lambda row: row.start)
    assert (first.start, first.end, second.start, second.end) == (0, 17, 16, 17)
    assert first.blocks[:4] == second.blocks[:4] and first.blocks[4] != second.blocks[4]


def test_the_least_recently_used_prefix_is_overwritten_first() -> None:
    s = scheduler(num_blocks=11, max_batch_tokens=64, max_length=40)  # 10 blocks, 4 or 5 a request
    first, second, third = (list(range(100 * n, 100 * n + 13)) for n in (1, 2, 3))
    finish(s, with_tokens(1, first))
    finish(s, with_tokens(2, second))
    finish(s, with_tokens(3, first))
    assert s.num_reused == 12
    finish(s, with_tokens(4, third))
    assert finish(s, with_tokens(5, first))[0] == 1
    assert finish(s, with_tokens(6, second))[0] > 1


def test_what_was_preempted_finds_most_of_its_past_again() -> None:
    s = scheduler(num_blocks=9, max_batch_tokens=64, max_length=32)
    for number in range(2):
        s.add(with_tokens(number, list(range(100 * number, 100 * number + 14))))
    sizes = []
    while s.num_running or s.num_waiting:
        sizes += [len(row.token_ids) for row in step(s).rows]
    assert s.num_reused > 0 and s.pool.num_free == 8


def test_without_reuse_everything_is_computed() -> None:
    s = scheduler(max_batch_tokens=64, reuses_prefixes=False)
    for number in range(3):
        assert finish(s, with_tokens(number, list(range(18))))[0] == 18
    assert s.num_reused == 0


PUBLIC = list(range(500, 510))  # two blocks and a half


def asked(number: int, tenant: str, rest: list[int], num_public: int = 10) -> EngineRequest:
    each = with_tokens(number, [*PUBLIC, *rest], tenant=tenant, adapter_id=ADAPTER)
    return replace(each, num_public=num_public)


def test_what_was_published_with_an_adapter_is_computed_once_for_all_tenants() -> None:
    """Whole blocks of it, and nothing behind them, though both say the same there; a tenant itself finds
    all."""
    s, rest = scheduler(max_batch_tokens=64), list(range(20))
    assert finish(s, asked(1, "one", rest))[0] == 30
    assert finish(s, asked(2, "two", rest))[0] == 22
    assert s.num_reused == 8
    assert finish(s, asked(3, "two", rest))[0] == 2
    assert s.num_reused == 8 + 28


def test_without_a_publication_or_with_less_of_it_less_is_shared() -> None:
    s, rest = scheduler(max_batch_tokens=64), list(range(20))
    finish(s, asked(1, "one", rest))
    assert finish(s, asked(2, "two", rest, num_public=0))[0] == 30
    assert finish(s, asked(3, "three", rest, num_public=7))[0] == 26
    other = replace(asked(4, "four", rest), adapter_id=b"\x02" * 32)
    assert finish(s, other)[0] == 30


@pytest.mark.parametrize(("place", "num_found"), [(0, 0), (3, 0), (4, 4), (7, 4), (8, 8)])
def test_one_token_that_differs_ends_what_is_public(place: int, num_found: int) -> None:
    """The prompt is public up to there, and only the equal blocks before it are found."""
    s, rest = scheduler(max_batch_tokens=64), list(range(20))
    finish(s, asked(1, "one", rest))
    tokens = [*PUBLIC, *rest]
    tokens[place] = 999
    changed = with_tokens(2, tokens, tenant="two", adapter_id=ADAPTER)
    finish(s, replace(changed, num_public=place))
    assert s.num_reused == num_found


def test_a_continuation_of_public_blocks_is_nobody_elses() -> None:
    """Neither by who claims less to be public, nor by who has nothing but the prefix."""
    s = scheduler(max_batch_tokens=64)
    finish(s, asked(1, "one", list(range(20))))
    for number, num_public in enumerate((8, 9, 10, 4, 0), start=2):
        before = s.num_reused
        finish(s, asked(number, f"tenant {number}", list(range(20)), num_public))
        assert s.num_reused - before == num_public // 4 * 4
