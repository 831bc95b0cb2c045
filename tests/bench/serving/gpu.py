"""Tokens per second of the bare engine on a CUDA device, at the shapes of an 8B Llama with random weights.

    python -m tests.bench.serving.gpu --out tests/bench/serving/gpu.json

W1 and W2 of ``workloads.py`` in turn, medians over ``--repeat`` runs of each.
Beside them PEFT: the same W1 as one batch of transformers' ``generate`` with an adapter name for each row.

The decode roofline: a step of all rows reads every weight once (of the embedding a row per token), the keys
and values of every row at the middle of its answer and every adapter once, at the rate at which this device
copies memory, measured in this run; nothing else is counted. Compared with the median step of single tokens
of W1. Prints the device, one JSON object and lines ``goal NAME VALUE TARGET met|short``. A few minutes, 60
GB on the device; ``--layers`` takes less of the model where there is less, ``--weights`` stores it in 8 or 4
bits (of random weights, so nothing is said of quality)."""

import argparse
import json
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

from attribution.hashing import sha256
from cluster.adapters import Factors
from serve_apps.engine.adapter_cache import AdapterCache, CacheLimits, Loaded
from serve_apps.engine.blending import RecentBlends
from serve_apps.engine.cuda.runner import CudaRunner
from serve_apps.engine.decoder import Decoder
from serve_apps.engine.engine import Engine
from serve_apps.engine.families import fuse_decoder
from serve_apps.engine.kv_cache import BlockPool
from serve_apps.engine.quantization import BITS, Quantized, quantize_decoder
from serve_apps.engine.runner import FittedAdapter
from serve_apps.engine.scheduler import Limits, Scheduler
from tests.bench.serving.engine_speed import run
from tests.bench.serving.report import Goal
from tests.bench.serving.workloads import RANKS, W1, W2, Run, asks, row_of

TARGET_OF_ROOFLINE = 0.60
TARGET_W1_OVER_W2 = 0.90
TARGET_OVER_PEFT = 3.0
BLOCK = 16
LIMITS = Limits(max_batch_tokens=2048, max_running=W1.num_requests, reuses_prefixes=False)
PEFT_MODULES = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--weights", choices=["auto", *BITS], default="auto")
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    device = torch.cuda.get_device_name()
    print(device, flush=True)
    model = random_llama(given.layers)
    peft_rate = peft_tokens_per_s(model)
    decoder = fuse_decoder(model)
    if given.weights != "auto":
        decoder = quantize_decoder(decoder, BITS[given.weights], decoder.device)
    del model
    torch.cuda.empty_cache()
    num_blocks = 1 + W1.num_requests * -(-(W1.prompt_tokens + W1.max_tokens) // BLOCK)
    runner = CudaRunner(decoder, num_blocks, BLOCK, LIMITS.max_length)
    started = time.perf_counter()
    runner.capture()
    capture_s = time.perf_counter() - started
    adapters = {sha256(bytes([i])): random_factors(decoder, RANKS[i % 2], i) for i in range(W1.num_adapters)}
    engine = engine_of(runner, adapters)
    ids = list(adapters)
    run(engine, ids, replace(W1, prompt_tokens=8, max_tokens=2), turn=-1)  # loads the adapters
    runs: dict[str, list[Run]] = {"w1": [], "w2": []}
    for turn in range(given.repeat):
        runs["w1"].append(run(engine, ids, W1, turn))
        runs["w2"].append(run(engine, ids, W2, turn))
    engine.close()
    w1, w2 = row_of(runs["w1"], W1), row_of(runs["w2"], W2)
    lora_bytes = sum(f.a.nbytes + f.b.nbytes for factors in adapters.values() for f in factors.values())
    read = copy_rate()
    best_s = step_bytes(decoder, lora_bytes) / read
    step_s = w1["gap_p50_ms"] / 1e3
    result = {
        "device": device,
        "w1": w1,
        "w2": w2,
        "peft_tokens_per_s": round(peft_rate, 1),
        "decode_step_ms": round(1e3 * step_s, 3),
        "decode_roofline_ms": round(1e3 * best_s, 3),
        "copy_gb_per_s": round(read / 1e9, 1),
        "capture_s": round(capture_s, 1),
        "layers": given.layers,
        "weights": given.weights,
        "ranks": RANKS,
        "torch": torch.__version__,
    }
    print(json.dumps(result))
    if given.out:
        given.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(Goal("gpu_decode_of_roofline", best_s / step_s, TARGET_OF_ROOFLINE))
    print(Goal("gpu_w1_over_w2", w1["tokens_per_s"] / w2["tokens_per_s"], TARGET_W1_OVER_W2))
    print(Goal("gpu_w1_over_peft", w1["tokens_per_s"] / peft_rate, TARGET_OVER_PEFT))


def random_llama(num_layers: int) -> LlamaForCausalLM:
    """The shapes of Llama 3 8B."""
    config = LlamaConfig(
        vocab_size=128256,
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=num_layers,
        num_attention_heads=32,
        num_key_value_heads=8,
        max_position_embeddings=8192,
        dtype=torch.bfloat16,
    )
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    with torch.device("cuda"):
        model = LlamaForCausalLM(config).eval()
    torch.set_default_dtype(torch.float32)
    return model


def random_factors(decoder: Decoder, rank: int, seed: int) -> dict[str, Factors]:
    """For every linear module of every layer."""
    draw = torch.Generator().manual_seed(seed)
    shape, found = decoder.shape, {}
    hidden, inner = decoder.layers[0].projections["down"].weight.shape
    keys = shape.num_kv_heads * shape.head_dim
    sizes = {
        "self_attn.q_proj": (hidden, hidden),
        "self_attn.k_proj": (hidden, keys),
        "self_attn.v_proj": (hidden, keys),
        "self_attn.o_proj": (hidden, hidden),
        "mlp.gate_proj": (hidden, inner),
        "mlp.up_proj": (hidden, inner),
        "mlp.down_proj": (inner, hidden),
    }
    for layer in range(shape.num_layers):
        for module, (d_in, d_out) in sizes.items():
            a, b = torch.randn(rank, d_in, generator=draw), torch.randn(d_out, rank, generator=draw)
            found[f"model.layers.{layer}.{module}"] = Factors(0.01 * a.bfloat16(), 0.01 * b.bfloat16())
    return found


def engine_of(runner: CudaRunner, adapters: dict[bytes, dict[str, Factors]]) -> Engine:
    """Without a tokenizer or a grammar, which greedy tokens of random weights do not need."""

    def load(adapter_id: bytes) -> Loaded[FittedAdapter]:
        fitted = runner.fit(adapters[adapter_id])
        return Loaded(fitted, fitted.size_bytes)

    def refuse(_: object) -> Any:
        raise AssertionError("not in this benchmark")

    return Engine(
        runner,
        Scheduler(LIMITS, BlockPool(runner.num_blocks, BLOCK)),
        AdapterCache(load, CacheLimits(budget_bytes=8 * 2**30, max_adapter_bytes=2**30)),
        RecentBlends(),
        decode=lambda _: "",
        constrain=refuse,
        eos_ids=frozenset(),
    )


def step_bytes(decoder: Decoder, lora_bytes: int) -> float:
    """What a decode step of W1 must read."""
    stored = [linear.stored for layer in decoder.layers for linear in layer.projections.values()]
    weights = sum(each.num_bytes if isinstance(each, Quantized) else each.nbytes for each in stored)
    shape, past = decoder.shape, W1.prompt_tokens + W1.max_tokens / 2
    per_token = 2 * shape.num_layers * shape.num_kv_heads * shape.head_dim * decoder.dtype.itemsize
    return weights + decoder.head.nbytes + W1.num_requests * past * per_token + lora_bytes


def copy_rate() -> float:
    """Bytes per second, read and written, of copying 4 GiB."""
    source = torch.ones(2**32, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    return 2 * source.nbytes / min(seconds(lambda: target.copy_(source)) for _ in range(7))


def seconds(call: Callable[[], object]) -> float:
    torch.cuda.synchronize()
    started = time.perf_counter()
    call()
    torch.cuda.synchronize()
    return time.perf_counter() - started


def peft_tokens_per_s(model: LlamaForCausalLM) -> float:
    """W1 as one batch; the second of two runs. The adapters are taken off again."""
    names = [f"adapter{i}" for i in range(W1.num_adapters)]
    configs = [
        LoraConfig(
            r=RANKS[i % 2], lora_alpha=RANKS[i % 2], target_modules=PEFT_MODULES, init_lora_weights=False
        )
        for i in range(W1.num_adapters)
    ]
    peft: PeftModel = get_peft_model(model, configs[0], adapter_name=names[0])
    for name, config in zip(names[1:], configs[1:], strict=True):
        peft.add_adapter(name, config)
    peft.eval()
    asked = asks(W1, 0)
    prompts = torch.tensor([ask.prompt for ask in asked], device="cuda")
    rows = [names[ask.adapter] for ask in asked if ask.adapter is not None]

    def generate() -> None:
        peft.generate(
            input_ids=prompts,
            attention_mask=torch.ones_like(prompts),
            adapter_names=rows,
            do_sample=False,
            min_new_tokens=W1.max_tokens,
            max_new_tokens=W1.max_tokens,
            pad_token_id=0,
        )

    generate()  # warms up
    took = seconds(generate)
    peft.unload()
    return W1.num_requests * W1.max_tokens / took


if __name__ == "__main__":
    main()
