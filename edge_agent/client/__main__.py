"""`python -m edge_agent.client`: a camera that sends its pictures one after another and notes every answer.

The pictures come from an .npz file with `inputs` (n, features) float32; the report has one JSON object per line and
picture, and one last object with the totals. With `--otlp` each sampled request starts the trace that its answer ends.
"""

import argparse
import json
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from opentelemetry.trace import SpanKind, Status, StatusCode

from core.addresses import parse_address
from core.telemetry import TRACEPARENT, Tracing, TracingSettings, traceparent_of
from core.tls_files import folder_context, read_tls_identity
from edge_agent.client.device import DeviceClient
from edge_agent.client.messages import NoReply, Protocol, Reply


def main() -> int:
    arguments = parse_arguments()
    tracing = make_tracing(arguments)
    broker = parse_address(arguments.broker)
    device = DeviceClient(
        arguments.client,
        site=arguments.site,
        broker=(broker.host, broker.port),
        protocol=Protocol(arguments.protocol),
        tls=None if arguments.broker_tls is None else folder_context(arguments.broker_tls),
    )
    try:
        # Line by line, so that who watches the report sees each answer at once.
        with device, arguments.report.open("w", buffering=1) as report:
            for index, picture in pictures(arguments):
                row = {"index": index, **ask_once(device, tracing, arguments, picture), "at_s": time.time()}
                report.write(json.dumps(row) + "\n")
                time.sleep(arguments.pause_ms / 1000)
            report.write(json.dumps({"totals": asdict(device.counters)}) + "\n")
    except NoReply as error:
        print(f"{arguments.client}: {error}", file=sys.stderr)
        return 1
    finally:
        tracing.shutdown()
    return 0


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m edge_agent.client", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--broker", required=True, help="MQTT broker, host:port")
    parser.add_argument("--broker-tls", type=Path, help="folder of `nanofleet authority certify --role device`")
    parser.add_argument("--protocol", choices=[protocol.value for protocol in Protocol], default="5")
    parser.add_argument("--site", required=True)
    parser.add_argument("--client", required=True, help="this camera's id")
    parser.add_argument("--agent", help="agent to ask, or `any` (default: the nearest, and others if it fails)")
    parser.add_argument("--model", required=True)
    parser.add_argument("--input-name", required=True, help="name of the model's input tensor")
    parser.add_argument("--pictures", type=Path, required=True, help=".npz file with `inputs` (n, features) float32")
    parser.add_argument("--take", default="1/1", help="K/N: send every N-th picture, starting with the K-th")
    parser.add_argument("--pause-ms", type=int, default=0, help="pause between two pictures (default: none)")
    parser.add_argument("--deadline-ms", type=int, default=5000)
    parser.add_argument("--qos", type=int, choices=(0, 1), default=1)
    parser.add_argument("--privacy", choices=("device", "site", "any"), default="any", help="where a picture may go")
    parser.add_argument("--otlp", help="the controller's gRPC address for spans, host:port")
    parser.add_argument("--tls", type=Path, help="folder of `nanofleet authority certify`, to send spans as")
    parser.add_argument("--sample-ratio", type=float, default=0.1, help="share of requests traced (default: 0.1)")
    parser.add_argument("--report", type=Path, required=True, help="JSON-lines file to write")
    return parser.parse_args()


def make_tracing(arguments: argparse.Namespace) -> Tracing:
    endpoint = parse_address(arguments.otlp) if arguments.otlp else None
    credentials = read_tls_identity(arguments.tls) if arguments.tls else None
    settings = TracingSettings(endpoint, arguments.sample_ratio if endpoint else 0.0)
    attributes = {"service.instance.id": arguments.client, "nanofleet.site": arguments.site}
    return Tracing("nanofleet-device", settings, attributes=attributes, credentials=credentials)


def pictures(arguments: argparse.Namespace) -> Iterator[tuple[int, list[float]]]:
    kth, nth = (int(part) for part in arguments.take.split("/"))
    with np.load(arguments.pictures, allow_pickle=False) as archive:
        inputs = archive["inputs"]
    for index in range(kth - 1, len(inputs), nth):
        yield index, inputs[index].ravel().tolist()


def ask_once(
    device: DeviceClient, tracing: Tracing, arguments: argparse.Namespace, picture: list[float]
) -> dict[str, Any]:
    tensor = {"name": arguments.input_name, "shape": [1, len(picture)], "datatype": "FP32", "data": picture}
    context: Mapping[str, str] = {}
    started_s = time.perf_counter()
    try:
        with device_span(tracing, arguments) as context:
            reply = device.ask(
                arguments.model,
                {"inputs": [tensor]},
                agent=arguments.agent,
                deadline_s=arguments.deadline_ms / 1000,
                qos=arguments.qos,
                properties={"privacy": arguments.privacy, **context},
            )
    except NoReply:
        return {"lost": True, **context}
    return {"lost": False, "latency_ms": (time.perf_counter() - started_s) * 1000, **row_of(reply), **context}


def row_of(reply: Reply) -> dict[str, Any]:
    outputs = {output["name"]: output["data"] for output in reply.body.get("outputs", ())}
    return {
        "status": reply.status,
        "agent": reply.agent,
        "tier": reply.tier,
        "reason": reply.reason,
        "outputs": outputs,
        "error": reply.body.get("error"),
    }


@contextmanager
def device_span(tracing: Tracing, arguments: argparse.Namespace) -> Iterator[Mapping[str, str]]:
    """Span the request if it is sampled; yields the trace context to send along."""
    if not tracing.is_sampled(None):
        yield {}
        return
    attributes = {
        "messaging.system": "mqtt",
        "messaging.operation.name": "publish",
        "messaging.operation.type": "send",
        "messaging.destination.template": "nf/v1/{site}/infer/{agent}/{model}",
        "messaging.client.id": arguments.client,
        "nanofleet.privacy": arguments.privacy,
    }
    with tracing.tracer.start_as_current_span(
        f"ask {arguments.model}", kind=SpanKind.PRODUCER, attributes=attributes
    ) as span:
        try:
            yield {TRACEPARENT: traceparent_of(span)}
        except NoReply:
            span.set_status(Status(StatusCode.ERROR, "no reply"))
            raise


if __name__ == "__main__":
    sys.exit(main())
