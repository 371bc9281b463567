"""Try a variant before it serves, where it can do no harm: the parent's side of `child`, and the verdict.

    SelfTester.test(manifest, folder) ─▶ child process: load, golden inputs, measure ─▶ SelfTestResult
    SelfTester.measure(manifest, folder) ─▶ the same ─▶ Footprint, what the variant takes of memory

The child gets a clean environment, an isolated interpreter, the lowest priority, bounds on memory and processor time,
and `timeout_s`; its reply is read up to a bound and it is killed by its process id however the test ends. What ends it
early by its own doing, a crash in a parser or its bounds, is a verdict on the variant. That it could not be started or
was killed from outside is not: a machine short of memory takes this process first. Nor is the wall clock, which tells
of what else goes on, until it ran out MAX_TIMEOUTS times.
"""

import asyncio
import contextlib
import logging
import os
import signal
import sys
from asyncio.subprocess import DEVNULL, PIPE, Process
from collections.abc import AsyncIterator
from dataclasses import dataclass
from math import ceil
from pathlib import Path
from typing import Self

import orjson

from core.errors import ErrorCode, InvalidRequest, Unavailable
from core.fleet_state import Problem
from core.logs import peer_text
from core.manifest import Manifest
from edge_agent.runtime.footprint import Footprint, Footprints
from edge_agent.settings import AgentSettings

_log = logging.getLogger(__name__)

# Derived: seven numbers and a reason of at most 800 characters.
MAX_REPLY_BYTES = 1 << 14
# Chosen: a machine that was busy at all of these times has no room for the model either.
MAX_TIMEOUTS = 3
# Chosen: variants that timed out and were overtaken are forgotten beyond it.
_MAX_TIMED_OUT = 64
# Derived: the file as read, its graph, the weights as tensors and as the kernels want them.
_COPIES = 4
_MODULE = "edge_agent.activation.child"
# Where the dynamic linker finds the libraries that the parent found; the only thing inherited.
_INHERITED = ("LD_LIBRARY_PATH",)


@dataclass(frozen=True, slots=True)
class SelfTestResult:
    """`problem` says what was expected and what came; numbers are None when it did not come to measuring."""

    problem: Problem | None = None
    latency_p95_ms: float | None = None
    peak_rss_bytes: int | None = None
    footprint: Footprint | None = None


@dataclass(frozen=True, slots=True)
class SelfTestLimits:
    timeout_s: float = 60.0
    # Private memory that can be written, beyond what the size of the variant explains.
    memory_bytes: int = 512 << 20
    intra_op_threads: int = 1
    # Rows of the largest run, which memory is measured with.
    max_batch: int = 1

    @classmethod
    def of(cls, settings: AgentSettings) -> Self:
        runtime = settings.runtime
        return cls(
            settings.activation.self_test_timeout_s,
            intra_op_threads=runtime.intra_op_threads,
            max_batch=runtime.max_batch,
        )


class SelfTester:
    """Runs one child at a time per call; implements `SelfTester` of `reconcile` and `Scales` of `runtime`."""

    def __init__(self, limits: SelfTestLimits, footprints: Footprints | None = None) -> None:
        """`footprints` remember what variants were found to take."""
        self._limits = limits
        self._footprints = footprints or Footprints()
        # By folder, which is named by the variant's digest.
        self._timeouts: dict[Path, int] = {}

    async def test(self, manifest: Manifest, folder: Path) -> SelfTestResult:
        """Return how `manifest`, whose files lie in `folder`, did; cancelling ends the child.

        Raises:
            Unavailable: the child could not be started, was killed from outside or kept waiting by what else goes on.
        """
        limits = self._limits
        try:
            async with _child(folder) as process, asyncio.timeout(limits.timeout_s):
                reply = await _converse(process, _order(manifest, folder, limits))
                status = await process.wait()
        except TimeoutError:
            return self._timed_out(folder)
        self._timeouts.pop(folder, None)
        result = _result(status, reply)
        if result.footprint is not None:
            await self._footprints.remember(manifest.digest(), result.footprint)
        return result

    async def measure(self, manifest: Manifest, folder: Path) -> Footprint | None:
        """Return what `manifest` takes of memory; None when it could not be found out, which is logged."""
        try:
            result = await self.test(manifest, folder)
        except Unavailable as error:
            why = str(error)
        else:
            if result.footprint is not None:
                return result.footprint
            why = "" if result.problem is None else result.problem.message
        _log.warning("a model's memory could not be measured", extra={"model": manifest.model, "reason": why})
        return None

    def _timed_out(self, folder: Path) -> SelfTestResult:
        """Return the verdict of the last timeout.

        Raises:
            Unavailable: the variant may have another one.
        """
        count = self._timeouts.pop(folder, 0) + 1
        if count >= MAX_TIMEOUTS:
            return _failed(f"it was not done within {self._limits.timeout_s:g} s, {count} times")
        self._timeouts[folder] = count
        if len(self._timeouts) > _MAX_TIMED_OUT:
            del self._timeouts[next(iter(self._timeouts))]
        raise Unavailable(f"self-test: not done within {self._limits.timeout_s:g} s; it is tried again")


def _order(manifest: Manifest, folder: Path, limits: SelfTestLimits) -> bytes:
    return orjson.dumps(
        {
            "manifest": manifest.to_bytes().decode(),
            "folder": str(folder.resolve()),
            "memory_bytes": limits.memory_bytes + _COPIES * manifest.size_bytes,
            "cpu_s": ceil(limits.timeout_s) * limits.intra_op_threads,
            "intra_op_threads": limits.intra_op_threads,
            "max_batch": limits.max_batch,
        }
    )


@contextlib.asynccontextmanager
async def _child(folder: Path) -> AsyncIterator[Process]:
    """Start the child in `folder`; afterwards it is gone, however the block was left."""
    try:
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-I", "-m", _MODULE),
            stdin=PIPE,
            stdout=PIPE,
            # What libraries print would be a second way to flood us, and names nothing that the exit status does not.
            stderr=DEVNULL,
            cwd=folder,
            env=_environment(),
            start_new_session=True,
        )
    except OSError as error:
        raise Unavailable(f"self-test: no process could be started: {error.strerror or error}") from error
    try:
        yield process
    finally:
        if process.returncode is None:
            process.kill()
        await process.wait()


def _environment() -> dict[str, str]:
    return {
        **{name: os.environ[name] for name in _INHERITED if name in os.environ},
        "LANG": "C.UTF-8",
        "OMP_NUM_THREADS": "1",
        "OPENBLAS_NUM_THREADS": "1",
        "ORT_DISABLE_TELEMETRY": "1",
    }


async def _converse(process: Process, order: bytes) -> bytes:
    """Send the order and read the reply, at most one byte more than it may have."""
    assert process.stdin is not None
    assert process.stdout is not None
    with contextlib.suppress(BrokenPipeError, ConnectionResetError, RuntimeError):
        # A child that died at once has a status that says more; uvloop's word for its closed pipe is RuntimeError.
        process.stdin.write(order + b"\n")
        await process.stdin.drain()
    reply = b""
    while len(reply) <= MAX_REPLY_BYTES and (block := await process.stdout.read(MAX_REPLY_BYTES + 1 - len(reply))):
        reply += block
    if len(reply) > MAX_REPLY_BYTES:
        process.kill()
    return reply


def _result(status: int, reply: bytes) -> SelfTestResult:
    if len(reply) > MAX_REPLY_BYTES:
        return _failed(f"its process said more than {MAX_REPLY_BYTES} bytes")
    if status == -signal.SIGKILL:
        # Its own bounds end it in other ways.
        raise Unavailable("self-test: its process was killed, as for want of memory; it is tried again")
    if status != 0:
        return _failed(f"its process ended with {_cause(status)}")
    try:
        fields = orjson.loads(reply)
        problem = fields["problem"]
        return SelfTestResult(
            None if problem is None else Problem(ErrorCode.FORBIDDEN, f"failed its self-test: {peer_text(problem)}"),
            None if fields["latency_p95_ms"] is None else float(fields["latency_p95_ms"]),
            None if fields["peak_rss_bytes"] is None else int(fields["peak_rss_bytes"]),
            None if fields["footprint"] is None else Footprint.parse(fields["footprint"]),
        )
    except (ValueError, KeyError, TypeError, InvalidRequest):
        return _failed(f"its process gave an unreadable reply of {len(reply)} bytes")


def _failed(why: str) -> SelfTestResult:
    return SelfTestResult(Problem(ErrorCode.FORBIDDEN, f"failed its self-test: {why}"))


def _cause(status: int) -> str:
    if status >= 0:
        return f"exit status {status}"
    return f"{signal.Signals(-status).name}, which a crash in a parser or an exhausted bound of memory or time causes"
