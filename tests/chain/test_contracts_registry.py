"""ContributorRegistry: an id is fixed by its first wallet; only that wallet names the next."""

import pytest

from attribution.types import contributor_id
from chain.events import Registered, Rotated
from tests.chain.refusals import refused
from tests.chain.stage import Stage, address

pytestmark = pytest.mark.evm


def test_anyone_registers_wallets_under_the_ids_that_python_computes(stage: Stage) -> None:
    wallets = [address(name) for name in ("alice", "bob")]
    stage.do("stranger", stage.rollup.encode_register(wallets))
    for wallet in wallets:
        assert stage.rollup.wallet_of(contributor_id(wallet)) == wallet
    assert stage.rollup.wallet_of(contributor_id(address("carol"))) == bytes(20)


def test_registering_twice_changes_nothing(stage: Stage) -> None:
    """Not even after a rotation: nobody can turn a contributor's money back to an old wallet."""
    alice, bob = address("alice"), address("bob")
    stage.do("stranger", stage.rollup.encode_register([alice, alice]))
    stage.do("alice", stage.rollup.encode_rotate(contributor_id(alice), bob))
    stage.do("stranger", stage.rollup.encode_register([alice]))
    assert stage.rollup.wallet_of(contributor_id(alice)) == bob
    said = [event for event in stage.rollup.events() if isinstance(event, Registered | Rotated)]
    _pool, registered, rotated = said
    assert isinstance(registered, Registered) and registered.wallet == alice
    assert isinstance(rotated, Rotated) and (rotated.old_wallet, rotated.new_wallet) == (alice, bob)


def test_the_zero_wallet_is_refused(stage: Stage) -> None:
    assert refused(stage, "stranger", stage.rollup.encode_register([bytes(20)])) == "ZeroWallet"


def test_only_the_wallet_on_record_rotates(stage: Stage) -> None:
    alice_id = stage.id_of("alice")
    to_bob = stage.rollup.encode_rotate(alice_id, address("bob"))
    assert refused(stage, "alice", to_bob) == "NotRegistered"
    stage.do("stranger", stage.rollup.encode_register([address("alice")]))
    assert refused(stage, "stranger", to_bob) == "NotTheWallet"
    assert refused(stage, "alice", stage.rollup.encode_rotate(alice_id, bytes(20))) == "ZeroWallet"
    stage.do("alice", to_bob)
    assert refused(stage, "alice", to_bob) == "NotTheWallet"
    stage.do("bob", stage.rollup.encode_rotate(alice_id, address("carol")))
    assert stage.rollup.wallet_of(alice_id) == address("carol")
