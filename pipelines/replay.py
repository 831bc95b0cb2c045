"""One pass back through a recorded training: what each trained record did to a linear function of the result.

Give every record a weight in the loss, 1 as it was trained. For a vector ``q`` over the factors, the replay
returns the derivative of ``q . theta_T`` by every weight: with ``q`` the gradient of answers' losses, how
much the loss of those answers would rise with a little more of the record. It is the chain rule through the
training's own ``adam`` and ``step_loss``, and everything is linear in ``q``, so one pass serves any sum of
answers.

Memory is bounded by the gaps between kept states: from each, starting at the last, the steps up to the next
one are computed again and their states held, the last of them is compared with what was kept, and the pass
goes back over them. Between two gaps it can be stored and taken up again. A control, a record that was never
trained on, gets the derivative at weight 0 of a training in which its rows had stood beside the others, at
steps that only a hash chose: what the same measure says of a record that did nothing.

Source: the metagradient of arXiv:2503.13751, the training made smooth as it advises."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from attribution.errors import Corrupted
from pipelines.course import Course
from pipelines.row_derivatives import Workers
from pipelines.training import AdamState, adam, learning_rate, share

# Of a state computed again. Sums in another order (threads, attention kernels) deviated by 5e-7 on the toy
# model and moved credits by 7 ppm; the same training in bf16 deviated by 2.5e-3. One is the same training.
TOLERANCE = 1e-4


@dataclass(frozen=True, slots=True)
class Position:
    """Where a replay stands: behind ``step`` everything is done.

    ``adjoint`` holds the derivatives of ``q . theta_T`` by the state after ``step``, flat, fp32;
    ``derivatives`` those by the weight of each span of each of the course's rows, fp64, so far;
    ``deviation`` is the largest found between a kept state and its recomputation."""

    step: int
    adjoint: AdamState
    derivatives: Tensor
    deviation: float


def beginning(course: Course, direction: Tensor) -> Position:
    """At the end of the training. ``direction`` is ``q`` at unit length, fp32 ``[parameters]``."""
    spans = sum(len(row.spans) for row in course.rows)
    adjoint = AdamState(direction, torch.zeros_like(direction), torch.zeros_like(direction))
    return Position(len(course.steps), adjoint, torch.zeros(spans, dtype=torch.float64), 0.0)


def replay(
    course: Course,
    workers: Workers,
    state_after: Callable[[int], AdamState],
    kept: Sequence[int],
    position: Position,
    on_border: Callable[[Position], None],
) -> Position:
    """From ``position`` back to the beginning of the training. ``on_border`` may keep every position between.

    Args:
        state_after: the whole state that was kept after a step, each field flat.
        kept: the steps of which there is one, ascending, 0 among them.

    Raises:
        Corrupted: ``replay_deviates``, a recomputed state is not the kept one.
    """
    after = state_after(position.step)
    for step in sorted((one for one in kept if one < position.step), reverse=True):
        before = state_after(step)
        passed = _recompute(course, workers, before, step + 1, position.step)
        deviation = _deviation(before, _next(course, passed[-1]), after)
        if deviation > TOLERANCE:
            raise Corrupted(
                "replay_deviates",
                f"the state after step {position.step}, computed again from step {step}, deviates by "
                f"{deviation:.1e} from the one kept, allowed are {TOLERANCE:.0e}",
            )
        position = _back(course, workers, passed, position)
        position = Position(step, position.adjoint, position.derivatives, max(position.deviation, deviation))
        on_border(position)
        after = before
    return position


def credits_by_record(course: Course, position: Position, norm: float) -> Mapping[bytes, int]:
    """What each record took off the answers' loss, in the unit of the gradient sum whose length is ``norm``.

    The derivatives are of ``q`` at unit length; a record's are added over its wordings and epochs, then
    rounded once."""
    total: dict[bytes, float] = {}
    spans = (span for row in course.rows for span in row.spans)
    for span, derivative in zip(spans, position.derivatives.tolist(), strict=True):
        total[span.record_id] = total.get(span.record_id, 0.0) - derivative
    return {record_id: _integer(value * norm) for record_id, value in total.items()}


def _integer(value: float) -> int:
    if not abs(value) < 2**63:
        raise Corrupted("credit_overflow", f"a record earns {value:.3g}, beyond 64 bits")
    return round(value)


@dataclass(frozen=True, slots=True)
class _Step:
    """A step computed again: the state before it and its gradient."""

    number: int
    before: AdamState
    gradient: Tensor


def _recompute(course: Course, workers: Workers, state: AdamState, first: int, last: int) -> list[_Step]:
    passed: list[_Step] = []
    for number in range(first, last + 1):
        gradients = workers.gradients(state.value, _shares(course.steps[number - 1], course.num_workers))
        passed.append(_Step(number, state, _sum(gradients)))
        state = _next(course, passed[-1])
    return passed


def _next(course: Course, step: _Step) -> AdamState:
    rate = learning_rate(course.config, step.number, len(course.steps))
    return adam(step.before, step.gradient, step.number, rate, course.config)


def _back(course: Course, workers: Workers, passed: Sequence[_Step], position: Position) -> Position:
    starts = _span_starts(course)
    adjoint, derivatives = position.adjoint, position.derivatives.clone()
    for step in reversed(passed):
        through, direction = _pull_through_adam(course, step, adjoint)
        rows = _shares(course.steps[step.number - 1], course.num_workers)
        controls = _shares(course.control_steps[step.number - 1], course.num_workers)
        shares = [[*own, *others] for own, others in zip(rows, controls, strict=True)]
        pulled = workers.pull_back(step.before.value, direction, shares)
        for one in pulled:
            for row, weights in one.weights.items():
                at = starts[row]
                derivatives[at : at + len(weights)] += torch.tensor(weights, dtype=torch.float64)
        value = through.value + _sum([one.values for one in pulled])
        adjoint = AdamState(value, through.exp_avg, through.exp_avg_sq)
    return Position(position.step, adjoint, derivatives, position.deviation)


def _pull_through_adam(course: Course, step: _Step, adjoint: AdamState) -> tuple[AdamState, Tensor]:
    """Derivatives by the state before an update, its gradient held, and by that gradient."""
    before = step.before
    given = [
        tensor.detach().requires_grad_()
        for tensor in (before.value, before.exp_avg, before.exp_avg_sq, step.gradient)
    ]
    after = _next(course, _Step(step.number, AdamState(*given[:3]), given[3]))
    value, exp_avg, exp_avg_sq, gradient = torch.autograd.grad(
        (after.value, after.exp_avg, after.exp_avg_sq),
        given,
        (adjoint.value, adjoint.exp_avg, adjoint.exp_avg_sq),
    )
    return AdamState(value, exp_avg, exp_avg_sq), gradient


def _deviation(before: AdamState, found: AdamState, kept: AdamState) -> float:
    """The largest relative distance: of the values by how far they had come, of the moments by their size."""
    pairs = (
        (found.value - kept.value, kept.value - before.value),
        (found.exp_avg - kept.exp_avg, kept.exp_avg),
        (found.exp_avg_sq - kept.exp_avg_sq, kept.exp_avg_sq),
    )
    return max(
        float(torch.dist(apart, torch.zeros(())) / size.norm().clamp_min(1e-30)) for apart, size in pairs
    )


def _shares(rows: Sequence[int], num_workers: int) -> list[Sequence[int]]:
    return [share(rows, rank, num_workers) for rank in range(num_workers)]


def _sum(parts: Sequence[Tensor]) -> Tensor:
    """In the order of the workers; of one or two, in any order the same bits."""
    total = parts[0]
    for part in parts[1:]:
        total = total + part
    return total


def _span_starts(course: Course) -> list[int]:
    starts = [0]
    for row in course.rows:
        starts.append(starts[-1] + len(row.spans))
    return starts
