"""Settings: file and environment, and what they refuse."""

from pathlib import Path

import pytest

from core.errors import InvalidRequest
from edge_agent.settings import AgentSettings, load_settings

MINIMAL = 'agent_id = "gate-1"\nsite = "berlin"\n'


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "agent.toml"
    path.write_text(MINIMAL)
    return path


def extended(config: Path, text: str) -> Path:
    config.write_text(MINIMAL + text)
    return config


def test_name_and_site_are_enough(config: Path) -> None:
    settings = load_settings(config)
    assert (settings.agent_id, settings.site) == ("gate-1", "berlin")
    assert settings.grpc_bind == "127.0.0.1:7181"


def test_a_section_of_the_file_is_read(config: Path) -> None:
    assert load_settings(extended(config, "[mqtt]\nport = 1884\nprotocol = 4\n")).mqtt.port == 1884


def test_the_environment_wins(config: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NANOFLEET_AGENT_MQTT__PORT", "1999")
    assert load_settings(extended(config, "[mqtt]\nport = 1884\n")).mqtt.port == 1999


def test_the_environment_alone_is_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NANOFLEET_AGENT_AGENT_ID", "gate-2")
    monkeypatch.setenv("NANOFLEET_AGENT_SITE", "oslo")
    assert load_settings(None).agent_id == "gate-2"


def test_a_missing_name_is_said(tmp_path: Path) -> None:
    path = tmp_path / "empty.toml"
    path.write_text("")
    with pytest.raises(InvalidRequest, match=r"agent_id: must be set; .*: site: must be set"):
        load_settings(path)


@pytest.mark.parametrize("text", ["colour = 1\n", "[mqtt]\ncolour = 1\n"])
def test_an_unknown_key_is_an_error(config: Path, text: str) -> None:
    with pytest.raises(InvalidRequest, match="colour: unknown key"):
        load_settings(extended(config, text))


@pytest.mark.parametrize("variable", ["NANOFLEET_AGENT_COLOUR", "NANOFLEET_AGENT_MQTT__COLOUR"])
def test_an_unknown_variable_is_an_error(config: Path, monkeypatch: pytest.MonkeyPatch, variable: str) -> None:
    monkeypatch.setenv(variable, "1")
    with pytest.raises(InvalidRequest, match=r"(?i)colour"):
        load_settings(config)


@pytest.mark.parametrize(
    "text",
    [
        'grpc_bind = "0.0.0.0:7181"\n',
        'controller = "10.0.0.1:7443"\n',
        '[mqtt]\nhost = "broker.example"\n',
        '[telemetry]\nendpoint = "192.168.1.1:4317"\n',
    ],
)
def test_an_address_beyond_loopback_is_refused(config: Path, text: str) -> None:
    with pytest.raises(InvalidRequest, match="expected a loopback"):
        load_settings(extended(config, text))


def test_an_empty_bind_means_no_local_face(config: Path) -> None:
    assert load_settings(extended(config, 'grpc_bind = ""\n')).grpc_bind is None


def test_the_reserved_name_is_refused(monkeypatch: pytest.MonkeyPatch, config: Path) -> None:
    monkeypatch.setenv("NANOFLEET_AGENT_AGENT_ID", "any")
    with pytest.raises(InvalidRequest, match="choose another name"):
        load_settings(config)


@pytest.mark.parametrize("text", ["[link]\nreconnect_base_s = 0\n", "[link]\nreconnect_cap_s = inf\n"])
def test_a_delay_without_sense_is_refused(config: Path, text: str) -> None:
    with pytest.raises(InvalidRequest, match=r"link\.reconnect"):
        load_settings(extended(config, text))


def test_a_file_that_is_not_toml_is_refused(config: Path) -> None:
    config.write_text("agent_id: gate-1")
    with pytest.raises(InvalidRequest, match="expected TOML"):
        load_settings(config)


def test_a_file_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidRequest, match="No such file"):
        load_settings(tmp_path / "none.toml")


def test_every_setting_says_what_it_means() -> None:
    sections = [AgentSettings, *(field.annotation for field in AgentSettings.model_fields.values())]
    described = {
        name: field.description for section in sections for name, field in getattr(section, "model_fields", {}).items()
    }
    assert [name for name, text in described.items() if not text] == []
