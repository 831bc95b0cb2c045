"""The engine: requests in, bundles of tokens out. Three calls make a step: schedule, run, postprocess.

``submit`` and ``cancel`` may be called from any thread and take effect at the next step; ``step`` belongs to
one thread. No Ray, no HTTP, no money."""

import threading
from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from torch import Tensor

from attribution.errors import Corrupted, Refusal, Rejected
from attribution.types import ZERO_ID
from cluster.adapters import Factors
from serve_apps.engine.adapter_cache import AdapterCache
from serve_apps.engine.families import Shape
from serve_apps.engine.sampling import sample
from serve_apps.engine.scheduler import Row, Scheduler, StepPlan
from serve_apps.engine.text import Decode, TextStream
from serve_apps.engine.types import Bundle, EngineLoad, EngineRequest, Finish, TokenEvent


class FittedAdapter(Protocol):
    """An adapter as one kind of runner reads it; the engine only carries it."""

    @property
    def size_bytes(self) -> int: ...


class Runner(Protocol):
    """Computes the rows of a plan: ``ModelRunner`` in torch, ``NativeRunner`` by our own kernels."""

    @property
    def shape(self) -> Shape: ...

    @property
    def num_blocks(self) -> int: ...

    def fit(self, factors: Mapping[str, Factors]) -> FittedAdapter:
        """Called on a thread of the adapter cache."""

    def run(self, plan: StepPlan, adapters: Mapping[bytes, Any]) -> Tensor:
        """Logits ``[rows that sample, vocabulary]``."""


@dataclass(slots=True, eq=False)
class _Inbox:
    """What other threads asked for since the last step."""

    changed: threading.Condition = field(default_factory=threading.Condition)
    requests: deque[EngineRequest] = field(default_factory=deque)
    cancelled: deque[bytes] = field(default_factory=deque)

    def drain(self) -> tuple[list[EngineRequest], list[bytes]]:
        with self.changed:
            requests, cancelled = list(self.requests), list(self.cancelled)
            self.requests.clear()
            self.cancelled.clear()
        return requests, cancelled


class Engine:
    def __init__(
        self,
        runner: Runner,
        scheduler: Scheduler,
        adapters: AdapterCache[FittedAdapter],
        decode: Decode,
        eos_ids: frozenset[int],
    ) -> None:
        self._runner = runner
        self._scheduler = scheduler
        self._adapters = adapters
        self._decode = decode
        self._eos_ids = eos_ids
        self._inbox = _Inbox()
        self._texts: dict[bytes, TextStream] = {}
        self._step = 0

    def submit(self, request: EngineRequest) -> None:
        """Accept a request, or refuse it before anything is spent on it.

        Raises:
            Rejected: too long for the context or the cache, or not made of this model's tokens.
            Unavailable: the queue is full.
        """
        self._scheduler.check(request)
        vocabulary = self._runner.shape.vocabulary
        if not all(0 <= token < vocabulary for token in request.prompt_ids):
            raise Rejected(
                "token_out_of_range", f"the prompt has ids beyond {vocabulary - 1}", field="prompt"
            )
        with self._inbox.changed:
            self._inbox.requests.append(request)
            self._inbox.changed.notify()

    def cancel(self, request_id: bytes) -> None:
        """Stop a request; all it holds is free after the next step. Unknown and finished ids are fine."""
        with self._inbox.changed:
            self._inbox.cancelled.append(request_id)
            self._inbox.changed.notify()

    def wait_for_work(self, timeout_s: float) -> None:
        """Return when there may be something to do, or after ``timeout_s``."""
        with self._inbox.changed:
            if not (self._inbox.requests or self._inbox.cancelled or self._texts):
                self._inbox.changed.wait(timeout_s)

    def load(self) -> EngineLoad:
        pool = self._scheduler.pool
        return EngineLoad(
            num_running=self._scheduler.num_running,
            num_waiting=self._scheduler.num_waiting + len(self._inbox.requests),
            num_free_blocks=pool.num_free,
            num_blocks=pool.num_blocks,
            resident_adapters=self._adapters.resident,
            num_prefilled=self._scheduler.num_prefilled,
            num_reused=self._scheduler.num_reused,
        )

    def step(self) -> Bundle:
        events = [*self._take_in(), *self._refuse_failed_adapters()]
        plan = self._scheduler.schedule(self._is_ready)
        if plan.rows:
            logits = self._runner.run(plan, self._adapters_of(plan))
            events += self._postprocess(plan, logits)
        elif self._scheduler.num_waiting:
            self._adapters.wait(0.002)  # all that is left waits for an adapter
        self._step += 1
        return Bundle(self._step, tuple(events), self.load())

    def close(self) -> None:
        self._adapters.close()

    def _take_in(self) -> Iterator[TokenEvent]:
        requests, cancelled = self._inbox.drain()
        for request in requests:
            try:
                self._admit(request)
            except Refusal as refusal:
                yield _failed(request.request_id, refusal)
        for request_id in cancelled:
            if request_id in self._scheduler:
                self._forget(request_id)
                yield TokenEvent(request_id, (), "", Finish("cancelled"))

    def _admit(self, request: EngineRequest) -> None:
        if request.request_id in self._scheduler:
            raise Rejected("request_id_repeated", f"{request.request_id.hex()} is running", http_status=409)
        if request.adapter_id != ZERO_ID:
            self._adapters.acquire(request.adapter_id)
        self._scheduler.add(request)
        self._texts[request.request_id] = TextStream(self._decode, request.sampling.stop)

    def _forget(self, request_id: bytes, is_leased: bool = True) -> None:
        request = self._scheduler.remove(request_id)
        del self._texts[request_id]
        if request.adapter_id != ZERO_ID and is_leased:
            self._adapters.release(request.adapter_id)

    def _refuse_failed_adapters(self) -> Iterator[TokenEvent]:
        for adapter_id, refusal in self._adapters.poll().items():
            for request_id in self._scheduler.requests_of(adapter_id):
                self._forget(request_id, is_leased=False)
                yield _failed(request_id, refusal)

    def _is_ready(self, adapter_id: bytes) -> bool:
        return adapter_id == ZERO_ID or self._adapters.is_ready(adapter_id)

    def _adapters_of(self, plan: StepPlan) -> dict[bytes, FittedAdapter]:
        used = {row.adapter_id for row in plan.rows} - {ZERO_ID}
        return {adapter_id: self._adapters.get(adapter_id) for adapter_id in used}

    def _postprocess(self, plan: StepPlan, logits: Tensor) -> Iterator[TokenEvent]:
        best = logits.max(dim=-1)
        rows = (row for row in plan.rows if row.samples)
        picks = zip(rows, logits, best.values.tolist(), best.indices.tolist(), strict=True)
        for row, row_logits, highest, argmax in picks:
            if not abs(highest) < float("inf"):
                self._forget(row.request_id)
                yield _failed(
                    row.request_id, Corrupted("logits_not_finite", f"logits of {row.adapter_id.hex()}")
                )
            else:
                yield self._advance(row, row_logits, argmax)

    def _advance(self, row: Row, logits: Tensor, argmax: int) -> TokenEvent:
        """Add one token to a row's answer and see whether that ends it."""
        sequence = self._scheduler.sequence(row.request_id)
        sampling = sequence.request.sampling
        is_plain = sampling.temperature == 0 and not (sampling.presence_penalty or sampling.frequency_penalty)
        generated = sequence.tokens[len(sequence.request.prompt_ids) :]
        token = argmax if is_plain else sample(logits, sampling, generated)
        sequence.tokens.append(token)
        text = self._texts[row.request_id]
        if token in self._eos_ids and not sampling.ignore_eos:
            return self._finish(row.request_id, token, text.finish().text, Finish("stop"))
        piece = text.push(token)
        if piece.is_stopped:
            return self._finish(row.request_id, token, piece.text, Finish("stop"))
        if len(generated) + 1 == sampling.max_tokens:
            rest = text.finish()
            reason = Finish("stop" if rest.is_stopped else "length")
            return self._finish(row.request_id, token, piece.text + rest.text, reason)
        return TokenEvent(row.request_id, (token,), piece.text)

    def _finish(self, request_id: bytes, token: int, text: str, finish: Finish) -> TokenEvent:
        self._forget(request_id)
        return TokenEvent(request_id, (token,), text, finish)


def _failed(request_id: bytes, refusal: Refusal) -> TokenEvent:
    return TokenEvent(request_id, (), "", Finish("failed", refusal))
