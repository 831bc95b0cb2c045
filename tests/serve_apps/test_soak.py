"""The load tests of ``tests/bench/serving``, shortened: nothing is left, lost or doubled, nobody hurt."""

from collections.abc import Iterator

import pytest

from tests.bench.serving.connections import KINDS, storm
from tests.bench.serving.deployment import Deployment, deployed
from tests.bench.serving.soak import MAX_GROWTH_MIB, soak

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(900)]


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Deployment]:
    with deployed(tmp_path_factory.mktemp("home")) as target:
        yield target


def test_under_cancels_bad_adapters_and_kills_the_books_still_balance(target: Deployment) -> None:
    books = soak(target, minutes=2)
    ends = " ".join(books.ends)
    assert all(end in ends for end in ("hot finished", "hot left", "cold finished", "bad refused 4")), (
        books.ends
    )
    assert not books.wrong, books.wrong[:5]
    assert not any(books.left.values()) and books.num_reserved == 0, books.left
    assert not (books.lost_receipts or books.doubled_receipts or books.unknown_receipts)
    assert max(books.growth_mib.values()) <= MAX_GROWTH_MIB, books.growth_mib


def test_a_thousand_connections_up_to_no_good_disturb_nobody(target: Deployment) -> None:
    seen = storm(target, num_connections=1000, hold_s=10)
    assert set(seen.ends) == set(KINDS)
    assert all(str(goal).endswith(" met") for goal in seen.goals()), seen
    assert seen.num_streams > 0
