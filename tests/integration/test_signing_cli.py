"""`nanofleet signing` against a real controller on a real port, down to the flow with keys on another machine."""

import asyncio
import json
import threading
from collections.abc import Callable, Iterator
from contextlib import AsyncExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
from fastapi import FastAPI
from typer.testing import CliRunner, Result

from controller.api.http_server import HttpServer
from controller.api.operator_rest import router as operator_router
from controller.api.problems import exception_handlers, problem_answer
from controller.api.signing_rest import signing_router
from controller.cli.app import app as command
from controller.fleet.service import Fleet
from controller.registry.blobs import BlobStore
from controller.registry.service import Registry
from controller.signing.keys import KeyFiles, KeyRing
from controller.signing.model import KeyRole
from controller.signing.service import Catalogue
from controller.storage.catalogue import SqlCatalogueStore
from controller.storage.database import Database
from controller.storage.fleet import SqlFleetStore
from controller.storage.registry import SqlRegistryStore
from controller.storage.traces import SqlTraceStore
from controller.traces.service import Traces
from controller.transfer.cuts import TensorCutter
from core.addresses import Address
from core.clock import SystemClock
from tests.support.operator_side import MAX_MODEL_BYTES, PretendingWorkshop

# Generous: a test that needs it has failed, or the machine is very busy.
PATIENCE_S = 120.0
Run = Callable[..., Result]


@dataclass(frozen=True, slots=True)
class Running:
    url: str
    folder: Path

    def move_keys(self, *roles: KeyRole) -> Path:
        elsewhere = self.folder / "elsewhere"
        elsewhere.mkdir()
        for role in roles:
            (self.folder / "keys" / role).rename(elsewhere / role)
        return elsewhere


@contextmanager
def running_controller(folder: Path) -> Iterator[Running]:
    """Serve registry, fleet and catalogue from a thread of its own."""
    started, running, stops = threading.Event(), [], []

    async def serve() -> None:
        server, loop = HttpServer(Address("127.0.0.1", 0)), asyncio.get_running_loop()
        async with AsyncExitStack() as stack:
            stack.callback(server.close)
            app = await _app(folder, stack)
            running.append(Running(f"http://{server.address}", folder))
            stops.append(lambda: loop.call_soon_threadsafe(server.stop))
            serving = asyncio.create_task(server.run(app))
            started.set()
            await serving

    thread = threading.Thread(target=lambda: asyncio.run(serve()), name="controller")
    thread.start()
    try:
        assert started.wait(PATIENCE_S)
        yield running[0]
    finally:
        stops[0]()
        thread.join(PATIENCE_S)
        assert not thread.is_alive()


async def _app(folder: Path, stack: AsyncExitStack) -> FastAPI:
    clock, database = SystemClock(), Database(f"sqlite:///{folder / 'controller.sqlite'}")
    stack.push_async_callback(database.close)
    await database.migrate()
    blobs = BlobStore(folder / "blobs")
    stack.push_async_callback(blobs.close)
    catalogue = Catalogue(SqlCatalogueStore(database), KeyRing(KeyFiles(folder / "keys")), clock=clock)
    await catalogue.prepare()
    registry = Registry(
        SqlRegistryStore(database),
        blobs,
        PretendingWorkshop(),
        releases=catalogue,
        cutter=TensorCutter(),
        clock=clock,
        max_model_bytes=MAX_MODEL_BYTES,
        max_queued_publications=2,
    )
    await registry.prepare()
    fleet = Fleet(SqlFleetStore(database), registry, clock=clock, max_sessions=8, releases=catalogue)
    traces = Traces(SqlTraceStore(database), max_spans=1000)
    # Who may ask is the subject of other tests.
    app = FastAPI(exception_handlers=exception_handlers(problem_answer))
    app.include_router(operator_router(registry=registry, fleet=fleet, traces=traces, server_version="0.1.0"))
    app.include_router(signing_router(catalogue))
    for loop in (registry.run, fleet.run, traces.run, catalogue.run):
        stack.push_async_callback(_cancelled, asyncio.create_task(loop()))
    return app


async def _cancelled(task: asyncio.Task[None]) -> None:
    task.cancel()
    await asyncio.wait([task])


@pytest.fixture
def controller(tmp_path: Path) -> Iterator[Running]:
    folder = tmp_path / "controller"
    folder.mkdir()
    with running_controller(folder) as running:
        yield running


@pytest.fixture
def run(controller: Running) -> Run:
    def call(*words: str) -> Result:
        return invoke(*words, url=controller.url)

    return call


def invoke(*words: str, url: str | None = None) -> Result:
    environment = {"COLUMNS": "200", "TERM": "dumb", "NANOFLEET_CONTROLLER": url}
    return CliRunner().invoke(command, list(words), env=environment, prog_name="nanofleet")


def done(result: Result) -> str:
    assert result.exit_code == 0, result.output
    return result.stdout


def assert_refused(result: Result, *words: str) -> None:
    assert result.exit_code == 1, result.output
    assert "Traceback" not in result.output
    for word in words:
        assert word in result.stderr


@pytest.fixture
def publish(run: Run, tmp_path: Path) -> Callable[[], None]:
    file = tmp_path / "meter.onnx"
    file.write_bytes(b"a small model")
    return lambda: assert_done(run("models", "publish", "meter", str(file)))


def assert_done(result: Result) -> None:
    done(result)


def deploy(run: Run, model: str = "meter") -> Result:
    return run("deploy", model, "--variant", "original", "--fleet", "--no-wait")


def test_what_is_published_can_be_deployed_at_once(run: Run, publish: Callable[[], None]) -> None:
    publish()

    done(deploy(run))


def test_keys_elsewhere_sign_what_was_staged_and_then_it_can_be_deployed(
    controller: Running, run: Run, publish: Callable[[], None], tmp_path: Path
) -> None:
    safe, bundle = controller.move_keys(KeyRole.ROOT, KeyRole.TARGETS), tmp_path / "stick" / "staged.json"
    publish()
    assert_refused(deploy(run), "waits for signatures", "nanofleet signing stage")

    assert "+ meter/1/original.json" in done(run("signing", "stage", str(bundle)))
    # On the other machine: no controller answers there.
    signed = done(
        invoke("signing", "sign", str(bundle), "--key", str(safe / "targets"), "--yes", url="http://127.0.0.1:9")
    )
    assert "nanofleet signing publish" in signed
    done(run("signing", "publish", str(bundle)))

    done(deploy(run))


def test_a_root_needs_two_holders(controller: Running, run: Run, tmp_path: Path) -> None:
    safe, bundle = controller.move_keys(KeyRole.ROOT), tmp_path / "staged.json"
    one, two, _ = sorted((safe / "root").iterdir())
    assert "staged" in done(run("signing", "rotate", "timestamp"))
    done(run("signing", "stage", str(bundle)))

    assert "must sign too" in done(invoke("signing", "sign", str(bundle), "--key", str(one), "--yes"))
    done(invoke("signing", "sign", str(bundle), "--key", str(two), "--yes"))
    done(run("signing", "publish", str(bundle)))

    assert json.loads(done(run("signing", "export-root")))["signed"]["version"] == 2


def test_an_unsigned_bundle_is_refused_with_the_missing_keys(
    controller: Running, run: Run, publish: Callable[[], None], tmp_path: Path
) -> None:
    controller.move_keys(KeyRole.TARGETS)
    publish()
    done(run("signing", "stage", str(tmp_path / "staged.json")))

    assert_refused(run("signing", "publish", str(tmp_path / "staged.json")), "more valid signatures")


def test_with_nothing_staged_there_is_nothing_to_carry(run: Run, tmp_path: Path) -> None:
    assert_refused(run("signing", "stage", str(tmp_path / "staged.json")), "nothing waits")
    assert not (tmp_path / "staged.json").exists()


def test_signing_asks_before_it_signs(
    controller: Running, run: Run, publish: Callable[[], None], tmp_path: Path
) -> None:
    safe, bundle = controller.move_keys(KeyRole.TARGETS), tmp_path / "staged.json"
    publish()
    done(run("signing", "stage", str(bundle)))
    before = bundle.read_bytes()

    refused = invoke("signing", "sign", str(bundle), "--key", str(safe))

    assert refused.exit_code == 1
    assert bundle.read_bytes() == before


def test_a_revoked_version_is_refused_to_whoever_deploys_it(run: Run, publish: Callable[[], None]) -> None:
    publish()
    publish()

    done(run("signing", "revoke", "meter", "--version", "1"))

    assert_refused(deploy(run, "meter:1"), "revoked")
    done(deploy(run, "meter:2"))


def test_revoke_wants_to_know_what(run: Run, publish: Callable[[], None]) -> None:
    publish()

    assert_refused(run("signing", "revoke", "meter"), "expected versions")


def test_a_key_made_elsewhere_takes_the_place_of_one(run: Run, tmp_path: Path) -> None:
    public_key = done(invoke("signing", "new-key", str(tmp_path / "root-4.pem"))).strip()

    done(run("signing", "rotate", "root", "--public-key", public_key))

    root = json.loads(done(run("signing", "export-root")))["signed"]
    assert public_key in {key["keyval"]["public"] for key in root["keys"].values()}
    assert_refused(invoke("signing", "new-key", str(tmp_path / "root-4.pem")), "there is a file already")


def test_status_says_which_keys_are_here_and_what_waits(
    controller: Running, run: Run, publish: Callable[[], None]
) -> None:
    controller.move_keys(KeyRole.ROOT, KeyRole.TARGETS)
    publish()

    table = done(run("signing", "status"))
    found = json.loads(done(run("signing", "status", "-o", "json")))

    assert "0 of 3, 2 sign" in table
    assert "nanofleet signing stage" in table
    here = {role["role"]: all(key["is_here"] for key in role["keys"]) for role in found["roles"]}
    assert here == {"root": False, "targets": False, "snapshot": True, "timestamp": True, "director": True}
    assert [role["role"] for role in found["staged"]] == ["targets", "family-meter"]


def test_the_root_is_written_to_a_file_as_it_was_signed(run: Run, tmp_path: Path) -> None:
    done(run("signing", "export-root", str(tmp_path / "root.json")))

    assert (tmp_path / "root.json").read_text() == done(run("signing", "export-root")).rstrip("\n")


@pytest.mark.parametrize("content", [b"", b"{}", b"\xff"])
def test_a_file_that_is_no_bundle_is_refused(run: Run, tmp_path: Path, content: bytes) -> None:
    (tmp_path / "staged.json").write_bytes(content)

    assert_refused(run("signing", "publish", str(tmp_path / "staged.json")), "bundle")


def test_copies_of_keys_are_checked_by_their_ids(controller: Running, run: Run) -> None:
    found = json.loads(done(run("signing", "status", "-o", "json")))
    ids = {role["role"]: role["keys"][0]["id"][:16] for role in found["roles"]}

    table = done(invoke("signing", "keys", str(controller.folder / "keys")))

    assert all(key_id in table for key_id in ids.values())


def test_a_root_kept_elsewhere_gets_no_new_key_here(controller: Running, run: Run) -> None:
    controller.move_keys(KeyRole.ROOT)

    assert_refused(run("signing", "rotate", "root"), "nanofleet signing new-key", "--public-key")
