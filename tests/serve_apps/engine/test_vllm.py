"""vLLM behind our engine's calls: the same answers, whoever shares the batch; and what it refuses."""

import importlib.util
import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from safetensors.torch import load_file

from attribution.errors import Corrupted, Rejected
from attribution.types import ZERO_ID
from cluster.models import linear_shapes, load_tokenizer
from serve_apps.engine.grammar import Grammars, json_grammar, tool_grammar
from serve_apps.engine.peft_files import peft_folders, write_peft
from serve_apps.engine.scheduler import Limits
from serve_apps.engine.types import SamplingParams, TokenEvent, TokenScore
from serve_apps.engine.vllm_engine import (
    VllmConfig,
    VllmEngine,
    build_vllm_engine,
    check,
    lark,
    sampling_values,
)
from tests.serve_apps.conftest import Toys, drive, request, run, toys_in

needs_vllm = pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed")
SCHEMA = {"type": "object", "properties": {"n": {"type": "integer"}}, "required": ["n"]}
LIMITS = Limits(max_running=8, max_length=256)


@pytest.fixture(scope="module")
def toys(tmp_path_factory: pytest.TempPathFactory) -> Toys:
    """Wide enough: vLLM's attention on CPUs has heads of 32 and more."""
    return toys_in(tmp_path_factory.mktemp("toys"), width=128)


@pytest.fixture(scope="module")
def vllm_engine(toys: Toys, tmp_path_factory: pytest.TempPathFactory) -> Iterator[VllmEngine]:
    config = VllmConfig("float32", 64 * 2**20, LIMITS, max_adapters=8, max_rank=16)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLLM_CPU_OMP_THREADS_BIND", "nobind")
        engine = build_vllm_engine(toys.base, toys.storage, tmp_path_factory.mktemp("peft"), config)
        yield engine
        engine.close()


def answers(engine: VllmEngine, *requests: object) -> list[TokenEvent]:
    found = run(engine, list(requests))  # type: ignore[arg-type]
    return [found[each.request_id] for each in requests]  # type: ignore[attr-defined]


@needs_vllm
@pytest.mark.filterwarnings("ignore")
@pytest.mark.timeout(600)
class TestWithVllm:
    def test_whoever_shares_the_batch_an_answer_is_the_one_of_our_engine(
        self, toys: Toys, vllm_engine: VllmEngine
    ) -> None:
        """The base model among adapters above all, to which vLLM is reported to give a neighbour's."""
        prompt = tuple(range(40, 60))
        ids = [ZERO_ID, toys.adapter_ids[0], ZERO_ID, toys.adapter_ids[3], toys.adapter_ids[5], ZERO_ID]
        alone = [answers(vllm_engine, request(prompt, each))[0].token_ids for each in ids]
        mixed = [each.token_ids for each in answers(vllm_engine, *(request(prompt, each) for each in ids))]
        assert mixed == alone
        assert len(set(mixed)) == 4
        ours = toys.engine(is_native=False)
        expected = [answers(ours, request(prompt, each))[0] for each in ids]  # type: ignore[arg-type]
        assert mixed == [each.token_ids for each in expected]
        ours.close()

    def test_text_stops_and_logprobs_are_cut_as_ours_are(self, toys: Toys, vllm_engine: VllmEngine) -> None:
        adapter_id, prompt = toys.adapter_ids[4], tuple(range(70, 90))
        ours = toys.engine(is_native=False)
        plain = answers(ours, request(prompt, adapter_id))[0]  # type: ignore[arg-type]
        stop = (plain.text[4:6],)
        asked = [request(prompt, adapter_id, stop=stop, num_logprobs=2) for _ in range(2)]
        mine, theirs = answers(ours, asked[0])[0], answers(vllm_engine, asked[1])[0]  # type: ignore[arg-type]
        assert (theirs.text, theirs.token_ids, theirs.finish) == (mine.text, mine.token_ids, mine.finish)
        assert len(theirs.logprobs) == len(mine.logprobs) > 0
        for one, other in zip(theirs.logprobs, mine.logprobs, strict=True):
            assert one.text_offset == other.text_offset
            assert one.chosen.token_id == other.chosen.token_id
            assert one.chosen.score == pytest.approx(other.chosen.score, abs=1e-3)
            assert [each.token_id for each in one.top] == [each.token_id for each in other.top]
        ours.close()

    @pytest.mark.parametrize("tools", [False, True])
    def test_grammars_hold(self, vllm_engine: VllmEngine, toys: Toys, tools: bool) -> None:
        grammar = (
            tool_grammar({"f": SCHEMA}, may_talk=False, may_repeat=False) if tools else json_grammar(SCHEMA)
        )
        asked = request(
            tuple(range(40, 50)),
            toys.adapter_ids[1],
            grammar=grammar,
            max_tokens=200,
            ignore_eos=False,
            temperature=1.0,
            seed=5,
            logit_bias=(TokenScore(load_tokenizer(toys.base.path).encode("9")[0], -100.0),),
        )
        (event,) = answers(vllm_engine, asked)
        tokenizer = load_tokenizer(toys.base.path)
        constraint = Grammars(tokenizer, len(tokenizer), [2]).constraint(grammar)
        for token in event.token_ids:
            assert constraint.allowed()[token]
            constraint.advance(token)

    def test_a_cancelled_answer_ends_and_leaves_nothing(self, vllm_engine: VllmEngine, toys: Toys) -> None:
        asked = request(tuple(range(40, 50)), toys.adapter_ids[2], max_tokens=200)
        vllm_engine.submit(asked)
        while not vllm_engine.step().events:
            pass
        vllm_engine.cancel(asked.request_id)
        finish = drive(vllm_engine, {asked.request_id})[asked.request_id].finish  # type: ignore[arg-type]
        assert finish is not None and finish.reason == "cancelled"
        assert vllm_engine.load().num_running + vllm_engine.load().num_waiting == 0

    def test_an_adapter_that_is_not_there_fails_alone(self, vllm_engine: VllmEngine, toys: Toys) -> None:
        lost, fine = request((50, 51), b"\7" * 32), request((50, 51), toys.adapter_ids[0])
        events = answers(vllm_engine, lost, fine)
        assert events[0].finish is not None and events[0].finish.reason == "failed"
        assert len(events[1].token_ids) == 12


def test_a_folder_of_peft_holds_the_same_products(toys: Toys, tmp_path: Path) -> None:
    """Modules of different ranks become one rank."""
    (one, other) = list(toys.adapters.values())[1].factors.items(), list(toys.adapters.values())[4].factors
    names = [name for name, _ in one]
    mixed = {name: factors if i % 2 else other[name] for i, (name, factors) in enumerate(one)}
    write_peft(tmp_path / "a", mixed)
    tensors = load_file(tmp_path / "a" / "adapter_model.safetensors")
    config = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    assert config["r"] == config["lora_alpha"] == 8
    for name in names:
        a, b = (tensors[f"base_model.model.{name}.lora_{part}.weight"].float() for part in "AB")
        assert a.shape[0] == b.shape[1] == 8
        assert ((b @ a) - (mixed[name].b.float() @ mixed[name].a.float())).abs().max() < 1e-6


def test_a_folder_is_made_once_of_what_its_id_says(toys: Toys, tmp_path: Path) -> None:
    shapes = linear_shapes(toys.base.path)
    folder_of = peft_folders(toys.storage, toys.base.base_id, shapes, tmp_path, max_rank=4)
    first = folder_of(toys.adapter_ids[0])
    assert folder_of(toys.adapter_ids[0]) == first and len(list(tmp_path.iterdir())) == 1
    with pytest.raises(Rejected, match="rank 16, this engine serves up to 4"):
        folder_of(toys.adapter_ids[5])
    zeros = load_file(folder_of(ZERO_ID) / "adapter_model.safetensors")
    assert zeros and not any(tensor.any() for tensor in zeros.values())
    toys.storage.put_if_absent("adapters/" + "99" * 32 + ".safetensors", b"not it")
    with pytest.raises(Corrupted, match="hashes to"):
        folder_of(b"\x99" * 32)


def test_what_can_never_run_is_refused_at_the_door() -> None:
    from dataclasses import replace

    fine = request((1, 2, 3), max_tokens=10)
    check(fine, LIMITS, 100)
    for wrong, code in (
        (replace(fine, is_embedding=True), "embeddings_not_served"),
        (replace(fine, prompt_ids=()), "prompt_empty"),
        (request((1,), max_tokens=256), "context_length_exceeded"),
        (request((100,)), "token_out_of_range"),
        (request((1,), logit_bias=(TokenScore(100, 1.0),)), "token_out_of_range"),
    ):
        with pytest.raises(Rejected) as caught:
            check(wrong, LIMITS, 100)
        assert caught.value.code == code


def test_sampling_becomes_vllms_and_grammars_lark() -> None:
    sampling = SamplingParams(
        5, temperature=0.5, top_k=3, logit_bias=(TokenScore(4, 1.5),), seed=9, stop=("x",), num_logprobs=0
    )
    values = sampling_values(sampling)
    assert values["logit_bias"] == {4: 1.5} and values["top_k"] == 3 and values["seed"] == 9
    assert values["logprobs"] == 0 and "stop" not in values
    assert lark(json_grammar(SCHEMA)).startswith("%llguidance {}\nstart: %json {")
    tools = tool_grammar({"f": SCHEMA}, may_talk=True, may_repeat=True)
    assert lark(tools) == tools
