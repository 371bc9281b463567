"""Both programs as a service manager of type `notify` runs them: ready, alive, ending."""

import asyncio
import signal
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from core.addresses import Address
from core.service_notices import ALIVE, READY, STOPPING
from tests.support.controller_process import ControllerProcess
from tests.support.enrolled import Realm
from tests.support.local_agent import AgentProcess

TIMEOUT_S = 60.0
WATCHDOG = {"WATCHDOG_USEC": "200000"}


@pytest.fixture
def manager(tmp_path: Path) -> Iterator[socket.socket]:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as listener:
        listener.bind(str(tmp_path / "notify"))
        listener.settimeout(TIMEOUT_S)
        yield listener


def heard_until(manager: socket.socket, last: str) -> set[str]:
    """Return what was said up to `last`."""
    heard = set()
    while last not in heard:
        heard.add(manager.recv(200).decode())
    return heard


def test_the_controller_says_that_it_is_ready_alive_and_ending(manager: socket.socket, tmp_path: Path) -> None:
    with ControllerProcess(tmp_path / "data", NOTIFY_SOCKET=manager.getsockname(), **WATCHDOG) as controller:
        heard_until(manager, READY)
        assert controller.endpoints_file.exists()
        heard_until(manager, ALIVE)
        controller.send(signal.SIGTERM)
        heard_until(manager, STOPPING)
        assert controller.exit_code() == 0


async def test_the_agent_says_that_it_is_ready_alive_and_ending(manager: socket.socket, tmp_path: Path) -> None:
    nobody = Address("127.0.0.1", 9)
    environment = {"NOTIFY_SOCKET": manager.getsockname(), **WATCHDOG}
    agent = AgentProcess(tmp_path / "agent", realm=Realm(), controller=nobody, environment=environment)
    await agent.start()
    await asyncio.to_thread(heard_until, manager, READY)
    await asyncio.to_thread(heard_until, manager, ALIVE)
    stopping = asyncio.create_task(agent.stop())
    await asyncio.to_thread(heard_until, manager, STOPPING)
    assert await stopping == 0
