"""A stranger with model, trajectory and published sum gets the credits that were paid by, or names those
that are not."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from attribution.errors import Refusal
from attribution.payout import AdapterClose
from cluster.database import reading
from cluster.models import load_tokenizer
from cluster.storage import DirectoryStorage
from cluster.tables import AdapterRow
from pipelines.course import ChatAsker
from pipelines.influence_audit import Difference, Recomputed, differences, recompute
from pipelines.replayed import ROUNDING_PPM
from tests.attributed import World
from tests.pipelines.test_close_period import close, trained_and_asked
from tests.toy_trainings import this_process


def audited(world: World, paid: AdapterClose, folder: Path) -> Recomputed:
    asker = ChatAsker(load_tokenizer(world.base_path))
    own = DirectoryStorage(folder / "own")
    return recompute(
        world.ground.storage, own, paid, asker, lambda _, course: this_process(world.base_path, course)
    )


def test_a_replayed_period_is_found_to_hold_without_its_operator_s_results(
    world: World, tmp_path: Path
) -> None:
    trained_and_asked(world)
    (paid,) = close(world).payload.adapters
    for key in list(world.ground.storage.list("replays/")):
        world.ground.storage.put(key, b"{}")
    again = audited(world, paid, tmp_path)
    assert (again.credits, again.controls) == (paid.credits, paid.controls), "the same machine, the same bits"
    assert again.bound == max(abs(c.value) for c in paid.credits) * ROUNDING_PPM // 1_000_000 > 0
    assert list(differences(paid, again)) == []


def test_a_credit_moved_beyond_the_bound_is_named_with_both_values(world: World, tmp_path: Path) -> None:
    trained_and_asked(world)
    (paid,) = close(world).payload.adapters
    again = audited(world, paid, tmp_path)
    first, *others = paid.credits
    for by, found in ((again.bound, 0), (again.bound + 1, 1)):
        moved = replace(paid, credits=(replace(first, value=first.value + by), *others))
        assert len(list(differences(moved, again))) == found
    (named,) = differences(moved, again)
    assert named == Difference(
        f"group {first.group_id.hex()}", f"{first.value} within {again.bound}", f"{first.value + by}"
    )
    (missing,) = differences(replace(paid, credits=tuple(others)), again)
    assert missing.found == "None"
    quieter = replace(paid, controls=tuple(value // 2 for value in paid.controls))
    assert [one.subject[:8] for one in differences(quieter, again)] == ["control "] * len(paid.controls)
    (fewer,) = differences(replace(paid, controls=paid.controls[1:]), again)
    assert fewer.subject == "controls"


def test_the_cheap_method_s_integers_are_compared_exactly(world: World, tmp_path: Path) -> None:
    trained_and_asked(world, seconds=10**6)
    (paid,) = close(world).payload.adapters
    assert paid.method.startswith("damped-fisher/1 ")
    again = audited(world, paid, tmp_path)
    assert again == Recomputed(paid.credits, paid.controls, bound=0)
    first, *others = paid.credits
    moved = replace(paid, credits=(replace(first, value=first.value + 1), *others))
    assert len(list(differences(moved, again))) == 1


def names_no_index(world: World, paid: AdapterClose) -> AdapterClose:
    return replace(paid, method="metagradient/2 by heart")


def names_another_sum(world: World, paid: AdapterClose) -> AdapterClose:
    return replace(paid, gradient_sum_sha256=bytes(32))


def names_another_adapter(world: World, paid: AdapterClose) -> AdapterClose:
    return replace(paid, adapter_id=b"\1" * 32)


def changes_the_trajectory(world: World, paid: AdapterClose) -> AdapterClose:
    with reading(world.ground.engine) as session:
        trajectory = session.get_one(AdapterRow, paid.adapter_id.hex()).trajectory
    other = world.ground.storage.get(f"{trajectory}/step_4.safetensors")
    world.ground.storage.put(f"{trajectory}/step_8.safetensors", other)
    return paid


@pytest.mark.parametrize(
    ("lie", "code"),
    [
        (names_no_index, "method_unknown"),
        (names_another_sum, "not_found"),
        (names_another_adapter, "index_adapter"),
        (changes_the_trajectory, "replay_deviates"),
    ],
)
def test_what_cannot_be_recomputed_is_refused_by_name(
    world: World, tmp_path: Path, lie: Callable[[World, AdapterClose], AdapterClose], code: str
) -> None:
    trained_and_asked(world)
    (paid,) = close(world).payload.adapters
    with pytest.raises(Refusal) as refusal:
        audited(world, lie(world, paid), tmp_path)
    assert refusal.value.code == code
