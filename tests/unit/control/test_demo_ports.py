"""Ports for the parts of the demo: free, and out of reach of connections."""

import socket
from pathlib import Path

import pytest

from controller.demo.ports import free_port
from core.errors import Unavailable


def test_a_port_is_free_and_none_that_the_kernel_gives_to_connections() -> None:
    first, _ = Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()
    port = free_port()
    assert port < int(first)
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", port))


def test_a_port_that_is_taken_is_not_chosen() -> None:
    taken, free = free_port(), free_port()
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", taken))
        assert free_port([taken, free]) == free
        with pytest.raises(Unavailable, match="all taken"):
            free_port([taken])
