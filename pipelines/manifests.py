"""Sealing: from grouped records to the manifest that is trained on.

Nobody chooses what is trained on and what is not: the hash of the record id does. A record is a control for
good, whatever else joins the Datanet later."""

from collections.abc import Iterable, Mapping
from operator import attrgetter

from pydantic import BaseModel, ConfigDict, Field

from attribution.errors import Rejected
from attribution.groups import Grouping
from attribution.hashing import sha256
from attribution.types import Manifest, ManifestEntry, Record
from cluster.datanets import Datanet


class SealPolicy(BaseModel):
    """How much of a Datanet becomes one manifest. Part of the job's spec, so that it can be repeated."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    control_ppm: int = Field(default=80_000, ge=0, le=500_000)  # share of groups that is never trained on
    max_controls: int = Field(default=64, ge=0)
    max_groups: int | None = Field(default=None, ge=1)  # all, if none


def lot(purpose: str, record_id: bytes) -> bytes:
    """A record's fixed place in the draw for ``purpose``, uniform over 32 bytes."""
    return sha256(f"openledger/lot/{purpose}/1".encode() + record_id)


def is_control(record_id: bytes, control_ppm: int) -> bool:
    return int.from_bytes(lot("control", record_id)[:8], "big") * 1_000_000 < control_ppm << 64


def seal(
    datanet: Datanet,
    grouping: Grouping,
    records: Mapping[bytes, Record],
    policy: SealPolicy,
    withdrawn: frozenset[bytes] = frozenset(),
) -> Manifest:
    """The same groups and the same policy give the same bytes. Conflicts are neither trained on nor controls.

    Args:
        records: by id; the firsts of all groups at least.
        withdrawn: record ids. Their groups are left out: nobody inherits a withdrawn record."""
    barred = withdrawn | {conflict.record_id for conflict in grouping.conflicts}
    groups = [group for group in grouping.groups if group.group_id not in barred]
    controls = [group.group_id for group in groups if is_control(group.group_id, policy.control_ppm)]
    trained = [group for group in groups if not is_control(group.group_id, policy.control_ppm)]
    trained = sorted(trained, key=lambda group: lot("train", group.group_id))[: policy.max_groups]
    if not trained:
        raise Rejected(
            "nothing_to_seal", f"{datanet.name}: no group to train on among {len(grouping.groups)}"
        )
    return Manifest(
        datanet=datanet.name,
        licence=datanet.licence,
        entries=tuple(
            ManifestEntry(group, records[group.group_id])
            for group in sorted(trained, key=attrgetter("group_id"))
        ),
        controls=tuple(records[one] for one in _first_lots(controls, policy.max_controls)),
        wordings=datanet.wordings.train,
        heldout_wordings=datanet.wordings.heldout,
    )


def _first_lots(record_ids: Iterable[bytes], count: int) -> list[bytes]:
    return sorted(sorted(record_ids, key=lambda one: lot("control", one))[:count])
