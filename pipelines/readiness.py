"""Which adapters a period can pay, and why the others wait.

An adapter is ready when it has an index, when its sum covers enough requests of enough payers (or the
labelled test setting lets a small one pass), when every transcript opens, and when its fees are worth the
replay or old enough (``method.py``). Whatever is not ready is carried and listed: its receipts are paid,
once, by a later period."""

from dataclasses import dataclass

from sqlalchemy.orm import Session

from attribution.errors import Corrupted, Rejected
from attribution.fixed_point import fraction_bits
from attribution.gradients import Example
from attribution.index import Index
from attribution.types import Manifest
from cluster.config import PeriodSettings
from cluster.indexes import stored_index, stored_manifest
from cluster.receipts import transcripts_of
from cluster.storage import Storage
from cluster.tables import AdapterRow
from cluster.transcripts import open_sealed
from pipelines.answer_sums import Answer, Chunk, chunks_of
from pipelines.method import Choice, Means, expected_replay_s, method_for
from pipelines.outstanding import Outstanding

TRANSCRIPTS_AT_ONCE = 200
SMALL = "; test setting: fewer requests or payers than the privacy rule asks for"


@dataclass(frozen=True, slots=True)
class Carried:
    """An adapter that waits for a later period: a stable code and a sentence."""

    adapter_id: bytes
    fee_gwei: int
    code: str
    reason: str


@dataclass(frozen=True, slots=True)
class Closable:
    """An adapter that can be closed now, as the rows have it. ``label`` ends the method's line on the
    statement."""

    outstanding: Outstanding
    owner_id: bytes
    index_id: bytes
    trajectory: str
    manifest_ids: tuple[bytes, ...]
    bits: int
    chunks: tuple[Chunk, ...]
    label: str


@dataclass(frozen=True, slots=True)
class Ready:
    """The same with its files, and by which means it is to be closed."""

    closable: Closable
    choice: Choice
    index: Index
    manifests: tuple[Manifest, ...]


def prepare(
    session: Session, transcript_key: bytes, due: Outstanding, rule: PeriodSettings
) -> Closable | Carried:
    """All of the rows that closing one adapter needs, or why it must wait."""

    def wait(code: str, reason: str) -> Carried:
        return Carried(due.adapter_id, due.fee_gwei, code, reason)

    row = session.get(AdapterRow, due.adapter_id.hex())
    if row is None or row.index_id is None:
        return wait("no_index", "the adapter has no index yet")
    requests, payers = len(due.dues), due.num_payers
    is_small = requests < rule.min_requests or payers < rule.min_payers
    if is_small and not rule.allow_small:
        return wait(
            "too_few",
            f"{requests} requests of {payers} payers; privacy asks for {rule.min_requests} of "
            f"{rule.min_payers}",
        )
    opened, answers = _open_answers(session, transcript_key, due)
    if opened < requests:
        return wait("no_transcript", f"{requests - opened} of {requests} transcripts are missing")
    index_id = bytes.fromhex(row.index_id)
    bits = fraction_bits(due.fee_gwei)
    return Closable(
        due,
        bytes.fromhex(row.owner_id),
        index_id,
        row.trajectory,
        tuple(bytes.fromhex(one) for one in row.manifest_ids.split(",") if one),
        bits,
        tuple(chunks_of(index_id, bits, answers)),
        SMALL if is_small else "",
    )


def open_files(storage: Storage, closable: Closable, rule: PeriodSettings, now: int) -> Ready | Carried:
    """Outside any transaction: storage may be far away."""
    due = closable.outstanding
    choice = _choose(storage, closable.trajectory, due, rule, now)
    if choice.means is Means.WAIT:
        return Carried(due.adapter_id, due.fee_gwei, "not_worth_a_replay", choice.reason)
    manifests = tuple(stored_manifest(storage, one) for one in closable.manifest_ids)
    return Ready(closable, choice, stored_index(storage, closable.index_id), manifests)


def _choose(storage: Storage, trajectory: str, due: Outstanding, rule: PeriodSettings, now: int) -> Choice:
    try:
        replay_s = expected_replay_s(storage, trajectory)
    except (Rejected, Corrupted) as refusal:
        return Choice(Means.CHEAP, f"no replay: {refusal.code}")
    return method_for(due.fee_gwei, replay_s, now - due.oldest_s, rule)


def _open_answers(session: Session, key: bytes, due: Outstanding) -> tuple[int, list[Answer]]:
    """How many transcripts opened, and their answers. An answer without a token has no gradient: what was
    paid for it counts for nobody's records."""
    owed = {one.receipt.receipt_id: one for one in due.dues}
    ids, opened, answers = list(owed), 0, []
    for at in range(0, len(ids), TRANSCRIPTS_AT_ONCE):
        for stored in transcripts_of(session, ids[at : at + TRANSCRIPTS_AT_ONCE]):
            text = open_sealed(key, stored.ciphertext, stored.receipt.request_id)
            opened += 1
            if text.answer_ids:
                example, one = Example(text.prompt_ids, text.answer_ids), owed[stored.receipt.receipt_id]
                answers.append(Answer(stored.receipt.receipt_id, example, one.fee_gwei, one.blend))
    return opened, answers
