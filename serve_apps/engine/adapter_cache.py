"""Adapters in host memory: loaded in the background, counted in bytes, never evicted while in use.

Knows nothing of tensors: a loader gives a value and its size. A lease asks for an adapter and keeps it: the
engine holds one of each that is in use or next in turn. Nothing here costs more when more adapters are
registered or loaded. Any thread may ``prefetch``; the rest is the engine's."""

import os
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import suppress
from dataclasses import dataclass
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
class _Load(Generic[T]):
    """``given_up`` loads still occupy a thread and their share of the budget until they end."""

    future: "Future[Loaded[T]]"
    deadline: float
    given_up: bool = False


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
        self._lock = threading.RLock()
        self._leases: dict[bytes, int] = {}  # of whom there are any
        self._queue: OrderedDict[bytes, None] = OrderedDict()  # leased, to be loaded
        self._loads: dict[bytes, _Load[T]] = {}
        self._loaded: dict[bytes, Loaded[T]] = {}
        self._loaded_bytes = 0
        self._idle: OrderedDict[bytes, None] = OrderedDict()  # may be evicted, least recently used first
        self._pinned: set[bytes] = set()
        self._refused: OrderedDict[bytes, tuple[float, Refusal]] = OrderedDict()  # until when, soonest first
        self._withdrawn: set[bytes] = set()
        self._threads = ThreadPoolExecutor(limits.num_loaders, "adapter-load", initializer=yield_to_others)

    @property
    def resident(self) -> frozenset[bytes]:
        return frozenset(self._loaded)

    @property
    def num_resident(self) -> int:
        return len(self._loaded)

    @property
    def num_leases(self) -> int:
        return sum(self._leases.values())

    @property
    def used_bytes(self) -> int:
        return self._loaded_bytes + len(self._loads) * self._limits.max_adapter_bytes

    @property
    def lacks_room(self) -> bool:
        """Whether the next load waits for memory and not for a thread, as of the last ``poll``."""
        return bool(self._queue) and len(self._loads) < self._limits.num_loaders

    def acquire(self, adapter_id: bytes) -> None:
        """Lease an adapter, loading it if need be. Each call is undone by one ``release``.

        Raises:
            Refusal: it was withdrawn, the load failed less than ``refusal_ttl_s`` ago or, given up, still
                hangs; no lease is held then.
        """
        with self._lock:
            refusal = self._refusal_of(adapter_id)
            if refusal is not None:
                raise refusal
            self._leases[adapter_id] = self._leases.get(adapter_id, 0) + 1
            self._idle.pop(adapter_id, None)
            if not self._is_known(adapter_id):
                self._queue[adapter_id] = None

    def release(self, adapter_id: bytes) -> None:
        with self._lock:
            left = self._leases.pop(adapter_id) - 1
            if left:
                self._leases[adapter_id] = left
            elif adapter_id in self._loaded:
                self._rest(adapter_id)
            else:
                self._queue.pop(adapter_id, None)  # nobody waits for it any more

    def prefetch(self, adapter_id: bytes) -> None:
        """Begin to load what will soon be asked for, if a loader is free and idle adapters make room. Never
        refuses; what fails is remembered."""
        with self._lock:
            if adapter_id in self._idle:
                self._idle.move_to_end(adapter_id)
            is_wanted = not self._is_known(adapter_id) and self._refusal_of(adapter_id) is None
            if is_wanted and not self._queue and self._has_room():
                self._start(adapter_id)

    def pin(self, adapter_ids: Sequence[bytes]) -> None:
        """Load adapters for good: they are never evicted, only withdrawn. Blocks; called before all else.

        Raises:
            Refusal: one of them cannot be loaded.
            Rejected: ``pins_too_large``: they leave no room for one more of the largest size.
        """
        self._pinned.update(adapter_ids)
        for adapter_id in self._pinned:
            self.acquire(adapter_id)
        while True:
            for refusal in self.poll().values():
                raise refusal
            if not self._loads:
                break
            self.wait(self._limits.load_timeout_s)
        if self._queue or not self._make_room():
            size = f"{len(self._pinned)} pinned adapters take {self._loaded_bytes} bytes or more"
            room = (
                f"{self._limits.budget_bytes} less {self._limits.max_adapter_bytes} for another are allowed"
            )
            raise Rejected("pins_too_large", f"{size}, {room}", field="engine.pinned_adapters")
        for adapter_id in self._pinned:
            self.release(adapter_id)

    def withdraw(self, adapter_id: bytes) -> None:
        """Drop an adapter and refuse it from now on. Its leases are void, as after a failed load."""
        with self._lock:
            self._withdrawn.add(adapter_id)
            self._pinned.discard(adapter_id)
            self._leases.pop(adapter_id, None)
            self._queue.pop(adapter_id, None)
            if adapter_id in self._loads:
                self._loads[adapter_id].given_up = True
            if adapter_id in self._loaded:
                self._drop(adapter_id)

    def is_ready(self, adapter_id: bytes) -> bool:
        return adapter_id in self._loaded

    def get(self, adapter_id: bytes) -> T:
        """The adapter; the caller holds a lease and ``is_ready`` was true."""
        assert adapter_id in self._leases
        return self._loaded[adapter_id].value

    def poll(self) -> dict[bytes, Refusal]:
        """Take in finished loads, give up late ones, start queued ones. Never blocks.

        Returns:
            What failed. Its leases are void: whoever held one must not release it.
        """
        with self._lock:
            now, failed = self._clock(), dict[bytes, Refusal]()
            while self._refused and next(iter(self._refused.values()))[0] <= now:
                self._refused.popitem(last=False)
            for adapter_id, running in list(self._loads.items()):
                refusal = self._harvest(adapter_id, running)
                if refusal is not None:
                    failed[adapter_id] = refusal
                    self._refused[adapter_id] = (now + self._limits.refusal_ttl_s, refusal)
                    self._leases.pop(adapter_id, None)
            while self._queue and self._has_room():
                self._start(self._queue.popitem(last=False)[0])
            return failed

    def wait(self, timeout_s: float) -> None:
        """Return when a load ends, or after ``timeout_s``; with nothing being loaded, at once."""
        with self._lock:
            futures = [load.future for load in self._loads.values()]
        wait(futures, timeout_s, return_when=FIRST_COMPLETED)

    def close(self) -> None:
        self._threads.shutdown(wait=False, cancel_futures=True)

    def _is_known(self, adapter_id: bytes) -> bool:
        return adapter_id in self._loaded or adapter_id in self._loads

    def _refusal_of(self, adapter_id: bytes) -> Refusal | None:
        if adapter_id in self._withdrawn:
            return withdrawn_refusal(adapter_id)
        if adapter_id in self._loads and self._loads[adapter_id].given_up:
            return Unavailable("adapter_timeout", f"adapter {adapter_id.hex()} is still being read")
        refused_until, refusal = self._refused.get(adapter_id, (0.0, None))
        return refusal if self._clock() < refused_until else None

    def _rest(self, adapter_id: bytes) -> None:
        """Whoever held the last lease is done."""
        if adapter_id not in self._pinned:
            self._idle[adapter_id] = None

    def _drop(self, adapter_id: bytes) -> None:
        self._loaded_bytes -= self._loaded.pop(adapter_id).size_bytes
        self._idle.pop(adapter_id, None)

    def _start(self, adapter_id: bytes) -> None:
        deadline = self._clock() + self._limits.load_timeout_s
        self._loads[adapter_id] = _Load(self._threads.submit(self._load, adapter_id), deadline)

    def _has_room(self) -> bool:
        """Whether a load may begin now."""
        return len(self._loads) < self._limits.num_loaders and self._make_room()

    def _make_room(self) -> bool:
        """Evict idle adapters, least recently used first, until one more of the largest size fits."""
        while self.used_bytes + self._limits.max_adapter_bytes > self._limits.budget_bytes:
            if not self._idle:
                return False
            self._drop(next(iter(self._idle)))
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
        self._loaded[adapter_id] = loaded
        self._loaded_bytes += loaded.size_bytes
        if adapter_id not in self._leases:
            self._rest(adapter_id)
        return None


def withdrawn_refusal(adapter_id: bytes) -> Rejected:
    gone = f"adapter {adapter_id.hex()} was withdrawn"
    return Rejected("model_withdrawn", gone, field="model", http_status=410)


def yield_to_others() -> None:
    """Let this thread compute only what running streams leave: a quarter of a core that is busy."""
    with suppress(OSError):  # where the system knows the priority of whole processes only
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), 5)
