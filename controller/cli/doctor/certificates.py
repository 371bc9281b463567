"""The certificate that browsers and agents are shown: the operator's own file, or what stands at the port."""

import socket
import ssl
from collections.abc import Sequence
from datetime import datetime, timedelta
from pathlib import Path

from cryptography import x509

from controller.settings import Settings
from core.addresses import parse_address
from core.doctor import Finding, problem, skipped
from core.machine_checks import certificate_lasts, files_are_private

# Chosen: time enough to get another one; the fleet's own is renewed by itself long before.
_OWN_SPARE, _FLEET_SPARE = timedelta(days=14), timedelta(hours=12)
_TIMEOUT_S = 5.0


def shown_certificate(settings: Settings, *, now: datetime, is_running: bool) -> Finding | Sequence[Finding]:
    if settings.http_certificate is not None and settings.http_key is not None:
        return _own(settings.http_certificate, settings.http_key, now=now)
    if not is_running:
        return skipped("certificate", "the controller makes itself one when it starts")
    address = parse_address(settings.enrolment_bind)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    # Looked at, not believed.
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    context.set_alpn_protocols(["h2"])
    try:
        with (
            socket.create_connection((address.host, address.port), timeout=_TIMEOUT_S) as connection,
            context.wrap_socket(connection) as secured,
        ):
            shown = secured.getpeercert(binary_form=True)
    except OSError as error:
        return skipped("certificate", f"{address} shows none: {error}")
    assert shown is not None
    found = x509.load_der_x509_certificate(shown)
    remedy = "restart the controller; if it stays, see its log for why it does not renew"
    return _lasts(found, now=now, spare=_FLEET_SPARE, remedy=remedy)


def _own(certificate: Path, key: Path, *, now: datetime) -> Finding | Sequence[Finding]:
    try:
        found = x509.load_pem_x509_certificates(certificate.read_bytes())[0]
        ssl.create_default_context(ssl.Purpose.CLIENT_AUTH).load_cert_chain(certificate, key)
    except (OSError, ValueError) as error:
        return problem(
            "certificate",
            f"{certificate}, {key}: {error}",
            expected="a chain in PEM and its key, both readable to this user",
            remedy="set http_certificate and http_key to files that belong together",
        )
    remedy = "get another one and put it in its place; the controller takes it up without a restart"
    return (
        _lasts(found, now=now, spare=_OWN_SPARE, remedy=remedy),
        files_are_private([key], check="certificate key"),
    )


def _lasts(found: x509.Certificate, *, now: datetime, spare: timedelta, remedy: str) -> Finding:
    begins, ends = found.not_valid_before_utc, found.not_valid_after_utc
    return certificate_lasts("certificate", begins, ends, now=now, spare=spare, remedy=remedy)
