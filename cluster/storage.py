"""Files: one small interface over a directory or S3, content hashes checked on every read that has one.

A key is a relative path of plain names (``adapters/<hex>.safetensors``); anything else is refused before it
becomes a path. A key either holds a whole object or does not exist: nobody ever sees half a write. Objects
named by their hash never change; overwriting others is allowed, and the last writer wins."""

import hashlib
import io
import mmap
import os
import re
import secrets
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO, Protocol, cast

from attribution.errors import Corrupted, Rejected, Unavailable

_KEY = re.compile(r"[A-Za-z0-9_@=-][A-Za-z0-9._@=-]*(/[A-Za-z0-9_@=-][A-Za-z0-9._@=-]*)*")
_HEX = re.compile(r"[0-9a-f]{64}")
_TEMPORARY = ".tmp"  # no key begins with a dot
CHUNK_BYTES = 1 << 20


class Storage(Protocol):
    """Two implementations: ``DirectoryStorage`` and ``S3Storage``.

    A missing key is ``Rejected("not_found")``, a store that cannot be reached ``Unavailable``."""

    def put(self, key: str, data: bytes) -> None: ...

    def put_if_absent(self, key: str, data: bytes) -> bool:
        """True for exactly one of any number of racing callers."""
        ...

    def get(self, key: str) -> bytes: ...

    def open(self, key: str) -> BinaryIO:
        """Read without holding the object in memory. The caller closes it."""
        ...

    def map(self, key: str) -> memoryview:
        """The bytes of ``fetch``, read from the file when they are touched; not checked against any hash.

        The view is private: what is written to it changes no file. It ends with its last reference."""
        ...

    def upload(self, key: str, path: Path) -> None:
        """Store a file without holding it in memory."""
        ...

    def fetch(self, key: str) -> Path:
        """A whole local file. It is shared by all who ask: read it, never write it."""
        ...

    def list(self, prefix: str) -> Iterator[str]:
        """Keys that begin with ``prefix``, sorted."""
        ...

    def delete(self, key: str) -> None:
        """Remove; absent is fine."""
        ...


def open_storage(url: str, *, s3_endpoint: str = "", cache_dir: Path | None = None) -> Storage:
    """``file:<directory>`` or ``s3://bucket/prefix``; ``cache_dir`` holds what ``fetch`` brought."""
    scheme, _, rest = url.partition(":")
    if scheme == "file" and rest:
        return DirectoryStorage(Path(rest.removeprefix("//")))
    if scheme == "s3" and rest.startswith("//"):
        bucket, _, prefix = rest[2:].partition("/")
        return S3Storage(bucket, prefix.strip("/"), s3_endpoint, cache_dir or Path("/tmp/openledger-cache"))
    raise Rejected(
        "storage_url", f"expected file:DIRECTORY or s3://BUCKET/PREFIX, given {url!r}", field="storage_url"
    )


def put_content(storage: Storage, prefix: str, data: bytes) -> str:
    """Store under ``prefix/<sha256>`` and return the hash; storing the same bytes again changes nothing."""
    name = hashlib.sha256(data).hexdigest()
    storage.put_if_absent(f"{prefix}/{name}", data)
    return name


def get_content(storage: Storage, prefix: str, sha256_hex: str) -> bytes:
    """Read back what ``put_content`` stored.

    Raises:
        Corrupted: the bytes do not have the hash they are named by.
    """
    data = storage.get(content_key(prefix, sha256_hex))
    found = hashlib.sha256(data).hexdigest()
    if found != sha256_hex:
        raise Corrupted(
            "content_hash", f"{prefix}/{sha256_hex} holds bytes with SHA-256 {found}", field="sha256"
        )
    return data


def upload_content(storage: Storage, prefix: str, path: Path) -> str:
    """As ``put_content``, for a file too big to hold."""
    name = _file_sha256(path)
    storage.upload(content_key(prefix, name), path)
    return name


def fetch_content(storage: Storage, prefix: str, sha256_hex: str) -> Path:
    """As ``get_content``, for a file too big to hold."""
    path = storage.fetch(content_key(prefix, sha256_hex))
    found = _file_sha256(path)
    if found != sha256_hex:
        raise Corrupted(
            "content_hash", f"{prefix}/{sha256_hex} holds bytes with SHA-256 {found}", field="sha256"
        )
    return path


def content_key(prefix: str, sha256_hex: str) -> str:
    if not _HEX.fullmatch(sha256_hex):
        raise Rejected(
            "bad_hash", f"expected 64 lower-case hex digits, given {sha256_hex[:80]!r}", field="sha256"
        )
    return f"{prefix}/{sha256_hex}"


class DirectoryStorage:
    """Keys are files below ``root``. A write is a temporary file, synced, then renamed or linked in."""

    def __init__(self, root: Path) -> None:
        self._root = root

    def put(self, key: str, data: bytes) -> None:
        with self._written(key, io.BytesIO(data)) as (temporary, target):
            temporary.replace(target)

    def put_if_absent(self, key: str, data: bytes) -> bool:
        if self._path(key).exists():
            return False
        with self._written(key, io.BytesIO(data)) as (temporary, target):
            try:
                os.link(temporary, target)  # fails if the name exists: the file system picks one winner
            except FileExistsError:
                return False
            return True

    def get(self, key: str) -> bytes:
        with self.open(key) as file:
            return file.read()

    def open(self, key: str) -> BinaryIO:
        try:
            return self._path(key).open("rb")
        except (FileNotFoundError, IsADirectoryError, NotADirectoryError) as error:
            raise _not_found(key) from error

    def map(self, key: str) -> memoryview:
        return _mapped(self.fetch(key))

    def upload(self, key: str, path: Path) -> None:
        with path.open("rb") as source, self._written(key, source) as (temporary, target):
            temporary.replace(target)

    def fetch(self, key: str) -> Path:
        path = self._path(key)
        if not path.is_file():
            raise _not_found(key)
        return path

    def list(self, prefix: str) -> Iterator[str]:
        start = self._root / prefix.rpartition("/")[0]
        found = (path.relative_to(self._root).as_posix() for path in start.rglob("*") if path.is_file())
        return iter(sorted(key for key in found if key.startswith(prefix) and not key.startswith(".")))

    def delete(self, key: str) -> None:
        self._path(key).unlink(missing_ok=True)

    def _path(self, key: str) -> Path:
        return self._root / _checked(key)

    @contextmanager
    def _written(self, key: str, source: BinaryIO) -> Iterator[tuple[Path, Path]]:
        """A complete temporary file and the place it belongs, whose directory is synced afterwards."""
        target = self._path(key)
        temporary = self._root / _TEMPORARY / secrets.token_hex(8)
        try:
            temporary.parent.mkdir(parents=True, exist_ok=True)
            target.parent.mkdir(parents=True, exist_ok=True)
            with temporary.open("xb") as file:
                while chunk := source.read(CHUNK_BYTES):
                    file.write(chunk)
                file.flush()
                os.fsync(file.fileno())
            temporary.chmod(0o444)
            yield temporary, target
            _sync_directory(target.parent)
        except OSError as error:
            raise Unavailable("storage_unavailable", f"{key}: {error}") from error
        finally:
            with suppress(OSError):
                temporary.unlink(missing_ok=True)


class S3Storage:
    """Keys are objects below ``prefix`` of one bucket; conditional puts use ``If-None-Match``."""

    def __init__(self, bucket: str, prefix: str, endpoint: str, cache_dir: Path) -> None:
        self._place = (bucket, prefix, endpoint, cache_dir)
        self._bucket = bucket
        self._prefix = f"{prefix}/" if prefix else ""
        self._cache = cache_dir
        self._client = _s3_client(endpoint)

    def __reduce__(self) -> tuple[object, ...]:
        """Ray ships a storage by its place; every process opens its own client."""
        return S3Storage, self._place

    def put(self, key: str, data: bytes) -> None:
        with _translated(key):
            self._client.put_object(**self._object(key), Body=data, ChecksumAlgorithm="SHA256")

    def put_if_absent(self, key: str, data: bytes) -> bool:
        with _translated(key):
            try:
                self._client.put_object(
                    **self._object(key), Body=data, ChecksumAlgorithm="SHA256", IfNoneMatch="*"
                )
            except self._client.exceptions.ClientError as error:
                if _error_code(error) not in ("PreconditionFailed", "412"):
                    raise
                return False
        return True

    def get(self, key: str) -> bytes:
        with self.open(key) as file, _translated(key):
            return file.read()

    def open(self, key: str) -> BinaryIO:
        with _translated(key):
            return cast(BinaryIO, self._client.get_object(**self._object(key))["Body"])

    def map(self, key: str) -> memoryview:
        return _mapped(self.fetch(key))

    def upload(self, key: str, path: Path) -> None:
        with _translated(key):
            self._client.upload_file(str(path), **self._object(key))

    def fetch(self, key: str) -> Path:
        """Cached by key and ETag, so an overwritten object is fetched anew."""
        with _translated(key):
            tag = self._client.head_object(**self._object(key))["ETag"]
        name = hashlib.sha256(f"{self._bucket}\n{self._prefix}{key}\n{tag}".encode()).hexdigest()
        path = self._cache / name
        if path.exists():
            return path
        self._cache.mkdir(parents=True, exist_ok=True)
        temporary = self._cache / f".{secrets.token_hex(8)}"
        try:
            with _translated(key):
                self._client.download_file(self._bucket, self._prefix + _checked(key), str(temporary))
            temporary.chmod(0o444)
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)
        return path

    def list(self, prefix: str) -> Iterator[str]:
        pages = self._client.get_paginator("list_objects_v2")
        with _translated(prefix):
            for page in pages.paginate(Bucket=self._bucket, Prefix=self._prefix + prefix):
                for entry in page.get("Contents", ()):
                    yield entry["Key"].removeprefix(self._prefix)

    def delete(self, key: str) -> None:
        with _translated(key):
            self._client.delete_object(**self._object(key))

    def _object(self, key: str) -> dict[str, str]:
        return {"Bucket": self._bucket, "Key": self._prefix + _checked(key)}


def _s3_client(endpoint: str) -> Any:
    import boto3
    from botocore.config import Config

    options = Config(
        connect_timeout=10,
        read_timeout=60,
        retries={"mode": "standard", "total_max_attempts": 4},
        s3={"addressing_style": "path"} if endpoint else {},
    )
    return boto3.client("s3", endpoint_url=endpoint or None, config=options)


@contextmanager
def _translated(key: str) -> Iterator[None]:
    from boto3.exceptions import S3UploadFailedError
    from botocore.exceptions import BotoCoreError, ClientError

    try:
        yield
    except ClientError as error:
        code = _error_code(error)
        if code in ("NoSuchKey", "404", "NotFound"):
            raise _not_found(key) from error
        if (
            error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 500) >= 500
            or code in _BUSY_CODES
        ):
            raise Unavailable("storage_unavailable", f"{key}: {error}") from error
        raise Rejected("storage_refused", f"{key}: {error}", http_status=403) from error
    except (BotoCoreError, S3UploadFailedError, OSError) as error:
        raise Unavailable("storage_unavailable", f"{key}: {error}") from error


_BUSY_CODES = ("SlowDown", "ConditionalRequestConflict", "RequestTimeout", "OperationAborted")


def _error_code(error: Any) -> str:
    return str(error.response.get("Error", {}).get("Code", ""))


def _not_found(key: str) -> Rejected:
    return Rejected("not_found", f"nothing is stored under {key}", field="key", http_status=404)


def _checked(key: str) -> str:
    if len(key) > 512 or not _KEY.fullmatch(key):
        raise Rejected("bad_key", f"not a storage key: {key[:80]!r}", field="key")
    return key


def _mapped(path: Path) -> memoryview:
    with path.open("rb") as file:
        if not os.fstat(file.fileno()).st_size:
            return memoryview(bytearray())  # which no system maps
        return memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY))


def _file_sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sync_directory(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
