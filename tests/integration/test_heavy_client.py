"""The client of the heavy tier against a server that stands in for it."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import replace

import numpy as np
import pytest
from aiohttp import web

from controller.heavy.client import HeavyClient, HeavyPolicy
from core.breaker import BreakerPolicy
from core.clock import SystemClock
from core.deadline import Deadline
from core.digest import digest_of
from core.errors import (
    Conflict,
    DeadlineExceeded,
    Forbidden,
    HeavyUnavailable,
    IntegrityError,
    InvalidRequest,
    ModelNotReady,
    NanofleetError,
    Overloaded,
    TooLarge,
    UnknownModel,
)
from core.open_inference.messages import BodyLimits, InferResponse
from tests.support.fake_heavy import FakeHeavy, answer, reset
from tests.support.heavy_tier import scaling_request

DIGEST = digest_of(b"a manifest")
CLOCK = SystemClock()
TRACEPARENT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
# Quick, so that tests of the probe take no time; patient enough for a busy machine.
POLICY = HeavyPolicy(
    breaker=BreakerPolicy(failures_to_open=3, open_s=0.01),
    probe_timeout_s=0.3,
    probe_interval_s=0.02,
    recovery_interval_s=0.02,
)
SETTLED_S = 10.0


@pytest.fixture
async def server() -> AsyncIterator[FakeHeavy]:
    async with FakeHeavy() as fake:
        yield fake


@pytest.fixture
async def client(server: FakeHeavy) -> AsyncIterator[HeavyClient]:
    async with HeavyClient(server.url, clock=CLOCK, policy=POLICY) as opened:
        yield opened


@asynccontextmanager
async def probing(client: HeavyClient) -> AsyncIterator[None]:
    probe = asyncio.create_task(client.run())
    try:
        yield
    finally:
        probe.cancel()
        await asyncio.gather(probe, return_exceptions=True)


async def ask(client: HeavyClient, *, timeout_s: float = 5.0, traceparent: str | None = None) -> InferResponse:
    request = replace(scaling_request(2.0), model_version="1", id="42")
    deadline = Deadline.after(timeout_s, now_s=CLOCK.monotonic_s())
    return await client.infer(request, digest=DIGEST, deadline=deadline, traceparent=traceparent)


async def until(claim: Callable[[], bool]) -> None:
    async with asyncio.timeout(SETTLED_S):
        while not claim():
            await asyncio.sleep(0.01)


# ---- answers --------------------------------------------------------------------------------------------------------


async def test_the_answer_of_the_tier_is_returned(client: HeavyClient) -> None:
    response = await ask(client)
    assert (response.model_name, response.model_version, response.id) == ("scaling", "1", "42")
    np.testing.assert_array_equal(response.outputs[0].array, np.full((1, 4), 6.0, np.float32))


async def test_digest_deadline_and_trace_travel_as_headers(client: HeavyClient, server: FakeHeavy) -> None:
    await ask(client, timeout_s=5.0, traceparent=TRACEPARENT)
    (headers,) = server.asked
    assert headers["serve_multiplexed_model_id"] == DIGEST
    assert headers["traceparent"] == TRACEPARENT
    assert 4000 < float(headers["x-deadline-ms"]) <= 5000
    assert float(headers["x-request-timeout-seconds"]) == pytest.approx(
        float(headers["x-deadline-ms"]) / 1000, abs=1e-3
    )


async def test_a_deadline_of_years_is_cut_to_what_the_tier_takes(client: HeavyClient, server: FakeHeavy) -> None:
    await ask(client, timeout_s=1e9)
    assert float(server.asked[0]["x-deadline-ms"]) == 3_600_000


async def test_the_last_moment_is_not_written_as_the_zero_that_lets_serve_wait_for_ever(
    client: HeavyClient, server: FakeHeavy
) -> None:
    with suppress(DeadlineExceeded):
        await ask(client, timeout_s=0.0004)
    assert all(float(headers["x-request-timeout-seconds"]) > 0 for headers in server.asked)


async def test_an_answer_as_json_is_understood(client: HeavyClient, server: FakeHeavy) -> None:
    body = '{"model_name":"scaling","outputs":[{"name":"y","datatype":"FP32","shape":[2],"data":[1.0,2.0]}]}'
    server.infer = answer(200, body, "application/json")
    np.testing.assert_array_equal((await ask(client)).outputs[0].array, np.array([1, 2], np.float32))


# ---- refusals -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("status", "expected"),
    [
        (400, InvalidRequest),
        (404, UnknownModel),
        (413, TooLarge),
        (429, Overloaded),
        (502, IntegrityError),
        (503, ModelNotReady),
        (504, DeadlineExceeded),
    ],
)
async def test_a_refusal_of_the_protocol_is_the_typed_error(
    client: HeavyClient, server: FakeHeavy, status: int, expected: type[NanofleetError]
) -> None:
    server.infer = answer(status, '{"error":"because of this"}', "application/json")
    with pytest.raises(expected, match="because of this"):
        await ask(client)


@pytest.mark.parametrize("status", [302, 404, 500, 503])
async def test_what_a_proxy_says_instead_of_the_server_means_that_the_tier_is_away(
    client: HeavyClient, server: FakeHeavy, status: int
) -> None:
    server.infer = answer(status, "Path '/v2' not found. Please ping http://.../-/routes")
    with pytest.raises(HeavyUnavailable, match=f"status {status}: Path"):
        await ask(client)


@pytest.mark.parametrize(
    ("status", "expected"),
    [(400, InvalidRequest), (403, Forbidden), (409, Conflict), (413, TooLarge), (431, InvalidRequest)],
)
async def test_a_request_that_a_proxy_refuses_says_nothing_against_the_tier(
    client: HeavyClient, server: FakeHeavy, status: int, expected: type[NanofleetError]
) -> None:
    server.infer = answer(status, "<html>nginx</html>" + " " * 9000, "text/html")
    for _ in range(5):
        with pytest.raises(expected, match=f"status {status}: <html>nginx") as refusal:
            await ask(client)
        assert len(str(refusal.value)) < 1000
    assert len(server.asked) == 5


async def test_a_timeout_of_serve_is_a_passed_deadline_and_does_not_count(
    client: HeavyClient, server: FakeHeavy
) -> None:
    server.infer = answer(408, "Request timed out")
    for _ in range(5):
        with pytest.raises(DeadlineExceeded, match="gave up"):
            await ask(client)
    assert len(server.asked) == 5


async def test_a_full_queue_of_serve_is_overload(client: HeavyClient, server: FakeHeavy) -> None:
    server.infer = answer(429, "Request dropped due to backpressure")
    with pytest.raises(Overloaded, match="backpressure"):
        await ask(client)


async def test_a_reset_connection_means_that_the_tier_is_away(client: HeavyClient, server: FakeHeavy) -> None:
    server.infer = reset
    with pytest.raises(HeavyUnavailable, match="is away"):
        await ask(client)


async def test_a_refused_connection_means_that_the_tier_is_away(client: HeavyClient, server: FakeHeavy) -> None:
    await server.stop()
    with pytest.raises(HeavyUnavailable, match="is away"):
        await ask(client)


@pytest.mark.parametrize("body", ["", "hello", "{}", '{"outputs":7}'])
async def test_an_answer_that_is_not_of_the_protocol_means_that_the_tier_is_away(
    client: HeavyClient, server: FakeHeavy, body: str
) -> None:
    server.infer = answer(200, body, "application/json")
    with pytest.raises(HeavyUnavailable, match="not of the Open Inference Protocol"):
        await ask(client)


async def test_an_answer_over_the_bound_is_not_read(server: FakeHeavy) -> None:
    async def endless(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse()
        await response.prepare(request)
        while True:
            await response.write(b" " * 1024)

    server.infer = endless
    limits = BodyLimits(max_body_bytes=4096)
    async with HeavyClient(server.url, clock=CLOCK, policy=POLICY, limits=limits) as client:
        with pytest.raises(TooLarge, match="at most 4096 bytes"):
            await ask(client)


# ---- deadlines ------------------------------------------------------------------------------------------------------


async def test_a_request_ends_at_its_deadline_and_its_work_is_cancelled(client: HeavyClient, server: FakeHeavy) -> None:
    server.infer = server.never
    started_s = CLOCK.monotonic_s()
    with pytest.raises(DeadlineExceeded, match="within"):
        await ask(client, timeout_s=0.2)
    assert CLOCK.monotonic_s() - started_s < 1.0
    async with asyncio.timeout(SETTLED_S):
        await server.abandoned.wait()


async def test_an_expired_request_is_not_sent(client: HeavyClient, server: FakeHeavy) -> None:
    with pytest.raises(DeadlineExceeded, match="before the request went"):
        await ask(client, timeout_s=0.0)
    assert server.asked == []


async def test_a_cancelled_request_is_cancelled_at_the_tier(client: HeavyClient, server: FakeHeavy) -> None:
    server.infer = server.never
    asking = asyncio.create_task(ask(client))
    await until(lambda: bool(server.asked))
    asking.cancel()
    async with asyncio.timeout(SETTLED_S):
        await server.abandoned.wait()


# ---- breaker and probe ----------------------------------------------------------------------------------------------


async def test_the_third_failure_in_a_row_opens_the_breaker(client: HeavyClient, server: FakeHeavy) -> None:
    server.infer = answer(500, "a replica died")
    for _ in range(3):
        with pytest.raises(HeavyUnavailable, match="a replica died"):
            await ask(client)
    with pytest.raises(HeavyUnavailable, match="it is probed"):
        await ask(client)
    assert len(server.asked) == 3


async def test_refusals_of_the_protocol_do_not_open_the_breaker(client: HeavyClient, server: FakeHeavy) -> None:
    server.infer = answer(503, '{"error":"model does not load"}', "application/json")
    for _ in range(5):
        with pytest.raises(ModelNotReady):
            await ask(client)
    assert len(server.asked) == 5


async def test_impatient_callers_do_not_open_the_breaker(client: HeavyClient, server: FakeHeavy) -> None:
    server.infer = server.never
    for _ in range(5):
        with pytest.raises(DeadlineExceeded):
            await ask(client, timeout_s=0.02)
    assert len(server.asked) == 5


async def test_the_tier_is_ready_once_a_probe_was_answered(client: HeavyClient) -> None:
    assert not client.is_ready
    async with probing(client), asyncio.timeout(SETTLED_S):
        await client.wait_answer()
        assert client.is_ready


async def test_a_tier_that_goes_and_returns_is_noticed_without_a_request(
    client: HeavyClient, server: FakeHeavy
) -> None:
    async with probing(client):
        await until(lambda: client.is_ready)
        await server.stop()
        await until(lambda: not client.is_ready)
        await server.start()
        await until(lambda: client.is_ready)
        await ask(client)


async def test_an_answer_from_before_is_not_the_next_one(client: HeavyClient, server: FakeHeavy) -> None:
    async with probing(client):
        await until(lambda: client.is_ready)
        server.ready = server.never
        await until(lambda: not client.is_ready)
        waiting = asyncio.create_task(client.wait_answer())
        before = server.probed
        await until(lambda: server.probed > before + 1)
        assert not waiting.done()
        server.ready = answer(200, "{}")
        async with asyncio.timeout(SETTLED_S):
            await waiting


async def test_a_full_tier_answers(client: HeavyClient, server: FakeHeavy) -> None:
    server.ready = answer(429, "Request dropped due to backpressure")
    async with probing(client), asyncio.timeout(SETTLED_S):
        await client.wait_answer()


async def test_a_tier_that_accepts_and_never_answers_is_found_by_the_probe(
    client: HeavyClient, server: FakeHeavy
) -> None:
    async with probing(client):
        await until(lambda: client.is_ready)
        server.ready = server.infer = server.never
        await until(lambda: not client.is_ready)
        with pytest.raises(HeavyUnavailable, match="it is probed"):
            await ask(client)
        assert server.asked == []


async def test_a_full_tier_is_not_away(client: HeavyClient, server: FakeHeavy) -> None:
    async with probing(client):
        await until(lambda: client.is_ready)
        server.ready = answer(429, "Request dropped due to backpressure")
        before = server.probed
        await until(lambda: server.probed > before + 4)
        assert client.is_ready
