"""The controller as a whole, in a process of its own: its ports, its start and its end."""

import asyncio
import signal
import socket
import subprocess
import sys
from pathlib import Path

import grpc
import grpc.aio
import httpx
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from core.addresses import parse_address
from core.grpc_transport import TransportCredentials, open_channel
from protos.inference.v2 import open_inference_pb2 as pb
from protos.inference.v2.open_inference_pb2_grpc import GRPCInferenceServiceStub
from tests.support.controller_process import ControllerProcess
from tests.support.fake_agent import Dialler
from tests.support.fleet_values import made_hello


def test_every_face_answers_on_the_ports_that_were_announced(tmp_path: Path) -> None:
    with ControllerProcess(tmp_path / "controller") as controller:
        endpoints = controller.endpoints()

        assert httpx.get(f"{endpoints['controller_http']}/v2/health/live").json() == {"live": True}
        assert httpx.get(f"{endpoints['controller_http']}/api/health").is_success
        assert asyncio.run(grpc_answers(endpoints["controller_grpc"])) == (
            health_pb2.HealthCheckResponse.SERVING,
            "nanofleet",
        )


async def grpc_answers(address: str) -> tuple[object, str]:
    async with open_channel(parse_address(address), TransportCredentials.local()) as channel:
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
    dialler = Dialler(parse_address(endpoints["controller_grpc"]))
    async with httpx.AsyncClient(base_url=endpoints["controller_http"]) as http, dialler.dial() as agent:
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
            asyncio.run(say_hello(endpoints["controller_grpc"]))
            agents = httpx.get(f"{endpoints['controller_http']}/api/agents").json()["agents"]
            controller.send(signal.SIGTERM)
            assert controller.exit_code() == 0

    assert len(agents) == 1


async def say_hello(address: str) -> None:
    dialler = Dialler(parse_address(address))
    async with dialler.dial() as agent:
        await agent.hello(made_hello())
        await agent.leave()
    await dialler.close()


@pytest.mark.parametrize(("variable", "setting"), [("GRPC_BIND", "grpc_bind"), ("HTTP_BIND", "http_bind")])
def test_a_port_in_use_is_named_with_its_setting(tmp_path: Path, variable: str, setting: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        bind = f"127.0.0.1:{taken.getsockname()[1]}"
        with ControllerProcess(tmp_path / "controller", **{f"NANOFLEET_{variable}": bind}) as controller:
            assert controller.exit_code() != 0
            assert f"{setting}: cannot listen on {bind}" in controller.log


@pytest.mark.parametrize("collector", ["192.0.2.1:4317", "127.0.0.1:{own}"])
def test_a_collector_that_cannot_be_is_refused(tmp_path: Path, collector: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        own = free.getsockname()[1]
    environment = {
        "NANOFLEET_GRPC_BIND": f"127.0.0.1:{own}",
        "NANOFLEET_TELEMETRY__FORWARD_TO": collector.format(own=own),
    }
    with ControllerProcess(tmp_path / "controller", **environment) as controller:
        assert controller.exit_code() != 0
        assert "telemetry.forward_to" in controller.log


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
