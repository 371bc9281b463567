"""What is said to a service manager, over a socket as systemd opens one."""

import asyncio
import logging
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from core.errors import InvalidRequest
from core.service_notices import ALIVE, READY, ServiceNotices


@pytest.fixture
def manager(tmp_path: Path) -> Iterator[socket.socket]:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as listener:
        listener.bind(str(tmp_path / "notify"))
        listener.settimeout(5)
        yield listener


def test_a_notice_arrives_at_the_socket_that_is_named(manager: socket.socket) -> None:
    ServiceNotices.taken_from({"NOTIFY_SOCKET": manager.getsockname()}, pid=7).say(READY)
    assert manager.recv(100) == b"READY=1"


def test_a_notice_arrives_at_an_abstract_socket() -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as listener:
        # The kernel chooses a free abstract name.
        listener.bind("")
        name = "@" + listener.getsockname()[1:].decode()
        ServiceNotices.taken_from({"NOTIFY_SOCKET": name}, pid=7).say(READY)
        listener.settimeout(5)
        assert listener.recv(100) == b"READY=1"


def test_without_a_service_manager_nothing_is_said_and_nothing_is_awaited() -> None:
    ServiceNotices.taken_from({}, pid=7).say(READY)


def test_children_do_not_inherit_what_was_meant_for_this_process() -> None:
    environment = {"NOTIFY_SOCKET": "/run/n", "WATCHDOG_USEC": "5000000", "WATCHDOG_PID": "7", "HOME": "/"}
    assert ServiceNotices.taken_from(environment, pid=7) == ServiceNotices("/run/n", 5.0)
    assert environment == {"HOME": "/"}


def test_the_watchdog_of_another_process_is_not_fed() -> None:
    environment = {"NOTIFY_SOCKET": "/run/n", "WATCHDOG_USEC": "5000000", "WATCHDOG_PID": "8"}
    assert ServiceNotices.taken_from(environment, pid=7).silence_s is None


@pytest.mark.parametrize(
    ("name", "value"), [("NOTIFY_SOCKET", "run/notify"), ("WATCHDOG_USEC", "soon"), ("WATCHDOG_USEC", "0")]
)
def test_what_no_service_manager_says_is_refused_by_name(name: str, value: str) -> None:
    with pytest.raises(InvalidRequest, match=f"^{name}: expected"):
        ServiceNotices.taken_from({name: value}, pid=7)


def test_a_notice_that_nobody_takes_is_logged_and_ends_nothing(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        ServiceNotices(str(tmp_path / "nobody")).say(READY)
    assert "the service manager did not take a notice" in caplog.text


async def test_the_watchdog_is_fed_again_and_again(manager: socket.socket) -> None:
    manager.setblocking(False)
    feeding = asyncio.create_task(ServiceNotices(manager.getsockname(), 0.02).keep_alive())
    loop = asyncio.get_running_loop()
    async with asyncio.timeout(5):
        assert [await loop.sock_recv(manager, 100) for _ in range(3)] == [ALIVE.encode()] * 3
    feeding.cancel()
    with pytest.raises(asyncio.CancelledError):
        await feeding
