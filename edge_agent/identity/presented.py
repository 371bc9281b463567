"""The certificates that a server presents, before any of them is believed.

Python's `ssl` has this in public since 3.13 (`SSLSocket.get_unverified_chain`); before, the same method stands on the
object behind the socket. Nothing but the handshake is sent.
"""

import socket
import ssl
from typing import Any, cast

from core.addresses import Address
from core.errors import Unavailable
from core.spiffe import CONTROLLER_DNS_NAME

# Bound on what is looked at: a certificate, its authority, and what rotation adds.
MAX_PRESENTED = 8
_HANDSHAKE_TIMEOUT_S = 10.0
# The constant `_ssl.ENCODING_DER` of those versions of Python.
_ENCODING_DER = 2


def presented_chain(address: Address) -> list[bytes]:
    """Return what the server at `address` presents, leaf first, each in DER.

    Raises:
        Unavailable: nothing answers there, or it does not speak TLS.
    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    # Looked at, not believed: the caller compares with what the token names, and then connects again with that.
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    context.set_alpn_protocols(["h2"])
    try:
        with (
            socket.create_connection((address.host, address.port), timeout=_HANDSHAKE_TIMEOUT_S) as connection,
            context.wrap_socket(connection, server_hostname=CONTROLLER_DNS_NAME) as secured,
        ):
            return _chain(secured)[:MAX_PRESENTED]
    except ssl.SSLError as error:
        raise Unavailable(
            f"{address}: expected the enrolment port of a controller, got no TLS: {error.reason}"
        ) from error
    except OSError as error:
        raise Unavailable(f"{address}: no controller answers: {error}; check the address and that it runs") from error


def _chain(secured: ssl.SSLSocket) -> list[bytes]:
    public = getattr(secured, "get_unverified_chain", None)
    if public is not None:
        return cast("list[bytes]", public())
    behind: Any = secured._sslobj  # type: ignore[attr-defined]  # the only way before Python 3.13
    return [certificate.public_bytes(_ENCODING_DER) for certificate in behind.get_unverified_chain()]
