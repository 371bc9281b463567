"""The certificate of a replica, followed: it is renewed in `tls_dir` days before it ends, and replicas live longer."""

import logging
from collections.abc import Callable
from pathlib import Path

from core.clock import Clock
from core.errors import NotFound
from core.grpc_transport import TlsIdentity
from core.tls_files import read_tls_identity

_log = logging.getLogger(__name__)

# Chosen: certificates are renewed days before they end.
LOOK_S = 3600.0


class FollowedTls:
    """Tells `follow` of every other identity in the folder; `look` may be called as often as one likes."""

    def __init__(
        self, folder: Path, follow: Callable[[TlsIdentity], None], *, shown: TlsIdentity, clock: Clock
    ) -> None:
        self._folder = folder
        self._follow = follow
        self._shown = shown
        self._clock = clock
        self._next_look_s = clock.monotonic_s() + LOOK_S

    def look(self) -> None:
        """Read two small files once an hour; the old identity stays while they cannot be read."""
        if self._clock.monotonic_s() < self._next_look_s:
            return
        self._next_look_s = self._clock.monotonic_s() + LOOK_S
        try:
            found = read_tls_identity(self._folder)
        except NotFound as error:
            _log.warning("the old certificate of the replica stays", extra={"reason": str(error)})
            return
        if found != self._shown:
            self._shown = found
            self._follow(found)
