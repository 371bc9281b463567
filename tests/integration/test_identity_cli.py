"""Tokens, bans, rotation and certificates from the command line, against a real HTTP port."""

import asyncio
import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
import typer
from cryptography import x509
from cryptography.hazmat.primitives import serialization
from fastapi import FastAPI
from typer.testing import CliRunner, Result

from controller.api.http_server import HttpServer
from controller.api.identity_rest import Destination, router
from controller.api.problems import exception_handlers, problem_answer
from controller.cli import enrolment
from controller.cli.credential import Credential as OperatorCredential
from controller.cli.credential import read_credential, write_credential
from controller.cli.options import Options
from controller.identity.authority import new_key
from controller.identity.keys import AuthorityKeys
from controller.identity.model import Credential
from controller.identity.service import Identity
from controller.storage.database import Database
from controller.storage.identity import SqlIdentityStore
from core.addresses import Address
from core.clock import SystemClock
from core.enrolment_token import parse_token
from core.spiffe import CONTROLLER_DNS_NAME
from tests.support.trusted_controller import DOMAIN, Root, made_csr

PATIENCE_S = 20.0
CONTROLLER, ENROLMENT = Address("controller.example", 7443), Address("controller.example", 7444)
Run = Callable[..., Result]
Credentials = Callable[..., Path]


@dataclass(frozen=True, slots=True)
class Running:
    url: str
    identity: Identity
    loop: asyncio.AbstractEventLoop

    def enrol(self, text: str, wanted_id: str = "") -> Credential:
        csr = made_csr(new_key())
        enrolling = self.identity.enrol(parse_token(text).secret, csr, wanted_id)
        return asyncio.run_coroutine_threadsafe(enrolling, self.loop).result(PATIENCE_S)


@contextmanager
def running_controller(folder: Path) -> Iterator[Running]:
    """Serve the endpoints of identity from a thread of its own."""
    started, running, stops = threading.Event(), [], []

    async def serve() -> None:
        server, loop = HttpServer(Address("127.0.0.1", 0)), asyncio.get_running_loop()
        database = Database(f"sqlite:///{folder / 'controller.sqlite'}")
        await database.migrate()
        keys = AuthorityKeys(folder / "keys")
        identity = Identity(SqlIdentityStore(database), keys, clock=SystemClock(), trust_domain=DOMAIN)
        await identity.prepare()
        app = FastAPI(exception_handlers=exception_handlers(problem_answer))
        destination = Destination(CONTROLLER, ENROLMENT, Root())
        app.include_router(router(identity, destination, operator_of=lambda _request: "ada"))
        running.append(Running(f"http://{server.address}", identity, loop))
        stops.append(lambda: loop.call_soon_threadsafe(server.stop))
        serving = asyncio.create_task(server.run(app))
        started.set()
        await serving
        await database.close()
        server.close()

    thread = threading.Thread(target=lambda: asyncio.run(serve()), name="controller")
    thread.start()
    try:
        assert started.wait(PATIENCE_S)
        yield running[0]
    finally:
        stops[0]()
        thread.join(PATIENCE_S)
        assert not thread.is_alive()


@pytest.fixture
def controller(tmp_path: Path) -> Iterator[Running]:
    with running_controller(tmp_path) as running:
        yield running


@pytest.fixture
def run(controller: Running, tmp_path: Path) -> Run:
    command = typer.Typer()
    for function in (enrolment.token, enrolment.ban, enrolment.unban):
        command.command()(function)
    command.add_typer(enrolment.app, name="authority")

    @command.callback()
    def options(context: typer.Context) -> None:
        context.obj = Options(controller.url)

    def call(*words: str) -> Result:
        environment = {"COLUMNS": "160", "TERM": "dumb", "HOME": str(tmp_path), "XDG_CONFIG_HOME": str(tmp_path)}
        return CliRunner().invoke(command, list(words), env=environment)

    return call


@pytest.fixture
def credential(controller: Running, tmp_path: Path) -> Credentials:
    """Write the credential file that the commands find."""

    def write(trust_bundle: str, server_name: str | None = None) -> Path:
        path = tmp_path / "nanofleet" / "credential.json"
        path.parent.mkdir()
        made = OperatorCredential(
            controller=controller.url, name="ada", secret="s", trust_bundle=trust_bundle, server_name=server_name
        )
        write_credential(path, made)
        return path

    return write


def test_a_token_tells_an_agent_where_to_go_and_whom_to_trust(controller: Running, run: Run) -> None:
    result = run("token", "--site", "north")

    assert result.exit_code == 0, result.output
    token = parse_token(result.stdout.strip())
    assert (token.controller, token.enrolment, token.trust_domain) == (CONTROLLER, ENROLMENT, DOMAIN)
    assert token.authority_sha256 == controller.identity.authority_sha256()
    assert controller.enrol(result.stdout.strip(), "cam-1").identity.agent == "cam-1"


def test_a_token_may_name_its_agent_and_its_time(run: Run) -> None:
    result = run("token", "--site", "north", "--agent", "cam-1", "--lifetime", "30m", "-o", "json")

    token = json.loads(result.stdout)["token"]
    assert (token["site"], token["agent"], token["uses_left"], token["created_by"]) == ("north", "cam-1", 1, "ada")


@pytest.mark.parametrize("words", [("--site", "a/b"), ("--site", "a", "--lifetime", "soon"), ()])
def test_a_token_that_cannot_be_made_is_an_error_of_the_command_line(run: Run, words: tuple[str, ...]) -> None:
    assert run("token", *words).exit_code == 2


def test_an_agent_is_banned_and_the_remedy_is_shown(controller: Running, run: Run) -> None:
    controller.enrol(run("token", "--site", "north", "--agent", "cam-1").stdout.strip())

    banned = run("ban", "cam-1", "--reason", "stolen")
    assert (banned.exit_code, "--site north --agent cam-1" in banned.stdout) == (0, True)

    lifted = run("unban", "cam-1", "-o", "json")
    assert json.loads(lifted.stdout)["ban"] is None


def test_whoever_is_not_known_cannot_be_banned(run: Run) -> None:
    result = run("ban", "cam-9", "--reason", "stolen")

    assert "never enrolled here" in str(result.exception)


def test_the_authority_is_rotated_in_two_steps(run: Run) -> None:
    def states(*words: str) -> list[str]:
        return [each["state"] for each in json.loads(run("authority", *words, "-o", "json").stdout)["authorities"]]

    assert states("status") == ["active"]
    assert states("rotate") == ["active", "next"]
    assert states("rotate") == ["retired", "active"]
    assert "still trusted" in str(run("authority", "rotate").exception)
    assert "retired" in run("authority", "status").stdout


def test_a_retired_authority_is_dropped_by_what_is_shown_of_it(run: Run) -> None:
    run("authority", "rotate")
    shown = json.loads(run("authority", "rotate", "-o", "json").stdout)["authorities"]
    retired, active = (each["sha256"] for each in shown)

    assert "rotate until another does" in str(run("authority", "drop", active, "--yes").exception)
    assert "found 0" in str(run("authority", "drop", "0" * 16, "--yes").exception)
    dropped = run("authority", "drop", retired[:16], "--yes", "-o", "json")

    assert [each["sha256"] for each in json.loads(dropped.stdout)["authorities"]] == [active]


def test_the_trust_bundle_of_a_credential_is_brought_up_to_date(
    controller: Running, run: Run, credential: Credentials
) -> None:
    path = credential(trust_bundle="-----BEGIN CERTIFICATE-----", server_name=CONTROLLER_DNS_NAME)
    run("authority", "rotate")

    result = run("authority", "trust", "--save")

    assert result.exit_code == 0, result.output
    kept = read_credential(path).credential
    assert kept is not None
    assert (kept.trust_bundle, kept.name) == (controller.identity.trust_bundle().decode(), "ada")
    assert run("authority", "trust").stdout.strip() == (kept.trust_bundle or "").strip()


def test_a_credential_that_believes_others_than_the_fleet_is_left_as_it_is(run: Run, credential: Credentials) -> None:
    path = credential(trust_bundle="-----BEGIN CERTIFICATE-----")

    result = run("authority", "trust", "--save")

    assert "an operator's own certificate" in str(result.exception)
    kept = read_credential(path).credential
    assert kept is not None
    assert kept.trust_bundle == "-----BEGIN CERTIFICATE-----"


def test_an_applications_key_is_certified(controller: Running, run: Run, tmp_path: Path) -> None:
    request = tmp_path / "request.pem"
    csr = x509.load_der_x509_csr(made_csr(new_key()))
    request.write_bytes(csr.public_bytes(serialization.Encoding.PEM))

    result = run("authority", "certify", "shop", "--request", str(request), "--folder", str(tmp_path / "shop"))

    assert result.exit_code == 0, result.output
    certificate = x509.load_pem_x509_certificate((tmp_path / "shop" / "certificate.pem").read_bytes())
    names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert list(names) == [x509.UniformResourceIdentifier(f"spiffe://{DOMAIN}/application/shop")]
    assert (tmp_path / "shop" / "trust.pem").read_bytes() == controller.identity.trust_bundle()


def test_a_device_and_its_broker_are_certified(run: Run, tmp_path: Path) -> None:
    device = run(
        "authority", "certify", "cam-1", "--role", "device", "--site", "north", "--folder", str(tmp_path / "d")
    )
    hosts = ("--host", "broker.example", "--host", "127.0.0.1")
    broker = run("authority", "certify", "north", "--role", "broker", *hosts, "--folder", str(tmp_path / "b"))

    assert (device.exit_code, broker.exit_code) == (0, 0), device.output + broker.output
    assert subject_of(tmp_path / "d") == "CN=cam-1@north"
    assert "broker.example" in names_in(tmp_path / "b")


def subject_of(folder: Path) -> str:
    return x509.load_pem_x509_certificate((folder / "identity.pem").read_bytes()).subject.rfc4514_string()


def names_in(folder: Path) -> list[str]:
    certificate = x509.load_pem_x509_certificate((folder / "identity.pem").read_bytes())
    names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    return [str(name.value) for name in names]


@pytest.mark.parametrize(
    "words", [("--role", "device"), ("--role", "device", "--site", "a/b"), ("--role", "broker"), ("--site", "north")]
)
def test_a_role_without_what_belongs_to_it_is_refused(run: Run, tmp_path: Path, words: tuple[str, ...]) -> None:
    result = run("authority", "certify", "cam-1", *words, "--folder", str(tmp_path / "x"))

    assert result.exit_code != 0
    assert not (tmp_path / "x").exists()


def test_what_is_no_request_is_not_certified(run: Run, tmp_path: Path) -> None:
    request = tmp_path / "request.pem"
    request.write_bytes(b"-----BEGIN NOTHING\xff")

    result = run("authority", "certify", "shop", "--request", str(request), "--folder", str(tmp_path))

    assert "expected PKCS #10 in PEM" in str(result.exception)
