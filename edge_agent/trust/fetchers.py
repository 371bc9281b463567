"""Where metadata files come from, as python-tuf wants it: at hand, from the controller, or from a plain HTTP server.

Every fetcher is bounded in time here (a minimum rate after a grace period, or a deadline), and in size by TUF's client.
TUF names a file by URL; ours is `BASE_URL` and the file's name.
"""

import time
from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from http.client import HTTPException, HTTPResponse
from typing import cast
from urllib.error import HTTPError, URLError
from urllib.parse import urlsplit
from urllib.request import HTTPDefaultErrorHandler, HTTPErrorProcessor, HTTPHandler, HTTPSHandler, OpenerDirector

import grpc
from tuf.api.exceptions import DownloadError, DownloadHTTPError, SlowRetrievalError
from tuf.ngclient import FetcherInterface

from core.fleet_state import MetadataFile
from core.grpc_transport import CHANNEL_OPTIONS, MUTUAL_TLS_OPTIONS
from core.logs import peer_text
from edge_agent.trust.question import CatalogueSource
from protos.catalogue.v1 import catalogue_pb2
from protos.catalogue.v1.catalogue_pb2_grpc import CatalogueServiceStub

BASE_URL = "catalogue:/"
# Derived: TUF's bound on a targets file, and its envelope.
MAX_METADATA_FILE_BYTES = 5_000_000
_NOT_FOUND = 404


@dataclass(frozen=True, slots=True)
class Pace:
    """How slow a server may be: `min_bytes_per_s` on average, once `grace_s` has passed; silence for `idle_s` never."""

    # Chosen: a tenth of the slowest mobile link on which a model could be fetched at all.
    min_bytes_per_s: float = 500.0
    grace_s: float = 10.0
    idle_s: float = 10.0
    # On one file that comes as one message.
    message_s: float = 20.0


class _Named(FetcherInterface):
    """A source that knows files by name."""

    def _fetch(self, url: str) -> Iterator[bytes]:
        return iter((self._content(url.removeprefix(BASE_URL)),))

    @abstractmethod
    def _content(self, name: str) -> bytes: ...


class AtHand(_Named):
    """What came with the assignment, and the timestamp that is held already; nothing else, and no waiting.

    The controller sends along whatever is newer than what this agent says it holds. So a root that is not among it
    does not exist by the controller's word, exactly as when it were asked for.
    """

    def __init__(self, files: tuple[MetadataFile, ...], *, timestamp: bytes | None) -> None:
        held: Mapping[str, bytes] = {} if timestamp is None else {"timestamp.json": timestamp}
        self._files = {**held, **{file.name: file.content for file in files}}

    def _content(self, name: str) -> bytes:
        content = self._files.get(name)
        if content is None:
            raise DownloadHTTPError(f"{name}: not at hand", _NOT_FOUND)
        return content


class FromController(_Named):
    """CatalogueService over mutual TLS; the caller closes it."""

    def __init__(self, source: CatalogueSource, *, pace: Pace) -> None:
        bounds = {"grpc.max_receive_message_length": MAX_METADATA_FILE_BYTES + 4096}
        options = list((dict([*CHANNEL_OPTIONS, *MUTUAL_TLS_OPTIONS]) | bounds).items())
        self._channel = grpc.secure_channel(str(source.controller), source.tls.channel_credentials(), options=options)
        self._stub = CatalogueServiceStub(self._channel)
        self._pace = pace

    def close(self) -> None:
        self._channel.close()

    def _content(self, name: str) -> bytes:
        request = catalogue_pb2.GetMetadataRequest(name=name)
        try:
            file: catalogue_pb2.MetadataFile = self._stub.GetMetadata(request, timeout=self._pace.message_s)
        except grpc.RpcError as error:
            raise _download_error(name, cast("grpc.Call", error)) from error
        return file.content


class FromHttp(FetcherInterface):
    """A plain HTTP server of metadata and targets, as public TUF repositories are; no redirects, no proxies."""

    def __init__(self, *, pace: Pace, monotonic_s: Callable[[], float] = time.monotonic) -> None:
        self._pace = pace
        self._monotonic_s = monotonic_s
        self._opener = OpenerDirector()
        for handler in (HTTPHandler(), HTTPSHandler(), HTTPErrorProcessor(), HTTPDefaultErrorHandler()):
            self._opener.add_handler(handler)

    def _fetch(self, url: str) -> Iterator[bytes]:
        if urlsplit(url).scheme not in {"http", "https"}:
            raise DownloadError(f"{url}: expected http or https")
        try:
            response = cast("HTTPResponse", self._opener.open(url, timeout=self._pace.idle_s))
        except HTTPError as error:
            status = error.code
            error.close()
            raise DownloadHTTPError(f"{url}: HTTP status {status}", status) from error
        except TimeoutError as error:
            raise SlowRetrievalError(f"{url}: silent for {self._pace.idle_s:g} s") from error
        except (URLError, HTTPException, OSError) as error:
            raise DownloadError(f"{url}: {error}") from error
        return self._pieces(url, response)

    def _pieces(self, url: str, response: HTTPResponse) -> Iterator[bytes]:
        start_s = self._monotonic_s()
        received_bytes = 0
        with response:
            while piece := self._piece(url, response):
                received_bytes += len(piece)
                self._require_pace(url, received_bytes, self._monotonic_s() - start_s)
                yield piece
        if response.length:
            raise DownloadError(f"{url}: the connection ended {response.length} bytes too early")

    def _piece(self, url: str, response: HTTPResponse) -> bytes:
        try:
            # One read of the socket, so that a server that drips is seen at every drop.
            return response.read1(1 << 16)
        except TimeoutError as error:
            raise SlowRetrievalError(f"{url}: silent for {self._pace.idle_s:g} s") from error
        except (HTTPException, OSError) as error:
            raise DownloadError(f"{url}: {error}") from error

    def _require_pace(self, url: str, received_bytes: int, elapsed_s: float) -> None:
        pace = self._pace
        if elapsed_s > pace.grace_s and received_bytes < elapsed_s * pace.min_bytes_per_s:
            raise SlowRetrievalError(
                f"{url}: expected at least {pace.min_bytes_per_s:g} bytes/s, got {received_bytes} in {elapsed_s:.1f} s"
            )


def _download_error(name: str, error: grpc.Call) -> DownloadError:
    code = error.code()
    if code is grpc.StatusCode.NOT_FOUND:
        return DownloadHTTPError(f"{name}: the controller has no such file", _NOT_FOUND)
    reason = f"{name}: {code.name.lower()}: {peer_text(error.details() or '')}"
    return SlowRetrievalError(reason) if code is grpc.StatusCode.DEADLINE_EXCEEDED else DownloadError(reason)
