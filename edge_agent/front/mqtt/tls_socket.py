"""TLS on a non-blocking socket, in the shape that `buffered_socket` has for the plain one.

Bytes that OpenSSL has decrypted wake no loop: the kernel holds nothing then. So a read goes on until OpenSSL asks for
more, or holds nothing of the record that it was in; what is left then is in the kernel, which wakes us.
"""

import asyncio
import errno
import socket
import ssl


class TlsSocket:
    """A connected TLS socket; `recv` and `send` raise BlockingIOError when they would wait."""

    def __init__(self, shaken: ssl.SSLSocket) -> None:
        # What ended it, if TLS did: the peer's alert, in OpenSSL's words.
        self.fault: str | None = None
        self._raw = shaken

    def recv(self, size: int) -> bytes:
        """Return what is there, and all that OpenSSL holds: about `size` bytes, more by a record at most."""
        pieces = [self._recv_record(size)]
        left = size - len(pieces[0])
        # A record holds 16 KiB at most: without going on, a large request would take a turn of the loop for each.
        while pieces[-1] and left > 0:
            try:
                pieces.append(self._recv_record(left))
            except OSError:
                # Nothing more for now, or never again; the next read says which, and nothing that came is lost.
                break
            left -= len(pieces[-1])
        # Asked for less than a record may hold, OpenSSL keeps the rest.
        while pending := self._raw.pending():
            pieces.append(self._recv_record(pending))
        return b"".join(pieces)

    def send(self, piece: bytearray) -> int:
        try:
            return self._raw.send(piece)
        except (ssl.SSLWantReadError, ssl.SSLWantWriteError) as error:
            # The same bytes come again at the front of the next piece, as OpenSSL demands.
            raise BlockingIOError(errno.EAGAIN, "the broker does not read") from error

    def setsockopt(self, level: int, option: int, value: int) -> None:
        self._raw.setsockopt(level, option, value)

    def fileno(self) -> int:
        return self._raw.fileno()

    def setblocking(self, flag: bool) -> None:
        self._raw.setblocking(flag)

    def close(self) -> None:
        self._raw.close()

    def _recv_record(self, size: int) -> bytes:
        try:
            return self._raw.recv(size)
        except (ssl.SSLWantReadError, ssl.SSLWantWriteError) as error:
            raise BlockingIOError(errno.EAGAIN, "nothing to read") from error
        except ssl.SSLError as error:
            self.fault = error.reason or str(error)
            raise


async def shake_hands(connected: socket.socket, context: ssl.SSLContext, *, server_name: str) -> TlsSocket:
    """Take over `connected`, which does not block, and prove on it who both ends are; the caller sets the limit.

    Raises:
        OSError: the peer went away, or is not `server_name` as one of our authorities vouches.
    """
    try:
        _require_name(server_name)
        tls = context.wrap_socket(connected, server_hostname=server_name, do_handshake_on_connect=False)
    except BaseException:
        connected.close()
        raise
    try:
        while True:
            try:
                tls.do_handshake()
            except ssl.SSLWantReadError:
                await _ready(tls, to_write=False)
            except ssl.SSLWantWriteError:
                await _ready(tls, to_write=True)
            else:
                return TlsSocket(tls)
    except BaseException:
        tls.close()
        raise


def _require_name(server_name: str) -> None:
    """Let pass what `wrap_socket` takes: when it raises over a name, it leaves a socket open that nobody holds."""
    try:
        is_possible = bool(server_name.encode("idna")) and "\0" not in server_name
    except UnicodeError:
        is_possible = False
    if not is_possible:
        raise OSError(errno.EINVAL, f"server name {server_name[:80]!r}: expected a DNS name or an address")


async def _ready(tls: ssl.SSLSocket, *, to_write: bool) -> None:
    loop = asyncio.get_running_loop()
    ready: asyncio.Future[None] = loop.create_future()
    watch, forget = (loop.add_writer, loop.remove_writer) if to_write else (loop.add_reader, loop.remove_reader)
    watch(tls.fileno(), _settle, ready)
    try:
        await ready
    finally:
        forget(tls.fileno())


def _settle(ready: "asyncio.Future[None]") -> None:
    if not ready.done():
        ready.set_result(None)
