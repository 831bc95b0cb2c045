"""What this machine could do at best with a workload: the roofline by which every row is judged.

A prompt token costs two operations a weight at the rate at which torch multiplies matrices here, and a shared
prefix is computed once for each adapter. A decode step costs its operations at that rate and, not overlapped,
its bytes (keys and values, the adapters in use) at the rate at which memory is read. Both rates are measured
in the run, in the engine's own type."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from tests.bench.serving.workloads import RANKS, Workload


@dataclass(frozen=True, slots=True)
class Rates:
    """Operations and bytes per second."""

    multiply: float
    read: float


def rates(config: Any, dtype: torch.dtype) -> Rates:
    """``config`` is the model's Hugging Face one: its layers set the shape that is multiplied."""
    return Rates(multiply_rate(config.hidden_size, 2 * config.intermediate_size, dtype), read_rate())


def ceiling(
    config: Any, shapes: dict[str, tuple[int, int]], work: Workload, of: Rates, dtype: torch.dtype
) -> float:
    """Tokens per second of ``work`` at best."""
    body = sum(d_out * d_in for d_out, d_in in shapes.values())
    head = config.vocab_size * config.hidden_size
    is_adapted = work.num_adapters > 0
    lora = is_adapted * sum(d_out + d_in for d_out, d_in in shapes.values()) * sum(RANKS) / len(RANKS)
    num = work.num_requests
    num_prefilled = num * work.prompt_tokens + max(1, work.num_adapters) * work.shared_prefix
    head_dim = config.hidden_size // config.num_attention_heads
    kv_bytes = 2 * config.num_hidden_layers * config.num_key_value_heads * head_dim * dtype.itemsize
    past = work.shared_prefix + work.prompt_tokens + work.max_tokens / 2
    prefill_s = 2 * (num_prefilled * (body + lora) + num * head) / of.multiply
    compute_s = 2 * num * (body + head + lora) / of.multiply
    memory_s = (2 * work.num_adapters * lora + num * past * kv_bytes) / of.read
    decode_s = (work.max_tokens - 1) * (compute_s + memory_s)
    return round(num * work.max_tokens / (prefill_s + decode_s), 1)


@torch.inference_mode()
def multiply_rate(d_in: int, d_out: int, dtype: torch.dtype) -> float:
    """Operations per second of torch on 512 rows, weights rotating through more than a cache."""
    x, weights = torch.randn(512, d_in).to(dtype), [torch.randn(d_out, d_in).to(dtype) for _ in range(12)]
    return 2 * 512 * d_in * d_out / fastest(lambda: [F.linear(x, weight) for weight in weights]) * 12


def read_rate() -> float:
    """Bytes per second of reading 256 MiB."""
    data = torch.ones(64 * 2**20)
    return data.nbytes / fastest(data.sum)


def fastest(call: Callable[[], object]) -> float:
    """Seconds of the fastest of seven calls: what the machine can do, not what its neighbours leave."""
    times = []
    for _ in range(7):
        started = time.perf_counter()
        call()
        times.append(time.perf_counter() - started)
    return min(times)
