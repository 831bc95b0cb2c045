"""A gateway's dealings with the database, as a process that may be killed anywhere:
``python -m tests.cluster.gateway_process URL ACCOUNT NAME COUNT``.

It reserves and captures ``COUNT`` requests, repeating what it cannot be sure of, and prints a line for each
request that was answered, once its capture is committed."""

import sys
import time
from collections.abc import Callable
from typing import TypeVar

from sqlalchemy import Engine
from sqlalchemy.orm import Session

from attribution.errors import Rejected, Unavailable
from attribution.hashing import sha256
from cluster.charges import capture, release
from cluster.database import connect, writing
from tests.cluster.money import NOW, draft, hold

T = TypeVar("T")


def persist(engine: Engine, act: Callable[[Session], T], patience_s: float = 60.0) -> T:
    """Commit ``act``, however often the database is away meanwhile."""
    deadline = time.monotonic() + patience_s
    while True:
        try:
            with writing(engine) as session:
                return act(session)
        except Unavailable:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.05)


def serve(engine: Engine, account_id: str, name: str, count: int) -> None:
    for number in range(count):
        request_id = sha256(f"{name}:{number}".encode())
        try:
            persist(engine, lambda session, r=request_id: hold(session, account_id, r, 20))
        except Rejected as refusal:
            assert refusal.code == "insufficient_credit"
            print(f"{request_id.hex()} refused", flush=True)
            continue
        if number % 5 == 4:
            persist(engine, lambda session, r=request_id: release(session, r, NOW))
            continue
        persist(engine, lambda session, r=request_id, fee=number % 20: capture(session, r, draft(fee), NOW))
        print(f"{request_id.hex()} answered", flush=True)


if __name__ == "__main__":
    url, account, name, count = sys.argv[1:]
    serve(connect(url), account, name, int(count))
