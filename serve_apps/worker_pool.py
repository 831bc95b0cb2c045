"""The gateway's side of the bundle protocol: one stream per worker, one mailbox per request.

A worker is reached through a ``Door``; the pool places each request (``placement.py``), offers it to the
next worker where one has no room or drains, hands each event to the request it belongs to, and turns the
death of a worker into a clear refusal for those it was serving."""

import asyncio
import contextlib
import logging
import uuid
from collections import OrderedDict
from collections.abc import AsyncGenerator, AsyncIterator, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

from attribution.errors import Refusal, Unavailable
from attribution.types import ZERO_ID
from serve_apps.engine.types import Bundle, EngineLoad, EngineRequest, TokenEvent
from serve_apps.outbox import Outbox
from serve_apps.placement import Candidate, Placement

log = logging.getLogger(__name__)

NUM_ASKED = 4096
TELL_WITHIN_S = 1.0


class Door(Protocol):
    """What a worker offers: ``EngineHost`` in this process, or an actor of another."""

    async def submit(self, request: EngineRequest) -> None: ...
    async def cancel(self, owner: str, request_id: bytes) -> None: ...
    async def prefetch(self, adapter_id: bytes) -> None: ...
    async def withdraw(self, adapter_ids: Sequence[bytes]) -> None: ...
    async def renew(self, owner: str, num_read: int) -> EngineLoad: ...
    def stream(self, owner: str) -> AsyncIterator[Bundle]: ...


@dataclass(slots=True, eq=False)
class _Link:
    """A worker with a stream. ``owner`` is new for every stream, so a late call cannot meet a later life."""

    worker_id: str
    door: Door
    owner: str
    load: EngineLoad | None = None  # None until the first bundle
    num_read: int = 0
    mailboxes: dict[bytes, Outbox] = field(default_factory=dict)
    asked: OrderedDict[bytes, None] = field(default_factory=OrderedDict)  # adapters, the latest last
    num_withdrawn: int = 0  # withdrawals it knows of
    task: "asyncio.Task[None] | None" = None

    def candidate(self, load: EngineLoad) -> Candidate:
        """What we sent counts at once, what others sent with the worker's next word."""
        busy = max(len(self.mailboxes), load.num_running + load.num_waiting)
        return Candidate(self.worker_id, busy, load.is_full, load.is_draining)

    def asks(self, adapter_id: bytes) -> bool:
        """Remember the use of an adapter; whether it is new among the last ``NUM_ASKED``."""
        is_new = adapter_id not in self.asked
        self.asked[adapter_id] = None
        self.asked.move_to_end(adapter_id)
        if len(self.asked) > NUM_ASKED:
            self.asked.popitem(last=False)
        return is_new


class WorkerPool:
    """Lives on the gateway's event loop."""

    def __init__(self, gateway_id: str, renew_every_s: float = 1.0) -> None:
        self._gateway_id = gateway_id
        self._renew_every_s = renew_every_s
        self._links: dict[str, _Link] = {}
        self._placement = Placement()
        self._withdrawn: list[bytes] = []
        self._calls: set[asyncio.Task[None]] = set()  # that nobody waits for

    @property
    def loads(self) -> dict[str, EngineLoad]:
        return {link.worker_id: link.load for link in self._links.values() if link.load is not None}

    def knows(self, worker_id: str) -> bool:
        return worker_id in self._links

    def connect(self, worker_id: str, door: Door) -> None:
        """Attach to a worker that is not attached yet; one that dies is forgotten and may be connected
        again."""
        if not self.knows(worker_id):
            link = _Link(worker_id, door, f"{self._gateway_id}/{uuid.uuid4().hex[:12]}")
            self._links[worker_id] = link
            link.task = asyncio.create_task(self._serve(link))

    async def close(self) -> None:
        tasks = [link.task for link in self._links.values() if link.task is not None]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def generate(self, request: EngineRequest) -> AsyncGenerator[TokenEvent, None]:
        """Events of one request until its last. Closing the iterator early cancels it at the worker.

        Raises:
            Unavailable: no worker is there, or the one that served this request is gone.
            Refusal: what the engine refused it with.
        """
        link, mailbox = await self._submit(request)
        is_over = False
        try:
            while events := await mailbox.take():
                event = events[0]
                is_over = event.finish is not None
                if event.finish is not None and event.finish.refusal is not None:
                    raise event.finish.refusal
                yield event
                if is_over:
                    return
            is_over = True  # nothing is left to cancel
            raise Unavailable("worker_lost", f"worker {link.worker_id} was lost while it answered")
        finally:
            link.mailboxes.pop(request.request_id, None)
            if not is_over:
                await _ignore_unavailable(link.door.cancel(link.owner, request.request_id))

    async def _submit(self, request: EngineRequest) -> tuple[_Link, Outbox]:
        """Offer a request to one worker after the other until one takes it.

        A worker that is lost over it ends the search: what killed it might kill the next.
        """
        refusal = Unavailable("no_worker", "no worker is ready", retry_after_s=2.0)
        for worker_id in self._placement.place(request.adapter_id, self._candidates()):
            link = self._links.get(worker_id)
            if link is None:  # lost while others were asked
                continue
            mailbox = link.mailboxes[request.request_id] = Outbox(asyncio.get_running_loop())
            try:
                await link.door.submit(replace(request, owner=link.owner))
                return link, mailbox
            except Unavailable as refused:
                del link.mailboxes[request.request_id]
                if refused.code == "worker_lost":
                    raise
                refusal = refused
            except BaseException:  # refused for good, or nobody waits any more: it may have been taken
                del link.mailboxes[request.request_id]
                await _ignore_unavailable(link.door.cancel(link.owner, request.request_id))
                raise
        raise refusal

    def prefetch(self, adapter_id: bytes) -> None:
        """Let the worker that would be chosen begin to load an adapter that it was not asked for lately.
        Returns at once and fails silently."""
        if adapter_id == ZERO_ID:
            return
        for worker_id in self._placement.expect(adapter_id, self._candidates())[:1]:
            link = self._links[worker_id]
            if link.asks(adapter_id):
                call = asyncio.create_task(_ignore_unavailable(link.door.prefetch(adapter_id)))
                self._calls.add(call)
                call.add_done_callback(self._calls.discard)

    async def withdraw(self, adapter_ids: Iterable[bytes] = ()) -> None:
        """Tell every worker, those that come later at the next call, what is withdrawn: these adapters, and
        those of earlier calls that it has not heard of."""
        self._withdrawn.extend(adapter_ids)
        behind = [link for link in self._links.values() if link.num_withdrawn < len(self._withdrawn)]
        await asyncio.gather(*(self._tell_withdrawn(link) for link in behind))

    async def _tell_withdrawn(self, link: _Link) -> None:
        untold = self._withdrawn[link.num_withdrawn :]
        with contextlib.suppress(Unavailable, TimeoutError):  # it is told again
            async with asyncio.timeout(TELL_WITHIN_S):
                await link.door.withdraw(untold)
            link.num_withdrawn += len(untold)

    def _candidates(self) -> list[Candidate]:
        return [link.candidate(link.load) for link in self._links.values() if link.load is not None]

    async def _serve(self, link: _Link) -> None:
        """Read a worker's stream until it ends, however it ends."""
        renewing = asyncio.create_task(self._renew(link))
        try:
            async for bundle in link.door.stream(link.owner):
                link.load = bundle.load
                link.num_read += 1
                for event in bundle.events:
                    mailbox = link.mailboxes.get(event.request_id)
                    if mailbox is not None:
                        mailbox.put(event)
        except Refusal as refusal:
            log.warning("worker %s: %s", link.worker_id, refusal.message)
        finally:
            renewing.cancel()
            if self._links.get(link.worker_id) is link:
                del self._links[link.worker_id]
            for mailbox in link.mailboxes.values():
                mailbox.close()

    async def _renew(self, link: _Link) -> None:
        """Say often enough that we live and what we have read; a refusal means that the worker gave us up."""
        acknowledged = 0
        while True:
            for _ in range(20):
                await asyncio.sleep(self._renew_every_s / 20)
                if link.num_read - acknowledged >= 16:
                    break
            try:
                link.load = await link.door.renew(link.owner, link.num_read)
                acknowledged = link.num_read
            except Unavailable as refusal:
                log.warning("worker %s: %s", link.worker_id, refusal.message)
                if link.task is not None:
                    link.task.cancel()
                return


async def _ignore_unavailable(call: object) -> None:
    with contextlib.suppress(Unavailable):
        await call  # type: ignore[misc]
