"""The rows of the peers: vLLM's CPU build, PEFT's mixed batch, transformers."""

import asyncio
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

import psutil

from cluster.models import BaseModel, linear_shapes
from tests.bench.serving import http_client
from tests.bench.serving.http_client import Server
from tests.bench.serving.peers import vllm_peer
from tests.bench.serving.peers.peft_files import write_adapters
from tests.bench.serving.rows import Plan, Row, Rows
from tests.bench.serving.workloads import NUM_COLD, RANKS, W1, W2, W4, Ask, Workload, asks, part


@dataclass(frozen=True, slots=True)
class Model:
    """What every peer loads: the base model, the adapters of W1, and others that nobody has asked for yet, of
    the higher rank."""

    path: Path
    dtype: str
    adapters: Sequence[Path]
    cold: Sequence[Path]


def model(base: BaseModel, dtype: str, folder: Path) -> Model:
    num = W1.num_adapters
    paths = write_adapters(folder, base.path, linear_shapes(base.path), num + len(RANKS) * NUM_COLD)
    return Model(base.path, dtype, paths[:num], paths[num + 1 :: len(RANKS)])


def measure_vllm(rows: Rows, plan: Plan, of: Model, share: int, venv: Path, log: Path) -> None:
    """With adapters, and without: the option alone costs it a third of its speed (measured with AVX-512).

    It is asked a ``share``-th of each workload: without bf16 it takes minutes over the prompts of W1 alone.
    Where it cannot run, the row ``vllm`` says why, in its own words."""
    try:
        names = ["vllm/w1", "vllm/w4", "vllm/w2_lora_on", "vllm/cold"]
        if rows.missing(names) and "vllm" not in rows.found:
            with vllm_peer.serving(venv, of.path, of.dtype, of.adapters, log) as (server, process):
                http_client.warm_up(server, W1)
                for name, work in zip(names, (W1, W4, W2), strict=False):
                    _measure_vllm(rows, plan, name, part(work, share), server, process)
                rows.measure("vllm/cold", lambda: _vllm_cold(server, of.cold))
        if rows.missing(["vllm/w2"]) and "vllm" not in rows.found:
            with vllm_peer.serving(venv, of.path, of.dtype, [], log) as (server, process):
                http_client.warm_up(server, W2)
                _measure_vllm(rows, plan, "vllm/w2", part(W2, share), server, process)
    except vllm_peer.NotHere as error:
        words = str(error)
        rows.measure("vllm", lambda: {"error": words, "preloaded": vllm_peer.preloaded(venv)})


def _measure_vllm(
    rows: Rows, plan: Plan, name: str, work: Workload, server: Server, process: psutil.Process
) -> None:
    rows.measure(name, lambda: http_client.row(server, work, plan) | {"pss_gib": _pss_gib(process)})


def _vllm_cold(server: Server, folders: Sequence[Path]) -> Row:
    """Adapters that it has never seen, the call that makes them known included."""
    extra = []
    for folder, ask in zip(folders, asks(W1, -1), strict=False):
        started = time.perf_counter()
        vllm_peer.load_adapter(server, folder)
        loading = 1e3 * (time.perf_counter() - started)
        known, only = replace(server, models=[folder.name]), Ask(0, ask.prompt, 2)
        extra += [loading + one for one in asyncio.run(http_client.cold_extra_ms(known, [only]))]
    return {"cold_extra_ms": round(statistics.median(extra), 1), "n": len(extra)}


def measure_transformers(rows: Rows, plan: Plan, of: Model) -> None:
    """PEFT over a mixed batch and transformers on the base model, each row in a process of its own."""
    for name, work, adapters in (
        ("peft/w1", W1.name, of.adapters),
        ("transformers/w2", W2.name, ()),
        ("peft/w4", W4.name, of.adapters),
        ("peft/cold", "cold", (*of.adapters[: len(RANKS)], *of.cold)),
    ):
        command = [
            *(sys.executable, "-m", "tests.bench.serving.peers.transformers_peer", "--workload", work),
            *("--model", str(of.path), "--dtype", of.dtype),
            *("--repeat", str(plan.repeat), "--limit-s", str(plan.limit_s)),
            *("--adapters", *map(str, adapters)),
        ]
        with suppress(subprocess.CalledProcessError):  # its own words are on the screen; the row is missing
            rows.measure(name, lambda command=command: _last_line(command))


def _last_line(command: Sequence[str]) -> Row:
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    found: Row = json.loads(done.stdout.splitlines()[-1])
    return found


def _pss_gib(process: psutil.Process) -> float:
    """Of a server and its engines."""
    tree = [process, *process.children(recursive=True)]
    return round(sum(one.memory_full_info().pss for one in tree) / 2**30, 2)
