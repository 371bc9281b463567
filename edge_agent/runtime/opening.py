"""Bring one variant into memory, and out of it again: the slow part, for the loader's thread.

Its files are hashed again each time: a flash cell that forgot a bit since the last load must not answer for the model.
"""

import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from core import process_metrics
from core.digest import digest_of_file
from core.errors import IntegrityError
from core.manifest import Manifest
from core.tensors import Array
from edge_agent.runtime.footprint import Footprint
from edge_agent.runtime.memory import release_freed
from edge_agent.runtime.session import OnnxModel, RunTime


class Session(Protocol):
    def run(self, inputs: Sequence[Array]) -> Sequence[Array]: ...

    def warm_up(self, *, max_batch: int) -> RunTime: ...

    def close(self) -> None: ...


@dataclass(frozen=True, slots=True)
class Opened:
    """A model that is ready to run; `grown_bytes` is what the process took more, whoever else worked meanwhile."""

    session: Session
    run_time: RunTime
    load_s: float
    grown_bytes: int


def open_model(manifest: Manifest, folder: Path, *, intra_op_threads: int, max_batch: int) -> Opened:
    """Check the files of a variant, open it and run it once with a single row and with a full batch.

    Raises:
        IntegrityError: a file is not what the manifest says.
        InvalidModel: ONNX Runtime does not take it, or it contradicts its manifest.
        OSError: the disk failed.
    """
    started_s, before_bytes = time.perf_counter(), _resident_bytes()
    for file in manifest.files:
        if (found := digest_of_file(folder / file.path)) != file.digest:
            raise IntegrityError(f"{file.path}: expected {file.digest}, got {found}; the file is damaged")
    model = OnnxModel(manifest, folder, intra_op_threads=intra_op_threads)
    run_time = model.warm_up(max_batch=max_batch)
    release_freed()
    load_s = time.perf_counter() - started_s
    return Opened(model, run_time, load_s, max(0, _resident_bytes() - before_bytes))


def close_model(session: Session) -> None:
    """Let a session go and give its memory back to the system."""
    session.close()
    release_freed()


def measure(manifest: Manifest, folder: Path, *, intra_op_threads: int, max_batch: int) -> Footprint:
    """Return what a variant takes; for a process that does nothing else, and has opened it before.

    The first session of a process pays for the library's own pages, too (11 MB, measured), which are the agent's
    already.
    """
    release_freed()
    before_bytes = _resident_bytes()
    peak_bytes = _peak_since_now()
    opened = open_model(manifest, folder, intra_op_threads=intra_op_threads, max_batch=max_batch)
    # A model that is not quick runs on a thread of its own, which has its stack and its buffers.
    with ThreadPoolExecutor(1) as thread:
        thread.submit(opened.session.warm_up, max_batch=max_batch).result()
        release_freed()
        resident_bytes = max(opened.grown_bytes, _resident_bytes() - before_bytes)
    footprint = Footprint(resident_bytes, max(resident_bytes, peak_bytes() - before_bytes), opened.load_s)
    close_model(opened.session)
    return footprint


def _resident_bytes() -> int:
    try:
        return process_metrics.resident_bytes()
    except OSError:
        return 0


def _peak_since_now() -> Callable[[], int]:
    """Begin to watch the peak of resident memory; call what is returned for it."""
    process = Path("/proc/self")
    try:
        # Resets the high-water mark (`man 5 proc`).
        (process / "clear_refs").write_text("5")
    except OSError:
        return _resident_bytes
    return lambda: _high_water_bytes(process / "status")


def _high_water_bytes(status: Path) -> int:
    found = [line.split()[1] for line in status.read_text().splitlines() if line.startswith("VmHWM:")]
    return int(found[0]) * 1024 if found else 0
