"""transformers' ``generate`` on the base model, and PEFT's over a mixed batch (``adapter_names=``).

Runs as a process of its own, so that its memory can be measured and comes back:

    python -m tests.bench.serving.peers.transformers_peer --model FOLDER --dtype float32 --workload w1 \
        --repeat 3 --limit-s 150 --adapters FOLDER ...

All requests of a workload are one batch, which is what these two do best; there is no HTTP to pay. The last
line is the row, as JSON."""

import argparse
import json
import os
import time
from collections.abc import Sequence
from pathlib import Path

import psutil
import torch
from peft import PeftModel
from transformers.generation import StoppingCriteria, StoppingCriteriaList

from cluster.models import load_base
from tests.bench.serving.rows import Plan, repeated
from tests.bench.serving.workloads import RANKS, WORKLOADS, Ask, Run, asks, row_of, summary

BASE = "__base__"  # PEFT's name for rows without an adapter


class Clock(StoppingCriteria):  # type: ignore[misc]
    """Notes when each token came; stops nothing."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **_: object) -> torch.Tensor:
        self.times.append(time.perf_counter())
        return torch.zeros(len(input_ids), dtype=torch.bool)


@torch.inference_mode()
def run(model: torch.nn.Module, asked: Sequence[Ask], is_mixed: bool) -> Run:
    clock, prompts = Clock(), torch.tensor([ask.prompt for ask in asked])
    names = [BASE if ask.adapter is None else f"a{ask.adapter}" for ask in asked]
    started = time.perf_counter()
    model.generate(
        input_ids=prompts,
        attention_mask=torch.ones_like(prompts),
        max_new_tokens=asked[0].max_tokens,
        min_new_tokens=asked[0].max_tokens,
        do_sample=False,
        pad_token_id=0,
        stopping_criteria=StoppingCriteriaList([clock]),
        **({"adapter_names": names} if is_mixed else {}),
    )
    seconds = time.perf_counter() - started
    times = [at - started for at in clock.times]
    return summary([times] * len(asked), sum(ask.max_tokens for ask in asked), seconds)


def loaded(model: Path, dtype: torch.dtype, adapters: Sequence[Path]) -> torch.nn.Module:
    base = load_base(model, dtype)
    if not adapters:
        return base
    peft = PeftModel.from_pretrained(base, adapters[0], adapter_name="a0")
    for number, folder in enumerate(adapters[1:], start=1):
        peft.load_adapter(folder, adapter_name=f"a{number}")
    return peft.to(dtype).eval()


def cold_extra_ms(model: PeftModel, folders: Sequence[Path], asked: Sequence[Ask]) -> list[float]:
    """Loading an adapter, switching to it and the first token, against the first token alone afterwards."""
    extra = []
    for number, (folder, ask) in enumerate(zip(folders, asked, strict=True)):
        name = f"cold{number}"
        started = time.perf_counter()
        model.load_adapter(folder, adapter_name=name)
        model.to(next(model.parameters()).dtype).eval()
        model.set_adapter(name)
        run(model, [ask], is_mixed=False)
        loaded_at = time.perf_counter()
        run(model, [ask], is_mixed=False)
        extra.append(1e3 * ((loaded_at - started) - (time.perf_counter() - loaded_at)))
    return extra


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], required=True)
    parser.add_argument("--workload", choices=[*WORKLOADS, "cold"], required=True)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--limit-s", type=float, default=150)
    parser.add_argument("--adapters", type=Path, nargs="*", default=[])
    given = parser.parse_args()
    torch.set_num_threads(os.cpu_count() or 1)
    if given.workload == "cold":
        hot, cold = given.adapters[: len(RANKS)], given.adapters[len(RANKS) :]
        model = loaded(given.model, getattr(torch, given.dtype), hot)
        asked = [Ask(0, ask.prompt, 2) for ask in asks(WORKLOADS["w1"], -1)]
        run(model, asked[:1], is_mixed=False)
        extra = cold_extra_ms(model, cold, asked[: len(cold)])
        print(json.dumps({"cold_extra_ms": round(sorted(extra)[len(extra) // 2], 1), "n": len(extra)}))
        return
    work = WORKLOADS[given.workload]
    model = loaded(given.model, getattr(torch, given.dtype), given.adapters)
    is_mixed = bool(given.adapters)
    run(model, [Ask(ask.adapter, ask.prompt[:8], 2) for ask in asks(work, -1)], is_mixed)
    plan = Plan(given.repeat, given.limit_s)
    runs = repeated(lambda turn: run(model, asks(work, turn), is_mixed), plan)
    pss = psutil.Process().memory_full_info().pss / 2**30
    print(json.dumps({**row_of(runs, work), "pss_gib": round(pss, 2), "dtype": given.dtype}))


if __name__ == "__main__":
    main()
