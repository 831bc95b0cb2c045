"""The runner for CUDA devices gives the logits of ``ModelRunner``, plan by plan."""

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="no Triton: its kernels are for CUDA devices")

from attribution.types import ZERO_ID
from cluster.adapters import Factors
from cluster.models import load_base
from serve_apps.engine.cuda.launch import IS_INTERPRETED
from serve_apps.engine.cuda.runner import CudaRunner
from serve_apps.engine.decoder import Decoder
from serve_apps.engine.families import fuse_decoder
from serve_apps.engine.kv_cache import BlockPool
from serve_apps.engine.model_runner import ModelRunner
from serve_apps.engine.quantization import BITS, quantize_decoder
from serve_apps.engine.scheduler import Limits, Scheduler, StepPlan
from serve_apps.engine.types import EngineRequest
from tests.serve_apps.conftest import Toys, request, run

# What numpy says in the interpreter of numbers that are not finite.
pytestmark = pytest.mark.filterwarnings("ignore:(invalid value|overflow):RuntimeWarning")
BLOCK = 16
DEVICES = [
    pytest.param("cpu", marks=pytest.mark.skipif(not IS_INTERPRETED, reason="the kernels are compiled")),
    pytest.param("cuda", marks=pytest.mark.gpu),
]
# Sums in another order; in bf16 a rounding more or less per projection, the interpreter's towards zero.
TOLERANCE = {torch.float32: 2e-4, torch.bfloat16: 0.15}


@pytest.fixture(params=DEVICES)
def device(request: pytest.FixtureRequest) -> str:
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    return str(request.param)


def decoder(toys: Toys, device: str, dtype: torch.dtype) -> Decoder:
    """Half of the toy's layers: the interpreter takes its time."""
    model = fuse_decoder(load_base(toys.base.path, dtype).to(device))
    return replace(model, layers=model.layers[:2], shape=replace(model.shape, num_layers=2))


def plans(
    limits: Limits, num_blocks: int, requests: list[EngineRequest]
) -> Iterator[tuple[StepPlan, list[int]]]:
    """Every step until all are over; whoever takes a plan puts the next tokens into the list beside it."""
    scheduler = Scheduler(limits, BlockPool(num_blocks, BLOCK))
    for each in requests:
        scheduler.add(each)
    while scheduler.num_running or scheduler.num_waiting:
        plan, tokens = scheduler.schedule(lambda _: True), []
        yield plan, tokens
        for row, token in zip((row for row in plan.rows if row.samples), tokens, strict=True):
            sequence = scheduler.sequence(row.request_id)
            sequence.tokens.append(token)
            if sequence.num_generated == sequence.request.sampling.max_tokens:
                scheduler.remove(row.request_id)


def compare(
    toys: Toys,
    device: str,
    dtype: torch.dtype,
    limits: Limits,
    num_blocks: int,
    prompts: list[tuple[int, int]],
    max_tokens: int,
    weights: str = "auto",
) -> set[str]:
    """Both runners through one schedule; the kinds of steps that there were."""
    model = decoder(toys, device, dtype)
    if weights != "auto":
        model = quantize_decoder(model, BITS[weights], model.device)
    ours = CudaRunner(model, num_blocks, BLOCK, limits.max_length)
    plain = ModelRunner(model, num_blocks, BLOCK)
    runners = [
        (r, {key: r.fit(weights.factors) for key, weights in toys.adapters.items()}) for r in (ours, plain)
    ]
    ids = [ZERO_ID, *toys.adapter_ids]
    requests = [
        request(tuple((7 * i + length) % 250 + 3 for i in range(length)), ids[which], max_tokens=max_tokens)
        for which, length in prompts
    ]
    kinds, computed = set(), set()
    for plan, tokens in plans(limits, num_blocks, requests):
        found, expected = (r.run(plan, adapters).logits for r, adapters in runners)
        assert found.dtype == torch.float32
        torch.testing.assert_close(found, expected.float(), atol=TOLERANCE[dtype], rtol=0)
        tokens += expected.argmax(-1).tolist()
        for row in plan.rows:
            kinds.add(
                "chunk"
                if len(row.token_ids) > 1 and row.start
                else "prompt"
                if len(row.token_ids) > 1
                else "decode"
            )
            if (row.request_id, row.start) in computed:
                kinds.add("again")
            computed.add((row.request_id, row.start))
        if plan.num_single == len(plan.rows):
            kinds.add("captured")
    return kinds


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_mixed_batches_have_the_logits_of_torch(toys: Toys, device: str, dtype: torch.dtype) -> None:
    """Prompts beside decoding, every adapter beside the base model."""
    prompts = [(0, 5), (1, 18), (6, 3)]
    kinds = compare(toys, device, dtype, Limits(max_batch_tokens=30, max_length=64), 40, prompts, 2)
    assert {"prompt", "decode", "captured"} <= kinds


@pytest.mark.parametrize("weights", BITS)
def test_quantised_weights_have_the_logits_of_torch(toys: Toys, device: str, weights: str) -> None:
    """Dequantised in tiles here and as a whole there; adapters on top."""
    limits, prompts = Limits(max_batch_tokens=30, max_length=64), [(0, 5), (1, 18), (6, 3)]
    compare(toys, device, torch.float32, limits, 40, prompts, 2, weights)


def test_chunks_and_preemption_have_the_logits_of_torch(toys: Toys, device: str) -> None:
    """Nine tokens a step, and a cache that is too small for both requests."""
    limits = Limits(max_batch_tokens=9, max_length=48, reuses_prefixes=False)
    kinds = compare(toys, device, torch.float32, limits, 5, [(5, 30), (6, 20)], 5)
    assert {"chunk", "decode", "captured", "again"} <= kinds


def _overflowing(factors: Factors) -> Factors:
    """Finite, or it would be refused, and what comes of it is not."""
    return Factors(torch.full_like(factors.a, torch.finfo(factors.a.dtype).max), factors.b)


def test_an_adapter_of_nan_spoils_its_own_rows_only(toys: Toys, device: str) -> None:
    """Bitwise at the same shape of batch: the others do not see whether it is NaN."""
    model = decoder(toys, device, torch.float32)
    limits = Limits(max_length=64)
    ids = [ZERO_ID, *toys.adapter_ids[:3]]
    requests = [request(tuple(range(3, 6 + i)), key, max_tokens=2) for i, key in enumerate(ids)]
    bad = toys.adapter_ids[1]
    seen: list[list[Tensor]] = []
    for is_spoiled in (False, True):
        runner = CudaRunner(model, 20, BLOCK, limits.max_length)
        given = {key: weights.factors for key, weights in toys.adapters.items()}
        if is_spoiled:
            given[bad] = {name: _overflowing(factors) for name, factors in given[bad].items()}
        adapters = {key: runner.fit(factors) for key, factors in given.items()}
        steps = []
        for plan, tokens in plans(limits, 20, requests):
            logits = runner.run(plan, adapters).logits
            steps.append(logits[[row.adapter_id != bad for row in plan.rows]])
            assert bool(logits.isnan().any()) is is_spoiled
            tokens += [5] * len(logits)
        seen.append(steps)
    assert all(torch.equal(clean, beside) for clean, beside in zip(*seen, strict=True))


@pytest.mark.gpu
def test_an_engine_on_a_device_answers_as_on_a_cpu(toys: Toys) -> None:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    prompts = [tuple((11 * i + 5 * j) % 250 + 3 for j in range(1 + 9 * i)) for i in range(8)]
    ids = [ZERO_ID, *toys.adapter_ids]
    answers = []
    for device in ("cuda", "cpu"):
        engine = toys.engine(device=device)
        requests = [request(prompt, ids[i % len(ids)]) for i, prompt in enumerate(prompts)]
        found = run(engine, requests)
        answers.append([found[each.request_id].token_ids for each in requests])
        engine.close()
    assert answers[0] == answers[1]
