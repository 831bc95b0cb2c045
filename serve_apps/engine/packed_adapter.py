"""An adapter in host memory as the kernels read it: one piece of memory, bf16 panels at their true ranks.

All its matrices are laid out by one call of a kernel, which holds no lock of Python and looks at every value
on the way. Panels are those of ``native_runner.in_panels``."""

import ctypes
import mmap
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from cluster.adapters import Factors, not_finite
from serve_apps.engine.native import library
from serve_apps.engine.native.library import PANEL, SLIM_PANEL

Part = tuple[str, Factors | None]  # a module of the base model, and its update


@dataclass(frozen=True, slots=True)
class PackedAdapter:
    """``updates`` is ``[layer][projection]`` and points into ``memory``."""

    updates: Any
    memory: Tensor

    @property
    def size_bytes(self) -> int:
        return self.memory.nbytes


@dataclass(frozen=True, slots=True)
class Projection:
    """A fused one: ``d_out`` of its parts, all but the last in whole panels. They lie one after the other, or
    panel by panel in turn."""

    sizes: tuple[int, ...]
    is_in_turn: bool = False

    def __post_init__(self) -> None:
        assert all(size % PANEL == 0 for size in self.sizes[:-1])

    def place(self, part: int) -> tuple[int, int]:
        """Number of a part's first panel, and the step from each to its next."""
        return (part, len(self.sizes)) if self.is_in_turn else (sum(self.sizes[:part]) // PANEL, 1)


def pack_adapter(
    kernels: ctypes.CDLL, updates: Sequence[Sequence[Part]], projections: Sequence[Projection]
) -> PackedAdapter:
    """The updates of every part of every fused projection, in one piece.

    Raises:
        Rejected: ``adapter_values``, where one is not finite.
    """
    packed = (library.Update * len(updates))()
    memory = zeroed(sum(size for parts in updates for size in _panel_bytes(parts)))
    end, matrices, modules = memory.data_ptr(), list[tuple[object, ...]](), list[str]()
    for update, parts, projection in zip(packed, updates, projections, strict=True):
        starts = []
        for size in _panel_bytes(parts):
            starts.append(end)
            end += size
        for number, ((module, factors), width) in enumerate(zip(parts, projection.sizes, strict=True)):
            if factors is not None:
                a, b = factors.a, factors.b
                rank, d_in = a.shape
                update.a = starts[0]
                start = starts[update.num_parts + 1]
                update.parts[update.num_parts] = library.Part(
                    start, update.rank, rank, *projection.place(number), width
                )
                matrices.append((library.address(a), starts[0], rank, d_in, update.rank, SLIM_PANEL))
                matrices.append((library.address(b), start, width, rank, 0, PANEL))
                modules += [module, module]
                update.rank += rank
                update.num_parts += 1
    laid = (library.Matrix * len(matrices))(*matrices)  # type: ignore[misc]
    first_bad = kernels.openledger_pack(laid, len(matrices))
    if first_bad < len(matrices):
        raise not_finite(modules[first_bad])
    return PackedAdapter(packed, memory)


def _panel_bytes(parts: Sequence[Part]) -> Iterator[int]:
    """What the first factors take together, then each second factor."""
    present = [factors for _, factors in parts if factors is not None]
    if present:
        yield _bytes_of(sum(each.a.shape[0] for each in present), present[0].a.shape[1], SLIM_PANEL)
    for each in present:
        yield _bytes_of(each.b.shape[0], each.b.shape[1], PANEL)


def _bytes_of(num_rows: int, depth: int, width: int) -> int:
    return 4 * -(-num_rows // width) * width * ((depth + 1) // 2)


def zeroed(num_bytes: int) -> Tensor:
    """Zeros, uint8, of the system and not of an allocator: all of it goes back at its end.

    In huge pages where the system gives them. Touching 10 MB for the first time takes 5 ms in small ones, and
    what lies anywhere in a large piece costs a walk of the page table each time, 10% of decode attention."""
    memory = mmap.mmap(-1, max(1, num_bytes), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=torch.uint8)
