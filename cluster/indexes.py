"""Evidence indexes and sealed manifests in storage: put once under their ids, checked whenever they are
opened."""

from collections.abc import Sequence
from pathlib import Path

from attribution.errors import Corrupted
from attribution.index import FILES, Index, open_index
from attribution.types import Manifest, Record
from cluster.storage import Storage, get_content


def store_index(storage: Storage, folder: Path, index_id: bytes) -> None:
    """Upload what ``attribution.index.write_index`` wrote; uploading it again changes nothing."""
    for name in FILES:
        storage.upload(index_key(index_id, name), folder / name)


def stored_index(storage: Storage, index_id: bytes) -> Index:
    """``Corrupted`` if the files are not those of the id, ``Rejected`` if there are none."""
    return open_index(lambda name: storage.fetch(index_key(index_id, name)), index_id)


def index_key(index_id: bytes, name: str) -> str:
    return f"indexes/{index_id.hex()}/{name}"


def stored_manifest(storage: Storage, manifest_id: bytes) -> Manifest:
    return Manifest.from_canonical(get_content(storage, "manifests", manifest_id.hex()))


def indexed_records(index: Index, manifests: Sequence[Manifest]) -> tuple[Record, ...]:
    """The trained records in the order of the index's rows. ``manifests`` are the card's, in its order."""
    found = tuple(manifest.manifest_id.hex() for manifest in manifests)
    records = tuple(entry.record for manifest in manifests for entry in manifest.entries)
    if found != index.card.manifest_ids or len(records) != index.card.num_trained:
        raise Corrupted(
            "index_manifests",
            f"index {index.index_id.hex()} is over {index.card.num_trained} groups of "
            f"{index.card.manifest_ids}, given {len(records)} of {found}",
        )
    return records
