"""Values of the registry, made up for tests that store or serve them."""

from datetime import UTC, datetime, timedelta

from controller.registry.model import (
    ORIGINAL,
    Measured,
    ModelVersion,
    Publication,
    PublicationState,
    Variant,
)
from core.digest import digest_of
from core.ids import ModelName, VariantName
from core.manifest import File, Lineage, Manifest, Signature
from core.tensors import Datatype

NOON = datetime(2026, 3, 1, 12, 0, 0, 123456, tzinfo=UTC)


def made_variant(model: ModelName, version: int, variant: VariantName = ORIGINAL, *, content: bytes = b"x") -> Variant:
    manifest = Manifest(
        model=model,
        version=version,
        variant=variant,
        entry="model.onnx",
        files=(File(path="model.onnx", digest=digest_of(content), size_bytes=len(content)),),
        inputs=(Signature(name="x", datatype=Datatype.FP32, shape=(-1, 4)),),
        outputs=(Signature(name="y", datatype=Datatype.FP32, shape=(-1, 2)),),
        lineage=Lineage(recipe=variant),
    )
    measured = Measured(len(content), 10.5, 12.25, accuracy_ratio=0.75, evaluated_samples=80)
    return Variant(model, version, variant, manifest.digest(), manifest, measured)


def made_version(model: ModelName, version: int, *derived: VariantName, created_at: datetime = NOON) -> ModelVersion:
    names = (ORIGINAL, *derived)
    return ModelVersion(model, version, created_at, tuple(made_variant(model, version, name) for name in names))


def made_publication(publication_id: str, model: ModelName, *, after_s: float = 0) -> Publication:
    at = NOON + timedelta(seconds=after_s)
    return Publication(publication_id, model, PublicationState.RUNNING, "queued", 0.0, at, at)
