"""OpenZeppelin's StandardMerkleTree: double-hashed leaves, sorted, in a heap whose pairs are hashed in sorted
order.

Whoever holds the same set of leaves computes the same root, whatever order they came in. The double hash
keeps a 64-byte inner node from being passed off as a leaf. Format: npm ``@openzeppelin/merkle-tree`` 1.0.8;
the contracts verify with OpenZeppelin's ``MerkleProof``. Vectors that both sides check:
``tests/vectors/merkle.json``."""

from collections.abc import Sequence
from dataclasses import dataclass

from attribution.errors import Rejected
from attribution.hashing import keccak256

EMPTY_ROOT = bytes(32)


def receipt_leaf(receipt_id: bytes) -> bytes:
    """``keccak(keccak(abi.encode(bytes32)))``."""
    assert len(receipt_id) == 32
    return keccak256(keccak256(receipt_id))


def reward_leaf(chain_id: int, distributor: bytes, contributor_id: bytes, cumulative_wei: int) -> bytes:
    """``keccak(keccak(abi.encode(uint256 chainId, address distributor, bytes32 contributorId, uint256
    cumulativeWei)))``."""
    assert len(distributor) == 20 and len(contributor_id) == 32
    words = (
        chain_id.to_bytes(32, "big")
        + distributor.rjust(32, b"\0")
        + contributor_id
        + cumulative_wei.to_bytes(32, "big")
    )
    return keccak256(keccak256(words))


@dataclass(frozen=True, slots=True)
class MerkleTree:
    """``nodes[0]`` is the root; leaf ``i`` of the sorted leaves stands at ``len(nodes) - 1 - i``."""

    nodes: tuple[bytes, ...]

    @property
    def root(self) -> bytes:
        return self.nodes[0] if self.nodes else EMPTY_ROOT

    def proof(self, leaf: bytes) -> tuple[bytes, ...]:
        """Siblings from the leaf up. ``Rejected`` if the leaf is not in the tree."""
        num_leaves = (len(self.nodes) + 1) // 2
        first = len(self.nodes) - num_leaves
        try:
            index = self.nodes.index(leaf, first)
        except ValueError:
            raise Rejected(
                "not_in_tree", f"leaf {leaf.hex()} is not under root {self.root.hex()}", field="leaf"
            ) from None
        siblings = []
        while index > 0:
            siblings.append(self.nodes[index + 1 if index % 2 else index - 1])
            index = (index - 1) // 2
        return tuple(siblings)


def merkle_tree(leaves: Sequence[bytes]) -> MerkleTree:
    """Build over leaves that are already double-hashed. No leaves give the zero root."""
    if not leaves:
        return MerkleTree(())
    nodes = [b""] * (2 * len(leaves) - 1)
    for i, leaf in enumerate(sorted(leaves)):
        nodes[len(nodes) - 1 - i] = leaf
    for i in range(len(nodes) - 1 - len(leaves), -1, -1):
        nodes[i] = _pair(nodes[2 * i + 1], nodes[2 * i + 2])
    return MerkleTree(tuple(nodes))


def verify(root: bytes, leaf: bytes, proof: Sequence[bytes]) -> bool:
    """The contract's check."""
    for sibling in proof:
        leaf = _pair(leaf, sibling)
    return leaf == root


def _pair(a: bytes, b: bytes) -> bytes:
    return keccak256(a + b if a < b else b + a)
