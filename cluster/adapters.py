"""Adapters as files and rows: the packed LoRA format, and publish, resolve, promote, withdraw.

A packed adapter is one safetensors file whose SHA-256 is the adapter's id: for every adapted linear module
``<module>.a`` ``[rank, d_in]`` and ``<module>.b`` ``[d_out, rank]`` in bf16, ``alpha / rank`` folded into
``b``, so ``y = W x + b (a x)``. Modules are named as in the base model
(``model.layers.14.self_attn.q_proj``). Files from strangers pass through ``unpack``, which believes nothing.
A name's first version is promoted; later ones wait for ``promote``. Whoever published a name first owns
it."""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from sqlalchemy import Select, func, select, update
from sqlalchemy.orm import Session
from torch import Tensor

from attribution.errors import Corrupted, Rejected
from attribution.hashing import sha256
from attribution.types import Adapter
from cluster.packed_header import read_header
from cluster.storage import Storage
from cluster.tables import AdapterRow

NAME = re.compile(r"(?=.{3,100}$)[a-z0-9][a-z0-9-]{0,38}/[a-z0-9]+(?:[._-][a-z0-9]+)*")
REF = re.compile(r"(?P<name>[^@]{3,100})(?:@(?P<version>[1-9][0-9]{0,8}))?")
MAX_RANK = 256


@dataclass(frozen=True, slots=True)
class Factors:
    """One module's update, bf16: ``a`` ``[rank, d_in]``, ``b`` ``[d_out, rank]`` with the scaling folded
    in."""

    a: Tensor
    b: Tensor


@dataclass(frozen=True, slots=True)
class AdapterWeights:
    """All factors of one adapter and the base model they belong to."""

    base_id: bytes
    factors: Mapping[str, Factors]


def pack(weights: AdapterWeights) -> bytes:
    """The adapter's file; equal weights give equal bytes (one metadata key: safetensors does not sort
    them)."""
    tensors: dict[str, Tensor] = {}
    for module in sorted(weights.factors):
        factors = weights.factors[module]
        tensors[f"{module}.a"] = factors.a.to(torch.bfloat16).contiguous()
        tensors[f"{module}.b"] = factors.b.to(torch.bfloat16).contiguous()
    return save(tensors, metadata={"base_id": weights.base_id.hex()})


def unpack(data: bytes, base_id: bytes, linear_shapes: Mapping[str, tuple[int, int]]) -> AdapterWeights:
    """Read a packed adapter that must fit this base model.

    Args:
        linear_shapes: ``(d_out, d_in)`` of the base's linear modules, from ``cluster.models.linear_shapes``.

    Raises:
        Rejected: ``not_safetensors``, ``adapter_base``, ``adapter_module``, ``adapter_dtype``,
        ``adapter_shape``
            or ``adapter_values``.
    """
    try:
        tensors = load(data)
    except (SafetensorError, ValueError, KeyError) as error:  # a pickle, a truncated file, an unknown type
        raise Rejected("not_safetensors", f"not a safetensors file: {error}", field="adapter") from error
    length = int.from_bytes(data[:8], "little")
    metadata = json.loads(data[8 : 8 + length]).get("__metadata__") or {}
    weights = _fitting(tensors, metadata.get("base_id"), base_id, linear_shapes)
    check_finite(weights.factors)
    return weights


def view(data: memoryview, base_id: bytes, linear_shapes: Mapping[str, tuple[int, int]]) -> AdapterWeights:
    """``unpack`` without its copies and its look at the values: who packs them further looks at them there.

    The factors point into ``data``, which must be writable and is not written to. Only a header of the plain
    form that ``pack`` gives is read here, any other by ``unpack``: so both refuse the same files.

    Raises:
        Rejected: as ``unpack`` does, but for ``adapter_values``.
    """
    header = read_header(data)
    if header is None:
        return unpack(bytes(data), base_id, linear_shapes)
    values = torch.frombuffer(data, dtype=torch.bfloat16, offset=header.size_bytes)
    tensors = {
        name: values.as_strided(shape, (shape[1], 1), start)
        for name, (shape, start, _) in header.places.items()
    }
    return _fitting(tensors, header.base_id, base_id, linear_shapes)


def check_finite(factors: Mapping[str, Factors]) -> None:
    """Raises: Rejected ``adapter_values``."""
    for module, factor in factors.items():
        if not (factor.a.isfinite().all() and factor.b.isfinite().all()):
            raise not_finite(module)


def not_finite(module: str) -> Rejected:
    return Rejected("adapter_values", f"{module} holds values that are not finite", field=module)


def _fitting(
    tensors: Mapping[str, Tensor],
    given: str | None,
    base_id: bytes,
    linear_shapes: Mapping[str, tuple[int, int]],
) -> AdapterWeights:
    """``tensors`` by module, if they are an adapter of this base."""
    if given != base_id.hex():
        raise Rejected("adapter_base", f"made for base {given!r}, this is {base_id.hex()}", field="base_id")
    modules = sorted({name.rpartition(".")[0] for name in tensors})
    if not modules:
        raise Rejected("adapter_module", "no module is adapted", field="adapter")
    factors = {module: _factors(module, tensors, linear_shapes) for module in modules}
    if len(tensors) != 2 * len(modules):
        raise Rejected(
            "adapter_module", f"{len(tensors)} tensors for {len(modules)} modules", field="adapter"
        )
    return AdapterWeights(base_id, factors)


def _factors(
    module: str, tensors: Mapping[str, Tensor], linear_shapes: Mapping[str, tuple[int, int]]
) -> Factors:
    shape = linear_shapes.get(module)
    if shape is None:
        raise Rejected("adapter_module", f"the base has no linear module {module[:100]!r}", field="adapter")
    a, b = tensors.get(f"{module}.a"), tensors.get(f"{module}.b")
    if a is None or b is None:
        raise Rejected("adapter_module", f"{module} needs both .a and .b", field="adapter")
    if a.dtype != torch.bfloat16 or b.dtype != torch.bfloat16:
        raise Rejected("adapter_dtype", f"{module}: {a.dtype} and {b.dtype}, expected bfloat16", field=module)
    rank = a.shape[0] if a.dim() == 2 else 0
    expected = ((rank, shape[1]), (shape[0], rank))
    if not 1 <= rank <= MAX_RANK or (tuple(a.shape), tuple(b.shape)) != expected:
        found = (tuple(a.shape), tuple(b.shape))
        raise Rejected("adapter_shape", f"{module}: a and b are {found}, expected {expected}", field=module)
    return Factors(a, b)


def store_adapter(storage: Storage, packed: bytes) -> bytes:
    """Put a packed adapter where every worker finds it; returns its id. Storing it again changes nothing."""
    adapter_id = sha256(packed)
    storage.put_if_absent(adapter_key(adapter_id), packed)
    return adapter_id


def load_adapter(
    storage: Storage, adapter: Adapter, linear_shapes: Mapping[str, tuple[int, int]]
) -> AdapterWeights:
    """The factors behind a published row, checked against its id."""
    return AdapterWeights(
        adapter.base_id, stored_factors(storage, adapter.adapter_id, adapter.base_id, linear_shapes)
    )


def stored_factors(
    storage: Storage, adapter_id: bytes, base_id: bytes, linear_shapes: Mapping[str, tuple[int, int]]
) -> Mapping[str, Factors]:
    packed = storage.get(adapter_key(adapter_id))
    if sha256(packed) != adapter_id:
        found = f"the file of {adapter_id.hex()} hashes to {sha256(packed).hex()}"
        raise Corrupted("adapter_hash", found, field="adapter_id")
    return unpack(packed, base_id, linear_shapes).factors


def adapter_key(adapter_id: bytes) -> str:
    return f"adapters/{adapter_id.hex()}.safetensors"


def check_name(name: str) -> None:
    """``Rejected`` unless it is ``owner/model`` in lower case."""
    if not NAME.fullmatch(name):
        raise Rejected(
            "model_name", f"expected owner/model in lower case, given {name[:100]!r}", field="name"
        )


def publish(
    session: Session,
    *,
    adapter_id: bytes,
    name: str,
    base_id: bytes,
    manifest_ids: tuple[bytes, ...],
    owner_id: bytes,
    trajectory: str,
    price_gwei_per_token: int,
    now: int,
) -> Adapter:
    """Give a stored file its next version under ``name``. The same file under the same name is returned as it
    is.

    Raises:
        Rejected: ``model_name``; 403 ``not_owner``; 409 ``adapter_exists`` (the same file under another
        name).
    """
    check_name(name)
    existing = session.get(AdapterRow, adapter_id.hex())
    if existing is not None:
        if existing.name != name:
            raise Rejected(
                "adapter_exists", f"this file is {existing.name}, not {name}", field="name", http_status=409
            )
        return _adapter(existing)
    newest = session.scalars(_versions(name)).first()
    if newest is not None and newest.owner_id != owner_id.hex():
        raise Rejected("not_owner", f"{name} belongs to {newest.owner_id}", field="owner_id", http_status=403)
    row = AdapterRow(
        adapter_id=adapter_id.hex(),
        name=name,
        version=1 if newest is None else newest.version + 1,
        base_id=base_id.hex(),
        manifest_ids=",".join(manifest.hex() for manifest in manifest_ids),
        owner_id=owner_id.hex(),
        trajectory=trajectory,
        price_gwei_per_token=price_gwei_per_token,
        is_promoted=int(newest is None),
        created_at=now,
    )
    session.add(row)
    session.flush()
    return _adapter(row)


def resolve(session: Session, ref: str) -> Adapter:
    """``owner/model@version``, or a bare name for its promoted version.

    Raises:
        Rejected: 404 ``model_not_found``, 410 ``model_withdrawn``.
    """
    return _adapter(served_row(session, ref))


def served_row(session: Session, ref: str) -> AdapterRow:
    """What ``resolve`` reads, and raises."""
    row = _row(session, ref)
    if row.withdrawn_at is not None:
        raise Rejected("model_withdrawn", f"{ref} was withdrawn", field="model", http_status=410)
    return row


def price_gwei_per_token(session: Session, adapter: Adapter) -> int:
    """What its owner asks for one token."""
    return session.scalars(
        select(AdapterRow.price_gwei_per_token).where(AdapterRow.adapter_id == adapter.adapter_id.hex())
    ).one()


def published(session: Session) -> list[Adapter]:
    """Everything that can be asked, by name, newest version first."""
    rows = select(AdapterRow).where(AdapterRow.withdrawn_at.is_(None))
    return [
        _adapter(row) for row in session.scalars(rows.order_by(AdapterRow.name, AdapterRow.version.desc()))
    ]


def promote(session: Session, ref: str) -> Adapter:
    """Make this version what the bare name means."""
    adapter = resolve(session, ref)
    session.execute(update(AdapterRow).where(AdapterRow.name == adapter.name).values(is_promoted=0))
    this = AdapterRow.adapter_id == adapter.adapter_id.hex()
    session.execute(update(AdapterRow).where(this).values(is_promoted=1))
    return adapter


def publish_prefix(session: Session, ref: str, prefix_id: bytes) -> Adapter:
    """Say in public that prompts for this version begin like the stored prefix, instead of whatever was said
    before.

    Raises:
        Rejected: as ``resolve`` does.
    """
    row = served_row(session, ref)
    row.prefix_id = prefix_id.hex()
    return _adapter(row)


def withdraw(session: Session, ref: str, now: int) -> None:
    """Stop serving this version. Its receipts stay, and are settled and paid; withdrawing twice is fine."""
    row = _row(session, ref)
    row.withdrawn_at = row.withdrawn_at or now
    row.is_promoted = 0


def num_withdrawn(session: Session) -> int:
    """Versions no longer served. It only ever grows: a withdrawal is for good."""
    withdrawn = AdapterRow.withdrawn_at.is_not(None)
    return session.scalars(select(func.count()).select_from(AdapterRow).where(withdrawn)).one()


def withdrawn(session: Session) -> list[bytes]:
    """Adapters no longer served."""
    ids = select(AdapterRow.adapter_id).where(AdapterRow.withdrawn_at.is_not(None))
    return [bytes.fromhex(adapter_id) for adapter_id in session.scalars(ids)]


def _row(session: Session, ref: str) -> AdapterRow:
    match = REF.fullmatch(ref)
    if match is not None and NAME.fullmatch(match["name"]):
        wanted = _versions(match["name"])
        version = match["version"]
        condition = AdapterRow.version == int(version) if version else AdapterRow.is_promoted == 1
        row = session.scalars(wanted.where(condition)).first()
        if row is not None:
            return row
    raise Rejected("model_not_found", f"no model {ref[:120]!r}", field="model", http_status=404)


def _versions(name: str) -> Select[AdapterRow]:
    return select(AdapterRow).where(AdapterRow.name == name).order_by(AdapterRow.version.desc())


def _adapter(row: AdapterRow) -> Adapter:
    return Adapter(
        bytes.fromhex(row.adapter_id),
        row.name,
        row.version,
        bytes.fromhex(row.base_id),
        tuple(bytes.fromhex(manifest) for manifest in row.manifest_ids.split(",") if manifest),
        bytes.fromhex(row.owner_id),
    )
