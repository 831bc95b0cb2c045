"""A queue of token events that cannot grow: what a slow reader has not taken is merged per request.

Written from any thread, read by one coroutine."""

import asyncio
import threading

from serve_apps.engine.types import TokenEvent


class Outbox:
    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        """Called on the loop's own thread."""
        self._loop = loop
        self._thread_id = threading.get_ident()
        self._lock = threading.Lock()
        self._pending: dict[bytes, TokenEvent] = {}
        self._is_closed = False
        self._changed = asyncio.Event()

    def put(self, *events: TokenEvent) -> None:
        """The reader is woken once: what waits already has woken it."""
        with self._lock:
            was_empty = not self._pending
            for event in events:
                before = self._pending.get(event.request_id)
                self._pending[event.request_id] = before.then(event) if before else event
        if was_empty and events:
            self._wake()

    def close(self) -> None:
        """No more will come; a reader gets what is left, then nothing."""
        with self._lock:
            self._is_closed = True
        self._wake()

    @property
    def is_empty(self) -> bool:
        with self._lock:
            return not self._pending

    async def take(self) -> tuple[TokenEvent, ...]:
        """All that is pending, at least one event; empty once closed."""
        while True:
            with self._lock:
                events, self._pending = tuple(self._pending.values()), {}
                is_closed = self._is_closed
                self._changed.clear()
            if events or is_closed:
                return events
            await self._changed.wait()

    def _wake(self) -> None:
        if threading.get_ident() == self._thread_id:  # without a system call
            self._changed.set()
        elif not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._changed.set)
