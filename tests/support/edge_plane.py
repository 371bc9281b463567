"""An edge data plane without ONNX Runtime, network or time: the models echo their scores, the heavy tier is a fake."""

import asyncio
import threading
from collections.abc import Callable, Sequence

import numpy as np

from core.clock import Clock, SystemClock
from core.deadline import Deadline
from core.digest import Digest
from core.errors import HeavyUnavailable, NanofleetError
from core.manifest import Batching, Cascade, File, Lineage, Manifest, ScoreKind, Signature
from core.open_inference.messages import InferRequest, InferResponse, ParameterValue
from core.telemetry import Tracing, TracingSettings
from core.tensors import Array, Datatype, Tensor
from edge_agent.cascade.deferral import Deferrals
from edge_agent.cascade.policy import Reason
from edge_agent.cascade.privacy import PrivacyRules
from edge_agent.data_plane import EdgeDataPlane
from edge_agent.hard_examples import HardExample, HardExamples
from edge_agent.runtime.pool import LoadedModel, ModelPool
from edge_agent.runtime.session import RunTime
from edge_agent.settings import RuntimeSettings

CLASSES = 3
_DIGEST = Digest("sha256:" + "0" * 64)
UNSAMPLED = TracingSettings(endpoint=None, sample_ratio=0.0)
SURE = (0.0, 9.0, 0.0)
UNSURE = (0.0, 0.5, 0.4)


class FakeHeavy:
    """A heavy tier that answers 1.0 for every class, or fails; remembers what it was asked."""

    def __init__(self, error: NanofleetError | None = None) -> None:
        self.error = error
        self.known_obstacle: Reason | None = None
        self.asked: list[InferRequest] = []
        self.traceparents: list[str | None] = []

    def obstacle(self, model: str, *, remaining_s: float | None) -> Reason | None:
        return self.known_obstacle

    async def ask(
        self, request: InferRequest, *, deadline: Deadline | None = None, traceparent: str | None = None
    ) -> InferResponse:
        self.asked.append(request)
        self.traceparents.append(traceparent)
        if self.error is not None:
            raise self.error
        return InferResponse(request.model_name, "7", (scores_tensor("scores", (1.0, 1.0, 1.0)),), request.id)


class GatedHeavy(FakeHeavy):
    """Answers once its gate is open."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = asyncio.Event()
        self.is_left = asyncio.Event()

    async def ask(
        self, request: InferRequest, *, deadline: Deadline | None = None, traceparent: str | None = None
    ) -> InferResponse:
        try:
            await self.gate.wait()
        except asyncio.CancelledError:
            self.is_left.set()
            raise
        return await super().ask(request, deadline=deadline, traceparent=traceparent)


class FakeDeferrals:
    """Keeps what it has room for, in the order in which it came."""

    def __init__(self, *, room: int = 100) -> None:
        self.room = room
        self.taken: list[tuple[InferRequest, str, bytes]] = []

    def take(self, request: InferRequest, *, dedupe_id: str, reply_to: bytes) -> bool:
        if len(self.taken) >= self.room:
            return False
        self.taken.append((request, dedupe_id, reply_to))
        return True


class FakeExamples:
    def __init__(self, *, margin: float = 0.0) -> None:
        self.margin = margin
        self.offered: list[HardExample] = []

    def offer(self, example: HardExample) -> None:
        self.offered.append(example)


class FakeMailbox:
    """The mailbox of one asker, whose address says why the heavy tier is asked."""

    def dedupe_id(self) -> str:
        return "gate-1/camera-1/01"

    def reply_to(self, reason: Reason, confidence: float | None) -> bytes | None:
        return f"camera-1 {reason.value}".encode()


def away() -> FakeHeavy:
    return FakeHeavy(HeavyUnavailable("heavy tier: away"))


def cascade_of(threshold: float = 0.9) -> Cascade:
    return Cascade(
        escalate_to="large", score_output="scores", score_kind=ScoreKind.LOGITS, temperature=1.0, threshold=threshold
    )


def echo_manifest(
    name: str = "digits", *, version: int = 3, cascade: Cascade | None = None, max_batch: int = 8
) -> Manifest:
    return Manifest(
        model=name,
        version=version,
        variant="int8-static",
        entry="model.onnx",
        files=(File(path="model.onnx", digest=_DIGEST, size_bytes=1),),
        inputs=(Signature(name="x", datatype=Datatype.FP32, shape=(-1, CLASSES)),),
        outputs=(Signature(name="scores", datatype=Datatype.FP32, shape=(-1, CLASSES)),),
        batching=Batching(max_batch=max_batch),
        cascade=cascade,
        lineage=Lineage(recipe="int8-static"),
    )


def echo_model(
    name: str = "digits",
    *,
    version: int = 3,
    cascade: Cascade | None = None,
    clock: Clock | None = None,
    settings: RuntimeSettings | None = None,
) -> LoadedModel:
    manifest = echo_manifest(name, version=version, cascade=cascade)

    def run(inputs: Sequence[Array]) -> Sequence[Array]:
        return inputs

    return LoadedModel(
        manifest,
        manifest.digest(),
        run,
        run_time=RunTime(0.0, 0.0),
        settings=settings or RuntimeSettings(),
        clock=clock or SystemClock(),
    )


class SlowModel:
    """A model that runs on its own thread, one request at a time, and does not return before `release`."""

    def __init__(self) -> None:
        self.is_running = asyncio.Event()
        self.runs = 0
        self._loop = asyncio.get_running_loop()
        self._released = threading.Event()

    def loaded(self) -> LoadedModel:
        manifest = echo_manifest(max_batch=1)
        return LoadedModel(
            manifest,
            manifest.digest(),
            self._run,
            # Slow enough for a thread, quick enough for nobody to be refused because it would be late.
            run_time=RunTime(0.001, 0.001),
            settings=RuntimeSettings(),
            clock=SystemClock(),
        )

    def release(self) -> None:
        self._released.set()

    def _run(self, inputs: Sequence[Array]) -> Sequence[Array]:
        self.runs += 1
        self._loop.call_soon_threadsafe(self.is_running.set)
        self._released.wait(10)
        return inputs


async def plane_with(
    *models: LoadedModel,
    heavy: FakeHeavy | None = None,
    clock: Clock | None = None,
    tracing: Tracing | None = None,
    deferrals: Deferrals | None = None,
    examples: HardExamples | None = None,
    is_reachable: Callable[[], bool] | None = None,
    privacy: PrivacyRules | None = None,
) -> EdgeDataPlane:
    pool = ModelPool(RuntimeSettings(), clock=clock or SystemClock())
    for model in models:
        await pool.host(model)
    return EdgeDataPlane(
        pool,
        heavy or FakeHeavy(),
        tracing=tracing or Tracing("test", UNSAMPLED),
        clock=clock or SystemClock(),
        deferrals=deferrals,
        examples=examples,
        is_reachable=is_reachable,
        privacy=privacy,
    )


def plane_over(pool: ModelPool) -> EdgeDataPlane:
    """Return a plane whose heavy tier is away."""
    return EdgeDataPlane(pool, away(), tracing=Tracing("test", UNSAMPLED), clock=SystemClock())


def scores_tensor(name: str, values: Sequence[float]) -> Tensor:
    return Tensor(name, Datatype.FP32, np.array([values], dtype=np.float32))


def request_of(
    values: Sequence[float] = SURE, *, model: str = "digits", request_id: str = "", **parameters: ParameterValue
) -> InferRequest:
    return InferRequest(model, (scores_tensor("x", values),), id=request_id, parameters=parameters)
