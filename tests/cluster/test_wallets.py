"""A name has one key, kept private."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from attribution.errors import Rejected
from cluster.wallets import wallet


def test_a_name_keeps_its_key(tmp_path: Path) -> None:
    first = wallet(tmp_path, "platform")
    assert wallet(tmp_path, "platform") == first
    assert wallet(tmp_path, "host").address != first.address
    assert first.key.hex() not in repr(first)


def test_racing_callers_get_one_key(tmp_path: Path) -> None:
    with ThreadPoolExecutor(8) as pool:
        keys = {found.key for found in pool.map(lambda _: wallet(tmp_path, "w"), range(32))}
    assert len(keys) == 1


def test_a_key_that_others_may_read_is_refused(tmp_path: Path) -> None:
    wallet(tmp_path, "w")
    (tmp_path / "w.key").chmod(0o644)
    with pytest.raises(Rejected, match="chmod 600"):
        wallet(tmp_path, "w")


@pytest.mark.parametrize("name", ["../w", "", "W", "a/b", "a" * 64])
def test_a_name_never_becomes_another_path(tmp_path: Path, name: str) -> None:
    with pytest.raises(Rejected, match="does not match"):
        wallet(tmp_path, name)


def test_a_file_without_a_key_is_refused(tmp_path: Path) -> None:
    wallet(tmp_path, "w")
    (tmp_path / "w.key").write_text("not a key")
    with pytest.raises(Rejected, match="no private key"):
        wallet(tmp_path, "w")
