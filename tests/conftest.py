"""What holds for every test."""

import os
from collections.abc import Iterator

import pytest

from tests.support.booted_hosts import require_hosts
from tests.support.mosquitto import MissingProgram, program_path
from tests.support.postgresql import Postgresql, postgresql_programs, running_postgresql
from tests.support.sensor_tools import require_sensor_tools
from tests.support.wire import require_recording

# Before gRPC is imported: its fork handlers crash about one child in a hundred that starts during a call.
os.environ["GRPC_ENABLE_FORK_SUPPORT"] = "0"


def pytest_sessionstart() -> None:
    """Fail at once where tests that need a program would be skipped though they must not be."""
    if os.environ.get("CI") == "true":
        try:
            for program in ("mosquitto", "mosquitto_rr", "prometheus", "promtool", "systemd-analyze"):
                program_path(program)
            postgresql_programs()
            require_recording()
            require_hosts()
            require_sensor_tools()
        except MissingProgram as error:
            pytest.exit(f"continuous integration skips nothing: {error}", returncode=1)


@pytest.fixture(scope="session")
def postgresql() -> Iterator[Postgresql]:
    """One server for all who need one; each makes databases of its own on it."""
    with running_postgresql() as server:
        yield server
