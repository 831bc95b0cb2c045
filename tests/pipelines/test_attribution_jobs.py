import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from cluster.config import Settings
from cluster.database import reading
from cluster.indexes import stored_index
from cluster.tables import AdapterRow, PeriodRow
from tests.attributed import World, index, pay_for, payers, settle
from tests.pipelines.test_close_period import QUESTIONS, SPEC

ROOT = Path(__file__).parent.parent.parent
pytestmark = [pytest.mark.ray, pytest.mark.slow]


@pytest.fixture
def ray_dir() -> Iterator[str]:
    """Ray's sockets want a short path."""
    folder = tempfile.mkdtemp(prefix="ol", dir="/tmp")
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


def run(kind: str, spec: dict[str, object], settings: Settings, ray_dir: str) -> dict[str, object]:
    path = settings.home / f"{kind}.json"
    path.write_text(json.dumps(spec))
    given = {
        "OPENLEDGER_HOME": str(settings.home),
        "OPENLEDGER_BASE_MODEL": settings.base_model,
        "OPENLEDGER_PERIOD__ALLOW_SMALL": "true",
        "RAY_TMPDIR": ray_dir,
    }
    argv = [sys.executable, "-m", f"pipelines.{kind}", "--spec", str(path)]
    done = subprocess.run(
        argv, cwd=ROOT, env={**os.environ, **given}, capture_output=True, text=True, timeout=240, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    outcome: dict[str, object] = json.loads(done.stdout.splitlines()[-1])
    return outcome


def test_both_jobs_on_a_real_cluster_give_what_a_plain_loop_gives(world: World, ray_dir: str) -> None:
    """Spread over workers, the index differs from the plain loop's by rounding at most, a repeated run finds
    it made, and the period pays every fee."""
    settings, adapter = world.ground.settings, world.adapter
    spec: dict[str, object] = {"run_id": "index-1", "adapter": adapter.ref, "sketch_size": 1024}
    made = run("index", spec, settings, ray_dir)
    with reading(world.ground.engine) as session:
        assert session.get_one(AdapterRow, adapter.adapter_id.hex()).index_id == made["index_id"]
    again = run("index", {**spec, "run_id": "index-2"}, settings, ray_dir)
    assert (again["index_id"], again["reused"], made["reused"]) == (made["index_id"], True, False)
    spread, plain = (_features(world, one) for one in (str(made["index_id"]), index(world).hex()))
    torch.testing.assert_close(spread, plain, rtol=0, atol=2)

    accounts = payers(world, 2)
    for turn, (question, answer) in enumerate(QUESTIONS * 7):
        pay_for(world, accounts[turn % 2], question, answer, fee_gwei=1000)
    settle(world)
    closed = run("close_period", SPEC.model_dump(), settings, ray_dir)
    assert closed["paid_gwei"] == {adapter.adapter_id.hex(): 21_000} and closed["carried"] == {}
    with reading(world.ground.engine) as session:
        assert session.get_one(PeriodRow, 1).root == closed["root"]


def _features(world: World, index_id: str) -> torch.Tensor:
    opened = stored_index(world.ground.storage, bytes.fromhex(index_id))
    return torch.from_numpy(opened.features.astype("int32"))
