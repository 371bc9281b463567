"""Settings: where values come from, and what is said about those that do not fit."""

import os
import re
from pathlib import Path

import pytest

from controller.settings import load_settings
from core.addresses import Address
from core.errors import InvalidRequest


@pytest.fixture(autouse=True)
def _clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("NANOFLEET_")]:
        monkeypatch.delenv(name)


def written(folder: Path, text: str) -> Path:
    path = folder / "controller.toml"
    path.write_text(text, encoding="utf-8")
    return path


def test_without_file_and_environment_the_defaults_hold() -> None:
    settings = load_settings(None)

    assert (settings.grpc_bind, settings.http_bind) == ("127.0.0.1:7443", "127.0.0.1:7080")
    assert (settings.heavy.mode, settings.heavy.port) == ("embedded", 8000)
    assert settings.telemetry.forward_to is None


def test_the_file_sets_values(tmp_path: Path) -> None:
    path = written(tmp_path, 'data_dir = "/srv/nf"\n[heavy]\nport = 8100\n[telemetry]\nforward_to = "127.0.0.1:4317"\n')

    settings = load_settings(path)

    assert (settings.data_dir, settings.heavy.port) == (Path("/srv/nf"), 8100)
    assert settings.telemetry.forward_to == Address("127.0.0.1", 4317)
    assert settings.blobs_dir == Path("/srv/nf/blobs")
    assert settings.database_url == "sqlite:////srv/nf/controller.sqlite"


def test_the_environment_wins_over_the_file_key_by_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NANOFLEET_HEAVY__PORT", "8200")

    settings = load_settings(written(tmp_path, "[heavy]\nport = 8100\nmax_replicas = 7\n"))

    assert (settings.heavy.port, settings.heavy.max_replicas) == (8200, 7)


@pytest.mark.parametrize(
    ("text", "key"), [("bogus = 1", "bogus"), ("[heavy]\nbogus = 1", "heavy.bogus"), ("[bogus]\nport = 1", "bogus")]
)
def test_an_unknown_key_in_the_file_is_named_with_the_file(tmp_path: Path, text: str, key: str) -> None:
    path = written(tmp_path, text)

    with pytest.raises(InvalidRequest, match=re.escape(f"{path}: {key}: unknown key")):
        load_settings(path)


@pytest.mark.parametrize("variable", ["NANOFLEET_BOGUS", "NANOFLEET_HEAVY__BOGUS", "nanofleet_bogus__port"])
def test_an_unknown_variable_is_named(monkeypatch: pytest.MonkeyPatch, variable: str) -> None:
    monkeypatch.setenv(variable, "1")

    with pytest.raises(InvalidRequest, match=f"environment variable {variable}"):
        load_settings(None)


def test_variables_of_the_other_commands_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NANOFLEET_AGENT_SITE", "hall")
    monkeypatch.setenv("NANOFLEET_CONTROLLER", "http://127.0.0.1:1")

    load_settings(None)


def test_a_bad_value_is_named_where_it_stands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = written(tmp_path, "[heavy]\nport = 0\n")
    monkeypatch.setenv("NANOFLEET_LOGS__LEVEL", "loud")

    with pytest.raises(InvalidRequest) as refused:
        load_settings(path)

    assert f"{path}: heavy.port: " in str(refused.value)
    assert "environment variable NANOFLEET_LOGS__LEVEL: logs.level: " in str(refused.value)


@pytest.mark.parametrize("name", ["grpc_bind", "http_bind"])
def test_only_loopback_may_be_bound(tmp_path: Path, name: str) -> None:
    with pytest.raises(InvalidRequest, match="expected a loopback address"):
        load_settings(written(tmp_path, f'{name} = "0.0.0.0:7443"'))


@pytest.mark.parametrize(
    "text",
    [
        '[heavy]\nmode = "url"',
        '[heavy]\nurl = "http://127.0.0.1:8000"',
        '[heavy]\nmode = "url"\nurl = "ftp://x"',
        "[heavy]\nmin_replicas = 3\nmax_replicas = 2",
        '[telemetry]\nforward_to = "collector"',
        "[registry]\npublish_memory_bytes = 1",
    ],
)
def test_contradictions_and_values_out_of_range_are_refused(tmp_path: Path, text: str) -> None:
    with pytest.raises(InvalidRequest, match="settings: "):
        load_settings(written(tmp_path, text))


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidRequest, match="No such file"):
        load_settings(tmp_path / "missing.toml")


def test_a_file_that_is_not_toml_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidRequest, match="expected TOML"):
        load_settings(written(tmp_path, "[heavy"))


def test_a_section_that_is_not_json_in_the_environment_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NANOFLEET_HEAVY", "{")

    with pytest.raises(InvalidRequest, match="heavy"):
        load_settings(None)


def test_every_field_says_what_it_means() -> None:
    settings = load_settings(None)
    sections = [settings, settings.heavy, settings.telemetry, settings.registry, settings.fleet, settings.logs]

    undocumented = [
        name for section in sections for name, field in type(section).model_fields.items() if not field.description
    ]

    assert undocumented == []
