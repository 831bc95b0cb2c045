import os
import shutil
import signal
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import ray

from attribution.types import Receipt
from cluster.database import reading
from cluster.receipts import receipt_of
from serve_apps.evidence import start_pool
from tests import attributed
from tests.attributed import World, index, pay_for, payers

pytestmark = [pytest.mark.ray, pytest.mark.slow]
TIMEOUT_S = 120


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    base = attributed.toy_base(tmp_path / "tiny")
    world = attributed.build(tmp_path / "home", base)
    yield world
    world.ground.engine.dispose()


@pytest.fixture
def cluster() -> Iterator[None]:
    """A Ray of our own; its sockets want a short path."""
    folder = tempfile.mkdtemp(prefix="ol", dir="/tmp")
    ray.init(address="local", num_cpus=1, include_dashboard=False, log_to_driver=False, _temp_dir=folder)
    yield
    ray.shutdown()
    shutil.rmtree(folder, ignore_errors=True)


def wait_for(is_so: Callable[[], bool]) -> None:
    deadline = time.monotonic() + TIMEOUT_S
    while not is_so():
        assert time.monotonic() < deadline, "nobody explains the receipts"
        time.sleep(0.2)


def is_ready(world: World, receipt: Receipt) -> bool:
    with reading(world.ground.engine) as session:
        return receipt_of(session, receipt.receipt_id).evidence_state == "ready"


def test_a_killed_worker_comes_back_and_explains_what_waits(world: World, cluster: None) -> None:
    index(world)
    (account,) = payers(world, 1)
    (worker,) = start_pool(world.ground.settings)
    first = pay_for(world, account, "One?", "iron")
    wait_for(lambda: is_ready(world, first))
    pid = int(ray.get(worker.status.remote())["pid"])
    os.kill(pid, signal.SIGKILL)
    second = pay_for(world, account, "Two?", "gold")
    wait_for(lambda: is_ready(world, second))
    (same,) = start_pool(world.ground.settings)
    assert int(ray.get(same.status.remote())["pid"]) != pid
