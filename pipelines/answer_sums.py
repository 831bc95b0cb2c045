"""The period's integer gradient sum of one adapter, in chunks that survive a crash.

A chunk is some answers of one adapter, and its sum is a file named by everything that decides it, so a job
that starts again finds what is done. Integer sums have no order: however the answers are cut and whoever adds
them, the total is the same."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from attribution.codec import Encoder
from attribution.errors import Corrupted
from attribution.gradients import Example, Lora
from attribution.hashing import sha256
from attribution.influence import num_entries, weighted_query_sum
from cluster.storage import Storage

ANSWERS_PER_CHUNK = 16


@dataclass(frozen=True, slots=True)
class Answer:
    """One paid answer: its receipt, the tokens the engine saw and gave, and its weight."""

    receipt_id: bytes
    example: Example
    fee_gwei: int


@dataclass(frozen=True, slots=True)
class Chunk:
    """Answers whose sum is one file. ``index_id`` names the model state, ``bits`` the fixed point."""

    index_id: bytes
    bits: int
    answers: tuple[Answer, ...]

    @property
    def key(self) -> str:
        e = Encoder("openledger/answer-sum/1").id32(self.index_id).u64(self.bits)
        e.each(self.answers, lambda enc, answer: enc.id32(answer.receipt_id).u64(answer.fee_gwei))
        return f"answer_sums/{sha256(e.finish()).hex()}"


def chunks_of(index_id: bytes, bits: int, answers: Sequence[Answer]) -> list[Chunk]:
    """Cut by receipt id, so that the same answers make the same chunks."""
    ordered = sorted(answers, key=lambda answer: answer.receipt_id)
    starts = range(0, len(ordered), ANSWERS_PER_CHUNK)
    return [Chunk(index_id, bits, tuple(ordered[at : at + ANSWERS_PER_CHUNK])) for at in starts]


def store_sums(model: nn.Module, loras: Sequence[Lora], storage: Storage, chunks: Sequence[Chunk]) -> int:
    """Work out and store the sums that are not stored yet; returns how many those were."""
    done = set(storage.list("answer_sums/"))
    missing = [chunk for chunk in chunks if chunk.key not in done]
    for chunk in missing:
        weighted = [(answer.example, answer.fee_gwei) for answer in chunk.answers]
        storage.put_if_absent(chunk.key, encode_sum(weighted_query_sum(model, loras, weighted, chunk.bits)))
    return len(missing)


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
