"""The door by which a LoRA adapter that PEFT saved becomes one of ours: nothing in the folder is believed.

A folder holds ``adapter_config.json`` and ``adapter_model.safetensors``; only these are opened, and only
safetensors is loaded. Rank and alpha patterns and rsLoRA are folded into the packed form. Whatever PEFT
would compute in another way (DoRA, biases, whole modules saved, bases changed by the initialisation) is
refused by the key that asks for it, and so is any key that is not known here. Which base the folder names is
a name only: its shapes must fit ours.

Source: PEFT's ``LoraConfig``, ``get_pattern_key`` and ``LoraLayer.update_layer``."""

import math
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load
from torch import Tensor

from attribution.errors import Rejected
from cluster.adapters import MAX_RANK, AdapterWeights, Factors, pack, unpack

CONFIG_FILE, WEIGHTS_FILE, PICKLE_FILE = (
    "adapter_config.json",
    "adapter_model.safetensors",
    "adapter_model.bin",
)
MAX_CONFIG_BYTES = 256 * 2**10
MAX_WEIGHTS_BYTES = 2 * 2**30
MAX_HEADER_BYTES = 4 * 2**20
MAX_QUANTIFIERS = 16  # in all patterns of one adapter
FACTOR = re.compile(r"base_model\.model\.(?P<module>[\w.]+)\.lora_(?P<factor>[AB])\.weight")
QUANTIFIER = re.compile(r"[*+?{]")

# Keys that say how an adapter was trained or found, not what it computes.
WITHOUT_EFFECT = {
    "auto_mapping",
    "base_model_name_or_path",
    "ensure_weight_tying",
    "eva_config",
    "exclude_modules",
    "fan_in_fan_out",  # the saved factors lie as in any other module
    "inference_mode",
    "layers_pattern",
    "layers_to_transform",
    "lora_dropout",
    "megatron_core",
    "peft_version",
    "qalora_group_size",
    "revision",
    "target_modules",
}
INITIALISATIONS = (True, False, "gaussian", "eva", "orthogonal")  # those that leave the base as it is


class LoraSettings(BaseModel):
    """What of ``adapter_config.json`` decides what is computed."""

    model_config = ConfigDict(frozen=True, extra="allow")

    peft_type: Literal["LORA"]
    task_type: Literal["CAUSAL_LM"] | None = None
    r: int = Field(default=8, ge=1)
    lora_alpha: float = Field(default=8, allow_inf_nan=False)
    use_rslora: bool = False
    rank_pattern: dict[str, int] = {}
    alpha_pattern: dict[str, float] = {}
    bias: str = "none"
    init_lora_weights: bool | str | None = True

    def rank(self, module: str) -> int:
        return self.rank_pattern.get(_pattern_of(self.rank_pattern, module), self.r)

    def scale(self, module: str) -> float:
        alpha = self.alpha_pattern.get(_pattern_of(self.alpha_pattern, module), self.lora_alpha)
        rank = self.rank(module)
        return alpha / (math.sqrt(rank) if self.use_rslora else rank)


def read_peft(folder: Path, base_id: bytes, linear_shapes: Mapping[str, tuple[int, int]]) -> AdapterWeights:
    """A folder that PEFT's ``save_pretrained`` wrote, as weights for this base model.

    Args:
        linear_shapes: ``(d_out, d_in)`` of the base's linear modules, from ``cluster.models.linear_shapes``.

    Raises:
        Rejected: ``adapter_folder``, ``adapter_file``, ``adapter_config``, ``adapter_feature``,
            ``adapter_pattern``, ``not_safetensors``, ``adapter_module``, ``adapter_dtype``,
            ``adapter_shape`` or ``adapter_values``.
    """
    if not folder.is_dir():
        raise Rejected(
            "adapter_folder",
            f"{folder} is no folder; an archive is not opened, unpack it first",
            field="folder",
        )
    settings = _settings(_read(folder, CONFIG_FILE, MAX_CONFIG_BYTES))
    if not (folder / WEIGHTS_FILE).exists() and (folder / PICKLE_FILE).exists():
        raise Rejected(
            "not_safetensors", f"{PICKLE_FILE} is a pickle; save it as {WEIGHTS_FILE}", field="folder"
        )
    tensors = _tensors(_read(folder, WEIGHTS_FILE, MAX_WEIGHTS_BYTES))
    factors = {module: _factors(module, pair, settings) for module, pair in sorted(_pairs(tensors).items())}
    weights = AdapterWeights(base_id, factors)
    return unpack(pack(weights), base_id, linear_shapes)  # shapes, values and ranks: checked where all are


def _read(folder: Path, name: str, max_bytes: int) -> bytes:
    path = (folder / name).resolve()
    if not path.is_relative_to(folder.resolve()):
        raise Rejected("adapter_file", f"{name} leads out of the folder, to {path}", field=name)
    if not path.is_file():
        raise Rejected("adapter_file", f"{folder} has no file {name}", field=name)
    if path.stat().st_size > max_bytes:
        raise Rejected(
            "adapter_file", f"{name} has {path.stat().st_size} bytes, at most {max_bytes}", field=name
        )
    return path.read_bytes()


def _settings(data: bytes) -> LoraSettings:
    try:
        settings = LoraSettings.model_validate_json(data)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(str(part) for part in first["loc"])
        raise Rejected(
            "adapter_config", f"{CONFIG_FILE}: {where} {first['msg']}"[:300], field=where
        ) from error
    asked = {key: value for key, value in (settings.model_extra or {}).items() if value}
    asked |= {"bias": settings.bias} if settings.bias != "none" else {}
    if settings.init_lora_weights not in (*INITIALISATIONS, None):
        asked["init_lora_weights"] = settings.init_lora_weights
    for key, value in asked.items():
        if key not in WITHOUT_EFFECT:
            raise Rejected(
                "adapter_feature", f"{key[:60]} = {str(value)[:60]} is not supported", field=key[:60]
            )
    _check_patterns([*settings.rank_pattern, *settings.alpha_pattern])
    return settings


def _check_patterns(patterns: list[str]) -> None:
    """They are a stranger's regular expressions: none that could take for ever."""
    quantifiers = 0
    for pattern in patterns:
        own = len(QUANTIFIER.findall(pattern))
        quantifiers += own
        if own > 2 or quantifiers > MAX_QUANTIFIERS or re.search(r"\)[*+?{]", pattern):
            raise Rejected(
                "adapter_pattern", f"{pattern[:100]!r} repeats too much; write names", field="rank_pattern"
            )
        try:
            re.compile(pattern)
        except (re.error, RecursionError) as error:
            raise Rejected("adapter_pattern", f"{pattern[:100]!r}: {error}", field="rank_pattern") from error


def _pattern_of(patterns: Iterable[str], module: str) -> str:
    """The first that is the module's name or its end."""
    return next((one for one in patterns if re.match(rf"(.*\.)?({one})$", module)), "")


def _tensors(data: bytes) -> dict[str, Tensor]:
    header = int.from_bytes(data[:8], "little")
    if header > MAX_HEADER_BYTES:
        raise Rejected(
            "not_safetensors", f"a header of {header} bytes, at most {MAX_HEADER_BYTES}", field=WEIGHTS_FILE
        )
    try:
        return load(data)
    except (SafetensorError, ValueError, KeyError) as error:
        raise Rejected(
            "not_safetensors", f"not a safetensors file: {error}"[:300], field=WEIGHTS_FILE
        ) from error


def _pairs(tensors: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """``A`` and ``B`` by module."""
    pairs: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        match = FACTOR.fullmatch(name)
        if match is None:
            raise Rejected(
                "adapter_module", f"{name[:120]!r} is no factor of a linear module", field=WEIGHTS_FILE
            )
        if not tensor.is_floating_point() or tensor.dim() != 2:
            found = f"{tensor.dtype} {tuple(tensor.shape)}"
            raise Rejected(
                "adapter_dtype", f"{name[:120]}: {found}, expected a matrix of floats", field=name[:120]
            )
        pairs.setdefault(match["module"], {})[match["factor"]] = tensor
    return pairs


def _factors(module: str, pair: Mapping[str, Tensor], settings: LoraSettings) -> Factors:
    if len(pair) != 2:
        raise Rejected("adapter_module", f"{module[:100]} needs both lora_A and lora_B", field=module[:100])
    a, b = pair["A"], pair["B"]
    rank = settings.rank(module)
    if not 1 <= rank <= MAX_RANK or (a.shape[0], b.shape[1]) != (rank, rank):
        raise Rejected(
            "adapter_shape",
            f"{module[:100]}: ranks {a.shape[0]} and {b.shape[1]}, configured {rank}, at most {MAX_RANK}",
            field=module[:100],
        )
    return Factors(a.bfloat16(), (b.float() * settings.scale(module)).bfloat16())
