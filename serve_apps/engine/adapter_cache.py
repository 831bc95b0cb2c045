"""Adapters in host memory: loaded in the background, counted in bytes, never evicted while in use.

Knows nothing of tensors: a loader gives a value and its size. A lease asks for an adapter and keeps it: the
engine holds one of each that is in use or next in turn. All methods but the loader run on the engine's
thread."""

import time
from collections import OrderedDict, deque
from collections.abc import Callable
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from attribution.errors import Refusal, Rejected, Unavailable

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class CacheLimits:
    """While an adapter is being loaded it is counted as ``max_adapter_bytes``: the budget always holds."""

    budget_bytes: int = 512 * 2**20
    max_adapter_bytes: int = 128 * 2**20
    load_timeout_s: float = 30.0
    num_loaders: int = 2
    refusal_ttl_s: float = 30.0

    def __post_init__(self) -> None:
        assert self.max_adapter_bytes <= self.budget_bytes


@dataclass(frozen=True, slots=True)
class Loaded(Generic[T]):
    value: T
    size_bytes: int


@dataclass(slots=True, eq=False)
class _Entry(Generic[T]):
    leases: int = 0
    loaded: Loaded[T] | None = None


@dataclass(slots=True, eq=False)
class _Load(Generic[T]):
    """``given_up`` loads still occupy a thread and their share of the budget until they end."""

    future: "Future[Loaded[T]]"
    deadline: float
    given_up: bool = field(default=False)


class AdapterCache(Generic[T]):
    def __init__(
        self,
        load: Callable[[bytes], Loaded[T]],
        limits: CacheLimits,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._load = load
        self._limits = limits
        self._clock = clock
        self._entries: OrderedDict[bytes, _Entry[T]] = OrderedDict()  # least recently used first
        self._queue: deque[bytes] = deque()
        self._loads: dict[bytes, _Load[T]] = {}
        self._refused: dict[bytes, tuple[float, Refusal]] = {}
        self._threads = ThreadPoolExecutor(limits.num_loaders, thread_name_prefix="adapter-load")

    @property
    def resident(self) -> tuple[bytes, ...]:
        return tuple(key for key, entry in self._entries.items() if entry.loaded)

    @property
    def num_leases(self) -> int:
        return sum(entry.leases for entry in self._entries.values())

    @property
    def used_bytes(self) -> int:
        loaded = sum(entry.loaded.size_bytes for entry in self._entries.values() if entry.loaded)
        return loaded + len(self._loads) * self._limits.max_adapter_bytes

    @property
    def lacks_room(self) -> bool:
        """Whether the next load waits for memory and not for a thread, as of the last ``poll``."""
        return bool(self._queue) and len(self._loads) < self._limits.num_loaders

    def acquire(self, adapter_id: bytes) -> None:
        """Lease an adapter, loading it if need be. Each call is undone by one ``release``.

        Raises:
            Refusal: the load failed less than ``refusal_ttl_s`` ago or, given up, still hangs; no lease is
                held then.
        """
        if adapter_id in self._loads and self._loads[adapter_id].given_up:
            raise Unavailable("adapter_timeout", f"adapter {adapter_id.hex()} is still being read")
        refused_until, refusal = self._refused.get(adapter_id, (0.0, None))
        if refusal is not None and self._clock() < refused_until:
            raise refusal
        self._refused.pop(adapter_id, None)
        if adapter_id not in self._entries:
            self._entries[adapter_id] = _Entry()
            self._queue.append(adapter_id)
        self._entries[adapter_id].leases += 1
        self._entries.move_to_end(adapter_id)

    def release(self, adapter_id: bytes) -> None:
        entry = self._entries[adapter_id]
        assert entry.leases > 0
        entry.leases -= 1
        if not entry.leases and adapter_id in self._queue:  # nobody waits for it any more
            self._queue.remove(adapter_id)
            del self._entries[adapter_id]

    def is_ready(self, adapter_id: bytes) -> bool:
        entry = self._entries.get(adapter_id)
        return entry is not None and entry.loaded is not None

    def get(self, adapter_id: bytes) -> T:
        """The adapter; the caller holds a lease and ``is_ready`` was true."""
        entry = self._entries[adapter_id]
        assert entry.leases and entry.loaded
        return entry.loaded.value

    def poll(self) -> dict[bytes, Refusal]:
        """Take in finished loads, give up late ones, start queued ones. Never blocks.

        Returns:
            What failed. Its leases are void: whoever held one must not release it.
        """
        failed: dict[bytes, Refusal] = {}
        for adapter_id, running in list(self._loads.items()):
            refusal = self._harvest(adapter_id, running)
            if refusal is not None:
                failed[adapter_id] = refusal
                self._refused[adapter_id] = (self._clock() + self._limits.refusal_ttl_s, refusal)
                del self._entries[adapter_id]
        while self._queue and len(self._loads) < self._limits.num_loaders and self._make_room():
            self._start(self._queue.popleft())
        return failed

    def wait(self, timeout_s: float) -> None:
        """Return when a load ends, or after ``timeout_s``; with nothing being loaded, at once."""
        wait([load.future for load in self._loads.values()], timeout_s, return_when=FIRST_COMPLETED)

    def close(self) -> None:
        self._threads.shutdown(wait=False, cancel_futures=True)

    def _start(self, adapter_id: bytes) -> None:
        deadline = self._clock() + self._limits.load_timeout_s
        self._loads[adapter_id] = _Load(self._threads.submit(self._load, adapter_id), deadline)

    def _make_room(self) -> bool:
        """Evict idle adapters, least recently used first, until one more of the largest size fits."""
        idle = [key for key, entry in self._entries.items() if entry.loaded and not entry.leases]
        while self.used_bytes + self._limits.max_adapter_bytes > self._limits.budget_bytes:
            if not idle:
                return False
            del self._entries[idle.pop(0)]
        return True

    def _harvest(self, adapter_id: bytes, running: _Load[T]) -> Refusal | None:
        if not running.future.done():
            if running.given_up or self._clock() < running.deadline:
                return None
            running.given_up = True
            waited = f"adapter {adapter_id.hex()} was not loaded in {self._limits.load_timeout_s} s"
            return Unavailable("adapter_timeout", waited)
        del self._loads[adapter_id]
        error = running.future.exception()
        if running.given_up:
            return None
        if isinstance(error, Refusal):
            return error
        if error is not None:
            return Unavailable("adapter_unreadable", f"adapter {adapter_id.hex()}: {error!r}")
        loaded = running.future.result()
        if loaded.size_bytes > self._limits.max_adapter_bytes:
            size = f"{loaded.size_bytes} bytes, at most {self._limits.max_adapter_bytes} are allowed"
            return Rejected("adapter_too_large", f"adapter {adapter_id.hex()} takes {size}")
        self._entries[adapter_id].loaded = loaded
        return None
