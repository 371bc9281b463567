"""The parent's side: every step on an untrusted file is a child process with bounds, which is always reaped.

The child gets a clean environment (no secrets of the controller's), an isolated interpreter (nothing that lies beside
an uploaded file can be imported), a session of its own (a Ctrl-C in the terminal reaches the controller first), and
limits on memory, processor time and file size. It may take `timeout_s`. Whatever kills it, a crash in a parser, its
limits or the time, comes back as InvalidModel with that reason; cancelling the caller kills it too.
"""

import asyncio
import contextlib
import logging
import os
import signal
import sys
from asyncio.subprocess import PIPE, Process
from collections.abc import AsyncIterator
from math import ceil
from pathlib import Path
from typing import TypeVar

from pydantic import ValidationError

from controller.compression.child import (
    MAX_REPLY_BYTES,
    ORDER,
    REPLY,
    EvaluateJob,
    InspectJob,
    Job,
    Limits,
    Order,
    QuantiseJob,
    Reply,
)
from controller.compression.model import Dataset, Evaluated, EvaluationTask, Inspected, ModelBundle
from core.errors import InternalError, InvalidModel, InvalidRequest
from core.logs import peer_text

T = TypeVar("T")

_log = logging.getLogger(__name__)

_MODULE = "controller.compression.child"
_STDERR_TAIL_BYTES = 4096
# Where the dynamic linker finds the libraries that the parent found; the only thing inherited.
_INHERITED = ("LD_LIBRARY_PATH",)


class ChildWorkshop:
    """Runs each job in a child; several may run at a time."""

    def __init__(self, *, timeout_s: float, memory_bytes: int, max_file_bytes: int) -> None:
        self._timeout_s = timeout_s
        cpu_s = ceil(timeout_s) * (os.cpu_count() or 1)
        self._limits = Limits(memory_bytes, cpu_s, max_file_bytes)

    async def inspect(self, bundle: ModelBundle) -> Inspected:
        """Check a model and read its signature.

        Raises:
            InvalidModel: it is refused, with the reason.
        """
        reply = await self._run(InspectJob(bundle), bundle.folder)
        return _required(reply.inspected)

    async def quantise(self, recipe: str, bundle: ModelBundle, target: Path, calibration: Dataset | None) -> None:
        """Write the model that `recipe` makes of `bundle` to `target`.

        Raises:
            InvalidModel: the recipe does not fit the model.
            InvalidRequest: the calibration data is missing or does not fit.
        """
        await self._run(QuantiseJob(recipe, bundle, target, calibration), bundle.folder)

    async def evaluate(self, task: EvaluationTask) -> Evaluated:
        """Measure latency and, with data, accuracy; with a rule, also fit temperature and threshold.

        Raises:
            InvalidModel: the model does not run.
            InvalidRequest: the data does not fit the model.
        """
        reply = await self._run(EvaluateJob(task), task.bundle.folder)
        return _required(reply.evaluated)

    async def _run(self, job: Job, folder: Path) -> Reply:
        order = ORDER.dump_json(Order(self._limits, job))
        async with _child(folder) as process:
            try:
                async with asyncio.timeout(self._timeout_s):
                    content, tail = await _converse(process, order)
                    status = await process.wait()
            except TimeoutError as error:
                raise InvalidModel(
                    f"model: {job.kind} took longer than {self._timeout_s:g} s and was stopped; "
                    "raise registry.publish_timeout_s or publish a smaller model"
                ) from error
        _log.debug("child ended", extra={"job": job.kind, "status": status, "stderr": peer_text(tail)})
        return _reply(job.kind, status, content)


@contextlib.asynccontextmanager
async def _child(folder: Path) -> AsyncIterator[Process]:
    """Start the child in `folder`; afterwards it is gone, however the block was left."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-I", "-m", _MODULE),
        stdin=PIPE,
        stdout=PIPE,
        stderr=PIPE,
        cwd=folder,
        env=_environment(folder),
        start_new_session=True,
    )
    try:
        yield process
    finally:
        if process.returncode is None:
            process.kill()
        await process.wait()


def _environment(folder: Path) -> dict[str, str]:
    return {
        **{name: os.environ[name] for name in _INHERITED if name in os.environ},
        "HOME": str(folder),
        "LANG": "C.UTF-8",
        "OMP_NUM_THREADS": "1",
        "OPENBLAS_NUM_THREADS": "1",
        "ORT_DISABLE_TELEMETRY": "1",
        "TMPDIR": str(folder),
    }


async def _converse(process: Process, order: bytes) -> tuple[bytes, str]:
    """Send the order, and read the reply and the end of what was printed. Standard input stays open meanwhile."""
    assert process.stdin is not None
    assert process.stdout is not None
    assert process.stderr is not None
    with contextlib.suppress(BrokenPipeError, ConnectionResetError, RuntimeError):
        # A child that died at once has a status that says more; uvloop's word for its closed pipe is RuntimeError.
        process.stdin.write(order + b"\n")
        await process.stdin.drain()
    content, tail = await asyncio.gather(_read_reply(process.stdout), _read_tail(process.stderr))
    return content, tail.decode(errors="replace")


async def _read_reply(stream: asyncio.StreamReader) -> bytes:
    content = b""
    while len(content) <= MAX_REPLY_BYTES and (block := await stream.read(1 << 16)):
        content += block
    return content


async def _read_tail(stream: asyncio.StreamReader) -> bytes:
    tail = b""
    while block := await stream.read(1 << 16):
        tail = (tail + block)[-_STDERR_TAIL_BYTES:]
    return tail


def _reply(kind: str, status: int, content: bytes) -> Reply:
    if status != 0:
        raise InvalidModel(f"model: {kind} ended its process: {_cause(status)}; it is refused")
    try:
        reply = REPLY.validate_json(content)
    except ValidationError as error:
        raise InvalidModel(f"model: {kind} gave an unreadable reply of {len(content)} bytes; it is refused") from error
    if reply.refusal is not None:
        raise (InvalidModel if reply.refusal.is_models_fault else InvalidRequest)(reply.refusal.message)
    return reply


def _cause(status: int) -> str:
    if status >= 0:
        return f"exit status {status}"
    name = signal.Signals(-status).name
    return f"killed by {name}, which an exhausted limit of memory or time or a crash in a parser causes"


def _required(result: T | None) -> T:
    if result is None:
        raise InternalError("compression: a reply without its result")
    return result
