"""PostgreSQL under the controller: reached with a password, held alone, away for a while, and back."""

import asyncio
import os
import signal
import socket
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from sqlalchemy import Connection, create_engine, insert, inspect, make_url, select, text

from controller.storage import postgresql as module
from controller.storage.database import Database
from controller.storage.tables import metadata, models
from core.addresses import parse_address
from core.errors import Conflict, InvalidRequest, Unavailable
from core.grpc_transport import TlsIdentity
from core.spiffe import Role
from tests.support.controller_process import ControllerProcess
from tests.support.fake_agent import Dialler
from tests.support.fleet_values import CAM, made_hello
from tests.support.postgresql import Postgresql

WAIT_S = 60.0


def add_model(connection: Connection, name: str = "meter") -> None:
    connection.execute(insert(models).values(name=name, created_us=0))


def names(connection: Connection) -> list[str]:
    return list(connection.scalars(select(models.c.name).order_by(models.c.name)))


@pytest.fixture
def url(postgresql: Postgresql) -> str:
    return postgresql.new_database()


@pytest.fixture
async def database(postgresql: Postgresql, url: str) -> AsyncIterator[Database]:
    database = Database(url, password_file=postgresql.password_file)
    await database.migrate()
    yield database
    await database.close()


async def test_a_second_controller_is_refused_while_the_first_one_lives(
    postgresql: Postgresql, url: str, database: Database
) -> None:
    second = Database(url, password_file=postgresql.password_file)

    with pytest.raises(Conflict, match=rf"only controller.* found another: nanofleet controller {os.getpid()} on .*"):
        await second.migrate()
    await database.close()
    await second.migrate()

    await second.close()


async def test_controllers_of_other_databases_on_the_same_server_are_no_matter(
    postgresql: Postgresql, database: Database
) -> None:
    other = Database(postgresql.new_database(), password_file=postgresql.password_file)

    await other.migrate()

    await other.close()


async def test_a_server_that_was_away_is_used_again_and_held_again(
    postgresql: Postgresql, url: str, database: Database
) -> None:
    await database.run(add_model)
    postgresql.stop()
    with pytest.raises(Unavailable, match=r"database: .*; try again later"):
        await database.run(lambda connection: add_model(connection, "lost"))
    with pytest.raises(Unavailable):
        await database.read(names)
    postgresql.start()

    await database.run(lambda connection: add_model(connection, "cat"))
    assert await database.read(names) == ["cat", "meter"]
    second = Database(url, password_file=postgresql.password_file)
    with pytest.raises(Conflict):
        await second.migrate()
    await second.close()


async def test_a_use_case_that_was_under_way_when_the_server_left_is_undone_and_not_repeated(
    postgresql: Postgresql, database: Database
) -> None:
    runs = 0

    def cut_off(connection: Connection) -> None:
        nonlocal runs
        runs += 1
        add_model(connection)
        postgresql.stop()
        add_model(connection, "cat")

    with pytest.raises(Unavailable):
        await database.run(cut_off)
    postgresql.start()

    assert (runs, await database.read(names)) == (1, [])


async def test_who_lost_the_database_to_another_writes_nothing_any_more(
    postgresql: Postgresql, url: str, database: Database
) -> None:
    await database.run(add_model)
    postgresql.stop()
    postgresql.start()
    usurper = Database(url, password_file=postgresql.password_file)
    await usurper.migrate()

    with pytest.raises(Unavailable, match="only controller"):
        await database.run(lambda connection: add_model(connection, "cat"))
    await usurper.close()

    assert await database.read(names) == ["meter"]
    await database.run(lambda connection: add_model(connection, "cat"))


async def test_use_cases_are_serial_reads_are_snapshots_and_both_are_bounded(database: Database) -> None:
    def settings(connection: Connection) -> list[str]:
        asked = ("transaction_isolation", "transaction_read_only", "statement_timeout", "lock_timeout")
        return [str(connection.scalar(text(f"SHOW {name}"))) for name in asked]

    assert await database.run(settings) == ["serializable", "off", "30s", "5s"]
    assert await database.read(settings) == ["repeatable read", "on", "30s", "5s"]


async def test_a_lock_of_somebody_else_is_not_waited_for_without_end(
    postgresql: Postgresql, url: str, database: Database
) -> None:
    def impatient(connection: Connection) -> None:
        connection.execute(text("SET LOCAL lock_timeout = 50"))
        add_model(connection)

    with postgresql.session(url) as somebody:
        somebody.execute("LOCK TABLE models")
        with pytest.raises(Unavailable, match="lock timeout"):
            await database.run(impatient)
    await database.run(add_model)

    assert await database.read(names) == ["meter"]


@pytest.mark.parametrize(
    ("made", "found"),
    [
        ("ENCODING 'LATIN1' LOCALE 'C'", "got encoding LATIN1"),
        ("ENCODING 'UTF8' LOCALE 'C' LOCALE_PROVIDER icu ICU_LOCALE 'en-US'", "got one in the order of a language"),
    ],
)
async def test_a_database_that_would_not_keep_or_sort_our_text_is_refused(
    postgresql: Postgresql, made: str, found: str
) -> None:
    database = Database(postgresql.new_database(made), password_file=postgresql.password_file)

    with pytest.raises(InvalidRequest, match=f"{found}; make one with `createdb"):
        await database.migrate()

    await database.close()


async def test_migrating_and_creating_give_the_same_constraints(postgresql: Postgresql, database: Database) -> None:
    created = create_engine(postgresql.new_database(), connect_args={"password": password_of(postgresql)})
    metadata.create_all(created)

    with created.connect() as connection:
        assert await database.read(constraints) == constraints(connection)
    created.dispose()


def password_of(postgresql: Postgresql) -> str:
    return postgresql.password_file.read_text().strip()


def constraints(connection: Connection) -> dict[str, Any]:
    inspector = inspect(connection)
    return {
        table: [
            repr(inspector.get_columns(table)),
            inspector.get_pk_constraint(table),
            inspector.get_foreign_keys(table),
            sorted(inspector.get_unique_constraints(table), key=str),
            sorted(inspector.get_check_constraints(table), key=str),
            sorted(inspector.get_indexes(table), key=str),
        ]
        for table in metadata.tables
    }


# ---- passwords and transport ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "refusal"),
    [
        (b"wrong\n", "password authentication failed"),
        (b"\n", "expected one password"),
        (b"x" * 5000, "expected one password of up to 4096 bytes"),
        (b"\xff", "cannot be read"),
        (None, "cannot be read"),
    ],
)
async def test_a_password_that_does_not_open_it_is_told_by_its_file_or_by_the_server(
    tmp_path: Path, url: str, content: bytes | None, refusal: str
) -> None:
    password_file = tmp_path / "password"
    if content is not None:
        password_file.write_bytes(content)
    database = Database(url, password_file=password_file)

    with pytest.raises(Unavailable, match=refusal):
        await database.migrate()

    await database.close()


async def test_a_password_that_was_changed_is_read_again(
    tmp_path: Path, postgresql: Postgresql, url: str, database: Database
) -> None:
    await database.close()
    password_file = tmp_path / "password"
    password_file.write_text("outdated")
    again = Database(url, password_file=password_file)
    with pytest.raises(Unavailable):
        await again.migrate()

    password_file.write_text(password_of(postgresql))
    await again.migrate()

    await again.close()


@pytest.mark.parametrize(
    ("address", "sslmode"),
    [
        ("db.example:5432", "verify-full"),
        ("192.0.2.7", "verify-full"),
        ("db.example/nf?sslmode=require", "require"),
        ("127.0.0.1:5432", None),
        ("[::1]", None),
        ("/nf?host=/run/postgresql", None),
        ("/nf?service=fleet", None),
    ],
)
def test_a_server_elsewhere_must_prove_itself_unless_the_url_says_otherwise(address: str, sslmode: str | None) -> None:
    url = make_url(f"postgresql+psycopg://nanofleet@{address}")

    assert (module.parameters(url) | url.query).get("sslmode") == sslmode


async def test_a_server_elsewhere_without_tls_gets_no_password(postgresql: Postgresql, url: str) -> None:
    here = url.replace("127.0.0.1", socket.gethostname())
    database = Database(f"{here}?hostaddr=127.0.0.1", password_file=postgresql.password_file)

    with pytest.raises(Unavailable, match="server does not support SSL, but SSL was required"):
        await database.migrate()

    await database.close()


# ---- whole controllers ----------------------------------------------------------------------------------------


def on(postgresql: Postgresql, url: str) -> dict[str, str]:
    return {
        "NANOFLEET_DATABASE_URL": url,
        "NANOFLEET_DATABASE_PASSWORD_FILE": str(postgresql.password_file),
    }


def test_a_controller_goes_on_when_its_server_was_restarted_and_forgets_nothing_when_it_was_itself(
    tmp_path: Path, postgresql: Postgresql, url: str
) -> None:
    with ControllerProcess(tmp_path / "controller", **on(postgresql, url)) as controller:
        greet(controller)
        postgresql.stop()
        assert asked(controller).status_code == 503
        postgresql.start()
        assert asked(controller).json()["models"] == []
        greet(controller)
        controller.send(signal.SIGTERM)
        assert controller.exit_code() == 0
    with ControllerProcess(tmp_path / "controller", **on(postgresql, url)) as controller:
        agents = httpx.get(controller.endpoints()["controller_http"] + "/api/agents", headers=controller.bearer).json()

    assert [agent["id"] for agent in agents["agents"]] == [CAM]
    assert not (tmp_path / "controller" / "controller.sqlite").exists()


def asked(controller: ControllerProcess) -> httpx.Response:
    return httpx.get(controller.endpoints()["controller_http"] + "/api/models", headers=controller.bearer, timeout=30)


def greet(controller: ControllerProcess) -> None:
    asyncio.run(say_hello(controller.endpoints()["controller_grpc"], controller.tls(Role.AGENT, CAM)))


async def say_hello(address: str, tls: TlsIdentity) -> None:
    dialler = Dialler(parse_address(address), tls)
    async with dialler.dial() as agent:
        await agent.hello(made_hello())
        await agent.leave()
    await dialler.close()


def test_a_second_controller_says_which_one_is_there_and_ends(tmp_path: Path, postgresql: Postgresql, url: str) -> None:
    with ControllerProcess(tmp_path / "first", **on(postgresql, url)) as first:
        first.endpoints()
        second = run_controller(NANOFLEET_DATA_DIR=str(tmp_path / "second"), **on(postgresql, url))

        assert first.process is not None
        assert second.returncode != 0
        assert f"only controller on it, found another: nanofleet controller {first.process.pid} on" in flat(second)


def test_a_database_without_its_keys_is_not_taken_for_a_new_one(
    tmp_path: Path, postgresql: Postgresql, url: str
) -> None:
    ControllerProcess(tmp_path / "first", **on(postgresql, url))

    second = run_controller(NANOFLEET_DATA_DIR=str(tmp_path / "second"), **on(postgresql, url))

    assert second.returncode != 0
    assert "key" in flat(second)


def run_controller(**environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", "from controller.cli.app import main; main()", "controller", "run"],
        env={**os.environ, "NANOFLEET_HEAVY__MODE": "url", "NANOFLEET_HEAVY__URL": "http://127.0.0.1:9", **environment},
        capture_output=True,
        text=True,
        timeout=WAIT_S,
    )


def flat(done: subprocess.CompletedProcess[str]) -> str:
    """Return what it said, without the breaks that fit it to a screen."""
    return " ".join((done.stdout + done.stderr).split())
