"""Code that only the start needed is not kept in memory.

Loading numpy, ONNX Runtime and gRPC runs through some 30 MB of their code once, and as long as memory is not short the
kernel counts it as ours: a quarter of an idle agent (measured, benchmarks.footprint). Taken out of our address space it
stays in the page cache, from where what is needed again comes back by itself, in a microsecond for 64 KiB.

What comes later runs through code once as well: 11 MB in a first deployment, 1 MB in a first session (measured).
"""

import asyncio
import ctypes
import logging
import os
import re
from collections.abc import Callable, Iterator
from itertools import zip_longest
from pathlib import Path

# Chosen: a deployment is over by then, and its code in memory for a minute harms nobody.
LOOK_INTERVAL_S = 60.0
# Chosen: worth stopping the loop for the 4 ms (measured) of a release.
WORTH_BYTES = 1 << 20
_SMAPS = Path("/proc/self/smaps")
# proc_pid_statm(5): the third field are the resident pages of files.
_STATM = Path("/proc/self/statm")
# proc_pid_maps(5): addresses of every mapping, and whether it is executable, private, read-only and of a file. Paths
# may hold any byte.
_MAPPING = re.compile(rb"^([0-9a-f]+)-([0-9a-f]+) ", re.MULTILINE)
_CODE = re.compile(rb"\S+ r-xp \S+ \S+ [1-9]\d*\s+/")
_WRITTEN_KB = re.compile(rb"^(?:Anonymous|Swap): +(\d+) kB$", re.MULTILINE)
# madvise(2).
_MADV_DONTNEED = 4

_log = logging.getLogger(__name__)


async def keep_released(is_idle: Callable[[], bool]) -> None:
    """Release again, for ever, what has come since the last time, when it is worth it and nobody waits."""
    kept_bytes = resident_bytes()
    while True:
        await asyncio.sleep(LOOK_INTERVAL_S)
        if resident_bytes() - kept_bytes >= WORTH_BYTES and is_idle():
            release()
            kept_bytes = resident_bytes()


def resident_bytes() -> int:
    """Return how much of files this process has in memory; 0 where nothing tells."""
    try:
        return int(_STATM.read_text().split()[2]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return 0


def release() -> int:
    """Take unmodified code out of this process's memory; return the bytes of the mappings that it was in.

    A library that needed its code changed as it is loaded would have to be loaded before; none of ours does (no
    TEXTREL in any, by readelf).
    """
    try:
        smaps = _SMAPS.read_bytes()
    except OSError as error:
        # Kernels for small devices may be built without it; nothing is lost but the memory.
        _log.debug("code pages stay", extra={"reason": str(error)})
        return 0
    madvise = ctypes.CDLL(None, use_errno=True).madvise
    madvise.argtypes = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int
    released_bytes = 0
    for start, size_bytes in unmodified_code(smaps):
        if madvise(start, size_bytes, _MADV_DONTNEED) == 0:
            released_bytes += size_bytes
        else:
            # Locked pages, for one; they stay, and nothing else changes.
            _log.debug("code pages stay", extra={"reason": os.strerror(ctypes.get_errno())})
    return released_bytes


def unmodified_code(smaps: bytes) -> Iterator[tuple[int, int]]:
    """Yield start and size of every code mapping in a text of proc_pid_smaps(5) of which no page was written to.

    A written page, as a debugger's breakpoint makes one, exists nowhere else and must stay, be it in memory or swapped
    out.
    """
    mappings = list(_MAPPING.finditer(smaps))
    for mapping, following in zip_longest(mappings, mappings[1:]):
        entry = smaps[mapping.start() : following.start() if following else len(smaps)]
        written_kb = [int(amount) for amount in _WRITTEN_KB.findall(entry)]
        # Both amounts must be known.
        if _CODE.match(entry) and written_kb == [0, 0]:
            start = int(mapping[1], 16)
            yield start, int(mapping[2], 16) - start
