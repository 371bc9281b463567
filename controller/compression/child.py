"""The process that opens untrusted files: one job in, one reply out, then it ends.

    python -I -m controller.compression.child

Order and reply are JSON. Bounds on memory, time and file size are set before anything heavy is imported (see
`controller.children`). `workshop` is the other side.
"""

import faulthandler
import traceback
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal, assert_never

from pydantic import Field, TypeAdapter

from controller.children.confinement import Limits, confine, send_reply, take_order, take_reply_pipe
from controller.compression.model import Dataset, Evaluated, EvaluationTask, Inspected, ModelBundle
from core.errors import InvalidModel, InvalidRequest

# A manifest's worth of signatures, and room.
MAX_REPLY_BYTES = 1 << 20
MAX_MESSAGE_CHARS = 800


@dataclass(frozen=True, slots=True)
class InspectJob:
    bundle: ModelBundle
    kind: Literal["inspect"] = "inspect"


@dataclass(frozen=True, slots=True)
class QuantiseJob:
    recipe: str
    bundle: ModelBundle
    target: Path
    calibration: Dataset | None
    kind: Literal["quantise"] = "quantise"


@dataclass(frozen=True, slots=True)
class EvaluateJob:
    task: EvaluationTask
    kind: Literal["evaluate"] = "evaluate"


Job = Annotated[InspectJob | QuantiseJob | EvaluateJob, Field(discriminator="kind")]


@dataclass(frozen=True, slots=True)
class Order:
    """What the parent sends."""

    limits: Limits
    job: Job


@dataclass(frozen=True, slots=True)
class Refusal:
    is_models_fault: bool
    message: str


@dataclass(frozen=True, slots=True)
class Reply:
    """What the child sends: a refusal, or the result of its kind of job (nothing for quantise)."""

    refusal: Refusal | None = None
    inspected: Inspected | None = None
    evaluated: Evaluated | None = None


ORDER: TypeAdapter[Order] = TypeAdapter(Order)
REPLY: TypeAdapter[Reply] = TypeAdapter(Reply)


def main() -> None:
    pipe = take_reply_pipe()
    faulthandler.enable()
    order = ORDER.validate_json(take_order())
    confine(order.limits)
    send_reply(pipe, REPLY.dump_json(_answer(order.job)))


def _answer(job: InspectJob | QuantiseJob | EvaluateJob) -> Reply:
    try:
        return _do(job)
    except InvalidRequest as error:
        return Reply(Refusal(isinstance(error, InvalidModel), _message(str(error), job)))
    except MemoryError:
        return Reply(Refusal(True, f"model: {job.kind} needs more memory than registry.publish_memory_bytes allows"))
    # The root of this process: whatever a file made a library raise is a reason to refuse the file.
    except Exception as error:
        traceback.print_exc()
        return Reply(Refusal(True, _message(f"model: {job.kind} failed: {type(error).__name__}: {error}", job)))


def _do(job: InspectJob | QuantiseJob | EvaluateJob) -> Reply:
    # Imported late: they bring ONNX and ONNX Runtime, which must come after the limits.
    from controller.compression import evaluate, inspect, recipes

    match job:
        case InspectJob():
            return Reply(inspected=inspect.inspect(job.bundle))
        case QuantiseJob():
            recipes.quantise(job.recipe, job.bundle, job.target, job.calibration)
            return Reply()
        case EvaluateJob():
            return Reply(evaluated=evaluate.evaluate(job.task))
        case _:
            assert_never(job)


def _message(text: str, job: InspectJob | QuantiseJob | EvaluateJob) -> str:
    """Return an error's text without the scratch folder's path, which means nothing to a publisher."""
    bundle = job.task.bundle if isinstance(job, EvaluateJob) else job.bundle
    return text.replace(f"{bundle.folder}/", "")[:MAX_MESSAGE_CHARS]


if __name__ == "__main__":
    main()
