"""One adapter's index: prepared once, so that each answer's evidence and each period's credits are cheap.

Files of one index, named together by ``index_id`` (SHA-256 over the names and hashes of all of them):

    index.json                                  the ``IndexCard``: what went in, and how
    features.npy                                int16 [trained + controls, sketch], attribution/influence.py
    factors.safetensors                         the fp32 LoRA factors at every snapshot
    tokens.npy suffixes.npy starts.npy owners.npy   the records' segment, attribution/spans.py

Rows follow the card's manifests: first all trained groups, manifest by manifest in the order of their
entries, then all controls in the same way. Opening checks every hash, so whoever holds an ``index_id`` holds
exactly these integers."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file
from torch import Tensor

from attribution.codec import Encoder
from attribution.errors import Corrupted
from attribution.gradients import Factors, Lora
from attribution.hashing import sha256
from attribution.spans import ARRAYS, Segment, open_segment, save_segment

FILES = (
    "index.json",
    "features.npy",
    "factors.safetensors",
    *(f"{name}.npy" for name in ARRAYS),
)
FORMAT = 1


@dataclass(frozen=True, slots=True)
class IndexCard:
    """What went into an index, in hex and plain numbers.

    ``snapshots`` are the trajectory steps at which gradients of records and of answers are taken and
    compared; their scores are averaged. ``damping`` is relative to a unit gradient's squared length."""

    adapter_id: str
    base_id: str
    manifest_ids: tuple[str, ...]
    num_trained: int
    num_controls: int
    snapshots: tuple[int, ...]
    lora_scale: float
    damping: float
    wordings_per_record: int
    sketch_size: int
    sketch_seed: int
    format: int = FORMAT

    @property
    def method(self) -> str:
        """One line for the statement: how credits follow from answers."""
        return (
            f"damped-fisher/1 damping={self.damping:g} checkpoints={','.join(map(str, self.snapshots))} "
            f"wordings={self.wordings_per_record} sketch={self.sketch_size}"
        )


@dataclass(frozen=True, slots=True)
class Index:
    index_id: bytes
    card: IndexCard
    features: NDArray[np.int16]
    loras: tuple[Lora, ...]  # at each of the card's snapshots
    segment: Segment


def write_index(
    folder: Path, card: IndexCard, features: NDArray[np.int16], loras: Sequence[Lora], segment: Segment
) -> bytes:
    """Write all files into an empty folder and return their ``index_id``."""
    assert features.dtype == np.int16
    assert features.shape == (card.num_trained + card.num_controls, card.sketch_size)
    np.save(folder / "features.npy", features, allow_pickle=False)
    tensors = {
        f"{step}/{path}.{name}": getattr(lora[path], name).clone()
        for step, lora in zip(card.snapshots, loras, strict=True)
        for path in sorted(lora)
        for name in ("a", "b")
    }
    save_file(tensors, folder / "factors.safetensors")
    save_segment(segment, folder)
    text = json.dumps(asdict(card), indent=1, sort_keys=True) + "\n"
    (folder / "index.json").write_text(text, encoding="utf-8")
    return index_id_of({name: folder / name for name in FILES})


def open_index(locate: Callable[[str], Path], index_id: bytes) -> Index:
    """Open the files that ``locate`` finds by name; arrays are memory-mapped.

    Raises:
        Corrupted: the files do not hash to ``index_id``, or do not fit together.
    """
    files = {name: locate(name) for name in FILES}
    found = index_id_of(files)
    if found != index_id:
        raise Corrupted(
            "index_hash", f"index {index_id.hex()}: its files hash to {found.hex()}", field="index_id"
        )
    card = _read_card(files["index.json"])
    features = np.load(files["features.npy"], mmap_mode="r", allow_pickle=False)
    expected = (card.num_trained + card.num_controls, card.sketch_size)
    if features.shape != expected or features.dtype != np.int16:
        raise Corrupted("index_features", f"{features.dtype} {features.shape}, expected int16 {expected}")
    tensors = load_file(files["factors.safetensors"])
    loras = tuple(_lora(tensors, f"{step}/", card.lora_scale) for step in card.snapshots)
    return Index(index_id, card, features, loras, open_segment(locate))


def index_id_of(files: Mapping[str, Path]) -> bytes:
    e = Encoder("openledger/index/1")
    e.each(sorted(files), lambda enc, name: enc.text(name).id32(sha256(files[name].read_bytes())))
    return sha256(e.finish())


def _lora(tensors: Mapping[str, Tensor], prefix: str, scale: float) -> Lora:
    paths = sorted({name.rpartition(".")[0] for name in tensors if name.startswith(prefix)})
    pairs = {path: Factors(tensors[f"{path}.a"], tensors[f"{path}.b"], scale) for path in paths}
    return {path.removeprefix(prefix): factors for path, factors in pairs.items()}


def _read_card(path: Path) -> IndexCard:
    try:
        given: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        lists = {name: tuple(given[name]) for name in ("manifest_ids", "snapshots")}
        card = IndexCard(**{**given, **lists})
    except (ValueError, TypeError, KeyError) as error:
        raise Corrupted("index_card", f"index.json does not read as a card: {error}") from error
    if card.format != FORMAT:
        raise Corrupted("index_format", f"index format {card.format}, this code reads {FORMAT}")
    return card
