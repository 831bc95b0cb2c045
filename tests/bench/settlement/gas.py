"""What settling, paying in and drawing out cost in gas and in fees, measured on the local rollup.

``python -m tests.bench.settlement.gas OUT.json [--tools FOLDER]``. Sizes of certificates: 412 bytes is what
the stand-in gives, 902 and 4276 are real ones of EigenDA on sepolia and mainnet. Gas depends a little on how
many bytes of hashes are zero; everything here is seeded. Fees are for OP mainnet's scalars and the L1 prices
of ``anvil.LAPTOP_FEES``."""

import argparse
import json
import random
from dataclasses import asdict
from pathlib import Path

from attribution.merkle import merkle_tree, reward_leaf
from attribution.payload import WEI_PER_GWEI
from attribution.types import Capture, contributor_id
from chain import anvil
from chain.compile import SETTINGS
from chain.fees import l1_fee_wei
from chain.structs import ClaimCall
from chain.toolchain import PACKAGES, install
from chain.transactions import Call, Fees, Transaction, address_of
from cluster.signatures import SpendCeiling, digest, escrow_domain, sign
from tests.chain.stage import FAR, TOKEN, Stage, address, key, set_stage

CERTIFICATES = (33, 412, 902, 4_276)
PAYERS = 50
TREES = (100, 1_000, 10_000)
MANY = 20
GOALS = {
    "commit_902": 160_000,
    "capture_each": 15_000,
    "claim_first_10000": 105_000,
    "claim_each_10000": 75_000,
}


def wallets(count: int, rng: random.Random) -> list[bytes]:
    return [rng.randbytes(20) for _ in range(count)]


def measure(stage: Stage) -> dict[str, int]:
    rng = random.Random(7)
    gas: dict[str, int] = {}
    gas["deposit_first"], gas["deposit_again"] = deposits(stage)
    stage.do("treasury", stage.rollup.encode_transfer(address("carol"), TOKEN))
    gas["deposit_with_permit"] = stage.do("settler", stage.permit("carol", "carol", TOKEN)).gas_used
    gas["authorize"] = authorize(stage, key("alice"))
    for size in CERTIFICATES:
        gas[f"commit_{size}"] = commit(stage, {"alice": stage.rollup.next_batch_id()}, rng.randbytes(size))
    one = gas["commit_412"]
    gas[f"commit_412_of_{PAYERS}"] = many_payers(stage, rng)
    gas["capture_each"] = (gas[f"commit_412_of_{PAYERS}"] - one) // (PAYERS - 1)
    for size in TREES:
        gas |= {f"{name}_{size}": used for name, used in claims(stage, size, rng).items()}
    return gas


def deposits(stage: Stage) -> list[int]:
    stage.do("treasury", stage.rollup.encode_approve(stage.deployment.escrow, 10**6 * TOKEN))
    call = stage.rollup.encode_deposit(address("alice"), 100_000 * TOKEN)
    return [stage.do("treasury", call).gas_used for _ in range(2)]


def authorize(stage: Stage, private_key: bytes) -> int:
    d = stage.deployment
    ceiling = SpendCeiling(address_of(private_key), d.ledger, 10**9 * TOKEN, FAR)
    signature = sign(private_key, digest(ceiling, escrow_domain(d.chain_id, d.escrow)))
    return stage.do("settler", stage.rollup.encode_authorize(ceiling, signature)).gas_used


def commit(stage: Stage, spent_gwei: dict[str, int], certificate: bytes) -> int:
    fee = sum(spent_gwei.values()) - stage.rollup.payer_state(address("alice")).captured_wei // WEI_PER_GWEI
    call = stage.rollup.encode_commit_batch(stage.batch(fee), certificate, stage.captures(spent_gwei))
    return stage.do("settler", call).gas_used


def many_payers(stage: Stage, rng: random.Random) -> int:
    """One batch of payers who all have been captured from before, as in daily business."""
    keys = [rng.randbytes(32) for _ in range(PAYERS)]
    payers = sorted(address_of(k) for k in keys)
    for payer in payers:
        stage.do("treasury", stage.rollup.encode_deposit(payer, TOKEN))
    for k in keys:
        authorize(stage, k)
    used = 0
    for spent in (1_000, 2_000):
        captures = [Capture(payer, spent) for payer in payers]
        header = stage.batch(1_000 * PAYERS)
        call = stage.rollup.encode_commit_batch(header, rng.randbytes(412), captures)
        used = stage.do("settler", call).gas_used
    return used


def claims(stage: Stage, size: int, rng: random.Random) -> dict[str, int]:
    """A period over ``size`` contributors of whom some claim, and the period after it."""
    d, people = stage.deployment, wallets(size, rng)
    gas: dict[str, int] = {}
    chosen = people[: MANY + 1]
    used = stage.do("stranger", stage.rollup.encode_register(chosen)).gas_used
    gas["register_each"] = used // len(chosen)
    share_gwei = 10**6
    for turn in ("first", "again"):
        before = stage.rollup.active_period().total_wei // WEI_PER_GWEI
        earned = before // size + share_gwei  # each period of this stage owes more than the last
        total_gwei = earned * size
        spent = total_gwei + 10**6
        commit(stage, {"alice": spent}, b"")
        leaves = {
            w: reward_leaf(d.chain_id, d.distributor, contributor_id(w), earned * WEI_PER_GWEI)
            for w in people
        }
        tree = merkle_tree(list(leaves.values()))
        due = [ClaimCall(contributor_id(w), earned * WEI_PER_GWEI, tree.proof(leaves[w])) for w in chosen]
        post = stage.rollup.encode_post_period(stage.period(tree.root, total_gwei), rng.randbytes(412))
        gas[f"post_period_{turn}"] = stage.do("settler", post).gas_used
        gas[f"claim_{turn}"] = stage.do("stranger", stage.rollup.encode_claim(due[0])).gas_used
        many = stage.do("stranger", stage.rollup.encode_claim_many(due[1:])).gas_used
        gas["claim_each" if turn == "first" else "claim_each_again"] = many // MANY
    return gas


def l1_fees(stage: Stage) -> dict[str, int]:
    """The L1 data fee of a commit by size of the certificate, wei."""
    at, rng, fees = anvil.LAPTOP_FEES, random.Random(8), {}
    for size in CERTIFICATES:
        call: Call = stage.rollup.encode_commit_batch(
            stage.batch(1), rng.randbytes(size), stage.captures({"alice": 1})
        )
        raw = Transaction(10, 1_000, 300_000, Fees(10**6, 10**7), call).sign(key("settler"))
        fees[f"commit_{size}"] = l1_fee_wei(raw, at)
    return fees


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--tools", type=Path, default=Path(".openledger/node"))
    chosen = parser.parse_args()
    with anvil.running(install(chosen.tools).anvil) as rpc_url:
        stage = set_stage(rpc_url)
        fees = l1_fees(stage)
        gas = measure(stage)
    conditions = {"packages": PACKAGES, "settings": SETTINGS, "l1": asdict(anvil.LAPTOP_FEES)}
    chosen.out.parent.mkdir(parents=True, exist_ok=True)
    chosen.out.write_text(
        json.dumps({"gas": gas, "l1_fee_wei": fees, "conditions": conditions}, indent=1) + "\n"
    )
    for name, used in gas.items():
        print(f"{name:28}{used:>9,} gas")
    for name, target in GOALS.items():
        print(f"goal {name} {gas[name]} {target} {'met' if gas[name] <= target else 'short'}")


if __name__ == "__main__":
    main()
