"""``/v1/embeddings`` gives the model's own final hidden states, and is paid by the prompt token."""

import base64
from typing import Any

import numpy as np
import openai
import pytest
import torch
from openai.types import CreateEmbeddingResponse

from attribution.commitment import answer_sha256
from cluster.models import load_base
from tests.cluster.money import assert_money_adds_up
from tests.serve_apps.conftest import Gateway

TEXTS = ["What is liquid in a warm room?", "Which one?", "x"]


def vectors(answer: CreateEmbeddingResponse) -> np.ndarray[Any, Any]:
    assert [one.index for one in answer.data] == list(range(len(answer.data)))
    return np.array([one.embedding for one in answer.data])


@pytest.mark.parametrize("which", [None, 4])
def test_they_are_the_hidden_states_of_transformers(gateway: Gateway, which: int | None) -> None:
    """Of the base model, and of one with the adapter merged into its weights."""
    model = load_base(gateway.toys.base.path, torch.float32)
    if which is not None:
        for module, factors in gateway.toys.adapters[gateway.toys.adapter_ids[which - 1]].factors.items():
            model.get_submodule(module).weight.data += factors.b.float() @ factors.a.float()
    name = "base" if which is None else f"toy/a{which}"
    told = vectors(gateway.client().embeddings.create(model=name, input=TEXTS))
    for text, vector in zip(TEXTS, told, strict=True):
        ids = torch.tensor([gateway.services.tokenizer.encode(text)])
        with torch.inference_mode():
            hidden = model(ids, output_hidden_states=True).hidden_states[-1][0, -1]
        np.testing.assert_allclose(vector, (hidden / hidden.norm()).numpy(), atol=1e-4)


def test_ways_of_asking_agree(gateway: Gateway) -> None:
    create = gateway.client().embeddings.create
    told = vectors(create(model="toy/a2", input=TEXTS))
    ids = [gateway.services.tokenizer.encode(text) for text in TEXTS]
    np.testing.assert_allclose(vectors(create(model="toy/a2", input=ids)), told, atol=1e-5)
    np.testing.assert_allclose(vectors(create(model="toy/a2", input=ids[0])), told[:1], atol=1e-5)
    np.testing.assert_allclose(vectors(create(model="toy/a2", input=TEXTS[1])), told[1:2], atol=1e-5)
    body = {"model": "toy/a2", "input": TEXTS, "encoding_format": "base64"}
    raw = gateway.http().post("/v1/embeddings", json=body).json()["data"]
    decoded = np.array([np.frombuffer(base64.b64decode(one["embedding"]), "<f4") for one in raw])
    np.testing.assert_allclose(decoded, told, atol=1e-5)
    np.testing.assert_allclose(np.linalg.norm(told, axis=1), 1, atol=1e-5)
    assert np.abs(vectors(create(model="base", input=TEXTS)) - told).max() > 0.01


def test_prompt_tokens_are_paid_with_one_receipt(gateway: Gateway) -> None:
    body = {"model": "toy/a2", "input": TEXTS * 10, "encoding_format": "base64"}
    told = gateway.http().post("/v1/embeddings", json=body).json()
    num_tokens = 10 * sum(len(gateway.services.tokenizer.encode(text)) for text in TEXTS)
    assert told["usage"] == {
        "prompt_tokens": num_tokens,
        "total_tokens": num_tokens,
        "cost_gwei": 20 * num_tokens,
    }
    (receipt,) = gateway.http().get("/v1/receipts").json()["data"]
    assert receipt["id"] == told["openledger"]["receipt_id"]
    assert (receipt["usage"]["prompt_tokens"], receipt["usage"]["completion_tokens"]) == (num_tokens, 0)
    texts = [one["embedding"] for one in told["data"]]
    assert told["openledger"]["response_sha256"] == answer_sha256(texts).hex()
    poor = gateway.client(gateway.new_key(deposit_gwei=20 * num_tokens - 1))
    with pytest.raises(openai.APIStatusError) as refused:
        poor.embeddings.create(**body)  # type: ignore[arg-type]
    assert refused.value.status_code == 402
    assert_money_adds_up(gateway.database)


def test_the_body_is_of_openais_shape_and_a_repeat_is_free(gateway: Gateway) -> None:
    body = {"model": "base", "input": TEXTS, "encoding_format": "float", "user": "me"}
    replies = [
        gateway.http().post("/v1/embeddings", json=body, headers={"Idempotency-Key": "e"}) for _ in range(2)
    ]
    CreateEmbeddingResponse.model_validate_json(replies[0].content)
    assert replies[0].json() == replies[1].json()
    assert gateway.charge_states() == ["captured"]


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"input": []}, "input"),
        ({"input": ""}, "input"),
        ({"input": ["a", ""]}, "input"),
        ({"input": [[]]}, "input"),
        ({"input": [1, "a"]}, "input"),
        ({"input": [10**6]}, "input"),
        ({"input": [-1]}, "input"),
        ({"input": "x" * 2000}, "input"),
        ({"input": ["x"] * 2049}, "input"),
        ({"input": {"a": 1}}, "input"),
        ({"dimensions": 8}, "dimensions"),
        ({"encoding_format": "hex"}, "encoding_format"),
        ({"pooling": "mean"}, "pooling"),
    ],
)
def test_what_cannot_be_embedded_is_refused_and_costs_nothing(
    gateway: Gateway, change: dict[str, Any], param: str
) -> None:
    reply = gateway.http().post("/v1/embeddings", json={"model": "base", "input": "x", **change})
    assert reply.status_code == 400 and reply.json()["error"]["param"].split(".")[0] == param
    assert gateway.charge_states() == []
