"""One paid answer: reserve the most it can cost, stream, capture what it did cost, and only then end.

The money follows the answer on a task of its own, which no disconnecting client can interrupt: a client that
leaves pays for the tokens that were sent, one whose worker dies pays nothing, and a gateway that dies leaves
a reservation whose lease ends. Transactions run on a thread, grouped, and never span an await."""

import asyncio
import contextlib
import json
import logging
import secrets
import time
from collections import Counter
from collections.abc import AsyncGenerator, Callable, Coroutine
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import TypeVar

from sqlalchemy import Engine
from sqlalchemy.orm import Session

from attribution.commitment import answer_commitment, answer_sha256
from attribution.errors import Refusal, Rejected, Unavailable
from attribution.types import Receipt
from cluster import charges, receipts
from cluster.charges import Charge, ReceiptDraft, SealedTranscript
from cluster.database import reading
from cluster.group_commit import GroupCommit
from cluster.transcripts import Transcript, open_sealed, seal
from serve_apps.answers import Choice, Order, Piece, Settled, gather
from serve_apps.worker_pool import WorkerPool

log = logging.getLogger(__name__)
T = TypeVar("T")

CHOICES_AT_ONCE = 8  # of one answer: more wait here, so that one request does not fill the engine's queue


@dataclass(frozen=True, slots=True)
class _Kept:
    """What is kept beside a charge to repeat the answer's end: hashes, never text."""

    model_ref: str
    finish_reasons: tuple[str, ...]  # of each choice
    attributed: int  # the choice that is attributed; the texts of the others follow it in the transcript
    prompt_sha256: str
    answer_sha256: str
    index_id: str
    created_at: int

    def settled(self, receipt: Receipt, choices: tuple[Choice, ...]) -> Settled:
        return Settled(
            receipt=receipt,
            model_ref=self.model_ref,
            choices=choices,
            prompt_sha256=self.prompt_sha256,
            answer_sha256=self.answer_sha256,
            index_id=self.index_id,
            created_at=self.created_at,
        )


@dataclass(frozen=True, slots=True)
class _Last:
    """How a generation ended: one of the two."""

    settled: Settled | None = None
    refusal: Refusal | None = None


@dataclass(slots=True, eq=False)
class _Run:
    """An answer under way. ``num_sent`` tokens of each choice were handed to the client, ``made`` is what the
    engine gave, in order of arrival."""

    order: Order
    charge: Charge
    items: "asyncio.Queue[Piece | _Last]" = field(default_factory=asyncio.Queue)
    is_gone: asyncio.Event = field(default_factory=asyncio.Event)
    made: list[Piece] = field(default_factory=list)
    num_sent: Counter[int] = field(default_factory=Counter)
    finish_reasons: dict[int, str] = field(default_factory=dict)  # of the choices that are over

    @property
    def is_over(self) -> bool:
        return len(self.finish_reasons) == self.order.num_choices

    def sent(self) -> tuple[list[Piece], list[str]]:
        """What the client was handed, and how each choice ended for it."""
        left, pieces, is_cut = Counter(self.num_sent), list[Piece](), set[int]()
        for piece in self.made:
            if left[piece.choice] > 0:
                pieces.append(piece)
                left[piece.choice] -= len(piece.token_ids)
            else:
                is_cut.add(piece.choice)
        return pieces, [
            "cancelled" if number in is_cut else self.finish_reasons.get(number, "cancelled")
            for number in range(self.order.num_choices)
        ]


@dataclass(frozen=True, slots=True)
class Terms:
    """How answers are paid here. ``transcript_key`` encrypts what attribution needs to read later."""

    lease_s: int
    transcript_key: bytes
    clock: Callable[[], float] = time.time


class Sessions:
    """Lives on the gateway's event loop."""

    def __init__(self, database: Engine, pool: WorkerPool, terms: Terms) -> None:
        self._database = database
        self._writer = GroupCommit(database)
        self._pool = pool
        self._terms = terms
        self._tasks: set[asyncio.Task[None]] = set()

    @property
    def num_open(self) -> int:
        return len(self._tasks)

    async def reserve(self, order: Order) -> Charge:
        """Set aside the most that ``order`` can cost.

        Raises:
            Rejected: 402 without credit, 422 for a key used with another body, 409 while the first request
                with this key is still running.
        """
        charge = await self._write(partial(self._reserve, order))
        if not charge.is_new and charge.state == "reserved":
            raise Rejected(
                "request_in_progress",
                f"the first request with this Idempotency-Key, {charge.request_id.hex()}, is still running",
                field="idempotency-key",
                http_status=409,
            )
        return charge

    async def answer(self, order: Order, charge: Charge) -> AsyncGenerator[Piece | Settled, None]:
        """The answer piece by piece; ``Settled`` is last, and its receipt and charge are committed by then.

        Closing the iterator early means that the client is gone.

        Raises:
            Refusal: generation or settlement failed; nothing is charged unless the answer was captured.
        """
        if not charge.is_new:
            for repeated in await asyncio.to_thread(self._repeat, charge):
                yield repeated
            return
        run = _Run(order, charge)
        self._spawn(self._produce(run))
        try:
            while True:
                item = await run.items.get()
                if isinstance(item, _Last):
                    if item.refusal is not None:
                        raise item.refusal
                    assert item.settled is not None
                    yield item.settled
                    return
                if order.is_streamed:  # else nothing is sent before the end
                    run.num_sent[item.choice] += len(item.token_ids)
                yield item
        finally:
            run.is_gone.set()

    async def close(self) -> None:
        """Wait for the settlements under way."""
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await asyncio.to_thread(self._writer.close)

    def _spawn(self, work: Coroutine[None, None, None]) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _produce(self, run: _Run) -> None:
        """Generate until done, failed, out of lease or left alone; then settle. Never raises."""
        pumping = asyncio.ensure_future(self._pump(run))
        renewing = asyncio.ensure_future(self._renew(run))
        leaving = asyncio.ensure_future(run.is_gone.wait())
        work = (pumping, renewing, leaving)
        await asyncio.wait(work, return_when=asyncio.FIRST_COMPLETED)
        for task in work:
            task.cancel()
        results = await asyncio.gather(pumping, renewing, return_exceptions=True)
        failure = next((r for r in results if isinstance(r, Exception)), None)
        try:
            run.items.put_nowait(await self._settle(run, failure))
        except Refusal as refusal:
            log.error("request %s is not settled: %s", run.charge.request_id.hex(), refusal.message)
            run.items.put_nowait(_Last(refusal=refusal))

    async def _pump(self, run: _Run) -> None:
        """All choices, some at a time; the first that fails ends the others."""
        turnstile = asyncio.Semaphore(CHOICES_AT_ONCE)
        try:
            async with asyncio.TaskGroup() as group:
                for choice in range(run.order.num_choices):
                    group.create_task(self._pump_choice(run, choice, turnstile))
        except BaseExceptionGroup as failed:
            raise failed.exceptions[0] from failed

    async def _pump_choice(self, run: _Run, choice: int, turnstile: asyncio.Semaphore) -> None:
        request = run.order.engine_request(run.charge.request_id, choice)
        async with turnstile, contextlib.aclosing(self._pool.generate(request)) as events:
            async for event in events:
                piece = Piece(choice, event.text, event.token_ids, event.logprobs)
                run.made.append(piece)
                if event.finish is not None:
                    run.finish_reasons[choice] = event.finish.reason
                run.items.put_nowait(piece)

    async def _renew(self, run: _Run) -> None:
        while True:
            await asyncio.sleep(self._terms.lease_s / 3)
            await self._write(partial(self._renewal, run.charge.request_id))

    async def _settle(self, run: _Run, failure: BaseException | None) -> "_Last":
        """Capture a finished answer, or what was sent of an abandoned one; release all else."""
        if run.is_over:
            return await self._persist(
                run, run.made, [reason for _, reason in sorted(run.finish_reasons.items())]
            )
        sent, reasons = run.sent()
        if failure is None and sent:
            return await self._persist(run, sent, reasons)
        await self._retry(partial(self._release, run.charge.request_id))
        if isinstance(failure, Refusal):
            return _Last(refusal=failure)
        if failure is not None:
            log.error("request %s failed", run.charge.request_id.hex(), exc_info=failure)
            lost = Unavailable("generation_failed", "the answer could not be generated; nothing was charged")
            return _Last(refusal=lost)
        return _Last(refusal=Unavailable("client_gone", "the client left before the first token"))

    async def _persist(self, run: _Run, pieces: list[Piece], finish_reasons: list[str]) -> "_Last":
        choices = gather(pieces, finish_reasons)
        return _Last(settled=await self._retry(partial(self._capture, run.order, run.charge, choices)))

    async def _write(self, change: Callable[[Session], T]) -> T:
        return await asyncio.wrap_future(self._writer.submit(change))

    async def _retry(self, change: Callable[[Session], T]) -> T:
        """Settlement survives a busy or restarting database for as long as the lease does; every step is
        idempotent."""
        deadline = self._terms.clock() + self._terms.lease_s * 2 / 3
        while True:
            try:
                return await self._write(change)
            except Unavailable:
                if self._terms.clock() > deadline:
                    raise
                await asyncio.sleep(0.5)

    def _now(self) -> int:
        return int(self._terms.clock())

    def _reserve(self, order: Order, session: Session) -> Charge:
        return charges.reserve(
            session,
            order.account.account_id,
            secrets.token_bytes(32),
            order.max_gwei,
            order.idempotency_key,
            order.request_sha256,
            self._terms.lease_s,
            self._now(),
        )

    def _renewal(self, request_id: bytes, session: Session) -> None:
        charges.renew(session, request_id, self._terms.lease_s, self._now())

    def _release(self, request_id: bytes, session: Session) -> None:
        charges.release(session, request_id, self._now())

    def _capture(
        self, order: Order, charge: Charge, choices: tuple[Choice, ...], session: Session
    ) -> Settled:
        kept, draft = self._draft(order, charge.request_id, choices)
        receipt = charges.capture(session, charge.request_id, draft, self._now())
        return kept.settled(receipt, choices)

    def _draft(
        self, order: Order, request_id: bytes, choices: tuple[Choice, ...]
    ) -> tuple[_Kept, ReceiptDraft]:
        answer = answer_sha256([choice.text for choice in choices])
        attributed = next((i for i, choice in enumerate(choices) if choice.token_ids), 0)
        completion_tokens = sum(len(choice.token_ids) for choice in choices)
        salt, model = secrets.token_bytes(32), order.model
        kept = _Kept(
            model_ref=model.ref,
            finish_reasons=tuple(choice.finish_reason for choice in choices),
            attributed=attributed,
            prompt_sha256=order.prompt_sha256.hex(),
            answer_sha256=answer.hex(),
            index_id=model.index_id.hex(),
            created_at=self._now(),
        )
        transcript = Transcript(
            prompt_ids=order.prompt_ids,
            answer_ids=choices[attributed].token_ids,
            prompt_text=order.prompt_text,
            answer_text=choices[attributed].text,
            other_texts=tuple(choice.text for i, choice in enumerate(choices) if i != attributed),
        )
        sealed = SealedTranscript(salt, seal(self._terms.transcript_key, transcript, request_id))
        draft = ReceiptDraft(
            base_id=model.base_id,
            adapter_id=model.adapter_id,
            prompt_tokens=len(order.prompt_ids),
            completion_tokens=completion_tokens,
            fee_gwei=order.cost_gwei(completion_tokens),
            commitment=answer_commitment(salt, order.prompt_sha256, answer, model.index_id),
            response_json=json.dumps(asdict(kept)),
            transcript=sealed if order.is_stored else None,
            evidence_state="pending" if order.is_stored and model.has_evidence else "none",
            blend=model.blend,
        )
        return kept, draft

    def _repeat(self, charge: Charge) -> list[Piece | Settled]:
        """A captured request's answer once more, from its transcript; nothing is generated or charged.

        Raises:
            Rejected: 410 when no text was kept, or no longer.
        """
        with reading(self._database) as session:
            receipt, sealed = receipts.answer_of_request(session, charge.request_id)
        if sealed is None:
            gone = f"the text of receipt {receipt.receipt_id.hex()} is not kept"
            raise Rejected("answer_not_kept", gone, field="idempotency-key", http_status=410)
        transcript = open_sealed(self._terms.transcript_key, sealed, charge.request_id)
        kept = _Kept(**json.loads(charge.response_json))
        texts = list(transcript.other_texts)
        texts.insert(kept.attributed, transcript.answer_text)
        choices = tuple(map(Choice, texts, kept.finish_reasons))
        pieces = [Piece(number, text, ()) for number, text in enumerate(texts)]
        return [*pieces, kept.settled(receipt, choices)]
