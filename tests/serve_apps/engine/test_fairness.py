"""Tenants get equal service, nobody waits for ever, and no room is left empty while somebody waits."""

from collections import Counter, defaultdict
from dataclasses import dataclass, field, replace
from itertools import count
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from attribution.errors import Unavailable
from attribution.types import ZERO_ID
from serve_apps.engine.fair_queue import INPUT_COST, MAX_REMEMBERED, OUTPUT_COST, FairQueue
from serve_apps.engine.kv_cache import BlockPool
from serve_apps.engine.scheduler import PLACES_PER_PLACE_LEFT, Limits, Scheduler, StepPlan
from serve_apps.engine.types import EngineRequest, SamplingParams

NEVER = 10**9


@dataclass
class Traffic:
    """A scheduler, and what it did for whom as its plans tell."""

    scheduler: Scheduler
    served: Counter[str] = field(default_factory=Counter)
    begun: list[EngineRequest] = field(default_factory=list)
    _requests: dict[bytes, EngineRequest] = field(default_factory=dict)
    _seen: defaultdict[bytes, int] = field(default_factory=lambda: defaultdict(int))
    _numbers: count = field(default_factory=count)  # type: ignore[type-arg]

    def ask(
        self, tenant: str, num_prompt: int, max_tokens: int, adapter: int = 0, is_known: bool = False
    ) -> EngineRequest:
        number = next(self._numbers)
        key, adapter_id = number.to_bytes(32, "big"), bytes([adapter]) * 32 if adapter else ZERO_ID
        prompt = (0 if is_known else 1000 + number, *range(1, num_prompt))
        request = EngineRequest(key, "owner", tenant, prompt, SamplingParams(max_tokens), adapter_id)
        self._requests[key] = request
        self.scheduler.add(request)
        return request

    def waiting(self, tenant: str) -> int:
        mine = (key for key, each in self._requests.items() if each.tenant == tenant)
        return sum(key in self.scheduler and not self.scheduler.sequence(key).is_running for key in mine)

    def step(self) -> StepPlan:
        plan = self.scheduler.schedule(lambda _: True)
        for row in plan.rows:
            request, seen = self._requests[row.request_id], self._seen[row.request_id]
            if not seen:
                self.begun.append(request)
            new = max(0, min(row.end, len(request.prompt_ids)) - max(row.start, seen))
            self.served[request.tenant] += INPUT_COST * new + OUTPUT_COST * row.samples
            self._seen[row.request_id] = max(seen, row.end)
            if row.samples:
                sequence = self.scheduler.sequence(row.request_id)
                sequence.tokens.append(7)
                if sequence.num_generated == request.sampling.max_tokens:
                    self.scheduler.remove(row.request_id)
        return plan


def traffic(num_blocks: int = 400, block_size: int = 4, **limits: int) -> Traffic:
    values = {"max_batch_tokens": 16, "max_running": 4, "max_length": 100, "max_passed": NEVER, **limits}
    return Traffic(Scheduler(Limits(**values), BlockPool(num_blocks, block_size)))


@dataclass(frozen=True)
class Habit:
    """How a tenant asks: the most of each, and how many it always has waiting (one more than begin in a
    step: whoever stops waiting, if for a moment, is owed nothing more)."""

    num_prompt: int
    max_tokens: int
    num_adapters: int
    num_waiting: int


HABITS = st.builds(Habit, st.integers(1, 40), st.integers(1, 20), st.integers(1, 5), st.integers(7, 12))


@settings(max_examples=25, deadline=None)
@given(
    habits=st.lists(HABITS, min_size=2, max_size=5),
    max_running=st.integers(1, 6),
    num_blocks=st.sampled_from([18, 40, 400]),
    random=st.randoms(use_true_random=False),
)
def test_tenants_that_always_wait_are_served_alike(
    habits: list[Habit], max_running: int, num_blocks: int, random: Random
) -> None:
    """Their service never differs by more than the longest request costs in each of the places: whoever
    begins was served least, so it leads by no more than what it has running then. (With fewer adapters than
    tenants, adapters are shared; with a cache of 18 blocks, sequences are preempted.)"""
    t = traffic(num_blocks, max_running=max_running)
    costs = (INPUT_COST * h.num_prompt + OUTPUT_COST * h.max_tokens for h in habits)
    bound = max_running * max(costs)
    for _ in range(150):
        for index, habit in enumerate(habits):
            while t.waiting(str(index)) < habit.num_waiting:
                t.ask(
                    str(index),
                    random.randint(1, habit.num_prompt),
                    random.randint(1, habit.max_tokens),
                    random.randint(0, habit.num_adapters),
                )
        t.step()
        served = [t.served[str(index)] for index in range(len(habits))]
        assert max(served) - min(served) <= bound


@settings(max_examples=40, deadline=None)
@given(
    requests=st.lists(
        st.tuples(st.integers(0, 4), st.integers(1, 40), st.integers(1, 20), st.integers(0, 3)), max_size=40
    ),
    num_blocks=st.sampled_from([16, 30, 400]),
    max_running=st.integers(1, 8),
    max_passed=st.sampled_from([1, 5, NEVER]),
)
def test_no_room_is_left_while_somebody_waits_and_everybody_ends(
    requests: list[tuple[int, int, int, int]], num_blocks: int, max_running: int, max_passed: int
) -> None:
    t = traffic(num_blocks, max_running=max_running, max_passed=max_passed)
    for tenant, num_prompt, max_tokens, adapter in requests:
        t.ask(str(tenant), num_prompt, max_tokens, adapter)
    s = t.scheduler
    for _ in range(5000):
        if not (s.num_running or s.num_waiting):
            break
        plan = t.step()
        assert plan.rows
        is_idle = plan.num_tokens < s.limits.max_batch_tokens and len(plan.rows) < max_running
        assert not (is_idle and s.num_waiting and num_blocks == 400)  # only memory may keep anybody out
    assert s.num_running == s.num_waiting == 0 and s.pool.num_free == num_blocks - 1
    assert len(t.begun) == len(requests)


@pytest.mark.parametrize("hot", ["tenant", "adapter"])
def test_one_long_line_delays_nobody_else(hot: str) -> None:
    """A hundred requests of one tenant, or for one adapter of a tenant, and then one of another: it begins at
    once when a place is free, after those of the first at most."""
    t = traffic()
    for _ in range(100):
        t.ask("hot", 10, 5, adapter=1)
    for _ in range(20):
        t.step()
    num_before = len(t.begun)
    other = t.ask("other" if hot == "tenant" else "hot", 10, 5, adapter=2)
    while other not in t.begun:
        t.step()
    assert len(t.begun) - num_before <= 2


@pytest.mark.parametrize("max_passed", [3, 10, NEVER])
def test_whoever_was_passed_often_is_next_whatever_was_served(max_passed: int) -> None:
    """A tenant that was served much, and newcomers without end, each beginning where the first of them
    did."""
    t = traffic(max_running=1, max_passed=max_passed)
    t.ask("veteran", 20, 30)
    t.step()
    t.ask("newcomer", 1, 1)
    for _ in range(40):
        t.step()
        t.ask(f"newcomer {t.scheduler.num_waiting}, {len(t.begun)}", 1, 1)
    num_before, num_rivals = len(t.begun), t.scheduler.num_waiting
    last = t.ask("veteran", 1, 1)
    for number in range(200):
        t.ask(f"latest {number}", 1, 1)
        t.step()
    if max_passed == NEVER:
        assert last not in t.begun  # counters alone do starve it
    else:
        assert t.begun.index(last) - num_before <= max_passed + num_rivals  # who may be due before it is


def test_staying_away_saves_up_nothing() -> None:
    t = traffic(max_running=1)
    for _ in range(60):
        t.ask("always", 4, 4)
    for _ in range(100):
        t.step()
    for _ in range(20):
        t.ask("returns", 4, 4)
    served, num_before = t.served["always"], len(t.begun)
    while t.waiting("returns"):
        t.step()
    assert t.served["always"] - served >= t.served["returns"] - 2 * (4 * INPUT_COST + 4 * OUTPUT_COST)
    assert {each.tenant for each in t.begun[num_before : num_before + 3]} == {"always", "returns"}


@pytest.mark.parametrize("num_prompt", [1, 16, 90])
def test_a_short_prompt_waits_for_the_rest_of_one_long_prompt_at_most(num_prompt: int) -> None:
    t = traffic(max_running=8)
    for _ in range(6):
        t.ask("long", num_prompt, 1)
    t.step()
    short = t.ask("short", 2, 1)
    num_steps = 0
    while short not in t.begun:
        t.step()
        num_steps += 1
    limits = t.scheduler.limits
    assert num_steps <= -(-limits.max_length // limits.max_batch_tokens) + 1


def test_whoever_was_served_most_gives_way() -> None:
    """Three long answers of one tenant fill the cache; the one of another is never interrupted."""
    t = traffic(num_blocks=24, max_length=80)
    greedy = [t.ask("greedy", 8, 60) for _ in range(3)]
    for _ in range(4):
        t.step()
    modest = t.ask("modest", 8, 60)
    num_preempted = 0
    while modest.request_id in t.scheduler:
        t.step()
        if modest.request_id in t.scheduler:
            assert t.scheduler.sequence(modest.request_id).num_preempted == 0
        alive = [each.request_id for each in greedy if each.request_id in t.scheduler]
        num_preempted = max([num_preempted, *(t.scheduler.sequence(key).num_preempted for key in alive)])
    assert num_preempted > 0


def test_what_is_found_in_the_cache_costs_nothing() -> None:
    """Whoever asks what is in the cache gets more turns, as each takes less."""
    t = traffic(max_running=1)
    for _ in range(30):
        t.ask("known", 40, 1, is_known=True)
        t.ask("new", 40, 1)
    while len(t.begun) < 20:
        t.step()
    turns = Counter(each.tenant for each in t.begun)
    assert turns["known"] > 3 * turns["new"] > 0


@settings(max_examples=30, deadline=None)
@given(order=st.lists(st.integers(0, 3), min_size=30, max_size=80), num_late=st.integers(0, 20))
def test_a_tenant_alone_cannot_fill_the_queue(order: list[int], num_late: int) -> None:
    """Whoever has nothing waiting gets in while there is a place; nobody has more than so many for each place
    that is left to others."""
    t = traffic(max_running=4, max_waiting=20)
    s, places, held = t.scheduler, 24, Counter[str]()
    for each in [*([0] * 40), *order]:
        tenant, num_left = str(each), places - held.total()
        request = EngineRequest(b"?" * 32, "owner", tenant, (1,), SamplingParams(1))
        if num_left and held[tenant] <= PLACES_PER_PLACE_LEFT * (num_left - 1):
            s.check(request)
            t.ask(tenant, 1, 1)
            held[tenant] += 1
        else:
            with pytest.raises(Unavailable):
                s.check(request)
            assert held[tenant] or not num_left
    assert held["0"] <= places * PLACES_PER_PLACE_LEFT // (PLACES_PER_PLACE_LEFT + 1) + 1
    accepted = [EngineRequest(b"?" * 32, "owner", "late", (1,), SamplingParams(1))] * num_late
    if num_late >= places - held.total():  # what the engine has not taken in yet counts too
        with pytest.raises(Unavailable):
            s.check(replace(request, tenant="latest"), accepted)


def test_a_debt_is_remembered_among_thousands_of_strangers() -> None:
    queue, numbers = FairQueue(NEVER), count()

    def asked(tenant: str) -> EngineRequest:
        key = next(numbers).to_bytes(32, "big")
        request = EngineRequest(key, "owner", tenant, (1,), SamplingParams(1))
        queue.add(request)
        return request

    def served(request: EngineRequest, cost: int) -> None:
        queue.begin(request)
        queue.charge(request, cost)

    greedy = asked("greedy")
    queue.begin(greedy)
    served(asked("first"), 1)
    queue.charge(greedy, 10**6)  # a long answer, while it does not wait
    for number in range(3 * MAX_REMEMBERED):
        served(asked(f"stranger {number}"), 1)
    late = [asked("newcomer"), asked("newcomer"), asked("greedy")]
    for expected in late[:2]:
        assert next(queue.in_turn(lambda _: True)) is expected
        served(expected, 1000)
