"""What the operating system says of this process, under the names that every Prometheus client library uses.

Read from /proc, so on Linux only; elsewhere only the processor time is there.
"""

import os
import resource
import time
from collections.abc import Callable, Iterable
from pathlib import Path

from core.metrics import Reading, Registry

_PROC = Path("/proc/self")
# `man 5 proc`, /proc/pid/stat: the fields behind the name in brackets begin with the third, starttime is the 22nd.
_START_TIME_FIELD = 22 - 3


def register_process(registry: Registry, *, version: str) -> None:
    """Add the `process_*` family, and which release this is."""
    registry.gauge("nanofleet_build", "The release that runs.", ("version",), lambda: [((version,), 1)])
    registry.tally("process_cpu_seconds", "Processor time, of user and system.", (), lambda: _one(cpu_s))
    registry.gauge("process_resident_memory_bytes", "Memory that is held.", (), lambda: _one(resident_bytes))
    registry.gauge("process_open_fds", "Open file descriptors.", (), lambda: _one(_open_files))
    registry.gauge("process_max_fds", "File descriptors that may be open.", (), lambda: _one(_max_files))
    registry.gauge("process_start_time_seconds", "When the process began, in Unix time.", (), lambda: _one(_started_s))


def _one(read: Callable[[], float]) -> Iterable[Reading]:
    """Return what `read` says; nothing where this system does not tell."""
    try:
        return [((), read())]
    except OSError:
        return []


def cpu_s() -> float:
    times = os.times()
    return times.user + times.system


def resident_bytes() -> int:
    """Return what the kernel holds in memory for this process. Raises OSError where there is no /proc."""
    pages = int((_PROC / "statm").read_text().split()[1])
    return pages * resource.getpagesize()


def _open_files() -> int:
    # One of them is this look.
    return len(os.listdir(_PROC / "fd")) - 1  # noqa: PTH208 (a list of names is all that is wanted)


def _max_files() -> int:
    return resource.getrlimit(resource.RLIMIT_NOFILE)[0]


def _started_s() -> float:
    fields = (_PROC / "stat").read_text().rpartition(")")[2].split()
    since_boot_s = int(fields[_START_TIME_FIELD]) / os.sysconf("SC_CLK_TCK")
    return time.time() - time.clock_gettime(time.CLOCK_BOOTTIME) + since_boot_s
