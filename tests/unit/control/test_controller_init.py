"""`nanofleet controller init` on a folder of its own: the first admin, once, and another when its secret is lost."""

import asyncio
import json
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from controller.access.model import Operator, OperatorRole
from controller.access.service import Access
from controller.cli.app import app
from controller.cli.credential import Credential, CredentialFile, read_credential
from controller.cli.initialise import url_of
from controller.settings import Settings
from controller.storage.access import SqlAccessStore
from controller.storage.database import Database
from core import folder_lock
from core.clock import SystemClock
from core.spiffe import CONTROLLER_DNS_NAME
from tests.support.fleet_values import NOON

EVERYWHERE = "https://controller.example:7080"


class Place:
    """A machine on which nothing has been set up."""

    def __init__(self, folder: Path) -> None:
        self.data_dir = folder / "controller"
        self.configuration = folder / "config"
        self.credential_path = self.configuration / "nanofleet" / "credential.json"

    def init(self, *words: str, **settings: str) -> Result:
        environment = {
            "NANOFLEET_DATA_DIR": str(self.data_dir),
            "XDG_CONFIG_HOME": str(self.configuration),
            "COLUMNS": "400",
            "TERM": "dumb",
            **settings,
        }
        return CliRunner().invoke(app, ["controller", "init", *words], env=environment, prog_name="nanofleet")

    @property
    def credential(self) -> Credential:
        credential = read_credential(self.credential_path).credential
        assert credential is not None
        return credential

    def operator_with(self, secret: str) -> Operator:
        """Return whose secret it is, as a controller would find out."""

        async def ask() -> Operator:
            database = Database(f"sqlite:///{self.data_dir / 'controller.sqlite'}")
            try:
                return await Access(SqlAccessStore(database), clock=SystemClock()).authenticate(secret, source="here")
            finally:
                await database.close()

        return asyncio.run(ask())


@pytest.fixture
def place(tmp_path: Path) -> Place:
    return Place(tmp_path)


def assert_done(result: Result) -> None:
    assert result.exit_code == 0, result.output


def assert_refused(result: Result, *words: str) -> None:
    assert result.exit_code == 1, result.output
    assert "Traceback" not in result.output
    for word in words:
        assert word in result.stderr


def test_the_first_admin_gets_a_credential_where_every_command_looks(place: Place) -> None:
    result = place.init()

    assert_done(result)
    assert str(place.credential_path) in result.stdout
    assert place.credential.secret not in result.output
    assert place.credential.controller == "http://127.0.0.1:7080"
    admin = place.operator_with(place.credential.secret)
    assert (admin.name, admin.role) == ("admin", OperatorRole.ADMIN)


def test_a_second_time_it_says_how_to_make_others(place: Place) -> None:
    assert_done(place.init("--name", "ada"))
    before = place.credential

    assert_refused(place.init(), "found ada", "operators add", "--reset-admin ada")
    assert place.credential == before


def test_a_lost_secret_is_replaced(place: Place) -> None:
    assert_done(place.init())
    before = place.credential

    assert_done(place.init("--reset-admin", "admin"))

    assert place.credential.secret != before.secret
    assert place.operator_with(place.credential.secret).name == "admin"


def test_another_admin_can_be_made_with_access_to_the_folder(place: Place, tmp_path: Path) -> None:
    assert_done(place.init())
    path = tmp_path / "bob.json"

    assert_done(place.init("--reset-admin", "bob", "--credential", str(path)))

    bob = read_credential(path).credential
    assert bob is not None
    assert place.operator_with(bob.secret).role is OperatorRole.ADMIN
    assert place.operator_with(place.credential.secret).name == "admin"


def test_a_credential_of_somebody_else_is_not_overwritten(place: Place) -> None:
    assert_done(place.init())

    assert_refused(place.init("--reset-admin", "bob"), "there is a credential of admin", "--credential")
    assert place.credential.name == "admin"


def test_who_is_no_admin_does_not_become_one(place: Place, tmp_path: Path) -> None:
    assert_done(place.init())

    async def add() -> None:
        database = Database(f"sqlite:///{place.data_dir / 'controller.sqlite'}")
        await SqlAccessStore(database).add_operator(Operator("bob", OperatorRole.VIEWER, "b" * 64, NOON))
        await database.close()

    asyncio.run(add())
    assert_refused(
        place.init("--reset-admin", "bob", "--credential", str(tmp_path / "bob.json")), "got the role viewer"
    )


def test_a_running_controller_is_left_alone(place: Place) -> None:
    place.data_dir.mkdir()
    with folder_lock.held(place.data_dir / "controller.lock", what="controller"):
        assert_refused(place.init(), "is one already")


def test_a_file_that_cannot_be_written_is_named_with_the_remedy(place: Place) -> None:
    place.configuration.write_text("in the way")

    assert_refused(place.init("--credential", str(place.configuration / "x.json")), "Not a directory")


@pytest.mark.parametrize("url", ["controller.example", "ftp://x", "https://", "https://x:port", "https://x?y"])
def test_an_address_that_is_none_is_refused_before_anything_is_made(place: Place, url: str) -> None:
    assert_refused(place.init("--url", url), "expected an address such as")

    assert not place.data_dir.exists()


def test_the_result_is_json_when_asked(place: Place) -> None:
    result = place.init("-o", "json")

    assert json.loads(result.stdout) == {
        "name": "admin", "controller": "http://127.0.0.1:7080", "credential": str(place.credential_path)
    }  # fmt: skip


@pytest.mark.parametrize(
    ("bind", "url"),
    [
        ("127.0.0.1:7080", "http://127.0.0.1:7080"),
        ("[::1]:80", "http://[::1]:80"),
        ("192.0.2.5:443", "https://192.0.2.5:443"),
    ],
)
def test_the_address_follows_the_setting(bind: str, url: str) -> None:
    assert url_of(Settings(http_bind=bind)) == url


def test_a_port_on_all_addresses_needs_a_name(place: Place) -> None:
    everywhere = {"NANOFLEET_HTTP_BIND": "0.0.0.0:7080"}

    assert_refused(place.init(**everywhere), "advertised_host")
    assert_done(place.init("--url", EVERYWHERE, **everywhere))
    assert place.credential.controller == EVERYWHERE


def test_over_tls_the_credential_says_whom_to_believe(place: Place) -> None:
    assert_done(place.init(NANOFLEET_HTTP_BIND="192.0.2.5:7080"))

    assert place.credential.controller == "https://192.0.2.5:7080"
    assert place.credential.server_name == CONTROLLER_DNS_NAME
    assert CredentialFile(place.credential_path, place.credential).tls().get_ca_certs()


def test_with_a_certificate_of_ones_own_the_authorities_of_this_machine_are_believed(place: Place) -> None:
    files = {"NANOFLEET_HTTP_CERTIFICATE": "chain.pem", "NANOFLEET_HTTP_KEY": "key.pem"}
    assert_done(place.init(NANOFLEET_HTTP_BIND="192.0.2.5:7080", **files))

    assert (place.credential.trust_bundle, place.credential.server_name) == (None, None)
