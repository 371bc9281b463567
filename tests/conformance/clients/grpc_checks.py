"""tritonclient.grpc against a server.

    python -m tests.conformance.clients.grpc_checks HOST:PORT [--tls FOLDER] [CHECK …]

FOLDER is what `nanofleet authority certify` writes: `identity.pem` and `trust.pem`.
"""

import asyncio
import queue
from functools import partial
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import tritonclient.grpc as grpc_client  # type: ignore[import-not-found]
import tritonclient.grpc.aio as aio_client  # type: ignore[import-not-found]
from tritonclient.grpc import service_pb2

from tests.conformance.clients.checks import (
    SHARED,
    A,
    B,
    Dialect,
    checks_of,
    parse_arguments,
    require_array,
    require_equal,
    run_checks,
)

ANSWER_TIMEOUT_S = 30.0
# The one name in a controller's certificate, whatever its address.
CONTROLLER_NAME = "controller.nanofleet.internal"


def dialect_of(address: str, tls: Path | None) -> Dialect:
    return Dialect(
        module=grpc_client,
        connect=partial(_connect, address, tls),
        statuses={
            "unknown": "StatusCode.NOT_FOUND",
            "absent": "StatusCode.UNIMPLEMENTED",
            "invalid": "StatusCode.INVALID_ARGUMENT",
            "too large": "StatusCode.RESOURCE_EXHAUSTED",
            "too late": "StatusCode.DEADLINE_EXCEEDED",
        },
        metadata_of=lambda client, model: client.get_model_metadata(model, as_json=True),
        index_of=lambda client: client.get_model_repository_index(as_json=True)["models"],
        server_metadata_of=lambda client: client.get_server_metadata(as_json=True),
        statistics_of=lambda client, model: client.get_inference_statistics(model, as_json=True),
        response_of=lambda result: result.get_response(as_json=True),
    )


def _connect(address: str, tls: Path | None, flavour: Any) -> Any:
    if tls is None:
        return flavour.InferenceServerClient(address)
    identity = str(tls / "identity.pem")
    return flavour.InferenceServerClient(
        address,
        ssl=True,
        root_certificates=str(tls / "trust.pem"),
        private_key=identity,
        certificate_chain=identity,
        # In place of the client's own, which has no bounds.
        channel_args=[
            ("grpc.ssl_target_name_override", CONTROLLER_NAME),
            ("grpc.max_send_message_length", -1),
            ("grpc.max_receive_message_length", -1),
        ],
    )


def _typed_request() -> Any:
    request = service_pb2.ModelInferRequest(model_name="arithmetic", id="typed")
    for name, array in (("a", A), ("b", B)):
        tensor = request.inputs.add(name=name, datatype="FP32", shape=array.shape)
        tensor.contents.fp32_contents.extend(array.ravel().tolist())
    return request


def _stub_call(client: Any, request: Any) -> Any:
    # The client's public methods choose raw contents for us.
    return client._client_stub.ModelInfer(request, timeout=ANSWER_TIMEOUT_S)


def typed_contents_are_answered_with_typed_contents(client: Any, _dialect: Dialect) -> None:
    response = _stub_call(client, _typed_request())
    require_equal((response.id, len(response.raw_output_contents)), ("typed", 0))
    found = np.array(response.outputs[0].contents.fp32_contents, np.float32).reshape(2, 4)
    require_array(found, A + B)


def raw_contents_are_answered_with_raw_contents(client: Any, _dialect: Dialect) -> None:
    request = service_pb2.ModelInferRequest(model_name="arithmetic")
    for name, array in (("a", A), ("b", B)):
        request.inputs.add(name=name, datatype="FP32", shape=array.shape)
        request.raw_input_contents.append(array.tobytes())
    response = _stub_call(client, request)
    require_equal(response.raw_output_contents[0], (A + B).tobytes())
    assert not response.outputs[0].HasField("contents")


def raw_and_typed_contents_together_are_refused(client: Any, _dialect: Dialect) -> None:
    request = _typed_request()
    request.raw_input_contents.append(A.tobytes())
    try:
        _stub_call(client, request)
    except grpc.RpcError as error:
        require_equal(error.code(), grpc.StatusCode.INVALID_ARGUMENT)
        return
    raise AssertionError("expected a refusal, got an answer")


def compressed_requests_are_read(client: Any, dialect: Dialect) -> None:
    for algorithm in ("gzip", "deflate"):
        result = client.infer("arithmetic", dialect.arithmetic(), compression_algorithm=algorithm)
        require_array(result.as_numpy("sum"), A + B)


def callbacks_are_called_once_each(client: Any, dialect: Dialect) -> None:
    answers: queue.Queue[tuple[Any, Any]] = queue.Queue()
    for kth in range(16):
        client.async_infer(
            "arithmetic",
            dialect.arithmetic(),
            callback=lambda result, error: answers.put((result, error)),
            request_id=str(kth),
        )
    found = [answers.get(timeout=ANSWER_TIMEOUT_S) for _ in range(16)]
    assert all(error is None for _, error in found), found
    require_equal(sorted(int(result.get_response().id) for result, _ in found), list(range(16)))
    assert answers.empty()


def the_asyncio_client_is_answered(_client: Any, dialect: Dialect) -> None:
    async def ask() -> Any:
        async with dialect.connect(aio_client) as client:
            assert await client.is_server_ready()
            return await client.infer("arithmetic", dialect.arithmetic())

    require_array(asyncio.run(ask()).as_numpy("sum"), A + B)


CHECKS = (
    *SHARED,
    typed_contents_are_answered_with_typed_contents,
    raw_contents_are_answered_with_raw_contents,
    raw_and_typed_contents_together_are_refused,
    compressed_requests_are_read,
    callbacks_are_called_once_each,
    the_asyncio_client_is_answered,
)


if __name__ == "__main__":
    arguments = parse_arguments("tls")
    spoken = dialect_of(arguments.address, arguments.tls)
    with spoken.connect(grpc_client) as client_of_all:
        run_checks(checks_of(CHECKS, arguments), client_of_all, spoken, chosen=arguments.checks)
