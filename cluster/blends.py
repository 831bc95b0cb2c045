"""Blends as rows. A blend is written with the first receipt that names it, and read by whoever must know whom
the fee is for."""

from collections.abc import Iterable

from sqlalchemy import select
from sqlalchemy.orm import Session

from attribution.types import Blend
from cluster.database import insert_new
from cluster.tables import BlendRow

_READ_AT_ONCE = 500


def keep_blend(session: Session, blend: Blend) -> None:
    """Keeping it again changes nothing."""
    insert_new(session, BlendRow, {"blend_id": blend.blend_id.hex(), "canonical": blend.canonical()})


def blends_among(session: Session, adapter_ids: Iterable[bytes]) -> dict[bytes, Blend]:
    """Those of ``adapter_ids`` that stand for blends, by id."""
    asked = sorted({adapter_id.hex() for adapter_id in adapter_ids})
    found: list[bytes] = []
    for start in range(0, len(asked), _READ_AT_ONCE):
        some = BlendRow.blend_id.in_(asked[start : start + _READ_AT_ONCE])
        found += session.scalars(select(BlendRow.canonical).where(some))
    return {blend.blend_id: blend for blend in map(Blend.from_canonical, found)}
