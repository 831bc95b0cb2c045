"""The adapter cache keeps its budget, its leases and its grudges; loads are integers here."""

import threading
from collections.abc import Callable

import pytest

from attribution.errors import Rejected, Unavailable
from serve_apps.engine.adapter_cache import AdapterCache, CacheLimits, Loaded

A, B, C = (bytes([n]) * 32 for n in (1, 2, 3))
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
    assert cache.resident == (B, C) and cache.used_bytes == 20


def test_the_least_recently_used_idle_adapter_goes_first() -> None:
    cache = AdapterCache(load, LIMITS)
    for key in (A, B, A):
        cache.acquire(key)
        settle(cache, lambda key=key: cache.is_ready(key))  # type: ignore[misc]
        cache.release(key)
    cache.acquire(C)
    settle(cache, lambda: cache.is_ready(C))
    assert set(cache.resident) == {A, C}


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
    assert cache.resident == ()


def test_too_large_an_adapter_is_refused() -> None:
    cache = AdapterCache(lambda _: Loaded("x", 11), LIMITS)
    cache.acquire(A)
    failed: dict[bytes, object] = {}
    settle(cache, lambda: bool(failed.update(cache.poll()) or failed))  # type: ignore[func-returns-value]
    assert failed[A].code == "adapter_too_large"  # type: ignore[attr-defined]
    assert cache.used_bytes == 0


def test_leaving_the_queue_cancels_the_load() -> None:
    loads = []
    cache = AdapterCache(lambda key: loads.append(key) or Loaded("x", 1), LIMITS)  # type: ignore[func-returns-value]
    cache.acquire(A)
    cache.release(A)
    cache.poll()
    assert loads == [] and cache.num_leases == 0
