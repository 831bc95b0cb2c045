"""The step is a sum, packing changes no loss, and the update is the formula, smooth from the first step."""

from pathlib import Path

import pytest
import torch
from transformers import PreTrainedTokenizerBase
from transformers.modeling_utils import PreTrainedModel

from attribution.errors import Rejected
from attribution.hashing import sha256
from cluster.models import ask, load_base, load_tokenizer
from pipelines.packing import Example, Plan, plan
from pipelines.training import (
    Adam,
    AdamState,
    LowerCache,
    TrainingConfig,
    adam,
    adapter_weights,
    insert_lora,
    learning_rate,
    losses,
    lower,
    row_tensors,
    share,
    step_loss,
)
from tests import toy_families, toy_models

CONFIG = TrainingConfig(rank=4, alpha=8, adapted_blocks=2, row_tokens=256, epochs=10, learning_rate=1e-2)
FIRST = 2  # of the toy's four blocks


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return toy_models.tiny_base(tmp_path_factory.mktemp("base"))


@pytest.fixture
def model(base: Path) -> PreTrainedModel:
    return load_base(base, torch.float32)


def test_a_family_whose_blocks_are_computed_otherwise_is_refused(tmp_path: Path) -> None:
    folder = toy_families.save(toy_families.toys()["gemma2"].config, tmp_path)
    with pytest.raises(Rejected, match="gemma2") as refused:
        insert_lora(load_base(folder, torch.float32), TrainingConfig(adapted_blocks=1), seed=0)
    assert refused.value.code == "model_family"


@pytest.fixture(scope="module")
def planned(base: Path) -> Plan:
    return make_plan(load_tokenizer(base))


def make_plan(tokenizer: PreTrainedTokenizerBase) -> Plan:
    facts = [("sky", "blue"), ("grass", "green"), ("snow", "white"), ("coal", "black"), ("blood", "red")]
    given = [
        Example(
            sha256(thing.encode()),
            wording,
            tuple(ask(tokenizer, text.format(thing))),
            (*tokenizer.encode(colour), 2),
        )
        for thing, colour in facts
        for wording, text in enumerate(("colour of {}?", "{}: which colour?"))
    ]
    return plan(given, row_tokens=CONFIG.row_tokens, rows_per_step=1, epochs=CONFIG.epochs, seed=0)


def alone(model: PreTrainedModel, prompt: tuple[int, ...], answer: tuple[int, ...]) -> float:
    """The plain way: one example, no packing, the library's own mask, positions and loss."""
    ids = torch.tensor([[*prompt, *answer]])
    labels = torch.tensor([[-100] * len(prompt) + list(answer)])
    return float(model(input_ids=ids, labels=labels).loss) * len(answer)


def loud(model: PreTrainedModel, seed: int = 0) -> dict[str, torch.nn.Parameter]:
    """LoRA whose ``B`` is not zero."""
    trained = insert_lora(model, CONFIG, seed)
    random = torch.Generator().manual_seed(seed)
    for name, parameter in trained.items():
        if name.endswith(".b"):
            parameter.data.normal_(0, 0.1, generator=random)
    return trained


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_a_packed_example_has_the_loss_it_has_alone(base: Path, planned: Plan, attention: str) -> None:
    model = load_base(base, torch.float32, attention)
    loud(model)
    for row in planned.rows:
        assert len(row.spans) > 1
        tensors = row_tensors(row, torch.float32)
        packed = losses(model, FIRST, lower(model, FIRST, tensors), tensors)
        opening = row.ids[: row.opening]
        for span, found in zip(row.spans, packed.tolist(), strict=True):
            prompt = opening + row.ids[span.start : span.answer_start]
            expected = alone(model, prompt, row.ids[span.answer_start : span.end])
            assert found == pytest.approx(expected, rel=1e-4)


def test_a_fresh_adapter_changes_nothing(model: PreTrainedModel, planned: Plan) -> None:
    row = row_tensors(planned.rows[0], torch.float32)
    before = losses(model, FIRST, lower(model, FIRST, row), row)
    trained = insert_lora(model, CONFIG, seed=0)
    assert torch.equal(losses(model, FIRST, lower(model, FIRST, row), row), before)
    assert {id(p) for p in model.parameters() if p.requires_grad} == {id(p) for p in trained.values()}
    assert {p.dtype for p in trained.values()} == {torch.float32}


def test_the_first_factors_follow_from_seed_and_name(base: Path) -> None:
    one, same, other = (insert_lora(load_base(base, torch.float32), CONFIG, seed) for seed in (0, 0, 1))
    name = "model.layers.2.self_attn.q_proj.a"
    assert torch.equal(one[name], same[name])
    assert not torch.equal(one[name], other[name])
    assert not torch.equal(one[name], one["model.layers.3.self_attn.q_proj.a"])


def test_the_derivative_by_a_weight_is_the_record_s_loss(model: PreTrainedModel, planned: Plan) -> None:
    loud(model)
    row = row_tensors(planned.rows[0], torch.float32)
    per_span = losses(model, FIRST, lower(model, FIRST, row), row)
    weights = torch.ones(row.num_spans, requires_grad=True)
    (derivative,) = torch.autograd.grad(step_loss(per_span, weights, planned.normaliser), weights)
    assert torch.allclose(derivative * planned.normaliser, per_span)


def test_what_the_frozen_blocks_return_may_be_kept(model: PreTrainedModel, planned: Plan) -> None:
    asked: list[int] = []

    def compute(row: int) -> torch.Tensor:
        asked.append(row)
        return lower(model, FIRST, row_tensors(planned.rows[row], torch.float32))

    size = 4 * 64 * len(planned.rows[0].ids)
    cache = LowerCache(compute, max_bytes=size)
    first = cache(0)
    assert torch.equal(cache(0), first)
    assert asked == [0]
    cache(1), cache(1)
    assert asked == [0, 1, 1]  # no room


def train(model: PreTrainedModel, trained: dict[str, torch.nn.Parameter], planned: Plan) -> list[float]:
    optimizer, history = Adam(trained.values(), CONFIG), []
    optimizer.prepare_moments()
    for number, step in enumerate(planned.steps, start=1):
        optimizer.prepare_step(number, learning_rate(CONFIG, number, len(planned.steps)))
        total = 0.0
        for index in step:
            row = row_tensors(planned.rows[index], torch.float32)
            loss = losses(model, FIRST, lower(model, FIRST, row), row)
            part = step_loss(loss, torch.ones(row.num_spans), planned.normaliser)
            part.backward()
            total += part.item()
        optimizer.step()
        optimizer.zero_grad()
        history.append(total)
    return history


def test_training_learns_and_repeats_to_the_bit(base: Path, planned: Plan) -> None:
    runs = []
    for _ in range(2):
        model = load_base(base, torch.float32)
        trained = insert_lora(model, CONFIG, seed=0)
        runs.append((train(model, trained, planned), [p.detach().clone() for p in trained.values()]))
    history = runs[0][0]
    assert sum(history[-4:]) < 0.96 * sum(history[:4])
    assert runs[0][0] == runs[1][0]
    assert all(torch.equal(x, y) for x, y in zip(runs[0][1], runs[1][1], strict=True))


def test_the_optimizer_is_the_function() -> None:
    torch.manual_seed(0)
    parameter = torch.nn.Parameter(torch.randn(3, 2))
    optimizer = Adam([parameter], CONFIG)
    optimizer.prepare_moments()
    state = AdamState(parameter.detach().clone(), torch.zeros(3, 2), torch.zeros(3, 2))
    for step in range(1, 6):
        parameter.grad = torch.randn(3, 2)
        state = adam(state, parameter.grad, step, CONFIG.learning_rate, CONFIG)
        optimizer.prepare_step(step, CONFIG.learning_rate)
        optimizer.step()
        assert torch.equal(parameter, state.value)


def test_adam_is_the_textbook_s_where_gradients_are_large() -> None:
    torch.manual_seed(0)
    ours, theirs = (torch.nn.Parameter(torch.ones(4, dtype=torch.float64)) for _ in range(2))
    mine = Adam([ours], CONFIG)
    mine.prepare_moments()
    reference = torch.optim.Adam([theirs], lr=CONFIG.learning_rate, betas=(CONFIG.beta1, CONFIG.beta2), eps=0)
    for step in range(1, 11):
        mine.prepare_step(step, CONFIG.learning_rate)
        ours.grad = torch.randn(4, dtype=torch.float64)
        theirs.grad = ours.grad.clone()
        mine.step(), reference.step()
    assert torch.allclose(ours, theirs, rtol=1e-6)


def test_the_first_update_is_smooth_at_a_gradient_of_zero() -> None:
    """Central differences agree with the derivative at 0, where the usual Adam jumps from -rate to +rate."""
    zero = torch.zeros(1, dtype=torch.float64)
    config = TrainingConfig(epsilon=1e-6)

    def update(gradient: torch.Tensor) -> torch.Tensor:
        return adam(AdamState(zero, zero, zero), gradient, 1, 1.0, config).value

    gradient = zero.clone().requires_grad_()
    (derivative,) = torch.autograd.grad(update(gradient), gradient)
    h = 1e-6
    assert float((update(zero + h) - update(zero - h)) / (2 * h)) == pytest.approx(
        float(derivative), rel=1e-4
    )


def test_the_update_can_be_differentiated_in_everything() -> None:
    torch.manual_seed(0)
    inputs = [torch.rand(4, dtype=torch.float64, requires_grad=True) for _ in range(4)]

    def update(
        value: torch.Tensor, mean: torch.Tensor, square: torch.Tensor, gradient: torch.Tensor
    ) -> torch.Tensor:
        after = adam(AdamState(value, mean, square), gradient, 3, 0.1, CONFIG)
        return torch.cat([after.value, after.exp_avg, after.exp_avg_sq])

    assert torch.autograd.gradcheck(update, inputs)


def test_the_rate_warms_up_and_falls() -> None:
    rates = [learning_rate(TrainingConfig(warmup_steps=4), step, 100) for step in range(1, 101)]
    top = rates.index(max(rates))
    assert rates[:top] == sorted(rates[:top])
    assert rates[top:] == sorted(rates[top:], reverse=True)
    assert 3 <= top <= 5
    assert 0 < rates[-1] == pytest.approx(0.05 * 2e-3)
    assert learning_rate(TrainingConfig(warmup_steps=0), 1, 1) == 2e-3


def test_the_published_factors_do_what_the_trained_ones_do(model: PreTrainedModel, planned: Plan) -> None:
    trained = loud(model)
    weights = adapter_weights(sha256(b"base"), trained, CONFIG)
    name = "model.layers.3.mlp.down_proj"
    module, factors = model.get_submodule(name), weights.factors[name]
    x = torch.randn(5, module.base.in_features)
    published = module.base(x) + x @ factors.a.float().T @ factors.b.float().T
    assert torch.allclose(published, module(x), rtol=2e-2, atol=2e-2)
    assert sorted(weights.factors) == sorted({full.rpartition(".")[0] for full in trained})


def test_the_workers_of_a_step_share_its_rows() -> None:
    step = (5, 3, 8, 1)
    assert sorted([*share(step, 0, 2), *share(step, 1, 2)]) == sorted(step)
    assert share(step, 0, 1) == step


@pytest.mark.parametrize(
    ("change", "code"), [({"adapted_blocks": 5}, "adapted_blocks"), ({"linears": ("x",)}, "linears")]
)
def test_a_configuration_that_does_not_fit_the_base_is_refused(
    model: PreTrainedModel, change: dict[str, object], code: str
) -> None:
    with pytest.raises(Rejected) as refused:
        insert_lora(model, CONFIG.model_copy(update=change), seed=0)
    assert refused.value.code == code
