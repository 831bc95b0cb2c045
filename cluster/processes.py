"""The laptop's own daemons: started detached, found again by another command, ended by pid and by nothing
else.

A process is ours if a pid and the start time that the kernel gave it stand in ``<run_dir>/<name>.json``: a
pid that was reused by somebody else has another start time.
"""

import json
import os
import signal
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from attribution.errors import Unavailable


@dataclass(frozen=True, slots=True)
class Daemon:
    """``started_ticks`` is field 22 of ``/proc/<pid>/stat``: clock ticks after boot."""

    name: str
    pid: int
    started_ticks: int
    log: str


def start(
    name: str,
    argv: Sequence[str],
    run_dir: Path,
    *,
    is_ready: Callable[[], bool],
    env: Mapping[str, str] | None = None,
    timeout_s: float = 60.0,
) -> Daemon:
    """Start unless it runs already, then wait until ``is_ready``. Output goes to ``<run_dir>/<name>.log``.

    Raises ``Unavailable`` with the end of the log if the process dies or is not ready in time; it is then
    ended.
    """
    running = find(name, run_dir)
    if running is None:
        run_dir.mkdir(parents=True, exist_ok=True)
        log = run_dir / f"{name}.log"
        with log.open("ab") as out:
            child = subprocess.Popen(
                argv,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=out,
                start_new_session=True,
                env=None if env is None else {**os.environ, **env},
            )
        running = Daemon(name, child.pid, _started_ticks(child.pid) or 0, str(log))
        (run_dir / f"{name}.json").write_text(json.dumps(asdict(running)))
    deadline = time.monotonic() + timeout_s
    while not is_ready():
        if find(name, run_dir) is None or time.monotonic() > deadline:
            stop(name, run_dir)
            tail = Path(running.log).read_text(errors="replace")[-600:]
            raise Unavailable(
                "daemon_not_ready", f"{name} did not come up in {timeout_s:.0f} s; its log ends: {tail}"
            )
        time.sleep(0.1)
    return running


def find(name: str, run_dir: Path) -> Daemon | None:
    """The daemon if it is still the very process that we started."""
    try:
        daemon = Daemon(**json.loads((run_dir / f"{name}.json").read_text()))
    except FileNotFoundError:
        return None
    return daemon if _started_ticks(daemon.pid) == daemon.started_ticks else None


def stop(name: str, run_dir: Path, *, grace_s: float = 10.0) -> bool:
    """Ask the daemon's process group to end, and insist after ``grace_s``. False if it was not running."""
    daemon = find(name, run_dir)
    (run_dir / f"{name}.json").unlink(missing_ok=True)
    if daemon is None:
        return False
    for how in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(daemon.pid, how)
        except ProcessLookupError:
            return True
        deadline = time.monotonic() + grace_s
        while _started_ticks(daemon.pid) == daemon.started_ticks:
            if time.monotonic() > deadline:
                break
            time.sleep(0.05)
        else:
            return True
    return True


def _started_ticks(pid: int) -> int | None:
    """None for a process that is gone, or dead and only not yet collected by its parent."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return None
    state, *fields = stat.rpartition(")")[2].split()
    return None if state == "Z" else int(fields[18])
