"""vLLM behind the calls of our own ``Engine``: a host on its thread drives either. The one module that knows
vLLM, which is imported only when an engine is built (the optional dependency ``gpu``).

vLLM is reported to give rows without an adapter, in a batch with others, the last adapter of the batch
(vllm #48421). Here no row is without one: a request to the base model runs under an adapter of zeros. Text,
stop strings and logprobs are cut by ``TextStream`` as for our engine. Seeded draws are vLLM's, not ours."""

import json
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from attribution.errors import Refusal, Rejected, Unavailable
from cluster.models import BaseModel, linear_shapes, load_tokenizer
from cluster.storage import Storage
from serve_apps.engine.adapter_cache import withdrawn_refusal
from serve_apps.engine.peft_files import peft_folders
from serve_apps.engine.scheduler import Limits
from serve_apps.engine.text import Decode, Piece, TextStream
from serve_apps.engine.types import (
    Bundle,
    EngineLoad,
    EngineRequest,
    Finish,
    SamplingParams,
    TokenEvent,
    TokenLogprob,
    TokenScore,
)

if TYPE_CHECKING:
    from vllm.outputs import CompletionOutput
    from vllm.v1.engine.llm_engine import LLMEngine

RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # that vLLM knows


@dataclass(frozen=True, slots=True)
class VllmConfig:
    """What vLLM may use. Each of ``max_adapters`` slots is as large as an adapter of ``max_rank``."""

    dtype: str
    kv_bytes: int
    limits: Limits
    max_adapters: int
    max_rank: int


@dataclass(slots=True, eq=False)
class _Answer:
    request: EngineRequest
    text: TextStream
    folder: "Future[Path]"  # of its adapter
    unshown: deque[TokenLogprob] = field(default_factory=deque)
    is_admitted: bool = False

    def shown(self, piece: Piece) -> tuple[TokenLogprob, ...]:
        return tuple(self.unshown.popleft() for _ in range(piece.num_begun if self.unshown else 0))


class VllmEngine:
    """``submit`` and ``cancel`` from any thread, ``step`` from one."""

    def __init__(
        self,
        vllm: "LLMEngine",
        folder_of: Callable[[bytes], Path],
        decode: Decode,
        limits: Limits,
        vocabulary: int,
    ) -> None:
        self._vllm = vllm
        self._folder_of = folder_of
        self._decode = decode
        self._limits = limits
        self._vocabulary = vocabulary
        self._converter = ThreadPoolExecutor(1, "adapters")
        self._folders: dict[bytes, Future[Path]] = {}
        self._numbers: dict[bytes, int] = {}  # adapter → vLLM's number of it
        self._changed = threading.Condition()
        self._arrived: deque[EngineRequest] = deque()
        self._cancelled: deque[bytes] = deque()
        self._withdrawn: set[bytes] = set()
        self._answers: dict[bytes, _Answer] = {}
        self._step = 0

    def submit(self, request: EngineRequest) -> None:
        """Raises: as ``Engine.submit``, and Rejected for embeddings, which would need a vLLM of their own."""
        check(request, self._limits, self._vocabulary)
        num_waiting = self.load().num_waiting
        if num_waiting >= self._limits.max_waiting:
            raise Unavailable("engine_full", f"{num_waiting} requests are waiting already")
        with self._changed:
            self._arrived.append(request)
            self._changed.notify()

    def cancel(self, request_id: bytes) -> None:
        with self._changed:
            self._cancelled.append(request_id)
            self._changed.notify()

    def prefetch(self, adapter_id: bytes) -> None:
        """Nothing: a folder is written when a request is taken in, and loaded when vLLM wants it."""

    def withdraw(self, adapter_ids: Iterable[bytes]) -> None:
        """From the next step on, whoever uses these adapters or asks for them is refused."""
        with self._changed:
            self._withdrawn.update(adapter_ids)
            self._changed.notify()

    def wait_for_work(self, timeout_s: float) -> None:
        with self._changed:
            if not (self._arrived or self._cancelled or self._answers):
                self._changed.wait(timeout_s)

    def load(self) -> EngineLoad:
        scheduler = self._core.scheduler
        blocks = scheduler.kv_cache_manager.block_pool
        num_running = len(scheduler.running)
        return EngineLoad(
            num_running=num_running,
            num_waiting=max(0, len(self._answers) + len(self._arrived) - num_running),
            num_free_blocks=blocks.get_num_free_blocks(),
            num_blocks=blocks.num_gpu_blocks,
            num_adapters=len(self._numbers),  # asked for so far: vLLM drops and reloads by itself
            max_waiting=self._limits.max_waiting,
        )

    def step(self) -> Bundle:
        events = [*self._take_in(), *self._admit_ready()]
        if self._vllm.has_unfinished_requests():
            for output in self._vllm.step():
                request_id = bytes.fromhex(output.request_id)
                if request_id in self._answers:
                    events.append(self._advance(self._answers[request_id], output.outputs[0]))
        elif self._answers:
            with self._changed:
                self._changed.wait(0.002)  # all that is left waits for an adapter
        self._step += 1
        return Bundle(self._step, tuple(events), self.load())

    def close(self) -> None:
        self._converter.shutdown(wait=False, cancel_futures=True)
        self._vllm.engine_core.shutdown()

    @property
    def _core(self) -> Any:
        """vLLM's scheduler and model, in this process."""
        return self._vllm.engine_core.engine_core

    def _take_in(self) -> Iterator[TokenEvent]:
        with self._changed:
            arrived, cancelled = list(self._arrived), list(self._cancelled)
            withdrawn = set(self._withdrawn)
            self._arrived.clear()
            self._cancelled.clear()
        for request in arrived:
            if request.request_id in self._answers:
                repeated = f"{request.request_id.hex()} is running"
                yield _failed(request.request_id, Rejected("request_id_repeated", repeated, http_status=409))
            else:
                text = TextStream(self._decode, request.sampling.stop)
                self._answers[request.request_id] = _Answer(request, text, self._folder(request.adapter_id))
        for answer in [each for each in self._answers.values() if each.request.adapter_id in withdrawn]:
            yield self._fail(answer, withdrawn_refusal(answer.request.adapter_id))
        for request_id in cancelled:
            if request_id in self._answers:
                self._forget(request_id)
                yield TokenEvent(request_id, (), "", Finish("cancelled"))

    def _folder(self, adapter_id: bytes) -> "Future[Path]":
        found = self._folders.get(adapter_id)
        if found is None or (found.done() and found.exception() is not None):
            found = self._folders[adapter_id] = self._converter.submit(self._folder_of, adapter_id)
        return found

    def _admit_ready(self) -> Iterator[TokenEvent]:
        for answer in list(self._answers.values()):
            if not answer.is_admitted and answer.folder.done():
                try:
                    self._admit(answer, answer.folder.result())
                except Refusal as refusal:
                    yield self._fail(answer, refusal)
                except ValueError as error:  # what vLLM finds wrong with a request or an adapter
                    yield self._fail(answer, Rejected("engine_refused", str(error).split("\n")[0][:500]))

    def _admit(self, answer: _Answer, folder: Path) -> None:
        from vllm import SamplingParams as VllmSampling
        from vllm.lora.request import LoRARequest
        from vllm.sampling_params import RequestOutputKind, StructuredOutputsParams

        request = answer.request
        number = self._numbers.setdefault(request.adapter_id, len(self._numbers) + 1)
        values = sampling_values(request.sampling)
        if request.sampling.grammar:
            values["structured_outputs"] = StructuredOutputsParams(grammar=lark(request.sampling.grammar))
        self._vllm.add_request(
            request.request_id.hex(),
            {"prompt_token_ids": list(request.prompt_ids), "cache_salt": request.tenant},
            VllmSampling(**values, detokenize=False, output_kind=RequestOutputKind.DELTA),
            # The name is the content: vLLM keys its prefix cache by it.
            lora_request=LoRARequest(request.adapter_id.hex(), number, str(folder)),
        )
        answer.is_admitted = True

    def _forget(self, request_id: bytes) -> None:
        if self._answers.pop(request_id).is_admitted:
            self._vllm.abort_request([request_id.hex()])

    def _fail(self, answer: _Answer, refusal: Refusal) -> TokenEvent:
        self._forget(answer.request.request_id)
        return _failed(answer.request.request_id, refusal)

    def _advance(self, answer: _Answer, output: "CompletionOutput") -> TokenEvent:
        """What a step brought to one answer: tokens as they came, text as far as it may be shown."""
        request_id, sampling = answer.request.request_id, answer.request.sampling
        if output.finish_reason not in (None, "stop", "length"):
            return self._fail(answer, Unavailable("engine_failed", f"vLLM ended it: {output.finish_reason}"))
        tokens = tuple(output.token_ids)
        is_ended = output.finish_reason == "stop"  # by an end token, which shows nothing
        text, num_begun, is_stopped, taken = "", 0, False, 0
        for i, token in enumerate(tokens[: len(tokens) - is_ended]):
            if sampling.num_logprobs is not None and output.logprobs is not None:
                found = output.logprobs[i]
                answer.unshown.append(logprob(found, token, sampling.num_logprobs, answer.text.offset))
            piece = answer.text.push(token)
            text, num_begun, taken = text + piece.text, num_begun + piece.num_begun, i + 1
            if piece.is_stopped:
                is_stopped = True
                break
        finish: Finish | None = None
        if is_stopped:
            tokens, finish = tokens[:taken], Finish("stop")
        elif output.finish_reason is not None:
            rest = answer.text.finish()
            text, num_begun = text + rest.text, num_begun + rest.num_begun
            finish = Finish("stop" if is_ended or rest.is_stopped else "length")
        event = TokenEvent(request_id, tokens, text, finish, answer.shown(Piece(text, False, num_begun)))
        if finish is not None:
            self._forget(request_id)
        return event


def build_vllm_engine(base: BaseModel, storage: Storage, cache: Path, config: VllmConfig) -> VllmEngine:
    """An engine for ``base`` that finds adapters in ``storage`` by id and keeps PEFT's form in ``cache``."""
    tokenizer = load_tokenizer(base.path)
    return VllmEngine(
        _start(base.path, config),
        peft_folders(storage, base.base_id, linear_shapes(base.path), cache, config.max_rank),
        decode=lambda ids: str(tokenizer.decode(list(ids), skip_special_tokens=True)),
        limits=config.limits,
        vocabulary=len(tokenizer),
    )


def _start(path: Path, config: VllmConfig) -> "LLMEngine":
    """vLLM with its core in this process."""
    from vllm.config import StructuredOutputsConfig
    from vllm.engine.arg_utils import EngineArgs
    from vllm.v1.engine.llm_engine import LLMEngine
    from vllm.v1.executor import Executor

    limits = config.limits
    arguments = EngineArgs(
        model=str(path),
        dtype=config.dtype,
        max_model_len=limits.max_length,
        max_num_seqs=limits.max_running,
        max_num_batched_tokens=max(limits.max_batch_tokens, limits.max_running),
        kv_cache_memory_bytes=config.kv_bytes,
        enable_prefix_caching=limits.reuses_prefixes,
        enable_lora=True,
        max_loras=config.max_adapters,
        max_cpu_loras=4 * config.max_adapters,
        max_lora_rank=next(rank for rank in RANKS if rank >= config.max_rank),
        disable_log_stats=True,
        generation_config="vllm",
        structured_outputs_config=StructuredOutputsConfig(backend="guidance"),
    )
    whole = arguments.create_engine_config()
    return LLMEngine(whole, Executor.get_class(whole), log_stats=False, multiprocess_mode=False)


def check(request: EngineRequest, limits: Limits, vocabulary: int) -> None:
    """Raises: Rejected for what could never run; the words are those of our own engine."""
    if request.is_embedding:
        raise Rejected("embeddings_not_served", "the vLLM engine serves no embeddings", field="model")
    if request.blend is not None:
        raise Rejected("blends_not_served", "the vLLM engine serves no blends of adapters", field="model")
    if not request.prompt_ids:
        raise Rejected("prompt_empty", "the prompt has no tokens", field="prompt")
    if request.max_length > limits.max_length:
        raise Rejected(
            "context_length_exceeded",
            f"{len(request.prompt_ids)} prompt tokens and {request.sampling.max_tokens} to generate"
            f" are {request.max_length}, the limit is {limits.max_length}",
            field="max_tokens",
        )
    if not all(0 <= token < vocabulary for token in request.prompt_ids):
        raise Rejected("token_out_of_range", f"the prompt has ids beyond {vocabulary - 1}", field="prompt")
    if not all(0 <= bias.token_id < vocabulary for bias in request.sampling.logit_bias):
        raise Rejected(
            "token_out_of_range", f"logit_bias has ids beyond {vocabulary - 1}", field="logit_bias"
        )


def sampling_values(sampling: SamplingParams) -> dict[str, Any]:
    """The fields of vLLM's own sampling parameters; stop strings stay with us, the grammar goes apart."""
    return {
        "max_tokens": sampling.max_tokens,
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "top_k": sampling.top_k,
        "min_p": sampling.min_p,
        "presence_penalty": sampling.presence_penalty,
        "frequency_penalty": sampling.frequency_penalty,
        "repetition_penalty": sampling.repetition_penalty,
        "logit_bias": {bias.token_id: bias.score for bias in sampling.logit_bias} or None,
        "seed": sampling.seed,
        "ignore_eos": sampling.ignore_eos,
        "logprobs": sampling.num_logprobs,
    }


def lark(grammar: str) -> str:
    """A grammar of ``engine/grammar.py`` in the one form vLLM takes: a lone JSON schema becomes a rule."""
    if not grammar.lstrip().startswith("{"):
        return grammar
    (only,) = json.loads(grammar)["grammars"]
    return f"%llguidance {{}}\nstart: %json {json.dumps(only['json_schema'])}"


def logprob(found: Mapping[int, Any], token: int, num_top: int, text_offset: int) -> TokenLogprob:
    """vLLM's logprobs of one place, the chosen token among them, as ours."""
    ranked = sorted(found.items(), key=lambda item: item[1].rank)
    top = tuple(TokenScore(each, scored.logprob) for each, scored in ranked if scored.rank <= num_top)
    return TokenLogprob(TokenScore(token, found[token].logprob), top, text_offset)


def _failed(request_id: bytes, refusal: Refusal) -> TokenEvent:
    return TokenEvent(request_id, (), "", Finish("failed", refusal))
