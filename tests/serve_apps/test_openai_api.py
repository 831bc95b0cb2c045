"""The HTTP door as the official client sees it: answers, prices, refusals."""

import asyncio
import json
import threading
from collections.abc import AsyncIterator
from dataclasses import replace

import httpx
import openai
import pytest
from sqlalchemy import select

from attribution.commitment import Turn, answer_commitment, prompt_sha256
from attribution.hashing import sha256
from attribution.types import Receipt
from cluster import accounts
from cluster.database import reading, writing
from cluster.tables import AccountRow, ReceiptRow, TranscriptRow
from cluster.transcripts import key_path, load_key, open_sealed
from serve_apps.http_app import build_app
from serve_apps.services import TRUST_S, Keys
from tests.cluster.money import assert_money_adds_up
from tests.serve_apps.conftest import Gateway

ASK = [{"role": "user", "content": "Which one?"}]
JSON = {"Content-Type": "application/json"}
GREEDY = {"temperature": 0, "max_tokens": 12, "extra_body": {"ignore_eos": True}}


def test_streaming_and_not_streaming_say_and_cost_the_same(gateway: Gateway) -> None:
    create = gateway.client().chat.completions.create
    whole = create(model="toy/a4", messages=ASK, **GREEDY)
    chunks = list(
        create(model="toy/a4", messages=ASK, stream=True, stream_options={"include_usage": True}, **GREEDY)
    )
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == whole.choices[0].message.content
    assert whole.choices[0].finish_reason == "length" == chunks[-2].choices[0].finish_reason
    assert whole.usage is not None and chunks[-1].usage is not None
    assert whole.usage.model_extra == chunks[-1].usage.model_extra
    assert whole.usage.model_extra == {"cost_gwei": 20 * whole.usage.total_tokens}
    assert whole.usage.completion_tokens == 12
    assert whole.model == chunks[0].model == "toy/a4@1"
    proof = (whole.model_extra or {})["openledger"]
    assert proof["adapter_id"] == gateway.toys.adapter_ids[3].hex()
    assert proof["response_sha256"] == sha256(text.encode()).hex()
    assert (chunks[-2].model_extra or {})["openledger"]["receipt_id"] != proof["receipt_id"]
    assert_money_adds_up(gateway.database)


def test_completions_take_text_or_tokens_of_the_base_model(gateway: Gateway) -> None:
    create = gateway.client().completions.create
    text = create(model="base", prompt="abc", **GREEDY)
    ids = gateway.services.tokenizer.encode("abc")
    assert create(model="base", prompt=ids, **GREEDY).choices[0].text == text.choices[0].text
    assert text.model == f"base@{gateway.toys.base.base_id.hex()[:12]}"
    streamed = create(model="base", prompt="abc", stream=True, **GREEDY)
    assert "".join(chunk.choices[0].text for chunk in streamed) == text.choices[0].text
    assert text.usage is not None and text.usage.model_extra == {"cost_gwei": 10 * text.usage.total_tokens}


def test_a_receipt_tells_its_payer_everything_and_others_nothing(gateway: Gateway) -> None:
    answer = gateway.client().chat.completions.create(model="toy/a2@1", messages=ASK, **GREEDY)
    receipt_id = (answer.model_extra or {})["openledger"]["receipt_id"]
    told = gateway.http().get(f"/v1/receipts/{receipt_id}").json()
    receipt = Receipt.from_canonical(bytes.fromhex(told["canonical"]))
    assert receipt.receipt_id.hex() == receipt_id == told["id"]
    opening = told["commitment"]
    parts = (
        bytes.fromhex(opening[name]) for name in ("salt", "prompt_sha256", "response_sha256", "index_id")
    )
    assert answer_commitment(*parts) == receipt.commitment
    assert opening["prompt_sha256"] == prompt_sha256([Turn("user", "Which one?")]).hex()
    content = answer.choices[0].message.content or ""
    assert opening["response_sha256"] == sha256(content.encode()).hex()
    assert told["model"] == "toy/a2@1" and told["payer_seq"] == 1
    assert told["evidence"] == {"state": "pending", "result": None}
    assert told["settlement"] == {"state": "waiting", "batch_id": None}
    stranger = gateway.http(gateway.new_key())
    assert stranger.get(f"/v1/receipts/{receipt_id}").status_code == 404
    assert stranger.post(f"/v1/receipts/{receipt_id}/feedback", json={"feedback": 1}).status_code == 404
    assert gateway.http().post(f"/v1/receipts/{receipt_id}/feedback", json={"feedback": 1}).status_code == 200
    assert gateway.http().get(f"/v1/receipts/{receipt_id}").json()["feedback"] == 1
    wrong = gateway.http().post(f"/v1/receipts/{receipt_id}/feedback", json={"feedback": 7})
    assert wrong.status_code == 400 and wrong.json()["error"]["param"] == "feedback"
    assert gateway.http().get("/v1/receipts/../../etc").status_code == 404
    assert gateway.http().get("/v1/receipts/zz").json()["error"]["code"] == "receipt_id"


def test_the_transcript_holds_the_very_tokens_and_opens_for_the_platform(gateway: Gateway) -> None:
    answer = gateway.client().chat.completions.create(model="toy/a1", messages=ASK, **GREEDY)
    with reading(gateway.database) as session:
        kept, row = session.scalars(select(TranscriptRow)).one(), session.scalars(select(ReceiptRow)).one()
    key = load_key(key_path(gateway.services.home))
    transcript = open_sealed(key, kept.ciphertext, bytes.fromhex(row.request_id))
    assert transcript.answer_text == answer.choices[0].message.content
    assert len(transcript.answer_ids) == 12
    assert transcript.prompt_text == ASK[0]["content"]


def test_store_false_keeps_hashes_only(gateway: Gateway) -> None:
    gateway.client().chat.completions.create(model="toy/a1", messages=ASK, store=False, **GREEDY)
    with reading(gateway.database) as session:
        assert session.scalars(select(TranscriptRow)).all() == []
        assert session.scalars(select(ReceiptRow.evidence_state)).all() == ["none"]


def test_usage_and_listing_add_up(gateway: Gateway) -> None:
    for model in ("toy/a1", "toy/a1", "base"):
        gateway.client().chat.completions.create(model=model, messages=ASK, **GREEDY)
    usage = gateway.http().get("/v1/usage").json()
    receipts = gateway.http().get("/v1/receipts?limit=2").json()["data"]
    rest = gateway.http().get(f"/v1/receipts?before_seq={receipts[-1]['payer_seq']}").json()["data"]
    assert [receipt["payer_seq"] for receipt in receipts + rest] == [3, 2, 1]
    assert sum(receipt["usage"]["cost_gwei"] for receipt in receipts + rest) == usage["spent_gwei"]
    assert {line["model"].split("@")[0]: line["num_requests"] for line in usage["by_model"]} == {
        "toy/a1": 2,
        "base": 1,
    }
    assert usage["reserved_gwei"] == 0


def test_models_lists_the_base_and_every_adapter(gateway: Gateway) -> None:
    names = [model.id for model in gateway.client().models.list()]
    assert names == ["base", *(f"toy/a{n}@1" for n in range(1, 7))]


def test_health_and_metrics_need_no_key(gateway: Gateway) -> None:
    gateway.client().chat.completions.create(model="toy/a1", messages=ASK, **GREEDY)
    http = gateway.http("none")
    assert http.get("/healthz").json() == {"status": "ok", "database": True, "workers": 1}
    text = http.get("/metrics").text
    assert 'openledger_tokens_total{kind="completion"} 12.0' in text
    assert 'openledger_requests_total{route="/v1/chat/completions",status="200"} 1.0' in text
    assert 'openledger_engine_running{worker="here"} 0' in text


@pytest.mark.parametrize("key", ["-", "nonsense", "ol_0123456789abcdef_" + "x" * 43])
def test_without_a_good_key_nothing_opens(gateway: Gateway, key: str) -> None:
    http = gateway.http(key)
    assert httpx.get(f"{gateway.url}/v1/models").status_code == 401
    routes = ["/v1/models", "/v1/usage", "/v1/receipts", f"/v1/receipts/{'0' * 64}"]
    replies = [http.get(route) for route in routes]
    replies.append(http.post("/v1/chat/completions", json={"model": "base", "messages": ASK}))
    replies.append(http.post(f"/v1/receipts/{'0' * 64}/feedback", json={"feedback": 1}))
    assert {reply.status_code for reply in replies} == {401}
    assert {reply.json()["error"]["code"] for reply in replies} == {"invalid_api_key"}


REFUSED = {
    "unknown model": ({"model": "toy/none"}, 404, "model_not_found", "model"),
    "path as model": ({"model": "../../etc/passwd"}, 404, "model_not_found", "model"),
    "unknown version": ({"model": "toy/a1@9"}, 404, "model_not_found", "model"),
    "huge max_tokens": ({"max_tokens": 10**9}, 400, "max_tokens_too_large", "max_tokens"),
    "no max_tokens": ({"max_tokens": 0}, 400, "max_tokens_out_of_range", "max_tokens"),
    "no completion tokens": (
        {"max_completion_tokens": 0},
        400,
        "max_tokens_out_of_range",
        "max_completion_tokens",
    ),
    "over-long prompt": (
        {"messages": [{"role": "user", "content": "x" * 2000}]},
        400,
        "context_length_exceeded",
        "messages",
    ),
    "prompt and answer": (
        {"messages": [{"role": "user", "content": "x" * 500}], "max_tokens": 500},
        400,
        "context_length_exceeded",
        "messages",
    ),
    "temperature": ({"temperature": 3}, 400, "temperature_out_of_range", "temperature"),
    "n": ({"n": 0}, 400, "n_out_of_range", "n"),
    "many choices": ({"n": 129}, 400, "n_out_of_range", "n"),
    "number as text": ({"temperature": "1"}, 400, "invalid_value", "temperature"),
    "truth as number": ({"n": True}, 400, "invalid_value", "n"),
    "top_logprobs": (
        {"logprobs": True, "top_logprobs": 21},
        400,
        "top_logprobs_out_of_range",
        "top_logprobs",
    ),
    "top without logprobs": ({"top_logprobs": 2}, 400, "invalid_value", "top_logprobs"),
    "repetition": ({"repetition_penalty": 0}, 400, "repetition_penalty_out_of_range", "repetition_penalty"),
    "bias": ({"logit_bias": {"5": 101}}, 400, "logit_bias_out_of_range", "logit_bias"),
    "bias of a word": ({"logit_bias": {"cat": 1}}, 400, "logit_bias_invalid", "logit_bias"),
    "bias of a twin": ({"logit_bias": {"05": 1}}, 400, "logit_bias_invalid", "logit_bias"),
    "bias of none": ({"logit_bias": {"100000": 1}}, 400, "token_out_of_range", "logit_bias"),
    "huge bias key": ({"logit_bias": {"9" * 5000: 1}}, 400, "logit_bias_invalid", "logit_bias"),
    "options unstreamed": (
        {"stream": False, "stream_options": {"include_usage": True}},
        400,
        "invalid_value",
        "stream_options",
    ),
    "infinite temperature": ({"temperature": 1e400}, 400, "temperature_out_of_range", "temperature"),
    "huge seed": ({"seed": 2**63}, 400, "invalid_value", "seed"),
    "misspelt": ({"max_token": 5}, 400, "unknown_parameter", "max_token"),
    "no messages": ({"messages": []}, 400, "invalid_value", "messages"),
    "wrong role": ({"messages": [{"role": "root", "content": "x"}]}, 400, "invalid_value", "messages.0.role"),
    "too many stops": ({"stop": ["a"] * 5}, 400, "stop_invalid", "stop"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_bad_requests_get_a_clear_error_and_cost_nothing(gateway: Gateway, what: str) -> None:
    change, status, code, param = REFUSED[what]
    body = {"model": "toy/a1", "messages": ASK, "stream": True, **change}
    reply = gateway.http().post("/v1/chat/completions", content=json.dumps(body), headers=JSON)
    assert reply.status_code == status
    error = reply.json()["error"]
    assert (error["code"], error["param"]) == (code, param) and error["message"]
    assert gateway.charge_states() == []


def test_broken_bodies_and_unknown_routes_are_clear_too(gateway: Gateway) -> None:
    http = gateway.http()
    assert http.post("/v1/chat/completions", content=b"{nonsense").json()["error"]["code"] == "invalid_value"
    big = http.post("/v1/chat/completions", content=b"x" * (2**20 + 1))
    assert (big.status_code, big.json()["error"]["code"]) == (413, "body_too_large")
    assert http.get("/v1/nothing").json()["error"]["code"] == "not_found"
    problem = http.get("/nothing")
    assert problem.headers["content-type"] == "application/problem+json"
    assert (problem.status_code, problem.json()["code"]) == (404, "not_found")


def test_a_body_that_stops_in_the_middle_is_refused(gateway: Gateway) -> None:
    """Else whoever sends half of one holds a place of the gateway for as long as it likes."""
    limits = replace(gateway.services.limits, body_within_s=0.2)
    app = build_app(replace(gateway.services, limits=limits))

    async def half() -> AsyncIterator[bytes]:
        yield b'{"model": "toy/a1", '
        await asyncio.sleep(60)

    async def send() -> httpx.Response:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://here") as http:
            return await http.post("/v1/completions", content=half())

    reply = asyncio.run(send())
    assert (reply.status_code, reply.json()["error"]["code"]) == (408, "body_too_slow")


def test_a_full_gateway_says_when_to_come_again_and_still_tells_how_it_is(gateway: Gateway) -> None:
    limits = replace(gateway.services.limits, max_open_requests=1, body_within_s=60)
    app = build_app(replace(gateway.services, limits=limits))

    async def scenario() -> None:
        is_in, may_end = asyncio.Event(), asyncio.Event()

        async def slow() -> AsyncIterator[bytes]:
            is_in.set()
            await may_end.wait()
            yield b"{}"

        bearer = {"Authorization": f"Bearer {gateway.key}"}
        transport = httpx.ASGITransport(app)
        async with httpx.AsyncClient(transport=transport, base_url="http://here", headers=bearer) as http:
            first = asyncio.create_task(http.post("/v1/completions", content=slow()))
            await is_in.wait()
            refused = await http.get("/v1/models")
            assert (refused.status_code, refused.json()["error"]["code"]) == (503, "gateway_full")
            assert refused.headers["Retry-After"] == "1"
            assert (await http.get("/metrics")).status_code == 200
            may_end.set()
            assert (await first).status_code == 400
            assert (await http.get("/v1/models")).status_code == 200

    asyncio.run(scenario())


def test_without_credit_there_is_no_answer(gateway: Gateway) -> None:
    poor = gateway.client(gateway.new_key(deposit_gwei=100))
    with pytest.raises(openai.APIStatusError) as refused:
        poor.chat.completions.create(model="toy/a1", messages=ASK, **GREEDY)
    assert refused.value.status_code == 402 and refused.value.code == "insufficient_credit"
    assert_money_adds_up(gateway.database)


def test_a_repeated_idempotency_key_gets_the_first_answer_and_pays_once(gateway: Gateway) -> None:
    body = {"model": "toy/a4", "messages": ASK, "max_tokens": 8, "temperature": 1, "ignore_eos": True}
    headers = {"Idempotency-Key": "one"}
    first, again = (gateway.http().post("/v1/chat/completions", json=body, headers=headers) for _ in range(2))
    assert first.json() == again.json()
    assert "Idempotent-Replayed" not in first.headers and again.headers["Idempotent-Replayed"] == "true"
    other = gateway.http().post("/v1/chat/completions", json={**body, "seed": 1}, headers=headers)
    assert (other.status_code, other.json()["error"]["code"]) == (422, "idempotency_key_reused")
    assert gateway.charge_states() == ["captured"]
    stranger = gateway.http(gateway.new_key())
    theirs = stranger.post("/v1/chat/completions", json=body, headers=headers)
    assert theirs.json()["id"] != first.json()["id"]


def test_a_streamed_answer_repeats_as_a_stream(gateway: Gateway) -> None:
    def ask() -> tuple[str, str]:
        stream = gateway.client().chat.completions.create(
            model="toy/a4", messages=ASK, stream=True, extra_headers={"Idempotency-Key": "s"}, **GREEDY
        )
        chunks = list(stream)
        return "".join(c.choices[0].delta.content or "" for c in chunks), chunks[0].id

    assert ask() == ask()
    assert gateway.charge_states() == ["captured"]


def test_while_the_first_runs_its_idempotency_key_is_taken(gateway: Gateway) -> None:
    body = {"model": "toy/a4", "messages": ASK, "max_tokens": 700, "stream": True, "ignore_eos": True}
    headers = {"Idempotency-Key": "slow"}
    with gateway.http().stream("POST", "/v1/chat/completions", json=body, headers=headers) as first:
        lines = first.iter_lines()
        next(lines)
        second = gateway.http().post("/v1/chat/completions", json=body, headers=headers)
        assert (second.status_code, second.json()["error"]["code"]) == (409, "request_in_progress")


def test_a_client_that_leaves_pays_for_what_was_sent(gateway: Gateway) -> None:
    body = {"model": "toy/a4", "messages": ASK, "max_tokens": 700, "stream": True, "ignore_eos": True}
    with gateway.http().stream("POST", "/v1/chat/completions", json=body) as reply:
        lines = reply.iter_lines()
        for _ in range(10):
            next(lines)
    gateway.wait_until(lambda: gateway.charge_states() == ["captured"])
    usage = gateway.http().get("/v1/receipts").json()["data"][0]["usage"]
    assert 1 <= usage["completion_tokens"] < 700
    assert usage["cost_gwei"] == 20 * usage["total_tokens"]
    gateway.wait_until(lambda: gateway.services.pool.loads["here"].num_running == 0)
    load = gateway.services.pool.loads["here"]
    assert load.num_free_blocks == load.num_blocks - 1
    assert_money_adds_up(gateway.database)


def test_many_clients_at_once_each_get_their_own_answer(gateway: Gateway) -> None:
    """Twelve threads, four models: what each gets is what it gets alone, and the sums add up."""
    models = ["base", "toy/a1", "toy/a5", "toy/a6"] * 3
    create = gateway.client().chat.completions.create

    def ask(model: str) -> str:
        return create(model=model, messages=ASK, **GREEDY).choices[0].message.content or ""

    alone = {model: ask(model) for model in set(models)}
    answers: list[tuple[str, str]] = []
    threads = [threading.Thread(target=lambda m=m: answers.append((m, ask(m)))) for m in models]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(answers) == 12 and all(alone[model] == text for model, text in answers)
    with reading(gateway.database) as session:
        numbers = session.scalars(select(ReceiptRow.payer_seq).order_by(ReceiptRow.payer_seq)).all()
        assert numbers == list(range(1, 17))
        assert session.scalars(select(AccountRow.reserved_gwei)).all() == [0]
    assert_money_adds_up(gateway.database)


def test_a_revoked_key_is_trusted_for_a_second_at_most(gateway: Gateway) -> None:
    http = gateway.http()
    assert http.get("/v1/models").status_code == 200
    with writing(gateway.database) as session:
        accounts.revoke_key(session, gateway.key.split("_")[1], 1)
        account = accounts.account_of(session, gateway.account_id)
    gateway.wait_until(lambda: http.get("/v1/models").status_code == 401)
    now = 100.0
    keys = Keys(lambda: now)
    keys.trust("a", account, now)
    assert keys.account_of("b") is None
    now += TRUST_S - 0.01
    assert keys.account_of("a") == account
    now += 0.02
    assert keys.account_of("a") is None
