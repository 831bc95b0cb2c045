"""How many workers load asks for."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from serve_apps.autoscaling import TARGET, Pressure, pressure_of, workers_wanted
from serve_apps.engine.types import EngineLoad

pressures = st.lists(st.builds(Pressure, st.floats(0, 20), st.floats(0, 1)), max_size=10)


@given(pressures)
def test_so_many_that_no_more_than_the_target_falls_on_each_and_no_more(given_: list[Pressure]) -> None:
    wanted = workers_wanted(given_)
    fuller = max(sum(each.slots for each in given_), sum(each.kv for each in given_))
    assert fuller / wanted <= TARGET + 1e-6
    assert wanted == 1 or fuller / (wanted - 1) > TARGET


@pytest.mark.parametrize(
    ("loads", "wanted"),
    [
        ([], 1),
        ([EngineLoad(0, 0, 100, 100, 0)], 1),
        ([EngineLoad(4, 4, 100, 100, 0)], 3),  # a queue as long as the batch
        ([EngineLoad(1, 0, 5, 100, 0)], 2),  # few requests, long ones: the cache is full
        ([EngineLoad(4, 0, 50, 100, 0), EngineLoad(0, 0, 100, 100, ())], 2),
        ([EngineLoad(1, 0, 90, 100, 0), EngineLoad(1, 0, 90, 100, ())], 1),
    ],
)
def test_queues_and_caches_both_ask(loads: list[EngineLoad], wanted: int) -> None:
    assert workers_wanted([pressure_of(load, max_running=4) for load in loads]) == wanted
