"""One paid answer: reserve the most it can cost, stream, capture what it did cost, and only then end.

The money follows the answer on a task of its own, which no disconnecting client can interrupt: a client that
leaves pays for the tokens that were sent, one whose worker dies pays nothing, and a gateway that dies leaves
a reservation whose lease ends. Transactions run in threads and never span an await."""

import asyncio
import contextlib
import json
import logging
import secrets
import time
from collections.abc import AsyncGenerator, Callable, Coroutine
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import TypeVar

from sqlalchemy import Engine

from attribution.commitment import answer_commitment
from attribution.errors import Refusal, Rejected, Unavailable
from attribution.hashing import sha256
from attribution.types import Receipt
from cluster import charges, receipts
from cluster.accounts import Account
from cluster.charges import Charge, ReceiptDraft, SealedTranscript
from cluster.database import reading, writing
from cluster.transcripts import Transcript, open_sealed, seal
from serve_apps.catalog import ServedModel
from serve_apps.engine.types import EngineRequest, SamplingParams
from serve_apps.worker_pool import WorkerPool

log = logging.getLogger(__name__)
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Order:
    """A request that has passed every check but credit."""

    account: Account
    model: ServedModel
    prompt_ids: tuple[int, ...]
    prompt_text: str  # what was asked, without roles and template
    prompt_sha256: bytes
    sampling: SamplingParams
    idempotency_key: str | None
    request_sha256: bytes
    is_stored: bool  # False keeps hashes only
    is_streamed: bool

    def cost_gwei(self, completion_tokens: int) -> int:
        return (len(self.prompt_ids) + completion_tokens) * self.model.price_gwei_per_token

    @property
    def max_gwei(self) -> int:
        return self.cost_gwei(self.sampling.max_tokens)


@dataclass(frozen=True, slots=True)
class Piece:
    """Some more of the answer."""

    text: str
    token_ids: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Settled:
    """The end of an answer whose receipt is durable. What a repeated Idempotency-Key gets, too."""

    receipt: Receipt
    model_ref: str
    text: str
    finish_reason: str
    prompt_sha256: str
    answer_sha256: str
    index_id: str
    created_at: int


@dataclass(frozen=True, slots=True)
class _Kept:
    """What is kept beside a charge to repeat the answer's end: hashes, never text."""

    model_ref: str
    finish_reason: str
    prompt_sha256: str
    answer_sha256: str
    index_id: str
    created_at: int


@dataclass(frozen=True, slots=True)
class _Last:
    """How a generation ended: one of the two."""

    settled: Settled | None = None
    refusal: Refusal | None = None


@dataclass(slots=True, eq=False)
class _Run:
    """A generation under way. ``sent`` is what the client was handed, ``made`` what the engine gave."""

    order: Order
    charge: Charge
    items: "asyncio.Queue[Piece | _Last]" = field(default_factory=asyncio.Queue)
    is_gone: asyncio.Event = field(default_factory=asyncio.Event)
    made: list[Piece] = field(default_factory=list)
    num_sent: int = 0
    finish_reason: str = ""


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
        charge = await asyncio.to_thread(self._reserve, order)
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
                    run.num_sent += len(item.token_ids)
                yield item
        finally:
            run.is_gone.set()

    async def close(self) -> None:
        """Wait for the settlements under way."""
        await asyncio.gather(*self._tasks, return_exceptions=True)

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
        request = EngineRequest(
            request_id=run.charge.request_id,
            owner="",  # the pool's to fill in
            tenant=run.order.account.account_id,
            prompt_ids=run.order.prompt_ids,
            sampling=run.order.sampling,
            adapter_id=run.order.model.adapter_id,
        )
        async with contextlib.aclosing(self._pool.generate(request)) as events:
            async for event in events:
                piece = Piece(event.text, event.token_ids)
                run.made.append(piece)
                if event.finish is not None:
                    run.finish_reason = event.finish.reason
                run.items.put_nowait(piece)

    async def _renew(self, run: _Run) -> None:
        while True:
            await asyncio.sleep(self._terms.lease_s / 3)
            await asyncio.to_thread(self._write_renewal, run.charge.request_id)

    async def _settle(self, run: _Run, failure: BaseException | None) -> "_Last":
        """Capture a finished answer, or what was sent of an abandoned one; release all else."""
        if run.finish_reason:
            return await self._persist(run, run.made, run.finish_reason)
        sent = _first_tokens(run.made, run.num_sent)
        if failure is None and sent:
            return await self._persist(run, sent, "cancelled")
        await self._retry(partial(self._release, run.charge.request_id))
        if isinstance(failure, Refusal):
            return _Last(refusal=failure)
        if failure is not None:
            log.error("request %s failed", run.charge.request_id.hex(), exc_info=failure)
            lost = Unavailable("generation_failed", "the answer could not be generated; nothing was charged")
            return _Last(refusal=lost)
        return _Last(refusal=Unavailable("client_gone", "the client left before the first token"))

    async def _persist(self, run: _Run, pieces: list[Piece], finish_reason: str) -> "_Last":
        return _Last(
            settled=await self._retry(partial(self._capture, run.order, run.charge, pieces, finish_reason))
        )

    async def _retry(self, work: Callable[[], T]) -> T:
        """Settlement survives a busy or restarting database for as long as the lease does; every step is
        idempotent."""
        deadline = self._terms.clock() + self._terms.lease_s * 2 / 3
        while True:
            try:
                return await asyncio.to_thread(work)
            except Unavailable:
                if self._terms.clock() > deadline:
                    raise
                await asyncio.sleep(0.5)

    def _now(self) -> int:
        return int(self._terms.clock())

    def _reserve(self, order: Order) -> Charge:
        with writing(self._database) as session:
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

    def _write_renewal(self, request_id: bytes) -> None:
        with writing(self._database) as session:
            charges.renew(session, request_id, self._terms.lease_s, self._now())

    def _release(self, request_id: bytes) -> None:
        with writing(self._database) as session:
            charges.release(session, request_id, self._now())

    def _capture(self, order: Order, charge: Charge, pieces: list[Piece], finish_reason: str) -> Settled:
        kept, draft = self._draft(order, charge.request_id, pieces, finish_reason)
        with writing(self._database) as session:
            receipt = charges.capture(session, charge.request_id, draft, self._now())
        return Settled(receipt, text=_text(pieces), **asdict(kept))

    def _draft(
        self, order: Order, request_id: bytes, pieces: list[Piece], finish_reason: str
    ) -> tuple[_Kept, ReceiptDraft]:
        text = _text(pieces)
        answer_ids = tuple(token for piece in pieces for token in piece.token_ids)
        salt, model, answer_sha256 = secrets.token_bytes(32), order.model, sha256(text.encode())
        kept = _Kept(
            model_ref=model.ref,
            finish_reason=finish_reason,
            prompt_sha256=order.prompt_sha256.hex(),
            answer_sha256=answer_sha256.hex(),
            index_id=model.index_id.hex(),
            created_at=self._now(),
        )
        transcript = Transcript(order.prompt_ids, answer_ids, order.prompt_text, text)
        sealed = SealedTranscript(salt, seal(self._terms.transcript_key, transcript, request_id))
        draft = ReceiptDraft(
            base_id=model.base_id,
            adapter_id=model.adapter_id,
            prompt_tokens=len(order.prompt_ids),
            completion_tokens=len(answer_ids),
            fee_gwei=order.cost_gwei(len(answer_ids)),
            commitment=answer_commitment(salt, order.prompt_sha256, answer_sha256, model.index_id),
            response_json=json.dumps(asdict(kept)),
            transcript=sealed if order.is_stored else None,
            evidence_state="pending" if order.is_stored and not model.is_base else "none",
        )
        return kept, draft

    def _repeat(self, charge: Charge) -> tuple[Piece, Settled]:
        """A captured request's answer once more, from its transcript; nothing is generated or charged.

        Raises:
            Rejected: 410 when no text was kept, or no longer.
        """
        with reading(self._database) as session:
            receipt = receipts.receipt_of_request(session, charge.request_id).receipt
            kept = receipts.transcripts_of(session, [receipt.receipt_id])
        if not kept:
            gone = f"the text of receipt {receipt.receipt_id.hex()} is not kept"
            raise Rejected("answer_not_kept", gone, field="idempotency-key", http_status=410)
        transcript = open_sealed(self._terms.transcript_key, kept[0].ciphertext, charge.request_id)
        settled = Settled(receipt, text=transcript.answer_text, **json.loads(charge.response_json))
        return Piece(settled.text, ()), settled


def _text(pieces: list[Piece]) -> str:
    return "".join(piece.text for piece in pieces)


def _first_tokens(pieces: list[Piece], num_tokens: int) -> list[Piece]:
    """The pieces that make up the first ``num_tokens``."""
    taken: list[Piece] = []
    for piece in pieces:
        if num_tokens <= 0:
            break
        taken.append(piece)
        num_tokens -= len(piece.token_ids)
    return taken
