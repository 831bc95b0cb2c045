"""What a contract answers to what it must not do."""

import pytest

from attribution.errors import Rejected
from chain.transactions import Call
from tests.chain.stage import Stage


def refused(stage: Stage, name: str, call: Call) -> str:
    """Send it as ``name``, insist that it reverts, and return the contract's error."""
    with pytest.raises(Rejected) as error:
        stage.do(name, call)
    assert error.value.code == "reverted"
    return error.value.field
