"""tritonclient.http against a server.

    python -m tests.conformance.clients.http_checks HOST:PORT [--credential FILE] [CHECK …]

FILE is what `nanofleet operators add NAME --role viewer --save FILE` writes.
"""

import asyncio
import json
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import tritonclient.http as http_client  # type: ignore[import-not-found]
import tritonclient.http.aio as aio_client  # type: ignore[import-not-found]

from tests.conformance.clients.checks import (
    SAMPLES,
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

# FP16 has no JSON form in the protocol.
JSON_SAMPLES = {name: array for name, array in SAMPLES.items() if name != "FP16"}


class Bearer(http_client.InferenceServerClientPlugin):  # type: ignore[misc]  # the client is not installed here
    """Says who asks, on every request."""

    def __init__(self, credential: Path) -> None:
        self._value = f"Bearer {json.loads(credential.read_bytes())['secret']}"

    def __call__(self, request: Any) -> None:
        request.headers["authorization"] = self._value


def dialect_of(address: str, credential: Path | None) -> Dialect:
    return Dialect(
        module=http_client,
        connect=partial(_connect, address, credential),
        statuses={
            "unknown": "404",
            "absent": "404",
            "invalid": "400",
            "too large": "413",
            "too late": "504",
        },
        metadata_of=lambda client, model: client.get_model_metadata(model),
        index_of=lambda client: client.get_model_repository_index(),
        server_metadata_of=lambda client: client.get_server_metadata(),
        statistics_of=lambda client, model: client.get_inference_statistics(model),
        response_of=lambda result: result.get_response(),
    )


def _connect(address: str, credential: Path | None, flavour: Any, **options: Any) -> Any:
    client = flavour.InferenceServerClient(address, **options)
    if credential is not None:
        client.register_plugin(Bearer(credential))
    return client


def _arithmetic(*, binary_data: bool) -> list[Any]:
    made = [http_client.InferInput("a", [2, 4], "FP32"), http_client.InferInput("b", [2, 4], "FP32")]
    for each, array in zip(made, (A, B), strict=True):
        each.set_data_from_numpy(array, binary_data=binary_data)
    return made


def every_datatype_comes_back_as_json(client: Any, dialect: Dialect) -> None:
    inputs = dialect.everything()
    for each in inputs:
        if each.name() != "in_FP16":
            each.set_data_from_numpy(SAMPLES[each.name().removeprefix("in_")], binary_data=False)
    outputs = [http_client.InferRequestedOutput(f"out_{name}", binary_data=False) for name in JSON_SAMPLES]
    result = client.infer("everything", inputs, outputs=outputs)
    for name, array in JSON_SAMPLES.items():
        found = result.as_numpy(f"out_{name}")
        if name == "BYTES":
            # The client hands JSON strings over as text.
            found = np.array([[text.encode() for text in row] for row in found], np.object_)
        require_array(found, array)
    assert all("data" in output for output in result.get_response()["outputs"])


def json_and_binary_mix_in_one_request(client: Any, _dialect: Dialect) -> None:
    inputs = [_arithmetic(binary_data=False)[0], _arithmetic(binary_data=True)[1]]
    outputs = [
        http_client.InferRequestedOutput("difference", binary_data=False),
        http_client.InferRequestedOutput("sum", binary_data=True),
    ]
    result = client.infer("arithmetic", inputs, outputs=outputs)
    require_array(result.as_numpy("difference"), A - B)
    require_array(result.as_numpy("sum"), A + B)
    require_equal(["data" in output for output in result.get_response()["outputs"]], [True, False])


def a_json_request_may_have_binary_answers(client: Any, _dialect: Dialect) -> None:
    result = client.infer("arithmetic", _arithmetic(binary_data=False))
    require_array(result.as_numpy("product"), A * B)
    require_equal(["data" in output for output in result.get_response()["outputs"]], [False] * 3)


def compressed_requests_are_read(client: Any, dialect: Dialect) -> None:
    for algorithm in ("gzip", "deflate"):
        result = client.infer("arithmetic", dialect.arithmetic(), request_compression_algorithm=algorithm)
        require_array(result.as_numpy("sum"), A + B)


def asking_for_compressed_answers_does_no_harm(client: Any, dialect: Dialect) -> None:
    result = client.infer("arithmetic", dialect.arithmetic(), response_compression_algorithm="gzip")
    require_array(result.as_numpy("sum"), A + B)


def sixteen_requests_in_flight_are_answered(client: Any, dialect: Dialect) -> None:
    pending = [client.async_infer("arithmetic", dialect.arithmetic(), request_id=str(kth)) for kth in range(16)]
    for kth, each in enumerate(pending):
        result = each.get_result()
        require_equal(result.get_response()["id"], str(kth))
        require_array(result.as_numpy("sum"), A + B)


def the_asyncio_client_is_answered(_client: Any, dialect: Dialect) -> None:
    async def ask() -> Any:
        async with dialect.connect(aio_client) as client:
            assert await client.is_server_ready()
            return await client.infer("arithmetic", dialect.arithmetic())

    require_array(asyncio.run(ask()).as_numpy("sum"), A + B)


CHECKS = (
    *SHARED,
    every_datatype_comes_back_as_json,
    json_and_binary_mix_in_one_request,
    a_json_request_may_have_binary_answers,
    compressed_requests_are_read,
    asking_for_compressed_answers_does_no_harm,
    sixteen_requests_in_flight_are_answered,
    the_asyncio_client_is_answered,
)


if __name__ == "__main__":
    arguments = parse_arguments("credential")
    spoken = dialect_of(arguments.address, arguments.credential)
    # Closed here: collected as garbage inside gevent's hub, the client waits for itself for ever (seen with 2.73.0).
    with spoken.connect(http_client, concurrency=8) as http:
        run_checks(checks_of(CHECKS, arguments), http, spoken, chosen=arguments.checks)
