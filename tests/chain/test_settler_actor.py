"""The settler where it lives: a detached Ray actor that is killed and comes back."""

import os
import shutil
import signal
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import ray
from sqlalchemy import select

from chain.settler_actor import ensure_running, status
from cluster.config import ChainSettings, Settings
from cluster.database import reading
from cluster.tables import BatchRow
from tests.chain.settling import Site, paid_site
from tests.chain.stage import set_stage

pytestmark = [pytest.mark.ray, pytest.mark.evm]

PATIENCE_S = 120


@pytest.fixture
def cluster() -> Iterator[None]:
    """A Ray of its own. The socket paths below it may have 107 bytes, hence the short name."""
    folder = tempfile.mkdtemp(prefix="ol", dir="/tmp")
    ray.init("local", num_cpus=1, include_dashboard=False, _temp_dir=folder, log_to_driver=False)
    yield
    ray.shutdown()
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture
def paid(rpc_url: str, tmp_path: Path) -> Iterator[Site]:
    with paid_site(set_stage(rpc_url), tmp_path) as here:
        here.stage.deployment.save(tmp_path / "addresses.json")
        yield here


def settings_of(here: Site, max_age_s: int) -> Settings:
    chain = ChainSettings(
        rpc_url=here.stage.rpc_url,
        addresses_path=str(here.folder / "addresses.json"),
        signer_socket=str(here.socket),
        final_tag="latest",
        da_url=here.da_url,
        poll_s=0.1,
        batch_max_age_s=max_age_s,
        lease_s=1,
    )
    storage = f"file:{here.folder}/storage"
    return Settings(home=here.folder, database_url=here.database_url, storage_url=storage, chain=chain)


def wait(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < deadline, status()
        time.sleep(0.1)


def leads() -> bool:
    return any("leads with term" in line for line in status().lines)


def test_a_killed_settler_comes_back_and_goes_on(cluster: None, paid: Site) -> None:
    """Found again under its name; kill -9 gives a new process and a new term; other settings replace it; then
    the receipts are settled."""
    waiting = settings_of(paid, max_age_s=2**40)
    first = ensure_running(waiting)
    assert ensure_running(waiting).pid == first.pid
    wait(leads)
    os.kill(first.pid, signal.SIGKILL)
    wait(lambda: status().pid != first.pid and leads())
    again = status()
    replaced = ensure_running(settings_of(paid, max_age_s=0))
    assert replaced.pid != again.pid and replaced.fingerprint != again.fingerprint
    rows = paid.open().rows

    def is_final() -> bool:
        with reading(rows) as session:
            return session.scalars(select(BatchRow.state)).all() == ["final"]

    wait(is_final)


def test_a_settler_that_finds_disagreeing_books_stops_and_says_so(cluster: None, paid: Site) -> None:
    world = paid.open()
    settings = settings_of(paid, max_age_s=0)
    paid.settler().tick()
    with reading(world.rows) as session:
        payload_hash = session.scalars(select(BatchRow.payload_hash)).one()
    world.storage.put(f"blobs/{payload_hash}", b"something else")
    ensure_running(settings)
    wait(lambda: "archive_hash" in status().stopped)
