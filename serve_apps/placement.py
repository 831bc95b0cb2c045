"""Which worker answers a request: rendezvous hashing on the adapter, bounded load, replicas by traffic.

An adapter's workers stand in the order of a hash of (adapter, worker), the same at every gateway without a
word between them; a worker that comes or goes moves only the adapters it wins or held. A worker that is
further from its share than ``bound`` allows is passed over for the next in that order. An adapter that
draws more traffic than one worker's share is spread over as many of its first workers as it needs.

Sources: highest random weight, Thaler and Ravishankar 1998; bounded loads, arXiv:1608.01350."""

import hashlib
import math
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from attribution.types import ZERO_ID

NUM_COUNTED = 4096  # adapters whose traffic is remembered


@dataclass(frozen=True, slots=True)
class Candidate:
    """A worker as placement sees it. ``num_requests`` run or wait there, whoever sent them."""

    worker_id: str
    num_requests: int
    is_full: bool = False  # its queue or its cache has no room
    is_draining: bool = False


@dataclass(frozen=True, slots=True)
class PlacementConfig:
    """``bound`` is the c of the paper: no worker gets beyond c times the mean load through placement."""

    bound: float = 1.25
    half_life_s: float = 30.0  # of the memory of an adapter's traffic


class Traffic:
    """How much of the recent traffic each adapter draws; an exponentially decayed count."""

    def __init__(self, half_life_s: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._half_life_s = half_life_s
        self._clock = clock
        self._counts: dict[bytes, tuple[float, float]] = {}  # adapter → count, and when it was that
        self._total = (0.0, clock())

    def count(self, adapter_id: bytes) -> None:
        now = self._clock()
        self._total = (self._decayed(self._total, now) + 1, now)
        self._counts[adapter_id] = (self._decayed(self._counts.pop(adapter_id, (0.0, now)), now) + 1, now)
        if len(self._counts) > NUM_COUNTED:
            del self._counts[next(iter(self._counts))]  # the one that was quiet the longest

    def share(self, adapter_id: bytes) -> float:
        """Between 0 and 1; 0 where there was no traffic at all."""
        now = self._clock()
        total = self._decayed(self._total, now)
        own = self._decayed(self._counts.get(adapter_id, (0.0, now)), now)
        return own / total if total > 0 else 0.0

    def _decayed(self, counted: tuple[float, float], now: float) -> float:
        count, at = counted
        return count * math.exp2((at - now) / self._half_life_s)


class Placement:
    """Orders workers for requests. What it remembers is the traffic that its own gateway saw."""

    def __init__(
        self, config: PlacementConfig | None = None, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._config = config or PlacementConfig()
        self._traffic = Traffic(self._config.half_life_s, clock)

    def place(self, adapter_id: bytes, candidates: Sequence[Candidate]) -> list[str]:
        """Every worker that may be asked, best first; counts the request as traffic."""
        self._traffic.count(adapter_id)
        return self.expect(adapter_id, candidates)

    def expect(self, adapter_id: bytes, candidates: Sequence[Candidate]) -> list[str]:
        """The same for a request that may come."""
        return order(adapter_id, candidates, self._traffic.share(adapter_id), self._config.bound)


def order(
    adapter_id: bytes, candidates: Sequence[Candidate], share: float = 0.0, bound: float = 1.25
) -> list[str]:
    """Workers to ask for one request of an adapter that draws ``share`` of the traffic, best first.

    Its own replicas with room under the bound come first, the least busy of them ahead; then the others with
    room in the adapter's order; last those that are full, which refuse by themselves if they must. Workers
    that drain are asked by nobody.
    """
    open_ = [candidate for candidate in candidates if not candidate.is_draining]
    if adapter_id == ZERO_ID:
        return [each.worker_id for each in sorted(open_, key=_least_busy)]
    capacity = most_requests(open_, bound)
    by_id = {each.worker_id: each for each in open_}
    ranked = [by_id[worker_id] for worker_id in rendezvous(adapter_id, by_id)]
    num_own = num_replicas(share, len(ranked))
    own, others = ranked[:num_own], ranked[num_own:]

    def has_room(each: Candidate) -> bool:
        return not each.is_full and each.num_requests < capacity

    placed = [each for each in sorted(own, key=lambda each: each.num_requests) if has_room(each)]
    placed += [each for each in others if has_room(each)]
    placed += sorted((each for each in ranked if not has_room(each)), key=_least_busy)
    return [each.worker_id for each in placed]


def rendezvous(adapter_id: bytes, worker_ids: Iterable[str]) -> list[str]:
    """Workers by the weight this adapter gives them, heaviest first: the same wherever it is computed."""
    return sorted(worker_ids, key=lambda worker_id: _weight(adapter_id, worker_id), reverse=True)


def most_requests(candidates: Sequence[Candidate], bound: float) -> int:
    """What a worker may have after one request more is placed: ``ceil(bound * mean)``."""
    total = sum(each.num_requests for each in candidates) + 1
    return math.ceil(bound * total / max(1, len(candidates)))


def num_replicas(share: float, num_workers: int) -> int:
    """Workers that an adapter needs, each giving it at most the fair share of one worker."""
    return min(max(1, math.ceil(share * num_workers - 1e-9)), max(1, num_workers))


def _weight(adapter_id: bytes, worker_id: str) -> bytes:
    return hashlib.blake2b(worker_id.encode(), key=adapter_id, digest_size=8).digest()


def _least_busy(each: Candidate) -> tuple[bool, int, str]:
    return each.is_full, each.num_requests, each.worker_id
