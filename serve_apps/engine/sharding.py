"""One rank's part of a decoder: some of the heads, of the inner width of the MLP and of the vocabulary.

``qkv`` and ``gate_up`` (or ``up``) keep the rows of their part, ``o`` and ``down`` the columns: so what one
projection gives is what the next takes, and a block has two sums over ranks. An adapter is cut the same way,
by the rows of ``b`` and the columns of ``a``: its part of a sum goes into that of the base model. Norms,
positions and the embedding are whole on every rank; the head has the rows of its part, zeros after the last.

Source: Megatron-LM, arXiv:1909.08053 §3."""

from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from attribution.errors import Rejected
from serve_apps.engine.decoder import Attention, Decoder, Layer, Linear, Part

TAKES_A_PART = ("o", "down")  # projections whose inputs are cut; their outputs are partial sums


def shard(model: Decoder, rank: int, num_ranks: int) -> Decoder:
    """Raises: Rejected, ``tensor_parallel``, where heads or the inner width do not divide."""
    if num_ranks == 1:
        return model
    shape = model.shape
    inner = model.layers[0].projections["down"].weight.shape[1]
    for what, number in (("key heads", shape.num_kv_heads), ("inputs of the MLP's last projection", inner)):
        if number % num_ranks:
            raise Rejected(
                "tensor_parallel",
                f"{number} {what} cannot be divided among {num_ranks} devices",
                field="engine.tensor_parallel",
            )
    heads, kv_heads = (_part(number, rank, num_ranks) for number in (shape.num_heads, shape.num_kv_heads))
    queries, keys = (_numbers(of, shape.head_dim) for of in (heads, kv_heads))
    within, first_key = _numbers(_part(inner, rank, num_ranks), 1), shape.num_heads * shape.head_dim
    first_value = first_key + shape.num_kv_heads * shape.head_dim
    kept = {
        "qkv": torch.cat((queries, first_key + keys, first_value + keys)),
        "o": queries,
        "gate_up": torch.cat((within, inner + within)),
        "up": within,
        "down": within,
    }
    attentions = {layer.attention: _attention(layer.attention, heads) for layer in model.layers}
    per_rank = -(-shape.vocabulary // num_ranks)
    head = model.head[rank * per_rank : (rank + 1) * per_rank]
    return replace(
        model,
        shape=replace(shape, num_heads=len(heads), num_kv_heads=len(kv_heads)),
        parts={name: _parts(parts, kept[name], name) for name, parts in model.parts.items()},
        layers=tuple(_layer(layer, attentions, kept, rank) for layer in model.layers),
        head=F.pad(head, (0, 0, 0, per_rank - len(head))),
    )


def _part(number: int, rank: int, num_ranks: int) -> range:
    size = number // num_ranks
    return range(rank * size, (rank + 1) * size)


def _numbers(of: range, width: int) -> Tensor:
    return torch.arange(of.start * width, of.stop * width)


def _attention(attention: Attention, heads: range) -> Attention:
    bias = attention.key_bias
    return replace(attention, key_bias=None if bias is None else bias[heads.start : heads.stop])


def _layer(layer: Layer, attentions: dict[Attention, Attention], kept: dict[str, Tensor], rank: int) -> Layer:
    projections = {name: _linear(each, name, kept[name], rank) for name, each in layer.projections.items()}
    return replace(layer, attention=attentions[layer.attention], projections=projections)


def _linear(linear: Linear, name: str, kept: Tensor, rank: int) -> Linear:
    """Copies, so that the whole can be let go. The bias of a sum over ranks is added by the first."""
    weight, bias = linear.weight, linear.bias
    kept = kept.to(weight.device)
    if name in TAKES_A_PART:
        return Linear(weight[:, kept], bias if rank == 0 else None)
    return Linear(weight[kept], None if bias is None else bias[kept])


def _parts(parts: tuple[Part, ...], kept: Tensor, name: str) -> tuple[Part, ...]:
    if name in TAKES_A_PART:
        return tuple(replace(part, inputs=kept) for part in parts)
    cut, start = [], 0
    for part in parts:
        rows = kept[(kept >= start) & (kept < start + part.d_out)] - start
        order = rows if part.order is None else part.order[rows]
        cut.append(replace(part, d_out=len(rows), order=order))
        start += part.d_out
    return tuple(cut)
