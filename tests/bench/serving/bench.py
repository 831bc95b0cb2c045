"""Peers and our HTTP door under the same load, in one run on one machine: ``make bench-serving``.

    python -m tests.bench.serving.bench --out FOLDER [--fresh] [--repeat 3] [--limit-s 120] [--only few ...]

Every engine is asked the same of ``workloads.py``, client included, one after the other. Ours has one
configuration for all rows, keys, receipts and charges on, evidence off (``OPENLEDGER_ENGINE__*`` changes it).
Rows are kept in FOLDER/serving.json as they come: a second start measures what is missing, ``--fresh`` all.
``--limit-s`` bounds the repetitions of one row where an engine is slow; each row shows its ``runs``. At the
end come the ratios against the best peer, the plots, and ``goal NAME VALUE TARGET met|short`` for every
figure asked.

vLLM is installed into ``--vllm`` on first use (several minutes); where it does not run, its row says why."""

import argparse
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from cluster.config import Settings
from cluster.models import BaseModel, base_model, linear_shapes, load_base, native_dtype
from tests.bench.serving import ceiling, our_rows, peer_rows, plots, report
from tests.bench.serving.rows import Plan, Row, Rows
from tests.bench.serving.workloads import W1, W2, W4

OURS = {"few": our_rows.measure_few, "sweep": our_rows.measure_sweep}  # each has a Ray of its own
GROUPS = ("vllm", "transformers", "bare", *OURS)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--home", type=Path, default=Path(".openledger"), help="where the base model is")
    parser.add_argument("--vllm", type=Path, default=Path(".openledger/vllm"))
    parser.add_argument("--vllm-share", type=int, default=1, help="ask it only a 4th, say, of each workload")
    parser.add_argument("--fresh", action="store_true")
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--limit-s", type=float, default=120)
    parser.add_argument("--only", nargs="*", default=GROUPS, choices=GROUPS)
    given = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("stopped"))  # and so is all that was started
    settings, plan = Settings(home=given.home), Plan(given.repeat, given.limit_s)
    base, rows = base_model(settings), Rows(given.out / "serving.json", given.fresh)
    rows.measure("machine", lambda: machine(base))
    with TemporaryDirectory() as folder:
        if {"vllm", "transformers"} & {*given.only}:
            model = peer_rows.model(base, rows.found["machine"]["peer_dtype"], Path(folder))
            if "vllm" in given.only:
                peer_rows.measure_vllm(
                    rows, plan, model, given.vllm_share, given.vllm, Path(folder) / "vllm.log"
                )
            if "transformers" in given.only:
                peer_rows.measure_transformers(rows, plan, model)
    if "bare" in given.only:
        rows.measure("bare", lambda: bare(given.home, plan))
    for name, measure in OURS.items():
        if [*given.only] == [name]:
            measure(rows, plan)
        elif name in given.only:  # a process speaks to one Ray in its life
            command = [
                sys.executable,
                "-m",
                "tests.bench.serving.bench",
                *map(str, _options(given)),
                "--only",
                name,
            ]
            subprocess.run(command, check=True)
            rows.read()
    goals = report.goals(rows.found)
    rows.save({"engine": settings.engine.model_dump(), "goals": [str(goal) for goal in goals]})
    plots.plot(rows.found, given.out)
    report.show(rows.found, goals)


def _options(given: argparse.Namespace) -> tuple[object, ...]:
    """For a process that measures one group more."""
    return "--out", given.out, "--home", given.home, "--repeat", given.repeat, "--limit-s", given.limit_s


def machine(base: BaseModel) -> Row:
    """What it could do at best, and in which type the peers are faster here."""
    torch.set_num_threads(os.cpu_count() or 1)
    config, dtype, shapes = (
        load_base(base.path, torch.bfloat16).config,
        native_dtype(),
        linear_shapes(base.path),
    )
    in_bf16, in_fp32 = (ceiling.rates(config, one) for one in (torch.bfloat16, torch.float32))
    of = in_bf16 if dtype == torch.bfloat16 else in_fp32
    return {
        "cores": os.cpu_count(),
        "kernels": torch.backends.cpu.get_cpu_capability(),
        "dtype": str(dtype).removeprefix("torch."),
        "peer_dtype": "bfloat16" if in_bf16.multiply > in_fp32.multiply else "float32",
        "bf16_gflop_per_s": round(in_bf16.multiply / 1e9, 1),
        "fp32_gflop_per_s": round(in_fp32.multiply / 1e9, 1),
        "read_gb_per_s": round(of.read / 1e9, 1),
        **{f"{work.name}_ceiling": ceiling.ceiling(config, shapes, work, of, dtype) for work in (W1, W2, W4)},
    }


def bare(home: Path, plan: Plan) -> Row:
    """Our engine without Ray, HTTP and money, in a process of its own."""
    command = [sys.executable, "-m", "tests.bench.serving.engine_speed"]
    command += ["--home", str(home), "--repeat", str(plan.repeat)]
    environment = {**os.environ, "OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": "0"}
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env=environment)
    found: Row = json.loads(next(line for line in done.stdout.splitlines() if line.startswith("{")))
    return {"w1_tokens_per_s": found["w1"]["tokens_per_s"], "w2_tokens_per_s": found["w2"]["tokens_per_s"]}


if __name__ == "__main__":
    main()
