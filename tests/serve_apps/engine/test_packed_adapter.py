"""Packing adapters: the obvious layout, every bad value noticed, and nothing believed before its hash."""

import threading
from pathlib import Path

import pytest
import torch
from torch import Tensor

from attribution.errors import Corrupted, Refusal, Rejected
from attribution.hashing import sha256
from cluster.adapters import Factors, adapter_key, pack, store_adapter
from cluster.storage import DirectoryStorage
from serve_apps.engine.adapter_cache import CacheLimits
from serve_apps.engine.blending import RecentBlends
from serve_apps.engine.loading import adapter_loader
from serve_apps.engine.native.library import PANEL, SLIM_PANEL, load_kernels
from serve_apps.engine.native_runner import in_panels
from serve_apps.engine.packed_adapter import PackedAdapter, Projection, pack_adapter
from tests import toy_models
from tests.serve_apps.conftest import Toys, request, run

BASE, SHAPES = sha256(b"base"), {"q": (32, 37), "k": (10, 37)}
SIZES = (32, 10)


def packed(factors: dict[str, Factors]) -> PackedAdapter:
    kernels = load_kernels()
    assert kernels is not None
    return pack_adapter(kernels, [[(name, factors.get(name)) for name in ("q", "k")]], [Projection(SIZES)])


def normal(*size: int) -> Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(sum(size))).bfloat16()


def factors_of(q_rank: int, k_rank: int) -> dict[str, Factors]:
    ranks = {"q": q_rank, "k": k_rank}
    return {
        name: Factors(normal(rank, 37), normal(size, rank))
        for (name, rank), size in zip(ranks.items(), SIZES, strict=True)
        if rank
    }


@pytest.mark.parametrize(("q_rank", "k_rank"), [(1, 0), (0, 1), (1, 1), (3, 5), (8, 8), (16, 2), (17, 31)])
def test_panels_are_those_of_the_slow_way(q_rank: int, k_rank: int) -> None:
    factors = factors_of(q_rank, k_rank)
    parts = list(factors.values())
    slow = [in_panels(torch.cat([part.a for part in parts]), SLIM_PANEL)]
    slow += [in_panels(part.b, PANEL) for part in parts]
    whole = torch.cat([panels.flatten() for panels in slow])
    assert torch.equal(packed(factors).memory.view(torch.bfloat16), whole)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("name", ["q", "k"])
def test_no_value_that_is_not_finite_is_overlooked(name: str, value: float) -> None:
    for which in ("a", "b"):
        for index in (0, 1, 18, -1):
            factors = factors_of(3, 5)
            getattr(factors[name], which).view(-1)[index] = value
            with pytest.raises(Rejected, match=f"^{name} ") as refused:
                packed(factors)
            assert refused.value.code == "adapter_values"
    largest = torch.finfo(torch.bfloat16)
    factors = factors_of(3, 5)
    for extreme in (largest.max, largest.min, largest.tiny, -0.0):
        factors[name].a[:] = extreme
        packed(factors)


class Files(DirectoryStorage):
    """A directory that can be made to answer late."""

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        self.may_answer = threading.Event()
        self.may_answer.set()
        self.num_read = 0

    def map(self, key: str) -> memoryview:
        self.num_read += 1
        assert self.may_answer.wait(10)
        return super().map(key)


@pytest.fixture
def files(tmp_path: Path) -> Files:
    return Files(tmp_path)


def load(files: Files, adapter_id: bytes) -> PackedAdapter | Refusal:
    try:
        return adapter_loader(files, BASE, SHAPES, packed, RecentBlends())(adapter_id).value  # type: ignore[arg-type, return-value]
    except Refusal as refusal:
        return refusal


@pytest.mark.parametrize("change", ["none", "one bit", "cut", "longer", "empty", "nan", "pickle"])
def test_a_file_without_its_hash_is_corrupted_whatever_else_is_wrong_with_it(
    files: Files, change: str
) -> None:
    good = pack(toy_models.random_adapter(BASE, SHAPES))
    adapter_id = store_adapter(files, good)
    changed = {
        "none": good,
        "one bit": good[:-1] + bytes([good[-1] ^ 1]),
        "cut": good[:-2],
        "longer": good + b"\0\0",
        "empty": b"",
        "nan": good[:-2] + b"\xc0\x7f",
        "pickle": b"\x80\x04K\x01.",
    }[change]
    files.put(adapter_key(adapter_id), changed)
    found = load(files, adapter_id)
    if change == "none":
        assert isinstance(found, PackedAdapter)
    else:
        assert isinstance(found, Corrupted) and found.code == "adapter_hash"
        found = load(files, store_adapter(files, changed))  # under its own hash, the fault itself is named
        codes = {"one bit": None, "nan": "adapter_values"}
        assert getattr(found, "code", None) == codes.get(change, "not_safetensors")


def test_cold_adapters_load_side_by_side_and_slow_storage_delays_no_other(toys: Toys, files: Files) -> None:
    """The base model answers while both files are still being read; then both adapters do."""
    for weights in toys.adapters.values():
        store_adapter(files, pack(weights))
    engine = Toys(toys.base, files, toys.adapters).engine(adapters=CacheLimits(num_loaders=2))
    expected = toys.engine()
    files.may_answer.clear()
    cold = [request((5, 6, 7), adapter_id) for adapter_id in toys.adapter_ids[:2]]
    warm = request((5, 6, 7))
    for each in cold:
        engine.submit(each)
    answers = run(engine, [warm])
    assert files.num_read == 2 and set(answers) == {warm.request_id}
    files.may_answer.set()
    again = [request((5, 6, 7), each.adapter_id) for each in cold]
    told = run(engine, again)
    reference = [request((5, 6, 7), each.adapter_id) for each in cold]
    alone = run(expected, reference)
    for one, other in zip(again, reference, strict=True):
        assert told[one.request_id].token_ids == alone[other.request_id].token_ids
    assert files.num_read == 2
    engine.close()
    expected.close()
