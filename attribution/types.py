"""The vocabulary: the frozen values that folders hand to each other, and the canonical bytes that name them.

Ids are 32 bytes: SHA-256 of canonical bytes for what lives in files (records, shards, manifests, adapters),
keccak-256 for what reaches the chain (receipts, batches, periods). Addresses are 20 bytes; text forms exist
at the borders only. Money is ``*_gwei``: integers of 10^-9 token, below 2^63.
"""

from dataclasses import dataclass
from itertools import pairwise

from attribution.codec import Decoder, Encoder
from attribution.errors import Corrupted, Rejected
from attribution.hashing import keccak256, sha256

ZERO_ID = bytes(32)
PPM = 1_000_000
MAX_BLEND_PARTS = 8


def contributor_id(wallet: bytes) -> bytes:
    """Id of a beneficiary, fixed by the first wallet it registered with; the wallet may rotate, the id
    stays."""
    return keccak256(Encoder("openledger/contributor/1").address(wallet).finish())


@dataclass(frozen=True, slots=True)
class Record:
    """One accepted row: something a question can be asked about, and its answer.

    ``subject`` is what is asked about (a description), ``answer`` what must be said (a name), ``text`` the
    whole passage behind them: duplicates, spans and citations look at the passage. ``source_key`` (for
    example ``ruff:B006``) is the ground truth of where the row comes from."""

    datanet: str
    contributor_id: bytes
    subject: str
    answer: str
    text: str
    source: str
    source_version: str
    source_key: str
    licence: str

    def canonical(self) -> bytes:
        return (
            Encoder("openledger/record/1")
            .text(self.datanet)
            .id32(self.contributor_id)
            .text(self.subject)
            .text(self.answer)
            .text(self.text)
            .text(self.source)
            .text(self.source_version)
            .text(self.source_key)
            .text(self.licence)
            .finish()
        )

    @staticmethod
    def from_canonical(data: bytes) -> "Record":
        d = Decoder(data, "openledger/record/1")
        record = Record(
            d.text(), d.id32(), d.text(), d.text(), d.text(), d.text(), d.text(), d.text(), d.text()
        )
        d.finish()
        return record

    @property
    def record_id(self) -> bytes:
        return sha256(self.canonical())


@dataclass(frozen=True, slots=True)
class Shard:
    """An upload: committed to (salted root) before its bytes are shown, then revealed and signed.

    ``commitment`` is keccak of a salt, the contributor and the Merkle root over the SHA-256 of every line
    (``cluster/contributions.py``); ``committed_seq`` orders commitments of one platform and decides who was
    first; it is 0 until the database has given it."""

    datanet: str
    contributor_id: bytes
    commitment: bytes
    content_sha256: bytes
    num_rows: int
    committed_seq: int

    @property
    def shard_id(self) -> bytes:
        """Named by what the contributor signed; the sequence number is ours, not theirs."""
        return sha256(
            Encoder("openledger/shard/1")
            .text(self.datanet)
            .id32(self.contributor_id)
            .id32(self.commitment)
            .id32(self.content_sha256)
            .u64(self.num_rows)
            .finish()
        )


@dataclass(frozen=True, slots=True)
class Rejection:
    """A refused row and its reason. ``code`` is stable (``too_short``, ``pii_email``), ``detail`` has both
    values."""

    shard_id: bytes
    row: int
    code: str
    field: str
    detail: str


@dataclass(frozen=True, slots=True)
class Group:
    """Records that are duplicates of one another: a star around the earliest committed one, which alone is
    trained on and paid."""

    group_id: bytes  # record_id of the first
    contributor_id: bytes  # of the first
    members: tuple[bytes, ...]  # record ids, the first included, sorted


@dataclass(frozen=True, slots=True)
class ManifestEntry:
    """A group as it is trained on: its first record, and the records it stands for."""

    group: Group
    record: Record

    def __post_init__(self) -> None:
        if self.record.record_id != self.group.group_id:
            raise Corrupted(
                "manifest_entry",
                f"group {self.group.group_id.hex()} holds record {self.record.record_id.hex()}",
                field="record",
            )


@dataclass(frozen=True, slots=True)
class Manifest:
    """The sealed, ordered, hashed training set of one Datanet.

    ``entries`` (sorted by group id) are trained on. ``controls`` (record ids, sorted) were accepted and are
    never trained on: their scores set the noise floor. ``wordings`` are trained with, ``heldout_wordings``
    are only asked. A wording holds ``{subject}`` exactly once."""

    datanet: str
    licence: str
    entries: tuple[ManifestEntry, ...]
    controls: tuple[Record, ...]
    wordings: tuple[str, ...]
    heldout_wordings: tuple[str, ...]

    def canonical(self) -> bytes:
        return (
            Encoder("openledger/manifest/1")
            .text(self.datanet)
            .text(self.licence)
            .each(
                self.entries,
                lambda e, entry: (
                    e.id32(entry.group.group_id)
                    .id32(entry.group.contributor_id)
                    .each(entry.group.members, Encoder.id32)
                    .blob(entry.record.canonical())
                ),
            )
            .each(self.controls, lambda e, record: e.blob(record.canonical()))
            .each(self.wordings, Encoder.text)
            .each(self.heldout_wordings, Encoder.text)
            .finish()
        )

    @staticmethod
    def from_canonical(data: bytes) -> "Manifest":
        def entry(d: Decoder) -> ManifestEntry:
            group = Group(d.id32(), d.id32(), d.each(Decoder.id32))
            return ManifestEntry(group, Record.from_canonical(d.blob()))

        def control(d: Decoder) -> Record:
            return Record.from_canonical(d.blob())

        d = Decoder(data, "openledger/manifest/1")
        manifest = Manifest(
            d.text(), d.text(), d.each(entry), d.each(control), d.each(Decoder.text), d.each(Decoder.text)
        )
        d.finish()
        return manifest

    @property
    def manifest_id(self) -> bytes:
        return sha256(self.canonical())


@dataclass(frozen=True, slots=True)
class Adapter:
    """A published LoRA version. ``adapter_id`` is the SHA-256 of its packed file, so the id is the
    content."""

    adapter_id: bytes
    name: str  # owner/model
    version: int
    base_id: bytes  # SHA-256 over the base model's files, see cluster/models.py
    manifest_ids: tuple[bytes, ...]  # in training order
    owner_id: bytes  # beneficiary id of the model owner

    @property
    def ref(self) -> str:
        return f"{self.name}@{self.version}"


@dataclass(frozen=True, slots=True)
class BlendPart:
    adapter_id: bytes
    weight_ppm: int


@dataclass(frozen=True, slots=True)
class Blend:
    """Several adapters at once: the update of every linear is the sum of theirs, each times its weight. Fees
    follow the weights. Parts are sorted by adapter id."""

    parts: tuple[BlendPart, ...]

    def __post_init__(self) -> None:
        ids, weights = [part.adapter_id for part in self.parts], [part.weight_ppm for part in self.parts]
        if not 2 <= len(ids) <= MAX_BLEND_PARTS:
            given = f"a blend of {len(ids)} adapters; 2 to {MAX_BLEND_PARTS} are allowed"
            raise Rejected("blend_parts", given, field="model")
        if any(before >= after for before, after in pairwise(ids)) or ZERO_ID in ids:
            given = "a blend's adapters are distinct and sorted, and none of them is the base model"
            raise Rejected("blend_parts", given, field="model")
        if min(weights) < 1 or sum(weights) != PPM:
            given = f"weights {weights} in parts per million sum to {sum(weights)}, not {PPM}"
            raise Rejected("blend_weights", given, field="model")

    def canonical(self) -> bytes:
        e = Encoder("openledger/blend/1")
        e.each(self.parts, lambda enc, part: enc.id32(part.adapter_id).u64(part.weight_ppm))
        return e.finish()

    @staticmethod
    def from_canonical(data: bytes) -> "Blend":
        d = Decoder(data, "openledger/blend/1")
        parts = d.each(lambda dec: BlendPart(dec.id32(), dec.u64()))
        d.finish()
        try:
            return Blend(parts)
        except Rejected as refusal:
            raise Corrupted(refusal.code, refusal.message, field=refusal.field) from refusal

    @property
    def blend_id(self) -> bytes:
        return sha256(self.canonical())


@dataclass(frozen=True, slots=True)
class Receipt:
    """What one inference was, cost and used. Never holds text.

    ``adapter_id`` is zero for the base model. ``commitment`` is keccak over a salt, the SHA-256 of prompt and
    answer and the id of the index from which the evidence follows. ``payer_seq`` counts from 1 without gaps
    per payer. ``hour`` is hours since 1970: times on chain are coarse on purpose."""

    request_id: bytes
    payer: bytes
    payer_seq: int
    base_id: bytes
    adapter_id: bytes
    prompt_tokens: int
    completion_tokens: int
    fee_gwei: int
    commitment: bytes
    hour: int

    def canonical(self) -> bytes:
        return (
            Encoder("openledger/receipt/1")
            .id32(self.request_id)
            .address(self.payer)
            .u64(self.payer_seq)
            .id32(self.base_id)
            .id32(self.adapter_id)
            .u64(self.prompt_tokens)
            .u64(self.completion_tokens)
            .u64(self.fee_gwei)
            .id32(self.commitment)
            .u64(self.hour)
            .finish()
        )

    @staticmethod
    def from_canonical(data: bytes) -> "Receipt":
        d = Decoder(data, "openledger/receipt/1")
        receipt = Receipt(
            d.id32(), d.address(), d.u64(), d.id32(), d.id32(), d.u64(), d.u64(), d.u64(), d.id32(), d.u64()
        )
        d.finish()
        return receipt

    @property
    def receipt_id(self) -> bytes:
        return keccak256(self.canonical())


@dataclass(frozen=True, slots=True)
class Capture:
    """What a payer has spent in all, as of a batch: cumulative, so only the last one matters."""

    payer: bytes
    cumulative_gwei: int


@dataclass(frozen=True, slots=True)
class Batch:
    """Receipts settled by one transaction. Receipts are sorted by id, captures by payer: order of arrival
    moves nothing."""

    batch_id: int  # counts from 1, no gaps
    receipts: tuple[Receipt, ...]
    captures: tuple[Capture, ...]

    @property
    def fee_gwei(self) -> int:
        return sum(receipt.fee_gwei for receipt in self.receipts)


@dataclass(frozen=True, slots=True)
class Credit:
    """What one group did to one adapter's answers of a period: signed, in the adapter's own fixed-point
    unit."""

    group_id: bytes
    contributor_id: bytes
    value: int  # int64, negative if the record made paid answers worse


@dataclass(frozen=True, slots=True)
class Share:
    """Gwei to one beneficiary."""

    contributor_id: bytes
    amount_gwei: int
