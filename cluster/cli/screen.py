"""What a person sees: stages with their times, tables, one console for all commands."""

import json
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from rich.console import Console
from rich.table import Table

BARS = "▁▂▃▄▅▆▇█"
console = Console(highlight=False, soft_wrap=True)


@dataclass(slots=True)
class Story:
    """A run told stage by stage; ``figures`` are what it measured, ``seconds`` how long each stage took."""

    started: float = field(default_factory=time.monotonic)
    seconds: dict[str, float] = field(default_factory=dict)
    figures: dict[str, object] = field(default_factory=dict)

    @contextmanager
    def stage(self, name: str, title: str) -> Iterator[None]:
        console.rule(f"[bold]{title}[/]  [dim]{time.monotonic() - self.started:.0f} s[/]", align="left")
        began = time.monotonic()
        yield
        self.seconds[name] = round(time.monotonic() - began, 1)

    def note(self, **figures: object) -> None:
        self.figures.update(figures)

    def goal(self, name: str, value: float, target: str, met: bool) -> None:
        """One line for every figure that was promised."""
        self.figures[name] = value
        console.print(f"goal {name} {value:g} {target} {'met' if met else 'short'}")

    def save(self, path: Path) -> None:
        total = round(time.monotonic() - self.started, 1)
        told = {"seconds": self.seconds, "total_seconds": total, "figures": self.figures}
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(told, indent=2, default=str) + "\n")


def table(title: str, columns: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """Text left, numbers right."""
    shown = Table(title=title, title_justify="left", header_style="bold", box=None, pad_edge=False)
    for i, column in enumerate(columns):
        numeric = bool(rows) and all(isinstance(row[i], int | float) for row in rows)
        shown.add_column(column, justify="right" if numeric else "left", overflow="fold")
    for row in rows:
        shown.add_row(*(f"{cell:,}" if isinstance(cell, int) else str(cell) for cell in row))
    console.print(shown)


def tokens(amount_gwei: int) -> str:
    """Gwei as tokens, exactly: nine decimals."""
    sign = "-" if amount_gwei < 0 else ""
    whole, part = divmod(abs(amount_gwei), 10**9)
    return f"{sign}{whole:,}.{part:09d} OPEN"


def sparkline(values: Sequence[float], width: int = 60) -> str:
    """A curve in one line: means of equal parts, from the least to the greatest in eight steps."""
    width = min(width, len(values))
    parts = [values[i * len(values) // width : (i + 1) * len(values) // width] for i in range(width)]
    means = [sum(part) / len(part) for part in parts]
    least, most = min(means), max(means)
    return "".join(BARS[int(7 * (mean - least) / ((most - least) or 1))] for mean in means)
