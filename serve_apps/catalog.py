"""What can be asked here, and at what price: the base model and every published adapter over it."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass

from sqlalchemy.orm import Session

from attribution.errors import Rejected
from attribution.types import ZERO_ID, Adapter
from cluster import adapters
from cluster.tables import AdapterRow

BASE = "base"

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class ServedModel:
    """A model id resolved for one request: exactly these weights, at this price."""

    ref: str  # owner/model@version, or base@<first digits of the base id>
    base_id: bytes
    adapter_id: bytes  # zero for the base model
    index_id: bytes  # the evidence index as of now; zero without one
    price_gwei_per_token: int

    @property
    def is_base(self) -> bool:
        return self.adapter_id == ZERO_ID


def resolve(session: Session, model: str, base_id: bytes, base_gwei_per_token: int) -> ServedModel:
    """The one model that ``model`` names: ``base``, ``owner/model@version`` or a bare ``owner/model``.

    Raises:
        Rejected: 404 for an unknown name, 410 for a withdrawn version, 404 for an adapter of another base.
    """
    if model == BASE or model == base_ref(base_id):
        return ServedModel(base_ref(base_id), base_id, ZERO_ID, ZERO_ID, base_gwei_per_token)
    adapter = adapters.resolve(session, model)
    if adapter.base_id != base_id:
        other = f"{adapter.ref} belongs to base {adapter.base_id.hex()}, here runs {base_id.hex()}"
        raise Rejected("model_not_found", other, field="model", http_status=404)
    row = session.get_one(AdapterRow, adapter.adapter_id.hex())
    return ServedModel(
        ref=adapter.ref,
        base_id=base_id,
        adapter_id=adapter.adapter_id,
        index_id=bytes.fromhex(row.index_id) if row.index_id else ZERO_ID,
        price_gwei_per_token=row.price_gwei_per_token,
    )


def pinned(session: Session, refs: Sequence[str], base_id: bytes) -> tuple[bytes, ...]:
    """The adapters that ``refs`` name. One that was withdrawn is left out: it must not keep a worker down.

    Raises:
        Rejected: ``model_not_found`` for an unknown name, or one of another base.
    """
    found: dict[bytes, None] = {}
    for ref in refs:
        try:
            found[resolve(session, ref, base_id, 0).adapter_id] = None
        except Rejected as refusal:
            if refusal.code != "model_withdrawn":
                raise
            log.warning("not pinned: %s", refusal.message)
    return tuple(adapter_id for adapter_id in found if adapter_id != ZERO_ID)


def base_ref(base_id: bytes) -> str:
    return f"{BASE}@{base_id.hex()[:12]}"


def ref_of(session: Session, base_id: bytes, adapter_id: bytes) -> str:
    """The resolved id behind a receipt; a receipt outlives its adapter's withdrawal."""
    if adapter_id == ZERO_ID:
        return base_ref(base_id)
    row = session.get(AdapterRow, adapter_id.hex())
    return f"{row.name}@{row.version}" if row else adapter_id.hex()


def served(session: Session, base_id: bytes) -> list[Adapter]:
    return [adapter for adapter in adapters.published(session) if adapter.base_id == base_id]
