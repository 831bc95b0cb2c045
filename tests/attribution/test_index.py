import json
from pathlib import Path

import numpy as np
import pytest

from attribution.errors import Corrupted
from attribution.gradients import Factors
from attribution.index import FILES, Index, IndexCard, index_id_of, open_index, write_index
from attribution.spans import build_segment, find_spans

CARD = IndexCard(
    adapter_id="aa" * 32,
    base_id="bb" * 32,
    manifest_ids=("cc" * 32,),
    num_trained=2,
    num_controls=1,
    snapshots=(4, 8),
    lora_scale=2.0,
    damping=1.0,
    wordings_per_record=1,
    sketch_size=16,
    sketch_seed=7,
)


def written(folder: Path, lora: dict[str, Factors]) -> bytes:
    folder.mkdir()
    features = np.arange(48, dtype=np.int16).reshape(3, 16)
    other = {path: Factors(factors.a + 1, factors.b, factors.scale) for path, factors in lora.items()}
    segment = build_segment([(0, [1, 2, 3]), (1, [4, 5, 6])], vocab_size=97)
    return write_index(folder, CARD, features, [lora, other], segment)


def opened(folder: Path, index_id: bytes) -> Index:
    return open_index(folder.joinpath, index_id)


def test_open_inverts_write(tmp_path: Path, toy_lora: dict[str, Factors]) -> None:
    index = opened(tmp_path / "i", written(tmp_path / "i", toy_lora))
    assert index.card == CARD
    assert index.features.tolist() == np.arange(48).reshape(3, 16).tolist()
    first, second = index.loras
    assert sorted(first) == sorted(second) == sorted(toy_lora)
    for path, factors in toy_lora.items():
        assert first[path].a.equal(factors.a) and first[path].b.equal(factors.b)
        assert second[path].a.equal(factors.a + 1) and second[path].scale == CARD.lora_scale
    assert find_spans(index.segment, [4, 5, 6], min_tokens=3, min_bits=0.0)[0].records == (1,)


def test_equal_contents_have_one_id(tmp_path: Path, toy_lora: dict[str, Factors]) -> None:
    assert written(tmp_path / "a", toy_lora) == written(tmp_path / "b", toy_lora)


@pytest.mark.parametrize("name", FILES)
def test_a_changed_byte_in_any_file_is_refused(
    tmp_path: Path, toy_lora: dict[str, Factors], name: str
) -> None:
    index_id = written(tmp_path / "i", toy_lora)
    data = bytearray((tmp_path / "i" / name).read_bytes())
    data[-1] ^= 1
    (tmp_path / "i" / name).write_bytes(data)
    with pytest.raises(Corrupted, match=index_id.hex()):
        opened(tmp_path / "i", index_id)


@pytest.mark.parametrize(
    ("change", "code"),
    [
        ({"format": 9}, "index_format"),
        ({"damping": None, "extra": 1}, "index_card"),
        ({"num_trained": 5}, "index_features"),
    ],
)
def test_a_card_that_does_not_fit_is_refused(
    tmp_path: Path, toy_lora: dict[str, Factors], change: dict[str, object], code: str
) -> None:
    """Even where the id was taken over the wrong card."""
    written(tmp_path / "i", toy_lora)
    path = tmp_path / "i" / "index.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(Corrupted) as refusal:
        opened(tmp_path / "i", index_id_of({name: tmp_path / "i" / name for name in FILES}))
    assert refusal.value.code == code
