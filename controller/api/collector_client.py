"""OTLP/gRPC to a collector anywhere: with TLS, or in the clear to one on this machine.

    await client.export(payload) -> Accepted | Later | Never

What may be tried again is the OTLP specification's to say (1.x, "Failures" and "OTLP/gRPC Throttling"). Certificate,
key and headers are files, read again when they change, so that they can be renewed without a restart.
"""

import asyncio
import re
import ssl
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import grpc
import grpc.aio
from google.protobuf.message import DecodeError
from google.rpc.error_details_pb2 import RetryInfo
from google.rpc.status_pb2 import Status
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceResponse

from controller.settings import TelemetrySettings
from controller.traces.forward import Accepted, Later, Never
from core.addresses import Address, is_loopback
from core.errors import InvalidRequest
from core.grpc_transport import CHANNEL_OPTIONS, TransportCredentials

EXPORT_TIMEOUT_S = 10.0
# What a collector may ask for at most; one that is wrong about it must not stop us for a day.
MAX_THROTTLE_S = 300.0
_METHOD = "/opentelemetry.proto.collector.trace.v1.TraceService/Export"
_RETRYABLE = frozenset(
    {
        grpc.StatusCode.CANCELLED,
        grpc.StatusCode.DEADLINE_EXCEEDED,
        grpc.StatusCode.ABORTED,
        grpc.StatusCode.OUT_OF_RANGE,
        grpc.StatusCode.UNAVAILABLE,
        grpc.StatusCode.DATA_LOSS,
    }
)
# Only with RetryInfo does it say that there will be room again.
_RETRYABLE_IF_TOLD = grpc.StatusCode.RESOURCE_EXHAUSTED
_STATUS_DETAILS = "grpc-status-details-bin"
# Metadata as gRPC takes it: `-bin` would be bytes, and `grpc-` is its own.
_HEADER = re.compile(r"(?!grpc-)([a-z0-9_.-]{1,128}(?<!-bin))\s*:\s*([\x20-\x7e]{0,8192})")
_MAX_HEADER_FILE_BYTES = 64 << 10

Headers = tuple[tuple[str, str], ...]


@dataclass(frozen=True, slots=True)
class CollectorSettings:
    """Paths of PEM files, and of a file of headers; `authority` None: the authorities that this machine trusts."""

    address: Address
    authority: Path | None = None
    certificate: Path | None = None
    key: Path | None = None
    headers: Path | None = None

    @classmethod
    def of(cls, telemetry: TelemetrySettings) -> Self | None:
        """Return what the settings of the controller say; None: nothing is forwarded."""
        if telemetry.forward_to is None:
            return None
        return cls(
            telemetry.forward_to,
            telemetry.forward_authority,
            telemetry.forward_certificate,
            telemetry.forward_key,
            telemetry.forward_headers,
        )

    @property
    def speaks_tls(self) -> bool:
        return not is_loopback(self.address.host) or self.authority is not None or self.certificate is not None

    @property
    def files(self) -> tuple[Path, ...]:
        named = (self.authority, self.certificate, self.key, self.headers)
        return tuple(path for path in named if path is not None)


@dataclass(frozen=True, slots=True)
class _Connection:
    channel: grpc.aio.Channel
    headers: Headers
    # Of the files when they were read: (inode, time of change) each.
    stamp: tuple[tuple[int, int], ...]


class CollectorClient:
    """Made before it is needed, so that files that cannot be read are told at the start.

    Raises:
        InvalidRequest: a file of the settings cannot be read or is not what it should be.
    """

    def __init__(self, settings: CollectorSettings) -> None:
        self._settings = settings
        self._connection = _connect(settings)

    async def export(self, payload: bytes) -> Accepted | Later | Never:
        """Hand over one serialised request."""
        try:
            connection = await self._current()
        except InvalidRequest as error:
            return Later(str(error))
        call = connection.channel.unary_unary(
            _METHOD, request_serializer=bytes, response_deserializer=ExportTraceServiceResponse.FromString
        )
        try:
            response = await call(payload, timeout=EXPORT_TIMEOUT_S, metadata=connection.headers)
        except grpc.aio.AioRpcError as error:
            return _outcome(error)
        return Accepted(max(0, response.partial_success.rejected_spans))

    async def close(self) -> None:
        await self._connection.channel.close()

    async def _current(self) -> _Connection:
        """Return the connection with the files as they are now."""
        if await asyncio.to_thread(_stamp, self._settings) != self._connection.stamp:
            renewed = await asyncio.to_thread(_files, self._settings)
            former, self._connection = self._connection, _open(self._settings, *renewed)
            await former.channel.close()
        return self._connection


def parse_headers(text: str, *, source: Path) -> Headers:
    """Return the `name: value` lines of `text`; blank ones and comments (`#`) are left out.

    Raises:
        InvalidRequest: a line is not one; it is named by its number, since values are secrets.
    """
    headers = []
    for number, line in enumerate(text.splitlines(), start=1):
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        name, colon, value = line.strip().partition(":")
        match = _HEADER.fullmatch(f"{name.strip().lower()}{colon}{value.strip()}")
        if match is None:
            raise InvalidRequest(f"{source}: line {number}: expected `name: value` in printable ASCII")
        headers.append((match[1], match[2]))
    return tuple(headers)


def _connect(settings: CollectorSettings) -> _Connection:
    return _open(settings, *_files(settings))


def _files(
    settings: CollectorSettings,
) -> tuple[grpc.ChannelCredentials, Headers, tuple[tuple[int, int], ...]]:
    # First: what changes while it is read is read again.
    stamp = _stamp(settings)
    return _credentials(settings), _headers(settings), stamp


def _open(
    settings: CollectorSettings,
    credentials: grpc.ChannelCredentials,
    headers: Headers,
    stamp: tuple[tuple[int, int], ...],
) -> _Connection:
    # Spans are repetitive text; on this machine nothing is gained by packing them.
    packing = grpc.Compression.NoCompression if is_loopback(settings.address.host) else grpc.Compression.Gzip
    channel = grpc.aio.secure_channel(str(settings.address), credentials, options=CHANNEL_OPTIONS, compression=packing)
    return _Connection(channel, headers, stamp)


def _credentials(settings: CollectorSettings) -> grpc.ChannelCredentials:
    if not settings.speaks_tls:
        # gRPC itself refuses to use it with a peer elsewhere.
        return TransportCredentials.local().channel
    authority = _system_authorities() if settings.authority is None else _read(settings.authority)
    _require_pem(authority, settings.authority)
    certificate = None if settings.certificate is None else _read(settings.certificate)
    key = None if settings.key is None else _read(settings.key)
    if settings.certificate is not None and settings.key is not None:
        _require_pair(settings.certificate, settings.key)
    return grpc.ssl_channel_credentials(authority, key, certificate)


def _headers(settings: CollectorSettings) -> Headers:
    if settings.headers is None:
        return ()
    content = _read(settings.headers)
    if len(content) > _MAX_HEADER_FILE_BYTES:
        raise InvalidRequest(f"{settings.headers}: expected at most {_MAX_HEADER_FILE_BYTES} bytes of headers")
    return parse_headers(content.decode(errors="replace"), source=settings.headers)


def _system_authorities() -> bytes:
    path = ssl.get_default_verify_paths().cafile
    if path is None:
        raise InvalidRequest(
            "telemetry.forward_authority: this machine has no bundle of trusted authorities (Debian: apt install "
            "ca-certificates); install one, set SSL_CERT_FILE, or name the collector's authority"
        )
    return _read(Path(path))


def _require_pem(content: bytes, path: Path | None) -> None:
    # gRPC says nothing of a file that it cannot use, and every connection fails later.
    try:
        ssl.create_default_context(cadata=content.decode("ascii", errors="ignore"))
    except ssl.SSLError as error:
        raise InvalidRequest(f"{path}: expected certificates of authorities in PEM, got something else") from error


def _require_pair(certificate: Path, key: Path) -> None:
    try:
        ssl.create_default_context().load_cert_chain(certificate, key, password="")
    except (ssl.SSLError, OSError) as error:
        raise InvalidRequest(
            f"{certificate}, {key}: expected a certificate in PEM and its key, without password"
        ) from error


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise InvalidRequest(f"{path}: {error.strerror}; expected a file for the trace collector") from error


def _stamp(settings: CollectorSettings) -> tuple[tuple[int, int], ...]:
    try:
        stats = [path.stat() for path in settings.files]
    except OSError as error:
        raise InvalidRequest(f"{error.filename}: {error.strerror}; expected a file for the trace collector") from error
    return tuple((stat.st_ino, stat.st_mtime_ns) for stat in stats)


def _outcome(error: grpc.aio.AioRpcError) -> Later | Never:
    reason = f"{error.code().name}: {error.details()}"
    after_s = _retry_after_s(error)
    if error.code() in _RETRYABLE or (error.code() is _RETRYABLE_IF_TOLD and after_s is not None):
        return Later(reason, 0.0 if after_s is None else after_s)
    return Never(reason)


def _retry_after_s(error: grpc.aio.AioRpcError) -> float | None:
    """Return for how long the collector wants to be left alone; None: it does not say."""
    for key, value in error.trailing_metadata() or ():
        if key != _STATUS_DETAILS or not isinstance(value, bytes):
            continue
        info = RetryInfo()
        try:
            details = Status.FromString(value).details
            told = any(detail.Unpack(info) for detail in details if detail.Is(RetryInfo.DESCRIPTOR))
        except DecodeError:
            return None
        if told:
            delay_s: float = info.retry_delay.seconds + info.retry_delay.nanos / 1e9
            return min(max(0.0, delay_s), MAX_THROTTLE_S)
    return None
