"""`Gateway`: every registered model, answered by the heavy tier.

    face ─▶ Gateway.infer: look up → check against the manifest → heavy tier ─▶ answer

The `original` variant answers; compressed ones are for the edge. Faces of the gateway make no spans: they are made
here, the same for all of them (`controller.gateway.spans`).
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Protocol

from controller.gateway.gateway_metrics import GatewayMetrics
from controller.gateway.spans import Passage, RequestSpans, keep_unsampled
from controller.registry.model import ORIGINAL, Model, ModelVersion, Variant
from core.clock import Clock
from core.deadline import Deadline
from core.digest import Digest
from core.errors import Forbidden, HeavyUnavailable, NanofleetError, UnknownModel
from core.ids import ModelName, VariantName
from core.keeping import Keep
from core.metrics import Registry
from core.open_inference.messages import InferRequest, InferResponse, ModelIndexEntry, ModelMetadata
from core.open_inference.service import Call
from core.open_inference.signature import ModelSignature
from core.telemetry import Tracing, parse_traceparent

# Versions are positive 32-bit numbers; more digits than that name nothing.
_MAX_VERSION_DIGITS = 10
# Signatures follow from the manifest; this many are kept ready, more than a fleet has models in use.
_MAX_SIGNATURES = 1024


class Models(Protocol):
    """What the gateway asks the registry; `variant` is on the hot path and must not go to the disk each time."""

    async def models(self) -> Sequence[Model]: ...

    async def versions(self, model: ModelName) -> Sequence[ModelVersion]: ...

    async def variant(self, model: ModelName, version: int | None, variant: VariantName) -> Variant: ...


class Heavy(Protocol):
    """The tier that answers."""

    @property
    def is_ready(self) -> bool: ...

    async def infer(
        self, request: InferRequest, *, digest: Digest, deadline: Deadline, traceparent: str | None
    ) -> InferResponse: ...


class Gateway:
    """A `core.open_inference.service.DataPlane`. `default_timeout_s` is for requests that bring no deadline."""

    def __init__(
        self,
        models: Models,
        heavy: Heavy,
        *,
        tracing: Tracing,
        clock: Clock,
        default_timeout_s: float = 30.0,
        metrics: GatewayMetrics | None = None,
    ) -> None:
        """`metrics` None: what is counted is nobody's to see."""
        self._metrics = metrics or GatewayMetrics(Registry(), clock=clock)
        self._models = models
        self._heavy = heavy
        self._tracing = tracing
        self._clock = clock
        self._default_timeout_s = default_timeout_s
        self._signatures: dict[Digest, ModelSignature] = {}

    async def is_ready(self) -> bool:
        return self._heavy.is_ready

    async def index(self) -> Sequence[ModelIndexEntry]:
        state, reason = ("READY", "") if self._heavy.is_ready else ("UNAVAILABLE", "the heavy tier is away")
        return [
            ModelIndexEntry(model.name, str(model.latest_version), state, reason)
            for model in await self._models.models()
        ]

    async def metadata(self, name: str, version: str) -> ModelMetadata:
        variant = await self._variant(name, version)
        signature = self._signature(variant)
        return ModelMetadata(
            name=variant.model,
            versions=tuple(str(known.version) for known in await self._models.versions(variant.model)),
            platform=variant.manifest.platform,
            inputs=tuple(signature.inputs.values()),
            outputs=tuple(signature.outputs.values()),
            properties={"digest": variant.manifest_digest},
        )

    async def is_model_ready(self, name: str, version: str) -> bool:
        await self._variant(name, version)
        return self._heavy.is_ready

    async def load(self, name: str) -> None:
        raise _not_by_hand(name)

    async def unload(self, name: str) -> None:
        raise _not_by_hand(name)

    async def infer(self, request: InferRequest, call: Call) -> InferResponse:
        try:
            response = await self._infer(request, call)
        except NanofleetError as error:
            self._metrics.refused(request.model_name, error)
            raise
        self._metrics.answered(response.model_name)
        return response

    async def _infer(self, request: InferRequest, call: Call) -> InferResponse:
        passage = Passage(request.model_name, call.traceparent, self._clock.monotonic_s())
        if self._tracing.is_sampled(call.traceparent):
            return await self._infer_traced(request, call, passage)
        try:
            response = await self._pass(request, call, passage, None)
        except BaseException as error:
            keep_unsampled(self._tracing, passage, error, clock=self._clock)
            raise
        keep_unsampled(self._tracing, passage, None, clock=self._clock)
        return response

    async def _infer_traced(self, request: InferRequest, call: Call, passage: Passage) -> InferResponse:
        spans = RequestSpans(self._tracing, passage, Keep.SAMPLED, clock=self._clock)
        try:
            response = await self._pass(request, call, passage, spans)
        except BaseException as error:
            spans.end(error)
            raise
        spans.end()
        return response

    async def _pass(
        self, request: InferRequest, call: Call, passage: Passage, spans: RequestSpans | None
    ) -> InferResponse:
        """Check `request` and have the tier answer it, noting in `passage` how far it has come."""
        variant = passage.variant = await self._variant(request.model_name, request.model_version)
        self._metrics.exists(variant.model)
        self._signature(variant).require(request)
        now_s = passage.asked_s = self._clock.monotonic_s()
        deadline = call.deadline or Deadline.after(self._default_timeout_s, now_s=now_s)
        traceparent = _well_formed(call.traceparent) if spans is None else spans.ask()
        # "Latest" is resolved once, here.
        exact = replace(request, model_version=str(variant.version))
        with self._metrics.heavy(variant.model, traceparent):
            response = await self._heavy.infer(
                exact, digest=variant.manifest_digest, deadline=deadline, traceparent=traceparent
            )
        return self._as_asked(response, request, variant)

    def _as_asked(self, response: InferResponse, request: InferRequest, variant: Variant) -> InferResponse:
        """Return the outputs that were asked for, in that order, whichever server answered."""
        signature = self._signature(variant)
        wanted = signature.wanted(request)
        outputs = {tensor.name: tensor for tensor in response.outputs}
        if missing := [name for name in wanted if name not in outputs]:
            raise HeavyUnavailable(f"expected the outputs {list(wanted)} from the heavy tier, {missing} did not come")
        return InferResponse(
            variant.model, str(variant.version), tuple(outputs[name] for name in wanted), id=request.id
        )

    async def _variant(self, name: str, version: str) -> Variant:
        return await self._models.variant(ModelName(name), _version_number(name, version), ORIGINAL)

    def _signature(self, variant: Variant) -> ModelSignature:
        signature = self._signatures.get(variant.manifest_digest)
        if signature is None:
            if len(self._signatures) >= _MAX_SIGNATURES:
                self._signatures.pop(next(iter(self._signatures)))
            signature = self._signatures[variant.manifest_digest] = ModelSignature.of(variant.manifest)
        return signature


def _well_formed(traceparent: str | None) -> str | None:
    """Return what may go on to the next tier; a malformed value is as good as none (W3C, section 4.3)."""
    return traceparent if traceparent is not None and parse_traceparent(traceparent) is not None else None


def _version_number(name: str, version: str) -> int | None:
    if not version:
        return None
    if not (version.isascii() and version.isdecimal() and len(version) <= _MAX_VERSION_DIGITS):
        raise UnknownModel(f"model {name[:80]!r}: versions are numbers, got {version[:80]!r}")
    return int(version)


def _not_by_hand(name: str) -> Forbidden:
    return Forbidden(
        f"model {name[:80]!r}: what runs here follows from what is published; deploy models with `nanofleet deploy`"
    )
