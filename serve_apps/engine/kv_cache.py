"""Who owns which block of the paged key-value cache. Integers only; the tensors are the model runner's.

Block 0 is never handed out: it stays all zeros and pads the tables of short rows."""

from collections import deque
from collections.abc import Sequence

NULL_BLOCK = 0


class BlockPool:
    """A fixed number of blocks of ``block_size`` tokens; a block has one owner or is free."""

    def __init__(self, num_blocks: int, block_size: int) -> None:
        assert num_blocks > 1 and block_size > 0
        self.num_blocks = num_blocks
        self.block_size = block_size
        self._free = deque(range(1, num_blocks))

    @property
    def num_free(self) -> int:
        return len(self._free)

    @property
    def capacity_tokens(self) -> int:
        return (self.num_blocks - 1) * self.block_size

    def blocks_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self.block_size)

    def grow(self, blocks: list[int], num_tokens: int) -> bool:
        """Extend ``blocks`` until it holds ``num_tokens``; all or nothing, and says which."""
        missing = self.blocks_for(num_tokens) - len(blocks)
        if missing > len(self._free):
            return False
        blocks.extend(self._free.popleft() for _ in range(missing))
        return True

    def free(self, blocks: list[int]) -> None:
        """Take every block back and empty the list, so that no owner can free twice."""
        assert NULL_BLOCK not in blocks
        self._free.extend(blocks)
        blocks.clear()


def slots(blocks: Sequence[int], start: int, end: int, block_size: int) -> list[int]:
    """Places of tokens ``start`` to ``end`` of a row in the flat cache."""
    return [blocks[t // block_size] * block_size + t % block_size for t in range(start, end)]
