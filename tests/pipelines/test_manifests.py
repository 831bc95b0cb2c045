"""Nobody chooses what is trained on; whoever seals the same groups seals the same bytes."""

from dataclasses import replace
from itertools import pairwise

import pytest

from attribution.errors import Rejected
from attribution.groups import Grouping, group
from attribution.types import Manifest
from cluster.storage import Storage
from pipelines.ingest import IngestSpec
from pipelines.manifests import SealPolicy, is_control, seal
from pipelines.sources import python_lint
from pipelines.sources.drafts import manifest_of
from pipelines.spec import load_spec
from tests import toys

NET, TOYS = toys.datanet(), toys.records()
BY_ID = {record.record_id: record for record in TOYS}
GROUPING = group(toys.committed(TOYS))
POLICY = SealPolicy(control_ppm=350_000)


def test_the_same_groups_give_the_same_bytes_and_bytes_give_the_manifest_back() -> None:
    first = seal(NET, GROUPING, BY_ID, POLICY)
    again = seal(NET, group(reversed(toys.committed(TOYS))), dict(reversed(BY_ID.items())), POLICY)
    assert first.canonical() == again.canonical()
    assert Manifest.from_canonical(first.canonical()) == first


def test_entries_and_controls_are_sorted_disjoint_and_whole() -> None:
    manifest = seal(NET, GROUPING, BY_ID, POLICY)
    trained = [entry.group.group_id for entry in manifest.entries]
    controls = [record.record_id for record in manifest.controls]
    assert all(a < b for a, b in pairwise(trained)) and all(a < b for a, b in pairwise(controls))
    assert sorted(trained + controls) == sorted(BY_ID)


def test_a_control_stays_one_whatever_joins_later() -> None:
    few = group(toys.committed(TOYS[:6]))
    before = {record.record_id for record in seal(NET, few, BY_ID, POLICY).controls}
    after = {record.record_id for record in seal(NET, GROUPING, BY_ID, POLICY).controls}
    assert before == after & {record.record_id for record in TOYS[:6]}


def test_a_cap_on_groups_or_controls_never_moves_a_control_into_training() -> None:
    capped = seal(NET, GROUPING, BY_ID, SealPolicy(control_ppm=350_000, max_groups=3, max_controls=1))
    assert (len(capped.entries), len(capped.controls)) == (3, 1)
    assert not any(is_control(entry.group.group_id, 350_000) for entry in capped.entries)


def test_the_share_of_controls_is_what_the_policy_says() -> None:
    ids = [n.to_bytes(32, "big") for n in range(20_000)]
    found = sum(is_control(one, 80_000) for one in ids)
    assert 1_450 < found < 1_750  # four standard deviations
    assert not any(is_control(one, 0) for one in ids)


def test_conflicts_and_withdrawn_records_are_not_sealed() -> None:
    disputed = replace(TOYS[0], answer="something else", source_key="x")
    grouping = group(toys.committed((*TOYS, disputed)))
    records = {**BY_ID, disputed.record_id: disputed}
    withdrawn = frozenset({TOYS[3].record_id})
    manifest = seal(NET, grouping, records, SealPolicy(control_ppm=0), withdrawn)
    sealed = {entry.group.group_id for entry in manifest.entries}
    assert sealed == set(BY_ID) - withdrawn


def test_the_checked_in_spec_seals_the_demo_manifest(storage: Storage) -> None:
    spec = load_spec(IngestSpec, "configs/ingest-python-lint.yaml", storage)
    assert spec.datanet == python_lint.DATANET.name
    manifest = manifest_of(python_lint.DATANET, python_lint.drafts(), spec.seal)
    assert manifest == python_lint.demo_manifest()


@pytest.mark.parametrize("grouping", [Grouping((), ()), group(toys.committed(TOYS[:1]))])
def test_nothing_to_train_on_is_refused(grouping: Grouping) -> None:
    withdrawn = frozenset({TOYS[0].record_id})
    with pytest.raises(Rejected, match="no group to train on"):
        seal(NET, grouping, BY_ID, POLICY, withdrawn)
