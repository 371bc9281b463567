"""The process in which a variant is tried before it serves: one order in, one reply out, then it ends.

    python -I -m edge_agent.activation.child

The order is one line of JSON on standard input, which then stays open: when it ends, the agent is gone, and so is this
process. The reply is one JSON object on standard output. Bounds are set before anything heavy is imported.

With golden inputs, their outputs must be the publisher's within the tolerances, and the 95th percentile of repeated
runs and the peak of memory within the manifest's bounds. Without, the variant must load and run on zeros.

What passes is opened once more, now that the library's own pages are there, to measure what it takes of memory: the
agent decides by it what stays loaded.
"""

import contextlib
import os
import resource
import sys
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import orjson

from core.errors import InternalError, InvalidManifest, InvalidModel, InvalidTensor, NanofleetError

if TYPE_CHECKING:
    from core.manifest import Manifest, SelfTest
    from core.tensors import Array
    from edge_agent.runtime.session import OnnxModel

_MAX_REASON_CHARS = 800
_NICENESS = 10
_WARM_UP_RUNS = 3
# Chosen: enough for a 95th percentile of a quick model, and the budget ends it for a slow one.
_MAX_RUNS = 40
_BUDGET_S = 5.0


def main() -> None:
    reply_to = os.dup(1)
    # What anybody prints goes to standard error, which nobody reads.
    os.dup2(2, 1)
    order = orjson.loads(sys.stdin.buffer.readline())
    _limit(memory_bytes=order["memory_bytes"], cpu_s=order["cpu_s"])
    threading.Thread(target=_end_with_parent, name="end-with-parent", daemon=True).start()
    reply = orjson.dumps(_tried(order))
    with os.fdopen(reply_to, "wb") as pipe:
        pipe.write(reply)


def _limit(*, memory_bytes: int, cpu_s: int) -> None:
    # When memory runs out on a small machine, this process goes and not the agent. Not everywhere is it ours to say.
    with contextlib.suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text("1000")
    os.nice(_NICENESS)
    for what, soft, hard in (
        (resource.RLIMIT_DATA, memory_bytes, memory_bytes),
        # Ends it by SIGXCPU; at the hard bound it would be SIGKILL, which the kernel sends for other reasons too.
        (resource.RLIMIT_CPU, cpu_s, cpu_s + 1),
        (resource.RLIMIT_FSIZE, 0, 0),
        (resource.RLIMIT_CORE, 0, 0),
    ):
        _, allowed = resource.getrlimit(what)
        most = hard if allowed == resource.RLIM_INFINITY else min(hard, allowed)
        resource.setrlimit(what, (min(soft, most), most))


def _end_with_parent() -> None:
    # Not through sys.stdin: a thread that holds its lock makes the interpreter abort at exit.
    while os.read(0, 1):
        pass
    os._exit(1)


def _tried(order: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = {"problem": None, "latency_p95_ms": None, "peak_rss_bytes": None, "footprint": None}
    try:
        found.update(_try(order))
    except NanofleetError as error:
        found["problem"] = str(error)[:_MAX_REASON_CHARS]
    except MemoryError:
        found["problem"] = f"it needs more than {order['memory_bytes']} bytes of memory"
    # The root of this process: whatever a file made a library raise is a reason to refuse the file.
    except Exception as error:
        found["problem"] = f"{type(error).__name__}: {error}"[:_MAX_REASON_CHARS]
    return found


def _try(order: dict[str, Any]) -> dict[str, Any]:
    # Imported late: they bring numpy and ONNX Runtime, which must come after the limits.
    from core.manifest import parse_manifest
    from edge_agent.runtime import memory
    from edge_agent.runtime.opening import measure
    from edge_agent.runtime.session import OnnxModel

    memory.keep_malloc_tight()
    manifest = parse_manifest(order["manifest"].encode())
    folder = Path(order["folder"])
    threads = order["intra_op_threads"]
    found = _measured(manifest, folder, OnnxModel(manifest, folder, intra_op_threads=threads))
    max_batch = min(manifest.batching.max_batch, order["max_batch"])
    footprint = measure(manifest, folder, intra_op_threads=threads, max_batch=max_batch)
    return {**found, "footprint": footprint.document()}


def _measured(manifest: "Manifest", folder: Path, model: "OnnxModel") -> dict[str, Any]:
    if manifest.self_test is None:
        model.warm_up(max_batch=1)
        return {"peak_rss_bytes": _peak_rss_bytes()}
    runs, golden = _golden(manifest, folder / manifest.self_test.file)
    for inputs, wanted in zip(runs, golden, strict=True):
        _require_equal(manifest, model.run(inputs), wanted)
    latency_p95_ms, peak_rss_bytes = _p95_ms(model, runs[0]), _peak_rss_bytes()
    _require_within(manifest.self_test, latency_p95_ms, peak_rss_bytes)
    return {"latency_p95_ms": latency_p95_ms, "peak_rss_bytes": peak_rss_bytes}


def _golden(manifest: "Manifest", path: Path) -> tuple[list[list["Array"]], list[dict[str, "Array"]]]:
    """Return the inputs of every run, in the manifest's order, and the outputs wanted of it, by name."""
    import numpy as np

    with np.load(path, allow_pickle=False) as archive:
        arrays = {name: archive[name] for name in archive.files}
    missing = [part.name for part in manifest.inputs if f"input.{part.name}" not in arrays]
    outputs = [part.name for part in manifest.outputs if f"output.{part.name}" in arrays]
    if missing or not outputs:
        raise InvalidManifest(f"{path.name}: expected every input and an output at least, got {sorted(arrays)[:16]}")
    inputs = [_as_given(arrays[f"input.{part.name}"]) for part in manifest.inputs]
    wanted = {name: arrays[f"output.{name}"] for name in outputs}
    if manifest.batching.max_batch > 1:
        return [inputs], [wanted]
    samples = range(len(inputs[0]))
    return (
        [[array[sample] for array in inputs] for sample in samples],
        [{name: array[sample] for name, array in wanted.items()} for sample in samples],
    )


def _as_given(array: "Array") -> "Array":
    """Text lies in the file as bytes of one length, and is an array of objects on its way to a model."""
    return array.astype(object) if array.dtype.kind == "S" else array


def _require_equal(manifest: "Manifest", outputs: Sequence["Array"], wanted: dict[str, "Array"]) -> None:
    for part, got in zip(manifest.outputs, outputs, strict=True):
        if part.name in wanted:
            _require_close(part.name, got, wanted[part.name], manifest.self_test)


def _require_close(name: str, got: "Array", want: "Array", terms: "SelfTest | None") -> None:
    import numpy as np

    assert terms is not None
    if got.shape != want.shape:
        raise InvalidTensor(f"output {name!r}: expected shape {list(want.shape)}, got {list(got.shape)}")
    if got.dtype == object or want.dtype.kind == "S":
        if (got != want.astype(object)).any():
            raise InvalidTensor(f"output {name!r}: expected other text than came")
        return
    if (np.isfinite(want) & ~np.isfinite(got)).any():
        raise InvalidTensor(f"output {name!r}: expected finite numbers, got NaN or infinity")
    if not np.allclose(got, want, rtol=terms.rtol, atol=terms.atol, equal_nan=True):
        with np.errstate(invalid="ignore"):
            worst = float(np.nanmax(np.abs(got.astype(np.float64) - want.astype(np.float64))))
        raise InvalidTensor(
            f"output {name!r}: expected the publisher's numbers within {terms.atol:g} + {terms.rtol:g} of each, "
            f"got a difference of {worst:.4g}"
        )


def _p95_ms(model: "OnnxModel", inputs: Sequence["Array"]) -> float:
    for _ in range(_WARM_UP_RUNS):
        model.run(inputs)
    times_s = sorted(_timed(model, inputs))
    return times_s[int(0.95 * (len(times_s) - 1))] * 1e3


def _timed(model: "OnnxModel", inputs: Sequence["Array"]) -> Iterator[float]:
    """Yield the processor time of runs: at this priority the wall clock would tell of what others do.

    With several threads inside a run this is the calling thread's share, which waits for the slowest of them spinning.
    """
    from time import thread_time

    spent_s = 0.0
    for _ in range(_MAX_RUNS):
        started_s = thread_time()
        model.run(inputs)
        spent_s += (run_s := thread_time() - started_s)
        yield run_s
        if spent_s > _BUDGET_S:
            return


def _require_within(terms: "SelfTest", latency_p95_ms: float, peak_rss_bytes: int) -> None:
    if terms.max_latency_p95_ms is not None and latency_p95_ms > terms.max_latency_p95_ms:
        raise InvalidModel(
            f"expected 95 of 100 runs within {terms.max_latency_p95_ms:.3g} ms, they took {latency_p95_ms:.3g} ms"
        )
    if terms.max_rss_bytes is not None and peak_rss_bytes > terms.max_rss_bytes:
        raise InternalError(f"expected a peak of at most {terms.max_rss_bytes} bytes of memory, got {peak_rss_bytes}")


def _peak_rss_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


if __name__ == "__main__":
    main()
