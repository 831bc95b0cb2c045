"""Commit and reveal over HTTP: the rules are tested in tests/cluster; here, that they are reached."""

import pytest

from cluster.contributions import claim_of
from cluster.database import writing
from cluster.datanets import open_datanet
from cluster.signatures import datanets_domain, digest, sign
from cluster.wallets import of_key
from tests import toys
from tests.serve_apps.conftest import Gateway

ALICE = of_key("alice", b"\1" * 32)
SALT, DATA = bytes(range(32)), toys.shard_data()


@pytest.fixture
def opened(gateway: Gateway) -> Gateway:
    with writing(gateway.database) as session:
        open_datanet(session, toys.datanet(), bytes(32))
    return gateway


def commitment(contributor: bytes = bytes(32)) -> dict[str, str]:
    claim = claim_of(DATA, toys.datanet().name, contributor, SALT)
    return {"wallet": f"0x{ALICE.address.hex()}", "label": "alice", "commitment": claim.commitment.hex()}


def reveal_query(contributor: bytes) -> dict[str, str | int]:
    claim = claim_of(DATA, toys.datanet().name, contributor, SALT)
    return {
        "contributor_id": contributor.hex(),
        "commitment": claim.commitment.hex(),
        "content_sha256": claim.content_sha256.hex(),
        "num_rows": claim.num_rows,
        "salt": SALT.hex(),
        "signature": sign(ALICE.key, digest(claim, datanets_domain(31337))).hex(),
    }


def test_a_shard_comes_in_over_http_and_lies_in_storage_byte_for_byte(opened: Gateway) -> None:
    from attribution.types import contributor_id

    http, me, name = opened.http(), contributor_id(ALICE.address), toys.datanet().name
    place = http.post(f"/datanets/{name}/commitments", json=commitment(me))
    assert place.status_code == 201 and place.json()["contributor_id"] == me.hex()
    shard = http.post(f"/datanets/{name}/shards", params=reveal_query(me), content=DATA)
    assert shard.status_code == 201, shard.text
    assert shard.json()["committed_seq"] == place.json()["committed_seq"]
    sha256 = str(reveal_query(me)["content_sha256"])
    assert opened.services.storage.get(f"shards/{sha256}") == DATA
    forged = {**reveal_query(me), "signature": "11" * 65}
    reply = http.post(f"/datanets/{name}/shards", params=forged, content=DATA)
    assert (reply.status_code, reply.json()["code"]) == (401, "bad_signature")
    changed = http.post(f"/datanets/{name}/shards", params=reveal_query(me), content=DATA + b"{}\n")
    assert changed.json()["code"] == "reveal_mismatch"


def test_refusals_are_problem_documents(opened: Gateway) -> None:
    http, name = opened.http(), toys.datanet().name
    replies = {
        "unknown_datanet": http.post("/datanets/none/commitments", json=commitment()),
        "bad_hex": http.post(f"/datanets/{name}/commitments", json={**commitment(), "commitment": "ab"}),
        "invalid_value": http.post(f"/datanets/{name}/commitments", json={**commitment(), "wallet": "/../"}),
        "invalid_api_key": opened.http("-").post(f"/datanets/{name}/commitments", json=commitment()),
    }
    assert {reply.headers["content-type"] for reply in replies.values()} == {"application/problem+json"}
    assert {code: reply.json()["code"] for code, reply in replies.items()} == {c: c for c in replies}
