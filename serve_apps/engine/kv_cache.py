"""Who owns which block of the paged key-value cache. Integers and hashes only; the tensors are the runner's.

Block 0 is never handed out: it stays all zeros and pads the tables of short rows. A block that is full and
computed may be published under the hash of all that its contents depend on (``next_key``); whoever needs the
same contents takes it again, while it has an owner or until it is overwritten, least recently used first."""

from array import array
from collections import OrderedDict, deque
from collections.abc import Sequence

from attribution.hashing import sha256

NULL_BLOCK = 0


class BlockPool:
    """A fixed number of blocks of ``block_size`` tokens; a block has owners or is free. Only a published
    block has several, and nobody writes to it."""

    def __init__(self, num_blocks: int, block_size: int) -> None:
        assert num_blocks > 1 and block_size > 0
        self.num_blocks = num_blocks
        self.block_size = block_size
        self._blank = deque(range(1, num_blocks))
        self._kept: OrderedDict[int, None] = OrderedDict()  # free but published, least recently used first
        self._num_owners = [0] * num_blocks
        self._block_of: dict[bytes, int] = {}
        self._key_of: dict[int, bytes] = {}

    @property
    def num_free(self) -> int:
        return len(self._blank) + len(self._kept)

    @property
    def capacity_tokens(self) -> int:
        return (self.num_blocks - 1) * self.block_size

    def blocks_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self.block_size)

    def grow(self, blocks: list[int], num_tokens: int) -> bool:
        """Extend ``blocks`` until it holds ``num_tokens``; all or nothing, and says which."""
        missing = self.blocks_for(num_tokens) - len(blocks)
        if missing > self.num_free:
            return False
        blocks.extend(self._take() for _ in range(missing))
        return True

    def publish(self, block: int, key: bytes) -> None:
        """Let others find the computed contents of ``block``; of two blocks with one key the first stays."""
        if key not in self._block_of and block not in self._key_of:
            self._block_of[key], self._key_of[block] = block, key

    def reuse(self, blocks: list[int], keys: Sequence[bytes]) -> int:
        """Extend ``blocks`` by those published under ``keys``, up to the first that is not; how many."""
        for number, key in enumerate(keys):
            block = self._block_of.get(key)
            if block is None:
                return number
            self._kept.pop(block, None)
            self._num_owners[block] += 1
            blocks.append(block)
        return len(keys)

    def free(self, blocks: list[int]) -> None:
        """Give every block up and empty the list, so that no owner can free twice. The end of a sequence is
        forgotten before its beginning, which more requests share."""
        assert NULL_BLOCK not in blocks
        for block in reversed(blocks):
            assert self._num_owners[block] > 0
            self._num_owners[block] -= 1
            if not self._num_owners[block]:
                if block in self._key_of:
                    self._kept[block] = None
                else:
                    self._blank.append(block)
        blocks.clear()

    def _take(self) -> int:
        if self._blank:
            block = self._blank.popleft()
        else:
            block, _ = self._kept.popitem(last=False)
            del self._block_of[self._key_of.pop(block)]
        self._num_owners[block] = 1
        return block


def root_key(tenant: str, adapter_id: bytes) -> bytes:
    """Where the keys of a sequence's blocks begin: what they depend on beside its tokens, and whom they are
    for. An engine has one base model. A tenant finds its own blocks only, or the time to the first token
    would tell what others ask."""
    return sha256(b"openledger/prefix/1" + adapter_id + tenant.encode())


def public_root_key(adapter_id: bytes) -> bytes:
    """The same for the blocks of a prefix that was published with the adapter: they are for everybody."""
    return sha256(b"openledger/public-prefix/1" + adapter_id)


def branch_key(parent: bytes, tenant: str) -> bytes:
    """Where a tenant's own blocks go on from public ones."""
    return sha256(b"openledger/prefix-branch/1" + parent + tenant.encode())


def next_key(parent: bytes, tokens: Sequence[int]) -> bytes:
    """The key of a full block: by the key of the block before it, every token up to its own end."""
    return sha256(parent + array("I", tokens).tobytes())


def slots(blocks: Sequence[int], start: int, end: int, block_size: int) -> list[int]:
    """Places of tokens ``start`` to ``end`` of a row in the flat cache."""
    return [blocks[t // block_size] * block_size + t % block_size for t in range(start, end)]
