"""Commit, then reveal: who was first, whose bytes, and every way to get it wrong."""

from dataclasses import replace

import pytest
from sqlalchemy import Engine, select

from attribution.errors import Rejected
from attribution.types import contributor_id
from cluster.contributions import (
    REVEAL_WITHIN_S,
    Reveal,
    check_reveal,
    claim_of,
    commit,
    register_contributor,
    reveal,
)
from cluster.database import reading, writing
from cluster.datanets import load_datanet, open_datanet
from cluster.shards import commitment_to, shard_root, split_lines
from cluster.signatures import datanets_domain, digest, sign
from cluster.storage import Storage, get_content
from cluster.tables import ShardRow
from cluster.wallets import Wallet, of_key
from tests import toys

ALICE, BOB = (of_key(name, bytes([n]) * 32) for n, name in ((1, "alice"), (2, "bob")))
DOMAIN = datanets_domain(31337)
NET = toys.datanet().name
SALT = bytes(range(32))
DATA = toys.shard_data()
NOW = 1_800_000_000


def signed(data: bytes = DATA, wallet: Wallet = ALICE, salt: bytes = SALT) -> Reveal:
    claim = claim_of(data, NET, contributor_id(wallet.address), salt)
    return Reveal(claim, salt, sign(wallet.key, digest(claim, DOMAIN)))


@pytest.fixture
def opened(engine: Engine) -> Engine:
    """The toy Datanet is open, Alice and Bob are registered, Alice has committed to ``DATA``."""
    with writing(engine) as session:
        open_datanet(session, toys.datanet(), bytes(32))
        for wallet in (ALICE, BOB):
            register_contributor(session, wallet.address, wallet.name)
        commit(session, NET, contributor_id(ALICE.address), signed().claim.commitment, NOW)
    return engine


def refused(
    code: str, engine: Engine, storage: Storage, sent: Reveal, data: bytes = DATA, now: int = NOW
) -> None:
    """The reveal is refused, and leaves neither bytes nor a changed row."""
    with pytest.raises(Rejected) as refusal:
        reveal(engine, storage, sent, data, DOMAIN, now)
    assert refusal.value.code == code
    assert not list(storage.list("shards"))
    with reading(engine) as session:
        assert set(session.scalars(select(ShardRow.state))) == {"committed"}


def test_a_committed_shard_is_revealed_and_kept_byte_for_byte(opened: Engine, storage: Storage) -> None:
    shard = reveal(opened, storage, signed(), DATA, DOMAIN, NOW + 5)
    assert get_content(storage, "shards", shard.content_sha256.hex()) == DATA
    with reading(opened) as session:
        row = session.scalars(select(ShardRow)).one()
    assert (row.state, row.shard_id, row.num_rows) == ("revealed", shard.shard_id.hex(), shard.num_rows)
    assert (row.committed_seq, row.revealed_at) == (shard.committed_seq, NOW + 5)


def test_committing_and_revealing_twice_changes_nothing(opened: Engine, storage: Storage) -> None:
    first = reveal(opened, storage, signed(), DATA, DOMAIN, NOW)
    assert reveal(opened, storage, signed(), DATA, DOMAIN, NOW + 10 * REVEAL_WITHIN_S) == first
    with writing(opened) as session:
        again = commit(session, NET, contributor_id(ALICE.address), signed().claim.commitment, NOW + 9)
    assert again == first.committed_seq


def test_commitments_are_ordered_and_hide_the_shard(opened: Engine) -> None:
    """The same bytes under another salt or by another contributor look unrelated."""
    alice, bob = contributor_id(ALICE.address), contributor_id(BOB.address)
    hidden = {
        commitment_to(DATA, alice, SALT),
        commitment_to(DATA, alice, bytes(32)),
        commitment_to(DATA, bob, SALT),
    }
    assert len(hidden) == 3
    with writing(opened) as session:
        first = commit(session, NET, bob, b"\x01" * 32, NOW)
        second = commit(session, NET, alice, b"\x02" * 32, NOW - 100)
    assert first < second


def test_the_root_proves_a_line_and_ignores_nothing() -> None:
    lines = split_lines(DATA)
    assert split_lines(DATA.rstrip(b"\n")) == lines
    assert shard_root(lines) != shard_root(lines[:-1])
    assert shard_root(lines) != shard_root([*lines[:-1], lines[-1] + b" "])


def test_a_stranger_cannot_reveal_a_stolen_commitment(opened: Engine, storage: Storage) -> None:
    """Bob saw Alice's bytes and salt on the way in: the commitment names her."""
    claim = replace(signed().claim, contributor_id=contributor_id(BOB.address))
    stolen = Reveal(claim, SALT, sign(BOB.key, digest(claim, DOMAIN)))
    refused("unknown_commitment", opened, storage, stolen)
    with writing(opened) as session, pytest.raises(Rejected, match="draw a new salt"):
        commit(session, NET, contributor_id(BOB.address), claim.commitment, NOW)


def test_a_late_reveal_has_lost_its_place(opened: Engine, storage: Storage) -> None:
    refused("reveal_late", opened, storage, signed(), now=NOW + REVEAL_WITHIN_S + 1)
    with writing(opened) as session:
        fresh = signed(salt=bytes(32)).claim
        seq = commit(session, NET, fresh.contributor_id, fresh.commitment, NOW + REVEAL_WITHIN_S + 1)
    late = reveal(opened, storage, signed(salt=bytes(32)), DATA, DOMAIN, NOW + 2 * REVEAL_WITHIN_S)
    assert late.committed_seq == seq


def test_the_last_second_is_in_time(opened: Engine, storage: Storage) -> None:
    reveal(opened, storage, signed(), DATA, DOMAIN, NOW + REVEAL_WITHIN_S)


@pytest.mark.parametrize(
    ("sent", "data", "code"),
    [
        (signed(), DATA + b"{}\n", "reveal_mismatch"),
        (signed(), DATA[:-40], "reveal_mismatch"),
        (signed(), DATA.replace(b"gold", b"tin!"), "reveal_mismatch"),
        (signed(), b"", "empty_shard"),
        (replace(signed(), salt=bytes(32)), DATA, "reveal_mismatch"),
        (replace(signed(), salt=b"short"), DATA, "bad_salt"),
        (signed(salt=bytes(32)), DATA, "unknown_commitment"),
        (signed(wallet=BOB), DATA, "unknown_commitment"),
        (replace(signed(), signature=signed(wallet=BOB).signature), DATA, "bad_signature"),
        (replace(signed(), signature=bytes(65)), DATA, "bad_signature"),
        (replace(signed(), signature=b""), DATA, "bad_signature"),
    ],
    ids=[
        "longer",
        "truncated",
        "edited",
        "empty",
        "salt",
        "short salt",
        "not committed",
        "not a committer",
        "another's signature",
        "zero signature",
        "no signature",
    ],
)
def test_a_reveal_that_does_not_match_is_refused(
    opened: Engine, storage: Storage, sent: Reveal, data: bytes, code: str
) -> None:
    refused(code, opened, storage, sent, data)


def test_a_signature_is_not_replayed_elsewhere() -> None:
    """Neither for other bytes, nor in another Datanet, nor on another chain."""
    sent = signed()
    check_reveal(sent, DATA, ALICE.address, DOMAIN)
    for claim in (
        replace(sent.claim, datanet="another"),
        claim_of(DATA + b"x", NET, sent.claim.contributor_id, SALT),
    ):
        data = DATA if claim.datanet != NET else DATA + b"x"
        with pytest.raises(Rejected, match="signed by"):
            check_reveal(replace(sent, claim=claim), data, ALICE.address, DOMAIN)
    with pytest.raises(Rejected, match="signed by"):
        check_reveal(sent, DATA, ALICE.address, datanets_domain(10))


def test_the_same_bytes_twice_are_one_shard(opened: Engine, storage: Storage) -> None:
    reveal(opened, storage, signed(), DATA, DOMAIN, NOW)
    again = signed(salt=bytes(32))
    with writing(opened) as session:
        commit(session, NET, again.claim.contributor_id, again.claim.commitment, NOW)
    with pytest.raises(Rejected) as refusal:
        reveal(opened, storage, again, DATA, DOMAIN, NOW)
    assert refusal.value.code == "duplicate_shard"


@pytest.mark.parametrize(
    ("net", "who", "commitment", "code"),
    [
        ("nowhere", ALICE, bytes(32), "unknown_datanet"),
        (NET, of_key("carol", bytes([3]) * 32), bytes(32), "unknown_contributor"),
        (NET, ALICE, bytes(31), "bad_commitment"),
    ],
)
def test_a_commitment_needs_a_datanet_a_contributor_and_32_bytes(
    opened: Engine, net: str, who: Wallet, commitment: bytes, code: str
) -> None:
    with writing(opened) as session, pytest.raises(Rejected) as refusal:
        commit(session, net, contributor_id(who.address), commitment, NOW)
    assert refusal.value.code == code


def test_a_datanet_keeps_the_terms_it_was_opened_with(opened: Engine) -> None:
    with writing(opened) as session:
        open_datanet(session, toys.datanet(), bytes(32))  # the same again: fine
        with pytest.raises(Rejected) as refusal:
            open_datanet(session, replace(toys.datanet(), licence="MIT"), bytes(32))
    assert refusal.value.code == "datanet_exists"
    with reading(opened) as session:
        assert load_datanet(session, NET) == toys.datanet()
