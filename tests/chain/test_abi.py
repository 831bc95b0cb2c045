"""Our values are spelt as the interfaces spell them; a contract's refusal reads as it was written."""

from dataclasses import fields

from attribution.hashing import keccak256
from chain.abi import ARTIFACTS, contract_error, event_kinds, field_name
from chain.artifact import load_artifact


def test_events_have_the_interfaces_fields_in_order() -> None:
    abis = {e["name"]: e for a in ARTIFACTS.values() for e in load_artifact(a).abi if e["type"] == "event"}
    for name, kind in event_kinds().values():
        spelt = [field_name(field["name"]) for field in abis[name]["inputs"]]
        assert [field.name for field in fields(kind)] == ["at", *spelt]


def test_every_event_of_our_own_contracts_has_a_value() -> None:
    """What OpenZeppelin's parts say besides (transfers, roles, domain changes) is read where it is needed."""
    foreign = {
        "Transfer",
        "Approval",
        "EIP712DomainChanged",
        "RoleGranted",
        "RoleRevoked",
        "RoleAdminChanged",
    }
    ours = [name for key, name in ARTIFACTS.items() if key != "pool"]
    said = {e["name"] for name in ours for e in load_artifact(name).abi if e["type"] == "event"}
    assert said - foreign == {name for name, _ in event_kinds().values()}


def test_a_revert_reads_as_it_was_written() -> None:
    expected = "UnexpectedBatch(nextBatchId=2, givenBatchId=7)"
    words = (2).to_bytes(32, "big") + (7).to_bytes(32, "big")
    selector = keccak256(b"UnexpectedBatch(uint64,uint64)")[:4]
    assert contract_error("0x" + (selector + words).hex()) == ("UnexpectedBatch", expected)


def test_reverts_of_others_have_no_name() -> None:
    assert contract_error("0xdeadbeef") == contract_error("0x") == contract_error(None) == ("", "")
