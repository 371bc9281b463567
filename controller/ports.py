"""The controller's ports: bound before anything is started, so that one in use is found out first.

open_ports   bind all three, with what they show and whom they let in
announced    say where we listen, for as long as it is true
"""

import logging
import os
from collections.abc import Iterator
from contextlib import AsyncExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import orjson

from controller.api.enrolment_grpc import EnrolmentServer
from controller.api.grpc_server import GrpcServer
from controller.api.http_server import HttpServer
from controller.api.http_tls import CertificateFiles, ServerCertificate
from controller.api.policy import PolicyInterceptor
from controller.identity.service import Identity
from controller.settings import Settings
from core.addresses import parse_address
from core.atomic_files import write_atomically
from core.grpc_server_credentials import mutual_tls, one_sided_tls
from core.rpc_metrics import MeasuredCalls

_log = logging.getLogger(__name__)

ENDPOINTS_FILE = "endpoints.json"


@dataclass(frozen=True, slots=True)
class Ports:
    """Bound, not yet answering."""

    grpc: GrpcServer
    enrolment: EnrolmentServer
    http: HttpServer
    # What the HTTP port shows of the fleet's authority, to be kept fresh; None: nothing, or the operator's own.
    certificate: ServerCertificate | None
    # The operator's own.
    certificate_files: CertificateFiles | None


def open_ports(settings: Settings, identity: Identity, stack: AsyncExitStack, measured: MeasuredCalls) -> Ports:
    grpc_server = GrpcServer(
        parse_address(settings.grpc_bind),
        mutual_tls(identity.server_identity),
        max_sessions=settings.fleet.max_sessions,
        keepalive_s=settings.fleet.keepalive_s,
        interceptors=[measured, PolicyInterceptor(identity)],
    )
    stack.push_async_callback(grpc_server.stop)
    enrolment = EnrolmentServer(
        parse_address(settings.enrolment_bind), one_sided_tls(identity.server_identity), interceptors=[measured]
    )
    stack.push_async_callback(enrolment.stop)
    files, certificate = _certificate_files(settings), _fleet_certificate(settings, identity)
    shown = certificate if files is None else files.certificate
    http_server = HttpServer(parse_address(settings.http_bind), certificate=shown)
    stack.callback(http_server.close)
    return Ports(grpc_server, enrolment, http_server, certificate, files)


def _certificate_files(settings: Settings) -> CertificateFiles | None:
    if settings.http_certificate is None or settings.http_key is None:
        return None
    return CertificateFiles(settings.http_certificate, settings.http_key)


def _fleet_certificate(settings: Settings, identity: Identity) -> ServerCertificate | None:
    """Return what the fleet's authority certified, if the HTTP port shows that."""
    if settings.http_certificate is not None or not settings.http_speaks_tls:
        return None
    own = identity.server_identity()
    return ServerCertificate(own.certificate_chain, own.private_key)


@contextmanager
def announced(data_dir: Path, ports: Ports, *, heavy: str) -> Iterator[None]:
    """Say where we listen, in the log and in `data_dir/endpoints.json`, as long as it is true."""
    path = data_dir / ENDPOINTS_FILE
    endpoints = {
        "controller_grpc": str(ports.grpc.address),
        "controller_enrolment": str(ports.enrolment.address),
        "controller_http": ports.http.url,
        "heavy_http": heavy,
    }
    write_atomically(path, orjson.dumps({**endpoints, "pid": os.getpid()}))
    _log.info("controller is ready", extra=endpoints)
    try:
        yield
    finally:
        path.unlink(missing_ok=True)
