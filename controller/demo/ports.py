"""Ports for the parts of a system that is started on one machine for a while."""

import random
import socket
from collections.abc import Sequence

from core.errors import Unavailable

# Below those that Linux gives to connections by default (net.ipv4.ip_local_port_range, from 32768 on): one of those may
# be taken by anybody's connection before it is listened on.
PORTS = range(20_000, 32_768)


def free_port(among: Sequence[int] = PORTS) -> int:
    """Return a TCP port of 127.0.0.1 that nobody listens on.

    Raises:
        Unavailable: all of them are taken.
    """
    for port in random.sample(among, len(among)):
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port
    raise Unavailable(f"no free port: {min(among)} to {max(among)} are all taken; stop some program that listens there")
