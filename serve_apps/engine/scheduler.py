"""Which tokens run in the next step. Integers only: no torch, no clock, no threads.

A sequence is its known tokens and how many of them are computed. Each step gives it the next few: one when
it decodes, a chunk while its prompt (or, after a preemption, its past) is being computed. A row that reaches
its last known token samples the next one. Decoding goes first, so that a long prompt delays nobody's next
token by more than the token budget."""

from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from attribution.errors import Rejected, Unavailable
from serve_apps.engine.kv_cache import BlockPool
from serve_apps.engine.types import EngineRequest


@dataclass(frozen=True, slots=True)
class Limits:
    """``max_batch_tokens`` bounds one step, ``max_length`` one request (prompt and answer)."""

    max_batch_tokens: int = 512
    max_running: int = 64
    max_waiting: int = 512
    max_length: int = 2048


@dataclass(slots=True, eq=False)
class Sequence:
    """A request on its way. ``tokens[:num_computed]`` have keys and values in ``blocks``, of which the first
    ``num_announced`` have been in a row before."""

    request: EngineRequest
    tokens: list[int]
    num_computed: int = 0
    blocks: list[int] = field(default_factory=list)
    num_announced: int = 0

    @property
    def num_generated(self) -> int:
        return len(self.tokens) - len(self.request.prompt_ids)

    @property
    def num_pending(self) -> int:
        return len(self.tokens) - self.num_computed


@dataclass(frozen=True, slots=True)
class Row:
    """Tokens ``start`` to ``start + len(token_ids)`` of one request, to be computed in this step."""

    request_id: bytes
    adapter_id: bytes
    token_ids: tuple[int, ...]
    start: int
    blocks: tuple[int, ...]
    new_blocks: tuple[int, ...]  # of ``blocks``, those that another request may have used before
    samples: bool

    @property
    def end(self) -> int:
        return self.start + len(self.token_ids)


@dataclass(frozen=True, slots=True)
class StepPlan:
    """Rows of one token first, longer ones after, each part sorted by adapter: an adapter's tokens lie
    together."""

    rows: tuple[Row, ...]

    @property
    def num_single(self) -> int:
        return sum(len(row.token_ids) == 1 for row in self.rows)

    @property
    def num_tokens(self) -> int:
        return sum(len(row.token_ids) for row in self.rows)


class Scheduler:
    """Owns every sequence from ``add`` to ``remove``, and their blocks."""

    def __init__(self, limits: Limits, pool: BlockPool) -> None:
        self.limits = limits
        self.pool = pool
        self._waiting: deque[Sequence] = deque()
        self._running: list[Sequence] = []  # in order of admission
        self._by_id: dict[bytes, Sequence] = {}

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    @property
    def num_running(self) -> int:
        return len(self._running)

    def check(self, request: EngineRequest) -> None:
        """Refuse at the door what could never run, or would only wait.

        Raises:
            Rejected: ``request`` alone is longer than the context or the whole cache.
            Unavailable: the queue is full.
        """
        longest = min(self.limits.max_length, self.pool.capacity_tokens)
        if not request.prompt_ids:
            raise Rejected("prompt_empty", "the prompt has no tokens", field="prompt")
        if request.max_length > longest:
            raise Rejected(
                "context_length_exceeded",
                f"{len(request.prompt_ids)} prompt tokens and {request.sampling.max_tokens} to generate"
                f" are {request.max_length}, the limit is {longest}",
                field="max_tokens",
            )
        if len(self._waiting) >= self.limits.max_waiting:
            raise Unavailable("engine_full", f"{len(self._waiting)} requests are waiting already")

    def add(self, request: EngineRequest) -> None:
        assert request.request_id not in self._by_id
        sequence = Sequence(request, list(request.prompt_ids))
        self._by_id[request.request_id] = sequence
        self._waiting.append(sequence)

    def __contains__(self, request_id: bytes) -> bool:
        return request_id in self._by_id

    def remove(self, request_id: bytes) -> EngineRequest:
        """Forget a request, finished or not; its blocks are free at once."""
        sequence = self._by_id.pop(request_id)
        self.pool.free(sequence.blocks)
        if sequence in self._running:
            self._running.remove(sequence)
        else:
            self._waiting.remove(sequence)
        return sequence.request

    def sequence(self, request_id: bytes) -> Sequence:
        return self._by_id[request_id]

    def requests_of(self, adapter_id: bytes) -> list[bytes]:
        return [key for key, sequence in self._by_id.items() if sequence.request.adapter_id == adapter_id]

    def schedule(self, is_ready: Callable[[bytes], bool]) -> StepPlan:
        """The next step; counts its tokens as computed. ``is_ready`` says whether an adapter may be used."""
        rows: dict[bytes, Row] = {}
        budget = self.limits.max_batch_tokens
        waiting_before = len(self._waiting)
        for sequence in self._decoding_first():
            if sequence.request.request_id in rows or sequence not in self._running:
                continue  # preempted while this step was being planned
            num_tokens = min(sequence.num_pending, budget)
            if num_tokens and self._make_room(sequence, num_tokens, rows):
                rows[sequence.request.request_id] = _advance(sequence, num_tokens)
                budget -= num_tokens
        if budget and len(self._waiting) == waiting_before:  # after a preemption nobody new comes in
            for sequence in self._admit(is_ready):
                num_tokens = min(sequence.num_pending, budget)
                rows[sequence.request.request_id] = _advance(sequence, num_tokens)
                budget -= num_tokens
                if not budget:
                    break
        ordered = sorted(rows.values(), key=lambda row: (len(row.token_ids) > 1, row.adapter_id))
        return StepPlan(tuple(ordered))

    def _decoding_first(self) -> list[Sequence]:
        return sorted(self._running, key=lambda sequence: sequence.num_pending > 1)

    def _make_room(self, sequence: Sequence, num_tokens: int, planned: dict[bytes, Row]) -> bool:
        """Blocks for ``num_tokens`` more, at the cost of the latest comer that is not in this step yet."""
        while not _grow(self.pool, sequence, num_tokens):
            latest = [s for s in self._running if s.request.request_id not in planned][-1]
            self._preempt(latest)
            if latest is sequence:
                return False
        return True

    def _preempt(self, sequence: Sequence) -> None:
        self.pool.free(sequence.blocks)
        sequence.num_computed = sequence.num_announced = 0
        self._running.remove(sequence)
        self._waiting.appendleft(sequence)

    def _admit(self, is_ready: Callable[[bytes], bool]) -> Iterator[Sequence]:
        """First come, first served, but for those whose adapter is still being loaded: others pass them."""
        for sequence in list(self._waiting):
            if len(self._running) >= self.limits.max_running:
                return
            if not is_ready(sequence.request.adapter_id):
                continue
            if not _grow(self.pool, sequence, sequence.num_pending):
                return  # no bypass: a long prompt's turn comes
            self._waiting.remove(sequence)
            self._running.append(sequence)
            yield sequence


def _grow(pool: BlockPool, sequence: Sequence, num_tokens: int) -> bool:
    return pool.grow(sequence.blocks, sequence.num_computed + num_tokens)


def _advance(sequence: Sequence, num_tokens: int) -> Row:
    start, end = sequence.num_computed, sequence.num_computed + num_tokens
    new_blocks = tuple(sequence.blocks[sequence.num_announced :])
    sequence.num_computed, sequence.num_announced = end, len(sequence.blocks)
    return Row(
        request_id=sequence.request.request_id,
        adapter_id=sequence.request.adapter_id,
        token_ids=tuple(sequence.tokens[start:end]),
        start=start,
        blocks=tuple(sequence.blocks),
        new_blocks=new_blocks,
        samples=end == len(sequence.tokens),
    )
