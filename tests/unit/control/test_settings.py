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
    monkeypatch.setenv("NANOFLEET_CREDENTIAL", "/home/ada/credential")
    monkeypatch.setenv("NANOFLEET_SIGNING_KEY_DIRECTOR", "secret")

    load_settings(None)


def test_a_bad_value_is_named_where_it_stands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = written(tmp_path, "[heavy]\nport = 0\n")
    monkeypatch.setenv("NANOFLEET_LOGS__LEVEL", "loud")

    with pytest.raises(InvalidRequest) as refused:
        load_settings(path)

    assert f"{path}: heavy.port: " in str(refused.value)
    assert "environment variable NANOFLEET_LOGS__LEVEL: logs.level: " in str(refused.value)


@pytest.mark.parametrize("address", ["192.0.2.7:7000", "[2001:db8::7]:7000", "127.0.0.1:0"])
@pytest.mark.parametrize("name", ["grpc_bind", "enrolment_bind", "http_bind"])
def test_any_address_may_be_bound(tmp_path: Path, name: str, address: str) -> None:
    settings = load_settings(written(tmp_path, f'{name} = "{address}"'))

    assert getattr(settings, name) == address


@pytest.mark.parametrize("name", ["grpc_bind", "enrolment_bind", "http_bind"])
def test_what_is_no_address_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(InvalidRequest, match=name):
        load_settings(written(tmp_path, f'{name} = "7443"'))


@pytest.mark.parametrize("everywhere", ["0.0.0.0:7443", "[::]:7443"])
@pytest.mark.parametrize("name", ["grpc_bind", "enrolment_bind"])
def test_every_address_needs_a_name_by_which_agents_find_it(tmp_path: Path, name: str, everywhere: str) -> None:
    with pytest.raises(InvalidRequest, match="advertised_host: expected the name"):
        load_settings(written(tmp_path, f'{name} = "{everywhere}"'))

    named = load_settings(written(tmp_path, f'{name} = "{everywhere}"\nadvertised_host = "hub.example"'))

    assert str(named.advertised(Address("0.0.0.0", 7443))) == "hub.example:7443"  # noqa: S104 (a value)


def test_what_is_bound_is_advertised_unless_another_name_is_set() -> None:
    assert load_settings(None).advertised(Address("192.0.2.7", 7443)) == Address("192.0.2.7", 7443)


@pytest.mark.parametrize(
    ("text", "is_tls"),
    [
        ("", False),
        ('http_bind = "[::1]:7080"', False),
        ('http_bind = "192.0.2.7:7080"', True),
        ('http_certificate = "own.pem"\nhttp_key = "own.key"', True),
    ],
)
def test_http_is_in_clear_on_loopback_only(tmp_path: Path, text: str, is_tls: bool) -> None:
    assert load_settings(written(tmp_path, text)).http_speaks_tls is is_tls


@pytest.mark.parametrize("half", ["http_certificate", "http_key"])
def test_half_of_a_certificate_is_refused(tmp_path: Path, half: str) -> None:
    with pytest.raises(InvalidRequest, match="http_certificate and http_key together"):
        load_settings(written(tmp_path, f'{half} = "own.pem"'))


@pytest.mark.parametrize("domain", ["", "Fleet", "fleet/1", "fleet test", "x" * 256])
def test_a_trust_domain_that_spiffe_does_not_allow_is_refused(tmp_path: Path, domain: str) -> None:
    with pytest.raises(InvalidRequest, match="trust_domain"):
        load_settings(written(tmp_path, f'trust_domain = "{domain}"'))


@pytest.mark.parametrize(
    "text",
    [
        '[heavy]\nmode = "url"',
        '[heavy]\nurl = "http://127.0.0.1:8000"',
        '[heavy]\nmode = "url"\nurl = "ftp://x"',
        "[heavy]\nmin_replicas = 3\nmax_replicas = 2",
        '[telemetry]\nforward_to = "collector"',
        '[telemetry]\nforward_to = "collector:4317"\nforward_key = "key.pem"',
        '[telemetry]\nforward_authority = "authority.pem"',
        "[telemetry]\nkeep_per_s = -1",
        "[telemetry]\nsampled_per_s = -1",
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
    sections = [settings, settings.heavy, settings.telemetry, settings.registry, settings.fleet]
    sections += [settings.transfer, settings.logs]

    undocumented = [
        name for section in sections for name, field in type(section).model_fields.items() if not field.description
    ]

    assert undocumented == []


def test_the_database_may_be_a_postgresql_with_its_password_in_a_file(tmp_path: Path) -> None:
    url = "postgresql+psycopg://nanofleet@db.example/fleet?sslrootcert=/etc/ca.pem"

    settings = load_settings(written(tmp_path, f'database_url = "{url}"\ndatabase_password_file = "/run/secret"\n'))

    assert (settings.database_url, settings.database_password_file) == (url, Path("/run/secret"))


@pytest.mark.parametrize(
    "url", ["mysql://db.example/fleet", "postgresql://db.example/fleet", "sqlite://fleet", "fleet"]
)
def test_another_kind_of_database_is_refused(tmp_path: Path, url: str) -> None:
    with pytest.raises(InvalidRequest, match=r"database_url: .*expected postgresql.psycopg://user@host:5432/name"):
        load_settings(written(tmp_path, f'database_url = "{url}"\n'))


@pytest.mark.parametrize("url", ["nf:s3cret@db.example/fleet", "nf@db.example/fleet?password=s3cret"])
def test_a_password_in_the_url_is_refused_and_not_repeated(tmp_path: Path, url: str) -> None:
    with pytest.raises(InvalidRequest, match="database_password_file") as refused:
        load_settings(written(tmp_path, f'database_url = "postgresql+psycopg://{url}"\n'))

    assert "s3cret" not in str(refused.value)


def test_a_password_for_a_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidRequest, match="the database is a file; set database_url"):
        load_settings(written(tmp_path, 'database_password_file = "/run/secret"\n'))
