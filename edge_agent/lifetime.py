"""How the parts of a process begin and end: threads, named tasks, signals, and the last spans."""

import asyncio
import gc
import logging
import os
import signal
import sys
import threading
from collections.abc import Awaitable, Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import AsyncExitStack
from pathlib import Path

from core.tasks import supervise
from core.telemetry import Tracing

# Derived: the exporter's own timeout, and some.
FLUSH_TIMEOUT_S = 8.0
# Chosen: often enough for what failed calls leave in cycles, for requests leave none.
COLLECT_INTERVAL_S = 60.0
# Chosen: far below the time between requests, for all but the busiest agents.
LOOK_INTERVAL_S = 0.02

_log = logging.getLogger(__name__)


def thread(name: str, closing: AsyncExitStack) -> ThreadPoolExecutor:
    """Return a thread of its own for work that blocks, ended by `closing`."""
    executor = ThreadPoolExecutor(1, thread_name_prefix=name)
    closing.callback(executor.shutdown)
    return executor


def start(group: asyncio.TaskGroup, loops: Mapping[str, Callable[[], Awaitable[None]]]) -> list[asyncio.Task[None]]:
    """Run each loop under its name, again whenever it fails."""
    return [group.create_task(supervise(name, run), name=name) for name, run in loops.items()]


def stop_on_signal() -> asyncio.Event:
    """Return an event that SIGTERM or SIGINT sets."""
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    return stop


async def first_of(*waits: Callable[[], Awaitable[object]], timeout_s: float) -> None:
    """Return when one of them does, or after `timeout_s`."""
    tasks = [asyncio.ensure_future(wait()) for wait in waits]
    await asyncio.wait(tasks, timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED)
    for task in tasks:
        task.cancel()


async def flush(tracing: Tracing) -> None:
    """Send the last spans, off the loop and within a bound: the receiver may be away."""
    flushing = asyncio.get_running_loop().run_in_executor(None, tracing.shutdown)
    done, _ = await asyncio.wait([flushing], timeout=FLUSH_TIMEOUT_S)
    if not done:
        _log.warning("the last spans could not be sent in time")


def prefer_the_loop() -> None:
    """Keep the interpreter from making requests wait; call it once everything is made.

    What the start made stays: collections that looked through it again and again stopped every answer for 40 ms, once
    in 10,000 requests. Collections of what is new are short and many, those of what has outlived one are few, for most
    of that is replies, which no cycle keeps. The interpreter counts what is made less what is freed: where each new
    reply puts an old one out, far more is new than it counts (at 700 a collection took up to 3 ms, at 150 up to 0.4). A
    thread that computes (spans, outbox, samples) leaves the interpreter to the loop five times sooner than by default
    (ADR 34).
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(150, 20_000, 100)
    sys.setswitchinterval(0.001)
    _keep_threads_from_interrupting()


async def keep_collected(
    is_idle: Callable[[], bool], *, interval_s: float = COLLECT_INTERVAL_S, look_s: float = LOOK_INTERVAL_S
) -> None:
    """Collect all that is new since the start, for ever: now and then, and while nobody waits."""
    delay_s = interval_s
    while True:
        await asyncio.sleep(delay_s)
        delay_s = look_s
        if is_idle():
            gc.collect()
            delay_s = interval_s


def _keep_threads_from_interrupting() -> None:
    """Have the threads that there are wait for their turn rather than interrupt the loop's as they wake (sched(7)).

    Those of gRPC wake five times a call, and the loop finds more done when they have worked undisturbed: a sixth more
    calls (measured, benchmarks.peer_oip).
    """
    if not hasattr(os, "SCHED_BATCH"):
        return
    loops = threading.get_native_id()
    for thread_id in (int(task.name) for task in Path("/proc/self/task").iterdir()):
        if thread_id == loops:
            continue
        try:
            os.sched_setscheduler(thread_id, os.SCHED_BATCH, os.sched_param(0))
        except OSError as error:
            # It has ended, or a sandbox does not allow it, which costs speed and nothing else.
            _log.debug("a thread keeps its scheduling class", extra={"reason": error.strerror})
