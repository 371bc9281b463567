"""A real controller forwards spans over mutual TLS, and neither its death nor the collector's loses one."""

import asyncio
import time
from pathlib import Path

import grpc
from opentelemetry.proto.collector.trace.v1.trace_service_pb2_grpc import TraceServiceStub

from controller.demo.ports import free_port
from core.addresses import parse_address
from core.grpc_transport import open_channel
from core.spiffe import Role
from tests.support.controller_process import ControllerProcess
from tests.support.fleet_values import CAM
from tests.support.https_certificate import TestAuthority
from tests.support.otlp import made_otlp_span, made_request
from tests.support.otlp_collector import Collector, collecting

SPOOL_TIMEOUT_S = 20.0


def test_spans_outlive_a_killed_controller_and_reach_a_collector_that_was_away(tmp_path: Path) -> None:
    authority = TestAuthority()
    shown = authority.pair()
    for name, content in {"ca.pem": authority.bundle.encode(), "own.pem": shown.chain, "own.key": shown.key}.items():
        (tmp_path / name).write_bytes(content)
    (tmp_path / "headers").write_text("x-scope-orgid: fleet\n")
    port = free_port()
    process = ControllerProcess(
        tmp_path / "controller",
        NANOFLEET_TELEMETRY__FORWARD_TO=f"127.0.0.1:{port}",
        NANOFLEET_TELEMETRY__FORWARD_AUTHORITY=str(tmp_path / "ca.pem"),
        NANOFLEET_TELEMETRY__FORWARD_CERTIFICATE=str(tmp_path / "own.pem"),
        NANOFLEET_TELEMETRY__FORWARD_KEY=str(tmp_path / "own.key"),
        NANOFLEET_TELEMETRY__FORWARD_HEADERS=str(tmp_path / "headers"),
    )
    with process as controller:
        asyncio.run(export(controller, "before"))
        until = time.monotonic() + SPOOL_TIMEOUT_S
        while not any(path.stat().st_size for path in (tmp_path / "controller" / "trace-spool").glob("*.spool")):
            assert time.monotonic() < until, controller.log
            time.sleep(0.02)
        assert controller.process is not None
        controller.process.kill()
        controller.process.wait()
    controller.endpoints_file.unlink()
    with process as controller:
        collector = asyncio.run(collected(controller, authority, port))
    assert collector.names == ["before", "after"]
    assert collector.headers[0]["x-scope-orgid"] == "fleet"


async def export(controller: ControllerProcess, name: str) -> None:
    address = parse_address(controller.endpoints()["controller_grpc"])
    async with open_channel(address, controller.tls(Role.AGENT, CAM)) as channel:
        stub = TraceServiceStub(channel)  # type: ignore[no-untyped-call]  # generated without annotations
        await stub.Export(made_request(made_otlp_span(name=name)), timeout=10)


async def collected(controller: ControllerProcess, authority: TestAuthority, port: int) -> Collector:
    """Return a collector that has come up and got everything."""
    await export(controller, "after")
    collector, shown = Collector(), authority.pair()
    credentials = grpc.ssl_server_credentials(
        [(shown.key, shown.chain)], authority.bundle.encode(), require_client_auth=True
    )
    async with collecting(collector, port=port, credentials=credentials):
        await collector.has_named("after")
    return collector
