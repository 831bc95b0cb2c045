"""The checked-in artifacts are what the sources give; the toolchain sets itself up once."""

import json
import shutil
from pathlib import Path

import pytest

from attribution.errors import Corrupted, Rejected
from chain.artifact import FOLDER, load_artifact
from chain.compile import CONTRACTS, check, compile_contracts
from chain.toolchain import PACKAGES, Toolchain, install


@pytest.fixture(scope="module")
def compiled(toolchain: Toolchain) -> dict[str, str]:
    return compile_contracts(toolchain)


@pytest.mark.evm
def test_recompiling_gives_the_artifacts(compiled: dict[str, str]) -> None:
    assert sorted(compiled) == sorted(CONTRACTS)
    check(compiled, FOLDER)


@pytest.mark.evm
def test_a_changed_or_missing_artifact_shows(compiled: dict[str, str], tmp_path: Path) -> None:
    shutil.copytree(FOLDER, tmp_path / "artifacts")
    path = tmp_path / "artifacts" / "Escrow.json"
    for change in (lambda: path.write_text(path.read_text().replace("0x60", "0x61", 1)), path.unlink):
        change()
        with pytest.raises(Corrupted) as error:
            check(compiled, tmp_path / "artifacts")
        assert (error.value.code, error.value.field) == ("stale_artifact", "Escrow")


def test_artifacts_fit_the_chain_and_name_their_compiler() -> None:
    """EIP-170's limit; pinned versions."""
    for name in CONTRACTS:
        about = json.loads((FOLDER / f"{name}.json").read_text())
        assert (about["solc"], about["openzeppelin"]) == (
            PACKAGES["solc"],
            PACKAGES["@openzeppelin/contracts"],
        )
        assert len(load_artifact(name).runtime) <= 24_576


def test_code_is_recognised_whatever_its_immutables() -> None:
    escrow = load_artifact("Escrow")
    start, length = escrow.immutables[0]
    deployed = bytearray(escrow.runtime)
    deployed[start : start + length] = b"\xab" * length
    assert escrow.is_code(bytes(deployed))
    assert not escrow.is_code(bytes(deployed[:-1]))
    assert not escrow.is_code(load_artifact("Distributor").runtime)
    deployed[start - 1] ^= 1
    assert not escrow.is_code(bytes(deployed))


@pytest.mark.evm
def test_what_is_installed_is_not_installed_again(toolchain: Toolchain) -> None:
    said: list[str] = []
    assert install(toolchain.modules.parent, said.append) == toolchain
    assert said == []


def test_a_platform_without_anvil_is_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("platform.machine", lambda: "pdp11")
    with pytest.raises(Rejected) as error:
        install(tmp_path)
    assert error.value.code == "no_anvil"
