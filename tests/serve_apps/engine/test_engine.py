"""What a request gets does not depend on who shares its batch, and nothing it held outlives it."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from attribution.errors import Rejected, Unavailable
from attribution.types import ZERO_ID
from cluster.models import BaseModel, base_id, load_base, load_tokenizer
from serve_apps.engine.adapter_cache import CacheLimits
from serve_apps.engine.engine import Engine
from serve_apps.engine.scheduler import Limits
from serve_apps.engine.types import EngineRequest, TokenEvent
from tests.serve_apps.conftest import Toys, drive, request, run

PROMPTS = [tuple((7 * i + j * j) % 250 + 3 for j in range(3 + 5 * i)) for i in range(10)]
POPULARITY = {
    "base only": [0] * 10,
    "one adapter": [4] * 10,
    "all different": [0, 1, 2, 3, 4, 5, 6, 1, 2, 3],
    "skewed": [5, 5, 5, 0, 5, 5, 1, 5, 5, 6],
}


def reference(toys: Toys, prompt: tuple[int, ...], adapter_id: bytes, num_tokens: int) -> list[int]:
    """Greedy by transformers, the adapter merged into the weights: the slow, obvious way."""
    model = load_base(toys.base.path, torch.float32)
    if adapter_id != ZERO_ID:
        for module, factors in toys.adapters[adapter_id].factors.items():
            model.get_submodule(module).weight.data += factors.b.float() @ factors.a.float()
    ids = list(prompt)
    with torch.inference_mode():
        for _ in range(num_tokens):
            ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
    return ids[len(prompt) :]


def mixed(toys: Toys, popularity: str, **sampling: object) -> list[EngineRequest]:
    ids = [ZERO_ID, *toys.adapter_ids]
    pairs = zip(PROMPTS, POPULARITY[popularity], strict=True)
    return [request(prompt, ids[i], **sampling) for prompt, i in pairs]


def tokens(answers: dict[bytes, TokenEvent], requests: list[EngineRequest]) -> list[tuple[int, ...]]:
    return [answers[each.request_id].token_ids for each in requests]


@pytest.mark.parametrize("which", [0, 1, 3, 6])
def test_greedy_answers_are_those_of_transformers(toys: Toys, toy_engine: Engine, which: int) -> None:
    adapter_id = [ZERO_ID, *toys.adapter_ids][which]
    requests = [request(prompt, adapter_id, max_tokens=8) for prompt in (PROMPTS[0], PROMPTS[7])]
    expected = [tuple(reference(toys, each.prompt_ids, adapter_id, 8)) for each in requests]
    assert tokens(run(toy_engine, requests), requests) == expected


@pytest.mark.parametrize(
    "sampling", [{}, {"temperature": 1.0, "top_p": 0.9, "seed": 5}], ids=["greedy", "drawn"]
)
@pytest.mark.parametrize("popularity", POPULARITY)
def test_batching_changes_no_answer(
    toys: Toys, toy_engine: Engine, popularity: str, sampling: dict[str, object]
) -> None:
    """Whatever shares its batch, a request gets the tokens it would get alone."""
    together, alone = (mixed(toys, popularity, **sampling) for _ in range(2))
    answers = run(toy_engine, together)
    assert tokens(answers, together) == [tokens(run(toy_engine, [each]), [each])[0] for each in alone]
    assert len({*tokens(answers, together)}) > 5  # the toy is not a constant


def test_adapters_change_answers(toys: Toys, toy_engine: Engine) -> None:
    requests = [request(PROMPTS[3], key) for key in (ZERO_ID, *toys.adapter_ids)]
    assert len(set(tokens(run(toy_engine, requests), requests))) == len(requests)


@pytest.mark.parametrize("is_native", [True, False], ids=["kernels", "torch"])
def test_chunks_and_preemption_change_no_answer(toys: Toys, toy_engine: Engine, is_native: bool) -> None:
    """A token budget of 5 and a cache that holds two of the ten requests."""
    limits = Limits(max_batch_tokens=5, max_length=96)
    tight = toys.engine(limits, kv_bytes=8 * 16 * 1024, is_native=is_native)
    roomy, narrow = (mixed(toys, "all different", max_tokens=20) for _ in range(2))
    assert tokens(run(tight, narrow), narrow) == tokens(run(toy_engine, roomy), roomy)
    load = tight.load()
    assert load.num_free_blocks == load.num_blocks - 1


@pytest.mark.parametrize("is_native", [True, False], ids=["kernels", "torch"])
def test_a_beginning_that_was_seen_before_changes_no_answer(toys: Toys, is_native: bool) -> None:
    """A shared beginning over every adapter, twice, with and without the prefix cache; nobody finds what
    another tenant or another adapter computed."""
    common = tuple((13 * i) % 250 + 3 for i in range(50))
    ids = [ZERO_ID, *toys.adapter_ids]
    with_cache = toys.engine(is_native=is_native)
    without = toys.engine(Limits(reuses_prefixes=False), is_native=is_native)
    for turn in range(2):
        seen, fresh = ([request((*common, turn), key) for key in ids] for _ in range(2))
        before = with_cache.load().num_reused
        assert tokens(run(with_cache, seen), seen) == tokens(run(without, fresh), fresh)
        assert with_cache.load().num_reused - before == turn * 48 * len(ids)
        stranger = replace(request((*common, turn)), tenant="stranger" + str(turn))
        before = with_cache.load().num_reused
        assert tokens(run(with_cache, [stranger]), [stranger]) == tokens(run(without, [fresh[0]]), [fresh[0]])
        assert with_cache.load().num_reused == before
    assert without.load().num_reused == 0


@pytest.mark.parametrize("is_native", [True, False], ids=["kernels", "torch"])
def test_freed_blocks_carry_nothing_to_their_next_owner(toys: Toys, is_native: bool) -> None:
    """A cache small enough to be reused at every request gives what a fresh one gives."""
    used, fresh = (toys.engine(kv_bytes=8 * 16 * 1024, is_native=is_native) for _ in range(2))
    run(used, [request(PROMPTS[9], key, max_tokens=30) for key in toys.adapter_ids])
    again, first = request(PROMPTS[2]), request(PROMPTS[2])
    assert tokens(run(used, [again]), [again]) == tokens(run(fresh, [first]), [first])


def test_cancelling_frees_everything_within_a_step(toys: Toys) -> None:
    engine = toys.engine(adapters=CacheLimits(budget_bytes=2**20, max_adapter_bytes=2**20))
    requests = [request(PROMPTS[4], toys.adapter_ids[0], max_tokens=500) for _ in range(3)]
    waiting = request(PROMPTS[1], toys.adapter_ids[1])  # the budget holds one adapter
    for each in [*requests, waiting]:
        engine.submit(each)
    while not engine.load().num_running:
        engine.step()
    for each in [*requests, waiting]:
        engine.cancel(each.request_id)
    events = {event.request_id: event for event in engine.step().events}
    load = engine.load()
    assert {event.finish.reason for event in events.values() if event.finish} == {"cancelled"}
    assert len(events) == 4 and (load.num_running, load.num_waiting) == (0, 0)
    assert load.num_free_blocks == load.num_blocks - 1
    other = request(PROMPTS[1], toys.adapter_ids[1])  # the lease is gone too: another adapter fits now
    assert run(engine, [other])[other.request_id].finish is not None
    engine.cancel(waiting.request_id)  # long over
    assert engine.step().events == ()


@pytest.mark.parametrize("is_native", [True, False], ids=["kernels", "torch"])
def test_an_adapter_in_demand_keeps_no_other_out(toys: Toys, is_native: bool) -> None:
    """Memory for one adapter, which always has requests waiting; two others get theirs."""
    memory = CacheLimits(budget_bytes=2**20, max_adapter_bytes=2**20)
    engine = toys.engine(Limits(max_running=2), adapters=memory, is_native=is_native)
    hot, *cold = toys.adapter_ids[:3]
    waiting = [request(PROMPTS[2], key, max_tokens=4) for key in (hot, hot, hot, hot, *cold)]
    for each in waiting:
        engine.submit(each)
    over: set[bytes] = set()
    for _ in range(4000):
        for event in engine.step().events:
            assert event.finish is None or event.finish.reason == "length"
            if event.finish:
                over.add(event.request_id)
                engine.submit(request(PROMPTS[2], hot, max_tokens=4))
        if over.issuperset(each.request_id for each in waiting):
            break
    else:
        raise AssertionError("some waited for ever")
    engine.close()


def test_answers_end_at_eos_stop_strings_and_max_tokens(toys: Toys, toy_engine: Engine) -> None:
    decode = load_tokenizer(toys.base.path).decode
    plain = request(PROMPTS[5], max_tokens=30)
    answer = run(toy_engine, [plain])[plain.request_id]
    assert answer.finish is not None and answer.finish.reason == "length" and len(answer.token_ids) == 30
    assert answer.text == decode(list(answer.token_ids), skip_special_tokens=True)
    stop = answer.text[6:8]
    stopped = request(PROMPTS[5], max_tokens=30, stop=(stop,))
    cut = run(toy_engine, [stopped])[stopped.request_id]
    assert cut.finish is not None and cut.finish.reason == "stop"
    assert cut.text == answer.text[: answer.text.find(stop)]


def test_the_end_token_ends_an_answer_and_is_counted(toys: Toys, tmp_path: Path) -> None:
    """A copy of the toy whose end token is the third one that the toy says."""
    plain = request(PROMPTS[5])
    said = run(toys.engine(), [plain])[plain.request_id].token_ids
    path = Path(shutil.copytree(toys.base.path, tmp_path / "ends"))
    (path / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, said[2]]}))
    ends = replace(toys, base=BaseModel(base_id(path), path)).engine()
    each = request(PROMPTS[5], ignore_eos=False)
    answer = run(ends, [each])[each.request_id]
    first = said.index(said[2]) + 1
    assert answer.token_ids == said[:first] and answer.finish is not None and answer.finish.reason == "stop"


def test_a_missing_adapter_fails_its_own_requests_only(toys: Toys, toy_engine: Engine) -> None:
    bad, good = request(PROMPTS[0], b"\x77" * 32), request(PROMPTS[0])
    answers = run(toy_engine, [bad, good])
    finish = answers[bad.request_id].finish
    assert finish is not None and finish.refusal is not None and finish.refusal.code == "not_found"
    assert answers[good.request_id].finish is not None and answers[good.request_id].finish.reason == "length"
    again = request(PROMPTS[0], b"\x77" * 32)
    toy_engine.submit(again)
    assert drive(toy_engine, {again.request_id}, max_steps=1)[again.request_id].finish is not None


def test_a_changed_adapter_file_is_never_used(toys: Toys, toy_engine: Engine) -> None:
    name = b"\x55" * 32
    toys.storage.put(f"adapters/{name.hex()}.safetensors", b"not what was hashed")
    each = request(PROMPTS[0], name)
    finish = run(toy_engine, [each])[each.request_id].finish
    assert finish is not None and finish.refusal is not None and finish.refusal.code == "adapter_hash"


def test_what_cannot_run_is_refused_at_submit(toys: Toys, toy_engine: Engine) -> None:
    with pytest.raises(Rejected, match="limit is"):
        toy_engine.submit(request(PROMPTS[0], max_tokens=5000))
    with pytest.raises(Rejected) as foreign:
        toy_engine.submit(request((1, 2, 10**6)))
    assert foreign.value.code == "token_out_of_range"
    full = toys.engine(Limits(max_running=1, max_waiting=0))
    full.submit(request(PROMPTS[0]))
    with pytest.raises(Unavailable):
        full.submit(request(PROMPTS[0]))


def test_in_bf16_batching_changes_no_answer_whose_margin_is_clear(toys: Toys) -> None:
    """Rounding may flip a tie; up to the first near tie of the lone run, tokens agree."""
    engine = toys.engine(dtype=torch.bfloat16)
    together, alone = (mixed(toys, "skewed") for _ in range(2))
    answers = tokens(run(engine, together), together)
    model = load_base(toys.base.path, torch.float32)
    for each, answer in zip(alone, answers, strict=True):
        lone = tokens(run(engine, [each]), [each])[0]
        differing = [i for i, (a, b) in enumerate(zip(lone, answer, strict=True)) if a != b]
        if differing and each.adapter_id == ZERO_ID:
            ids = torch.tensor([[*each.prompt_ids, *lone[: differing[0]]]])
            with torch.inference_mode():
                top = model(ids).logits[0, -1].topk(2).values
            assert float(top[0] - top[1]) < 0.05
