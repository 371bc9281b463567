"""The `nanofleet` command against a guarded controller over TLS: who it says it is, and what it says when refused."""

import asyncio
import json
from collections.abc import AsyncIterator
from pathlib import Path

import pytest_asyncio
from typer.testing import CliRunner, Result

from controller.access.model import OperatorRole
from controller.api.http_server import HttpServer
from controller.api.http_tls import ServerCertificate
from controller.cli.app import app
from controller.cli.credential import Credential, read_credential, write_credential
from core.addresses import Address
from core.spiffe import CONTROLLER_DNS_NAME
from tests.support.guarded import GuardedSide, guarded_side
from tests.support.https_certificate import TestAuthority


class Desk:
    """A guarded controller on a real port, with the fleet's kind of certificate, and an operator's home."""

    def __init__(self, guarded: GuardedSide, url: str, authority: TestAuthority, home: Path) -> None:
        self.guarded = guarded
        self.url = url
        self.authority = authority
        self.home = home
        self.own = home / "nanofleet" / "credential.json"

    def credential(self, role: OperatorRole, **changes: str | None) -> Credential:
        made = Credential(
            controller=self.url,
            name=f"the-{role.value}",
            secret=self.guarded.secrets[role],
            trust_bundle=self.authority.bundle,
            server_name=CONTROLLER_DNS_NAME,
        )
        return made.model_copy(update=changes)

    async def run(self, *words: str, **environment: str) -> Result:
        settings = {"XDG_CONFIG_HOME": str(self.home), "COLUMNS": "400", "TERM": "dumb", **environment}
        return await asyncio.to_thread(CliRunner().invoke, app, list(words), env=settings, prog_name="nanofleet")


@pytest_asyncio.fixture
async def desk(tmp_path: Path) -> AsyncIterator[Desk]:
    authority = TestAuthority()
    pair = authority.fleet_pair()
    server = HttpServer(Address("127.0.0.1", 0), certificate=ServerCertificate(pair.chain, pair.key))
    async with guarded_side(tmp_path) as guarded:
        serving = asyncio.create_task(server.run(guarded.app))
        yield Desk(guarded, server.url, authority, tmp_path / "home")
        server.stop()
        await serving
    server.close()


def assert_refused(result: Result, *words: str) -> None:
    assert result.exit_code == 1, result.output
    assert "Traceback" not in result.output
    for word in words:
        assert word in result.stderr


async def test_the_credential_at_its_place_names_controller_and_operator(desk: Desk) -> None:
    write_credential(desk.own, desk.credential(OperatorRole.VIEWER))
    result = await desk.run("models", "list", "-o", "json")

    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout) == {"models": []}


async def test_another_credential_is_named_by_option_or_environment(desk: Desk, tmp_path: Path) -> None:
    path = tmp_path / "viewer.json"
    write_credential(path, desk.credential(OperatorRole.VIEWER))

    assert (await desk.run("--credential", str(path), "models", "list")).exit_code == 0
    assert (await desk.run("models", "list", NANOFLEET_CREDENTIAL=str(path))).exit_code == 0


async def test_without_a_credential_an_authority_of_our_own_is_not_believed(desk: Desk) -> None:
    assert_refused(
        await desk.run("--controller", desk.url, "models", "list"), "does not prove to be it", "trust_bundle"
    )


async def test_without_a_credential_the_remedy_is_told(desk: Desk) -> None:
    server = HttpServer(Address("127.0.0.1", 0))
    serving = asyncio.create_task(server.run(desk.guarded.app))
    # The one that we have is for another controller.
    write_credential(desk.own, desk.credential(OperatorRole.ADMIN))
    result = await desk.run("--controller", server.url, "models", "list")
    server.stop()
    await serving
    server.close()

    assert_refused(result, "no credential was shown", "--credential", "NANOFLEET_CREDENTIAL", "controller init")


async def test_a_credential_that_has_ended_is_named_with_the_remedy(desk: Desk) -> None:
    write_credential(desk.own, desk.credential(OperatorRole.VIEWER, secret="nfo1.wrong"))

    assert_refused(await desk.run("models", "list"), "not known here", "the-viewer", str(desk.own))


async def test_a_role_that_does_not_suffice_is_told(desk: Desk) -> None:
    write_credential(desk.own, desk.credential(OperatorRole.VIEWER))

    assert_refused(await desk.run("operators", "list"), "role admin", "got viewer")


async def test_an_upload_without_the_role_ends_with_the_reason(desk: Desk, tmp_path: Path) -> None:
    write_credential(desk.own, desk.credential(OperatorRole.VIEWER))
    model = tmp_path / "large.onnx"
    model.write_bytes(bytes(8 << 20))

    assert_refused(await desk.run("models", "publish", "large", str(model)), "role operator", "got viewer")


async def test_an_upload_by_nobody_ends_with_the_remedy(desk: Desk, tmp_path: Path) -> None:
    write_credential(desk.own, desk.credential(OperatorRole.VIEWER, secret="nfo1.wrong"))
    model = tmp_path / "model.onnx"
    model.write_bytes(b"a model")

    assert_refused(await desk.run("models", "publish", "small", str(model)), "does not know who asks", str(desk.own))


async def test_a_controller_of_another_authority_learns_no_secret(desk: Desk) -> None:
    write_credential(desk.own, desk.credential(OperatorRole.ADMIN, trust_bundle=TestAuthority().bundle))

    assert_refused(await desk.run("models", "list"), "does not prove to be it")


async def test_a_certificate_for_another_name_is_refused(desk: Desk) -> None:
    write_credential(desk.own, desk.credential(OperatorRole.ADMIN, server_name=None))

    assert_refused(await desk.run("models", "list"), "does not prove to be it", "127.0.0.1")


async def test_an_operator_is_added_used_listed_and_removed(desk: Desk, tmp_path: Path) -> None:
    write_credential(desk.own, desk.credential(OperatorRole.ADMIN))
    path = tmp_path / "bob.json"
    added = await desk.run("operators", "add", "bob", "--role", "operator", "--save", str(path))
    assert added.exit_code == 0, added.output
    assert "nfo1." not in added.output
    assert (await desk.run("--credential", str(path), "models", "list")).exit_code == 0
    assert "bob" in (await desk.run("operators", "list")).stdout

    assert (await desk.run("operators", "remove", "bob")).exit_code == 0

    assert_refused(await desk.run("--credential", str(path), "models", "list"), "not known here")


async def test_a_secret_that_is_not_saved_is_shown_once(desk: Desk) -> None:
    write_credential(desk.own, desk.credential(OperatorRole.ADMIN))
    added = await desk.run("operators", "add", "bob", "--role", "viewer")

    assert "nfo1." in added.stdout


async def test_a_file_in_the_way_is_found_before_anything_changes(desk: Desk) -> None:
    write_credential(desk.own, desk.credential(OperatorRole.ADMIN))

    assert_refused(await desk.run("operators", "add", "bob", "--role", "viewer", "--save", str(desk.own)), "exists")
    assert "bob" not in (await desk.run("operators", "list")).stdout


async def test_rotating_our_own_secret_does_not_lock_us_out(desk: Desk) -> None:
    before = desk.credential(OperatorRole.ADMIN)
    write_credential(desk.own, before)

    assert (await desk.run("operators", "rotate", "the-admin")).exit_code == 0

    after = read_credential(desk.own).credential
    assert after is not None
    assert after == before.model_copy(update={"secret": after.secret})
    assert after.secret != before.secret
    assert (await desk.run("operators", "list")).exit_code == 0


async def test_a_secret_that_cannot_be_saved_is_shown_instead_of_lost(desk: Desk, tmp_path: Path) -> None:
    write_credential(desk.own, desk.credential(OperatorRole.ADMIN))
    (tmp_path / "in-the-way").write_text("")
    result = await desk.run("operators", "rotate", "the-viewer", "--save", str(tmp_path / "in-the-way" / "x.json"))

    assert_refused(result, "File exists")
    assert "nfo1." in result.stdout


async def test_the_last_admin_cannot_be_removed(desk: Desk) -> None:
    write_credential(desk.own, desk.credential(OperatorRole.ADMIN))

    assert_refused(await desk.run("operators", "remove", "the-admin"), "last")


async def test_the_audit_record_is_listed_and_verified(desk: Desk) -> None:
    write_credential(desk.own, desk.credential(OperatorRole.ADMIN))
    assert (await desk.run("operators", "add", "eve", "--role", "viewer")).exit_code == 0

    listed = await desk.run("audit", "list", "--action", "operator.", "--output", "json")
    (entry,) = json.loads(listed.stdout)["entries"]
    assert (entry["operator"], entry["action"], entry["target"]) == ("the-admin", "operator.add", "eve")
    assert "operator.add" in (await desk.run("audit", "list")).stdout
    head = json.loads((await desk.run("audit", "verify", "--output", "json")).stdout)["last"]
    assert (await desk.run("audit", "verify", "--head", f"{head['id']}:{head['sha256']}")).exit_code == 0
    assert_refused(await desk.run("audit", "verify", "--head", f"{head['id']}:{'0' * 64}"), "noted hash")
