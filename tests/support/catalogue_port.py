"""CatalogueService over mutual TLS, and a plain HTTP server, for a repository in memory; both slow on purpose."""

import asyncio
import threading
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import grpc
import grpc.aio
from cryptography.hazmat.primitives.asymmetric import ec

from core.grpc_transport import TlsIdentity
from edge_agent.trust.question import CatalogueSource
from protos.catalogue.v1 import catalogue_pb2 as pb
from tests.support.enrolment import FakeAuthority, pem_of_key
from tests.support.mutual_tls import mutual_port

_SERVICE = "nanofleet.catalogue.v1.CatalogueService"


class CataloguePort:
    """What answers GetMetadata; `asked` are the names that were asked for. While `answers` is clear, nobody is."""

    def __init__(self, files: Mapping[str, bytes]) -> None:
        self.files = files
        self.asked: list[str] = []
        self.answers = asyncio.Event()
        self.answers.set()

    def handler(self) -> grpc.GenericRpcHandler:
        method = grpc.unary_unary_rpc_method_handler(
            self._get_metadata,
            request_deserializer=pb.GetMetadataRequest.FromString,
            response_serializer=pb.MetadataFile.SerializeToString,
        )
        return grpc.method_handlers_generic_handler(_SERVICE, {"GetMetadata": method})

    async def _get_metadata(
        self, request: pb.GetMetadataRequest, context: "grpc.aio.ServicerContext[object, object]"
    ) -> pb.MetadataFile:
        self.asked.append(request.name)
        await self.answers.wait()
        if request.name not in self.files:
            await context.abort(grpc.StatusCode.NOT_FOUND, "no such file")
        return pb.MetadataFile(name=request.name, content=self.files[request.name])


@asynccontextmanager
async def catalogue_source(port: CataloguePort, *, agent: str) -> AsyncIterator[CatalogueSource]:
    """Yield how `agent` reaches `port`."""
    authority = FakeAuthority()
    key = ec.generate_private_key(ec.SECP256R1())
    mine = TlsIdentity(authority.certified(key.public_key(), agent), pem_of_key(key), authority.pem)
    async with mutual_port(authority.controller(), port.handler()) as address:
        yield CatalogueSource(address, mine)


@contextmanager
def http_server(*, pieces: Iterator[bytes], length: int | None = None) -> Iterator[str]:
    """Yield the address of a server that answers every request with `pieces`, each sent when it is made."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            if length is not None:
                self.send_header("Content-Length", str(length))
            self.end_headers()
            with suppress(ConnectionError):
                for piece in pieces:
                    self.wfile.write(piece)

        def log_message(self, format: str, *args: object) -> None:  # noqa: A002 (named by the library)
            return

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    serving = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    serving.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        serving.join()
        server.server_close()
