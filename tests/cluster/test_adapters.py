"""An adapter is its bytes; a strange file is refused; a name resolves to what its owner published."""

import pickle
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load, save
from sqlalchemy import Engine
from sqlalchemy.orm import Session

from attribution.errors import Corrupted, Rejected
from attribution.hashing import sha256
from cluster.adapters import (
    AdapterWeights,
    adapter_key,
    check_finite,
    load_adapter,
    pack,
    price_gwei_per_token,
    promote,
    publish,
    published,
    resolve,
    store_adapter,
    unpack,
    view,
    withdraw,
)
from cluster.database import writing
from cluster.storage import DirectoryStorage
from tests import toy_models

BASE = sha256(b"base")
SHAPES = {"model.layers.0.self_attn.q_proj": (8, 6), "model.layers.1.mlp.down_proj": (6, 12)}
OWNER = sha256(b"owner")


@pytest.fixture
def session(engine: Engine) -> Iterator[Session]:
    with writing(engine) as session:
        yield session


def put(session: Session, name: str, seed: int = 0, owner: bytes = OWNER) -> bytes:
    packed = pack(toy_models.random_adapter(BASE, SHAPES, seed=seed))
    publish(
        session,
        adapter_id=sha256(packed),
        name=name,
        base_id=BASE,
        manifest_ids=(sha256(b"one"), sha256(b"two")),
        owner_id=owner,
        trajectory="trajectories/run",
        price_gwei_per_token=7,
        now=1,
    )
    return sha256(packed)


def test_unpack_inverts_pack_and_equal_weights_have_equal_bytes() -> None:
    weights = toy_models.random_adapter(BASE, SHAPES)
    packed = pack(weights)
    again = unpack(packed, BASE, SHAPES)
    reversed_order = AdapterWeights(BASE, dict(reversed(weights.factors.items())))
    assert pack(again) == packed == pack(reversed_order)
    for module, factors in weights.factors.items():
        assert torch.equal(again.factors[module].a, factors.a)
        assert torch.equal(again.factors[module].b, factors.b)


def altered(change: str) -> bytes:
    """The packed toy adapter with one thing wrong."""
    packed = pack(toy_models.random_adapter(BASE, SHAPES))
    tensors, module = load(packed), "model.layers.0.self_attn.q_proj"
    base = {"base_id": BASE.hex()}
    match change:
        case "pickle":
            return pickle.dumps(tensors)
        case "truncated":
            return packed[:-1]
        case "empty file":
            return b""
        case "other base":
            return save(tensors, metadata={"base_id": sha256(b"other").hex()})
        case "no base":
            return save(tensors)
        case "no tensors":
            return save({}, metadata=base)
        case "fp32":
            tensors[f"{module}.a"] = tensors[f"{module}.a"].float()
        case "wide":
            tensors[f"{module}.a"] = torch.zeros(4, 7, dtype=torch.bfloat16)
        case "rank mismatch":
            tensors[f"{module}.a"] = torch.zeros(5, 6, dtype=torch.bfloat16)
        case "rank 0":
            tensors[f"{module}.a"] = torch.zeros(0, 6, dtype=torch.bfloat16)
            tensors[f"{module}.b"] = torch.zeros(8, 0, dtype=torch.bfloat16)
        case "vector":
            tensors[f"{module}.a"] = torch.zeros(6, dtype=torch.bfloat16)
        case "half a module":
            del tensors[f"{module}.b"]
        case "unknown module":
            tensors["model.embed_tokens.a"] = tensors[f"{module}.a"].clone()
        case "third factor":
            tensors[f"{module}.c"] = tensors[f"{module}.a"].clone()
        case "nan":
            tensors[f"{module}.a"][0, 0] = float("nan")
    return save(tensors, metadata=base)


@pytest.mark.parametrize(
    ("change", "code"),
    [
        ("pickle", "not_safetensors"),
        ("truncated", "not_safetensors"),
        ("empty file", "not_safetensors"),
        ("other base", "adapter_base"),
        ("no base", "adapter_base"),
        ("no tensors", "adapter_module"),
        ("fp32", "adapter_dtype"),
        ("wide", "adapter_shape"),
        ("rank mismatch", "adapter_shape"),
        ("rank 0", "adapter_shape"),
        ("vector", "adapter_shape"),
        ("half a module", "adapter_module"),
        ("unknown module", "adapter_module"),
        ("third factor", "adapter_module"),
        ("nan", "adapter_values"),
    ],
)
def test_a_file_that_does_not_fit_is_refused(change: str, code: str) -> None:
    assert verdict(unpacked, altered(change)) == code == verdict(viewed, altered(change))


def unpacked(data: bytes) -> AdapterWeights:
    return unpack(data, BASE, SHAPES)


def viewed(data: bytes) -> AdapterWeights:
    """By the fast way: a view, and then the look at its values."""
    weights = view(memoryview(bytearray(data)), BASE, SHAPES)
    check_finite(weights.factors)
    return weights


def verdict(read: Callable[[bytes], AdapterWeights], data: bytes) -> str:
    """The code of the refusal, or what the file says."""
    try:
        return pack(read(data)).hex()
    except Rejected as refusal:
        return refusal.code


ODD = (
    b'"',
    b"{}",
    b",",
    b":",
    b"\\",
    b"0",
    b"1",
    b"[",
    b"-",
    b"1e1",
    b"true",
    b"null",
    b"\xff",
    b" ",
    b"",
    b"F32",
)


@settings(max_examples=400, deadline=None)
@given(st.data())
def test_a_view_refuses_what_unpack_refuses_and_else_reads_the_same(data: st.DataObject) -> None:
    """Whatever is done to the header, by chance or by taking one of its words for another."""
    packed = pack(toy_models.random_adapter(BASE, SHAPES))
    length = int.from_bytes(packed[:8], "little")
    header, values = packed[8 : 8 + length], packed[8 + length :]
    words = re.findall(rb"\w+|\W", header)
    for _ in range(data.draw(st.integers(0, 3))):
        index = data.draw(st.integers(0, len(words) - 1))
        words[index] = data.draw(st.sampled_from([*ODD, *words]))
    header = b"".join(words) + b" " * data.draw(st.integers(0, 2))
    values += bytes(data.draw(st.integers(0, 2)))
    changed = len(header).to_bytes(8, "little") + header + values
    assert verdict(viewed, changed) == verdict(unpacked, changed)


def test_a_view_is_the_file_itself() -> None:
    packed = bytearray(pack(toy_models.random_adapter(BASE, SHAPES)))
    factors = view(memoryview(packed), BASE, SHAPES).factors
    packed[-2:] = b"\x80\x3f"  # 1 in bf16
    assert max(float(each.b[-1, -1]) == 1 for each in factors.values())


def test_a_stored_adapter_loads_and_a_changed_byte_is_noticed(session: Session, tmp_path: Path) -> None:
    files, weights = DirectoryStorage(tmp_path), toy_models.random_adapter(BASE, SHAPES)
    adapter_id = store_adapter(files, pack(weights))
    assert put(session, "ada/lint") == adapter_id
    adapter = resolve(session, "ada/lint")
    assert pack(load_adapter(files, adapter, SHAPES)) == pack(weights)
    files.put(adapter_key(adapter_id), pack(weights) + b"\0")
    with pytest.raises(Corrupted, match=adapter.adapter_id.hex()):
        load_adapter(files, adapter, SHAPES)


def test_versions_count_up_and_a_bare_name_is_the_promoted_one(session: Session) -> None:
    first, second = put(session, "ada/lint", 0), put(session, "ada/lint", 1)
    assert resolve(session, "ada/lint").adapter_id == first
    assert resolve(session, "ada/lint@2").adapter_id == second
    assert promote(session, "ada/lint@2").ref == "ada/lint@2"
    assert resolve(session, "ada/lint").adapter_id == second
    assert [adapter.ref for adapter in published(session)] == ["ada/lint@2", "ada/lint@1"]
    assert price_gwei_per_token(session, resolve(session, "ada/lint")) == 7


def test_publishing_the_same_file_again_changes_nothing(session: Session) -> None:
    put(session, "ada/lint")
    put(session, "ada/lint")
    assert [adapter.version for adapter in published(session)] == [1]
    assert resolve(session, "ada/lint").manifest_ids == (sha256(b"one"), sha256(b"two"))


def test_a_withdrawn_version_is_gone_for_requests(session: Session) -> None:
    put(session, "ada/lint")
    withdraw(session, "ada/lint@1", now=5)
    withdraw(session, "ada/lint@1", now=6)
    with pytest.raises(Rejected) as refused:
        resolve(session, "ada/lint@1")
    assert (refused.value.code, refused.value.http_status) == ("model_withdrawn", 410)
    with pytest.raises(Rejected) as refused:
        resolve(session, "ada/lint")
    assert (refused.value.code, refused.value.http_status) == ("model_not_found", 404)
    assert published(session) == []


MALFORMED = ("", "ada", "ada/lint@0", "ada/lint@1@1", "../../etc/passwd", "ada/..", "ADA/lint", "ada/lint\n")


@pytest.mark.parametrize("ref", ["ada/other", "ada/lint@2", "x" * 500, *MALFORMED])
def test_an_unknown_or_malformed_reference_is_not_found(session: Session, ref: str) -> None:
    put(session, "ada/lint")
    with pytest.raises(Rejected) as refused:
        resolve(session, ref)
    assert (refused.value.code, refused.value.http_status) == ("model_not_found", 404)


@pytest.mark.parametrize(
    "name", ["lint", "Ada/lint", "ada/..", "ada/a/b", "ada/lint@1", "ada/" + "x" * 200, "-a/b"]
)
def test_a_name_that_could_be_a_path_is_refused(session: Session, name: str) -> None:
    with pytest.raises(Rejected) as refused:
        put(session, name)
    assert refused.value.code == "model_name"


def test_a_name_belongs_to_its_first_publisher_and_a_file_to_its_first_name(session: Session) -> None:
    put(session, "ada/lint")
    with pytest.raises(Rejected) as refused:
        put(session, "ada/lint", seed=1, owner=sha256(b"thief"))
    assert refused.value.code == "not_owner"
    with pytest.raises(Rejected) as refused:
        put(session, "bob/lint")
    assert refused.value.code == "adapter_exists"
