"""What goes into the engine and what comes out: frozen values that cross threads, processes and machines.

The engine sees token ids, never keys or money; the gateway sees text and counts, never tensors."""

from dataclasses import dataclass
from typing import Literal

from attribution.errors import Refusal, Rejected
from attribution.types import ZERO_ID, Blend

FinishReason = Literal["stop", "length", "cancelled", "failed"]
MAX_LOGPROBS = 20
MAX_BIASES = 1024


@dataclass(frozen=True, slots=True)
class TokenScore:
    """A token and what is added to its logit, or the logarithm of its probability."""

    token_id: int
    score: float


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """How likely the model found one token of an answer, and what it found likelier or as likely.

    Of the model's own distribution: before temperature, penalties, biases, cuts and grammar."""

    chosen: TokenScore
    top: tuple[TokenScore, ...]  # likeliest first; need not contain the chosen one
    text_offset: int  # where in the answer's text the token begins


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How the next token is chosen. ``temperature`` 0 is greedy; ``top_k`` 0 and ``top_p`` 1 cut nothing off.

    The same ``seed`` draws the same tokens whatever else runs, restarts or is preempted: draw ``i`` is a hash
    of (seed, i), not the state of a generator."""

    max_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: tuple[TokenScore, ...] = ()
    seed: int = 0
    stop: tuple[str, ...] = ()
    ignore_eos: bool = False  # for benchmarks: every answer is max_tokens long
    num_logprobs: int | None = None  # so many alternatives beside each token's own; None: nothing at all
    grammar: str = ""  # what the answer must match, in the words of ``engine/grammar.py``; empty: anything

    def __post_init__(self) -> None:
        within("max_tokens", self.max_tokens, 1, 2**31)
        within("temperature", self.temperature, 0.0, 2.0)
        within("top_p", self.top_p, 1e-6, 1.0)
        within("top_k", self.top_k, 0, 2**31)
        within("min_p", self.min_p, 0.0, 1.0)
        within("presence_penalty", self.presence_penalty, -2.0, 2.0)
        within("frequency_penalty", self.frequency_penalty, -2.0, 2.0)
        within("repetition_penalty", self.repetition_penalty, 0.01, 100.0)
        within("logprobs", self.num_logprobs or 0, 0, MAX_LOGPROBS)
        if len(self.logit_bias) > MAX_BIASES:
            many = f"logit_bias has {len(self.logit_bias)} tokens, at most {MAX_BIASES} are allowed"
            raise Rejected("logit_bias_too_large", many, field="logit_bias")
        for bias in self.logit_bias:
            within("logit_bias", bias.score, -100.0, 100.0)
        if self.grammar and self.ignore_eos:
            never = "an answer with a grammar ends where the grammar does"
            raise Rejected("ignore_eos_with_grammar", never, field="ignore_eos")
        if len(self.stop) > 4 or any(not text or len(text) > 256 for text in self.stop):
            raise Rejected(
                "stop_invalid", "stop takes at most 4 strings of 1 to 256 characters", field="stop"
            )

    @property
    def is_plain_greedy(self) -> bool:
        """Whether the likeliest token is the answer, whatever was said before."""
        is_even = self.repetition_penalty == 1 and not (self.presence_penalty or self.frequency_penalty)
        return self.temperature == 0 and is_even and not self.logit_bias


def within(field: str, value: float, low: float, high: float) -> None:
    """Raises: Rejected unless ``low <= value <= high``; NaN is nowhere."""
    if not low <= value <= high:
        raise Rejected(
            f"{field}_out_of_range", f"{field} is {value}, allowed are {low} to {high}", field=field
        )


@dataclass(frozen=True, slots=True)
class EngineRequest:
    """One generation. ``owner`` (a gateway) may cancel it and its death does; ``tenant`` (an account) is whom
    fairness and the sharing of cached prefixes are reckoned by.

    Of a ``blend``, ``adapter_id`` is the id: all that the engine keys by an adapter it keys by that, and only
    whoever loads it looks at the parts.

    The first ``num_public`` tokens of the prompt are those of a prefix that was published with the adapter:
    what is computed of them may be found by every tenant.

    An embedding is answered at the prompt's last token: no token, and as text the ``embedding`` of the
    hidden state there."""

    request_id: bytes
    owner: str
    tenant: str
    prompt_ids: tuple[int, ...]
    sampling: SamplingParams
    adapter_id: bytes = ZERO_ID  # zero is the base model
    is_embedding: bool = False
    blend: Blend | None = None
    num_public: int = 0

    def __post_init__(self) -> None:
        assert self.blend is None or self.adapter_id == self.blend.blend_id
        assert 0 <= self.num_public <= len(self.prompt_ids)

    @property
    def max_length(self) -> int:
        return len(self.prompt_ids) + self.sampling.max_tokens


@dataclass(frozen=True, slots=True)
class Finish:
    """Why a request is over. ``refusal`` is set exactly when it failed."""

    reason: FinishReason
    refusal: Refusal | None = None

    def __post_init__(self) -> None:
        assert (self.refusal is not None) == (self.reason == "failed")


@dataclass(frozen=True, slots=True)
class TokenEvent:
    """New tokens of one request. ``text`` trails the tokens where half a character or a possible stop string
    is still open, and ``logprobs`` come with the text in which their tokens begin: tokens that show no text
    have none. After ``finish`` there is nothing more of this request."""

    request_id: bytes
    token_ids: tuple[int, ...]
    text: str
    finish: Finish | None = None
    logprobs: tuple[TokenLogprob, ...] = ()

    def then(self, later: "TokenEvent") -> "TokenEvent":
        """Both as one: how a reader that lags catches up without anybody's queue growing."""
        assert self.finish is None and later.request_id == self.request_id
        return TokenEvent(
            self.request_id,
            self.token_ids + later.token_ids,
            self.text + later.text,
            later.finish,
            self.logprobs + later.logprobs,
        )


@dataclass(frozen=True, slots=True)
class EngineLoad:
    """How busy an engine is, for placement, autoscaling and metrics."""

    num_running: int
    num_waiting: int
    num_free_blocks: int
    num_blocks: int
    num_adapters: int  # loaded
    num_prefilled: int = 0  # tokens of prompts computed so far,
    num_reused: int = 0  # and found in the cache instead
    num_leases: int = 0  # of adapters: one for every request that waits for or uses one
    max_waiting: int = 0  # 0: unlimited
    is_draining: bool = False  # finishes what it has and takes nothing more

    @property
    def queue_share(self) -> float:
        """How much of the queue is taken."""
        return self.num_waiting / self.max_waiting if self.max_waiting else 0.0

    @property
    def kv_share(self) -> float:
        """How much of the blocks for keys and values is in use."""
        return 1 - self.num_free_blocks / self.num_blocks

    @property
    def is_full(self) -> bool:
        """Whether one more request would be refused, or push another one out."""
        return self.queue_share >= 1 or self.kv_share > 0.95


@dataclass(frozen=True, slots=True)
class Bundle:
    """What one engine step brought."""

    step: int
    events: tuple[TokenEvent, ...]
    load: EngineLoad
