"""The parent's side: a child is started, given one order, heard out, and always reaped.

It gets a clean environment (no secrets of the controller's), an isolated interpreter (nothing that lies beside a file
can be imported) and a session of its own (a Ctrl-C in the terminal reaches the controller first). Cancelling the caller
kills it.
"""

import asyncio
import os
import signal
import sys
from asyncio.subprocess import PIPE, Process
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

# Where the dynamic linker finds the libraries that the parent found; the only thing inherited.
_INHERITED = ("LD_LIBRARY_PATH",)
_BLOCK_BYTES = 1 << 16
_PRINTED_TAIL_BYTES = 4096


@dataclass(frozen=True, slots=True)
class Ended:
    """How a child ended: `reply` may be one byte longer than allowed, or more; `printed` is the end of what it said."""

    status: int
    reply: bytes
    printed: str

    @property
    def cause(self) -> str:
        """Return what ended it, for a sentence."""
        return f"exit status {self.status}" if self.status >= 0 else f"killed by {signal.Signals(-self.status).name}"


async def call(module: str, order: bytes, *, folder: Path, timeout_s: float, max_reply_bytes: int) -> Ended:
    """Have a child run `module` on one line of `order`, in `folder`.

    Raises:
        TimeoutError: it took longer than `timeout_s`, and is gone.
    """
    async with _child(module, folder) as process, asyncio.timeout(timeout_s):
        reply, printed = await _converse(process, order, max_reply_bytes)
        return Ended(await process.wait(), reply, printed.decode(errors="replace"))


@asynccontextmanager
async def _child(module: str, folder: Path) -> AsyncIterator[Process]:
    """Start the child; afterwards it is gone, however the block was left."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-I", "-m", module),
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


async def _converse(process: Process, order: bytes, max_reply_bytes: int) -> tuple[bytes, bytes]:
    """Send the order, and read the reply and the end of what was printed. Standard input stays open meanwhile."""
    assert process.stdin is not None
    assert process.stdout is not None
    assert process.stderr is not None
    with suppress(BrokenPipeError, ConnectionResetError, RuntimeError):
        # A child that died at once has a status that says more; uvloop's word for its closed pipe is RuntimeError.
        process.stdin.write(order + b"\n")
        await process.stdin.drain()
    return await asyncio.gather(_read_up_to(process.stdout, max_reply_bytes), _read_tail(process.stderr))


async def _read_up_to(stream: asyncio.StreamReader, max_bytes: int) -> bytes:
    content = b""
    while len(content) <= max_bytes and (block := await stream.read(_BLOCK_BYTES)):
        content += block
    return content


async def _read_tail(stream: asyncio.StreamReader) -> bytes:
    tail = b""
    while block := await stream.read(_BLOCK_BYTES):
        tail = (tail + block)[-_PRINTED_TAIL_BYTES:]
    return tail
