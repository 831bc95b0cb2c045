"""The engine: requests in, bundles of tokens out. Three calls make a step: schedule, run, postprocess.

``step`` belongs to one thread; the other calls may come from any thread and take effect at the next step. No
Ray, no HTTP, no money."""

import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field

from torch import Tensor

from attribution.errors import Corrupted, Refusal, Rejected
from attribution.types import ZERO_ID
from serve_apps.engine.adapter_cache import AdapterCache, withdrawn_refusal
from serve_apps.engine.blending import RecentBlends
from serve_apps.engine.embedding import embedding
from serve_apps.engine.grammar import Constrain, Constraint
from serve_apps.engine.runner import FittedAdapter, Outputs, Runner
from serve_apps.engine.sampling import logprob_of, sample
from serve_apps.engine.scheduler import Row, Scheduler, StepPlan
from serve_apps.engine.text import Decode, Piece, TextStream
from serve_apps.engine.types import (
    Bundle,
    EngineLoad,
    EngineRequest,
    Finish,
    TokenEvent,
    TokenLogprob,
)

MAX_AWAITED = 2  # adapters that are loaded one after the other while memory is short


@dataclass(slots=True, eq=False)
class _Answer:
    """An answer as it grows: its text, what it must match, and the logprobs of tokens not shown yet."""

    request: EngineRequest
    text: TextStream
    constraint: Constraint | None
    unshown: deque[TokenLogprob] = field(default_factory=deque)

    def shown(self, piece: Piece) -> tuple[TokenLogprob, ...]:
        """Logprobs of the tokens that begin in ``piece``."""
        return tuple(self.unshown.popleft() for _ in range(piece.num_begun if self.unshown else 0))


@dataclass(slots=True, eq=False)
class _Inbox:
    """What other threads asked for since the last step."""

    changed: threading.Condition = field(default_factory=threading.Condition)
    answers: deque[_Answer] = field(default_factory=deque)
    cancelled: deque[bytes] = field(default_factory=deque)
    withdrawn: deque[bytes] = field(default_factory=deque)  # adapters

    def drain(self) -> tuple[list[_Answer], list[bytes], list[bytes]]:
        with self.changed:
            drained = list(self.answers), list(self.cancelled), list(self.withdrawn)
            for each in (self.answers, self.cancelled, self.withdrawn):
                each.clear()
        return drained


class Engine:
    def __init__(
        self,
        runner: Runner,
        scheduler: Scheduler,
        adapters: AdapterCache[FittedAdapter],
        blends: RecentBlends,
        decode: Decode,
        constrain: Constrain,
        eos_ids: frozenset[int],
        close_runner: Callable[[], object] = lambda: None,
    ) -> None:
        self._runner = runner
        self._scheduler = scheduler
        self._adapters = adapters
        self._blends = blends
        self._decode = decode
        self._constrain = constrain
        self._eos_ids = eos_ids
        self._close_runner = close_runner
        self._inbox = _Inbox()
        self._answers: dict[bytes, _Answer] = {}
        self._leased: dict[bytes, None] = {}  # adapters, longest held first
        self._step = 0

    def submit(self, request: EngineRequest) -> None:
        """Accept a request, or refuse it before anything is spent on it.

        Raises:
            Rejected: too long for the context or the cache, not made of this model's tokens, or under a
                grammar that is none.
            Unavailable: the queue is full.
        """
        with self._inbox.changed:
            self._scheduler.check(request, [each.request for each in self._inbox.answers])
        vocabulary, sampling = self._runner.shape.vocabulary, request.sampling
        if not all(0 <= token < vocabulary for token in request.prompt_ids):
            raise Rejected(
                "token_out_of_range", f"the prompt has ids beyond {vocabulary - 1}", field="prompt"
            )
        if not all(0 <= bias.token_id < vocabulary for bias in sampling.logit_bias):
            raise Rejected(
                "token_out_of_range", f"logit_bias has ids beyond {vocabulary - 1}", field="logit_bias"
            )
        constraint = self._constrain(sampling.grammar) if sampling.grammar else None
        answer = _Answer(request, TextStream(self._decode, sampling.stop), constraint)
        if request.blend is not None:
            self._blends.add(request.blend)
        with self._inbox.changed:
            self._inbox.answers.append(answer)
            self._inbox.changed.notify()
        self.prefetch(request.adapter_id)

    def cancel(self, request_id: bytes) -> None:
        """Stop a request; all it holds is free after the next step. Unknown and finished ids are fine."""
        with self._inbox.changed:
            self._inbox.cancelled.append(request_id)
            self._inbox.changed.notify()

    def prefetch(self, adapter_id: bytes) -> None:
        """Begin to load an adapter that a request will want, if that costs nobody anything. Any thread may
        call, and need not wait for the step that is running."""
        if adapter_id != ZERO_ID:
            self._adapters.prefetch(adapter_id)

    def withdraw(self, adapter_ids: Iterable[bytes]) -> None:
        """Drop adapters for good: from the next step on nothing computes with them, and whoever uses them or
        asks for them later is refused with ``model_withdrawn``."""
        with self._inbox.changed:
            self._inbox.withdrawn.extend(adapter_ids)
            self._inbox.changed.notify()

    def wait_for_work(self, timeout_s: float) -> None:
        """Return when there may be something to do, or after ``timeout_s``."""
        with self._inbox.changed:
            inbox = self._inbox
            if not (inbox.answers or inbox.cancelled or inbox.withdrawn or self._answers):
                inbox.changed.wait(timeout_s)

    def load(self) -> EngineLoad:
        pool = self._scheduler.pool
        return EngineLoad(
            num_running=self._scheduler.num_running,
            num_waiting=self._scheduler.num_waiting + len(self._inbox.answers),
            num_free_blocks=pool.num_free,
            num_blocks=pool.num_blocks,
            num_adapters=self._adapters.num_resident,
            num_prefilled=self._scheduler.num_prefilled,
            num_reused=self._scheduler.num_reused,
            max_waiting=self._scheduler.limits.max_waiting,
            num_leases=self._adapters.num_leases,
        )

    def step(self) -> Bundle:
        events = [*self._take_in(), *self._lease_adapters()]
        plan = self._scheduler.schedule(self._is_ready)
        if plan.rows:
            outputs = self._runner.run(plan, self._adapters_of(plan))
            events += self._postprocess(plan, outputs)
        elif self._scheduler.num_waiting:
            self._adapters.wait(0.002)  # all that is left waits for an adapter
        self._step += 1
        return Bundle(self._step, tuple(events), self.load())

    def close(self) -> None:
        self._adapters.close()
        self._close_runner()

    def _take_in(self) -> Iterator[TokenEvent]:
        answers, cancelled, withdrawn = self._inbox.drain()
        for adapter_id in withdrawn:
            for each in (adapter_id, *self._blends.holding(adapter_id)):
                self._adapters.withdraw(each)
                self._leased.pop(each, None)
                yield from self._refuse(each, withdrawn_refusal(adapter_id))
        for answer in answers:
            try:
                self._admit(answer)
            except Refusal as refusal:
                yield _failed(answer.request.request_id, refusal)
        for request_id in cancelled:
            if request_id in self._scheduler:
                self._forget(request_id)
                yield TokenEvent(request_id, (), "", Finish("cancelled"))

    def _admit(self, answer: _Answer) -> None:
        request = answer.request
        if request.request_id in self._scheduler:
            raise Rejected("request_id_repeated", f"{request.request_id.hex()} is running", http_status=409)
        self._scheduler.add(request)
        self._answers[request.request_id] = answer

    def _forget(self, request_id: bytes) -> None:
        self._scheduler.remove(request_id)
        del self._answers[request_id]

    def _lease_adapters(self) -> Iterator[TokenEvent]:
        """Hold what is in use and what those who wait will want; refuse those whose adapter cannot be had.

        Where memory is short, nothing is held for those behind the next few that wait for theirs: it may be
        evicted. So one adapter too many costs loads, and no adapter in demand keeps another out."""
        wanted, num_awaited = dict[bytes, None](), 0
        for adapter_id in self._scheduler.adapters_in_turn():
            if adapter_id != ZERO_ID and adapter_id not in wanted:
                wanted[adapter_id] = None
                num_awaited += not self._adapters.is_ready(adapter_id)
                if num_awaited == MAX_AWAITED and self._adapters.lacks_room:
                    break
        for adapter_id in [each for each in self._leased if each not in wanted]:
            self._adapters.release(adapter_id)
            del self._leased[adapter_id]
        for adapter_id in wanted:
            try:
                self._lease(adapter_id)
            except Refusal as refusal:
                yield from self._refuse(adapter_id, refusal)
        for adapter_id, failure in self._adapters.poll().items():
            self._leased.pop(adapter_id, None)
            yield from self._refuse(adapter_id, failure)

    def _lease(self, adapter_id: bytes) -> None:
        if adapter_id not in self._leased:
            self._adapters.acquire(adapter_id)
            self._leased[adapter_id] = None

    def _refuse(self, adapter_id: bytes, refusal: Refusal) -> Iterator[TokenEvent]:
        for request_id in self._scheduler.requests_of(adapter_id):
            self._forget(request_id)
            yield _failed(request_id, refusal)

    def _is_ready(self, adapter_id: bytes) -> bool:
        """Whether this step may use an adapter; one that was loaded and not held is held from here on."""
        if adapter_id != ZERO_ID and self._adapters.is_ready(adapter_id):
            self._lease(adapter_id)
        return adapter_id == ZERO_ID or self._adapters.is_ready(adapter_id)

    def _adapters_of(self, plan: StepPlan) -> dict[bytes, FittedAdapter]:
        used = {row.adapter_id for row in plan.rows} - {ZERO_ID}
        return {adapter_id: self._adapters.get(adapter_id) for adapter_id in used}

    def _postprocess(self, plan: StepPlan, outputs: Outputs) -> Iterator[TokenEvent]:
        rows = (row for row in plan.rows if row.samples)
        numbers = zip(outputs.highest.tolist(), outputs.best.tolist(), strict=True)
        for index, (row, (highest, argmax)) in enumerate(zip(rows, numbers, strict=True)):
            if not abs(highest) < float("inf"):
                self._forget(row.request_id)
                yield _failed(
                    row.request_id, Corrupted("logits_not_finite", f"logits of {row.adapter_id.hex()}")
                )
            elif self._answers[row.request_id].request.is_embedding:
                self._forget(row.request_id)
                yield TokenEvent(row.request_id, (), embedding(outputs.hidden[index]), Finish("stop"))
            else:
                yield self._advance_or_fail(row, outputs.logits[index], argmax)

    def _advance_or_fail(self, row: Row, logits: Tensor, argmax: int) -> TokenEvent:
        try:
            return self._advance(row, logits, argmax)
        except Rejected as refusal:  # a grammar that turned out too complex
            self._forget(row.request_id)
            return _failed(row.request_id, refusal)

    def _advance(self, row: Row, logits: Tensor, argmax: int) -> TokenEvent:
        """Add one token to a row's answer and see whether that ends it."""
        sequence, answer = self._scheduler.sequence(row.request_id), self._answers[row.request_id]
        sampling, prompt = sequence.request.sampling, sequence.request.prompt_ids
        generated = sequence.tokens[len(prompt) :]
        if sampling.is_plain_greedy and answer.constraint is None:
            token = argmax
        else:
            allowed = answer.constraint.allowed() if answer.constraint else None
            token = sample(logits, sampling, generated, prompt, allowed)
        sequence.tokens.append(token)
        if token in self._eos_ids and not sampling.ignore_eos:
            return self._finish(answer, token, answer.text.finish(), Finish("stop"))
        if sampling.num_logprobs is not None:
            answer.unshown.append(logprob_of(logits, token, sampling.num_logprobs, answer.text.offset))
        piece = answer.text.push(token)
        if piece.is_stopped:
            return self._finish(answer, token, piece, Finish("stop"))
        is_complete = answer.constraint is not None and answer.constraint.advance(token)
        if is_complete or len(generated) + 1 == sampling.max_tokens:
            rest = answer.text.finish()
            whole = Piece(piece.text + rest.text, rest.is_stopped, piece.num_begun + rest.num_begun)
            reason = Finish("stop" if is_complete or rest.is_stopped else "length")
            return self._finish(answer, token, whole, reason)
        return TokenEvent(row.request_id, (token,), piece.text, None, answer.shown(piece))

    def _finish(self, answer: _Answer, token: int, piece: Piece, finish: Finish) -> TokenEvent:
        self._forget(answer.request.request_id)
        return TokenEvent(answer.request.request_id, (token,), piece.text, finish, answer.shown(piece))


def _failed(request_id: bytes, refusal: Refusal) -> TokenEvent:
    return TokenEvent(request_id, (), "", Finish("failed", refusal))
