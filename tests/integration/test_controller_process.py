"""The controller as a whole, in a process of its own: its ports, its start and its end."""

import asyncio
import signal
import socket
import ssl
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import grpc
import grpc.aio
import httpx
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from core.addresses import parse_address
from core.grpc_transport import MUTUAL_TLS_OPTIONS, TlsIdentity, open_channel
from core.spiffe import CONTROLLER_DNS_NAME, Role
from protos.inference.v2 import open_inference_pb2 as pb
from protos.inference.v2.open_inference_pb2_grpc import GRPCInferenceServiceStub
from tests.support.certified import FleetAuthority
from tests.support.controller_process import ControllerProcess
from tests.support.fake_agent import Dialler
from tests.support.fleet_values import CAM, made_hello


def test_every_face_answers_on_the_ports_that_were_announced(tmp_path: Path) -> None:
    with ControllerProcess(tmp_path / "controller") as controller:
        endpoints = controller.endpoints()

        http = endpoints["controller_http"]
        assert httpx.get(f"{http}/v2/health/live").json() == {"live": True}
        assert httpx.get(f"{http}/api/health", headers=controller.bearer).is_success
        application = controller.tls(Role.APPLICATION, "line-7")
        assert asyncio.run(grpc_answers(endpoints["controller_grpc"], application)) == (
            health_pb2.HealthCheckResponse.SERVING,
            "nanofleet",
        )


async def grpc_answers(address: str, application: TlsIdentity) -> tuple[object, str]:
    async with open_channel(parse_address(address), application) as channel:
        status = await health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=10)
        metadata = await GRPCInferenceServiceStub(channel).ServerMetadata(pb.ServerMetadataRequest(), timeout=10)
        return status.status, metadata.name


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_it_in_order_although_an_agent_and_a_long_poll_hang_on(
    tmp_path: Path, signum: signal.Signals
) -> None:
    with ControllerProcess(tmp_path / "controller") as controller:
        endpoints = controller.endpoints()
        ended = asyncio.run(hang_on(controller, endpoints, signum))

        assert controller.exit_code() == 0
        assert ended is grpc.StatusCode.UNAVAILABLE
        assert "has stopped" in controller.log
        assert "Traceback" not in controller.log
        assert not controller.endpoints_file.exists()


async def hang_on(controller: ControllerProcess, endpoints: dict[str, str], signum: signal.Signals) -> grpc.StatusCode:
    dialler = Dialler(parse_address(endpoints["controller_grpc"]), controller.tls(Role.AGENT, CAM))
    async with controller.http() as http, dialler.dial() as agent:
        await agent.hello(made_hello())
        revision = (await http.get("/api/agents")).json()["revision"]
        polling = asyncio.create_task(http.get("/api/agents", params={"wait_s": 10, "after": revision}, timeout=20))
        await asyncio.sleep(0)
        controller.send(signum)
        code, _ = await agent.end()
        await asyncio.wait([polling])
        # Cut off or answered early, never left hanging.
        assert polling.done()
        polling.exception()
    await dialler.close()
    return code


def test_what_was_deployed_and_reported_is_there_after_a_restart(tmp_path: Path) -> None:
    for _ in range(2):
        with ControllerProcess(tmp_path / "controller") as controller:
            endpoints = controller.endpoints()
            asyncio.run(say_hello(endpoints["controller_grpc"], controller.tls(Role.AGENT, CAM)))
            agents = httpx.get(f"{endpoints['controller_http']}/api/agents", headers=controller.bearer).json()["agents"]
            controller.send(signal.SIGTERM)
            assert controller.exit_code() == 0

    assert len(agents) == 1


async def say_hello(address: str, tls: TlsIdentity) -> None:
    dialler = Dialler(parse_address(address), tls)
    async with dialler.dial() as agent:
        await agent.hello(made_hello())
        await agent.leave()
    await dialler.close()


@pytest.mark.parametrize(
    ("variable", "setting"),
    [("GRPC_BIND", "grpc_bind"), ("ENROLMENT_BIND", "enrolment_bind"), ("HTTP_BIND", "http_bind")],
)
def test_a_port_in_use_is_named_with_its_setting(tmp_path: Path, variable: str, setting: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        bind = f"127.0.0.1:{taken.getsockname()[1]}"
        with ControllerProcess(tmp_path / "controller", **{f"NANOFLEET_{variable}": bind}) as controller:
            assert controller.exit_code() != 0
            assert f"{setting}: cannot listen on {bind}" in controller.log


@pytest.mark.parametrize(
    "telemetry",
    [
        {"FORWARD_TO": "127.0.0.1:{own}"},
        {"FORWARD_TO": "192.0.2.1:4317", "FORWARD_AUTHORITY": "missing.pem"},
        {"FORWARD_HEADERS": "headers"},
    ],
)
def test_a_collector_that_cannot_be_is_refused(tmp_path: Path, telemetry: dict[str, str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        own = free.getsockname()[1]
    environment = {"NANOFLEET_GRPC_BIND": f"127.0.0.1:{own}"}
    for name, value in telemetry.items():
        environment[f"NANOFLEET_TELEMETRY__{name}"] = value.format(own=own)
    with ControllerProcess(tmp_path / "controller", **environment) as controller:
        assert controller.exit_code() != 0
        assert "forward_to" in controller.log or "missing.pem: No such file" in controller.log


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ControllerProcess]:
    with ControllerProcess(tmp_path_factory.mktemp("controller") / "data") as controller:
        controller.endpoints()
        yield controller


PORTS = pytest.mark.parametrize("port", ["controller_grpc", "controller_enrolment"])


@PORTS
async def test_a_grpc_client_in_clear_gets_nothing(running: ControllerProcess, port: str) -> None:
    async with grpc.aio.insecure_channel(running.endpoints()[port]) as channel:
        assert await refusal(channel) is grpc.StatusCode.UNAVAILABLE


@PORTS
async def test_a_grpc_client_that_trusts_another_authority_says_nothing(running: ControllerProcess, port: str) -> None:
    foreign = FleetAuthority().identity(Role.APPLICATION).trust_bundle
    credentials = grpc.ssl_channel_credentials(foreign)
    async with grpc.aio.secure_channel(running.endpoints()[port], credentials, MUTUAL_TLS_OPTIONS) as channel:
        assert await refusal(channel) is grpc.StatusCode.UNAVAILABLE


async def test_a_grpc_client_without_a_certificate_gets_nothing(running: ControllerProcess) -> None:
    credentials = grpc.ssl_channel_credentials(running.trust_bundle)
    address = running.endpoints()["controller_grpc"]
    async with grpc.aio.secure_channel(address, credentials, MUTUAL_TLS_OPTIONS) as channel:
        assert await refusal(channel) is grpc.StatusCode.UNAVAILABLE


async def test_a_grpc_client_certified_by_another_authority_gets_nothing(running: ControllerProcess) -> None:
    foreign = FleetAuthority().identity(Role.APPLICATION)
    tls = TlsIdentity(foreign.certificate_chain, foreign.private_key, running.trust_bundle)
    async with open_channel(parse_address(running.endpoints()["controller_grpc"]), tls) as channel:
        assert await refusal(channel) is grpc.StatusCode.UNAVAILABLE


async def refusal(channel: grpc.aio.Channel) -> grpc.StatusCode:
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=10)
    return refused.value.code()


@pytest.mark.parametrize("path", ["/api/agents", "/api/models", "/v2/repository/index"])
@pytest.mark.parametrize("headers", [{}, {"authorization": "Bearer nf_wrong"}])
def test_an_operator_without_a_secret_is_told_to_sign_in(
    running: ControllerProcess, path: str, headers: dict[str, str]
) -> None:
    url = running.endpoints()["controller_http"] + path
    answer = httpx.post(url, headers=headers) if path.startswith("/v2") else httpx.get(url, headers=headers)

    assert answer.status_code == 401


def test_http_on_every_address_is_https_with_the_fleets_certificate(tmp_path: Path) -> None:
    environment = {"NANOFLEET_HTTP_BIND": "0.0.0.0:0", "NANOFLEET_ADVERTISED_HOST": "controller.example"}
    with ControllerProcess(tmp_path / "controller", **environment) as controller:
        bound = controller.endpoints()["controller_http"]
        url = bound.replace("0.0.0.0", "127.0.0.1") + "/api/health"  # noqa: S104 (replaced, not bound)
        context = ssl.create_default_context(cadata=controller.trust_bundle.decode())
        with httpx.Client(verify=context, headers=controller.bearer) as client:
            answer = client.get(url, extensions={"sni_hostname": CONTROLLER_DNS_NAME})

        assert bound.startswith("https://")
        assert answer.is_success
        with pytest.raises(httpx.HTTPError):
            httpx.get(url.replace("https", "http"))


def test_an_address_that_agents_cannot_dial_is_refused_before_anything_is_opened(tmp_path: Path) -> None:
    with ControllerProcess(tmp_path / "controller", NANOFLEET_GRPC_BIND="0.0.0.0:0") as controller:
        assert controller.exit_code() != 0
        assert "advertised_host: expected the name by which agents reach this machine" in controller.log


def test_the_trust_domain_of_a_fleet_that_lives_cannot_be_changed(tmp_path: Path) -> None:
    with ControllerProcess(tmp_path / "controller", NANOFLEET_TRUST_DOMAIN="other.test") as controller:
        assert controller.exit_code() != 0
        assert "trust_domain: expected nanofleet.local" in controller.log


def test_a_controller_without_operators_says_how_to_get_one(tmp_path: Path) -> None:
    with ControllerProcess(tmp_path / "controller") as controller:
        controller.endpoints()
        assert "controller init" not in controller.log
    with ControllerProcess(tmp_path / "controller", NANOFLEET_DATA_DIR=str(tmp_path / "new")) as controller:
        wait_for_log(controller, "run `nanofleet controller init`")


def wait_for_log(controller: ControllerProcess, words: str) -> None:
    until = time.monotonic() + 60
    while words not in controller.log:
        assert time.monotonic() < until, controller.log
        time.sleep(0.05)


STUBBORN = """
import asyncio
from core.signals import stop_on_signals

async def run():
    with stop_on_signals() as stopping:
        print("ready", flush=True)
        await stopping.wait()
        print("stopping", flush=True)
        await asyncio.Event().wait()

asyncio.run(run())
"""


def test_a_second_signal_ends_the_process_at_once() -> None:
    with subprocess.Popen([sys.executable, "-c", STUBBORN], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"ready\n"
        process.send_signal(signal.SIGTERM)
        assert process.stdout.readline() == b"stopping\n"
        process.send_signal(signal.SIGTERM)

        assert process.wait(10) == -signal.SIGTERM


@pytest.mark.parametrize("port", ["controller_grpc", "controller_enrolment"])
def test_who_speaks_no_tls_1_3_gets_no_handshake(tmp_path: Path, port: str) -> None:
    with ControllerProcess(tmp_path / "controller") as controller:
        address = parse_address(controller.endpoints()[port])
        older = ssl.create_default_context(ssl.Purpose.SERVER_AUTH)
        older.check_hostname, older.verify_mode = False, ssl.CERT_NONE
        older.maximum_version = ssl.TLSVersion.TLSv1_2
        with (
            socket.create_connection((address.host, address.port), timeout=10) as connection,
            pytest.raises(ssl.SSLError),
        ):
            older.wrap_socket(connection)
