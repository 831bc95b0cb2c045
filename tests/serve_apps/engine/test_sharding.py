"""Ranks that each have a part of a model compute what one that has all of it computes, for every family."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from attribution.errors import Rejected
from attribution.types import ZERO_ID
from cluster.models import linear_shapes, load_base
from serve_apps.engine.decoder import Decoder
from serve_apps.engine.families import fuse_decoder
from serve_apps.engine.kv_cache import BlockPool
from serve_apps.engine.model_runner import ModelRunner
from serve_apps.engine.peers import ALONE, Group, Peers
from serve_apps.engine.quality import next_token_logits
from serve_apps.engine.scheduler import Limits, Scheduler, StepPlan
from serve_apps.engine.sharding import shard
from tests import toy_families, toy_models
from tests.serve_apps.conftest import request as ask

TOYS = toy_families.toys()
ADAPTER_IDS = (bytes([1]) * 32, bytes([2]) * 32)
BLOCK, NUM_BLOCKS = 4, 120
# Partial sums; in bf16 each of them is rounded once more.
CLOSE = {torch.float32: {"atol": 1e-4, "rtol": 1e-4}, torch.bfloat16: {"atol": 0.3, "rtol": 0.1}}
CPU = torch.device("cpu")


def plans(max_batch_tokens: int) -> list[StepPlan]:
    """Chunks, then decoding, of the base model and two adapters; what is said next is fixed."""
    scheduler, found = Scheduler(Limits(max_batch_tokens=max_batch_tokens), BlockPool(NUM_BLOCKS, BLOCK)), []
    for i, length in enumerate((1, 5, 30, 17, 9, 2)):
        prompt = tuple((11 * j + 3 * length) % (toy_families.VOCABULARY - 3) + 3 for j in range(length))
        scheduler.add(ask(prompt, (ZERO_ID, *ADAPTER_IDS)[i % 3]))
    while scheduler.num_running or scheduler.num_waiting:
        found.append(scheduler.schedule(lambda _: True))
        for row in found[-1].rows:
            if row.samples:
                sequence = scheduler.sequence(row.request_id)
                sequence.tokens.append(5 + row.end % 40)
                if sequence.num_generated == 3:
                    scheduler.remove(row.request_id)
    return found


def logits(model: Decoder, folder: Path, max_batch_tokens: int, peers: Peers) -> list[Tensor]:
    """Of every step, by the rank of ``peers``."""
    part = shard(model, peers.rank, peers.num_ranks)
    runner = ModelRunner(part, NUM_BLOCKS, BLOCK, peers)
    adapters = {
        key: runner.fit(toy_models.random_adapter(ZERO_ID, linear_shapes(folder), rank, rank, 0.3).factors)
        for key, rank in zip(ADAPTER_IDS, (2, 5), strict=True)
    }
    return [runner.run(plan, adapters).logits for plan in plans(max_batch_tokens)]


def on_two_ranks(compute: object) -> list[list[Tensor]]:
    """On two threads, which meet as processes would."""
    store = dist.HashStore()

    def of(rank: int) -> list[Tensor]:
        return compute(Group(store, rank, 2, CPU))  # type: ignore[operator, no-any-return]

    with ThreadPoolExecutor(2) as threads:
        return list(threads.map(of, range(2)))


def is_divisible(name: str) -> bool:
    return name != "falcon 7b"  # one key head


@pytest.mark.parametrize("name", filter(is_divisible, TOYS))
@pytest.mark.parametrize("max_batch_tokens", [200, 13], ids=["whole prompts", "chunks"])
def test_two_parts_compute_what_the_whole_does(name: str, max_batch_tokens: int, tmp_path: Path) -> None:
    """Grouped queries, adapters on every linear, one with a vocabulary that does not divide (97)."""
    folder = toy_families.save(TOYS[name].config, tmp_path)
    model = fuse_decoder(load_base(folder, torch.float32))
    expected = logits(model, folder, max_batch_tokens, ALONE)
    for found in on_two_ranks(lambda peers: logits(model, folder, max_batch_tokens, peers)):
        for ours, theirs in zip(found, expected, strict=True):
            assert ours.shape == theirs.shape
            torch.testing.assert_close(ours, theirs, **CLOSE[torch.float32])


def test_in_bf16_they_stay_near(tmp_path: Path) -> None:
    folder = toy_families.save(TOYS["llama3"].config, tmp_path)
    model = fuse_decoder(load_base(folder, torch.bfloat16))
    expected = logits(model, folder, 200, ALONE)
    for found in on_two_ranks(lambda peers: logits(model, folder, 200, peers)):
        for ours, theirs in zip(found, expected, strict=True):
            torch.testing.assert_close(ours, theirs, **CLOSE[torch.bfloat16])


def test_parts_take_no_more_than_their_part(tmp_path: Path) -> None:
    model = fuse_decoder(load_base(toy_families.save(TOYS["llama"].config, tmp_path), torch.float32))
    for rank in range(2):
        for part, whole in zip(shard(model, rank, 2).layers, model.layers, strict=True):
            for name, linear in part.projections.items():
                assert linear.weight.untyped_storage().nbytes() * 2 == whole.projections[name].weight.nbytes


def test_all_ranks_know_the_same_of_quality(tmp_path: Path) -> None:
    """The gate of quantised weights works on parts as on a whole."""
    model = fuse_decoder(load_base(toy_families.save(TOYS["qwen2"].config, tmp_path), torch.float32))
    sequences = [(5, 9, 7, 30), (8, 3)]
    expected = next_token_logits(model, sequences)
    for (found,) in on_two_ranks(
        lambda peers: [next_token_logits(shard(model, peers.rank, 2), sequences, peers)]
    ):
        torch.testing.assert_close(found, expected, **CLOSE[torch.float32])


@pytest.mark.parametrize(
    ("name", "num_ranks", "reason"), [("falcon 7b", 2, "1 key heads"), ("llama", 3, "2 key heads")]
)
def test_what_does_not_divide_is_refused(name: str, num_ranks: int, reason: str, tmp_path: Path) -> None:
    model = fuse_decoder(load_base(toy_families.save(TOYS[name].config, tmp_path), torch.float32))
    with pytest.raises(Rejected, match=f"{reason} cannot be divided among {num_ranks}") as refused:
        shard(model, 0, num_ranks)
    assert (refused.value.code, refused.value.field) == ("tensor_parallel", "engine.tensor_parallel")
