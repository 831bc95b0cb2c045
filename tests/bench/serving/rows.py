"""Rows of one file of results: measured once, kept at once, found again by the next start."""

import json
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

T = TypeVar("T")
Row = dict[str, Any]  # as it stands in the JSON


@dataclass(frozen=True, slots=True)
class Plan:
    """How often a row is measured: ``repeat`` times, unless that takes longer than ``limit_s``."""

    repeat: int
    limit_s: float


class Rows:
    """Each row is written when it is there, so that an interrupted run goes on where it stopped."""

    def __init__(self, path: Path, is_fresh: bool) -> None:
        self._path = path
        self._started = time.monotonic()
        self.found: dict[str, Row] = {}
        if not is_fresh:
            self.read()

    def read(self) -> None:
        """What another process has added, too."""
        if self._path.exists():
            self.found = json.loads(self._path.read_text())["rows"]

    def missing(self, names: list[str]) -> list[str]:
        return [name for name in names if name not in self.found]

    def measure(self, name: str, work: Callable[[], Row]) -> None:
        """Add a row, unless it is there."""
        if name in self.found:
            self._say(name, "kept")
            return
        load, started = os.getloadavg()[0], time.monotonic()
        row = work()
        self.found[name] = row | {
            "load_before": round(load, 1),
            "took_s": round(time.monotonic() - started, 1),
            "at": time.strftime("%Y-%m-%d %H:%M", time.gmtime()),
        }
        self.save({})
        self._say(name, _in_words(row))

    def save(self, rest: Row) -> None:
        """``rest`` stands before the rows."""
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self._path.write_text(json.dumps({**rest, "rows": self.found}, indent=1) + "\n")

    def _say(self, name: str, words: str) -> None:
        print(f"[{time.monotonic() - self._started:6.0f} s] {name:24} {words}", flush=True)


def repeated(once: Callable[[int], T], plan: Plan) -> list[T]:
    """One result of each turn: as many as planned, fewer where they would pass the limit; one at least."""
    started, found = time.monotonic(), [once(0)]
    while len(found) < plan.repeat:
        if (time.monotonic() - started) * (1 + 1 / len(found)) > plan.limit_s:
            break
        found.append(once(len(found)))
    return found


def _in_words(row: Row) -> str:
    if "error" in row:
        return f"does not run here: {row['error']}"
    shown = {name: value for name, value in row.items() if isinstance(value, int | float)}
    return " ".join(f"{name}={value}" for name, value in shown.items())
