"""The kernels equal the obvious torch form, and a row's bits depend on that row alone."""

import ctypes
from collections.abc import Iterator
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from attribution.types import ZERO_ID
from cluster.adapters import Factors as FileFactors
from cluster.models import load_base
from serve_apps.engine import lora
from serve_apps.engine.decoder import Decoder, Linear
from serve_apps.engine.families import fuse_decoder
from serve_apps.engine.kv_cache import BlockPool
from serve_apps.engine.native import library
from serve_apps.engine.native.library import PANEL, address, load_kernels
from serve_apps.engine.native_runner import Memory, NativeRunner, pack_linear
from serve_apps.engine.packed_adapter import Projection, pack_adapter
from serve_apps.engine.scheduler import Limits, Scheduler
from serve_apps.engine.types import EngineRequest
from tests.serve_apps.conftest import Toys, request, run

KERNELS = load_kernels()
# Only where nothing can build them: kernels that a compiler refuses must fail, not vanish.
pytestmark = pytest.mark.skipif(
    library.compiler() is None, reason="no C++ compiler: torch computes everything"
)
CLOSE = {torch.float32: {"atol": 2e-5, "rtol": 2e-5}, torch.bfloat16: {"atol": 2e-2, "rtol": 2e-2}}
NAN = float("nan")


def test_a_compiler_builds_kernels_that_load() -> None:
    assert KERNELS is not None


@dataclass(frozen=True)
class Kit:
    """One build of the kernels and threads for it."""

    kernels: ctypes.CDLL
    team: ctypes.c_void_p

    def __call__(self, name: str, *arguments: object) -> None:
        """A kernel with tensors, numbers, structures and arrays of them as they are."""
        getattr(self.kernels, f"openledger_{name}")(*map(_as_c, arguments))


def _as_c(value: object) -> object:
    if isinstance(value, Tensor):
        return ctypes.c_void_p(address(value))
    if isinstance(value, ctypes.Structure | ctypes.Array):
        return ctypes.byref(value)
    return ctypes.c_int64(value) if isinstance(value, int) else value


@pytest.fixture(
    scope="module",
    params=[(library.variant(), 1), *((name, 3) for name in library.runnable())],
    ids=lambda param: f"{param[0]}, {param[1]} threads",
)
def kit(request: pytest.FixtureRequest) -> Iterator[Kit]:
    variant, num_threads = request.param
    kernels = library.load(variant)
    kit = Kit(kernels, ctypes.c_void_p(kernels.openledger_team(ctypes.c_int64(num_threads))))
    yield kit
    kernels.openledger_disband(kit.team)


def normal(*size: int, seed: int = 0) -> Tensor:
    return torch.randn(*size, generator=torch.Generator().manual_seed(seed))


def linear(kit: Kit, given: Linear, x: Tensor, out: Tensor | None = None) -> Tensor:
    memory = Memory(2**21)
    packed = pack_linear(given, False, memory)
    result = torch.full((len(x), len(given.weight)), NAN) if out is None else out.clone()
    kit("linear", kit.team, packed, x, len(x), result, int(out is not None), None, 0, 0)
    return result


@pytest.mark.parametrize("num_rows", [0, 1, 2, 3, 5, 6, 7, 12, 13, 24, 25, 40, 97, 200])
@pytest.mark.parametrize(("d_in", "d_out"), [(1, 1), (12, 24), (64, 259), (576, 192), (700, 80)])
def test_linear_is_that_of_torch(kit: Kit, num_rows: int, d_in: int, d_out: int) -> None:
    x, weight, before = normal(num_rows, d_in), normal(d_out, d_in, seed=1), normal(num_rows, d_out, seed=2)
    for stored in (weight, weight.bfloat16().float()):
        for bias in (None, normal(d_out, seed=3)):
            exact = F.linear(x.double(), stored.double(), None if bias is None else bias.double()).float()
            torch.testing.assert_close(linear(kit, Linear(stored, bias), x), exact, atol=1e-4, rtol=1e-4)
        added = linear(kit, Linear(stored, None), x, before)
        exact = (before.double() + x.double() @ stored.double().t()).float()
        torch.testing.assert_close(added, exact, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("num_rows", [1, 5, 13, 40, 200])
@pytest.mark.parametrize(("d_in", "d_out"), [(2, 1), (12, 24), (64, 259), (702, 80)])
def test_linear_over_inputs_in_bf16(kit: Kit, num_rows: int, d_in: int, d_out: int) -> None:
    """Products of bf16 numbers are exact in fp32: only the order of the sum differs from fp64."""
    x, weight = normal(num_rows, d_in).bfloat16(), normal(d_out, d_in, seed=1).bfloat16()
    memory = Memory(2**21)
    packed = pack_linear(Linear(weight, None), True, memory)
    out = torch.full((num_rows, d_out), NAN)
    kit("linear", kit.team, packed, x, num_rows, out, 0, None, 0, 0)
    exact = F.linear(x.double(), weight.double()).float()
    torch.testing.assert_close(out, exact, atol=1e-4, rtol=1e-4)
    alone = torch.empty(1, d_out)
    kit("linear", kit.team, packed, x[num_rows // 2].unsqueeze(0), 1, alone, 0, None, 0, 0)
    assert torch.equal(alone[0], out[num_rows // 2])


@pytest.mark.parametrize("half", [True, False])
def test_a_row_of_linear_is_the_same_bits_in_any_company(kit: Kit, half: bool) -> None:
    weight = normal(80, 700, seed=1)
    packed = Linear(weight.bfloat16().float() if half else weight, None)
    row = normal(700)
    alone = linear(kit, packed, row.unsqueeze(0))[0]
    for num_rows in (2, 5, 6, 7, 13, 30, 150):
        x = torch.full((num_rows, 700), NAN)
        x[num_rows // 2] = row
        assert torch.equal(linear(kit, packed, x)[num_rows // 2], alone), num_rows


SIZES = (32, 16, 24)
RANKS = [(1, 1, 1), (4, 0, 3), (8, 8, 8), (0, 0, 0), (16, 16, 16), (5, 0, 0)]


def adapters() -> list[list[FileFactors | None]]:
    return [
        [
            FileFactors(
                0.3 * normal(rank, 40, seed=i).bfloat16(), 0.3 * normal(size, rank, seed=9).bfloat16()
            )
            if rank
            else None
            for rank, size in zip(ranks, SIZES, strict=True)
        ]
        for i, ranks in enumerate(RANKS)
    ]


@dataclass(frozen=True)
class Adapting:
    """Adapters and the segments of a step. Slot 0 is the base model, slot ``n`` adapter ``n - 1``; equal ones
    lie together. With a ``sound`` adapter all others are NaN, padding included."""

    segments: ctypes.Array[ctypes.Structure]
    kept: list[object]

    @classmethod
    def of(
        cls,
        kit: Kit,
        given: list[list[FileFactors | None]],
        projection: Projection,
        slots: list[int],
        sound: int = 0,
    ) -> "Adapting":
        packs = [pack_adapter(kit.kernels, [[("", part) for part in parts]], [projection]) for parts in given]
        updates = (library.Update * len(given))(*(packed.updates[0] for packed in packs))
        for slot, packed in enumerate(packs, start=1):
            if sound and slot != sound:
                packed.memory.fill_(255)
        ends = [i for i in range(1, len(slots) + 1) if i == len(slots) or slots[i] != slots[i - 1]]
        runs = [(slots[end - 1], start, end) for start, end in zip([0, *ends], ends, strict=False)]
        size = ctypes.sizeof(library.Update)
        used = [
            library.Segment(ctypes.addressof(updates) + (slot - 1) * size, start, end)
            for slot, start, end in runs
            if slot
        ]
        return cls((library.Segment * len(used))(*used), [packs, updates])


def lora_rows(
    kit: Kit, given: list[list[FileFactors | None]], slots: list[int], x: Tensor, sound: int = 0
) -> Tensor:
    """What adapters add to ones, by a map of zeros."""
    memory = Memory(2**21)
    is_half = x.dtype == torch.bfloat16
    zeros = pack_linear(Linear(torch.zeros(sum(SIZES), 40), None), is_half, memory)
    out = torch.ones(len(slots), sum(SIZES))
    adapting = Adapting.of(kit, given, Projection(SIZES), slots, sound)
    kit("linear", kit.team, zeros, x, len(x), out, 1, adapting.segments, len(adapting.segments), 0)
    return out


@pytest.mark.parametrize(
    "slots",
    [
        [],
        [0] * 4,
        [2] * 30,
        [1, 2, 3, 4, 5, 6],
        [0, 1, 1, 1, 1, 1, 1, 1, 2, 3, 5, 5, 6, 0],
        [3] * 6 + [5] * 7,
    ],
    ids=["empty", "base only", "one adapter", "all different", "skewed", "two"],
)
@pytest.mark.parametrize("dtype", CLOSE)
def test_lora_is_the_obvious_sum(kit: Kit, slots: list[int], dtype: torch.dtype) -> None:
    """In bf16 inputs and what lies between the factors are rounded; the oracle here rounds neither."""
    x = normal(len(slots), 40).to(dtype)
    expected = torch.ones(len(slots), sum(SIZES))
    turned = [
        lora.fuse(
            [
                (None if part is None else lora.Factors(part.a.float().t(), part.b.float().t()), size)
                for part, size in zip(parts, SIZES, strict=True)
            ]
        )
        for parts in adapters()
    ]
    lora.add_lora(expected, x.float(), [None, *turned], torch.tensor(slots, dtype=torch.int64))
    torch.testing.assert_close(lora_rows(kit, adapters(), slots, x), expected, **CLOSE[dtype])


@pytest.mark.parametrize("dtype", CLOSE)
def test_a_row_of_lora_meets_no_other_row_and_no_other_adapter(kit: Kit, dtype: torch.dtype) -> None:
    slots = [1, 2, 3, 3, 3, 3, 3, 3, 3, 5, 6]
    x = torch.full((len(slots), 40), NAN, dtype=dtype)
    row = normal(40).to(dtype)
    for place in (3, 8):
        x[place] = row
        alone = lora_rows(kit, adapters(), [3], row.unsqueeze(0))[0]
        assert torch.equal(lora_rows(kit, adapters(), slots, x, sound=3)[place], alone)


HEADS, KV_HEADS, DIM, NUM_BLOCKS = 6, 2, 32, 40


def attend(kit: Kit, cache: tuple[Tensor, Tensor], spans: list[tuple[int, list[int]]], qkv: Tensor) -> Tensor:
    """``spans`` are the start and the blocks of each row; ``qkv`` has the tokens of all of them, ``[rows,
    tokens, …]`` with as many tokens in each."""
    num_tokens = qkv.shape[1]
    angles = torch.outer(torch.arange(1000).float(), 1e4 ** (-torch.arange(DIM // 2) / (DIM // 2)))
    cos, sin = angles.cos().contiguous(), angles.sin().contiguous()
    shape = library.Shape(
        num_heads=HEADS,
        num_kv_heads=KV_HEADS,
        head_dim=DIM,
        num_blocks=NUM_BLOCKS,
        is_half=int(cache[0].dtype == torch.bfloat16),
        cos=address(cos),
        sin=address(sin),
    )
    tables = [torch.tensor(blocks, dtype=torch.int32) for _, blocks in spans]
    rows = (library.Span * len(spans))(
        *(
            library.Span(i * num_tokens, num_tokens, start, address(table))
            for i, ((start, _), table) in enumerate(zip(spans, tables, strict=True))
        )
    )
    out = torch.full((len(spans), num_tokens, HEADS * DIM), NAN, dtype=cache[0].dtype)
    memory = library.Cache(address(cache[0]), address(cache[1]))
    kit("attend", kit.team, shape, memory, rows, len(spans), qkv.clone(), out)
    return out


def empty_cache(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    size = (KV_HEADS, NUM_BLOCKS, PANEL * DIM)
    return torch.full(size, NAN, dtype=dtype), torch.full(size, NAN, dtype=dtype)


def attend_plainly(qkv: Tensor) -> Tensor:
    """All tokens of one row, ``[tokens, …]``, by torch."""
    x = qkv.view(len(qkv), HEADS + 2 * KV_HEADS, DIM)
    angles = torch.outer(torch.arange(1000).float(), 1e4 ** (-torch.arange(DIM // 2) / (DIM // 2)))[: len(x)]
    cos, sin = (torch.cat((t, t), -1).unsqueeze(1) for t in (angles.cos(), angles.sin()))
    turned = torch.cat((-x[..., DIM // 2 :], x[..., : DIM // 2]), -1)
    rotated = (x * cos + turned * sin).double()
    q, k = rotated[:, :HEADS], rotated[:, HEADS : HEADS + KV_HEADS]
    v = x[:, HEADS + KV_HEADS :].double()
    q, k, v = (t.transpose(0, 1).unsqueeze(0) for t in (q, k, v))
    seen = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    return seen[0].transpose(0, 1).reshape(len(x), -1).float()


@pytest.mark.parametrize("dtype", CLOSE)
@pytest.mark.parametrize("cuts", [[77], [76, 1], [1] * 20, [5, 16, 30, 26], [16, 16, 1]], ids=str)
def test_attention_over_the_paged_cache_is_that_of_torch(
    kit: Kit, cuts: list[int], dtype: torch.dtype
) -> None:
    """However a row is cut into chunks, and with NaN in every block that is not its own."""
    total, blocks = sum(cuts), [7, 3, 30, 12, 1]
    qkv, cache, start = normal(total, (HEADS + 2 * KV_HEADS) * DIM), empty_cache(dtype), 0
    pieces = []
    for size in cuts:
        pieces.append(attend(kit, cache, [(start, blocks)], qkv[None, start : start + size])[0])
        start += size
    torch.testing.assert_close(torch.cat(pieces).float(), attend_plainly(qkv), **CLOSE[dtype])
    whole = attend(kit, empty_cache(dtype), [(0, blocks)], qkv[None])[0]
    assert torch.equal(torch.cat(pieces), whole)  # bitwise: chunks change nothing


@pytest.mark.parametrize("dtype", CLOSE)
def test_attention_reads_no_row_but_its_own(kit: Kit, dtype: torch.dtype) -> None:
    qkv = normal(3, 40, (HEADS + 2 * KV_HEADS) * DIM)
    tables = [[1, 2, 3], [4, 5, 6], [9, 8, 7]]
    alone = attend(kit, empty_cache(dtype), [(0, tables[1])], qkv[1:2])[0]
    spoiled = torch.full_like(qkv, NAN)
    spoiled[1] = qkv[1]
    seen = attend(kit, empty_cache(dtype), [(0, table) for table in tables], spoiled)
    assert torch.equal(seen[1], alone) and seen[[0, 2]].isnan().all()


@pytest.mark.parametrize("width", [1, 3, 64, 100])
def test_norm_is_that_of_torch(kit: Kit, width: int) -> None:
    x, weight, out = normal(5, width), normal(width, seed=1), torch.empty(5, width)
    kit("norm", x, weight, 5, width, ctypes.c_double(1e-5), out)
    torch.testing.assert_close(out, F.rms_norm(x, (width,), weight, 1e-5), **CLOSE[torch.float32])


@pytest.mark.parametrize("dtype", CLOSE)
@pytest.mark.parametrize("num_rows", [1, 7, 40])
@pytest.mark.parametrize("inner", [16, 48, 272])
def test_a_gated_map_is_that_of_torch(kit: Kit, dtype: torch.dtype, num_rows: int, inner: int) -> None:
    """With an adapter on either part and far into both tails of the exponential, whoever is NaN."""
    x, weight, bias = (
        normal(num_rows, 40),
        8 * normal(2 * inner, 40, seed=1).bfloat16(),
        normal(2 * inner, seed=3),
    )
    x[0] *= 10
    x = x.to(dtype)
    a, b = normal(5, 40, seed=4).bfloat16(), normal(inner, 5, seed=5).bfloat16()
    both: list[list[FileFactors | None]] = [[FileFactors(a, b), None], [None, FileFactors(a, b)]]
    slots = [0] * (num_rows // 3) + [1] * (num_rows // 3) + [2] * (num_rows - 2 * (num_rows // 3))
    x[num_rows // 2 + 1 :] = NAN
    memory = Memory(2**21)
    packed = pack_linear(Linear(weight.float(), bias), dtype == torch.bfloat16, memory, is_gated=True)
    adapting = Adapting.of(kit, both, Projection((inner, inner), is_in_turn=True), slots)
    out = torch.full((num_rows, inner), NAN, dtype=dtype)
    kit("gated", kit.team, packed, x, num_rows, out, adapting.segments, len(adapting.segments), 0)
    wide = F.linear(x.double(), weight.double(), bias.double())
    added = (x.double() @ a.double().t()) @ b.double().t()
    of_slot = torch.tensor(slots)
    wide[of_slot == 1, :inner] += added[of_slot == 1]
    wide[of_slot == 2, inner:] += added[of_slot == 2]
    gate, up = wide.chunk(2, -1)
    exact = (F.silu(gate) * up).float()
    scale = {torch.float32: 1e-4, torch.bfloat16: 2e-2}[dtype] * exact.nan_to_num().abs().max()
    torch.testing.assert_close(out.float(), exact, atol=float(scale), rtol=0, equal_nan=True)


@pytest.mark.parametrize("width", [1, 15, 16, 100])
def test_the_best_is_the_first_of_the_greatest_unless_one_is_nan(kit: Kit, width: int) -> None:
    rows = normal(6, width).round()
    rows[1, -1] = NAN
    rows[2, 0] = -float("inf")
    rows[3, width // 2] = float("inf")
    best, highest = torch.full((6,), -1), torch.full((6,), NAN)
    kit("best", rows, 6, width, best, highest)
    found = rows.max(dim=-1)
    torch.testing.assert_close(highest, found.values, equal_nan=True, rtol=0, atol=0)
    is_number = ~highest.isnan()
    first = [
        row.tolist().index(value) for row, value in zip(rows[is_number], highest[is_number], strict=True)
    ]
    assert best[is_number].tolist() == first


@pytest.fixture(scope="module")
def decoder(toys: Toys) -> Decoder:
    return fuse_decoder(load_base(toys.base.path, torch.float32))


def logits_of(
    runner: NativeRunner, toys: Toys, limits: Limits, num_blocks: int, requests: list[EngineRequest]
) -> list[Tensor]:
    """Greedy answers of all, together: the logits of every token of each, ``[tokens, vocabulary]``."""
    scheduler = Scheduler(limits, BlockPool(num_blocks, PANEL))
    fitted = {key: runner.fit(weights.factors) for key, weights in toys.adapters.items()}
    found: dict[bytes, list[Tensor]] = {each.request_id: [] for each in requests}
    for each in requests:
        scheduler.add(each)
    while scheduler.num_running or scheduler.num_waiting:
        plan = scheduler.schedule(lambda _: True)
        used = {row.adapter_id: fitted[row.adapter_id] for row in plan.rows if row.adapter_id != ZERO_ID}
        logits = runner.run(plan, used).logits
        for row, row_logits in zip((row for row in plan.rows if row.samples), logits, strict=True):
            sequence = scheduler.sequence(row.request_id)
            sequence.tokens.append(int(row_logits.argmax()))
            found[row.request_id].append(row_logits)
            if sequence.num_generated == sequence.request.sampling.max_tokens:
                scheduler.remove(row.request_id)
    return [torch.stack(found[each.request_id]) for each in requests]


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    picks=st.lists(st.tuples(st.integers(0, 6), st.integers(1, 60)), min_size=2, max_size=9),
    max_batch_tokens=st.integers(3, 80),
    num_blocks=st.integers(7, 30),
    reuses_prefixes=st.booleans(),
    num_threads=st.sampled_from([1, 3]),
)
def test_logits_are_the_same_bits_alone_and_in_any_mix(
    toys: Toys,
    decoder: Decoder,
    picks: list[tuple[int, int]],
    max_batch_tokens: int,
    num_blocks: int,
    reuses_prefixes: bool,
    num_threads: int,
) -> None:
    """Whoever shares the batch, however prompts are cut, whatever is preempted, reused or lies in freed
    pages."""
    ids = [ZERO_ID, *toys.adapter_ids]
    prompts = [(ids[which], tuple((7 * i) % 250 + 3 for i in range(length))) for which, length in picks]
    together, alone = ([request(prompt, key, max_tokens=9) for key, prompt in prompts] for _ in range(2))
    assert KERNELS is not None
    runner = NativeRunner(decoder, num_blocks, KERNELS, num_threads)
    tight = Limits(max_batch_tokens=max_batch_tokens, max_length=80, reuses_prefixes=reuses_prefixes)
    mixed = logits_of(runner, toys, tight, num_blocks, together)
    roomy = Limits(max_batch_tokens=512, reuses_prefixes=False)
    lone = NativeRunner(decoder, 30, KERNELS, 1)
    for each, seen in zip(alone, mixed, strict=True):
        assert torch.equal(seen, logits_of(lone, toys, roomy, 30, [each])[0])


def test_the_kernels_say_what_torch_says(toys: Toys) -> None:
    ids = [ZERO_ID, *toys.adapter_ids]
    native, plain = toys.engine(), toys.engine(is_native=False)
    prompts = [tuple((11 * i + 5 * j) % 250 + 3 for j in range(1 + 9 * i)) for i in range(8)]
    answers = []
    for engine in (native, plain):
        requests = [request(prompt, ids[i % len(ids)]) for i, prompt in enumerate(prompts)]
        found = run(engine, requests)
        answers.append([found[each.request_id].token_ids for each in requests])
        engine.close()
    assert answers[0] == answers[1]
