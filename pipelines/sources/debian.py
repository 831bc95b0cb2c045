"""Files out of Debian packages: fetched by apt, which checks signatures, and unpacked without installing.

Apt's lists are kept in our own folder, so neither root nor the machine's package state is touched."""

import shutil
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from attribution.errors import Corrupted, Unavailable
from attribution.hashing import sha256


@dataclass(frozen=True, slots=True)
class Package:
    name: str
    version: str
    root: Path  # of the unpacked tree


def fetch_package(name: str, cache: Path, pinned: Mapping[str, str]) -> Package:
    """Fetch once, unpack once; later calls only look.

    Args:
        pinned: SHA-256 of the package file by version. A version that is not listed is taken on apt's word.
    """
    found = _cached(name, cache)
    if found is None:
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache) as work:
            archive = _download(name, Path(work), cache / "apt")
            version = archive.name.split("_")[1].replace("%3a", ":")
            digest = sha256(archive.read_bytes()).hex()
            if pinned.get(version, digest) != digest:
                raise Corrupted("package_hash", f"{name} {version}: {digest}, pinned {pinned[version]}")
            unpacked = Path(work) / "tree"
            _run(["dpkg", "-x", str(archive), str(unpacked)])
            unpacked.replace(cache / f"{name}_{version.replace(':', '%3a')}")
        found = _cached(name, cache)
        assert found is not None
    return found


def _cached(name: str, cache: Path) -> Package | None:
    trees = sorted(cache.glob(f"{name}_*"))
    return Package(name, trees[0].name.split("_")[1].replace("%3a", ":"), trees[0]) if trees else None


def _download(name: str, work: Path, state: Path) -> Path:
    """With the machine's lists if it has them, else with lists of our own."""
    sandbox = ["-o", "APT::Sandbox::User=root"]  # else apt warns that its own user cannot write here
    own = [*sandbox, "-o", f"Dir::State::lists={state}/lists", "-o", f"Dir::Cache={state}/cache"]
    try:
        _run(["apt-get", *sandbox, "download", name], cwd=work)
    except Unavailable:
        for folder in ("lists/partial", "cache/archives/partial"):
            (state / folder).mkdir(parents=True, exist_ok=True)
        _run(["apt-get", *own, "update"])
        _run(["apt-get", *own, "download", name], cwd=work)
        shutil.rmtree(state)
    archives = list(work.glob(f"{name}_*.deb"))
    if not archives:
        raise Unavailable("package_missing", f"apt-get download {name} left no file", retry_after_s=60)
    return archives[0]


def _run(command: Sequence[str], cwd: Path | None = None) -> None:
    try:
        subprocess.run(command, cwd=cwd, check=True, capture_output=True, timeout=300)
    except FileNotFoundError as error:
        raise Unavailable(
            "apt_missing", f"{command[0]} is not on this machine", retry_after_s=3600
        ) from error
    except subprocess.SubprocessError as error:
        said = (getattr(error, "stderr", None) or b"").decode("utf-8", "replace").strip()
        raise Unavailable(
            "package_missing", f"{' '.join(command)}: {said[-300:]}", retry_after_s=60
        ) from error
