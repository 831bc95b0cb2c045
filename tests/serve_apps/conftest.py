"""A toy base model with adapters in storage, and engines over it that are driven by hand."""

import asyncio
import secrets
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

import httpx
import pytest
import sqlalchemy
import torch
import uvicorn
from openai import OpenAI
from sqlalchemy import select

from attribution.types import ZERO_ID
from cluster import accounts
from cluster.adapters import AdapterWeights, pack, publish, store_adapter
from cluster.database import reading, writing
from cluster.models import BaseModel, base_id, linear_shapes, load_tokenizer
from cluster.storage import DirectoryStorage, Storage
from cluster.tables import ChargeRow
from cluster.transcripts import key_path, load_key
from serve_apps.engine.engine import Engine
from serve_apps.engine.grammar import Grammars
from serve_apps.engine.loading import EngineConfig, build_engine
from serve_apps.engine.scheduler import Limits
from serve_apps.engine.types import Bundle, EngineRequest, SamplingParams, TokenEvent
from serve_apps.engine_host import EngineHost, HostConfig
from serve_apps.http_app import build_app
from serve_apps.services import Limits as HttpLimits
from serve_apps.services import Services
from serve_apps.sessions import Sessions, Terms
from serve_apps.worker_pool import WorkerPool
from tests import toy_models

_numbers = count(1)


@dataclass(frozen=True)
class Toys:
    base: BaseModel
    storage: Storage
    adapters: dict[bytes, AdapterWeights]

    @property
    def adapter_ids(self) -> list[bytes]:
        return list(self.adapters)

    def engine(self, limits: Limits | None = None, **config: object) -> Engine:
        values = {"dtype": torch.float32, "kv_bytes": 4 * 2**20, "limits": limits or Limits(), **config}
        return build_engine(self.base, self.storage, EngineConfig(**values))  # type: ignore[arg-type]


class Slowed:
    """An engine whose steps take a while: how fast the machine is then decides nothing."""

    def __init__(self, engine: Engine, step_s: float) -> None:
        self._engine, self._step_s = engine, step_s

    def step(self) -> Bundle:
        time.sleep(self._step_s)
        return self._engine.step()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine, name)


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    """Toys are so small that a second thread only waits."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def toys(tmp_path_factory: pytest.TempPathFactory) -> Toys:
    return toys_in(tmp_path_factory.mktemp("toys"))


def toys_in(folder: Path, width: int = 64) -> Toys:
    """Six adapters of different ranks; one touches attention only."""
    path = toy_models.tiny_base(folder / "base", width=width)
    base, storage = BaseModel(base_id(path), path), DirectoryStorage(folder / "storage")
    shapes, adapters = linear_shapes(path), {}
    for seed, rank in enumerate((1, 2, 4, 4, 8, 16), start=1):
        some = {name: shape for name, shape in shapes.items() if seed != 3 or "self_attn" in name}
        weights = toy_models.random_adapter(base.base_id, some, rank=rank, seed=seed, scale=0.3)
        adapters[store_adapter(storage, pack(weights))] = weights
    return Toys(base, storage, adapters)


@pytest.fixture(params=[True, False], ids=["kernels", "torch"])
def toy_engine(request: pytest.FixtureRequest, toys: Toys) -> Iterator[Engine]:
    engine = toys.engine(is_native=request.param)
    yield engine
    engine.close()


def request(
    prompt: tuple[int, ...], adapter_id: bytes = ZERO_ID, owner: str = "test", **sampling: object
) -> EngineRequest:
    params = {"max_tokens": 12, "temperature": 0.0, "ignore_eos": True, **sampling}
    number = next(_numbers).to_bytes(32, "big")
    return EngineRequest(number, owner, "tenant", prompt, SamplingParams(**params), adapter_id)  # type: ignore[arg-type]


def run(engine: Engine, requests: list[EngineRequest], max_steps: int = 2000) -> dict[bytes, TokenEvent]:
    """Submit together, step until all are over; one merged event each."""
    for each in requests:
        engine.submit(each)
    return drive(engine, {each.request_id for each in requests}, max_steps)


def drive(engine: Engine, open_ids: set[bytes], max_steps: int = 2000) -> dict[bytes, TokenEvent]:
    merged: dict[bytes, TokenEvent] = {}
    for _ in range(max_steps):
        for event in engine.step().events:
            before = merged.get(event.request_id)
            merged[event.request_id] = before.then(event) if before else event
        if all(key in merged and merged[key].finish for key in open_ids):
            return merged
    raise AssertionError(f"{len(open_ids)} requests did not end in {max_steps} steps")


@dataclass
class Gateway:
    """A gateway over HTTP on loopback with an engine in its own process, and a funded account."""

    url: str
    database: sqlalchemy.Engine
    host: EngineHost
    services: Services
    toys: Toys
    account_id: str
    key: str

    def client(self, key: str | None = None) -> OpenAI:
        return OpenAI(base_url=f"{self.url}/v1", api_key=key or self.key, max_retries=0)

    def http(self, key: str | None = None) -> httpx.Client:
        bearer = {"Authorization": f"Bearer {key or self.key}"}
        return httpx.Client(base_url=self.url, headers=bearer, timeout=30)

    def new_key(self, deposit_gwei: int = 10**9) -> str:
        with writing(self.database) as session:
            payer = secrets.token_bytes(20)
            now = int(time.time())
            accounts.record_deposit(session, payer, deposit_gwei, secrets.token_bytes(32), 0, 1, now)
            accounts.record_ceiling(session, payer, deposit_gwei, now + 10**7, b"\1" * 65)
            self.account_id = accounts.open_account(session, payer, "test", deposit_gwei, now)
            return accounts.issue_key(session, self.account_id, now)

    def wait_until(self, is_so: Callable[[], bool], timeout_s: float = 10) -> None:
        deadline = time.monotonic() + timeout_s
        while not is_so():
            assert time.monotonic() < deadline, "did not come about"
            time.sleep(0.02)

    def charge_states(self) -> list[str]:
        with reading(self.database) as session:
            return list(session.scalars(select(ChargeRow.state).order_by(ChargeRow.created_at)))


@pytest.fixture
def gateway(toys: Toys, engine: sqlalchemy.Engine, tmp_path: Path) -> Iterator[Gateway]:
    with open_gateway(toys, engine, tmp_path) as opened:
        yield opened


@contextmanager
def open_gateway(
    toys: Toys,
    database: sqlalchemy.Engine,
    home: Path,
    lease_s: int = 30,
    host_config: HostConfig | None = None,
    renew_every_s: float = 0.5,
    step_s: float = 0.0,
) -> Iterator[Gateway]:
    """Publishes the toy adapters as ``toy/a1@1`` … and serves until the block ends. An answer of the toy is
    over within milliseconds; where it must not be, a step takes ``step_s`` at least."""
    with writing(database) as session:
        for number, adapter_id in enumerate(toys.adapter_ids, start=1):
            publish(
                session,
                adapter_id=adapter_id,
                name=f"toy/a{number}",
                base_id=toys.base.base_id,
                manifest_ids=(),
                owner_id=b"\7" * 32,
                trajectory="",
                price_gwei_per_token=20,
                now=1,
            )
    host = EngineHost(Slowed(toys.engine(), step_s) if step_s else toys.engine(), host_config)
    pool = WorkerPool("gateway", renew_every_s)
    tokenizer = load_tokenizer(toys.base.path)
    services = Services(
        database=database,
        storage=toys.storage,
        base=toys.base,
        tokenizer=tokenizer,
        grammars=Grammars(tokenizer, len(tokenizer)),
        pool=pool,
        sessions=Sessions(database, pool, Terms(lease_s, load_key(key_path(home)))),
        limits=HttpLimits(max_context_tokens=900, max_completion_tokens=800),
        base_gwei_per_token=10,
        chain_id=31337,
        home=home,
    )

    async def find_workers(services: Services) -> None:
        while True:
            services.pool.connect("here", host)
            await asyncio.sleep(0.1)

    server = uvicorn.Server(
        uvicorn.Config(
            build_app(services, find_workers, release_every_s=0.3), port=0, log_level="error", lifespan="on"
        )
    )
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    try:
        while not server.started or not pool.loads:
            assert thread.is_alive()
            time.sleep(0.02)
        port = server.servers[0].sockets[0].getsockname()[1]
        opened = Gateway(f"http://127.0.0.1:{port}", database, host, services, toys, "", "")
        opened.key = opened.new_key()
        yield opened
    finally:
        server.should_exit = True
        thread.join(timeout=20)
        host.stop()
