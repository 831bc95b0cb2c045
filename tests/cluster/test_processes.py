"""Daemons are found again, ended by pid, and never mistaken for somebody else's process."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from attribution.errors import Unavailable
from cluster import processes

SLEEP = [sys.executable, "-c", "import time; print('up', flush=True); time.sleep(60)"]


def test_a_daemon_is_started_once_and_stopped(tmp_path: Path) -> None:
    first = processes.start("d", SLEEP, tmp_path, is_ready=lambda: True)
    assert processes.start("d", SLEEP, tmp_path, is_ready=lambda: True) == first
    assert processes.stop("d", tmp_path)
    assert processes.find("d", tmp_path) is None
    assert not processes.stop("d", tmp_path)


def test_a_daemon_that_dies_is_reported_with_its_log(tmp_path: Path) -> None:
    dies = [sys.executable, "-c", "import sys; sys.exit('no port left')"]
    with pytest.raises(Unavailable, match="no port left"):
        processes.start("d", dies, tmp_path, is_ready=lambda: False, timeout_s=20)


def test_one_that_never_gets_ready_is_ended(tmp_path: Path) -> None:
    with pytest.raises(Unavailable, match="did not come up"):
        processes.start("d", SLEEP, tmp_path, is_ready=lambda: False, timeout_s=1)
    assert processes.find("d", tmp_path) is None


def test_a_reused_pid_is_not_ours(tmp_path: Path) -> None:
    """The recorded start time differs from that of the process which has the pid now: it is left alone."""
    stranger = subprocess.Popen(SLEEP)
    try:
        record = {"name": "d", "pid": stranger.pid, "started_ticks": 1, "log": ""}
        (tmp_path / "d.json").write_text(json.dumps(record))
        assert processes.find("d", tmp_path) is None
        assert not processes.stop("d", tmp_path)
        time.sleep(0.2)
        assert stranger.poll() is None
    finally:
        stranger.kill()
        stranger.wait()


def test_a_daemon_outlives_the_command_that_started_it(tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from cluster import processes;"
        f"processes.start('d', {SLEEP!r}, Path({str(tmp_path)!r}), is_ready=lambda: True)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parent.parent.parent)
    daemon = processes.find("d", tmp_path)
    assert daemon is not None and daemon.pid != os.getpid()
    assert processes.stop("d", tmp_path)
