import pytest
import torch
from torch.func import functional_call

from attribution.errors import Corrupted
from attribution.gradients import (
    Example,
    Factors,
    answer_gradients,
    answer_losses,
    batches,
    gradient_order,
    num_parameters,
)


def examples(num: int, seed: int = 0) -> list[Example]:
    generator = torch.Generator().manual_seed(seed)

    def ids(low: int, high: int) -> tuple[int, ...]:
        length = int(torch.randint(low, high, (1,), generator=generator))
        return tuple(torch.randint(0, 97, (length,), generator=generator).tolist())

    return [Example(ids(2, 12), ids(1, 6)) for _ in range(num)]


def gradients_by_autograd(
    model: torch.nn.Module, lora: dict[str, Factors], batch: list[Example]
) -> torch.Tensor:
    """The oracle: one example at a time, the factors merged into the weights, plain autograd."""
    rows = []
    for example in batch:
        leaves = {
            path: (f.a.clone().requires_grad_(), f.b.clone().requires_grad_()) for path, f in lora.items()
        }
        merged = {
            f"{path}.weight": model.get_submodule(path).weight + lora[path].scale * b @ a
            for path, (a, b) in leaves.items()
        }
        ids = torch.tensor([example.prompt + example.answer])
        logits = functional_call(model, merged, kwargs={"input_ids": ids}).logits[0]
        scores = logits.log_softmax(-1)[range(len(example.prompt) - 1, ids.shape[1] - 1), example.answer]
        inputs = [leaf for path in gradient_order(lora) for leaf in leaves[path]]
        parts = torch.autograd.grad(-scores.mean(), inputs)
        rows.append(torch.cat([part.reshape(-1) for part in parts]))
    return torch.stack(rows)


def test_hooks_equal_a_loop_of_autograd(toy_model: torch.nn.Module, toy_lora: dict[str, Factors]) -> None:
    """One batched pass gives each example the gradient that it has alone, whatever pads the batch."""
    batch = examples(7)
    fast = answer_gradients(toy_model, toy_lora, batch)
    assert fast.shape == (7, num_parameters(toy_lora))
    torch.testing.assert_close(fast, gradients_by_autograd(toy_model, toy_lora, batch), rtol=1e-4, atol=1e-6)


def test_one_at_a_time_equals_the_batch(toy_model: torch.nn.Module, toy_lora: dict[str, Factors]) -> None:
    batch = examples(5, seed=3)
    alone = torch.cat([answer_gradients(toy_model, toy_lora, [example]) for example in batch])
    torch.testing.assert_close(answer_gradients(toy_model, toy_lora, batch), alone, rtol=1e-4, atol=1e-6)


def test_batch_of_one_repeats_bit_for_bit(toy_model: torch.nn.Module, toy_lora: dict[str, Factors]) -> None:
    (example,) = examples(1)
    first = answer_gradients(toy_model, toy_lora, [example])
    assert torch.equal(first, answer_gradients(toy_model, toy_lora, [example]))


def test_the_model_is_left_as_it_was(toy_model: torch.nn.Module, toy_lora: dict[str, Factors]) -> None:
    batch = examples(2)
    before = answer_losses(toy_model, batch)
    answer_gradients(toy_model, toy_lora, batch)
    assert torch.equal(before, answer_losses(toy_model, batch))
    with torch.enable_grad():
        assert not answer_losses(toy_model, batch).requires_grad


def test_factors_of_another_shape_are_refused(toy_model: torch.nn.Module) -> None:
    wrong = {"model.layers.1.mlp.up_proj": Factors(torch.zeros(3, 31), torch.zeros(48, 3), 1.0)}
    with pytest.raises(Corrupted, match=r"is \(48, 32\), factors make \(48, 31\)"):
        answer_gradients(toy_model, wrong, examples(1))


def test_batches_take_everything_once_and_stay_within_their_size() -> None:
    many = examples(40, seed=5)
    taken = list(batches(many, max_tokens=48))
    assert sorted(index for batch in taken for index in batch) == list(range(40))
    assert all(len(batch) * max(many[i].num_tokens for i in batch) <= 48 for batch in taken)
