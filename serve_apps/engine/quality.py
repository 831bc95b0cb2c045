"""What quantised weights lose: next-token distributions beside those of the unquantised model, at load.

Both models read the same fixed texts on the same device, and every token of a text is a place to compare.
The unquantised one stays where it was loaded and sends each weight over when its turn comes, so it need not
fit beside the other; nor does either need a cache of more than the texts."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from attribution.errors import Rejected
from attribution.types import ZERO_ID
from serve_apps.engine.decoder import Decoder, Linear, on_device
from serve_apps.engine.model_runner import ModelRunner
from serve_apps.engine.peers import ALONE, Peers
from serve_apps.engine.scheduler import Row, StepPlan

LONGEST = 64  # tokens taken of a text
# Answers are sold as the base model's, whatever it is stored as, so there is one limit for all: 0.1 nats are
# what temperature 0.8 differs from 1 by, and no more than every seventh token may be another one. Measured
# with SmolLM2-135M in fp32 on these texts: bf16 0.002 and 97%, 8 bits 0.005 and 97%, temperature 0.8 0.094;
# 4 bits 0.75 and 54%, which is another model. Larger bases bear 4 bits better.
MAX_MEAN_KL = 0.1
MIN_TOP_1 = 0.85
TEXTS = (
    "The harbour was quiet in the early morning. A few boats came back with their nets half full, and the "
    "women on the quay began to sort the fish before the first buyers arrived from the town.",
    "Photosynthesis turns light, water and carbon dioxide into sugar and oxygen. It happens in the "
    "chloroplasts of plant cells, where chlorophyll absorbs mostly red and blue light.",
    "def median(values):\n    ordered = sorted(values)\n    middle = len(ordered) // 2\n    "
    "if len(ordered) % 2:\n        return ordered[middle]\n    "
    "return (ordered[middle - 1] + ordered[middle]) / 2\n",
    "Question: A train leaves at 14:20 and travels 180 km at 90 km/h. When does it arrive?\nAnswer: It needs "
    "180 / 90 = 2 hours, so it arrives at 16:20.",
    '{"name": "Ada Lovelace", "born": 1815, "fields": ["mathematics", "computing"], "address": {"city": '
    '"London", "country": "United Kingdom"}}',
    "User: How do I keep basil alive in winter?\nAssistant: Put it on a sunny window sill, water it from "
    "below when the soil feels dry, and keep it away from cold draughts.",
    "Der Zug nach München fährt heute von Gleis sieben ab. Wir bitten um Entschuldigung für die Verspätung "
    "und danken Ihnen für Ihre Geduld.",
    "In 1969, Apollo 11 landed on the Moon. Neil Armstrong and Buzz Aldrin walked on its surface while "
    "Michael Collins stayed in orbit; all three returned to Earth on July 24.",
)


@dataclass(frozen=True, slots=True)
class Quality:
    """Over all places: how far the distribution is from the unquantised one, in nats, and how often the
    likeliest token is the same."""

    mean_kl: float
    top_1: float


def fixed_sequences(tokenizer: PreTrainedTokenizerBase) -> list[tuple[int, ...]]:
    return [tuple(tokenizer.encode(text, add_special_tokens=True))[:LONGEST] for text in TEXTS]


def check_quality(
    reference: Decoder, quantized: Decoder, sequences: Sequence[tuple[int, ...]], peers: Peers = ALONE
) -> Quality:
    """Compare them where ``quantized`` lies; parts of models with their ``peers``, each of whom calls this.

    Raises:
        Rejected: ``weights_quality``: it says something else too often.
    """
    found = compare(
        next_token_logits(_streamed(reference, quantized.device), sequences, peers),
        next_token_logits(quantized, sequences, peers),
    )
    # Written so that NaN is refused.
    if not (found.mean_kl <= MAX_MEAN_KL and found.top_1 >= MIN_TOP_1):
        raise Rejected(
            "weights_quality",
            f"quantised, the base model is {found.mean_kl:.4f} nats from itself, allowed are {MAX_MEAN_KL};"
            f" its likeliest token is the same {found.top_1:.1%} of the time, at least {MIN_TOP_1:.0%} are"
            " needed",
            field="engine.weights",
        )
    return found


def compare(reference: Tensor, other: Tensor) -> Quality:
    """Of logits ``[places, vocabulary]``."""
    expected, found = (logits.float().log_softmax(-1) for logits in (reference, other))
    kl = (expected.exp() * (expected - found)).sum(-1).mean()
    same = (expected.argmax(-1) == found.argmax(-1)).float().mean()
    return Quality(float(kl), float(same))


def next_token_logits(model: Decoder, sequences: Sequence[tuple[int, ...]], peers: Peers = ALONE) -> Tensor:
    """After every token of every sequence, ``[tokens, vocabulary]``: one step in which each token is a row of
    its own, and a sequence's rows share the block that they fill."""
    length = max(len(sequence) for sequence in sequences)
    rows = tuple(
        Row(
            request_id=bytes(32),
            adapter_id=ZERO_ID,
            token_ids=(token,),
            start=place,
            blocks=(block,),
            new_blocks=(block,) if place == 0 else (),
            samples=True,
        )
        for block, sequence in enumerate(sequences, start=1)
        for place, token in enumerate(sequence)
    )
    return ModelRunner(model, len(sequences) + 1, length, peers).run(StepPlan(rows), {}).logits


@dataclass(frozen=True, slots=True, eq=False)
class _Elsewhere:
    """A weight that is sent to ``device`` at each use and forgotten there."""

    weight: Tensor
    device: torch.device

    def dense(self) -> Tensor:
        return self.weight.to(self.device)


def _streamed(model: Decoder, device: torch.device) -> Decoder:
    """``model`` on ``device`` but for the weights of its projections."""
    if model.device == device:
        return model
    bare = replace(model, layers=tuple(replace(layer, projections={}) for layer in model.layers))
    moved = on_device(bare, device)
    layers = []
    for layer, there in zip(model.layers, moved.layers, strict=True):
        projections = {name: _sent(linear, device) for name, linear in layer.projections.items()}
        layers.append(replace(there, projections=projections))
    return replace(moved, layers=tuple(layers))


def _sent(linear: Linear, device: torch.device) -> Linear:
    bias = None if linear.bias is None else linear.bias.to(device)
    return Linear(_Elsewhere(linear.weight, device), bias)
