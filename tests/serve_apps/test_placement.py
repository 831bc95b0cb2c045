"""Placement: what a lost worker moves, how far load may lean, how a hot adapter spreads."""

import random
from collections import Counter
from dataclasses import replace

from hypothesis import given
from hypothesis import strategies as st

from attribution.types import ZERO_ID
from serve_apps.placement import (
    Candidate,
    Placement,
    PlacementConfig,
    Traffic,
    most_requests,
    num_replicas,
    order,
    rendezvous,
)

adapter_ids = st.binary(min_size=32, max_size=32).filter(lambda given: given != ZERO_ID)
worker_ids = st.lists(
    st.text("0123456789abcdef", min_size=12, max_size=12), min_size=1, max_size=9, unique=True
)
fleets = st.builds(
    lambda ids, loads: [Candidate(worker_id, load) for worker_id, load in zip(ids, loads, strict=False)],
    worker_ids,
    st.lists(st.integers(0, 40), min_size=9, max_size=9),
)
shares = st.floats(0, 1)


@given(st.lists(adapter_ids, min_size=1, max_size=30), worker_ids, st.integers(0, 8))
def test_only_the_adapters_of_a_lost_worker_move(adapters: list[bytes], ids: list[str], lost: int) -> None:
    gone = ids[lost % len(ids)]
    left = [worker_id for worker_id in ids if worker_id != gone]
    for adapter_id in adapters:
        before = rendezvous(adapter_id, ids)
        assert rendezvous(adapter_id, left) == [worker_id for worker_id in before if worker_id != gone]


def test_adapters_lie_evenly_and_a_new_worker_takes_only_its_share() -> None:
    adapters = [random.Random(i).randbytes(32) for i in range(2000)]
    ids = ["w0", "w1", "w2", "w3"]
    homes = Counter(rendezvous(adapter_id, ids)[0] for adapter_id in adapters)
    assert all(400 < count < 600 for count in homes.values())
    moved = sum(rendezvous(a, ids)[0] != rendezvous(a, [*ids, "w4"])[0] for a in adapters)
    assert 320 < moved < 480


@given(adapter_ids, fleets, shares, st.randoms())
def test_every_gateway_decides_alike(
    adapter_id: bytes, fleet: list[Candidate], share: float, shuffling: random.Random
) -> None:
    shuffled = shuffling.sample(fleet, len(fleet))
    assert order(adapter_id, fleet, share) == order(adapter_id, shuffled, share)
    assert order(ZERO_ID, fleet) == order(ZERO_ID, shuffled)


@given(st.lists(adapter_ids, min_size=1, max_size=4), worker_ids, st.floats(1.0, 3.0), st.data())
def test_no_worker_gets_beyond_the_bound(
    adapters: list[bytes], ids: list[str], bound: float, data: st.DataObject
) -> None:
    """Whatever is asked for in whatever order, and however few adapters share the traffic."""
    loads = dict.fromkeys(ids, 0)
    for _ in range(60):
        fleet = [Candidate(worker_id, load) for worker_id, load in loads.items()]
        first = order(data.draw(st.sampled_from(adapters)), fleet, data.draw(shares), bound)[0]
        loads[first] += 1
        assert loads[first] <= most_requests(fleet, bound)


@given(adapter_ids, fleets, shares, st.sets(st.integers(0, 8)), st.sets(st.integers(0, 8)))
def test_workers_that_drain_are_never_asked_and_full_ones_last(
    adapter_id: bytes, fleet: list[Candidate], share: float, draining: set[int], full: set[int]
) -> None:
    fleet = [replace(each, is_draining=i in draining, is_full=i in full) for i, each in enumerate(fleet)]
    for asked in (order(adapter_id, fleet, share), order(ZERO_ID, fleet)):
        assert sorted(asked) == sorted(each.worker_id for each in fleet if not each.is_draining)
        first = next((each for each in fleet if asked and each.worker_id == asked[0]), None)
        open_ = [each for each in fleet if not each.is_draining and not each.is_full]
        assert (
            first is None
            or not first.is_full
            or all(
                each.num_requests >= most_requests([e for e in fleet if not e.is_draining], 1.25)
                for each in open_
            )
        )


@given(adapter_ids, worker_ids)
def test_an_idle_fleet_gives_an_adapter_its_home_and_the_base_model_the_least_busy(
    adapter_id: bytes, ids: list[str]
) -> None:
    idle = [Candidate(worker_id, 0) for worker_id in ids]
    assert order(adapter_id, idle, share=1.0)[0] == rendezvous(adapter_id, ids)[0]
    busy = [replace(each, num_requests=i) for i, each in enumerate(idle)]
    assert order(ZERO_ID, busy) == ids


@given(shares, st.integers(1, 50))
def test_replicas_are_enough_for_the_traffic_and_no_more(share: float, num_workers: int) -> None:
    replicas = num_replicas(share, num_workers)
    assert 1 <= replicas <= num_workers
    assert share / replicas <= 1 / num_workers + 1e-6
    assert replicas == 1 or share / (replicas - 1) > 1 / num_workers


def test_a_hot_adapter_spreads_over_its_first_workers_and_shrinks_when_it_cools() -> None:
    now = 0.0
    hot = b"\1" * 32
    others = [random.Random(i).randbytes(32) for i in range(600)]
    unbound = PlacementConfig(bound=1000.0, half_life_s=10)  # what spreads here is not the bound
    placement = Placement(unbound, lambda: now)
    ids = [f"w{i}" for i in range(8)]
    loads = dict.fromkeys(ids, 0)

    def place(adapter_id: bytes) -> str:
        first = placement.place(adapter_id, [Candidate(w, load) for w, load in loads.items()])[0]
        loads[first] += 1
        return first

    placed = [(each, place(each)) for i in range(1000) for each in [hot if i % 10 < 4 else others[i // 2]]]
    used = Counter(worker_id for adapter_id, worker_id in placed[500:] if adapter_id == hot)
    assert set(used) == set(rendezvous(hot, ids)[:4])  # 40% of the traffic: 3.2 of eight workers
    assert max(loads[worker_id] for worker_id in used) - min(loads[worker_id] for worker_id in used) < 60
    now = 200.0
    for other in others[:100]:
        place(other)
    assert {place(hot) for _ in range(3)} == {rendezvous(hot, ids)[0]}


@given(st.lists(adapter_ids, min_size=1, max_size=20))
def test_traffic_is_shares_of_what_is_recent(asked: list[bytes]) -> None:
    now = 0.0
    traffic = Traffic(10.0, lambda: now)
    assert traffic.share(asked[0]) == 0
    for adapter_id in asked:
        traffic.count(adapter_id)
    assert abs(sum(traffic.share(each) for each in set(asked)) - 1) < 1e-9
    now = 10.0
    for _ in asked:
        traffic.count(b"\0" * 31 + b"\1")
    assert traffic.share(b"\0" * 31 + b"\1") >= 2 / 3 - 1e-9  # the older half counts half
