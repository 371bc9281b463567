"""One model in a replica's memory: an ONNX Runtime session and what its manifest promises."""

import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from controller.heavy.grouping import Feed, plan_groups, rows_of, stack, take_apart
from core.clock import Clock
from core.deadline import Deadline
from core.digest import Digest
from core.errors import DeadlineExceeded, InternalError, ModelNotReady, NanofleetError
from core.manifest import Manifest
from core.open_inference.signature import ModelSignature
from core.tensors import DATATYPE_OF_ONNX, NUMPY_DTYPE, Array, Datatype, Tensor

# Telemetry is on by default from 1.29 on and is decided at the first import.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
import onnxruntime as ort

_log = logging.getLogger(__name__)

_EXPIRED = "the deadline passed before the model ran"


@dataclass(frozen=True, slots=True)
class Job:
    """One request, decoded and checked."""

    model: "HostedModel"
    feed: Feed
    wanted: tuple[str, ...]
    deadline: Deadline | None = None


@dataclass(frozen=True, slots=True)
class Answer:
    model_version: str
    outputs: tuple[Tensor, ...]
    # Wall-clock bounds of the run, in nanoseconds since the epoch, for the `compute` span.
    started_ns: int
    ended_ns: int
    batch: int


class HostedModel:
    """Runs are thread-safe and release the interpreter lock."""

    def __init__(self, digest: Digest, manifest: Manifest, folder: Path, *, threads: int) -> None:
        """Open the session, which can take seconds.

        Raises:
            ModelNotReady: ONNX Runtime refuses the model, or it is not as its manifest says.
        """
        self.digest = digest
        self.manifest = manifest
        self.signature = ModelSignature.of(manifest)
        options = ort.SessionOptions()
        options.intra_op_num_threads = threads
        options.inter_op_num_threads = 1
        options.log_severity_level = 3
        try:
            self._session = ort.InferenceSession(folder / manifest.entry, options, providers=["CPUExecutionProvider"])
        # ONNX Runtime raises a dozen classes that share no base but Exception.
        except Exception as error:
            raise ModelNotReady(f"model {manifest.model!r}: ONNX Runtime cannot load it: {str(error)[:500]}") from error
        self._require_as_promised()
        self._has_failed_batch = False

    def _require_as_promised(self) -> None:
        session, signature = self._session, self.signature
        for kind, nodes, specs in (
            ("input", session.get_inputs(), signature.inputs),
            ("output", session.get_outputs(), signature.outputs),
        ):
            found = {node.name: DATATYPE_OF_ONNX.get(node.type, node.type) for node in nodes}
            promised = {spec.name: spec.datatype for spec in specs.values()}
            if not promised.items() <= found.items() or (kind == "input" and promised != found):
                raise ModelNotReady(f"model {self.manifest.model!r}: expected {kind}s {promised}, found {found}")

    def run(self, jobs: Sequence[Job], clock: Clock) -> list[Answer | NanofleetError]:
        """Answer jobs of this model in as few runs as their shapes allow; blocks. What has expired is not run."""
        results: list[Answer | NanofleetError] = [DeadlineExceeded(_EXPIRED)] * len(jobs)
        groups = plan_groups([job.feed for job in jobs], max_rows=self.manifest.batching.max_batch)
        for group in groups:
            now_s = clock.monotonic_s()
            alive = [index for index in group if not _is_expired(jobs[index], now_s)]
            for index, answer in zip(alive, self._run_group([jobs[index] for index in alive], clock), strict=True):
                results[index] = answer
        return results

    def _run_group(self, jobs: Sequence[Job], clock: Clock) -> Sequence[Answer | NanofleetError]:
        """Run jobs together; when that fails, run each alone, so that only those fail that are at fault."""
        if not jobs:
            return []
        try:
            return self._run_together(jobs, clock)
        except NanofleetError as error:
            if len(jobs) == 1:
                return [error]
            self._note_failed_batch(error)
        return [self._run_alone(job, clock) for job in jobs]

    def _run_alone(self, job: Job, clock: Clock) -> Answer | NanofleetError:
        if _is_expired(job, clock.monotonic_s()):
            return DeadlineExceeded(_EXPIRED)
        (answer,) = self._run_group([job], clock)
        return answer

    def _note_failed_batch(self, error: NanofleetError) -> None:
        # Once per model: any client can make a batch fail as often as it likes.
        if not self._has_failed_batch:
            self._has_failed_batch = True
            _log.warning("a batch failed; its requests run alone", extra={"model": self.manifest.model}, exc_info=error)

    def _run_together(self, jobs: Sequence[Job], clock: Clock) -> list[Answer | NanofleetError]:
        names = [name for name in self.signature.outputs if any(name in job.wanted for job in jobs)]
        started_ns = _now_ns(clock)
        try:
            arrays = self._session.run(names, self._ort_feed(stack([job.feed for job in jobs])))
        # As above: no common base.
        except Exception as error:
            raise InternalError(f"model {self.manifest.model!r}: the run failed: {str(error)[:500]}") from error
        parts = take_apart(dict(zip(names, arrays, strict=True)), [rows_of(job.feed) for job in jobs])
        ended_ns = _now_ns(clock)
        return [
            Answer(
                str(self.manifest.version),
                tuple(self._tensor(name, part[name]) for name in job.wanted),
                started_ns,
                ended_ns,
                len(jobs),
            )
            for job, part in zip(jobs, parts, strict=True)
        ]

    def _ort_feed(self, feed: Feed) -> dict[str, Array]:
        return {
            name: _to_text(array) if self.signature.inputs[name].datatype is Datatype.BYTES else array
            for name, array in feed.items()
        }

    def _tensor(self, name: str, array: Array) -> Tensor:
        datatype = self.signature.outputs[name].datatype
        return Tensor(name, datatype, _to_bytes(array) if datatype is Datatype.BYTES else array)


def _is_expired(job: Job, now_s: float) -> bool:
    return job.deadline is not None and job.deadline.remaining_s(now_s) <= 0


def _now_ns(clock: Clock) -> int:
    return int(clock.now().timestamp() * 1e6) * 1000


def _to_text(array: Array) -> Array:
    """ONNX strings are UTF-8 text, BYTES elements are not necessarily: what is not UTF-8 is replaced."""
    flat = [element.decode("utf-8", "replace") for element in array.ravel()]
    return np.array(flat, dtype=NUMPY_DTYPE[Datatype.BYTES]).reshape(array.shape)


def _to_bytes(array: Array) -> Array:
    flat = [str(element).encode() for element in array.ravel()]
    return np.array(flat, dtype=NUMPY_DTYPE[Datatype.BYTES]).reshape(array.shape)
