"""Killing a settler between any two of its steps, for real: a forked process that sends itself SIGKILL."""

import os
import signal
import sys
import traceback
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from sqlalchemy import event

from chain.world import World

EFFECTS = {"put": ("storage", "da"), "sign": ("signer",), "send_raw": ("rollup",)}


class Doom:
    """Counts down before and after every effect on the outside, and before every commit; then the end."""

    def __init__(self, steps: int) -> None:
        self._left = steps

    def step(self, *_: object) -> None:
        if self._left == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        self._left -= 1

    def watch(self, world: World) -> World:
        event.listen(world.rows, "commit", self.step)
        watched: dict[str, Any] = {}
        for method, owners in EFFECTS.items():
            for owner in owners:
                watched[owner] = Watched(getattr(world, owner), method, self.step)
        return replace(world, **watched)


class Watched:
    """Passes everything on; one method steps around its call."""

    def __init__(self, target: Any, method: str, step: Callable[[], None]) -> None:
        self._target, self._method, self._step = target, method, step

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._target, name)
        if name != self._method:
            return found

        def stepping(*args: Any) -> Any:
            self._step()
            result = found(*args)
            self._step()
            return result

        return stepping


def forked(work: Callable[[], None]) -> int:
    """Run in a process of its own; its exit code, negative for the signal that killed it."""
    pid = os.fork()
    if pid == 0:
        try:
            work()
            os._exit(0)
        except BaseException:  # noqa: BLE001  (a child must not return into pytest)
            traceback.print_exc()
            sys.stderr.flush()
            os._exit(1)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
