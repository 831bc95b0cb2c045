"""The deployed application: real Ray, real Serve, the toy model, and kill -9 where it hurts."""

import json
import os
import secrets
import signal
import socket
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx
import psutil
import pytest
from openai import APIError, OpenAI
from sqlalchemy import Engine, select

from cluster import accounts, head
from cluster.adapters import pack, publish, store_adapter
from cluster.config import EngineSettings, PriceSettings, Settings
from cluster.database import connect, migrate, reading, writing
from cluster.models import base_model, linear_shapes
from cluster.storage import open_storage
from cluster.tables import ChargeRow, ReceiptRow
from tests import toy_models
from tests.cluster.money import assert_money_adds_up

pytestmark = [pytest.mark.ray, pytest.mark.timeout(600)]
ASK = [{"role": "user", "content": "Which one?"}]
LONG = {"model": "toy/a1", "messages": ASK, "max_tokens": 900, "stream": True, "ignore_eos": True}


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
        return [p.pid for p in own if p.is_running() and title in " ".join(_cmdline(p))]


def _cmdline(process: psutil.Process) -> list[str]:
    try:
        return list(process.cmdline())
    except psutil.Error:
        return []


def wait_until(is_so: Callable[[], bool], timeout_s: float = 120) -> None:
    deadline = time.monotonic() + timeout_s
    while not is_so():
        assert time.monotonic() < deadline, "did not come about"
        time.sleep(0.2)


@pytest.fixture(scope="module")
def deployed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Deployed]:
    home, run = tmp_path_factory.mktemp("home"), Path(f"/tmp/ol{secrets.token_hex(3)}")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    settings = Settings(
        home=home,
        run_dir=run,
        base_model=str(toy_models.tiny_base(home / "base")),
        gateway_port=port,
        engine=EngineSettings(
            max_context_tokens=1000, max_completion_tokens=900, num_threads=1, kv_bytes=16 * 2**20
        ),
        ray={"num_cpus": 2, "object_store_bytes": 100_000_000},  # type: ignore[arg-type]
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


def test_the_official_client_streams_and_does_not(deployed: Deployed) -> None:
    create = deployed.client().chat.completions.create
    options = {"model": "toy/a1", "messages": ASK, "max_tokens": 10, "temperature": 0}
    whole = create(**options, extra_body={"ignore_eos": True})  # type: ignore[call-overload]
    stream = create(  # type: ignore[call-overload]
        **options, stream=True, stream_options={"include_usage": True}, extra_body={"ignore_eos": True}
    )
    chunks = list(stream)
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == whole.choices[0].message.content
    assert chunks[-1].usage.model_extra == {"cost_gwei": 20 * chunks[-1].usage.total_tokens}
    assert httpx.get(f"{deployed.url}/v1/models").status_code == 401
    assert_money_adds_up(deployed.database)


def test_a_client_that_leaves_mid_stream_pays_for_what_was_sent(deployed: Deployed) -> None:
    before = len(deployed.states())
    with httpx.stream(
        "POST",
        f"{deployed.url}/v1/chat/completions",
        json=LONG,
        headers={"Authorization": f"Bearer {deployed.key}"},
        timeout=60,
    ) as reply:
        lines = reply.iter_lines()
        for _ in range(6):
            next(lines)
    wait_until(lambda: deployed.states()[before:] == ["captured"])
    with reading(deployed.database) as session:
        fee = session.scalars(select(ReceiptRow.fee_gwei).order_by(ReceiptRow.created_at.desc())).first()
    assert fee is not None and 0 < fee < 20 * 900
    assert_money_adds_up(deployed.database)


def test_killing_the_engine_mid_stream_is_a_clear_error_and_free_and_heals(deployed: Deployed) -> None:
    before = len(deployed.states())
    (engine,) = deployed.pids("EngineActor")  # asked before: 900 tokens of the toy take less than a second
    stream = deployed.client().chat.completions.create(
        model="toy/a1", messages=ASK, max_tokens=900, stream=True, extra_body={"ignore_eos": True}
    )
    chunks = iter(stream)
    next(chunks)
    os.kill(engine, signal.SIGKILL)
    with pytest.raises(APIError, match="worker"):
        list(chunks)
    wait_until(lambda: deployed.states()[before:] == ["released"])
    assert_money_adds_up(deployed.database)

    def is_answered() -> bool:
        body = {"model": "toy/a1", "messages": ASK, "max_tokens": 3}
        bearer = {"Authorization": f"Bearer {deployed.key}"}
        reply = httpx.post(f"{deployed.url}/v1/chat/completions", json=body, headers=bearer, timeout=60)
        assert reply.status_code == 200 or reply.headers["Retry-After"]
        return reply.status_code == 200

    wait_until(is_answered)


def test_killing_the_gateway_mid_stream_leaves_no_reservation_and_a_free_engine(deployed: Deployed) -> None:
    before = len(deployed.states())
    (gateway,) = deployed.pids("ServeReplica:openledger:Gateway")
    bearer = {"Authorization": f"Bearer {deployed.key}"}
    url = f"{deployed.url}/v1/chat/completions"
    with (
        pytest.raises(httpx.HTTPError),
        httpx.stream("POST", url, json=LONG, headers=bearer, timeout=60) as reply,
    ):
        lines = reply.iter_lines()
        next(lines)
        os.kill(gateway, signal.SIGKILL)
        for line in lines:
            assert not line.startswith("data: [DONE]")
        raise httpx.ReadError("the stream ended without its last event")
    wait_until(lambda: deployed.states()[before:] == ["released"])
    wait_until(lambda: httpx.get(f"{deployed.url}/healthz", timeout=20).status_code == 200)
    metrics = httpx.get(f"{deployed.url}/metrics", timeout=20).text
    assert [line.split()[-1] for line in metrics.splitlines() if "engine_running" in line] == ["0"]
    assert_money_adds_up(deployed.database)
    answer = deployed.client().chat.completions.create(model="toy/a1", messages=ASK, max_tokens=3)
    assert json.dumps(answer.model_extra)
