"""Both doctors on real machines: a controller and an agent that run, then with one thing broken after the other."""

import json
import os
import socket
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric import ec

from controller.demo.ports import free_port
from core.ids import AgentId, SiteId
from edge_agent.doctor.broker import BrokerIdentity, check_broker
from edge_agent.settings import MqttSettings
from tests.support.controller_process import ControllerProcess
from tests.support.enrolment import FakeAuthority, pem_of_key
from tests.support.https_certificate import TestAuthority
from tests.support.mosquitto import Mosquitto, running_mosquitto

SITE, AGENT = SiteId("berlin"), AgentId("gate-1")
TIMEOUT_S = 60.0


class _Ready(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.send_response(200)
        self.send_header("content-length", "0")
        self.end_headers()

    def log_message(self, *_: object) -> None:
        pass


@contextmanager
def ready_heavy_tier() -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Ready)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


@dataclass(frozen=True, slots=True)
class Found:
    code: int
    findings: dict[str, Any]

    @property
    def verdicts(self) -> dict[str, str]:
        return {check: finding["verdict"] for check, finding in self.findings.items()}

    @property
    def problems(self) -> set[str]:
        return {check for check, verdict in self.verdicts.items() if verdict == "problem"}


def examined(*command: str | Path, env: dict[str, str] | None = None) -> Found:
    done = subprocess.run(
        [sys.executable, "-m", *command, "--output", "json"],
        env=env,
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
    )
    assert "Traceback" not in done.stderr
    document = json.loads(done.stdout)
    assert document["is_well"] is (done.returncode == 0)
    return Found(done.returncode, {finding["check"]: finding for finding in document["findings"]})


@dataclass(frozen=True, slots=True)
class Machines:
    folder: Path
    controller: ControllerProcess
    env: dict[str, str]
    agent: "subprocess.Popen[bytes]"
    mosquitto: Any

    def agent_doctor(self) -> Found:
        return examined("edge_agent", "doctor", "--config", self.folder / "agent.toml")

    def controller_doctor(self, **changed: str) -> Found:
        return examined("controller.cli.app", "doctor", env={**self.env, **changed})


@pytest.fixture(scope="module")
def machines(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Machines]:
    """Yield a controller, a broker and an agent that has enrolled and runs."""
    folder = tmp_path_factory.mktemp("machines")
    (folder / "broker").mkdir()
    with ExitStack() as stack:
        heavy = stack.enter_context(ready_heavy_tier())
        broker = stack.enter_context(running_mosquitto(folder / "broker"))
        settings = {f"NANOFLEET_{name}_BIND": f"127.0.0.1:{free_port()}" for name in ("GRPC", "ENROLMENT", "HTTP")}
        settings |= {"NANOFLEET_HEAVY__URL": heavy, "NANOFLEET_HEAVY__MODE": "url"}
        controller = stack.enter_context(ControllerProcess(folder / "data", **settings))
        env = {**os.environ, **settings, "NANOFLEET_DATA_DIR": str(folder / "data")}
        env["NANOFLEET_CREDENTIAL"] = str(controller.credential())
        (folder / "agent.toml").write_text(
            f'state_dir = "{folder / "agent"}"\ngrpc_bind = "127.0.0.1:{free_port()}"\n[mqtt]\nport = {broker.port}\n'
            "[link]\nfirst_delay_s = 0.0\n"
        )
        agent = stack.enter_context(enrolled_agent(folder, env))
        yield Machines(folder, controller, env, agent, broker)


@contextmanager
def enrolled_agent(folder: Path, env: dict[str, str]) -> Iterator["subprocess.Popen[bytes]"]:
    token = subprocess.run(
        [sys.executable, "-m", "controller.cli.app", "devices", "token", "--site", SITE],
        env=env,
        capture_output=True,
        text=True,
        check=True,
    )
    agent = (sys.executable, "-m", "edge_agent")
    place = ("--config", folder / "agent.toml")
    subprocess.run([*agent, "enrol", "-", *place, "--name", AGENT], input=token.stdout, text=True, check=True)
    with (folder / "agent.log").open("wb") as log:
        process = subprocess.Popen([*agent, "run", *place], stdout=log, stderr=log)
    try:
        until_s = time.monotonic() + TIMEOUT_S
        while not is_connected(folder / "agent" / "status.json"):
            assert process.poll() is None, (folder / "agent.log").read_text()
            assert time.monotonic() < until_s, (folder / "agent.log").read_text()
            time.sleep(0.05)
        yield process
    finally:
        process.kill()
        process.wait()


def is_connected(status: Path) -> bool:
    if not status.exists():
        return False
    document = json.loads(status.read_bytes())
    return bool(document["controller"]["is_connected"] and document["broker"]["is_connected"])


def test_an_agent_that_runs_well_has_no_problem(machines: Machines) -> None:
    found = machines.agent_doctor()

    assert (found.code, found.problems) == (0, set())
    for check in ("agent", "identity", "certificate", "controller", "enrolment port", "broker", "broker permissions"):
        assert found.verdicts[check] == "ok", found.findings[check]
    assert "lets us in" in found.findings["controller"]["found"]


def test_the_doctor_does_not_throw_a_running_agent_out_of_its_broker(machines: Machines) -> None:
    before = json.loads((machines.folder / "agent" / "status.json").read_bytes())["broker"]["since"]
    machines.agent_doctor()
    after = json.loads((machines.folder / "agent" / "status.json").read_bytes())["broker"]
    assert (after["is_connected"], after["since"]) == (True, before)


def test_a_controller_that_runs_well_has_no_problem(machines: Machines) -> None:
    found = machines.controller_doctor()

    assert (found.code, found.problems) == (0, set())
    for check in ("credential", "controller", "clock skew", "database", "catalogue", "key files", "certificate"):
        assert found.verdicts[check] == "ok", found.findings[check]
    for check in ("agents port", "enrolment port", "operators port", "heavy tier", "ONNX Runtime"):
        assert found.verdicts[check] == "ok", found.findings[check]


def test_a_key_that_others_can_read_is_found(machines: Machines) -> None:
    key = next((machines.folder / "data" / "keys").rglob("*.pem"))
    key.chmod(0o644)
    try:
        found = machines.controller_doctor()
    finally:
        key.chmod(0o600)
    assert (found.code, found.problems) == (1, {"key files"})
    assert f"chmod 600 {key}" in found.findings["key files"]["remedy"]


def test_a_host_that_is_advertised_but_not_listened_on_is_found(machines: Machines) -> None:
    found = machines.controller_doctor(NANOFLEET_ADVERTISED_HOST="192.0.2.7")
    assert found.problems == {"advertised host"}
    assert "grpc_bind = " in found.findings["advertised host"]["remedy"]


def test_a_heavy_tier_that_is_away_is_found(machines: Machines) -> None:
    found = machines.controller_doctor(NANOFLEET_HEAVY__URL="http://127.0.0.1:9")
    assert found.problems == {"heavy tier"}


def test_settings_that_do_not_fit_are_found(machines: Machines) -> None:
    assert machines.controller_doctor(NANOFLEET_NO_SUCH="1").problems == {"settings"}


def test_a_secret_that_the_controller_does_not_know_is_found(machines: Machines, tmp_path: Path) -> None:
    credential = json.loads(Path(machines.env["NANOFLEET_CREDENTIAL"]).read_text())
    other = tmp_path / "other.json"
    other.touch(mode=0o600)
    other.write_text(json.dumps({**credential, "secret": credential["secret"][:-1] + "x"}))
    found = machines.controller_doctor(NANOFLEET_CREDENTIAL=str(other))
    assert found.problems == {"controller"}
    assert "operators rotate" in found.findings["controller"]["remedy"]


def test_an_agent_of_another_fleet_is_found(machines: Machines, tmp_path: Path) -> None:
    with ControllerProcess(tmp_path / "other") as other:
        address = other.endpoints()["controller_grpc"]
        env = {**os.environ, "NANOFLEET_AGENT_CONTROLLER": address}
        found = examined("edge_agent", "doctor", "--config", machines.folder / "agent.toml", env=env)
    assert found.problems == {"controller"}
    assert "does not prove to be our controller" in found.findings["controller"]["found"]


def test_a_machine_that_is_not_enrolled_is_told_how(tmp_path: Path) -> None:
    env = {**os.environ, "NANOFLEET_AGENT_STATE_DIR": str(tmp_path), "NANOFLEET_AGENT_MQTT__ENABLED": "false"}
    found = examined("edge_agent", "doctor", env=env)
    assert found.problems == {"identity"}
    assert "nanofleet devices token" in found.findings["identity"]["remedy"]
    assert {found.verdicts[check] for check in ("agent", "certificate", "controller", "broker")} == {"skipped"}


def test_the_agents_doctor_imports_nothing_heavy() -> None:
    program = (
        "import sys; import edge_agent.doctor.command; "
        "sys.exit(str({'onnxruntime', 'cryptography', 'tuf', 'controller'} & sys.modules.keys() or ''))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.stderr.strip() == ""


# ---- the broker -------------------------------------------------------------------------------------------------


def judged(port: int, *, protocol: Any = 5, is_running: bool = False) -> dict[str, Any]:
    found = check_broker(MqttSettings(port=port, protocol=protocol), SITE, AGENT, is_running=is_running)
    return {finding.check: finding for finding in found}


@pytest.mark.parametrize("protocol", [5, 4])
def test_a_broker_that_is_set_up_well_is_fine(tmp_path: Path, protocol: int) -> None:
    with running_mosquitto(tmp_path) as broker:
        found = judged(broker.port, protocol=protocol)
    assert [finding.verdict.value for finding in found.values()] == ["ok", "ok", "ok"], found


def test_a_broker_with_nagles_algorithm_on_is_found_by_its_delay(tmp_path: Path) -> None:
    with running_mosquitto(tmp_path, nodelay=False) as broker:
        found = judged(broker.port)["broker delay"]
    assert found.verdict.value == "warning", found
    assert "set_tcp_nodelay true" in found.remedy


def test_an_acl_that_forbids_what_an_agent_does_is_found(tmp_path: Path) -> None:
    acl = f"topic read nf/v1/{SITE}/infer/{AGENT}/#\ntopic readwrite nf/v1/{SITE}/clients/+/replies/#\n"
    with running_mosquitto(tmp_path, acl=acl) as broker:
        found = judged(broker.port)["broker permissions"]
    assert found.verdict.value == "problem", found
    assert f"nf/v1/{SITE}/agents/{AGENT}/status" in found.found
    assert f"nf/v1/{SITE}/infer/{AGENT}/" not in found.found


def test_a_broker_that_is_away_is_found(unused_tcp_port: int) -> None:
    found = judged(unused_tcp_port)["broker"]
    assert found.verdict.value == "problem"
    assert "systemctl start mosquitto" in found.remedy


def test_what_answers_at_the_brokers_port_and_is_none_is_found() -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        found = judged(silent.getsockname()[1])["broker"]
    assert found.verdict.value == "problem"
    assert "no answer to CONNECT" in found.found


@contextmanager
def tls_broker(folder: Path, *, server: TestAuthority, clients: FakeAuthority) -> Iterator[int]:
    """Yield the port of a broker that shows a certificate and asks for one."""
    pair = server.pair()
    for name, content in (("chain", pair.chain), ("key", pair.key), ("trust", clients.pem)):
        (folder / f"{name}.pem").write_bytes(content)
    broker = Mosquitto(folder)
    lines = f"certfile {folder}/chain.pem\nkeyfile {folder}/key.pem\ncafile {folder}/trust.pem\n"
    config = folder / "mosquitto.conf"
    config.write_text(config.read_text() + lines + "require_certificate true\n")
    broker.start()
    try:
        yield broker.port
    finally:
        broker.kill()


def shown_to_broker(
    folder: Path, authority: FakeAuthority, *, believed: TestAuthority, server_name: str = "127.0.0.1"
) -> BrokerIdentity:
    key = ec.generate_private_key(ec.SECP256R1())
    (folder / "own.pem").write_bytes(pem_of_key(key) + authority.certified(key.public_key(), AGENT))
    context = ssl.create_default_context(cadata=believed.bundle)
    context.load_cert_chain(folder / "own.pem")
    return BrokerIdentity(context, server_name)


def test_a_broker_over_tls_is_asked_with_the_agents_certificate(tmp_path: Path) -> None:
    server, fleet = TestAuthority(), FakeAuthority()
    with tls_broker(tmp_path, server=server, clients=fleet) as port:
        settings = MqttSettings(port=port)
        own = shown_to_broker(tmp_path, fleet, believed=server)
        posing = shown_to_broker(tmp_path, fleet, believed=server, server_name="broker.example")
        stranger = shown_to_broker(tmp_path, FakeAuthority(), believed=server)
        alone = check_broker(settings, SITE, AGENT, is_running=False, tls=own)
        beside = check_broker(settings, SITE, AGENT, is_running=True, tls=own)
        [unproven] = check_broker(settings, SITE, AGENT, is_running=False, tls=posing)
        [refused] = check_broker(settings, SITE, AGENT, is_running=False, tls=stranger)
    assert [finding.verdict.value for finding in alone] == ["ok", "ok", "ok"], alone
    assert [finding.verdict.value for finding in beside] == ["ok", "skipped"]
    assert (unproven.verdict.value, "TLS" in unproven.found) == ("problem", True)
    assert (refused.verdict.value, "does it take our certificate" in refused.found) == ("problem", True), refused


# ---- without a controller that runs -----------------------------------------------------------------------------


def test_a_controller_that_does_not_run_is_examined_too(tmp_path: Path) -> None:
    prepared = ControllerProcess(tmp_path / "data")
    assert prepared.process is None
    with socket.create_server(("127.0.0.1", 0)) as taken:
        bind = f"127.0.0.1:{taken.getsockname()[1]}"
        env = {
            **os.environ,
            "NANOFLEET_DATA_DIR": str(tmp_path / "data"),
            "NANOFLEET_GRPC_BIND": bind,
            "NANOFLEET_ENROLMENT_BIND": f"127.0.0.1:{free_port()}",
            "NANOFLEET_HTTP_BIND": f"127.0.0.1:{free_port()}",
            "NANOFLEET_CONTROLLER": f"http://127.0.0.1:{free_port()}",
            "XDG_CONFIG_HOME": str(tmp_path),
        }
        found = examined("controller.cli.app", "doctor", env=env)
    assert found.problems == {"controller", "agents port"}
    assert "ss -ltnp" in found.findings["agents port"]["remedy"]
    assert found.verdicts["database"] == found.verdicts["Ray"] == "ok"
    assert found.verdicts["heavy tier"] == found.verdicts["certificate"] == found.verdicts["credential"] == "skipped"


def test_a_damaged_database_is_found(tmp_path: Path) -> None:
    ControllerProcess(tmp_path / "data")
    database = tmp_path / "data" / "controller.sqlite"
    with database.open("r+b") as file:
        file.seek(4096)
        file.write(b"\xff" * 4096)
    env = {**os.environ, "NANOFLEET_DATA_DIR": str(tmp_path / "data"), "XDG_CONFIG_HOME": str(tmp_path)}
    found = examined("controller.cli.app", "doctor", env=env)
    assert "database" in found.problems
    assert "backup" in found.findings["database"]["remedy"]
