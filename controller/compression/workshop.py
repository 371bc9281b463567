"""The parent's side: every step on an untrusted file is a child process with bounds (`controller.children`).

Whatever ends it early, a crash in a parser, its limits or the time, comes back as InvalidModel with that reason.
"""

import logging
import os
from math import ceil
from pathlib import Path
from typing import TypeVar

from pydantic import ValidationError

from controller.children.caller import Ended, call
from controller.children.confinement import Limits
from controller.compression.child import (
    MAX_REPLY_BYTES,
    ORDER,
    REPLY,
    EvaluateJob,
    InspectJob,
    Job,
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
        try:
            ended = await call(
                _MODULE, order, folder=folder, timeout_s=self._timeout_s, max_reply_bytes=MAX_REPLY_BYTES
            )
        except TimeoutError as error:
            raise InvalidModel(
                f"model: {job.kind} took longer than {self._timeout_s:g} s and was stopped; "
                "raise registry.publish_timeout_s or publish a smaller model"
            ) from error
        _log.debug("child ended", extra={"job": job.kind, "status": ended.status, "stderr": peer_text(ended.printed)})
        return _reply(job.kind, ended)


def _reply(kind: str, ended: Ended) -> Reply:
    if ended.status != 0:
        because = (
            ", which an exhausted limit of memory or time or a crash in a parser causes" if ended.status < 0 else ""
        )
        raise InvalidModel(f"model: {kind} ended its process: {ended.cause}{because}; it is refused")
    try:
        reply = REPLY.validate_json(ended.reply)
    except ValidationError as error:
        raise InvalidModel(
            f"model: {kind} gave an unreadable reply of {len(ended.reply)} bytes; it is refused"
        ) from error
    if reply.refusal is not None:
        raise (InvalidModel if reply.refusal.is_models_fault else InvalidRequest)(reply.refusal.message)
    return reply


def _required(result: T | None) -> T:
    if result is None:
        raise InternalError("compression: a reply without its result")
    return result
