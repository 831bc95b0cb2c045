"""Deployment: what is on the chain is what the artifacts and the file say, and nothing else passes."""

from dataclasses import fields, replace
from pathlib import Path

import pytest

from attribution.errors import Corrupted, Rejected
from chain.deploy import register, verify
from chain.deployment import Deployment, load_deployment
from chain.rollup import Rollup
from tests.chain.stage import Stage, address, key


@pytest.mark.evm
def test_a_fresh_deployment_verifies(stage: Stage) -> None:
    checked = verify(stage.rollup)
    assert any("escrow.ledger" in line for line in checked)


@pytest.mark.evm
@pytest.mark.parametrize("name", [f.name for f in fields(Deployment) if f.name != "block"])
def test_no_field_of_the_deployment_can_be_wrong(stage: Stage, name: str) -> None:
    """Another chain, an address without our code, another role holder, another delay: each is named."""
    value = getattr(stage.deployment, name)
    wrong = address("stranger") if isinstance(value, bytes) else value + 1
    with pytest.raises(Corrupted) as error:
        verify(Rollup(stage.rpc_url, replace(stage.deployment, **{name: wrong})))
    assert error.value.code in ("deployment_differs", "foreign_code")


@pytest.mark.evm
def test_contracts_of_another_deployment_do_not_verify(stage: Stage, patient_contracts: Stage) -> None:
    """Right code, wrong wiring."""
    for name in ("token", "registry", "escrow", "ledger", "distributor", "pool"):
        other = getattr(patient_contracts.deployment, name)
        with pytest.raises(Corrupted):
            verify(Rollup(stage.rpc_url, replace(stage.deployment, **{name: other})))


@pytest.mark.evm
def test_a_role_granted_later_shows(stage: Stage) -> None:
    """A second settler, whoever granted it, is not in the file."""
    stage.do("admin", stage.grant_settler("stranger"))
    with pytest.raises(Corrupted) as error:
        verify(stage.rollup)
    assert error.value.field == "ledger role 4ec619e1"


@pytest.mark.evm
def test_registering_skips_who_is_on_record(stage: Stage) -> None:
    wallets = [address("alice"), address("bob"), address("alice")]
    assert register(stage.rollup, key("stranger"), wallets) == 2
    assert register(stage.rollup, key("stranger"), wallets) == 0


def a_deployment() -> Deployment:
    places = {f.name: bytes([0xA0 + i]) * 20 for i, f in enumerate(fields(Deployment)) if f.type is bytes}
    return Deployment(
        **places, chain_id=10, block=5, withdrawal_delay_s=1, activation_delay_s=2, pool_delay_s=3
    )


def test_the_file_reads_back(tmp_path: Path) -> None:
    path = tmp_path / "chain" / "addresses.json"
    a_deployment().save(path)
    assert load_deployment(path) == a_deployment()


@pytest.mark.parametrize(
    ("before", "after", "code"),
    [
        ('"block": 5', '"blocks": 5', "bad_deployment"),
        ('"block": 5', '"block": "5"', "bad_deployment"),
        ('"0xa2', '"0xA2', "bad_address"),
        ('"chain_id": 10,', "", "bad_deployment"),
        ("{", "", "bad_deployment"),
    ],
)
def test_a_damaged_file_is_refused(tmp_path: Path, before: str, after: str, code: str) -> None:
    path = tmp_path / "addresses.json"
    a_deployment().save(path)
    text = path.read_text()
    assert before in text
    path.write_text(text.replace(before, after, 1))
    with pytest.raises(Rejected) as error:
        load_deployment(path)
    assert error.value.code == code


def test_a_missing_file_says_so(tmp_path: Path) -> None:
    with pytest.raises(Rejected) as error:
        load_deployment(tmp_path / "addresses.json")
    assert error.value.code == "no_deployment"
