"""Settings: file and environment, and what they refuse."""

from pathlib import Path

import pytest

from core.errors import InvalidRequest
from edge_agent.settings import AgentSettings, load_settings

MINIMAL = "drain_timeout_s = 2.5\n"


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "agent.toml"
    path.write_text(MINIMAL)
    return path


def extended(config: Path, text: str) -> Path:
    config.write_text(MINIMAL + text)
    return config


def test_nothing_has_to_be_set() -> None:
    settings = load_settings(None)
    assert settings.grpc_bind == "127.0.0.1:7181"
    # Who the agent is and whom it belongs to stands in its identity.
    assert (settings.controller, settings.enrolment) == (None, None)
    assert not settings.metered


def test_a_file_of_one_line_is_read(config: Path) -> None:
    assert load_settings(config).drain_timeout_s == 2.5


def test_a_section_of_the_file_is_read(config: Path) -> None:
    assert load_settings(extended(config, "[mqtt]\nport = 1884\nprotocol = 4\n")).mqtt.port == 1884


def test_the_environment_wins(config: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NANOFLEET_AGENT_MQTT__PORT", "1999")
    assert load_settings(extended(config, "[mqtt]\nport = 1884\n")).mqtt.port == 1999


def test_the_environment_alone_is_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NANOFLEET_AGENT_METERED", "true")
    assert load_settings(None).metered


@pytest.mark.parametrize("key", ["controller", "enrolment"])
def test_the_controller_may_be_anywhere_since_it_proves_who_it_is(config: Path, key: str) -> None:
    settings = load_settings(extended(config, f'{key} = "controller.example:7443"\n'))
    assert getattr(settings, key) == "controller.example:7443"


@pytest.mark.parametrize("key", ["controller", "enrolment"])
def test_an_empty_address_means_that_of_the_enrolment(config: Path, key: str) -> None:
    assert getattr(load_settings(extended(config, f'{key} = ""\n')), key) is None


@pytest.mark.parametrize("key", ["controller", "enrolment"])
@pytest.mark.parametrize("address", ["controller.example", "controller.example:70000", ":7443"])
def test_what_is_no_address_is_refused(config: Path, key: str, address: str) -> None:
    with pytest.raises(InvalidRequest, match=key):
        load_settings(extended(config, f'{key} = "{address}"\n'))


@pytest.mark.parametrize("key", ["agent_id", "site"])
def test_a_name_is_no_setting_any_more(config: Path, key: str) -> None:
    with pytest.raises(InvalidRequest, match=f"{key}: unknown key"):
        load_settings(extended(config, f'{key} = "gate-1"\n'))


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
        '[mqtt]\nhost = "broker.example"\n',
        '[telemetry]\nendpoint = "192.168.1.1:4317"\n',
    ],
)
def test_an_address_beyond_loopback_is_refused(config: Path, text: str) -> None:
    with pytest.raises(InvalidRequest, match="expected a loopback"):
        load_settings(extended(config, text))


def test_a_broker_beyond_loopback_needs_tls(config: Path) -> None:
    text = '[mqtt]\nhost = "broker.example"\nport = 8883\n[mqtt.tls]\nenabled = true\n'
    assert load_settings(extended(config, text)).mqtt.host == "broker.example"


@pytest.mark.parametrize(
    ("text", "requires"),
    [
        ("", False),
        ("[mqtt.tls]\nenabled = true\n", True),
        ("[mqtt]\nrequire_client_topic = true\n", True),
        ("[mqtt]\nrequire_client_topic = false\n[mqtt.tls]\nenabled = true\n", False),
    ],
)
def test_with_tls_requests_must_name_their_client_unless_set_otherwise(config: Path, text: str, requires: bool) -> None:
    assert load_settings(extended(config, text)).mqtt.requires_client is requires


@pytest.mark.parametrize("group", ["", "a/b", "+"])
def test_a_share_group_is_a_name(config: Path, group: str) -> None:
    with pytest.raises(InvalidRequest, match="share_group"):
        load_settings(extended(config, f'[mqtt]\nshare_group = "{group}"\n'))


def test_an_empty_bind_means_no_local_face(config: Path) -> None:
    assert load_settings(extended(config, 'grpc_bind = ""\n')).grpc_bind is None


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


def test_privacy_is_set_for_devices_by_name_or_pattern(config: Path) -> None:
    text = '[privacy]\ndefault = "site"\n[privacy.devices]\n"ward-*" = "device"\n"camera-1@berlin" = "any"\n'
    privacy = load_settings(extended(config, text)).privacy
    assert (privacy.default, dict(privacy.devices)) == ("site", {"ward-*": "device", "camera-1@berlin": "any"})


@pytest.mark.parametrize(
    "text",
    ['[privacy]\ndefault = "public"\n', '[privacy.devices]\n"ward-*" = "secret"\n', '[privacy.devices]\n"" = "any"\n'],
)
def test_a_privacy_class_or_device_that_is_none_is_refused(config: Path, text: str) -> None:
    with pytest.raises(InvalidRequest, match="privacy"):
        load_settings(extended(config, text))


def test_the_devices_that_privacy_names_are_bounded(config: Path) -> None:
    lines = "".join(f'"camera-{number}" = "site"\n' for number in range(1001))
    with pytest.raises(InvalidRequest, match="devices"):
        load_settings(extended(config, "[privacy.devices]\n" + lines))


def test_with_tls_the_faces_may_be_anywhere(config: Path) -> None:
    settings = load_settings(
        extended(config, 'http_bind = "0.0.0.0:7180"\ngrpc_bind = "[::]:7181"\n\n[faces]\ntls = true\n')
    )
    assert (settings.http_bind, settings.grpc_bind) == ("0.0.0.0:7180", "[::]:7181")


@pytest.mark.parametrize("name", ["http_bind", "grpc_bind"])
def test_without_tls_a_face_beyond_loopback_is_refused_with_the_way_out(config: Path, name: str) -> None:
    with pytest.raises(InvalidRequest, match=r"\[faces\] tls = true"):
        load_settings(extended(config, f'{name} = "192.0.2.7:7180"\n'))
