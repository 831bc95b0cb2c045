from collections.abc import Iterator
from pathlib import Path

import pytest

from tests import attributed
from tests.attributed import World


@pytest.fixture(scope="session")
def toy_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return attributed.toy_base(tmp_path_factory.mktemp("base") / "tiny")


@pytest.fixture
def world(tmp_path: Path, toy_base: Path) -> Iterator[World]:
    world = attributed.build(tmp_path / "home", toy_base)
    yield world
    world.ground.engine.dispose()
