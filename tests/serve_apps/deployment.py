"""The application deployed for a test: real Ray, real Serve, a toy model, one published adapter and a key."""

import secrets
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil
from openai import OpenAI
from sqlalchemy import Engine, select

from cluster import accounts, head
from cluster.adapters import pack, publish, store_adapter
from cluster.config import EngineSettings, PriceSettings, Settings
from cluster.database import connect, migrate, reading, writing
from cluster.models import base_model, linear_shapes
from cluster.storage import open_storage
from cluster.tables import ChargeRow
from tests import toy_models


@dataclass
class Deployed:
    url: str
    key: str
    database: Engine
    settings: Settings

    def client(self) -> OpenAI:
        return OpenAI(base_url=f"{self.url}/v1", api_key=self.key, max_retries=0, timeout=60)

    def states(self) -> list[str]:
        with reading(self.database) as session:
            return list(session.scalars(select(ChargeRow.state).order_by(ChargeRow.created_at)))

    def pids(self, title: str) -> list[int]:
        """Our head's processes whose Ray title names ``title``."""
        own = head.processes(self.settings)
        return [p.pid for p in own if p.is_running() and title in command_of(p)]


def command_of(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except psutil.Error:
        return ""


def wait_until(is_so: Callable[[], bool], timeout_s: float = 120) -> None:
    deadline = time.monotonic() + timeout_s
    while not is_so():
        assert time.monotonic() < deadline, "did not come about"
        time.sleep(0.2)


@contextmanager
def deployed_at(
    home: Path, width: int = 64, has_haproxy: bool = True, **engine: object
) -> Iterator[Deployed]:
    """Serves ``toy/a1@1`` over a toy of that width until the block ends; ``engine`` are its settings."""
    run = Path(f"/tmp/ol{secrets.token_hex(3)}")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    limits = {"max_context_tokens": 1000, "max_completion_tokens": 900, "kv_bytes": 16 * 2**20}
    settings = Settings(
        home=home,
        run_dir=run,
        base_model=str(toy_models.tiny_base(home / "base", width=width)),
        gateway_port=port,
        engine=EngineSettings(**{**limits, "num_threads": 1, **engine}),  # type: ignore[arg-type]
        ray={"num_cpus": 2, "object_store_bytes": 100_000_000, "has_haproxy": has_haproxy},  # type: ignore[arg-type]
        prices=PriceSettings(reservation_lease_s=12),
    )
    migrate(settings.database_url)
    database = connect(settings.database_url)
    base = base_model(settings)
    weights = toy_models.random_adapter(base.base_id, linear_shapes(base.path), scale=0.3)
    adapter_id = store_adapter(open_storage(settings.storage_url), pack(weights))
    with writing(database) as session:
        now, payer = int(time.time()), secrets.token_bytes(20)
        publish(
            session,
            adapter_id=adapter_id,
            name="toy/a1",
            base_id=base.base_id,
            manifest_ids=(),
            owner_id=b"\7" * 32,
            trajectory="",
            price_gwei_per_token=20,
            now=1,
        )
        accounts.record_deposit(session, payer, 10**9, secrets.token_bytes(32), 0, 1, now)
        accounts.record_ceiling(session, payer, 10**9, now + 10**7, b"\1" * 65)
        key = accounts.issue_key(session, accounts.open_account(session, payer, "test", 10**9, now), now)
    head.start(settings)
    try:
        head.connect_driver(settings)
        from serve_apps import app

        url = app.deploy(settings)
        yield Deployed(url, key, database, settings)
    finally:
        import ray

        ray.shutdown()
        head.stop(settings)
