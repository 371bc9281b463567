"""The certificate of the HTTP port: TLS 1.2 or newer, and replaced while the port stays open.

Every handshake is handed to the context of the newest certificate by the hook meant for server names, which is called
for clients that name none too. Loading a new pair into the context in use would not do: a pair that does not fit would
break it, and one with a key of another kind would stand beside the old one.
"""

import asyncio
import logging
import ssl
import tempfile
from pathlib import Path

from core.errors import InvalidRequest

_log = logging.getLogger(__name__)

# Chosen: certificates are renewed days before they end; whoever is told that one is out of use waits a minute.
LOOK_S = 60.0


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


class CertificateFiles:
    """An operator's own certificate, followed: whoever renews it writes the files and tells us nothing."""

    def __init__(self, certificate_file: Path, key_file: Path) -> None:
        """Read both files.

        Raises:
            InvalidRequest: one cannot be read, or they are no pair.
        """
        self._certificate_file = certificate_file
        self._key_file = key_file
        # Before they are read, so that a change in between is seen at the next look.
        self._seen = self._state()
        self.certificate = ServerCertificate(*read_certificate(certificate_file, key_file))

    async def run(self) -> None:
        """Look at the files again and again, for ever."""
        while True:
            await asyncio.sleep(LOOK_S)
            await asyncio.to_thread(self.look)

    def look(self) -> None:
        """Show what is in the files if they changed. While they are no pair, the old one stays."""
        if (state := self._state()) == self._seen:
            return
        self._seen = state
        try:
            self.certificate.replace(*read_certificate(self._certificate_file, self._key_file))
        except InvalidRequest as error:
            _log.error("the old certificate of the HTTP port stays", extra={"reason": str(error)})
        else:
            _log.info("certificate of the HTTP port replaced", extra={"path": str(self._certificate_file)})

    def _state(self) -> tuple[tuple[int, int, int] | None, ...]:
        return tuple(map(_file_state, (self._certificate_file, self._key_file)))


def _file_state(path: Path) -> tuple[int, int, int] | None:
    try:
        status = path.stat()
    except OSError:
        # Reading it says why.
        return None
    return status.st_ino, status.st_mtime_ns, status.st_size


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
