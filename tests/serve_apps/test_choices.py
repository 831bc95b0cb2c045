"""Several choices of one prompt: each what its seed says, all together one receipt and one charge."""

import json
from pathlib import Path

import openai
import pytest
import sqlalchemy
from openai.types.chat import ChatCompletion
from sqlalchemy import select

from attribution.codec import Encoder
from attribution.commitment import answer_sha256
from attribution.hashing import sha256
from cluster.database import reading
from cluster.tables import ReceiptRow, TranscriptRow
from cluster.transcripts import key_path, load_key, open_sealed
from serve_apps.engine_host import HostConfig
from tests.cluster.money import assert_money_adds_up
from tests.serve_apps.conftest import Gateway, Toys, open_gateway

ASK = [{"role": "user", "content": "Which one?"}]


def ask(gateway: Gateway, n: int, **change: object) -> ChatCompletion:
    body = {"model": "toy/a4", "messages": ASK, "max_tokens": 8, "seed": 5, "n": n, **change}
    extra = {"ignore_eos": True}
    return gateway.client().chat.completions.create(**body, extra_body=extra)  # type: ignore[call-overload, no-any-return]


def texts(answer: ChatCompletion) -> list[str]:
    assert [choice.index for choice in answer.choices] == list(range(len(answer.choices)))
    return [choice.message.content or "" for choice in answer.choices]


def test_a_choice_depends_on_seed_and_number_alone(gateway: Gateway) -> None:
    one, three, again = (texts(ask(gateway, n)) for n in (1, 3, 3))
    assert three == again and three[:1] == one
    assert len(set(three)) == 3
    assert texts(ask(gateway, 12))[:3] == three  # more than run at once
    assert texts(ask(gateway, 3, seed=6)) != three
    assert len(set(texts(ask(gateway, 3, temperature=0)))) == 1
    chunks = gateway.client().chat.completions.create(
        model="toy/a4", messages=ASK, max_tokens=8, seed=5, n=3, stream=True, extra_body={"ignore_eos": True}
    )
    said, ended = ["", "", ""], []
    for chunk in chunks:
        (choice,) = chunk.choices
        said[choice.index] += choice.delta.content or ""
        ended += [choice.index] if choice.finish_reason else []
    assert said == three and ended == [0, 1, 2]


def test_completions_have_choices_too(gateway: Gateway) -> None:
    create = gateway.client().completions.create
    ways = {"model": "base", "prompt": "abc", "n": 2, "best_of": 2, "seed": 1, "max_tokens": 5}
    whole = create(**ways)  # type: ignore[call-overload]
    said = ["", ""]
    for chunk in create(**ways, stream=True):  # type: ignore[call-overload]
        said[chunk.choices[0].index] += chunk.choices[0].text
    assert said == [choice.text for choice in whole.choices]


def test_all_choices_are_one_charge_and_one_receipt(gateway: Gateway) -> None:
    answer = ask(gateway, 3)
    assert answer.usage is not None and answer.usage.completion_tokens == 24
    single = ask(gateway, 1)
    assert single.usage is not None and single.usage.prompt_tokens == answer.usage.prompt_tokens
    cost = (answer.usage.model_extra or {})["cost_gwei"]
    assert cost == 20 * (answer.usage.prompt_tokens + 24)
    receipts = gateway.http().get("/v1/receipts").json()["data"]
    assert [receipt["usage"]["cost_gwei"] for receipt in receipts][1] == cost and len(receipts) == 2
    assert gateway.charge_states() == ["captured"] * 2
    assert_money_adds_up(gateway.database)


def test_the_hash_covers_every_choice_and_attribution_reads_one(gateway: Gateway) -> None:
    answer = ask(gateway, 3)
    proof = (answer.model_extra or {})["openledger"]
    assert proof["response_sha256"] == answer_sha256(texts(answer)).hex()
    encoder = Encoder("openledger/choices/1").each(texts(answer), lambda e, text: e.blob(text.encode()))
    assert answer_sha256(texts(answer)) == sha256(encoder.finish())
    assert answer_sha256(["a", "b"]) != answer_sha256(["ab", ""]) != answer_sha256(["ab"])
    with reading(gateway.database) as session:
        kept, row = session.scalars(select(TranscriptRow)).one(), session.scalars(select(ReceiptRow)).one()
    key = load_key(key_path(gateway.services.home))
    transcript = open_sealed(key, kept.ciphertext, bytes.fromhex(row.request_id))
    assert [transcript.answer_text, *transcript.other_texts] == texts(answer)
    assert len(transcript.answer_ids) == 8
    told = gateway.http().get(f"/v1/receipts/{proof['receipt_id']}").json()
    assert told["finish_reasons"] == ["length"] * 3


def test_the_reservation_covers_every_choice(gateway: Gateway) -> None:
    """With credit for two answers but not for three, three are refused before they begin."""
    spent = (ask(gateway, 2).usage.model_extra or {})["cost_gwei"]  # type: ignore[union-attr]
    poor = gateway.client(gateway.new_key(deposit_gwei=spent))
    body = {"model": "toy/a4", "messages": ASK, "max_tokens": 8, "extra_body": {"ignore_eos": True}}
    with pytest.raises(openai.APIStatusError) as refused:
        poor.chat.completions.create(**body, n=3)  # type: ignore[call-overload]
    assert refused.value.status_code == 402
    assert len(poor.chat.completions.create(**body, n=2).choices) == 2  # type: ignore[call-overload]
    assert_money_adds_up(gateway.database)


@pytest.mark.parametrize("is_streamed", [False, True])
def test_a_repeated_key_repeats_all_choices_and_pays_once(gateway: Gateway, is_streamed: bool) -> None:
    body = {"model": "toy/a4", "messages": ASK, "max_tokens": 8, "n": 3, "stream": is_streamed}
    headers = {"Idempotency-Key": "three"}
    replies = [gateway.http().post("/v1/chat/completions", json=body, headers=headers) for _ in range(2)]
    if is_streamed:
        assert _streamed(replies[0].text) == _streamed(replies[1].text)
    else:
        assert replies[0].json() == replies[1].json()
    assert replies[1].headers["Idempotent-Replayed"] == "true"
    assert gateway.charge_states() == ["captured"]


def _streamed(body: str) -> tuple[list[str], list[str], dict[str, object]]:
    said, reasons, proof = ["", "", ""], ["", "", ""], {}
    for line in body.splitlines():
        if line.startswith("data: {"):
            chunk = json.loads(line[6:])
            choice = chunk["choices"][0]
            said[choice["index"]] += choice["delta"].get("content") or ""
            reasons[choice["index"]] = choice["finish_reason"] or ""
            proof = chunk.get("openledger", proof)
    return said, reasons, proof


def test_who_leaves_pays_for_what_was_sent_of_every_choice(gateway: Gateway) -> None:
    body = {"model": "toy/a4", "messages": ASK, "max_tokens": 700, "n": 3, "stream": True, "ignore_eos": True}
    with gateway.http().stream("POST", "/v1/chat/completions", json=body) as reply:
        lines = reply.iter_lines()
        for _ in range(30):
            next(lines)
    gateway.wait_until(lambda: gateway.charge_states() == ["captured"])
    (receipt,) = gateway.http().get("/v1/receipts").json()["data"]
    assert 3 <= receipt["usage"]["completion_tokens"] < 2100
    told = gateway.http().get(f"/v1/receipts/{receipt['id']}").json()
    assert set(told["finish_reasons"]) == {"cancelled"}
    gateway.wait_until(lambda: gateway.services.pool.loads["here"].num_running == 0)
    load = gateway.services.pool.loads["here"]
    assert load.num_free_blocks == load.num_blocks - 1
    assert_money_adds_up(gateway.database)


def test_a_lost_worker_makes_all_choices_free(toys: Toys, engine: sqlalchemy.Engine, tmp_path: Path) -> None:
    silent = {"host_config": HostConfig(lease_s=0.4), "renew_every_s": 60.0, "step_s": 0.01}
    with open_gateway(toys, engine, tmp_path, **silent) as gateway:  # type: ignore[arg-type]
        client = gateway.client().with_options(max_retries=5)
        with pytest.raises(openai.APIError, match="lost"):
            list(
                client.chat.completions.create(
                    model="toy/a4",
                    messages=ASK,  # type: ignore[arg-type]
                    max_tokens=700,
                    n=4,
                    stream=True,
                    extra_body={"ignore_eos": True},
                )
            )
        gateway.wait_until(lambda: set(gateway.charge_states()) == {"released"})
        assert_money_adds_up(engine)
