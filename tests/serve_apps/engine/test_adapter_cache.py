"""The adapter cache keeps its budget, its leases and its grudges; loads are integers here."""

import threading
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from attribution.errors import Rejected, Unavailable
from serve_apps.engine.adapter_cache import AdapterCache, CacheLimits, Loaded

A, B, C, D = (bytes([n]) * 32 for n in (1, 2, 3, 4))
LIMITS = CacheLimits(budget_bytes=20, max_adapter_bytes=10, load_timeout_s=5, num_loaders=2, refusal_ttl_s=9)


def settle(cache: AdapterCache[str], is_done: Callable[[], bool]) -> None:
    for _ in range(500):
        cache.poll()
        if is_done():
            return
        cache.wait(0.01)
    raise AssertionError("did not settle")


def load(adapter_id: bytes) -> Loaded[str]:
    return Loaded(adapter_id.hex(), 10)


def test_an_adapter_in_use_is_never_evicted_and_the_next_one_waits() -> None:
    cache = AdapterCache(load, LIMITS)
    for key in (A, B):
        cache.acquire(key)
    settle(cache, lambda: cache.is_ready(A) and cache.is_ready(B))
    cache.acquire(C)
    cache.poll()
    assert not cache.is_ready(C) and cache.get(A) == A.hex() and cache.used_bytes == 20
    cache.release(A)
    settle(cache, lambda: cache.is_ready(C))
    assert cache.resident == {B, C} and cache.used_bytes == 20


def test_the_least_recently_used_idle_adapter_goes_first() -> None:
    cache = AdapterCache(load, LIMITS)
    for key in (A, B, A):
        cache.acquire(key)
        settle(cache, lambda key=key: cache.is_ready(key))  # type: ignore[misc]
        cache.release(key)
    cache.acquire(C)
    settle(cache, lambda: cache.is_ready(C))
    assert cache.resident == {A, C}


def test_one_load_serves_all_who_ask_meanwhile() -> None:
    loads = []
    gate = threading.Event()

    def slow(adapter_id: bytes) -> Loaded[str]:
        loads.append(adapter_id)
        gate.wait(5)
        return Loaded("x", 1)

    cache = AdapterCache(slow, LIMITS)
    for _ in range(3):
        cache.acquire(A)
        cache.poll()
    gate.set()
    settle(cache, lambda: cache.is_ready(A))
    assert loads == [A] and cache.num_leases == 3


def test_a_failed_load_is_told_once_and_remembered_for_a_while() -> None:
    now = [0.0]
    loads = []

    def broken(adapter_id: bytes) -> Loaded[str]:
        loads.append(adapter_id)
        raise Rejected("adapter_shape", "rank 3 of 4")

    cache: AdapterCache[str] = AdapterCache(broken, LIMITS, clock=lambda: now[0])
    cache.acquire(A)
    failed: dict[bytes, object] = {}
    settle(cache, lambda: bool(failed.update(cache.poll()) or failed))  # type: ignore[func-returns-value]
    with pytest.raises(Rejected, match="rank 3 of 4"):
        cache.acquire(A)
    assert loads == [A] and cache.num_leases == 0
    now[0] = 10.0
    cache.acquire(A)
    settle(cache, lambda: len(loads) == 2)


def test_a_load_that_hangs_is_given_up_and_keeps_its_share_until_it_ends() -> None:
    now = [0.0]
    gate = threading.Event()

    def hangs(adapter_id: bytes) -> Loaded[str]:
        gate.wait(5)
        return Loaded("late", 10)

    cache = AdapterCache(hangs, LIMITS, clock=lambda: now[0])
    cache.acquire(A)
    cache.poll()
    now[0] = 6.0
    assert cache.poll()[A].code == "adapter_timeout"
    assert cache.used_bytes == 10
    now[0] = 100.0
    with pytest.raises(Unavailable):
        cache.acquire(A)
    gate.set()
    settle(cache, lambda: cache.used_bytes == 0)
    assert not cache.resident


def test_too_large_an_adapter_is_refused() -> None:
    cache = AdapterCache(lambda _: Loaded("x", 11), LIMITS)
    cache.acquire(A)
    failed: dict[bytes, object] = {}
    settle(cache, lambda: bool(failed.update(cache.poll()) or failed))  # type: ignore[func-returns-value]
    assert failed[A].code == "adapter_too_large"  # type: ignore[attr-defined]
    assert cache.used_bytes == 0


def test_what_is_prefetched_is_ready_without_a_lease_and_is_loaded_once() -> None:
    loads = []
    cache = AdapterCache(lambda key: loads.append(key) or Loaded("x", 10), LIMITS)  # type: ignore[func-returns-value]
    for _ in range(3):
        cache.prefetch(A)
    settle(cache, lambda: cache.is_ready(A))
    cache.prefetch(A)
    cache.acquire(A)
    assert loads == [A] and cache.num_leases == 1 and cache.get(A) == "x"


def test_prefetching_evicts_what_is_idle_and_nothing_else() -> None:
    cache = AdapterCache(load, LIMITS)
    for key in (A, B):
        cache.acquire(key)
    settle(cache, lambda: cache.is_ready(A) and cache.is_ready(B))
    cache.prefetch(C)
    cache.poll()
    assert cache.resident == {A, B} and cache.used_bytes == 20
    cache.release(A)
    cache.prefetch(C)
    settle(cache, lambda: cache.is_ready(C))
    assert cache.resident == {B, C}


def test_a_prefetch_does_not_overtake_those_who_wait() -> None:
    gate = threading.Event()
    cache = AdapterCache(lambda key: gate.wait(5) and Loaded("x", 1), LIMITS)  # type: ignore[arg-type,return-value]
    for key in (A, B):
        cache.acquire(key)
        cache.poll()
    cache.acquire(C)
    cache.prefetch(D)
    gate.set()
    settle(cache, lambda: cache.is_ready(C))
    assert cache.resident == {A, B, C}


def test_a_failed_prefetch_is_told_to_who_asks_next() -> None:
    def broken(adapter_id: bytes) -> Loaded[str]:
        raise Rejected("adapter_shape", "rank 3 of 4")

    cache = AdapterCache(broken, LIMITS)
    cache.prefetch(A)
    settle(cache, lambda: cache.used_bytes == 0)
    with pytest.raises(Rejected, match="rank 3 of 4"):
        cache.acquire(A)


def test_a_pinned_adapter_stays_and_counts() -> None:
    cache = AdapterCache(load, LIMITS)
    cache.pin([A])
    assert cache.resident == {A} and cache.num_leases == 0 and cache.used_bytes == 10
    for key in (B, C, A, B):
        cache.acquire(key)
        settle(cache, lambda key=key: cache.is_ready(key))  # type: ignore[misc]
        cache.release(key)
        assert A in cache.resident and cache.used_bytes <= 20


@pytest.mark.parametrize("pins", [(A, B), (A, B, C)])
def test_pins_that_leave_no_room_are_refused(pins: tuple[bytes, ...]) -> None:
    with pytest.raises(Rejected) as refused:
        AdapterCache(load, LIMITS).pin(pins)
    assert refused.value.code == "pins_too_large"


def test_a_pin_that_cannot_be_loaded_is_refused() -> None:
    def broken(adapter_id: bytes) -> Loaded[str]:
        raise Rejected("not_found", "nothing is stored there")

    with pytest.raises(Rejected, match="nothing is stored"):
        AdapterCache(broken, LIMITS).pin([A])


@pytest.mark.parametrize("is_pinned", [False, True])
def test_a_withdrawn_adapter_is_dropped_in_use_or_not_and_refused_for_good(is_pinned: bool) -> None:
    now = [0.0]
    cache = AdapterCache(load, LIMITS, clock=lambda: now[0])
    if is_pinned:
        cache.pin([A])
    for key in (A, B):
        cache.acquire(key)
    settle(cache, lambda: cache.is_ready(A) and cache.is_ready(B))
    cache.withdraw(A)
    assert cache.resident == {B} and cache.used_bytes == 10 and cache.num_leases == 1
    now[0] = 1e9
    cache.prefetch(A)
    with pytest.raises(Rejected) as refused:
        cache.acquire(A)
    assert (refused.value.code, refused.value.http_status) == ("model_withdrawn", 410)
    assert cache.poll() == {} and cache.resident == {B}


@pytest.mark.parametrize("is_leased", [False, True])
def test_an_adapter_withdrawn_while_it_is_loaded_never_arrives(is_leased: bool) -> None:
    gate = threading.Event()

    def slow(adapter_id: bytes) -> Loaded[str]:
        gate.wait(5)
        return Loaded("late", 10)

    cache = AdapterCache(slow, LIMITS)
    if is_leased:
        cache.acquire(A)
        cache.poll()
    else:
        cache.prefetch(A)
    cache.withdraw(A)
    assert cache.used_bytes == 10 and cache.num_leases == 0  # its thread still works
    gate.set()
    settle(cache, lambda: cache.used_bytes == 0)
    assert not cache.resident


@given(st.lists(st.tuples(st.sampled_from("arpwx"), st.integers(0, 5)), max_size=60))
def test_whatever_is_asked_the_books_balance(steps: list[tuple[str, int]]) -> None:
    """Leased and pinned adapters stay, the budget holds, and who is loaded is what is counted."""
    limits = CacheLimits(budget_bytes=40, max_adapter_bytes=10, num_loaders=2)
    cache, leases, withdrawn = AdapterCache(load, limits), dict[bytes, int](), set[bytes]()
    cache.pin([bytes([5]) * 32])
    for step, number in steps:
        key = bytes([number]) * 32
        if step == "a" and key not in withdrawn:
            cache.acquire(key)
            leases[key] = leases.get(key, 0) + 1
        elif step == "r" and leases.get(key):
            cache.release(key)
            leases[key] -= 1
        elif step == "p":
            cache.prefetch(key)
        elif step == "w":
            cache.withdraw(key)
            withdrawn.add(key)
            leases.pop(key, None)
        before = cache.resident
        cache.wait(1)
        assert cache.poll() == {}
        kept = {key for key, num in leases.items() if num} | ({bytes([5]) * 32} - withdrawn)
        assert before & kept <= cache.resident and not cache.resident & withdrawn
        assert cache.used_bytes <= 40 and cache.num_leases == sum(leases.values())
    while cache.used_bytes != 10 * cache.num_resident:
        cache.wait(1)
        assert cache.poll() == {}


def test_leaving_the_queue_cancels_the_load() -> None:
    loads = []
    cache = AdapterCache(lambda key: loads.append(key) or Loaded("x", 1), LIMITS)  # type: ignore[func-returns-value]
    cache.acquire(A)
    cache.release(A)
    cache.poll()
    assert loads == [] and cache.num_leases == 0
