"""Code that only the start needed is not kept in memory.

Loading numpy, ONNX Runtime and gRPC runs through some 30 MB of their code once, and as long as memory is not short the
kernel counts it as ours: a quarter of an idle agent (measured, benchmarks.footprint). Taken out of our address space it
stays in the page cache, from where what is needed again comes back by itself, in a microsecond for 64 KiB.
"""

import ctypes
import logging
import os
import re
from collections.abc import Iterator
from pathlib import Path

_SMAPS = Path("/proc/self/smaps")
# proc_pid_maps(5): addresses and permissions of a mapping that is executable, private and of a file.
_CODE = re.compile(r"([0-9a-f]+)-([0-9a-f]+) r-xp \S+ \S+ [1-9]\d*\s+/")
_ANY = re.compile(r"[0-9a-f]+-[0-9a-f]+ ")
# madvise(2).
_MADV_DONTNEED = 4

_log = logging.getLogger(__name__)


def release() -> int:
    """Take unmodified code out of this process's memory; return the bytes of the mappings that it was in."""
    madvise = ctypes.CDLL(None, use_errno=True).madvise
    madvise.argtypes = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int
    released_bytes = 0
    for start, size_bytes in unmodified_code(_SMAPS.read_text()):
        if madvise(start, size_bytes, _MADV_DONTNEED) == 0:
            released_bytes += size_bytes
        else:
            # Locked pages, for one; they stay, and nothing else changes.
            _log.debug("code pages stay", extra={"reason": os.strerror(ctypes.get_errno())})
    return released_bytes


def unmodified_code(smaps: str) -> Iterator[tuple[int, int]]:
    """Yield start and size of every code mapping in a text of proc_pid_smaps(5) of which no page was written to.

    A written page, as a debugger's breakpoint makes one, exists nowhere else and must stay.
    """
    start = end = 0
    for line in smaps.splitlines():
        if _ANY.match(line):
            code = _CODE.match(line)
            start, end = (int(code[1], 16), int(code[2], 16)) if code else (0, 0)
        elif end and line.split() == ["Anonymous:", "0", "kB"]:
            yield start, end - start
