"""The base model's projections in 8 or 4 bits: a step of few rows reads every weight once, so it takes half
or a quarter of the time, and the model half or a quarter of the memory.

Weights only, symmetric, rounded to nearest: 8 bits with a scale per output, 4 bits with a scale per output
and ``GROUP`` inputs. Activations, norms, the cache and adapters stay as they are, so an adapter is added as
to an unquantised base. Embedding and head stay, too: the embedding is read a row per token, and the head's
rounding goes into the logits unaveraged by anything after it, for 6% of the weights of an 8B Llama.

``quality.py`` measures what is lost and refuses too much of it. ``dense`` is the oracle of the kernels in
``cuda/weights.py`` and what runs in torch."""

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from serve_apps.engine.decoder import Decoder, Linear, on_device

GROUP = 128  # inputs that share a scale in 4 bits; weights are padded to a multiple of it
HALF = GROUP // 2
BITS: Mapping[str, int] = {"int8": 8, "int4": 4}


@dataclass(frozen=True, slots=True, eq=False)
class Quantized:
    """``[d_out, d_in]`` as integers.

    In 8 bits ``values`` is int8 ``[d_out, padded d_in]`` of -127 to 127 and ``scales`` is ``[d_out, 1]``. In
    4 bits ``values`` is uint8 ``[d_out, padded d_in / 2]`` and ``scales`` is ``[d_out, groups]``; byte ``i``
    of a group holds numbers ``i`` (its low half) and ``i + 64``, -7 to 7 with 8 added, so that each half of a
    group is multiplied as it lies. Scales are fp32."""

    values: Tensor
    scales: Tensor
    d_in: int
    dtype: torch.dtype  # of the weight that this stands for

    @property
    def bits(self) -> int:
        return 8 if self.values.dtype == torch.int8 else 4

    @property
    def num_bytes(self) -> int:
        return self.values.nbytes + self.scales.nbytes

    def dense(self) -> Tensor:
        """The weight again, in its own type."""
        numbers = self.values
        if self.bits == 4:
            halves = torch.stack((numbers.view(-1, HALF) & 15, numbers.view(-1, HALF) >> 4), dim=1)
            numbers = (halves.to(torch.int8) - 8).view(len(numbers), -1)
        grouped = numbers.view(*self.scales.shape, -1)
        return (grouped * self.scales.unsqueeze(-1)).flatten(1)[:, : self.d_in].to(self.dtype)


def quantize(weight: Tensor, bits: int) -> Quantized:
    """Every number to the nearest multiple of its scale, which puts the largest at the end of the range."""
    assert bits in BITS.values()
    d_out, d_in = weight.shape
    padded = F.pad(weight.float(), (0, -d_in % GROUP))
    grouped = padded.view(d_out, 1 if bits == 8 else -1, padded.shape[1] if bits == 8 else GROUP)
    largest = 2 ** (bits - 1) - 1
    scales = grouped.abs().amax(-1) / largest
    scales = torch.where(scales == 0, 1.0, scales)
    numbers = (grouped / scales.unsqueeze(-1)).round().to(torch.int8)
    if bits == 8:
        return Quantized(numbers.flatten(1), scales, d_in, weight.dtype)
    low, high = (numbers + 8).to(torch.uint8).split(HALF, dim=-1)
    return Quantized((low | high << 4).flatten(1), scales, d_in, weight.dtype)


def quantize_decoder(model: Decoder, bits: int, device: torch.device) -> Decoder:
    """``model`` on ``device`` with its projections quantised. Each is sent there alone: what does not fit
    unquantised need not."""

    def small(linear: Linear) -> Linear:
        return Linear(quantize(linear.weight.to(device), bits), linear.bias)

    layers = tuple(
        replace(layer, projections={name: small(linear) for name, linear in layer.projections.items()})
        for layer in model.layers
    )
    return on_device(replace(model, layers=layers), device)
