"""The HTTP face of the Open Inference Protocol over an in-memory plane: what comes out, what is refused."""

import gzip
import zlib
from collections.abc import AsyncIterator, Callable
from typing import Any

import httpx
import numpy as np
import orjson
import pytest
import pytest_asyncio

from controller.api.open_inference_http import create_open_inference_app
from core.clock import SystemClock
from core.errors import DeadlineExceeded, InternalError, InvalidTensor, ModelNotReady, NanofleetError, Overloaded
from core.open_inference import binary_body
from core.open_inference.messages import BodyLimits, InferRequest
from core.tensors import Datatype, Tensor
from tests.support.echo_plane import EchoPlane

INFER = "/v2/models/echo/infer"
LIMITS = BodyLimits(max_body_bytes=4096)
Compress = Callable[[bytes], bytes]
TRACEPARENT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"


def body(**more: object) -> dict[str, Any]:
    return {"inputs": [{"name": "x", "shape": [1, 2], "datatype": "FP32", "data": [[1.5, -2.0]]}], **more}


@pytest.fixture
def plane() -> EchoPlane:
    return EchoPlane()


@pytest_asyncio.fixture
async def client(plane: EchoPlane) -> AsyncIterator[httpx.AsyncClient]:
    app = create_open_inference_app(
        plane, server_name="nanofleet", server_version="0.1.0", clock=SystemClock(), limits=LIMITS
    )
    transport = httpx.ASGITransport(app=app, raise_app_exceptions=False)
    async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1") as http:
        yield http


# ---- health and metadata ----------------------------------------------------------------------------------------


async def test_the_server_is_live(client: httpx.AsyncClient) -> None:
    response = await client.get("/v2/health/live")
    assert (response.status_code, response.json()) == (200, {"live": True})


async def test_readiness_is_told_by_the_status_too(client: httpx.AsyncClient, plane: EchoPlane) -> None:
    ready = await client.get("/v2/health/ready")
    plane.ready = False
    not_ready = await client.get("/v2/health/ready")
    assert (ready.status_code, ready.json()) == (200, {"live": True, "ready": True})
    assert (not_ready.status_code, not_ready.json()) == (503, {"live": True, "ready": False})


@pytest.mark.parametrize("path", ["/v2", "/v2/"])
async def test_the_server_says_its_name_and_extensions(client: httpx.AsyncClient, path: str) -> None:
    response = await client.get(path)
    assert response.json() == {
        "name": "nanofleet",
        "version": "0.1.0",
        "extensions": ["binary_tensor_data", "model_repository"],
    }


@pytest.mark.parametrize("path", ["/v2/models/echo", "/v2/models/echo/versions/1"])
async def test_a_model_is_described_with_and_without_version(client: httpx.AsyncClient, path: str) -> None:
    tensor = {"name": "x", "datatype": "FP32", "shape": [-1, 2]}
    assert (await client.get(path)).json() == {
        "name": "echo",
        "versions": ["1", "2"],
        "platform": "onnx_onnxv1",
        "inputs": [tensor],
        "outputs": [tensor],
        "properties": {"variant": "original"},
    }


@pytest.mark.parametrize(
    ("path", "status", "answer"),
    [
        ("/v2/models/echo/ready", 200, {"name": "echo", "ready": True}),
        ("/v2/models/echo/versions/2/ready", 200, {"name": "echo", "ready": True}),
        ("/v2/models/sleeping/ready", 503, {"name": "sleeping", "ready": False}),
    ],
)
async def test_a_models_readiness_is_told_by_the_status_too(
    client: httpx.AsyncClient, path: str, status: int, answer: dict[str, object]
) -> None:
    response = await client.get(path)
    assert (response.status_code, response.json()) == (status, answer)


async def test_the_index_lists_every_model(client: httpx.AsyncClient) -> None:
    entries = (await client.post("/v2/repository/index")).json()
    assert entries[-1] == {"name": "sleeping", "version": "1", "state": "UNAVAILABLE", "reason": "not loaded yet"}


async def test_the_index_can_be_asked_for_ready_models_only(client: httpx.AsyncClient) -> None:
    entries = (await client.post("/v2/repository/index", json={"ready": True})).json()
    assert [entry["state"] for entry in entries] == ["READY", "READY"]


# ---- inference --------------------------------------------------------------------------------------------------


async def test_a_json_request_gets_a_json_answer(client: httpx.AsyncClient) -> None:
    response = await client.post(INFER, json=body(id="42"))
    answer = response.json()
    assert (answer["id"], answer["model_name"], answer["model_version"]) == ("42", "echo", "2")
    assert np.array_equal(np.ravel(answer["outputs"][0]["data"]), [1.5, -2.0])


async def test_the_version_of_the_path_reaches_the_plane(client: httpx.AsyncClient, plane: EchoPlane) -> None:
    await client.post("/v2/models/echo/versions/1/infer", json=body())
    assert plane.requests[0].model_version == "1"


async def test_a_binary_request_gets_a_binary_answer(client: httpx.AsyncClient) -> None:
    array = np.array([[1, 2]], dtype=np.int64)
    content, header_length = binary_body.encode_request(
        InferRequest("echo", (Tensor("x", Datatype.INT64, array),), binary_output=True)
    )
    headers = {"Inference-Header-Content-Length": str(header_length), "Content-Type": "application/octet-stream"}
    response = await client.post(INFER, content=content, headers=headers)
    assert response.headers["content-type"] == "application/octet-stream"
    answer = binary_body.decode_response(
        response.content, header_length=int(response.headers["inference-header-content-length"])
    )
    assert np.array_equal(answer.outputs[0].array, array)


async def test_a_json_request_may_ask_for_a_binary_answer(client: httpx.AsyncClient) -> None:
    response = await client.post(INFER, json=body(outputs=[{"name": "x", "parameters": {"binary_data": True}}]))
    assert response.content.endswith(np.array([1.5, -2.0], dtype="<f4").tobytes())


@pytest.mark.parametrize(
    "content_type", ["application/json; charset=utf-8", "application/octet-stream", "application/x-www-form-urlencoded"]
)
async def test_a_body_without_header_length_is_json_whatever_its_type(
    client: httpx.AsyncClient, content_type: str
) -> None:
    response = await client.post(INFER, content=orjson.dumps(body()), headers={"content-type": content_type})
    assert response.status_code == 200


@pytest.mark.parametrize(("encoding", "compress"), [("gzip", gzip.compress), ("deflate", zlib.compress)])
async def test_a_compressed_body_is_inflated(client: httpx.AsyncClient, encoding: str, compress: Compress) -> None:
    headers = {"content-encoding": encoding, "content-type": "application/json"}
    response = await client.post(INFER, content=compress(orjson.dumps(body(id="z"))), headers=headers)
    assert response.json()["id"] == "z"


async def test_deadline_and_trace_travel_with_the_request(client: httpx.AsyncClient, plane: EchoPlane) -> None:
    clock = SystemClock()
    headers = {"traceparent": TRACEPARENT, "tracestate": "a=b"}
    before_s = clock.monotonic_s()
    await client.post(INFER, json=body(parameters={"timeout": 2_000_000}), headers=headers)
    call = plane.calls[0]
    assert (call.traceparent, call.tracestate) == (TRACEPARENT, "a=b")
    assert call.deadline is not None
    assert 2.0 <= call.deadline.at_s - before_s < 4.0


async def test_without_a_timeout_there_is_no_deadline(client: httpx.AsyncClient, plane: EchoPlane) -> None:
    await client.post(INFER, json=body())
    assert plane.calls[0].deadline is None


# ---- refusals ---------------------------------------------------------------------------------------------------


def assert_refused(response: httpx.Response, status: int, *words: str) -> None:
    assert response.status_code == status, response.text
    assert set(response.json()) == {"error"}
    for word in words:
        assert word in response.json()["error"]


@pytest.mark.parametrize(
    "path",
    ["/v2/models/ghost", "/v2/models/echo/versions/9", "/v2/models/ghost/ready", "/v2/models/echo/versions/x/ready"],
)
async def test_an_unknown_model_or_version_is_not_found(client: httpx.AsyncClient, path: str) -> None:
    assert_refused(await client.get(path), 404, "expected echo")


async def test_asking_an_unknown_model_is_not_found(client: httpx.AsyncClient) -> None:
    assert_refused(await client.post("/v2/models/ghost/infer", json=body()), 404, "ghost")


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("GET", "/v2/nowhere"),
        ("GET", "/v2/models/echo/stats"),
        ("POST", "/v2/repository/models/echo/reload"),
        ("GET", "/v2/models"),
    ],
)
async def test_what_is_not_served_is_not_found(client: httpx.AsyncClient, method: str, path: str) -> None:
    assert_refused(await client.request(method, path), 404, path)


async def test_loading_and_unloading_reach_the_plane(client: httpx.AsyncClient, plane: EchoPlane) -> None:
    load = await client.post("/v2/repository/models/echo/load", json={"parameters": {}})
    unload = await client.post("/v2/repository/models/echo/unload")

    assert (load.status_code, unload.status_code) == (200, 200)
    assert (plane.loads, plane.unloads) == (["echo"], ["echo"])


@pytest.mark.parametrize("asked", [{"parameters": {"config": "{}"}}, {"parameters": {"file:1/model.onnx": "AA"}}, []])
async def test_a_load_brings_no_files_or_settings(client: httpx.AsyncClient, plane: EchoPlane, asked: object) -> None:
    assert_refused(await client.post("/v2/repository/models/echo/load", json=asked), 400, "expected")
    assert not plane.loads


async def test_a_wrong_method_is_refused_and_the_right_one_named(client: httpx.AsyncClient) -> None:
    response = await client.get(INFER)
    assert_refused(response, 405, "GET")
    assert response.headers["allow"] == "POST"


@pytest.mark.parametrize(
    "headers", [{"content-type": "application/xml"}, {"content-encoding": "br"}, {"content-encoding": "gzip, gzip"}]
)
async def test_a_media_type_or_encoding_that_is_not_read_is_refused(
    client: httpx.AsyncClient, headers: dict[str, str]
) -> None:
    assert_refused(await client.post(INFER, content=orjson.dumps(body()), headers=headers), 415, "expected")


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'{"inputs": 1}', b"\xff\xfe"])
async def test_a_malformed_body_is_refused(client: httpx.AsyncClient, content: bytes) -> None:
    assert_refused(await client.post(INFER, content=content), 400)


@pytest.mark.parametrize("length", ["-1", "x", "999999999999", "9999", "٣"])
async def test_a_wrong_header_length_is_refused(client: httpx.AsyncClient, length: str) -> None:
    headers = [(b"inference-header-content-length", length.encode())]
    assert_refused(await client.post(INFER, content=orjson.dumps(body()), headers=headers), 400)


async def test_an_announced_length_beyond_the_bound_is_refused(client: httpx.AsyncClient, plane: EchoPlane) -> None:
    assert_refused(await client.post(INFER, content=b" " * 5000), 413, "4096 bytes")
    assert plane.requests == []


async def test_a_stream_beyond_the_bound_is_refused_whatever_it_announced(client: httpx.AsyncClient) -> None:
    taken = 0

    async def endless() -> AsyncIterator[bytes]:
        nonlocal taken
        while True:
            taken += 1
            yield b" " * 1024

    assert_refused(await client.post(INFER, content=endless()), 413, "4096 bytes")
    assert taken == 5


@pytest.mark.parametrize(("encoding", "compress"), [("gzip", gzip.compress), ("deflate", zlib.compress)])
async def test_a_body_that_inflates_beyond_the_bound_is_refused(
    client: httpx.AsyncClient, encoding: str, compress: Compress
) -> None:
    bomb = compress(b" " * 2_000_000)
    assert len(bomb) < LIMITS.max_body_bytes
    assert_refused(await client.post(INFER, content=bomb, headers={"content-encoding": encoding}), 413)


@pytest.mark.parametrize(
    "content", [b"not gzip", gzip.compress(orjson.dumps(body()))[:-4], gzip.compress(b"{}") + b"more"]
)
async def test_a_broken_compressed_body_is_refused(client: httpx.AsyncClient, content: bytes) -> None:
    assert_refused(await client.post(INFER, content=content, headers={"content-encoding": "gzip"}), 400, "gzip")


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (InvalidTensor("input 'x': expected FP32, got INT8"), 400),
        (Overloaded("queue is full"), 429),
        (ModelNotReady("loading"), 503),
        (DeadlineExceeded("too late"), 504),
        (InternalError("oh"), 500),
    ],
)
async def test_what_the_plane_refuses_has_its_status(
    client: httpx.AsyncClient, plane: EchoPlane, error: NanofleetError, status: int
) -> None:
    plane.refuse_with = error
    assert_refused(await client.post(INFER, json=body()), status, str(error))


async def test_an_overloaded_plane_says_when_to_come_again(client: httpx.AsyncClient, plane: EchoPlane) -> None:
    plane.refuse_with = Overloaded("queue is full")
    assert (await client.post(INFER, json=body())).headers["retry-after"] == "1"


async def test_a_defect_shows_nothing_of_its_inside(client: httpx.AsyncClient, plane: EchoPlane) -> None:
    plane.refuse_with = RuntimeError("a secret path")
    response = await client.post(INFER, json=body())
    assert_refused(response, 500, "defect")
    assert "secret" not in response.text


async def test_a_wrong_index_body_is_refused(client: httpx.AsyncClient) -> None:
    assert_refused(await client.post("/v2/repository/index", json={"ready": "yes"}), 400, "index")
