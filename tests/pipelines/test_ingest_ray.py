"""Delete Ray and a loop replaces it: the same verdicts, whatever the number of workers."""

import tempfile
from collections.abc import Iterator

import pytest
import ray

from attribution.errors import Unavailable
from attribution.hashing import sha256
from attribution.types import Shard
from cluster.storage import DirectoryStorage, Storage, put_content
from pipelines.ingest import on_ray, one_by_one
from pipelines.sources import python_lint

pytestmark = pytest.mark.ray
RULES = python_lint.DATANET.rules


class AwayStorage(DirectoryStorage):
    """A store on the other side of a cut cable."""

    def get(self, key: str) -> bytes:
        raise Unavailable("storage_unavailable", "no route to host")


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    """Two workers of our own."""
    with tempfile.TemporaryDirectory(prefix="ol", dir="/tmp", ignore_cleanup_errors=True) as folder:
        ray.init(
            address="local",
            num_cpus=2,
            include_dashboard=False,
            object_store_memory=100_000_000,
            _temp_dir=folder,
        )
        yield
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


def test_ray_gives_what_a_loop_gives(cluster: None, shards: list[Shard], storage: Storage) -> None:
    expected = list(one_by_one(shards, storage, RULES))
    assert {one.kind for one in expected} == {"accepted", "rejected", "quarantined"}
    found = list(on_ray(shards, storage, RULES))
    assert sorted(found, key=repr) == sorted(expected, key=repr)


def test_no_shards_give_no_verdicts(cluster: None, storage: Storage) -> None:
    assert list(on_ray([], storage, RULES)) == []


def test_a_store_that_is_away_reaches_the_caller_as_such(cluster: None, shards: list[Shard]) -> None:
    with pytest.raises(Unavailable, match="no route"):
        list(on_ray(shards[:2], AwayStorage("/nowhere"), RULES))
