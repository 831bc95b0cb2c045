"""Whose request begins next: virtual token counters, per tenant and, within a tenant, per adapter.

What a step computes for a tenant is added to its counter, ``INPUT_COST`` for a token of a prompt and
``OUTPUT_COST`` for one of an answer, and of those who wait the one with the lowest counter is next. Who comes
to wait is lifted to the lowest counter of those who do, or, if nobody does, to that of the last who did:
staying away saves up nothing (VTC: Sheng et al., OSDI 2024, arXiv:2401.00588, algorithm 2 and its costs).
Fairness is owed to tenants, so an adapter is as hot as the tenants who ask for it, and each of them pays with
its own turns; a tenant's turns are shared among its adapters by the same rule.

Counters alone would let newcomers, who begin at the lowest, pass a tenant that was served much before for as
long as there are new ones. So whoever was passed ``max_passed`` times is next whatever was served, the
longest first. Passes are counted from one's own last turn: a long line is no claim to more."""

from collections import defaultdict, deque
from collections.abc import Callable, Collection, Hashable, Iterator, Mapping
from dataclasses import dataclass
from heapq import heapify, heappop, heappush
from itertools import zip_longest
from typing import Generic, TypeVar

from serve_apps.engine.types import EngineRequest

INPUT_COST = 1
OUTPUT_COST = 2
MAX_REMEMBERED = 1024  # counters of those who do not wait, before the ones that say nothing are dropped

K = TypeVar("K", bound=Hashable)
T = TypeVar("T")


@dataclass(slots=True, eq=False)
class _Account:
    served: int = 0
    last_turn: int = 0


class _Turns(Generic[K]):
    """Whose turn it is among tenants, or among a tenant's adapters."""

    def __init__(self, max_passed: int) -> None:
        self._max_passed = max_passed
        self._accounts: defaultdict[K, _Account] = defaultdict(_Account)
        self._last_to_wait = _Account()
        self._num_turns = 0

    def remembers(self, key: K) -> bool:
        return key in self._accounts

    def __len__(self) -> int:
        return len(self._accounts)

    def join(self, key: K, waiting: Collection[K]) -> None:
        """``key`` did not wait and does now, beside ``waiting``."""
        lowest = min((self._accounts[each].served for each in waiting), default=self._last_to_wait.served)
        if len(self._accounts) > len(waiting) + MAX_REMEMBERED:
            kept = {k: a for k, a in self._accounts.items() if k in waiting or a.served > lowest}
            self._accounts = defaultdict(_Account, kept)
        account = self._accounts[key]
        account.served = max(account.served, lowest)
        account.last_turn = self._num_turns

    def leave(self, key: K) -> None:
        """``key`` waits no more."""
        self._last_to_wait = self._accounts[key]

    def take(self, key: K) -> None:
        self._num_turns += 1
        self._accounts[key].last_turn = self._num_turns

    def charge(self, key: K, cost: int) -> None:
        self._accounts[key].served += cost

    def served(self, key: K) -> int:
        return self._accounts[key].served

    def ranked(self, keys: Collection[K]) -> list[K]:
        """Whoever is next first, as things stand."""
        return sorted(keys, key=self._rank)

    def in_turn(self, offers: Mapping[K, Iterator[T]]) -> Iterator[T]:
        """What each key offers, one at a time, whoever is next at that time."""
        heap = [(*self._rank(key), index, key) for index, key in enumerate(offers)]
        heapify(heap)
        while heap:
            *_, index, key = heappop(heap)
            for offer in offers[key]:
                yield offer
                heappush(heap, (*self._rank(key), index, key))
                break

    def _rank(self, key: K) -> tuple[bool, int, int]:
        account = self._accounts[key]
        is_due = self._num_turns - account.last_turn >= self._max_passed
        return not is_due, 0 if is_due else account.served, account.last_turn


class FairQueue:
    """Requests that wait. Of one tenant and adapter they wait in one line, in order of arrival."""

    def __init__(self, max_passed: int) -> None:
        self._max_passed = max_passed
        self._tenants: _Turns[str] = _Turns(max_passed)
        self._adapters: dict[str, _Turns[bytes]] = {}
        self._lines: dict[str, dict[bytes, deque[EngineRequest]]] = {}  # none of them empty

    def add(self, request: EngineRequest) -> None:
        self._line(request).append(request)

    def put_back(self, request: EngineRequest) -> None:
        """One that had begun, before all others of its line."""
        self._line(request).appendleft(request)

    def begin(self, request: EngineRequest) -> None:
        """It waits no more: it has its turn."""
        self._tenants.take(request.tenant)
        self._adapters[request.tenant].take(request.adapter_id)
        self.remove(request)

    def remove(self, request: EngineRequest) -> None:
        lines = self._lines[request.tenant]
        lines[request.adapter_id].remove(request)
        if not lines[request.adapter_id]:
            del lines[request.adapter_id]
            self._adapters[request.tenant].leave(request.adapter_id)
        if not lines:
            del self._lines[request.tenant]
            self._tenants.leave(request.tenant)

    def charge(self, request: EngineRequest, cost: int) -> None:
        """Count what a step computes for ``request``, which need not wait."""
        self._tenants.charge(request.tenant, cost)
        self._adapters_of(request.tenant).charge(request.adapter_id, cost)

    def served(self, tenant: str) -> int:
        return self._tenants.served(tenant)

    def in_turn(self, is_ready: Callable[[bytes], bool]) -> Iterator[EngineRequest]:
        """Those that wait and whose adapter ``is_ready``, next first. Whoever takes one calls ``begin`` and
        ``charge`` before it asks for another."""
        return self._tenants.in_turn({tenant: self._of_tenant(tenant, is_ready) for tenant in self._lines})

    def adapters_in_turn(self) -> Iterator[bytes]:
        """What those who wait will want, soonest first as things stand; of every tenant one before any
        other's second."""
        tenants = self._tenants.ranked(self._lines)
        of_each = (self._adapters[tenant].ranked(self._lines[tenant]) for tenant in tenants)
        return (each for turn in zip_longest(*of_each) for each in turn if each is not None)

    def _of_tenant(self, tenant: str, is_ready: Callable[[bytes], bool]) -> Iterator[EngineRequest]:
        ready = {key: _heads(line) for key, line in self._lines[tenant].items() if is_ready(key)}
        yield from self._adapters[tenant].in_turn(ready)

    def _line(self, request: EngineRequest) -> deque[EngineRequest]:
        tenant, adapter_id = request.tenant, request.adapter_id
        if tenant not in self._lines:
            self._tenants.join(tenant, self._lines)
            if len(self._adapters) > len(self._tenants):  # some were dropped
                kept = ((key, turns) for key, turns in self._adapters.items() if self._tenants.remembers(key))
                self._adapters = dict(kept)
            self._lines[tenant] = {}
        lines = self._lines[tenant]
        if adapter_id not in lines:
            self._adapters_of(tenant).join(adapter_id, lines)
            lines[adapter_id] = deque()
        return lines[adapter_id]

    def _adapters_of(self, tenant: str) -> _Turns[bytes]:
        return self._adapters.setdefault(tenant, _Turns(self._max_passed))


def _heads(line: deque[EngineRequest]) -> Iterator[EngineRequest]:
    while line:
        yield line[0]
