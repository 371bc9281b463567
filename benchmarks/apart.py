"""Keep apart, on one machine, what is measured and what measures it, and both from whatever else runs there.

Of three processes that wake each other over loopback the kernel likes to put all on one core, where they wait for each
other for milliseconds while the other core idles; and a process that has begun its time slice keeps it until the next
tick (4 ms where the kernel has 250 a second). Devices and their broker are no part of an agent, nor is whatever else
this machine does: so both sides get cores of their own and a real-time class.
"""

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from pathlib import Path

_REAL_TIME = os.sched_param(1)


@contextmanager
def apart(others: Sequence[int]) -> Iterator[Callable[[int], AbstractContextManager[None]]]:
    """Leave one core to responders, and yield what puts one there; the rest is for `others` and what they start.

    Both come before all else. A thread that has chosen a class for itself keeps it. Afterwards all is as it was.

    Args:
        others: process ids. What it yields takes one, too.

    Raises:
        RuntimeError: there is only one core, or no right to real-time classes.
    """
    first, *rest = sorted(os.sched_getaffinity(0))
    if not rest:
        raise RuntimeError("expected two cores at least, got one; with --no-apart it runs here")
    with ExitStack() as stack:
        for process in others:
            stack.enter_context(_placed(process, set(rest)))
        yield lambda process: _placed(process, {first})


@contextmanager
def _placed(process: int, cores: set[int]) -> Iterator[None]:
    before: dict[int, tuple[set[int], int, os.sched_param]] = {}
    try:
        for thread in _threads(process):
            # One that has ended since it was listed needs no place.
            with suppress(ProcessLookupError):
                policy = os.sched_getscheduler(thread)
                before[thread] = os.sched_getaffinity(thread), policy, os.sched_getparam(thread)
                os.sched_setaffinity(thread, cores)
                if policy == os.SCHED_OTHER:
                    _hurry(thread)
        yield
    finally:
        for thread in _threads(process):
            # Who came meanwhile was started by one of the others.
            former_cores, policy, parameters = before.get(thread, before[process])
            with suppress(ProcessLookupError):
                os.sched_setaffinity(thread, former_cores)
                os.sched_setscheduler(thread, policy, parameters)


def _hurry(thread: int) -> None:
    try:
        os.sched_setscheduler(thread, os.SCHED_RR, _REAL_TIME)
    except PermissionError as error:
        raise RuntimeError("real-time classes need CAP_SYS_NICE: run it as root, or with --no-apart") from error


def _threads(process: int) -> list[int]:
    return [int(task.name) for task in Path(f"/proc/{process}/task").iterdir()]
