"""The agent's side of `delta`: bring a variant in from a delta, chunk by chunk, in a process that does nothing else.

    python -m benchmarks.delta_apply JOB.json

Prints seconds (decoded, verified, written, fsynced) and how far the process grew beyond what it was before.
"""

import json
import os
import sys
import time
from pathlib import Path

import numpy as np  # noqa: F401  (part of the process before: the agent has it)

from controller.transfer.packs import Form, PackFile, PackId
from core.chunks import ChunkRef, chunk_digest, chunks_of
from core.delta import decode_difference, decompress
from core.digest import Digest
from core.manifest import parse_manifest


def main() -> None:
    job = json.loads(Path(sys.argv[1]).read_bytes())
    before, after = (parse_manifest(job[side].encode()) for side in ("before", "after"))
    sources = chunks_of(before)
    root = Path(job["root"])
    full = PackFile.open(root, PackId(after.digest()))
    delta = PackFile.open(root, PackId(after.digest(), Digest(before.digest())))
    held = {chunk.digest: chunk for chunk in sources}
    rss_mb, started_s = _status_mb("VmRSS"), time.perf_counter()
    with Path(job["source"]).open("rb") as source, Path(job["target"]).open("wb") as target:
        for chunk in chunks_of(after):
            content = _content(chunk, full, delta, sources, held, source.fileno())
            assert chunk_digest(content) == chunk.digest
            target.write(content)
        target.flush()
        os.fsync(target.fileno())
    seconds = time.perf_counter() - started_s
    print(json.dumps({"seconds": seconds, "grown_mb": _status_mb("VmHWM") - rss_mb}))


def _content(
    chunk: ChunkRef,
    full: PackFile,
    delta: PackFile,
    sources: tuple[ChunkRef, ...],
    held: dict[bytes, ChunkRef],
    source: int,
) -> bytes:
    entry = delta.entry(chunk.index)
    if entry.form is Form.SAME:
        return _read(source, held[chunk.digest])
    if entry.form is Form.DIFFERENCE:
        base = _read(source, sources[entry.source_index])
        return decode_difference(base, delta.read(chunk.index), size_bytes=chunk.size_bytes)
    encoded = full.read(chunk.index)
    if full.entry(chunk.index).form is Form.RAW:
        return encoded
    return decompress(encoded, size_bytes=chunk.size_bytes)


def _read(descriptor: int, chunk: ChunkRef) -> bytes:
    return os.pread(descriptor, chunk.size_bytes, chunk.offset)


def _status_mb(field: str) -> float:
    """Return a figure of /proc/self/status in MiB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(float(line.split()[1]) / 1024 for line in lines if line.startswith(f"{field}:"))


if __name__ == "__main__":
    main()
