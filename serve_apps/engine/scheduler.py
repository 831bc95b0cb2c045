"""Which tokens run in the next step. Integers only: no torch, no clock, no threads.

A sequence is its known tokens and how many of them are computed. Each step gives it the next few: one when
it decodes, a chunk while its prompt (or, after a preemption, its past) is being computed. A row that reaches
its last known token samples the next one. Decoding goes first, so that a long prompt delays nobody's next
token by more than the token budget. What a block holds is published when it is full, so that a request that
begins like an earlier one of its tenant, or comes back after a preemption, computes only the rest."""

from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from attribution.errors import Rejected, Unavailable
from attribution.types import ZERO_ID
from serve_apps.engine.kv_cache import BlockPool, next_key, root_key
from serve_apps.engine.types import EngineRequest


@dataclass(frozen=True, slots=True)
class Limits:
    """``max_batch_tokens`` bounds one step, ``max_length`` one request (prompt and answer)."""

    max_batch_tokens: int = 512
    max_running: int = 64
    max_waiting: int = 512
    max_length: int = 2048
    reuses_prefixes: bool = True


@dataclass(slots=True, eq=False)
class Sequence:
    """A request on its way. ``tokens[:num_computed]`` have keys and values in ``blocks``, of which the first
    ``num_announced`` have been in a row before."""

    request: EngineRequest
    tokens: list[int]
    num_computed: int = 0
    blocks: list[int] = field(default_factory=list)
    num_announced: int = 0
    keys: list[bytes] = field(default_factory=list)  # of full blocks, as far as they were needed
    num_published: int = 0

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

    @property
    def segments(self) -> list[tuple[bytes, int, int]]:
        """Adapter, first token and end of each run of tokens of one adapter; the base model has none."""
        found: list[tuple[bytes, int, int]] = []
        start = 0
        for row in self.rows:
            end = start + len(row.token_ids)
            if found and found[-1][0] == row.adapter_id and found[-1][2] == start:
                found[-1] = (row.adapter_id, found[-1][1], end)
            elif row.adapter_id != ZERO_ID:
                found.append((row.adapter_id, start, end))
            start = end
        return found


class Scheduler:
    """Owns every sequence from ``add`` to ``remove``, and their blocks."""

    def __init__(self, limits: Limits, pool: BlockPool) -> None:
        self.limits = limits
        self.pool = pool
        self._waiting: deque[Sequence] = deque()
        self._running: list[Sequence] = []  # in order of admission
        self._by_id: dict[bytes, Sequence] = {}
        self.num_prefilled = 0  # tokens of prompts, and of the past after a preemption, that were computed
        self.num_reused = 0  # and those whose keys and values were found

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
        self._publish(sequence)
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
        for sequence in self._running:
            self._publish(sequence)
        rows: dict[bytes, Row] = {}
        budget = self.limits.max_batch_tokens
        waiting_before = len(self._waiting)
        for sequence in self._decoding_first():
            if sequence.request.request_id in rows or sequence not in self._running:
                continue  # preempted while this step was being planned
            num_tokens = min(sequence.num_pending, budget)
            if num_tokens and self._make_room(sequence, num_tokens, rows):
                rows[sequence.request.request_id] = self._advance(sequence, num_tokens)
                budget -= num_tokens
        if budget and len(self._waiting) == waiting_before:  # after a preemption nobody new comes in
            for sequence in self._admit(is_ready):
                num_tokens = min(sequence.num_pending, budget)
                rows[sequence.request.request_id] = self._advance(sequence, num_tokens)
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
        self._drop(sequence)
        self._running.remove(sequence)
        self._waiting.appendleft(sequence)

    def _admit(self, is_ready: Callable[[bytes], bool]) -> Iterator[Sequence]:
        """First come, first served, but for those whose adapter is still being loaded: others pass them."""
        for sequence in list(self._waiting):
            if len(self._running) >= self.limits.max_running:
                return
            if not is_ready(sequence.request.adapter_id):
                continue
            self._reuse(sequence)
            if not _grow(self.pool, sequence, sequence.num_pending):
                self._drop(sequence)
                return  # no bypass: a long prompt's turn comes
            self.num_reused += sequence.num_computed
            self._waiting.remove(sequence)
            self._running.append(sequence)
            yield sequence

    def _drop(self, sequence: Sequence) -> None:
        """Forget what was computed."""
        self.pool.free(sequence.blocks)
        sequence.num_computed = sequence.num_announced = sequence.num_published = 0

    def _reuse(self, sequence: Sequence) -> None:
        """Begin with the published blocks of this past; at least one token is left, to sample after."""
        if self.limits.reuses_prefixes:
            keys = self._keys(sequence, (len(sequence.tokens) - 1) // self.pool.block_size)
            num_blocks = self.pool.reuse(sequence.blocks, keys)
            sequence.num_announced = sequence.num_published = num_blocks
            sequence.num_computed = num_blocks * self.pool.block_size

    def _publish(self, sequence: Sequence) -> None:
        """Offer the blocks that the last steps filled."""
        num_full = sequence.num_computed // self.pool.block_size
        if self.limits.reuses_prefixes and num_full > sequence.num_published:
            keys = self._keys(sequence, num_full)
            for index in range(sequence.num_published, num_full):
                self.pool.publish(sequence.blocks[index], keys[index])
            sequence.num_published = num_full

    def _keys(self, sequence: Sequence, num_blocks: int) -> list[bytes]:
        keys, size, request = sequence.keys, self.pool.block_size, sequence.request
        for index in range(len(keys), num_blocks):
            parent = keys[-1] if keys else root_key(request.tenant, request.adapter_id)
            keys.append(next_key(parent, sequence.tokens[index * size : (index + 1) * size]))
        return keys[:num_blocks]

    def _advance(self, sequence: Sequence, num_tokens: int) -> Row:
        if sequence.num_pending > 1 or not sequence.num_generated:
            self.num_prefilled += num_tokens
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


def _grow(pool: BlockPool, sequence: Sequence, num_tokens: int) -> bool:
    return pool.grow(sequence.blocks, sequence.num_computed + num_tokens)
