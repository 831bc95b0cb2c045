"""Workers that come with load and go without it: real Ray, real Serve, and no stream that breaks."""

import re
import threading
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import httpx
import pytest

from serve_apps import app
from tests.cluster.money import assert_money_adds_up
from tests.serve_apps.deployment import Deployed, deployed_at, wait_until

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(900)]
ASK = [{"role": "user", "content": "Which one?"}]
SLOW = 768  # a toy so wide that an answer takes seconds


@pytest.fixture(scope="module")
def deployed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Deployed]:
    fleet = {"max_replicas": 2, "max_running": 4, "upscale_delay_s": 0, "downscale_delay_s": 2}
    with deployed_at(tmp_path_factory.mktemp("home"), width=SLOW, **fleet) as opened:
        yield opened


def stream(deployed: Deployed, model: str) -> int:
    """Read one long answer to its end; the tokens it took, told in its last chunk."""
    answer = deployed.client().chat.completions.create(
        model=model,
        messages=ASK,  # type: ignore[arg-type]
        max_tokens=500,
        stream=True,
        stream_options={"include_usage": True},
        extra_body={"ignore_eos": True},
    )
    *_, last = answer
    assert last.usage is not None
    return last.usage.completion_tokens


class Clients:
    """So many readers at once, each asking anew when its answer ended, until told to stop."""

    def __init__(self, deployed: Deployed, count: int) -> None:
        self._is_over = threading.Event()
        self._threads = ThreadPoolExecutor(count)
        self._readers = [self._threads.submit(self._read, deployed, i) for i in range(count)]

    def _read(self, deployed: Deployed, number: int) -> list[int]:
        tokens = []
        while not self._is_over.is_set():
            tokens.append(stream(deployed, "base" if number % 2 else "toy/a1"))
        return tokens

    def stop(self) -> list[int]:
        """Tokens of every answer; raises what any reader met."""
        self._is_over.set()
        return [count for reader in self._readers for count in reader.result(timeout=120)]


def gauges(deployed: Deployed, name: str) -> dict[str, int]:
    """One value per worker that the gateway knows."""
    text = httpx.get(f"{deployed.url}/metrics", timeout=30).text
    return {worker: int(value) for worker, value in re.findall(rf'{name}{{worker="(\w+)"}} (\d+)', text)}


def test_words_come_through_the_door_one_by_one(deployed: Deployed) -> None:
    """The first is read long before the answer is over: while its reservation stands."""
    answer = deployed.client().chat.completions.create(
        model="base",
        messages=ASK,
        max_tokens=500,
        stream=True,
        extra_body={"ignore_eos": True},  # type: ignore[arg-type]
    )
    next(answer)
    assert deployed.states()[-1] == "reserved"
    assert len(list(answer)) > 100
    assert deployed.states()[-1] == "captured"


def test_load_brings_a_worker_and_its_end_takes_one_and_no_stream_breaks(deployed: Deployed) -> None:
    """Eight readers at four slots ask for more; two are left to read on both workers while one is drained."""
    assert len(gauges(deployed, "openledger_engine_running")) == 1
    few, many = Clients(deployed, 2), Clients(deployed, 6)
    wait_until(lambda: len(gauges(deployed, "openledger_engine_running")) == 2)
    wait_until(lambda: all(gauges(deployed, "openledger_engine_running").values()))
    assert set(many.stop()) == {500}

    def is_draining_with_answers() -> bool:
        running, draining = (
            gauges(deployed, f"openledger_engine_{name}") for name in ("running", "draining")
        )
        return any(running[worker] for worker in draining if draining[worker])

    wait_until(is_draining_with_answers)
    wait_until(lambda: len(gauges(deployed, "openledger_engine_running")) == 1)
    assert set(few.stop()) == {500}
    assert set(deployed.states()) == {"captured"}
    assert_money_adds_up(deployed.database)


def test_a_redeployment_lets_every_running_answer_end(deployed: Deployed) -> None:
    """Gateway and worker are replaced under two streams; who asks meanwhile may have to ask again."""
    (before,) = gauges(deployed, "openledger_engine_running")
    with ThreadPoolExecutor(2) as threads:
        answers: list[Future[int]] = [threads.submit(stream, deployed, model) for model in ("base", "toy/a1")]
        wait_until(lambda: sum(gauges(deployed, "openledger_engine_running").values()) == 2)
        app.deploy(deployed.settings)
        assert [answer.result(timeout=120) for answer in answers] == [500, 500]
    wait_until(lambda: before not in gauges(deployed, "openledger_engine_running"))
    assert stream(deployed, "toy/a1") == 500
    assert_money_adds_up(deployed.database)
