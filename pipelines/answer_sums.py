"""The period's integer gradient sum of one adapter, in chunks that survive a crash.

A chunk is some answers of one adapter, and its sum is a file named by everything that decides it, so a job
that starts again finds what is done. Integer sums have no order: however the answers are cut and whoever adds
them, the total is the same."""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor, nn

from attribution.codec import Encoder
from attribution.errors import Corrupted
from attribution.gradients import Example, Factors, Lora, updated
from attribution.hashing import sha256
from attribution.index import Index
from attribution.influence import num_entries, weighted_query_sum
from attribution.types import PPM, ZERO_ID, Blend
from cluster.adapters import stored_factors
from cluster.storage import Storage

ANSWERS_PER_CHUNK = 16


@dataclass(frozen=True, slots=True)
class Answer:
    """One paid answer: its receipt, the tokens the engine saw and gave, its weight, and the blend that gave
    it, if one did."""

    receipt_id: bytes
    example: Example
    fee_gwei: int
    blend: Blend | None = None


@dataclass(frozen=True, slots=True)
class Chunk:
    """Answers whose sum is one file, all of the adapter alone or all of one blend. ``index_id`` names the
    model state, ``bits`` the fixed point."""

    index_id: bytes
    bits: int
    answers: tuple[Answer, ...]

    @property
    def blend(self) -> Blend | None:
        return self.answers[0].blend

    @property
    def key(self) -> str:
        blend_id = self.blend.blend_id if self.blend else ZERO_ID
        e = Encoder("openledger/answer-sum/2").id32(self.index_id).id32(blend_id).u64(self.bits)
        e.each(self.answers, lambda enc, answer: enc.id32(answer.receipt_id).u64(answer.fee_gwei))
        return f"answer_sums/{sha256(e.finish()).hex()}"


def chunks_of(index_id: bytes, bits: int, answers: Sequence[Answer]) -> list[Chunk]:
    """Cut by blend and receipt id, so that the same answers make the same chunks."""
    of_blend: dict[bytes, list[Answer]] = defaultdict(list)
    for answer in sorted(answers, key=lambda answer: answer.receipt_id):
        of_blend[answer.blend.blend_id if answer.blend else ZERO_ID].append(answer)
    return [
        Chunk(index_id, bits, tuple(found[at : at + ANSWERS_PER_CHUNK]))
        for _, found in sorted(of_blend.items())
        for at in range(0, len(found), ANSWERS_PER_CHUNK)
    ]


def store_sums(model: nn.Module, index: Index, storage: Storage, chunks: Sequence[Chunk]) -> int:
    """Work out and store the sums that are not stored yet; returns how many those were."""
    done = set(storage.list("answer_sums/"))
    missing = [chunk for chunk in chunks if chunk.key not in done]
    for chunk in missing:
        weighted = [(answer.example, answer.fee_gwei) for answer in chunk.answers]
        own, others = _blended(model, index, storage, chunk.blend)
        with updated(model, others):
            total = weighted_query_sum(model, own, weighted, chunk.bits)
        storage.put_if_absent(chunk.key, encode_sum(total))
    return len(missing)


def _blended(
    model: nn.Module, index: Index, storage: Storage, blend: Blend | None
) -> tuple[Sequence[Lora], list[Lora]]:
    """The index's own factors at every snapshot and, as they were published, those of the adapters that
    answered beside it: each at its weight."""
    if blend is None:
        return index.loras, []
    own_id, base_id = bytes.fromhex(index.card.adapter_id), bytes.fromhex(index.card.base_id)
    weights = {part.adapter_id: part.weight_ppm / PPM for part in blend.parts}
    shapes = {name: tuple(m.weight.shape) for name, m in model.named_modules() if isinstance(m, nn.Linear)}
    others: list[Lora] = []
    for adapter_id in sorted(weights.keys() - {own_id}):
        found = stored_factors(storage, adapter_id, base_id, shapes)
        others.append(
            {name: Factors(f.a.float(), f.b.float(), weights[adapter_id]) for name, f in found.items()}
        )
    own: list[Lora] = [
        {name: replace(factors, scale=factors.scale * weights[own_id]) for name, factors in lora.items()}
        for lora in index.loras
    ]
    return own, others


def total_sum(storage: Storage, chunks: Sequence[Chunk], loras: Sequence[Lora]) -> Tensor:
    """The sum over all chunks, int64 ``[snapshots * parameters]``."""
    total = torch.zeros(num_entries(loras), dtype=torch.int64)
    for chunk in chunks:
        part = decode_sum(storage.get(chunk.key))
        if len(part) != len(total):
            raise Corrupted(
                "sum_size", f"{chunk.key} holds {len(part)} entries, the adapter has {len(total)}"
            )
        total += part
    return total


def forget_sums(storage: Storage, chunks: Sequence[Chunk]) -> None:
    """Once the period is closed only the total may stay: a chunk covers too few answers to be kept."""
    for chunk in chunks:
        storage.delete(chunk.key)


def encode_sum(total: Tensor) -> bytes:
    """Little-endian int64, snapshot by snapshot, each in ``gradient_order`` of its factors."""
    return total.numpy().astype("<i8").tobytes()


def decode_sum(data: bytes) -> Tensor:
    if len(data) % 8:
        raise Corrupted("sum_size", f"{len(data)} bytes are no int64 array")
    return torch.from_numpy(np.frombuffer(data, "<i8").astype(np.int64))
