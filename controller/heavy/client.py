"""The gateway's way to the heavy tier: one Open Inference server over HTTP, with a deadline and a breaker.

What ends how:

    200                                       the answer
    4xx, 5xx in the protocol's error shape    the typed error that it stands for; the tier is well
    any other 4xx but 404                     the same: somebody there has read the request
    refused, reset, any other answer          HeavyUnavailable, counted by the breaker
    the caller's deadline passes              DeadlineExceeded; the connection is closed, which cancels the work

A caller's deadline says how patient that caller is, not how the tier is, so it does not count. A tier that accepts and
never answers is found by the probe instead, `GET /v2/health/ready` with a patience of its own: it counts like a
request. While the breaker is open only the probe goes out, so recovery costs no user a request, and it also makes
`is_ready` a look at a variable.
"""

import asyncio
import logging
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from functools import lru_cache
from types import TracebackType
from typing import Self

import aiohttp
import orjson
from yarl import URL

from controller.heavy import headers
from core.breaker import Breaker, BreakerPolicy, BreakerState
from core.clock import Clock
from core.deadline import Deadline
from core.digest import Digest
from core.errors import (
    DeadlineExceeded,
    HeavyUnavailable,
    InvalidRequest,
    ModelNotReady,
    NanofleetError,
    Overloaded,
    TooLarge,
    UnknownModel,
)
from core.logs import peer_text
from core.open_inference import binary_body, json_body
from core.open_inference.messages import DEFAULT_LIMITS, BodyLimits, InferRequest, InferResponse
from core.status import error_from_http
from core.telemetry import TRACEPARENT

_log = logging.getLogger(__name__)

# A refusal is a sentence; more of it is not read.
_MAX_REFUSAL_BYTES = 8192


@dataclass(frozen=True, slots=True)
class HeavyPolicy:
    """How patient the client is, and how many connections it keeps. All chosen."""

    breaker: BreakerPolicy = field(default_factory=lambda: BreakerPolicy(failures_to_open=3, open_s=0.25))
    probe_timeout_s: float = 2.0
    probe_interval_s: float = 1.0
    # While the tier is away: how soon its return is noticed.
    recovery_interval_s: float = 0.25
    max_connections: int = 256
    # Below Serve's 90 s, so that we never send on a connection that the server is about to close.
    keepalive_s: float = 45.0


class HeavyClient:
    """Use as an async context manager, and keep `run` running in a task of the owner: it is the probe."""

    def __init__(
        self, url: str, *, clock: Clock, policy: HeavyPolicy | None = None, limits: BodyLimits = DEFAULT_LIMITS
    ) -> None:
        self._url = url.rstrip("/")
        self._clock = clock
        self._policy = policy or HeavyPolicy()
        self._limits = limits
        self._breaker = Breaker(self._policy.breaker)
        self._session: aiohttp.ClientSession | None = None
        self._was_ready = False
        # Set by the next answered probe, which puts a new one in its place.
        self._next_answer = asyncio.Event()

    async def __aenter__(self) -> Self:
        connector = aiohttp.TCPConnector(
            limit=self._policy.max_connections, keepalive_timeout=self._policy.keepalive_s, use_dns_cache=True
        )
        self._session = aiohttp.ClientSession(
            connector=connector,
            cookie_jar=aiohttp.DummyCookieJar(),
            timeout=aiohttp.ClientTimeout(total=None),
            # An answer is never inflated: its size on the wire is its size in memory.
            auto_decompress=False,
            headers={"Accept-Encoding": "identity"},
            skip_auto_headers=("User-Agent",),
        )
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._session is not None:
            await self._session.close()

    # ---- readiness ----------------------------------------------------------------------------------------------

    @property
    def is_ready(self) -> bool:
        """Whether the last probe succeeded and nothing has shown otherwise since."""
        return self._was_ready and self._breaker.state is BreakerState.CLOSED

    @property
    def breaker_state(self) -> BreakerState:
        return self._breaker.state

    async def wait_answer(self) -> None:
        """Return when the tier answers a probe from now on; sets no deadline of its own."""
        await self._next_answer.wait()

    async def run(self) -> None:
        """Probe the tier, for ever."""
        while True:
            if self._breaker.permits(self._clock.monotonic_s()):
                await self._probe()
            await asyncio.sleep(self._policy.probe_interval_s if self.is_ready else self._policy.recovery_interval_s)

    async def _probe(self) -> None:
        try:
            async with (
                asyncio.timeout(self._policy.probe_timeout_s),
                self._opened().get(f"{self._url}/v2/health/ready", allow_redirects=False) as response,
            ):
                status = response.status
        except (TimeoutError, aiohttp.ClientError, OSError) as error:
            self._note_away(f"{type(error).__name__} at the probe")
        except asyncio.CancelledError:
            self._breaker.abandoned()
            raise
        else:
            self._note_probe(status)

    def _note_probe(self, status: int) -> None:
        if status == 200:
            if not self.is_ready:
                _log.info("heavy tier is ready", extra={"url": self._url})
            self._was_ready = True
            self._note_answer()
        elif status == 429:
            # Full, and thus alive.
            self._note_answer()
        else:
            self._note_away(f"status {status} at the probe")

    def _note_answer(self) -> None:
        self._breaker.succeeded()
        self._next_answer.set()
        self._next_answer = asyncio.Event()

    def _note_away(self, why: str) -> None:
        self._breaker.failed(self._clock.monotonic_s())
        if self._breaker.state is not BreakerState.OPEN:
            return
        if self._was_ready:
            _log.warning("heavy tier is away", extra={"url": self._url, "why": why})
        self._was_ready = False

    # ---- inference ----------------------------------------------------------------------------------------------

    async def infer(
        self, request: InferRequest, *, digest: Digest, deadline: Deadline, traceparent: str | None
    ) -> InferResponse:
        """Answer `request` with the model whose manifest has `digest`; ends by `deadline`.

        Raises:
            HeavyUnavailable: the tier is away, or the breaker is open.
            ModelNotReady: the tier is there and cannot load the model.
            UnknownModel: the tier's source of models does not have it.
            DeadlineExceeded: the deadline passed before the answer came.
            NanofleetError: whatever else the tier refused the request for.
        """
        if self._breaker.state is not BreakerState.CLOSED:
            raise HeavyUnavailable(f"the heavy tier at {self._url} is away; it is probed, try again in a second")
        remaining_s = deadline.remaining_s(self._clock.monotonic_s())
        if remaining_s <= 0:
            raise DeadlineExceeded("the deadline passed before the request went to the heavy tier")
        body, header_length = binary_body.encode_request(request)
        fields = _fields(digest, header_length, remaining_s, traceparent)
        async with self._exchange(request, body, fields, remaining_s) as response:
            status, kind = response.status, response.headers.get(headers.HEADER_LENGTH)
            content = await self._read(response)
        if status != 200:
            raise self._refusal(status, content)
        answer = self._decode(content, kind)
        self._breaker.succeeded()
        return answer

    @asynccontextmanager
    async def _exchange(
        self, request: InferRequest, body: bytes, fields: Mapping[str, str], remaining_s: float
    ) -> AsyncIterator[aiohttp.ClientResponse]:
        """Send the request; within, everything that the connection does wrong becomes a typed error."""
        url = _infer_url(self._url, request.model_name, request.model_version)
        try:
            async with (
                asyncio.timeout(remaining_s),
                self._opened().post(url, data=body, headers=fields, allow_redirects=False) as response,
            ):
                yield response
        except TimeoutError as error:
            raise DeadlineExceeded(f"the heavy tier did not answer within {remaining_s * 1000:.0f} ms") from error
        except (aiohttp.ClientError, OSError) as error:
            raise self._away(f"{type(error).__name__}: {error}") from error

    async def _read(self, response: aiohttp.ClientResponse) -> bytes:
        limit = self._limits.max_body_bytes if response.status == 200 else _MAX_REFUSAL_BYTES
        if response.content_length is not None and response.content_length <= limit:
            return await response.read()
        body = bytearray()
        async for chunk in response.content.iter_any():
            body += chunk
            if len(body) > limit:
                if response.status == 200:
                    raise TooLarge(f"expected an answer of at most {limit} bytes from the heavy tier, got more")
                break
        return bytes(body[:limit])

    def _decode(self, content: bytes, header_length: str | None) -> InferResponse:
        try:
            if header_length is None:
                return json_body.decode_response(content, limits=self._limits)
            length = headers.parse_header_length(header_length)
            return binary_body.decode_response(content, header_length=length, limits=self._limits)
        except (InvalidRequest, TooLarge) as error:
            raise self._away(f"its answer is not of the Open Inference Protocol: {error}") from error

    def _refusal(self, status: int, content: bytes) -> NanofleetError:
        message = _protocol_error(content)
        if message is None:
            return self._foreign_refusal(status, peer_text(content.decode("utf-8", "replace")))
        self._breaker.succeeded()
        if status == 404:
            return UnknownModel(message)
        if status == 503:
            return ModelNotReady(message)
        return error_from_http(status, message)

    def _foreign_refusal(self, status: int, text: str) -> NanofleetError:
        """Return the error for what a proxy said and not the server behind it; Ray Serve's is plain text."""
        if status == 408:
            # A time that has passed is no news of the tier, whoever counted it.
            return DeadlineExceeded(f"the heavy tier gave up: {text}")
        # Serve says 404 while its application is not there yet.
        if status == 404 or not 400 <= status < 500:
            return self._away(f"status {status}: {text}")
        self._breaker.succeeded()
        if status == 429:
            return Overloaded(f"the heavy tier is full: {text}")
        return error_from_http(status, f"the heavy tier refused the request with status {status}: {text}")

    def _away(self, why: str) -> HeavyUnavailable:
        self._note_away(why)
        return HeavyUnavailable(f"the heavy tier at {self._url} is away: {why}")

    def _opened(self) -> aiohttp.ClientSession:
        if self._session is None:
            raise RuntimeError("expected HeavyClient to be entered with `async with` before use")
        return self._session


def _fields(digest: Digest, header_length: int, remaining_s: float, traceparent: str | None) -> dict[str, str]:
    allowed_ms = min(remaining_s * 1000, headers.MAX_DEADLINE_MS)
    fields = {
        "Content-Type": "application/octet-stream",
        headers.HEADER_LENGTH: str(header_length),
        headers.MODEL_ID: digest,
        headers.DEADLINE_MS: f"{allowed_ms:.1f}",
        # Not zero, which says "for ever" to Serve.
        headers.SERVE_TIMEOUT_S: f"{max(allowed_ms, 1.0) / 1000:.3f}",
    }
    if traceparent is not None:
        fields[TRACEPARENT] = traceparent
    return fields


# Parsing and quoting a URL costs as much as the rest of the client's bookkeeping; a fleet has few models.
@lru_cache(maxsize=256)
def _infer_url(base: str, model: str, version: str) -> URL:
    # Names come from the registry, whose alphabet needs no quoting.
    return URL(f"{base}/v2/models/{model}/versions/{version}/infer" if version else f"{base}/v2/models/{model}/infer")


def _protocol_error(content: bytes) -> str | None:
    """Return the message of an error in the protocol's shape, or None when it is something else."""
    try:
        document = orjson.loads(content)
    except orjson.JSONDecodeError:
        return None
    message = document.get("error") if isinstance(document, dict) else None
    return peer_text(message) if isinstance(message, str) else None
