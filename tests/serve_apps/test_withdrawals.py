"""Which version answers follows the table of adapters: at the next request, or within seconds mid-answer."""

import asyncio
import time
from collections.abc import AsyncIterator, Sequence
from pathlib import Path

import openai
import pytest
import sqlalchemy
from sqlalchemy import insert

from attribution.errors import Rejected, Unavailable
from attribution.types import ZERO_ID
from cluster import adapters
from cluster.adapters import pack, publish, store_adapter
from cluster.config import EngineSettings
from cluster.database import reading, writing
from cluster.tables import AdapterRow
from serve_apps import catalog
from serve_apps.engine.adapter_cache import CacheLimits
from serve_apps.engine.types import Bundle, EngineLoad, EngineRequest
from serve_apps.worker_pool import WorkerPool
from tests import toy_models
from tests.cluster.money import assert_money_adds_up
from tests.serve_apps.conftest import Gateway, Toys, open_gateway

ASK = [{"role": "user", "content": "Which one?"}]
LONG = {"max_tokens": 700, "extra_body": {"ignore_eos": True}}
SHORT = {"temperature": 0, "max_tokens": 8, "extra_body": {"ignore_eos": True}}


def test_a_promoted_version_answers_the_next_request_to_the_bare_name(gateway: Gateway) -> None:
    toys = gateway.toys
    shapes = {
        name: (w.b.shape[0], w.a.shape[1]) for name, w in toys.adapters[toys.adapter_ids[0]].factors.items()
    }
    newer = toy_models.random_adapter(toys.base.base_id, shapes, rank=8, seed=77, scale=0.3)
    with writing(gateway.database) as session:
        version = publish(
            session,
            adapter_id=store_adapter(toys.storage, pack(newer)),
            name="toy/a1",
            base_id=toys.base.base_id,
            manifest_ids=(),
            owner_id=b"\7" * 32,
            trajectory="",
            price_gwei_per_token=20,
            now=2,
        )
    create = gateway.client().chat.completions.create
    before = create(model="toy/a1", messages=ASK, **SHORT)
    pinned = create(model=version.ref, messages=ASK, **SHORT)
    with writing(gateway.database) as session:
        adapters.promote(session, version.ref)
    after = create(model="toy/a1", messages=ASK, **SHORT)
    assert (before.model, after.model, pinned.model) == ("toy/a1@1", "toy/a1@2", "toy/a1@2")
    assert after.choices[0].message.content == pinned.choices[0].message.content
    assert after.choices[0].message.content != before.choices[0].message.content


def withdraw(gateway: Gateway, ref: str) -> None:
    with writing(gateway.database) as session:
        adapters.withdraw(session, ref, int(time.time()))


def test_a_withdrawal_ends_answers_under_way_for_free_and_nobody_elses(
    toys: Toys, engine: sqlalchemy.Engine, tmp_path: Path
) -> None:
    with open_gateway(toys, engine, tmp_path, step_s=0.01) as gateway:
        create = gateway.client().chat.completions.create
        create(model="toy/a4", messages=ASK, **SHORT)  # whose prompt is in the cache now
        mine = create(model="toy/a4", messages=ASK, stream=True, **LONG)
        other = create(model="toy/a5", messages=ASK, stream=True, **LONG)
        next(iter(mine)), next(iter(other))
        withdrawn_at = time.monotonic()
        withdraw(gateway, "toy/a4@1")
        with pytest.raises(openai.APIStatusError) as refused:
            create(model="toy/a4@1", messages=ASK, **SHORT)
        assert (refused.value.status_code, refused.value.code) == (410, "model_withdrawn")
        with pytest.raises(openai.APIError) as broken:
            list(mine)
        assert broken.value.code == "model_withdrawn"
        print(f"a withdrawal took {time.monotonic() - withdrawn_at:.1f} s")
        assert sum(bool(chunk.choices and chunk.choices[0].delta.content) for chunk in other) > 0
        gateway.wait_until(lambda: sorted(gateway.charge_states()) == ["captured", "captured", "released"])
        gateway.wait_until(lambda: gateway.host.engine_load().num_running == 0)
        assert gateway.host.engine_load().num_adapters == 1
        assert_money_adds_up(engine)


def test_who_resolved_before_the_withdrawal_and_asks_after_it_is_refused(gateway: Gateway) -> None:
    """By the engine: as when a gateway had read the table just before."""
    withdrawn = gateway.toys.adapter_ids[1]
    gateway.client().chat.completions.create(model="toy/a2", messages=ASK, **SHORT)
    asyncio.run(gateway.host.withdraw([withdrawn]))
    with pytest.raises(openai.APIStatusError) as refused:
        gateway.client().chat.completions.create(model="toy/a2", messages=ASK, **SHORT)
    assert (refused.value.status_code, refused.value.code) == (410, "model_withdrawn")
    gateway.wait_until(lambda: gateway.charge_states() == ["captured", "released"])
    assert gateway.host.engine_load().num_adapters == 0


class Worker:
    """A door that hears of withdrawals, or is away at first."""

    def __init__(self, is_away: bool = False) -> None:
        self.is_away = is_away
        self.heard: list[bytes] = []
        self.prefetched: list[bytes] = []

    async def submit(self, request: EngineRequest) -> None: ...

    async def cancel(self, owner: str, request_id: bytes) -> None: ...

    async def prefetch(self, adapter_id: bytes) -> None:
        self.prefetched.append(adapter_id)

    async def withdraw(self, adapter_ids: Sequence[bytes]) -> None:
        if self.is_away:
            raise Unavailable("worker_lost", "no route")
        self.heard += adapter_ids

    async def renew(self, owner: str, num_read: int) -> EngineLoad:
        return EngineLoad(0, 0, 1, 1, 0)

    async def stream(self, owner: str) -> AsyncIterator[Bundle]:
        yield Bundle(0, (), EngineLoad(0, 0, 1, 1, 0))
        await asyncio.sleep(60)


A, B = b"\1" * 32, b"\2" * 32


def test_every_worker_hears_of_every_withdrawal_once_however_late_it_comes() -> None:
    async def scenario() -> None:
        pool, early, away, late = WorkerPool("g"), Worker(), Worker(is_away=True), Worker()
        pool.connect("early", early)
        pool.connect("away", away)
        await pool.withdraw([A])
        assert (early.heard, away.heard) == ([A], [])
        away.is_away = False
        pool.connect("late", late)
        await pool.withdraw()
        await pool.withdraw([B])
        assert early.heard == away.heard == late.heard == [A, B]
        await pool.close()

    asyncio.run(scenario())


def test_an_adapter_is_prefetched_once_and_the_base_never() -> None:
    async def scenario() -> None:
        pool, worker = WorkerPool("g"), Worker()
        pool.prefetch(A)  # no worker: nothing happens
        pool.connect("w", worker)
        while not pool.loads:
            await asyncio.sleep(0.01)
        for adapter_id in (A, ZERO_ID, A, B):
            pool.prefetch(adapter_id)
        await asyncio.sleep(0.05)
        assert worker.prefetched == [A, B]
        await pool.close()

    asyncio.run(scenario())


def test_every_route_prefetches_what_it_is_asked_for(gateway: Gateway) -> None:
    """Before anything else is checked: none of these requests is answered."""
    bad = {
        "/v1/chat/completions": {"model": "toy/a1", "messages": ASK, "max_tokens": 10**6},
        "/v1/completions": {"model": "toy/a2", "prompt": "x", "max_tokens": 10**6},
        "/v1/responses": {"model": "toy/a3", "input": "x", "max_output_tokens": 10**6},
        "/v1/embeddings": {"model": "toy/a4", "input": ""},
    }
    for number, (route, body) in enumerate(bad.items(), start=1):
        assert gateway.http().post(route, json=body).status_code == 400
        with gateway.http() as http:  # a step takes it in
            http.post("/v1/completions", json={"model": "base", "prompt": "x", "max_tokens": 1})
        gateway.wait_until(lambda number=number: gateway.host.engine_load().num_adapters == number)  # type: ignore[misc]


def test_ten_thousand_registered_adapters_are_listed_and_each_is_found(gateway: Gateway) -> None:
    num = 10_000
    row = {
        "base_id": gateway.toys.base.base_id.hex(),
        "version": 1,
        "manifest_ids": "",
        "owner_id": "07" * 32,
        "trajectory": "",
        "price_gwei_per_token": 20,
        "is_promoted": 1,
        "created_at": 1,
    }
    rows = [{**row, "adapter_id": f"{n:064x}", "name": f"many/m{n}"} for n in range(num)]
    with writing(gateway.database) as session:
        session.execute(insert(AdapterRow), rows)
    client = gateway.client()
    assert len(list(client.models.list())) == num + len(gateway.toys.adapter_ids) + 1
    assert client.models.retrieve("many/m9999").id == "many/m9999@1"
    assert client.chat.completions.create(model="toy/a1", messages=ASK, **SHORT).model == "toy/a1@1"
    assert gateway.host.engine_load().num_adapters == 1


def test_pins_are_what_names_stand_for_and_a_withdrawn_one_keeps_no_worker_down(
    gateway: Gateway, caplog: pytest.LogCaptureFixture
) -> None:
    base_id, ids = gateway.toys.base.base_id, gateway.toys.adapter_ids
    withdraw(gateway, "toy/a3@1")
    refs = EngineSettings(pinned_adapters=("toy/a2", "toy/a3@1", "toy/a1@1", "toy/a2@1")).pinned_adapters
    with reading(gateway.database) as session:
        assert catalog.pinned(session, refs, base_id) == (ids[1], ids[0])
        with pytest.raises(Rejected, match="no model"):
            catalog.pinned(session, ("toy/unknown",), base_id)
    assert "toy/a3@1 was withdrawn" in caplog.text
    engine = gateway.toys.engine(pinned=ids[:2])
    assert engine.load().num_adapters == 2
    engine.close()
    with pytest.raises(Rejected) as refused:
        gateway.toys.engine(pinned=ids, adapters=CacheLimits(budget_bytes=400_000, max_adapter_bytes=200_000))
    assert refused.value.code == "pins_too_large"
