"""Settings: the file, the environment over it, places written out, and each refusal."""

from pathlib import Path

import pytest

from attribution.errors import Rejected
from cluster.config import Settings, child_environment, load_settings, private_dir

CONFIGS = Path(__file__).parents[2] / "configs"


@pytest.fixture(autouse=True)
def _no_outer_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("OPENLEDGER_CONFIG", "OPENLEDGER_HOME", "OPENLEDGER_RUN_DIR"):
        monkeypatch.delenv(name, raising=False)


def test_the_laptop_file_is_complete() -> None:
    """Every setting stands in the file with its comment, so nobody has to read the code to find one."""
    import yaml

    values = yaml.safe_load((CONFIGS / "laptop.yaml").read_text())
    for name, field in Settings.model_fields.items():
        if name in ("config_path", "run_dir", "s3_endpoint"):
            continue  # derived, or meaningless on a laptop
        group = getattr(field.default, "model_fields", None) or getattr(
            type(field.default), "model_fields", {}
        )
        assert name in values
        assert set(group) == set(values[name] if group else ())


@pytest.mark.parametrize("name", ["laptop", "cluster"])
def test_both_files_load(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENLEDGER_HOME", str(tmp_path))
    settings = load_settings(CONFIGS / f"{name}.yaml")
    assert settings.home == tmp_path
    assert "{" not in settings.model_dump_json().replace('{"', "").replace(":{", "")
    assert settings.chain.withdrawal_delay_s > settings.chain.batch_max_age_s


def test_the_environment_wins_over_the_file(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("OPENLEDGER_CHAIN__RPC_URL", "http://elsewhere:8545")
    monkeypatch.setenv("OPENLEDGER_CONFIG", str(CONFIGS / "laptop.yaml"))
    settings = load_settings()
    assert settings.chain.rpc_url == "http://elsewhere:8545"
    assert settings.chain.batch_max_age_s == 20  # the file's
    assert child_environment(settings)["OPENLEDGER_CONFIG"] == str(CONFIGS / "laptop.yaml")


def test_a_child_loads_the_same_settings(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    settings = Settings(home=tmp_path / "home", config_path=CONFIGS / "laptop.yaml")
    for name, value in child_environment(settings).items():
        monkeypatch.setenv(name, value)
    child = load_settings()
    assert (child.home, child.run_dir, child.database_url) == (
        settings.home,
        settings.run_dir,
        settings.database_url,
    )


def test_places_are_absolute_and_sockets_short(tmp_path: Path) -> None:
    deep = tmp_path / ("very-long-name" * 10)
    settings = Settings(home=deep)
    assert settings.database_url == f"sqlite:///{deep}/openledger.db"
    assert len(settings.chain.signer_socket) < 100


@pytest.mark.parametrize(
    ("text", "code", "word"),
    [
        ("chain: {rpc: x}", "config_value", "chain.rpc"),
        ("gateway_port: many", "config_value", "gateway_port"),
        ("split_ppm: {platform: 1}", "config_value", "950001 ppm"),
        ("a: [", "config_yaml", "while parsing"),
        ("[1, 2]", "config_yaml", "expected a mapping"),
    ],
)
def test_a_wrong_value_is_refused_by_name(text: str, code: str, word: str, tmp_path: Path) -> None:
    file = tmp_path / "wrong.yaml"
    file.write_text(text)
    with pytest.raises(Rejected) as refusal:
        load_settings(file)
    assert refusal.value.code == code
    assert word in refusal.value.message


def test_a_missing_file_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENLEDGER_CONFIG", str(tmp_path / "nowhere.yaml"))
    with pytest.raises(Rejected, match="nowhere"):
        load_settings()


def test_a_directory_others_can_enter_is_refused(tmp_path: Path) -> None:
    shared = tmp_path / "shared"
    shared.mkdir(mode=0o755)
    with pytest.raises(Rejected, match="755"):
        private_dir(shared)
    assert private_dir(tmp_path / "own").stat().st_mode & 0o777 == 0o700
