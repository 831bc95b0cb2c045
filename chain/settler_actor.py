"""The settler as a Ray actor: named, detached, restarted for ever. The shell decides nothing: a thread calls
``Settler.tick``; delete Ray and a ``while`` loop replaces it.

Names do not fence (after a partition two of them may run): the lease does. A settler that finds disagreeing
books stops and says so until a person has looked; one that meets a bug dies, and Ray starts another."""

import hashlib
import logging
import os
import threading
import time
from collections import deque
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray

from attribution.errors import Corrupted
from chain.settler import Settler
from chain.world import open_world, settler_rules
from cluster.config import Settings

NAME = "settler"
NAMESPACE = "openledger"
REMEMBERED_LINES = 200

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class SettlerStatus:
    """``stopped`` says why it settles no more; empty while it does. ``lines`` are the last that it said."""

    pid: int
    fingerprint: str
    ticks: int
    stopped: str
    lines: tuple[str, ...]


@ray.remote(num_cpus=0.1, max_restarts=-1, max_task_retries=-1)
class SettlerActor:
    """All state is rows: a restart runs ``__init__`` again and loses the remembered lines only."""

    def __init__(self, settings: Settings, fingerprint: str) -> None:
        self._settings = settings
        self._fingerprint = fingerprint
        self._ticks = 0
        self._stopped = ""
        self._lines: deque[str] = deque(maxlen=REMEMBERED_LINES)
        threading.Thread(target=self._run, name="settler", daemon=True).start()

    def status(self) -> SettlerStatus:
        return SettlerStatus(os.getpid(), self._fingerprint, self._ticks, self._stopped, tuple(self._lines))

    def _run(self) -> None:
        try:
            settler = Settler(open_world(self._settings), settler_rules(self._settings), NAME)
            while True:
                for line in settler.tick():
                    log.info("%s", line)
                    self._lines.append(line)
                self._ticks += 1
                time.sleep(self._settings.chain.poll_s)
        except Corrupted as error:
            self._stopped = f"{error.code}: {error.message}"
            log.error("settler stopped, a person must look: %s", self._stopped)
        finally:
            if not self._stopped:
                log.exception("settler died")
                time.sleep(self._settings.chain.poll_s)  # not faster than it would tick
                os._exit(1)


def ensure_running(settings: Settings, *, timeout_s: float = 120.0) -> SettlerStatus:
    """Start the settler on the joined Ray cluster, or find it. One with other code or settings, or one that
    stopped, is replaced; what it had under way is in rows."""
    wanted = fingerprint(settings)
    found = _get_or_create(settings, wanted)
    status: SettlerStatus = ray.get(found.status.remote(), timeout=timeout_s)
    if status.fingerprint != wanted or status.stopped:
        ray.kill(found, no_restart=True)
        _wait_gone(timeout_s)
        status = ray.get(_get_or_create(settings, wanted).status.remote(), timeout=timeout_s)
    return status


def status(*, timeout_s: float = 30.0) -> SettlerStatus:
    """``ValueError`` of Ray if there is no settler."""
    found: SettlerStatus = ray.get(ray.get_actor(NAME, NAMESPACE).status.remote(), timeout=timeout_s)
    return found


def fingerprint(settings: Settings) -> str:
    """Of the code in this folder and of the settings: a detached actor outlives both."""
    digest = hashlib.sha256(settings.model_dump_json().encode())
    for path in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def _get_or_create(settings: Settings, wanted: str) -> Any:
    options = {"name": NAME, "namespace": NAMESPACE, "lifetime": "detached", "get_if_exists": True}
    actor: Any = SettlerActor  # Ray's decorator is not typed
    return actor.options(**options).remote(settings, wanted)


def _wait_gone(timeout_s: float) -> None:
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        try:
            ray.get_actor(NAME, NAMESPACE)
        except ValueError:
            return
        time.sleep(0.1)
