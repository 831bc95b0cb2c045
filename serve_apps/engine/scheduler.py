"""Which tokens run in the next step. Integers only: no torch, no clock, no threads.

A sequence is its known tokens and how many of them are computed. Each step gives it the next few: one when
it decodes, a chunk while its prompt (or, after a preemption, its past) is being computed. A row that reaches
its last known token samples the next one. Decoding goes first, so that a long prompt delays nobody's next
token by more than the token budget; then the prompt that has begun, then new ones as ``fair_queue.py`` has
it. So a request that is next in turn, and for which there is room, waits for the rest of one prompt at most:
``max_length / max_batch_tokens`` steps. Where room is scarce, those served most give way.

What a block holds is published as soon as a step fills it, so that a request that begins like an earlier one
of its tenant and adapter, even one of the same step, or comes back after a preemption, computes only the
rest; what was published with the adapter is found by every tenant."""

from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, field

from attribution.errors import Rejected, Unavailable
from attribution.types import ZERO_ID
from serve_apps.engine.fair_queue import INPUT_COST, OUTPUT_COST, FairQueue
from serve_apps.engine.kv_cache import BlockPool, branch_key, next_key, public_root_key, root_key
from serve_apps.engine.types import EngineRequest

PLACES_PER_PLACE_LEFT = 4  # that one tenant may take in the queue
MAX_PREEMPTIONS = 2  # of one sequence, while there is another that had fewer


@dataclass(frozen=True, slots=True)
class Limits:
    """``max_batch_tokens`` bounds one step, ``max_length`` one request (prompt and answer). A tenant, or an
    adapter among its tenant's, that others passed ``max_passed`` times in turn is next."""

    max_batch_tokens: int = 512
    max_running: int = 64
    max_waiting: int = 512
    max_length: int = 2048
    max_passed: int = 256
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
    num_charged: int = 0  # tokens whose computation the tenant was charged for, if later forgotten
    num_preempted: int = 0
    is_running: bool = False

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
    together.

    A row may begin after blocks that another row of the same step fills: in every layer a runner writes the
    keys and values of all rows before any row attends."""

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
        self._queue = FairQueue(limits.max_passed)
        self._running: list[Sequence] = []  # in order of admission
        self._by_id: dict[bytes, Sequence] = {}
        self.num_prefilled = 0  # tokens of prompts, and of the past after a preemption, that were computed
        self.num_reused = 0  # and those whose keys and values were found

    @property
    def num_waiting(self) -> int:
        return len(self._by_id) - len(self._running)

    @property
    def num_running(self) -> int:
        return len(self._running)

    def check(self, request: EngineRequest, accepted: Collection[EngineRequest] = ()) -> None:
        """Refuse at the door what could never run, or would only wait.

        A tenant may have four requests waiting for every place that it leaves to others (dynamic thresholds:
        Choudhury and Hahne, IEEE/ACM ToN 1998): alone it fills four fifths of the places.

        Args:
            accepted: what was checked and is not added yet.

        Raises:
            Rejected: ``request`` alone is longer than the context or the whole cache.
            Unavailable: the queue is full, or too full for one more of this tenant.
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
        known = list(self._by_id.values())
        waiting = [each.request for each in known if not each.is_running] + list(accepted)
        num_left = self.limits.max_running + self.limits.max_waiting - len(known) - len(accepted)
        num_own = sum(each.tenant == request.tenant for each in waiting)
        if num_own > PLACES_PER_PLACE_LEFT * (num_left - 1):
            full = f"{len(waiting)} requests are waiting, {num_own} of them yours; {num_left} places are left"
            raise Unavailable("engine_full", full)

    def add(self, request: EngineRequest) -> None:
        assert request.request_id not in self._by_id
        sequence = Sequence(request, list(request.prompt_ids))
        self._by_id[request.request_id] = sequence
        self._queue.add(request)

    def __contains__(self, request_id: bytes) -> bool:
        return request_id in self._by_id

    def remove(self, request_id: bytes) -> EngineRequest:
        """Forget a request, finished or not; its blocks are free at once."""
        sequence = self._by_id.pop(request_id)
        self.pool.free(sequence.blocks)
        if sequence.is_running:
            self._running.remove(sequence)
        else:
            self._queue.remove(sequence.request)
        return sequence.request

    def sequence(self, request_id: bytes) -> Sequence:
        return self._by_id[request_id]

    def requests_of(self, adapter_id: bytes) -> list[bytes]:
        return [key for key, sequence in self._by_id.items() if sequence.request.adapter_id == adapter_id]

    def adapters_in_turn(self) -> Iterator[bytes]:
        """What is in use, then what those who wait will want, soonest first; any of them several times."""
        yield from (sequence.request.adapter_id for sequence in self._running)
        yield from self._queue.adapters_in_turn()

    def schedule(self, is_ready: Callable[[bytes], bool]) -> StepPlan:
        """The next step; counts its tokens as computed. ``is_ready`` says whether an adapter may be used."""
        rows: dict[bytes, Row] = {}
        budget, num_running = self.limits.max_batch_tokens, len(self._running)
        for sequence in self._decoding_first():
            num_tokens = min(sequence.num_pending, budget)
            if num_tokens and sequence.is_running and self._make_room(sequence, num_tokens, rows):
                rows[sequence.request.request_id] = self._advance(sequence, num_tokens)
                budget -= num_tokens
        if budget and len(self._running) == num_running:  # after a preemption nobody new comes in
            for sequence in self._admit(is_ready):
                num_tokens = min(sequence.num_pending, budget)
                rows[sequence.request.request_id] = self._advance(sequence, num_tokens)
                budget -= num_tokens
                if not budget:
                    break
        ordered = sorted(rows.values(), key=lambda row: (len(row.token_ids) > 1, row.adapter_id))
        return StepPlan(tuple(ordered))

    def _decoding_first(self) -> list[Sequence]:
        """And of those, or of the others, the tenant served least."""
        return sorted(
            self._running, key=lambda each: (each.num_pending > 1, self._queue.served(each.request.tenant))
        )

    def _make_room(self, sequence: Sequence, num_tokens: int, planned: dict[bytes, Row]) -> bool:
        """Blocks for ``num_tokens`` more, at the cost of whoever is not in this step yet: the tenant served
        most, its latest comer. One that gave way ``MAX_PREEMPTIONS`` times does so only if all have.
        Everybody ends: the first row of a step always has room, and what it adds to an answer stays."""
        while not _grow(self.pool, sequence, num_tokens):
            others = (each for each in reversed(self._running) if each.request.request_id not in planned)
            victim = max(others, key=self._expendability)
            self._preempt(victim)
            if victim is sequence:
                return False
        return True

    def _expendability(self, sequence: Sequence) -> tuple[bool, int]:
        return sequence.num_preempted < MAX_PREEMPTIONS, self._queue.served(sequence.request.tenant)

    def _preempt(self, sequence: Sequence) -> None:
        self._drop(sequence)
        self._running.remove(sequence)
        sequence.is_running = False
        sequence.num_preempted += 1
        self._queue.put_back(sequence.request)

    def _admit(self, is_ready: Callable[[bytes], bool]) -> Iterator[Sequence]:
        """In turn, but for those whose adapter is still being loaded: others pass them."""
        if len(self._running) < self.limits.max_running:
            for request in self._queue.in_turn(is_ready):
                sequence = self._by_id[request.request_id]
                if not self._begin(sequence):
                    return  # nobody passes: a long prompt's turn comes
                yield sequence
                if len(self._running) == self.limits.max_running:
                    return

    def _begin(self, sequence: Sequence) -> bool:
        """Let a sequence in, if all it has to compute finds room."""
        self._reuse(sequence)
        if not _grow(self.pool, sequence, sequence.num_pending):
            self._drop(sequence)
            return False
        self.num_reused += sequence.num_computed
        self._queue.begin(sequence.request)
        self._running.append(sequence)
        sequence.is_running = True
        return True

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
        """Offer the blocks that are full, or will be after this step."""
        num_full = sequence.num_computed // self.pool.block_size
        if self.limits.reuses_prefixes and num_full > sequence.num_published:
            keys = self._keys(sequence, num_full)
            for index in range(sequence.num_published, num_full):
                self.pool.publish(sequence.blocks[index], keys[index])
            sequence.num_published = num_full

    def _keys(self, sequence: Sequence, num_blocks: int) -> list[bytes]:
        keys, size, request = sequence.keys, self.pool.block_size, sequence.request
        num_public = request.num_public // size  # blocks that lie wholly in what is public
        for index in range(len(keys), num_blocks):
            if index == 0 and num_public:
                parent = public_root_key(request.adapter_id)
            elif index == 0:
                parent = root_key(request.tenant, request.adapter_id)
            elif index == num_public:
                parent = branch_key(keys[-1], request.tenant)
            else:
                parent = keys[-1]
            keys.append(next_key(parent, sequence.tokens[index * size : (index + 1) * size]))
        return keys[:num_blocks]

    def _advance(self, sequence: Sequence, num_tokens: int) -> Row:
        if sequence.num_pending > 1 or not sequence.num_generated:
            self.num_prefilled += num_tokens
        start, end = sequence.num_computed, sequence.num_computed + num_tokens
        new_blocks = tuple(sequence.blocks[sequence.num_announced :])
        sequence.num_computed, sequence.num_announced = end, len(sequence.blocks)
        self._publish(sequence)
        self._charge(sequence, start, end)
        return Row(
            request_id=sequence.request.request_id,
            adapter_id=sequence.request.adapter_id,
            token_ids=tuple(sequence.tokens[start:end]),
            start=start,
            blocks=tuple(sequence.blocks),
            new_blocks=new_blocks,
            samples=end == len(sequence.tokens),
        )

    def _charge(self, sequence: Sequence, start: int, end: int) -> None:
        """For what a tenant gets: neither what was found in the cache nor what is computed again."""
        num_prompt = len(sequence.request.prompt_ids)
        num_new = max(0, min(end, num_prompt) - max(start, sequence.num_charged))
        num_sampled = int(end == len(sequence.tokens))
        self._queue.charge(sequence.request, INPUT_COST * num_new + OUTPUT_COST * num_sampled)
        sequence.num_charged = max(sequence.num_charged, end)


def _grow(pool: BlockPool, sequence: Sequence, num_tokens: int) -> bool:
    return pool.grow(sequence.blocks, sequence.num_computed + num_tokens)
