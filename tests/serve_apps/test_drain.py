"""A worker about to stop: nothing new, everything begun is finished and read, and nobody outside notices."""

import asyncio
from collections.abc import AsyncIterator

import pytest

from attribution.errors import Rejected, Unavailable
from serve_apps.engine.scheduler import Limits
from serve_apps.engine.types import Bundle, EngineLoad, EngineRequest
from serve_apps.engine_host import EngineHost, HostConfig
from serve_apps.worker_pool import WorkerPool
from tests.serve_apps.conftest import Slowed, Toys, request

PATIENT = HostConfig(lease_s=600)  # with a gateway that renews so seldom that it hears of nothing in between


async def attached(pool: WorkerPool, hosts: dict[str, EngineHost]) -> None:
    for worker_id, host in hosts.items():
        pool.connect(worker_id, host)
    while len(pool.loads) < len(hosts):
        await asyncio.sleep(0.01)


async def answer(pool: WorkerPool, asked: EngineRequest) -> int:
    return sum([len(event.token_ids) async for event in pool.generate(asked)])


def test_a_draining_host_refuses_finishes_and_waits_until_the_gateway_has_read(toys: Toys) -> None:
    async def scenario() -> None:
        host = EngineHost(Slowed(toys.engine(), 0.01))
        stream = host.stream("g")
        await anext(stream)
        running = request((5, 6, 7), max_tokens=60, owner="g")
        await host.submit(running)
        draining = asyncio.ensure_future(host.drain())
        await asyncio.sleep(0)
        with pytest.raises(Unavailable) as refused:
            await host.submit(request((5,), owner="g"))
        assert refused.value.code == "draining"
        num_read, tokens, is_over = 1, 0, False
        while not is_over:
            bundle = await anext(stream)
            assert bundle.load.is_draining
            num_read += 1
            tokens += sum(len(event.token_ids) for event in bundle.events)
            is_over = any(event.finish for event in bundle.events)
        await asyncio.sleep(0.3)
        assert tokens == 60 and not draining.done()  # its last bundle may still be on its way
        await host.renew("g", num_read)
        await draining
        await stream.aclose()  # type: ignore[attr-defined]
        host.stop()

    asyncio.run(scenario())


def test_a_request_that_a_draining_worker_refuses_is_answered_by_the_next_one(toys: Toys) -> None:
    """The pool has not heard yet that one drains; whichever the adapter calls home, all are answered."""

    async def scenario() -> None:
        hosts = {name: EngineHost(toys.engine(), PATIENT) for name in ("a", "b")}
        pool = WorkerPool("g", renew_every_s=4)
        await attached(pool, hosts)
        before = pool.loads
        await hosts["a"].drain()
        assert not any(load.is_draining for load in before.values())
        asked = [request((5, 6, 7), adapter_id) for adapter_id in toys.adapter_ids]
        assert await asyncio.gather(*(answer(pool, each) for each in asked)) == [12] * len(asked)
        await hosts["b"].drain()
        with pytest.raises(Unavailable) as refused:
            await answer(pool, request((5,)))
        assert refused.value.code in ("draining", "no_worker")  # whether or not the pool has heard by now
        await pool.close()
        for host in hosts.values():
            host.stop()

    asyncio.run(scenario())


def test_a_drained_host_can_be_stopped_while_the_pool_reads_on_elsewhere(toys: Toys) -> None:
    """Scale-down: long answers on both workers, one is drained and ends; no answer is cut."""

    async def scenario() -> None:
        hosts = {name: EngineHost(Slowed(toys.engine(), 0.01)) for name in ("a", "b")}
        pool = WorkerPool("g", renew_every_s=0.2)
        await attached(pool, hosts)
        answers = [asyncio.ensure_future(answer(pool, request((5, 6), max_tokens=150))) for _ in range(6)]
        while not all(host.engine_load().num_running for host in hosts.values()):
            await asyncio.sleep(0.01)
        await hosts["a"].drain()
        hosts["a"].stop()
        answers += [asyncio.ensure_future(answer(pool, request((5, 6), max_tokens=10))) for _ in range(3)]
        assert await asyncio.gather(*answers) == [150] * 6 + [10] * 3
        await pool.close()
        hosts["b"].stop()

    asyncio.run(scenario())


def test_a_worker_without_room_passes_the_request_on(toys: Toys) -> None:
    async def scenario() -> None:
        limits = Limits(max_running=1, max_waiting=2)
        hosts = {name: EngineHost(toys.engine(limits), PATIENT) for name in ("a", "b")}
        pool = WorkerPool("g", renew_every_s=60)
        await attached(pool, hosts)
        asked = [request((5, 6, 7), toys.adapter_ids[0], max_tokens=40) for _ in range(4)]
        assert await asyncio.gather(*(answer(pool, each) for each in asked)) == [40] * 4
        with pytest.raises(Rejected, match="limit"):  # refused for good: no other worker is asked
            await answer(pool, request((5,), max_tokens=10**6))
        await pool.close()
        for host in hosts.values():
            host.stop()

    asyncio.run(scenario())


class SlowDoor:
    """A worker that takes a request and answers the call late."""

    def __init__(self) -> None:
        self.cancelled: list[bytes] = []
        self.is_asked = asyncio.Event()

    async def submit(self, request: EngineRequest) -> None:
        self.is_asked.set()
        await asyncio.sleep(60)

    async def cancel(self, owner: str, request_id: bytes) -> None:
        self.cancelled.append(request_id)

    async def renew(self, owner: str, num_read: int) -> EngineLoad:
        return EngineLoad(0, 0, 1, 1, 0)

    async def stream(self, owner: str) -> AsyncIterator[Bundle]:
        yield Bundle(0, (), EngineLoad(0, 0, 1, 1, 0))
        await asyncio.sleep(60)


def test_who_leaves_while_a_worker_is_asked_leaves_nothing_running_there() -> None:
    async def scenario() -> None:
        door, pool, asked = SlowDoor(), WorkerPool("g"), request((1, 2))
        pool.connect("w", door)
        while not pool.loads:
            await asyncio.sleep(0.01)
        waiting = asyncio.ensure_future(answer(pool, asked))
        await door.is_asked.wait()
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting
        assert door.cancelled == [asked.request_id]
        await pool.close()

    asyncio.run(scenario())
