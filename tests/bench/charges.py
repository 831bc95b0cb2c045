"""Requests a second that the database can charge: ``python -m tests.bench.charges [URL]`` (default SQLite).

Each request is a reservation and a capture, committed one by one or, as the gateway does, in groups."""

import json
import platform
import secrets
import sys
import tempfile
import time
from collections.abc import Iterable

from sqlalchemy import Engine

from cluster.accounts import open_account
from cluster.charges import capture
from cluster.database import connect, migrate, writing
from tests.cluster.money import NOW, draft, fund, hold

NUM_REQUESTS = 480


def charge(engine: Engine, account_id: str, group: int) -> float:
    """Seconds for ``NUM_REQUESTS`` requests, ``group`` of them per transaction."""
    started = time.perf_counter()
    for _ in range(NUM_REQUESTS // group):
        ids = [secrets.token_bytes(32) for _ in range(group)]
        with writing(engine) as session:
            for request_id in ids:
                hold(session, account_id, request_id)
        with writing(engine) as session:
            for request_id in ids:
                capture(session, request_id, draft(), NOW)
    return time.perf_counter() - started


def main(urls: Iterable[str]) -> None:
    for url in urls:
        migrate(url)
        engine = connect(url)
        with writing(engine) as session:
            account_id = open_account(session, fund(session, 10**12), "bench", 10**12, NOW)
        charge(engine, account_id, 16)  # warm
        for group in (1, 16):
            rate = NUM_REQUESTS / charge(engine, account_id, group)
            conditions = {"database": engine.dialect.name, "group": group, "machine": platform.machine()}
            print(json.dumps({"requests_per_s": round(rate), **conditions}))
            if group == 16:
                verdict = "met" if rate >= 100 else "short"
                print(f"goal charges_per_s_{engine.dialect.name} {rate:.0f} 100 {verdict}")
        engine.dispose()


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        main(sys.argv[1:] or [f"sqlite:///{folder}/bench.db"])
