"""The certificate of the HTTP port: TLS 1.2 or newer, and replaced while the port stays open.

Every handshake is handed to the context of the newest certificate by the hook meant for server names, which is called
for clients that name none too. Loading a new pair into the context in use would not do: a pair that does not fit would
break it, and one with a key of another kind would stand beside the old one.
"""

import ssl
import tempfile
from pathlib import Path

from core.errors import InvalidRequest


class ServerCertificate:
    """What `HttpServer` shows; `context` stays the same one whatever is replaced."""

    def __init__(self, certificate_chain: bytes, private_key: bytes) -> None:
        """Take a chain, the server's own certificate first, and its unencrypted key, both in PEM.

        Raises:
            InvalidRequest: they are no such pair.
        """
        self._current = _context(certificate_chain, private_key)
        self.context = _context(certificate_chain, private_key)
        self.context.sni_callback = self._choose

    def replace(self, certificate_chain: bytes, private_key: bytes) -> None:
        """Show another certificate from the next handshake on; connections that are open stay.

        Raises:
            InvalidRequest: they are no such pair; the old one stays.
        """
        self._current = _context(certificate_chain, private_key)

    def _choose(self, connection: ssl.SSLObject | ssl.SSLSocket, _name: str | None, _context: ssl.SSLContext) -> None:
        connection.context = self._current


def read_certificate(certificate_file: Path, key_file: Path) -> tuple[bytes, bytes]:
    """Return the chain and the key from an operator's own files.

    Raises:
        InvalidRequest: one cannot be read.
    """
    try:
        return certificate_file.read_bytes(), key_file.read_bytes()
    except OSError as error:
        raise InvalidRequest(
            f"certificate of the HTTP port: {error.filename}: {error.strerror}; "
            "give the paths of a certificate chain and its key in PEM that this process may read"
        ) from error


def _context(certificate_chain: bytes, private_key: bytes) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.set_alpn_protocols(["http/1.1"])
    # The library reads from files only. This one is ours alone (0600) and gone with the block.
    with tempfile.NamedTemporaryFile(prefix="nanofleet-") as pair:
        pair.write(private_key.rstrip() + b"\n" + certificate_chain)
        pair.flush()
        try:
            # Without a password of its own, an encrypted key would make the process ask its terminal.
            context.load_cert_chain(pair.name, password="")
        except (ssl.SSLError, ValueError) as error:
            reason = error.reason if isinstance(error, ssl.SSLError) else error
            raise InvalidRequest(
                "certificate of the HTTP port: expected a certificate chain and its unencrypted key in PEM, got "
                f"something else ({reason})"
            ) from error
    return context
