"""The replica's HTTP face, driven over ASGI without a socket."""

import asyncio
from collections.abc import Mapping

import httpx
import numpy as np
import orjson
import pytest
from starlette.requests import Request
from starlette.types import Receive, Scope, Send

from controller.heavy import protocol
from controller.heavy.model import Answer
from controller.heavy.protocol import HeavyCall
from core.digest import digest_of
from core.errors import ModelNotReady, NanofleetError
from core.open_inference import binary_body
from core.telemetry import Tracing, TracingSettings
from core.tensors import Datatype, Tensor
from tests.support.clocks import HeldClock
from tests.support.heavy_tier import scaling_request

DIGEST = digest_of(b"a manifest")
INFER = "/v2/models/scaling/versions/1/infer"
CLOCK = HeldClock(monotonic_s=100.0)


class Replica:
    """Answers every call with `y` of ones, or refuses it."""

    def __init__(self) -> None:
        self.calls: list[HeavyCall] = []
        self.refuse_with: Exception | None = None
        self.is_stuck = False
        self._tracing = Tracing("test", TracingSettings(sample_ratio=0.0))

    async def infer(self, call: HeavyCall) -> Answer:
        self.calls.append(call)
        if self.refuse_with is not None:
            raise self.refuse_with
        if self.is_stuck:
            await asyncio.Event().wait()
        return Answer("1", (Tensor("y", Datatype.FP32, np.ones((1, 2), np.float32)),), 1, 2, 1)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        response = await protocol.respond(Request(scope, receive), self.infer, tracing=self._tracing, clock=CLOCK)
        await response(scope, receive, send)

    async def send(
        self, body: bytes = b"", headers: Mapping[str, str] | None = None, *, method: str = "POST", path: str = INFER
    ) -> httpx.Response:
        fields = {"serve_multiplexed_model_id": DIGEST, **(headers or {})}
        async with httpx.AsyncClient(transport=httpx.ASGITransport(self), base_url="http://replica") as client:
            return await client.request(method, path, content=body, headers=fields)


@pytest.fixture
def replica() -> Replica:
    return Replica()


def binary_request() -> tuple[bytes, dict[str, str]]:
    body, length = binary_body.encode_request(scaling_request(2.0))
    return body, {"inference-header-content-length": str(length)}


async def test_a_binary_request_gets_a_binary_answer(replica: Replica) -> None:
    response = await replica.send(*binary_request())
    assert response.status_code == 200
    length = int(response.headers["inference-header-content-length"])
    decoded = binary_body.decode_response(response.content, header_length=length)
    assert (decoded.model_name, decoded.model_version) == ("scaling", "1")
    np.testing.assert_array_equal(decoded.outputs[0].array, np.ones((1, 2), np.float32))


async def test_a_json_request_gets_a_json_answer(replica: Replica) -> None:
    body = orjson.dumps({"inputs": [{"name": "x", "shape": [1], "datatype": "FP32", "data": [1.0]}]})
    response = await replica.send(body)
    assert response.json()["outputs"][0]["data"] == [1.0, 1.0]


async def test_path_digest_and_deadline_reach_the_model(replica: Replica) -> None:
    body, headers = binary_request()
    await replica.send(body, {**headers, "x-deadline-ms": "250.5"})
    (call,) = replica.calls
    assert (call.request.model_name, call.request.model_version, call.digest) == ("scaling", "1", DIGEST)
    assert call.deadline is not None
    assert call.deadline.remaining_s(CLOCK.monotonic_s()) == pytest.approx(0.2505)


async def test_an_expired_request_does_not_reach_the_model(replica: Replica) -> None:
    body, headers = binary_request()
    response = await replica.send(body, {**headers, "x-deadline-ms": "0"})
    assert response.status_code == 504
    assert replica.calls == []


async def test_a_model_that_is_late_is_not_waited_for_longer_than_the_caller_does(replica: Replica) -> None:
    replica.is_stuck = True
    body, headers = binary_request()
    async with asyncio.timeout(5):
        response = await replica.send(body, {**headers, "x-deadline-ms": "20"})
    assert response.status_code == 504
    assert "before the model answered" in response.json()["error"]


async def test_a_timeout_of_something_else_is_no_passed_deadline(replica: Replica) -> None:
    replica.refuse_with = TimeoutError()
    body, headers = binary_request()
    response = await replica.send(body, {**headers, "x-deadline-ms": "5000"})
    assert response.status_code == 500


@pytest.mark.parametrize("value", ["soon", "-1", "nan", "inf", "1e9", ""])
async def test_a_deadline_that_is_no_time_is_refused(replica: Replica, value: str) -> None:
    body, headers = binary_request()
    response = await replica.send(body, {**headers, "x-deadline-ms": value})
    assert response.status_code == 400
    assert "x-deadline-ms" in response.json()["error"]


@pytest.mark.parametrize("value", ["", "sha256:12", "latest"])
async def test_a_request_without_a_digest_is_refused(replica: Replica, value: str) -> None:
    body, headers = binary_request()
    response = await replica.send(body, {**headers, "serve_multiplexed_model_id": value})
    assert response.status_code == 400
    assert "expected sha256:" in response.json()["error"]


@pytest.mark.parametrize("length", ["-1", "a lot", "9999999999", "1.5"])
async def test_a_header_length_that_is_no_size_is_refused(replica: Replica, length: str) -> None:
    body, _ = binary_request()
    response = await replica.send(body, {"inference-header-content-length": length})
    assert response.status_code == 400


@pytest.mark.parametrize("body", [b"", b"{", b"[]", b'{"inputs":3}'])
async def test_a_malformed_body_is_refused(replica: Replica, body: bytes) -> None:
    response = await replica.send(body)
    assert response.status_code == 400
    assert replica.calls == []


async def test_a_body_over_the_bound_is_refused(replica: Replica) -> None:
    response = await replica.send(b" " * ((16 << 20) + 1))
    assert response.status_code == 413


@pytest.mark.parametrize(("method", "path"), [("GET", INFER), ("POST", "/v2/models/scaling"), ("POST", "/")])
async def test_another_path_is_not_found_in_the_protocols_shape(replica: Replica, method: str, path: str) -> None:
    response = await replica.send(method=method, path=path)
    assert response.status_code == 404
    assert response.json()["error"].startswith("expected POST /v2/models/")


@pytest.mark.parametrize("name", ["live", "ready"])
async def test_health_answers(replica: Replica, name: str) -> None:
    response = await replica.send(method="GET", path=f"/v2/health/{name}")
    assert (response.status_code, response.json()[name]) == (200, True)


@pytest.mark.parametrize(
    ("error", "status"), [(ModelNotReady("does not load"), 503), (RuntimeError("secret inside"), 500)]
)
async def test_a_failure_has_the_protocols_shape_and_tells_no_inside(
    replica: Replica, error: Exception, status: int
) -> None:
    replica.refuse_with = error
    response = await replica.send(*binary_request())
    assert response.status_code == status
    message = response.json()["error"]
    assert (message == str(error)) == isinstance(error, NanofleetError)


async def test_a_web_page_cannot_reach_the_tier(replica: Replica) -> None:
    body, headers = binary_request()
    response = await replica.send(body, {**headers, "origin": "http://127.0.0.1:8000"})
    assert response.status_code == 403
    assert replica.calls == []
