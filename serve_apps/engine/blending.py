"""Several adapters as one: their weighted updates, summed, are an update whose rank is the sum of theirs.

``w1 b1 a1 + w2 b2 a2 + …`` is ``[w1 b1, w2 b2, …] @ [a1; a2; …]``, but for the rounding of ``w b`` to bf16:
what PEFT calls ``add_weighted_adapter(combination_type="cat")``. So a blend is an adapter for everybody who
comes after the loader: it is cached, leased, batched and computed like one."""

import threading
from collections import OrderedDict
from collections.abc import Mapping, Sequence

import torch

from attribution.errors import Rejected
from attribution.types import PPM, Blend
from cluster.adapters import MAX_RANK, Factors

MAX_RECENT = 4096  # several times what an engine has running and waiting


class RecentBlends:
    """What was asked for lately, by id: a loader is given an id only. Any thread may call."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._blends: OrderedDict[bytes, Blend] = OrderedDict()

    def add(self, blend: Blend) -> None:
        with self._lock:
            self._blends[blend.blend_id] = blend
            self._blends.move_to_end(blend.blend_id)
            if len(self._blends) > MAX_RECENT:
                self._blends.popitem(last=False)

    def get(self, adapter_id: bytes) -> Blend | None:
        """None for an adapter that is no blend."""
        with self._lock:
            return self._blends.get(adapter_id)

    def holding(self, adapter_id: bytes) -> list[bytes]:
        """The ids of those that an adapter is part of."""
        with self._lock:
            blends = self._blends.items()
            return [key for key, blend in blends if any(p.adapter_id == adapter_id for p in blend.parts)]


def blended(adapters: Sequence[Mapping[str, Factors]], weights_ppm: Sequence[int]) -> dict[str, Factors]:
    """The factors of a blend; a module need not be in all of its parts.

    Raises:
        Rejected: ``blend_rank``: the ranks of a module sum to more than one adapter may have.
    """
    weighted = list(zip(adapters, weights_ppm, strict=True))
    modules = sorted({module for factors in adapters for module in factors})
    return {
        module: _side_by_side(module, [(f[module], w) for f, w in weighted if module in f])
        for module in modules
    }


def _side_by_side(module: str, parts: Sequence[tuple[Factors, int]]) -> Factors:
    rank = sum(factors.a.shape[0] for factors, _ in parts)
    if rank > MAX_RANK:
        raise Rejected(
            "blend_rank", f"{module}: ranks sum to {rank}, at most {MAX_RANK} is allowed", field="model"
        )
    return Factors(
        torch.cat([factors.a for factors, _ in parts]),
        torch.cat(
            [(factors.b.float() * (weight_ppm / PPM)).bfloat16() for factors, weight_ppm in parts], dim=1
        ),
    )
