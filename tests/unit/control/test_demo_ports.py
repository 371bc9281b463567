"""Ports for the parts of the demo: free, and below those that Linux gives to connections unless told otherwise."""

import socket

import pytest

from controller.demo.ports import PORTS, free_port
from core.errors import Unavailable


def test_a_port_is_free_and_of_those_meant_for_listeners() -> None:
    port = free_port()
    assert port in PORTS
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", port))


def test_a_port_that_is_taken_is_not_chosen() -> None:
    taken = free_port()
    free = free_port([port for port in PORTS if port != taken])
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", taken))
        assert free_port([taken, free]) == free
        with pytest.raises(Unavailable, match="all taken"):
            free_port([taken])
