"""An engine on a thread of its own, and the gateways it works for.

A gateway attaches under a fresh name, reads one stream of bundles, and submits and cancels by short calls.
``renew`` acknowledges what it has read: beyond ``window`` bundles in flight nothing more is sent and events
merge. A gateway that stays silent for ``lease_s`` is dead: whatever it owned is cancelled. Who is about to
stop the host drains it first: nothing new is taken, and what runs is finished and read. No Ray here."""

import asyncio
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

from attribution.errors import Unavailable
from serve_apps.engine.types import Bundle, EngineLoad, EngineRequest
from serve_apps.outbox import Outbox


class SteppedEngine(Protocol):
    """What a host drives: our ``Engine``, or ``VllmEngine``."""

    def submit(self, request: EngineRequest) -> None: ...
    def cancel(self, request_id: bytes) -> None: ...
    def prefetch(self, adapter_id: bytes) -> None: ...
    def withdraw(self, adapter_ids: Iterable[bytes]) -> None: ...
    def wait_for_work(self, timeout_s: float) -> None: ...
    def step(self) -> Bundle: ...
    def load(self) -> EngineLoad: ...
    def close(self) -> None: ...


@dataclass(frozen=True, slots=True)
class HostConfig:
    lease_s: float = 10.0
    window: int = 64


@dataclass(slots=True, eq=False)
class _Owner:
    outbox: Outbox
    loop: asyncio.AbstractEventLoop
    seen_at: float
    num_sent: int = 0
    num_read: int = 0
    request_ids: set[bytes] = field(default_factory=set)
    may_send: asyncio.Event = field(default_factory=asyncio.Event)

    @property
    def has_read_all(self) -> bool:
        """Nothing of it runs, and the gateway has said that it read the last event."""
        return not self.request_ids and self.outbox.is_empty and self.num_read >= self.num_sent


class EngineHost:
    """All methods but the engine's loop run on one event loop."""

    def __init__(
        self,
        engine: SteppedEngine,
        config: HostConfig | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._engine = engine
        self._config = config or HostConfig()
        self._clock = clock
        self._lock = threading.Lock()  # over _owners and their request_ids
        self._owners: dict[str, _Owner] = {}
        self._is_stopped = False
        self._is_draining = False
        self._death: BaseException | None = None
        self._thread = threading.Thread(target=self._loop, name="engine", daemon=True)
        self._thread.start()

    async def submit(self, request: EngineRequest) -> None:
        """Raises: what ``Engine.submit`` raises, and Unavailable from or for an owner without a stream, and
        ``draining``."""
        self.check_health()
        if self._is_draining:
            raise Unavailable("draining", "this worker is about to stop")
        with self._lock:
            owner = self._owners.get(request.owner)
            if owner is None:
                raise Unavailable("not_attached", f"gateway {request.owner} has no stream here")
            owner.request_ids.add(request.request_id)
        try:
            self._engine.submit(request)
        except BaseException:
            with self._lock:
                owner.request_ids.discard(request.request_id)
            raise

    async def cancel(self, owner: str, request_id: bytes) -> None:
        with self._lock:
            found = self._owners.get(owner)
            is_owned = found is not None and request_id in found.request_ids
        if is_owned:
            self._engine.cancel(request_id)

    async def prefetch(self, adapter_id: bytes) -> None:
        self._engine.prefetch(adapter_id)

    async def withdraw(self, adapter_ids: Sequence[bytes]) -> None:
        self._engine.withdraw(adapter_ids)

    async def renew(self, owner: str, num_read: int) -> EngineLoad:
        """Say that the gateway lives and has read ``num_read`` bundles of its stream.

        Raises:
            Unavailable: it was given up; its requests are gone, and it must attach anew.
        """
        self.check_health()
        with self._lock:
            found = self._owners.get(owner)
        if found is None:
            raise Unavailable("not_attached", f"gateway {owner} was given up")
        found.seen_at, found.num_read = self._clock(), num_read
        found.may_send.set()
        return self.engine_load()

    async def stream(self, owner: str) -> AsyncIterator[Bundle]:
        """Attach. The one stream of this owner; closing it cancels all that the owner has here.

        The first bundle is empty and says that the owner may submit.
        """
        loop = asyncio.get_running_loop()
        with self._lock:
            assert owner not in self._owners, f"{owner} is attached"
            this = self._owners[owner] = _Owner(Outbox(loop), loop, self._clock())
        try:
            this.num_sent = 1
            yield Bundle(0, (), self.engine_load())
            while events := await this.outbox.take():
                this.num_sent += 1
                yield Bundle(this.num_sent - 1, events, self.engine_load())
                while this.num_sent - this.num_read > self._config.window and owner in self._owners:
                    this.may_send.clear()
                    await this.may_send.wait()
        finally:
            self._detach(owner)
        self.check_health()

    async def drain(self) -> None:
        """Refuse what is new, and return when every gateway has read the last event of what was running."""
        self._is_draining = True
        while not self._is_drained():
            await asyncio.sleep(0.1)

    def _is_drained(self) -> bool:
        with self._lock:
            return all(owner.has_read_all for owner in self._owners.values())

    def engine_load(self) -> EngineLoad:
        return replace(self._engine.load(), is_draining=self._is_draining)

    def check_health(self) -> None:
        """Raises: Unavailable when the engine's thread has died."""
        if self._death is not None:
            raise Unavailable("engine_dead", f"the engine stopped: {self._death!r}")

    def stop(self) -> None:
        self._is_stopped = True
        self._thread.join(timeout=10)
        self._engine.close()

    def _loop(self) -> None:
        try:
            while not self._is_stopped:
                self._engine.wait_for_work(timeout_s=0.2)
                self._give_up_silent_owners()
                self._deliver(self._engine.step())
        except BaseException as death:  # noqa: BLE001  (whatever it was, everybody who waits must hear of it)
            self._death = death
            with self._lock:
                owners = list(self._owners.values())
            for owner in owners:
                owner.outbox.close()

    def _deliver(self, bundle: Bundle) -> None:
        with self._lock:
            for owner in self._owners.values():
                own = [event for event in bundle.events if event.request_id in owner.request_ids]
                owner.outbox.put(*own)
                owner.request_ids -= {event.request_id for event in own if event.finish is not None}

    def _give_up_silent_owners(self) -> None:
        oldest = self._clock() - self._config.lease_s
        with self._lock:
            silent = [name for name, owner in self._owners.items() if owner.seen_at < oldest]
        for name in silent:
            self._detach(name)

    def _detach(self, name: str) -> None:
        with self._lock:
            owner = self._owners.pop(name, None)
        if owner is not None:
            for request_id in owner.request_ids:
                self._engine.cancel(request_id)
            owner.outbox.close()
            if not owner.loop.is_closed():
                owner.loop.call_soon_threadsafe(owner.may_send.set)
