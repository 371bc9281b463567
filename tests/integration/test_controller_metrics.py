"""What a real controller shows Prometheus, to whom, and in which format."""

import asyncio
from pathlib import Path

import grpc
import httpx
import pytest

from core.addresses import parse_address
from core.exposition import OPEN_METRICS, TEXT
from core.grpc_transport import open_channel
from core.spiffe import Role
from protos.inference.v2 import open_inference_pb2 as pb
from protos.inference.v2.open_inference_pb2_grpc import GRPCInferenceServiceStub
from tests.support.controller_process import ControllerProcess
from tests.support.exposed import numbers
from tests.support.fake_agent import Dialler
from tests.support.fleet_values import CAM, made_hello

ACCEPT = "application/openmetrics-text;version=1.0.0,text/plain;version=0.0.4;q=0.5"

REQUEST = pb.ModelInferRequest(
    model_name="made-up",
    inputs=[pb.ModelInferRequest.InferInputTensor(name="x", datatype="FP32", shape=[1])],
    raw_input_contents=[bytes(4)],
)


async def use_it(controller: ControllerProcess, grpc_address: str) -> bytes:
    """Be an agent, and an application that asks for a model that nobody has; return what is shown meanwhile."""
    dialler = Dialler(parse_address(grpc_address), controller.tls(Role.AGENT, CAM))
    application = controller.tls(Role.APPLICATION, "line-7")
    async with dialler.dial() as agent, open_channel(parse_address(grpc_address), application) as channel:
        hello = made_hello()
        await agent.hello(hello)
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await GRPCInferenceServiceStub(channel).ModelInfer(REQUEST, timeout=10)
        assert refused.value.code() is grpc.StatusCode.NOT_FOUND
        async with controller.http() as http:
            shown = await http.get("/metrics", headers={"accept": ACCEPT})
    await dialler.close()
    assert shown.headers["content-type"] == OPEN_METRICS
    return shown.content


def test_a_controller_shows_its_agents_calls_and_stores(tmp_path: Path) -> None:
    with ControllerProcess(tmp_path / "controller") as controller:
        endpoints = controller.endpoints()
        http = endpoints["controller_http"]
        unknown = httpx.get(f"{http}/metrics", headers={"authorization": "Bearer nfo1.no"})
        exposition = asyncio.run(use_it(controller, endpoints["controller_grpc"]))
        plain = httpx.get(f"{http}/metrics", headers=controller.bearer)

    assert unknown.status_code == 401
    assert plain.headers["content-type"] == TEXT
    shown = numbers(exposition)

    def of(name: str, **labels: str) -> float:
        return shown[name, frozenset(labels.items())]

    assert of("nanofleet_sessions", site=str(made_hello().site)) == 1
    assert of("nanofleet_devices", state="online") == 1
    assert of("nanofleet_gateway_requests_total", model="", status="not_found") == 1
    infer = "inference.GRPCInferenceService/ModelInfer"
    call = {"rpc_system_name": "grpc", "rpc_method": infer, "rpc_response_status_code": "NOT_FOUND"}
    assert of("rpc_server_call_duration_seconds_count", **call) == 1
    refused = {"http_request_method": "GET", "http_route": "/metrics", "http_response_status_code": "401"}
    assert of("http_server_request_duration_seconds_count", **refused) == 1
    assert of("nanofleet_database_waiting", database="fleet") >= 0
    expiry = "nanofleet_catalogue_expiry_timestamp_seconds"
    roles = {dict(labels)["role"] for name, labels in shown if name == expiry}
    assert roles == {"root", "targets", "snapshot", "timestamp"}
    assert b"made-up" not in exposition
    assert CAM.encode() not in exposition
