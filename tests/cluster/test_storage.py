"""Storage: the same promises over a directory and over S3, spoken to a server on loopback."""

import hashlib
import io
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from attribution.errors import Corrupted, Rejected, Unavailable
from cluster.storage import (
    Storage,
    fetch_content,
    get_content,
    open_storage,
    put_content,
    upload_content,
)


@pytest.fixture(scope="module")
def s3_endpoint() -> Iterator[str]:
    moto = pytest.importorskip("moto.server")
    server = moto.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()


@pytest.fixture(params=["directory", "s3"])
def store(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Storage:
    if request.param == "directory":
        return open_storage(f"file:{tmp_path}/store")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "test")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "test")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    endpoint = request.getfixturevalue("s3_endpoint")
    bucket = f"b{hashlib.sha256(request.node.nodeid.encode()).hexdigest()[:20]}"
    import boto3

    boto3.client("s3", endpoint_url=endpoint).create_bucket(Bucket=bucket)
    return open_storage(f"s3://{bucket}/some/prefix", s3_endpoint=endpoint, cache_dir=tmp_path / "cache")


def test_get_returns_what_put_stored(store: Storage) -> None:
    store.put("a/b.bin", b"one")
    assert store.get("a/b.bin") == b"one"
    store.put("a/b.bin", b"two")
    assert store.get("a/b.bin") == b"two"
    assert store.fetch("a/b.bin").read_bytes() == b"two"
    store.delete("a/b.bin")
    store.delete("a/b.bin")
    with pytest.raises(Rejected, match=r"a/b\.bin"):
        store.get("a/b.bin")


def test_a_map_is_the_file_and_writing_to_it_changes_nothing(store: Storage) -> None:
    store.put("a/b.bin", b"one")
    store.put("a/empty", b"")
    found = store.map("a/b.bin")
    assert found == b"one" and store.map("a/empty") == b""
    found[:1] = b"O"
    store.put("a/b.bin", b"another")
    assert found == b"One" and store.map("a/b.bin") == b"another"
    for key, code in (("a/c", "not_found"), ("../a", "bad_key")):
        with pytest.raises(Rejected) as refused:
            store.map(key)
        assert refused.value.code == code


def test_one_of_many_racing_writers_wins(store: Storage) -> None:
    with ThreadPoolExecutor(8) as pool:
        won = list(pool.map(lambda n: store.put_if_absent("race", str(n).encode()), range(24)))
    assert sum(won) == 1
    assert store.get("race") == str(won.index(True)).encode()


def test_a_big_file_passes_through_unchanged(store: Storage, tmp_path: Path) -> None:
    """17 MiB: more than one part of a multipart upload."""
    data = bytes(range(256)) * (17 << 12)
    (tmp_path / "big").write_bytes(data)
    store.upload("big/file", tmp_path / "big")
    assert store.fetch("big/file").read_bytes() == data
    with store.open("big/file") as file:
        assert file.read(1000) == data[:1000]
        assert file.read() == data[1000:]


def test_list_is_sorted_and_bounded_by_its_prefix(store: Storage) -> None:
    for key in ("runs/2/b", "runs/1/a", "runs/10/c", "other/x"):
        store.put(key, b"")
    assert list(store.list("runs/1")) == ["runs/1/a", "runs/10/c"]
    assert list(store.list("runs/1/")) == ["runs/1/a"]
    assert len(list(store.list(""))) == 4
    assert list(store.list("nothing/")) == []


def test_content_is_named_by_its_hash_and_checked(store: Storage, tmp_path: Path) -> None:
    name = put_content(store, "shards", b"rows")
    assert put_content(store, "shards", b"rows") == name == hashlib.sha256(b"rows").hexdigest()
    assert get_content(store, "shards", name) == b"rows"
    assert fetch_content(store, "shards", name).read_bytes() == b"rows"
    (tmp_path / "file").write_bytes(b"rows")
    assert upload_content(store, "shards", tmp_path / "file") == name


def test_changed_content_is_noticed(store: Storage) -> None:
    name = put_content(store, "shards", b"rows")
    store.put(f"shards/{name}", b"r0ws")
    with pytest.raises(Corrupted, match=hashlib.sha256(b"r0ws").hexdigest()):
        get_content(store, "shards", name)
    with pytest.raises(Corrupted):
        fetch_content(store, "shards", name)


@pytest.mark.parametrize(
    "key", ["", "/etc/passwd", "../x", "a/../../x", "a//b", ".tmp/x", "a/.b", "a b", "a\n", "x" * 600]
)
def test_a_key_is_checked_before_it_is_a_path(store: Storage, key: str) -> None:
    for act in (store.get, store.open, store.fetch, store.delete):
        with pytest.raises(Rejected) as refusal:
            act(key)
        assert refusal.value.code == "bad_key"
    with pytest.raises(Rejected):
        store.put(key, b"")


def test_a_missing_key_is_not_found(store: Storage) -> None:
    for act in (store.get, store.open, store.fetch):
        with pytest.raises(Rejected) as refusal:
            act("no/such")
        assert (refusal.value.code, refusal.value.http_status) == ("not_found", 404)


def test_a_bad_hash_never_becomes_a_key(store: Storage) -> None:
    with pytest.raises(Rejected) as refusal:
        get_content(store, "shards", "../../secret")
    assert refusal.value.code == "bad_hash"


def test_a_reader_of_an_overwritten_file_sees_one_version(store: Storage) -> None:
    """Writers replace whole objects, so no reader ever gets a mixture."""
    versions = {bytes([n]) * 200_000 for n in range(6)}
    store.put("k", min(versions))
    writer = threading.Thread(target=lambda: [store.put("k", data) for data in sorted(versions)])
    writer.start()
    seen = {store.get("k") for _ in range(20)}
    writer.join()
    assert seen <= versions


def test_a_write_that_breaks_off_leaves_nothing(tmp_path: Path) -> None:
    store = open_storage(f"file:{tmp_path}/store")
    missing = tmp_path / "missing"
    with pytest.raises(FileNotFoundError):
        store.upload("k", missing)
    assert list(store.list("")) == []
    assert not list((tmp_path / "store").rglob("*"))


def test_a_store_that_is_away_is_unavailable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "test")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "test")
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    store = open_storage("s3://bucket", s3_endpoint="http://127.0.0.1:9", cache_dir=tmp_path)
    with pytest.raises(Unavailable):
        store.get("k")
    (tmp_path / "file").write_text("not a directory")
    with pytest.raises(Unavailable):
        open_storage(f"file:{tmp_path}/file").put("k", b"")


@pytest.mark.parametrize("url", ["", "file:", "s3:bucket", "ftp://x/y"])
def test_an_unknown_place_is_refused(url: str) -> None:
    with pytest.raises(Rejected) as refusal:
        open_storage(url)
    assert refusal.value.code == "storage_url"


def test_a_store_travels_to_another_process(store: Storage) -> None:
    import pickle

    store.put("k", b"v")
    assert pickle.loads(pickle.dumps(store)).get("k") == b"v"
    assert io.BytesIO(store.get("k")).read() == b"v"
