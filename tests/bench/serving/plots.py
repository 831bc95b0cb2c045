"""The rows as two small pictures."""

from collections.abc import Mapping
from pathlib import Path

import matplotlib
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from tests.bench.serving.rows import Row
from tests.bench.serving.workloads import SWEEP

Found = Mapping[str, Row]
COLOURS = {"transformers": "#c4c4c4", "peft": "#8da0b6", "vllm": "#e0a458", "ours": "#2a6f97"}
WORK_TITLES = {"w1": "W1: 16 adapters", "w2": "W2: base model", "w4": "W4: 16 adapters, shared prefix"}


def plot(found: Found, folder: Path) -> None:
    """``workloads.svg``: every engine in W1, W2 and W4; ``adapters.svg``: our speed by active adapters."""
    matplotlib.rcParams.update({"axes.spines.top": False, "axes.spines.right": False, "font.size": 9})
    _plot_workloads(found, Figure(figsize=(7, 3.2), layout="constrained"), folder / "workloads.svg")
    _plot_adapters(found, Figure(figsize=(7, 3.2), layout="constrained"), folder / "adapters.svg")


def _plot_workloads(found: Found, figure: Figure, path: Path) -> None:
    axes = figure.subplots()
    for place, work in enumerate(WORK_TITLES):
        shown = [engine for engine in COLOURS if f"{engine}/{work}" in found]
        for number, engine in enumerate(shown):
            row, at = found[f"{engine}/{work}"], place + 0.22 * (number - (len(shown) - 1) / 2)
            speeds = [run["tokens_per_s"] for run in row["runs"]]
            axes.bar(at, row["tokens_per_s"], width=0.2, color=COLOURS[engine])
            axes.plot([at, at], [min(speeds), max(speeds)], color="#333333", linewidth=1)
            axes.annotate(
                f"{row['tokens_per_s']:.0f}", (at, max(speeds)), ha="center", va="bottom", fontsize=8
            )
        best = found["machine"].get(f"{work}_ceiling")
        if best is not None:
            axes.hlines(best, place - 0.45, place + 0.45, color="#b23a48", linestyle="--", linewidth=1)
    axes.set_xticks(range(len(WORK_TITLES)), list(WORK_TITLES.values()))
    axes.set_ylabel("new tokens per second")
    labels = [Patch(color=colour, label=engine) for engine, colour in COLOURS.items()]
    labels.append(
        Line2D([], [], color="#b23a48", linestyle="--", linewidth=1, label="ceiling of the machine")
    )
    axes.legend(
        handles=labels,
        frameon=False,
        fontsize=8,
        ncols=len(labels),
        loc="lower center",
        bbox_to_anchor=(0.5, 1),
    )
    figure.savefig(path)


def _plot_adapters(found: Found, figure: Figure, path: Path) -> None:
    rows = [(work.num_adapters, found[f"ours/{work.name}"]) for work in SWEEP if f"ours/{work.name}" in found]
    if not rows or "ours/w1" not in found:
        return
    axes, w1 = figure.subplots(), found["ours/w1"]["tokens_per_s"]
    active = [num for num, _ in rows]
    axes.plot(active, [row["tokens_per_s"] / w1 for _, row in rows], "o-", color=COLOURS["ours"])
    axes.axhline(1, color="#b8b8b8", linewidth=1, zorder=0)
    axes.set_xscale("log", base=2)
    axes.set_xticks(active, [str(num) for num in active])
    axes.set_ylim(0, 1.1)
    axes.set_xlabel("active adapters, of 10,000 registered")
    axes.set_ylabel("speed, W1 = 1")
    figure.savefig(path)
