"""What the gateway itself costs: requests that generate nothing, one after the other, through the whole door.

    python -m tests.bench.serving.gateway --out OUT.json [--requests 400] [--without-haproxy]

Deploys the application over a toy model, key check, database and proxy as everywhere, and asks over one kept
connection: the list of models, one model, a wrong key, a model that is not there, and an answer repeated by
its ``Idempotency-Key``. The goal is held against the slowest kind's median."""

import argparse
import http.client
import json
import os
import statistics
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

import psutil

from tests.bench.serving.report import Goal
from tests.serve_apps.deployment import Deployed, deployed_at

TARGET_MS = 5
NUM_WARM_UP = 50


@dataclass(frozen=True, slots=True)
class Kind:
    """A request and the status it is answered with."""

    method: str
    path: str
    status: int
    headers: dict[str, str]
    body: dict[str, object] | None = None


def kinds(key: str) -> dict[str, Kind]:
    bearer = {"Authorization": f"Bearer {key}"}
    posted = {**bearer, "Content-Type": "application/json"}
    ask: dict[str, object] = {"max_tokens": 1, "messages": [{"role": "user", "content": "Which one?"}]}
    chat = "/v1/chat/completions"
    return {
        "models": Kind("GET", "/v1/models", 200, bearer),
        "model": Kind("GET", "/v1/models/toy/a1", 200, bearer),
        "wrong_key": Kind("GET", "/v1/models", 401, {"Authorization": f"Bearer {key[:-1]}!"}),
        "unknown_key": Kind("GET", "/v1/models", 401, {"Authorization": f"Bearer ol_{'0' * 16}_{'x' * 43}"}),
        "no_such_model": Kind("POST", chat, 404, posted, {**ask, "model": "nobody/nothing"}),
        "repeated": Kind(
            "POST", chat, 200, {**posted, "Idempotency-Key": "once"}, {**ask, "model": "toy/a1"}
        ),
    }


def milliseconds(url: str, kind: Kind, num_requests: int) -> list[float]:
    connection = http.client.HTTPConnection(urlsplit(url).netloc, timeout=60)
    body, times = json.dumps(kind.body) if kind.body else None, list[float]()
    for _ in range(NUM_WARM_UP + num_requests):
        started = time.perf_counter()
        connection.request(kind.method, kind.path, body, kind.headers)
        answer = connection.getresponse()
        answer.read()
        times.append(1e3 * (time.perf_counter() - started))
        assert answer.status == kind.status, answer.status
    connection.close()
    return sorted(times[NUM_WARM_UP:])


def cpu_ms(deployed: Deployed) -> float:
    """Processor time so far of gateway and proxy, which neighbours on the machine change little."""
    doors = [psutil.Process(pid) for title in ("Gateway", "haproxy -db") for pid in deployed.pids(title)]
    return sum(1e3 * sum(each.cpu_times()[:2]) for each in doors)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--requests", type=int, default=400)
    parser.add_argument("--without-haproxy", action="store_true")
    options = parser.parse_args()
    found: dict[str, object] = {}
    with (
        tempfile.TemporaryDirectory() as folder,
        deployed_at(Path(folder), has_haproxy=not options.without_haproxy) as deployed,
    ):
        load_before = round(os.getloadavg()[0], 1)
        slowest = 0.0
        for name, kind in kinds(deployed.key).items():
            before = cpu_ms(deployed)
            times = milliseconds(deployed.url, kind, options.requests)
            spent = (cpu_ms(deployed) - before) / (NUM_WARM_UP + options.requests)
            p50, p99 = statistics.median(times), times[int(0.99 * len(times))]
            found[name] = {"p50_ms": round(p50, 2), "p99_ms": round(p99, 2), "cpu_ms": round(spent, 2)}
            slowest = max(slowest, p50)
    found["conditions"] = {
        "cores": os.cpu_count(),
        "load_before": load_before,
        "requests": options.requests,
        "haproxy": not options.without_haproxy,
        "database": "SQLite",
        "client": "http.client, one connection, on the same cores",
    }
    options.out.write_text(json.dumps(found, indent=1) + "\n")
    print(json.dumps(found, indent=1))
    print(Goal("gateway_p50_ms", slowest, TARGET_MS, is_at_most=True))


if __name__ == "__main__":
    main()
