"""A blend over HTTP: its adapters' weighted sum answers, at one price, and one receipt names its parts."""

import time
from typing import Any

import pytest

from attribution.types import PPM, Blend, BlendPart
from chain.outbox import BatchRules, next_batch
from cluster.adapters import AdapterWeights, pack, publish, store_adapter, withdraw
from cluster.database import reading, writing
from serve_apps.engine.blending import blended
from tests.serve_apps.conftest import Gateway

MODEL = "toy/a1@1*0.25+toy/a2*0.75"


def ask(gateway: Gateway, model: str) -> dict[str, Any]:
    body = {"model": model, "prompt": "What is it?", "max_tokens": 12, "temperature": 0, "ignore_eos": True}
    answer = gateway.http().post("/v1/completions", json=body)
    assert answer.status_code == 200, answer.text
    found: dict[str, Any] = answer.json()
    return found


def blend_of(gateway: Gateway, *weights: float) -> Blend:
    ids = gateway.toys.adapter_ids
    parts = [BlendPart(adapter_id, round(w * PPM)) for adapter_id, w in zip(ids, weights, strict=False)]
    return Blend(tuple(sorted(parts, key=lambda part: part.adapter_id)))


def test_a_blend_answers_as_the_sum_of_its_adapters_would(gateway: Gateway) -> None:
    """The same update, published as an adapter of its own: the same tokens, which its parts alone do not
    give."""
    toys, blend = gateway.toys, blend_of(gateway, 0.25, 0.75)
    parts = [toys.adapters[part.adapter_id].factors for part in blend.parts]
    merged = blended(parts, [part.weight_ppm for part in blend.parts])
    adapter_id = store_adapter(toys.storage, pack(AdapterWeights(toys.base.base_id, merged)))
    with writing(gateway.database) as session:
        publish(
            session,
            adapter_id=adapter_id,
            name="toy/merged",
            base_id=toys.base.base_id,
            manifest_ids=(),
            owner_id=b"\7" * 32,
            trajectory="",
            price_gwei_per_token=20,
            now=1,
        )
    texts = {
        model: ask(gateway, model)["choices"][0]["text"]
        for model in (MODEL, "toy/merged", "toy/a1", "toy/a2")
    }
    assert texts[MODEL] == texts["toy/merged"]
    assert texts[MODEL] not in (texts["toy/a1"], texts["toy/a2"])


def test_its_receipt_batch_and_usage_name_the_parts(gateway: Gateway) -> None:
    answer, blend = ask(gateway, MODEL), blend_of(gateway, 0.25, 0.75)
    named = "toy/a1@1*0.25+toy/a2@1*0.75"
    assert answer["model"] == named
    told = answer["openledger"]
    assert told["adapter_id"] == blend.blend_id.hex()
    receipt = gateway.http().get(f"/v1/receipts/{told['receipt_id']}").json()
    assert (receipt["model"], receipt["adapter_id"]) == (named, blend.blend_id.hex())
    assert receipt["evidence"]["state"] == "none"
    assert gateway.http().get("/v1/usage").json()["by_model"][0]["model"] == named
    with reading(gateway.database) as session:
        batch = next_batch(session, BatchRules())
    assert batch.blends == (blend,)
    assert gateway.http().get("/v1/models/toy/a2*0.75+toy/a1*0.25").json()["id"] == named


@pytest.mark.parametrize(
    ("model", "status", "code"),
    [
        ("toy/a1*0.5+toy/a2*0.4", 400, "blend_weights"),
        ("toy/a1*0.5+toy/a2", 400, "blend_weights"),
        ("toy/a1*1", 400, "blend_weights"),
        ("toy/a1*-0.5+toy/a2*1.5", 400, "blend_weights"),
        ("toy/a1*0.0000001+toy/a2*0.9999999", 400, "blend_weights"),
        ("toy/a1*0.0+toy/a2*0.999999", 400, "blend_weights"),
        ("toy/a1*0.5+toy/a1@1*0.5", 400, "blend_parts"),
        ("toy/a1*0.5+base*0.5", 404, "model_not_found"),
        ("toy/a1*0.5+nobody/nothing*0.5", 404, "model_not_found"),
        ("+".join(f"toy/a{i}*0.1" for i in range(1, 7)) + "+toy/a1*0.4", 400, "blend_parts"),
        ("*+*", 400, "blend_weights"),
    ],
)
def test_what_is_no_blend_is_refused_before_money(
    gateway: Gateway, model: str, status: int, code: str
) -> None:
    body = {"model": model, "prompt": "What?", "max_tokens": 4}
    answer = gateway.http().post("/v1/completions", json=body)
    assert (answer.status_code, answer.json()["error"]["code"]) == (status, code), answer.text
    assert gateway.charge_states() == []


def test_a_blend_ends_with_the_first_of_its_adapters(gateway: Gateway) -> None:
    named = ask(gateway, MODEL)["model"]
    with writing(gateway.database) as session:
        withdraw(session, "toy/a2@1", int(time.time()))
    answer = gateway.http().post("/v1/completions", json={"model": named, "prompt": "What?", "max_tokens": 4})
    assert (answer.status_code, answer.json()["error"]["code"]) == (410, "model_withdrawn")
