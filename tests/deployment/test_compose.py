"""The compose file, as far as it can be checked without an engine."""

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from controller.settings import Settings, load_settings
from core.addresses import parse_address
from edge_agent.settings import load_settings as load_agent_settings
from tests.support.dockerfile import read_dockerfile

ROOT = Path(__file__).parents[2]
COMPOSE = ROOT / "deploy" / "compose"
# Made by the commands in its README.
MADE_BEFORE = ("secrets/", "site/")


@pytest.fixture(scope="module")
def compose() -> dict[str, Any]:
    document: dict[str, Any] = yaml.safe_load((COMPOSE / "compose.yaml").read_text())
    return document


@pytest.fixture
def controller(monkeypatch: pytest.MonkeyPatch, compose: dict[str, Any]) -> Settings:
    """What the controller will be told, by its file and by its environment."""
    for name, value in compose["services"]["controller"]["environment"].items():
        monkeypatch.setenv(name, re.sub(r"\$\{\w+:-(.*)}", r"\1", value))
    monkeypatch.setenv("NANOFLEET_DATA_DIR", "/var/lib/nanofleet")
    return load_settings(COMPOSE / "controller.toml")


def test_it_is_what_the_schema_says() -> None:
    program = Path(sys.executable).parent / "check-jsonschema"

    done = subprocess.run(
        [program, "--builtin-schema", "vendor.compose-spec", COMPOSE / "compose.yaml"], capture_output=True, text=True
    )

    assert done.returncode == 0, done.stdout + done.stderr


def test_every_file_that_is_mounted_or_built_from_is_there(compose: dict[str, Any]) -> None:
    services = compose["services"].values()
    mounts = [each for service in services for each in service.get("volumes", ()) if isinstance(each, dict)]
    files = [*(mount["source"] for mount in mounts), *(secret["file"] for secret in compose["secrets"].values())]

    assert len(mounts) >= 3
    for file in files:
        assert file.startswith(MADE_BEFORE) or (COMPOSE / file).exists(), file
    for service in services:
        if build := service.get("build"):
            assert (COMPOSE / build["context"] / build["dockerfile"]).exists()


def test_what_is_made_before_is_not_kept_in_the_repository() -> None:
    assert {f"/{folder}" for folder in MADE_BEFORE} <= set((COMPOSE / ".gitignore").read_text().split())


def test_volumes_networks_and_secrets_are_declared_when_used_and_used_when_declared(
    compose: dict[str, Any],
) -> None:
    services = compose["services"].values()
    named = {each.split(":")[0] for service in services for each in service.get("volumes", ()) if isinstance(each, str)}

    assert named == set(compose["volumes"])
    for kind in ("networks", "secrets"):
        assert {each for service in services for each in service.get(kind, ())} == set(compose[kind])


def test_every_service_is_hardened(compose: dict[str, Any]) -> None:
    for name, service in compose["services"].items():
        assert service["read_only"], name
        assert service["cap_drop"] == ["ALL"], name
        assert service["security_opt"] == ["no-new-privileges:true"], name
        assert "privileged" not in service, name


def test_the_controller_takes_its_settings_and_listens_where_ports_are_published(
    compose: dict[str, Any], controller: Settings
) -> None:
    bound = [parse_address(bind) for bind in (controller.grpc_bind, controller.enrolment_bind, controller.http_bind)]

    assert {address.host for address in bound} == {"0.0.0.0"}  # noqa: S104 (compared, not bound)
    assert compose["services"]["controller"]["ports"] == [f"{each.port}:{each.port}" for each in bound]
    assert controller.advertised_host == "controller"


def test_the_controller_finds_the_database_and_its_password(compose: dict[str, Any], controller: Settings) -> None:
    database = compose["services"]["database"]
    user, name = (database["environment"][f"POSTGRES_{what}"] for what in ("USER", "DB"))

    assert controller.database_url.partition("?")[0] == f"postgresql+psycopg://{user}@database/{name}"
    assert str(controller.database_password_file) == database["environment"]["POSTGRES_PASSWORD_FILE"]
    assert "database_password" in compose["services"]["controller"]["secrets"]
    # They speak in the clear, so nobody else may be there.
    assert "sslmode=disable" in controller.database_url
    assert compose["networks"]["records"]["internal"]
    on_it = {name for name, service in compose["services"].items() if "records" in service.get("networks", ())}
    assert on_it == {"database", "controller"}


def test_the_agent_takes_its_settings_and_finds_the_broker(
    monkeypatch: pytest.MonkeyPatch, compose: dict[str, Any]
) -> None:
    monkeypatch.setenv("NANOFLEET_AGENT_STATE_DIR", "/var/lib/nanofleet-agent")
    settings = load_agent_settings(COMPOSE / "agent.toml")

    assert settings.mqtt.host in compose["services"]
    assert compose["services"]["broker"]["ports"] == [f"{settings.mqtt.port}:{settings.mqtt.port}"]


@pytest.mark.parametrize("service", ["agent", "controller"])
def test_commands_and_volumes_are_those_of_the_image(compose: dict[str, Any], service: str) -> None:
    image = {each.name: each.words for each in read_dockerfile(ROOT / "deploy" / "images" / f"Dockerfile.{service}")}
    described = compose["services"][service]

    assert f"{service}:{image['VOLUME']}" in described["volumes"]
    assert described["tmpfs"] == ["/tmp"]
    assert [described["command"][0]] == ["controller" if service == "controller" else "run"]
