"""What can be asked here, and at what price: the base model, every published adapter over it, and blends of
adapters: ``owner/one@1*0.7+owner/other*0.3``, by weights of at most six decimals that sum to 1."""

import logging
import re
from collections.abc import Sequence
from dataclasses import dataclass
from decimal import Decimal

from sqlalchemy.orm import Session

from attribution.errors import Rejected
from attribution.types import PPM, ZERO_ID, Adapter, Blend, BlendPart
from cluster import adapters
from cluster.blends import blends_among
from cluster.tables import AdapterRow

BASE = "base"
WEIGHT = re.compile(r"0?\.[0-9]{1,6}")

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class ServedModel:
    """A model id resolved for one request: exactly these weights, at this price."""

    ref: str  # owner/model@version, several with weights, or base@<first digits of the base id>
    base_id: bytes
    adapter_id: bytes  # zero for the base model, a blend's id for a blend
    index_id: bytes  # the evidence index as of now; zero without one
    price_gwei_per_token: int
    blend: Blend | None = None
    prefix_id: bytes = ZERO_ID  # how prompts begin, as its owner published; zero where nothing is public

    @property
    def has_evidence(self) -> bool:
        """Of one adapter's records: the base model has none, a blend would need one index of several."""
        return self.adapter_id != ZERO_ID and self.blend is None


def resolve(session: Session, model: str, base_id: bytes, base_gwei_per_token: int) -> ServedModel:
    """The one model that ``model`` names: ``base``, ``owner/model@version``, a bare ``owner/model``, or a
    blend of such adapters.

    Raises:
        Rejected: 404 for an unknown name, 410 for a withdrawn version, 404 for an adapter of another base;
            400 ``blend_weights`` and ``blend_parts`` for a blend that is none.
    """
    if "*" in model or "+" in model:
        return _blended([_weighted(session, part, base_id) for part in model.split("+")], base_id)
    if model == BASE or model == base_ref(base_id):
        return ServedModel(base_ref(base_id), base_id, ZERO_ID, ZERO_ID, base_gwei_per_token)
    return _adapter(session, model, base_id)


def _adapter(session: Session, asked: str, base_id: bytes) -> ServedModel:
    row = adapters.served_row(session, asked)
    ref = f"{row.name}@{row.version}"
    if row.base_id != base_id.hex():
        other = f"{ref} belongs to base {row.base_id}, here runs {base_id.hex()}"
        raise Rejected("model_not_found", other, field="model", http_status=404)
    return ServedModel(
        ref=ref,
        base_id=base_id,
        adapter_id=bytes.fromhex(row.adapter_id),
        index_id=bytes.fromhex(row.index_id) if row.index_id else ZERO_ID,
        price_gwei_per_token=row.price_gwei_per_token,
        prefix_id=bytes.fromhex(row.prefix_id) if row.prefix_id else ZERO_ID,
    )


def _weighted(session: Session, part: str, base_id: bytes) -> tuple[ServedModel, int]:
    ref, _, weight = part.partition("*")
    if not WEIGHT.fullmatch(weight):
        given = f"{part[:120]!r} is not a model times a weight below 1 of at most six decimals, as a/b*0.5"
        raise Rejected("blend_weights", given, field="model")
    return _adapter(session, ref, base_id), int(Decimal(weight) * PPM)


def _blended(parts: list[tuple[ServedModel, int]], base_id: bytes) -> ServedModel:
    """Its price is the mean of its parts' by weight, rounded up."""
    parts.sort(key=lambda part: part[0].adapter_id)
    blend = Blend(tuple(BlendPart(one.adapter_id, ppm) for one, ppm in parts))
    dearness = sum(one.price_gwei_per_token * ppm for one, ppm in parts)
    return ServedModel(
        ref=_blend_ref([(one.ref, ppm) for one, ppm in parts]),
        base_id=base_id,
        adapter_id=blend.blend_id,
        index_id=ZERO_ID,
        price_gwei_per_token=-(-dearness // PPM),
        blend=blend,
    )


def _blend_ref(parts: list[tuple[str, int]]) -> str:
    return "+".join(f"{ref}*{f'{ppm / PPM:.6f}'.rstrip('0')}" for ref, ppm in sorted(parts))


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
    if row is not None:
        return f"{row.name}@{row.version}"
    blend = blends_among(session, [adapter_id]).get(adapter_id)
    if blend is None:
        return adapter_id.hex()
    return _blend_ref([(ref_of(session, base_id, one.adapter_id), one.weight_ppm) for one in blend.parts])


def served(session: Session, base_id: bytes) -> list[Adapter]:
    return [adapter for adapter in adapters.published(session) if adapter.base_id == base_id]
