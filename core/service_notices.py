"""What a service manager is told about this process: that it is ready, alive, ending. sd_notify(3), without a library.

systemd names a datagram socket in NOTIFY_SOCKET, and in WATCHDOG_USEC how long a process may stay silent before it is
ended and started again. Under anything else neither is set, and nothing is sent.

The watchdog is fed from the event loop: it says that the loop turns, which is what a hung process fails at.
"""

import asyncio
import logging
import socket
from collections.abc import MutableMapping
from dataclasses import dataclass
from typing import Self

from core.errors import InvalidRequest

READY, STOPPING, ALIVE = "READY=1", "STOPPING=1", "WATCHDOG=1"
# Chosen: the other end is on this machine; a notice that it cannot take by then is told to nobody.
SEND_TIMEOUT_S = 1.0
# Of the silence that is allowed, as sd_watchdog_enabled(3) recommends.
_FED_AFTER = 0.5

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class ServiceNotices:
    """`address` is where notices go, None: nowhere; `silence_s` is how long the watchdog waits, None: there is none."""

    address: str | None = None
    silence_s: float | None = None

    @classmethod
    def taken_from(cls, environment: MutableMapping[str, str], *, pid: int) -> Self:
        """Take what the service manager says out of `environment`, so that no child answers in our place.

        Raises:
            InvalidRequest: it is not what sd_notify(3) says it must be.
        """
        address = environment.pop("NOTIFY_SOCKET", "")
        micros, owner = environment.pop("WATCHDOG_USEC", ""), environment.pop("WATCHDOG_PID", str(pid))
        if address and address[0] not in "/@":
            raise InvalidRequest(f"NOTIFY_SOCKET: expected a path, or @ and an abstract name, got {address[:200]!r}")
        if micros and not (micros.isdecimal() and int(micros)):
            raise InvalidRequest(f"WATCHDOG_USEC: expected microseconds, got {micros[:200]!r}")
        is_watched = bool(address and micros) and owner == str(pid)
        return cls(address or None, int(micros) / 1e6 if is_watched else None)

    def say(self, notice: str) -> None:
        """Send one notice; when it cannot be taken, the service manager acts on the silence, and the log says why."""
        if self.address is None:
            return
        # An abstract name begins with a zero byte, see unix(7).
        address = "\0" + self.address[1:] if self.address.startswith("@") else self.address
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sender:
            sender.settimeout(SEND_TIMEOUT_S)
            try:
                sender.sendto(notice.encode(), address)
            except OSError as error:
                _log.warning("the service manager did not take a notice", extra={"notice": notice, "why": str(error)})

    async def keep_alive(self) -> None:
        """Feed the watchdog until cancelled; without one, just wait."""
        if self.silence_s is None:
            await asyncio.Event().wait()
            return
        while True:
            self.say(ALIVE)
            await asyncio.sleep(self.silence_s * _FED_AFTER)
