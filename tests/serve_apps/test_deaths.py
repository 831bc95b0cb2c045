"""Whoever dies mid-answer: nobody pays for a broken answer, no reservation hangs, nothing stays."""

import asyncio
import time
from collections.abc import AsyncIterator, Sequence
from pathlib import Path

import openai
import pytest
import sqlalchemy

from attribution.errors import Unavailable
from cluster import charges
from cluster.database import writing
from serve_apps.engine.types import Bundle, EngineLoad, EngineRequest, TokenEvent
from serve_apps.engine_host import EngineHost, HostConfig
from serve_apps.outbox import Outbox
from serve_apps.worker_pool import WorkerPool
from tests.cluster.money import assert_money_adds_up
from tests.serve_apps.conftest import Gateway, Toys, open_gateway, request

ASK = [{"role": "user", "content": "Which one?"}]


def test_a_worker_that_gives_a_gateway_up_ends_its_answers_clearly_and_for_free(
    toys: Toys, engine: sqlalchemy.Engine, tmp_path: Path
) -> None:
    """A silent gateway loses its lease; its clients read an error event, and nothing is charged.

    Between two leases there is no worker for a moment: the client repeats a 503, as it does by default."""
    silent = {"host_config": HostConfig(lease_s=0.4), "renew_every_s": 60.0}
    with open_gateway(toys, engine, tmp_path, step_s=0.01, **silent) as gateway:  # type: ignore[arg-type]
        client = gateway.client().with_options(max_retries=5)
        for _ in range(2):
            with pytest.raises(openai.APIError, match="lost") as caught:
                list(
                    client.chat.completions.create(
                        model="toy/a4",
                        messages=ASK,
                        max_tokens=700,
                        stream=True,
                        extra_body={"ignore_eos": True},
                    )
                )
            assert (caught.value.code, caught.value.type) == ("worker_lost", "server_error")
        gateway.wait_until(lambda: set(gateway.charge_states()) == {"released"})
        assert_money_adds_up(engine)
        gateway.wait_until(lambda: gateway.host.engine_load().num_running == 0)


def test_an_orphaned_reservation_is_given_back_when_its_lease_ends(gateway: Gateway) -> None:
    """As a killed gateway leaves it: reserved, nobody renewing."""
    with writing(gateway.database) as session:
        now = int(time.time())
        charges.reserve(session, gateway.account_id, b"\1" * 32, 500, "key", b"\2" * 32, 1, now - 5)
    gateway.wait_until(lambda: gateway.charge_states() == ["released"])
    assert gateway.http().get("/v1/usage").json()["reserved_gwei"] == 0
    assert_money_adds_up(gateway.database)


def test_a_long_answer_outlives_its_lease_by_renewal(
    toys: Toys, engine: sqlalchemy.Engine, tmp_path: Path
) -> None:
    with open_gateway(toys, engine, tmp_path, lease_s=1, step_s=0.01) as gateway:
        answer = gateway.client().chat.completions.create(
            model="toy/a4", messages=ASK, max_tokens=700, extra_body={"ignore_eos": True}
        )
        assert answer.usage is not None and answer.usage.completion_tokens == 700
        assert gateway.charge_states() == ["captured"]


def test_a_reader_that_lags_gets_merged_bundles_and_misses_nothing(toys: Toys) -> None:
    """With a window of two unacknowledged bundles, the rest arrives merged after the acknowledgement."""

    async def scenario() -> None:
        host = EngineHost(toys.engine(), HostConfig(window=2))
        stream = host.stream("slow")
        await anext(stream)
        each = request((5, 6, 7), max_tokens=50, owner="slow")
        await host.submit(each)
        events = [event for _ in range(2) for event in (await anext(stream)).events]
        while host.engine_load().num_running:
            await asyncio.sleep(0.01)
        late = asyncio.ensure_future(anext(stream))
        await asyncio.sleep(0.1)
        assert not late.done()
        await host.renew("slow", 3)
        events += (await late).events
        assert len(events) == 3 and sum(len(event.token_ids) for event in events) == 50
        assert events[-1].finish is not None
        await stream.aclose()  # type: ignore[attr-defined]
        host.stop()

    asyncio.run(scenario())


def test_closing_the_stream_cancels_what_the_gateway_owned_and_nothing_else(toys: Toys) -> None:
    async def scenario() -> None:
        host = EngineHost(toys.engine())
        streams = {owner: host.stream(owner) for owner in ("a", "b")}
        for owner, stream in streams.items():
            await anext(stream)
            await host.submit(request((5, 6, 7), max_tokens=800, owner=owner))
        await anext(streams["a"])
        await streams["a"].aclose()  # type: ignore[attr-defined]
        while host.engine_load().num_running != 1:
            await asyncio.sleep(0.01)
        with pytest.raises(Unavailable, match="no stream"):
            await host.submit(request((5,), owner="a"))
        with pytest.raises(Unavailable, match="given up"):
            await host.renew("a", 1)
        mine = request((5, 6), max_tokens=800, owner="b")
        await host.submit(mine)
        await host.cancel("a", mine.request_id)  # not a's to cancel
        assert (await anext(streams["b"])).events
        assert host.engine_load().num_running + host.engine_load().num_waiting == 2
        await streams["b"].aclose()  # type: ignore[attr-defined]
        host.stop()

    asyncio.run(scenario())


class BrokenDoor:
    """A worker whose network fails in the middle of an answer."""

    async def submit(self, request: EngineRequest) -> None:
        self.request = request

    async def cancel(self, owner: str, request_id: bytes) -> None:
        raise Unavailable("worker_lost", "no route")

    async def prefetch(self, adapter_id: bytes) -> None:
        raise Unavailable("worker_lost", "no route")

    async def withdraw(self, adapter_ids: Sequence[bytes]) -> None:
        raise Unavailable("worker_lost", "no route")

    async def renew(self, owner: str, num_read: int) -> EngineLoad:
        return EngineLoad(0, 0, 1, 1, 0)

    async def stream(self, owner: str) -> AsyncIterator[Bundle]:
        yield Bundle(0, (), EngineLoad(0, 0, 1, 1, 0))
        while not hasattr(self, "request"):
            await asyncio.sleep(0.01)
        yield Bundle(1, (TokenEvent(self.request.request_id, (1,), "a"),), EngineLoad(1, 0, 1, 1, 0))
        raise Unavailable("worker_lost", "connection reset")


def test_an_answer_cut_off_by_the_network_says_so_after_what_had_arrived() -> None:
    async def scenario() -> None:
        pool = WorkerPool("g")
        with pytest.raises(Unavailable, match="no worker"):
            await anext(pool.generate(request((1,))))
        pool.connect("w", BrokenDoor())
        while not pool.loads:
            await asyncio.sleep(0.01)
        pool.prefetch(b"\1" * 32)  # of which nobody hears
        await pool.withdraw([b"\1" * 32])
        events = pool.generate(request((1, 2)))
        assert (await anext(events)).token_ids == (1,)
        with pytest.raises(Unavailable, match="lost while"):
            await anext(events)
        assert pool.loads == {}  # forgotten, until it is found again
        await pool.close()

    asyncio.run(scenario())


def test_an_outbox_holds_one_event_per_request_however_slow_its_reader() -> None:
    async def scenario() -> None:
        outbox = Outbox(asyncio.get_running_loop())
        for token in range(100):
            outbox.put(TokenEvent(bytes([token % 2]), (token,), str(token)))
        first, second = await outbox.take()
        assert first.token_ids == tuple(range(0, 100, 2)) and len(second.token_ids) == 50
        outbox.close()
        assert await outbox.take() == ()

    asyncio.run(scenario())
