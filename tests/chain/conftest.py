"""A local rollup for the tests that want one: started once, with fresh contracts for each test that asks."""

from collections.abc import Iterator

import pytest

from chain import anvil
from chain.toolchain import Toolchain, install
from cluster.config import load_settings
from tests.chain.stage import Stage, set_stage


@pytest.fixture(scope="session")
def toolchain() -> Toolchain:
    return install(load_settings().home / "node")


@pytest.fixture(scope="session")
def rpc_url(toolchain: Toolchain) -> Iterator[str]:
    with anvil.running(toolchain.anvil) as url:
        yield url


@pytest.fixture(scope="session")
def prompt_contracts(rpc_url: str) -> Stage:
    return set_stage(rpc_url)


@pytest.fixture(scope="session")
def patient_contracts(rpc_url: str) -> Stage:
    return set_stage(rpc_url, activation_delay_s=86_400)


@pytest.fixture
def stage(prompt_contracts: Stage) -> Iterator[Stage]:
    """Untouched contracts whose periods are claimable at once; the chain forgets what the test did."""
    with prompt_contracts.forgetting():
        yield prompt_contracts


@pytest.fixture
def patient_stage(patient_contracts: Stage) -> Iterator[Stage]:
    """Untouched contracts whose periods wait a day."""
    with patient_contracts.forgetting():
        yield patient_contracts
