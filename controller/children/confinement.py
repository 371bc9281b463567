"""The child's side: it takes its order, binds itself, and ends when its parent does.

The order comes as one line on standard input, which then stays open: when it ends, the parent is gone. Standard output
is for the reply; what libraries print goes to standard error. Light: bounds come before anything heavy is imported.
"""

import os
import resource
import sys
import threading
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Limits:
    # Private memory that can be written (RLIMIT_DATA); mapped libraries and files do not count.
    memory_bytes: int
    # Processor time of all threads together.
    cpu_s: int
    # Largest file that may be written.
    file_bytes: int


def take_order() -> bytes:
    return sys.stdin.buffer.readline()


def take_reply_pipe() -> int:
    """Keep the reply's pipe to ourselves, and send what anybody prints to standard error."""
    pipe = os.dup(1)
    os.dup2(2, 1)
    return pipe


def confine(limits: Limits) -> None:
    """Bind this process for good, and end it with its parent."""
    for what, bound in (
        (resource.RLIMIT_DATA, limits.memory_bytes),
        (resource.RLIMIT_CPU, limits.cpu_s),
        (resource.RLIMIT_FSIZE, limits.file_bytes),
        (resource.RLIMIT_CORE, 0),
    ):
        _, hard = resource.getrlimit(what)
        allowed = bound if hard == resource.RLIM_INFINITY else min(bound, hard)
        resource.setrlimit(what, (allowed, allowed))
    threading.Thread(target=_end_with_parent, name="end-with-parent", daemon=True).start()


def send_reply(pipe: int, reply: bytes) -> None:
    with os.fdopen(pipe, "wb") as file:
        file.write(reply)


def _end_with_parent() -> None:
    # Not through sys.stdin: a thread that holds its lock makes the interpreter abort at exit.
    while os.read(0, 1):
        pass
    os._exit(1)
