"""The memory of this process and of what it lives in: how much may still be taken, and freed memory given back.

`available_bytes` is the least of what the kernel says programs may still take (MemAvailable) and of what each cgroup
above this process leaves (v2, or the memory controller of v1); file pages that were not used for a while do not count
as taken, since the kernel drops them first.

Deleting an ONNX Runtime session frees its memory, but glibc keeps most of it: blocks of up to 32 MiB come from heaps
once such a block was freed (its thresholds adapt), and each thread has a heap, whose end a trim does not reach.
Measured, loading and deleting models of 2 to 20 MB on a thread: up to 40 MB of 45 stayed. With fixed thresholds, one
heap for all threads (`keep_malloc_tight`) and a trim after each load and each close (`release_freed`, 0.2 to 2 ms) at
most 0.7 MB stayed, and a loaded model took the size of its file instead of twice that. A load takes 35 ms instead of 25
for 20 MB.
"""

import ctypes
from collections.abc import Callable, Iterator
from pathlib import Path

# malloc.h of glibc.
_M_TRIM_THRESHOLD = -1
_M_MMAP_THRESHOLD = -3
_M_ARENA_MAX = -8
# Chosen: requests and replies stay below it, most weights of the models that matter lie above.
_THRESHOLD_BYTES = 1 << 20
# A cgroup without a limit: v1 says a number near 2^63.
_NO_LIMIT_BYTES = 1 << 60


def keep_malloc_tight() -> bool:
    """Have large blocks returned once they are freed, and all others in one heap; False where malloc cannot be told.

    To be called before there are other threads.
    """
    mallopt = _malloc_function("mallopt")
    if mallopt is None:
        return False
    orders = ((_M_MMAP_THRESHOLD, _THRESHOLD_BYTES), (_M_TRIM_THRESHOLD, _THRESHOLD_BYTES), (_M_ARENA_MAX, 1))
    accepted = [mallopt(what, value) for what, value in orders]
    return all(accepted)


def release_freed() -> None:
    """Give memory that malloc holds and nobody uses back to the system."""
    trim = _malloc_function("malloc_trim")
    if trim is not None:
        trim(0)


def _malloc_function(name: str) -> Callable[..., int] | None:
    # glibc's own: another libc answers with an AttributeError.
    return getattr(ctypes.CDLL(None), name, None)


def available_bytes(*, root: Path = Path("/")) -> int | None:
    """Return what this process may still take; None where the system does not tell."""
    said = [mem_available_bytes(root), *_left_by_cgroups(root)]
    return min((left for left in said if left is not None), default=None)


def mem_available_bytes(root: Path = Path("/")) -> int | None:
    """Return what programs may still take on this machine, as the kernel estimates it; None where it does not."""
    try:
        lines = (root / "proc" / "meminfo").read_text().splitlines()
        found = [int(line.split()[1]) for line in lines if line.startswith("MemAvailable:")]
    except (OSError, ValueError, IndexError):
        return None
    return found[0] * 1024 if found else None


def _left_by_cgroups(root: Path) -> Iterator[int]:
    """Yield what each limited cgroup of this process leaves it; file formats: `man 7 cgroups`, kernel admin guide."""
    mounted = root / "sys" / "fs" / "cgroup"
    for controllers, path in _memberships(root):
        if controllers == "":
            names = ("memory.max", "memory.current", "inactive_file")
            yield from _left_above(mounted, path, *names)
        elif "memory" in controllers.split(","):
            names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
            yield from _left_above(mounted / "memory", path, *names)


def _memberships(root: Path) -> Iterator[tuple[str, str]]:
    """Yield controllers ("" for the one hierarchy of v2) and path of each cgroup that this process is in."""
    try:
        lines = (root / "proc" / "self" / "cgroup").read_text().splitlines()
    except OSError:
        return
    for line in lines:
        parts = line.split(":", 2)
        if len(parts) == 3:
            yield parts[1], parts[2]


def _left_above(mounted: Path, path: str, limit_file: str, usage_file: str, inactive: str) -> Iterator[int]:
    # A path may name what lies outside of the container that we see; then the mount itself is our cgroup.
    folder = mounted / path.strip("/")
    while folder == mounted or mounted in folder.parents:
        limit, usage = _number(folder / limit_file), _number(folder / usage_file)
        if limit is not None and usage is not None and limit < _NO_LIMIT_BYTES:
            yield max(0, limit - usage + min(usage, _stat(folder / "memory.stat", inactive)))
        folder = folder.parent


def _number(path: Path) -> int | None:
    try:
        return int(path.read_text())
    except (OSError, ValueError):
        # No such file, or the word `max`.
        return None


def _stat(path: Path, name: str) -> int:
    try:
        fields = dict(line.split(" ", 1) for line in path.read_text().splitlines() if " " in line)
        return int(fields.get(name, "0"))
    except (OSError, ValueError):
        return 0
