"""A plan as integers on the device: all that a step needs beside weights, adapters and the cache.

They lie in one tensor, so that a step costs one copy; a captured step reads the same tensor at every
replay."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from serve_apps.engine.cuda.attention import QueryTiles
from serve_apps.engine.cuda.lora import DeviceAdapter, Tiles, cut
from serve_apps.engine.kv_cache import NULL_BLOCK, slots
from serve_apps.engine.scheduler import StepPlan


@dataclass(frozen=True, slots=True)
class Sizes:
    """Of the parts of a step; with equal sizes goes an equal sequence of launches."""

    num_tokens: int
    num_sampled: int
    num_lora_tiles: int
    num_query_tiles: int
    num_rows: int
    table_width: int

    @staticmethod
    def decoding(num_rows: int, num_lora_tiles: int, table_width: int) -> "Sizes":
        """Of rows of one token that all sample."""
        return Sizes(num_rows, num_rows, num_lora_tiles, num_rows, num_rows, table_width)

    @property
    def parts(self) -> tuple[int, ...]:
        tokens, tables = self.num_tokens, self.num_rows * self.table_width
        return (
            tokens,
            tokens,
            tokens,
            self.num_sampled,
            3 * self.num_lora_tiles,
            4 * self.num_query_tiles,
            tables,
        )


@dataclass(frozen=True, slots=True)
class Step:
    """Views of one int64 tensor; ``longest``: no sequence of the step has more tokens."""

    token_ids: Tensor
    positions: Tensor
    slots: Tensor
    sampled: Tensor
    lora: Tiles
    queries: QueryTiles
    longest: int

    @staticmethod
    def of(numbers: Tensor, sizes: Sizes, block_size: int) -> "Step":
        tokens, positions, places, sampled, lora, queries, tables = numbers.split(sizes.parts)
        first, count, start, row = queries.view(4, sizes.num_query_tiles)
        return Step(
            tokens,
            positions,
            places,
            sampled,
            Tiles(*lora.view(3, sizes.num_lora_tiles)),
            QueryTiles(first, count, start, row, tables.view(-1, sizes.table_width)),
            sizes.table_width * block_size,
        )


@dataclass(frozen=True, slots=True)
class Numbers:
    """A plan in lists, as ``Step`` names them; tiles and tables as tuples."""

    token_ids: list[int]
    positions: list[int]
    slots: list[int]
    sampled: list[int]
    lora: list[tuple[int, int, int]]
    queries: list[tuple[int, int, int, int]]
    tables: list[tuple[int, ...]]

    @staticmethod
    def of(
        plan: StepPlan, adapters: Mapping[bytes, DeviceAdapter], tile_tokens: int, block_size: int
    ) -> "Numbers":
        """``tile_tokens``: how many tokens of a sequence share a tile of queries."""
        numbers = Numbers([], [], [], [], [], [], [])
        for index, row in enumerate(plan.rows):
            first = len(numbers.token_ids)
            numbers.token_ids.extend(row.token_ids)
            numbers.positions.extend(range(row.start, row.end))
            numbers.slots.extend(slots(row.blocks, row.start, row.end, block_size))
            numbers.tables.append(row.blocks[: -(-row.end // block_size)])
            for done in range(0, len(row.token_ids), tile_tokens):
                count = min(tile_tokens, len(row.token_ids) - done)
                numbers.queries.append((first + done, count, row.start + done, index))
            if row.samples:
                numbers.sampled.append(len(numbers.token_ids) - 1)
        numbers.lora.extend(cut([(start, end, adapters[key].address) for key, start, end in plan.segments]))
        return numbers

    @property
    def sizes(self) -> Sizes:
        return Sizes(
            len(self.token_ids),
            len(self.sampled),
            len(self.lora),
            len(self.queries),
            len(self.tables),
            max((len(table) for table in self.tables), default=0),
        )

    def padded(self, num_rows: int) -> "Numbers":
        """With rows that write to the null block, and see there what they wrote; every row samples."""
        more = range(len(self.token_ids), num_rows)
        nothing = [0 for _ in more]
        return Numbers(
            self.token_ids + nothing,
            self.positions + nothing,
            self.slots + [NULL_BLOCK for _ in more],
            list(range(num_rows)),
            self.lora,
            self.queries + [(row, 1, 0, row) for row in more],
            self.tables + [(NULL_BLOCK,) for _ in more],
        )

    def write(self, numbers: Tensor, sizes: Sizes) -> None:
        """Into a zeroed tensor on the host; what ``sizes`` has more stays zero: no tiles, the null block."""
        place = 0
        parts = (self.token_ids, self.positions, self.slots, self.sampled, self.lora, self.queries)
        for part, size in zip(parts, sizes.parts, strict=False):
            if part:
                values = torch.tensor(part, dtype=torch.int64)
                by_column = values.t() if values.dim() == 2 else values.unsqueeze(0)
                room = numbers[place : place + size].view(len(by_column), -1)
                room[:, : by_column.shape[1]] = by_column
            place += size
        used = self.sizes.table_width
        padded = [(*table, *[NULL_BLOCK] * (used - len(table))) for table in self.tables]
        numbers[place:].view(-1, sizes.table_width)[:, :used] = torch.tensor(padded, dtype=torch.int64)
