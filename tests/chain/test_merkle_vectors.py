"""OpenZeppelin's JavaScript, our Python and the contract build and accept the same trees.

The vectors are written by ``tests/vectors/make_merkle.cjs``."""

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest

from attribution.errors import Rejected
from attribution.merkle import merkle_tree, receipt_leaf, reward_leaf, verify
from attribution.payload import WEI_PER_GWEI
from attribution.types import contributor_id
from chain.structs import ClaimCall
from chain.toolchain import Toolchain
from tests.chain.refusals import refused
from tests.chain.stage import Stage, set_stage

FOLDER = Path(__file__).parent.parent / "vectors"
VECTORS: dict[str, Any] = json.loads((FOLDER / "merkle.json").read_text())
DISTRIBUTOR = bytes.fromhex(VECTORS["distributor"][2:])


def raw(text: str) -> bytes:
    return bytes.fromhex(text[2:])


def proof_of(entry: dict[str, Any]) -> tuple[bytes, ...]:
    return tuple(raw(node) for node in entry["proof"])


@pytest.mark.parametrize("kind", ["rewards", "receipts"])
def test_python_builds_openzeppelins_trees(kind: str) -> None:
    """Same leaves, same root whatever the order, same proofs; and no proof fits another leaf."""
    for vector in VECTORS[kind]:
        leaves = [raw(entry["leaf"]) for entry in vector["entries"]]
        for entry, leaf in zip(vector["entries"], leaves, strict=True):
            if kind == "receipts":
                assert receipt_leaf(raw(entry["receiptId"])) == leaf
            else:
                who, wei = contributor_id(raw(entry["wallet"])), int(entry["cumulativeWei"])
                assert who == raw(entry["contributorId"])
                assert reward_leaf(VECTORS["chainId"], DISTRIBUTOR, who, wei) == leaf
        root = raw(vector["root"])
        for order in (leaves, leaves[::-1], sorted(leaves)):
            tree = merkle_tree(order)
            assert tree.root == root
            assert [tree.proof(raw(e["leaf"])) for e in vector["entries"]] == [
                proof_of(e) for e in vector["entries"]
            ]
        assert all(verify(root, leaf, tree.proof(leaf)) for leaf in leaves)
        assert not any(verify(root, receipt_leaf(bytes(32)), tree.proof(leaf)) for leaf in leaves)


def test_a_leaf_that_is_not_there_has_no_proof() -> None:
    with pytest.raises(Rejected) as error:
        merkle_tree([receipt_leaf(bytes(32))]).proof(bytes(32))
    assert error.value.code == "not_in_tree"


@pytest.mark.evm
def test_the_contract_pays_by_openzeppelins_proofs(rpc_url: str) -> None:
    """Deployed where the vectors say, it accepts each proof and refuses each amount plus one gwei."""
    stage = set_stage(rpc_url, deployer="vectors")
    assert stage.deployment.distributor == DISTRIBUTOR
    for vector in VECTORS["rewards"]:
        with stage.forgetting():
            pay_everybody(stage, vector)


def pay_everybody(stage: Stage, vector: dict[str, Any]) -> None:
    entries = vector["entries"]
    claims = [ClaimCall(raw(e["contributorId"]), int(e["cumulativeWei"]), proof_of(e)) for e in entries]
    total_gwei = sum(claim.cumulative_wei for claim in claims) // WEI_PER_GWEI
    stage.fund("alice", total_gwei)
    stage.settle({"alice": total_gwei})
    stage.do("stranger", stage.rollup.encode_register([raw(entry["wallet"]) for entry in entries]))
    period = stage.period(raw(vector["root"]), total_gwei)
    stage.do("settler", stage.rollup.encode_post_period(period, b""))
    more = [ClaimCall(c.contributor_id, c.cumulative_wei + WEI_PER_GWEI, c.proof) for c in claims]
    for claim in more:
        assert refused(stage, "stranger", stage.rollup.encode_claim(claim)) == "BadProof"
    stage.do("stranger", stage.rollup.encode_claim_many(claims))
    for entry, claim in zip(entries, claims, strict=True):
        assert stage.rollup.token_balance_wei(raw(entry["wallet"])) == claim.cumulative_wei


@pytest.mark.evm
def test_the_vectors_are_what_openzeppelin_writes(toolchain: Toolchain) -> None:
    command = [str(toolchain.node), str(FOLDER / "make_merkle.cjs"), str(toolchain.modules)]
    written = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    assert json.loads(written) == VECTORS
