"""A deployment of a load test's own for a tiny random model: Ray, Serve, gateway and engine, rows of a payer
with money, but no rollup. So small a model goes through a hundred times more requests than a real one, and
what is watched is bookkeeping."""

import re
import secrets
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path

import httpx
import psutil
from sqlalchemy import Engine

from attribution.hashing import sha256
from cluster import accounts, head
from cluster.adapters import adapter_key, pack, publish, store_adapter, withdraw
from cluster.config import EngineSettings, PriceSettings, RaySettings, Settings
from cluster.database import connect, migrate, writing
from cluster.models import BaseModel, base_model, linear_shapes
from cluster.storage import Storage, open_storage
from tests import toy_models
from tests.whole_path import free_port

DEPOSIT_GWEI = 10**15
_SAMPLE = re.compile(r"^(openledger_\w+)(?:\{.*\})? (\S+)$", re.MULTILINE)


@dataclass(frozen=True, slots=True)
class Deployment:
    settings: Settings
    database: Engine
    storage: Storage
    base: BaseModel
    key: str
    names: Iterator[int] = field(default_factory=count)

    @property
    def url(self) -> str:
        return self.settings.public_url

    def publish_random(self, rank: int) -> str:
        """A good adapter's reference."""
        number = next(self.names)
        weights = toy_models.random_adapter(
            self.base.base_id, linear_shapes(self.base.path), rank, number, 0.3
        )
        return self._publish(store_adapter(self.storage, pack(weights)), number)

    def publish_file(self, content: bytes, adapter_id: bytes | None = None) -> str:
        """Any bytes at all, as if they had been checked; under a hash that need not be theirs."""
        named = adapter_id or sha256(content)
        self.storage.put(adapter_key(named), content)
        return self._publish(named, next(self.names))

    def withdraw(self, ref: str) -> None:
        with writing(self.database) as session:
            withdraw(session, ref, int(time.time()))

    def gauges(self) -> dict[str, float]:
        """Each metric of ``/metrics``, summed over its labels."""
        found: dict[str, float] = {}
        for name, value in _SAMPLE.findall(httpx.get(f"{self.url}/metrics", timeout=30).text):
            found[name] = found.get(name, 0.0) + float(value)
        return found

    def processes(self, title: str) -> list[psutil.Process]:
        """Of our Ray, by a part of the title that Ray gives them."""
        found = []
        for process in head.processes(self.settings):
            try:
                if title in " ".join(process.cmdline()):
                    found.append(process)
            except psutil.Error:
                continue  # gone meanwhile
        return found

    def _publish(self, adapter_id: bytes, number: int) -> str:
        with writing(self.database) as session:
            return publish(
                session,
                adapter_id=adapter_id,
                name=f"toy/a{number}",
                base_id=self.base.base_id,
                manifest_ids=(),
                owner_id=b"\7" * 32,
                trajectory="",
                price_gwei_per_token=20,
                now=int(time.time()),
            ).ref


@contextmanager
def deployed(folder: Path, **engine: object) -> Iterator[Deployment]:
    port = free_port()
    settings = Settings(
        home=folder,
        run_dir=Path(f"/tmp/olb{secrets.token_hex(3)}"),
        base_model=str(toy_models.tiny_base(folder / "base")),
        gateway_port=port,
        public_url=f"http://127.0.0.1:{port}",
        engine=EngineSettings(
            **{
                "max_context_tokens": 1000,
                "max_completion_tokens": 900,
                "num_threads": 1,
                "kv_bytes": 16 * 2**20,
                "adapter_bytes": 4 * 2**20,
                **engine,
            }  # type: ignore[arg-type]
        ),
        ray=RaySettings(num_cpus=2, object_store_bytes=100_000_000),
        prices=PriceSettings(reservation_lease_s=20),
    )
    migrate(settings.database_url)
    database = connect(settings.database_url)
    with writing(database) as session:
        now, payer = int(time.time()), secrets.token_bytes(20)
        accounts.record_deposit(session, payer, DEPOSIT_GWEI, secrets.token_bytes(32), 0, 1, now)
        accounts.record_ceiling(session, payer, DEPOSIT_GWEI, now + 10**7, b"\1" * 65)
        account = accounts.open_account(session, payer, "load", DEPOSIT_GWEI, now)
        key = accounts.issue_key(session, account, now)
    storage = open_storage(settings.storage_url)
    head.start(settings)
    try:
        head.connect_driver(settings)
        from serve_apps import app

        app.deploy(settings)
        yield Deployment(settings, database, storage, base_model(settings), key)
    finally:
        import ray

        ray.shutdown()
        head.stop(settings)
