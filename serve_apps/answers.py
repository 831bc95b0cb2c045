"""What was ordered and what came back: the values between routes and sessions.

An answer has one choice or several (``n``). They share prompt, price, receipt and charge; each is a
generation of its own, with a seed that depends on the order's seed and the choice's number alone.
Embeddings are an answer too: one choice for each input, base64 for its text, and no token."""

from dataclasses import dataclass, replace

from attribution.codec import Encoder
from attribution.hashing import sha256
from attribution.types import Receipt
from cluster.accounts import Account
from serve_apps.catalog import ServedModel
from serve_apps.engine.types import EngineRequest, SamplingParams, TokenLogprob, within

MAX_CHOICES = 128
MAX_INPUTS = 2048


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
    num_choices: int = 1
    num_public: int = 0  # tokens of the prompt that were published with the adapter
    inputs: tuple[tuple[int, ...], ...] = ()  # what is embedded, one for each choice; together ``prompt_ids``

    def __post_init__(self) -> None:
        if self.inputs:
            within("input", len(self.inputs), 1, MAX_INPUTS)
            assert self.num_choices == len(self.inputs)
        else:
            within("n", self.num_choices, 1, MAX_CHOICES)

    def cost_gwei(self, completion_tokens: int) -> int:
        """The prompt is paid once, every token of every choice is."""
        return (len(self.prompt_ids) + completion_tokens) * self.model.price_gwei_per_token

    @property
    def max_gwei(self) -> int:
        return self.cost_gwei(0 if self.inputs else self.num_choices * self.sampling.max_tokens)

    def engine_request(self, request_id: bytes, choice: int) -> EngineRequest:
        """The generation of one choice; the first has the very id and seed of the order."""
        seed = self.sampling.seed
        if choice:
            key = Encoder("openledger/choice/1").id32(request_id).u64(choice).finish()
            seeded = Encoder("openledger/choice-seed/1").i64(seed).u64(choice).finish()
            request_id, seed = sha256(key), int.from_bytes(sha256(seeded)[:8], "big", signed=True)
        return EngineRequest(
            request_id=request_id,
            owner="",  # the pool's to fill in
            tenant=self.account.account_id,
            prompt_ids=self.inputs[choice] if self.inputs else self.prompt_ids,
            sampling=replace(self.sampling, seed=seed),
            adapter_id=self.model.adapter_id,
            blend=self.model.blend,
            is_embedding=bool(self.inputs),
            num_public=self.num_public,
        )


@dataclass(frozen=True, slots=True)
class Piece:
    """Some more of one choice."""

    choice: int
    text: str
    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprob, ...] = ()


@dataclass(frozen=True, slots=True)
class Choice:
    """One choice at its end. A repeated answer has no logprobs: they are not kept."""

    text: str
    finish_reason: str
    token_ids: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprob, ...] | None = None


@dataclass(frozen=True, slots=True)
class Settled:
    """The end of an answer whose receipt is durable. What a repeated Idempotency-Key gets, too."""

    receipt: Receipt
    model_ref: str
    choices: tuple[Choice, ...]
    prompt_sha256: str
    answer_sha256: str
    index_id: str
    created_at: int


def gather(pieces: list[Piece], finish_reasons: list[str]) -> tuple[Choice, ...]:
    """The choices that ``pieces``, in the order in which they came, make up."""
    parts: list[list[Piece]] = [[] for _ in finish_reasons]
    for piece in pieces:
        parts[piece.choice].append(piece)
    return tuple(
        Choice(
            text="".join(piece.text for piece in own),
            finish_reason=reason,
            token_ids=tuple(token for piece in own for token in piece.token_ids),
            logprobs=tuple(told for piece in own for told in piece.logprobs),
        )
        for own, reason in zip(parts, finish_reasons, strict=True)
    )
