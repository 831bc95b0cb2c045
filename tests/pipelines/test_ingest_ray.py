"""Delete Ray and a loop replaces it: the same verdicts, whatever the number of workers."""

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import ray

from attribution.errors import Unavailable
from attribution.hashing import sha256
from attribution.types import Shard
from cluster.config import Settings, child_environment
from cluster.contributions import Reveal, claim_of, commit, register_contributor, reveal
from cluster.database import connect, migrate, writing
from cluster.datanets import open_datanet
from cluster.signatures import datanets_domain, digest, sign
from cluster.storage import DirectoryStorage, Storage, open_storage, put_content
from pipelines.ingest import on_ray, one_by_one
from pipelines.sources import python_lint

pytestmark = pytest.mark.ray
RULES = python_lint.DATANET.rules


class AwayStorage(DirectoryStorage):
    """A store on the other side of a cut cable."""

    def get(self, key: str) -> bytes:
        raise Unavailable("storage_unavailable", "no route to host")


@pytest.fixture(scope="module")
def cluster() -> Iterator[str]:
    """Two workers of our own; the address at which a job finds them."""
    with tempfile.TemporaryDirectory(prefix="ol", dir="/tmp", ignore_cleanup_errors=True) as folder:
        ray.init(
            address="local",
            num_cpus=2,
            include_dashboard=False,
            object_store_memory=100_000_000,
            _temp_dir=folder,
        )
        yield ray.get_runtime_context().gcs_address
        ray.shutdown()


@pytest.fixture
def shards(storage: Storage) -> list[Shard]:
    """Every shard of python-lint with a bad line in it; the third is truncated, the fourth is gone."""
    found = []
    for seq, draft in enumerate(python_lint.drafts(), start=1):
        data = draft.data + b"{bad\n"
        name = put_content(storage, "shards", data)
        rows = data.count(b"\n")
        found.append(Shard(draft.datanet, draft.contributor_id, bytes(32), sha256(data), rows, seq))
        if seq == 3:
            storage.put(f"shards/{name}", data[:50])
        if seq == 4:
            storage.delete(f"shards/{name}")
    return found


def test_ray_gives_what_a_loop_gives(cluster: str, shards: list[Shard], storage: Storage) -> None:
    expected = list(one_by_one(shards, storage, RULES))
    assert {one.kind for one in expected} == {"accepted", "rejected", "quarantined"}
    found = list(on_ray(shards, storage, RULES))
    assert sorted(found, key=repr) == sorted(expected, key=repr)


def test_no_shards_give_no_verdicts(cluster: str, storage: Storage) -> None:
    assert list(on_ray([], storage, RULES)) == []


def test_a_store_that_is_away_reaches_the_caller_as_such(cluster: str, shards: list[Shard]) -> None:
    with pytest.raises(Unavailable, match="no route"):
        list(on_ray(shards[:2], AwayStorage("/nowhere"), RULES))


def test_the_job_seals_what_the_demo_manifest_promises(
    cluster: str, settings: Settings, tmp_path: Path
) -> None:
    """``python -m pipelines.ingest`` over all 59 shards, committed and signed, on the cluster of a job."""
    migrate(settings.database_url)
    engine, storage = connect(settings.database_url), open_storage(settings.storage_url)
    domain, now = datanets_domain(31337), int(time.time())
    with writing(engine) as session:
        open_datanet(session, python_lint.DATANET, bytes(32))
    for draft in python_lint.drafts():
        claim = claim_of(draft.data, draft.datanet, draft.contributor_id, bytes(32))
        with writing(engine) as session:
            register_contributor(session, draft.wallet, draft.contributor)
            commit(session, draft.datanet, draft.contributor_id, claim.commitment, now)
        sent = Reveal(claim, bytes(32), sign(draft.demo_key, digest(claim, domain)))
        reveal(engine, storage, sent, draft.data, domain, now)
    spec = {"run_id": "ingest-1", "datanet": "python-lint", "seal": {"max_groups": 120}}
    (tmp_path / "spec.json").write_text(json.dumps(spec))
    done = subprocess.run(
        [sys.executable, "-m", "pipelines.ingest", "--spec", str(tmp_path / "spec.json")],
        env={**os.environ, **child_environment(settings), "RAY_ADDRESS": cluster},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr
    outcome = json.loads(done.stdout.splitlines()[-1])
    assert outcome["manifest_id"] == python_lint.demo_manifest().manifest_id.hex()
    assert (outcome["rows_read"], outcome["groups_trained_on"]) == (960, 120)
