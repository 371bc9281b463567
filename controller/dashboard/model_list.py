"""Models as the dashboard shows them: variants side by side with the original, and whether agents may install them."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

from controller.fleet.model import Deployment
from controller.registry.model import ORIGINAL, ModelVersion, Variant
from controller.signing.model import SigningStatus
from core.catalogue import family_role
from core.digest import Digest
from core.ids import ModelName

SignatureState = Literal["signed", "waiting", "not listed"]


class Listed(Protocol):
    def is_released(self, manifest_digest: Digest) -> bool: ...


@dataclass(frozen=True, slots=True)
class VariantRow:
    """Ratios are to the original of the same version; None where there is nothing to compare."""

    variant: Variant
    signature: SignatureState
    # The name of the variant it was made from, where that is of the same version.
    parent: str | None
    size_ratio: float | None
    latency_ratio: float | None
    accuracy_loss: float | None


@dataclass(frozen=True, slots=True)
class VersionRow:
    version: ModelVersion
    variants: tuple[VariantRow, ...]


@dataclass(frozen=True, slots=True)
class ModelRow:
    latest: VersionRow
    targets: tuple[Deployment, ...]

    @property
    def name(self) -> ModelName:
        return self.latest.version.model


def model_rows(
    latest: Iterable[ModelVersion], deployments: Iterable[Deployment], listed: Listed, signing: SigningStatus
) -> tuple[ModelRow, ...]:
    by_model: dict[ModelName, list[Deployment]] = {}
    for deployment in deployments:
        by_model.setdefault(deployment.slot.model, []).append(deployment)
    return tuple(
        ModelRow(_version_row(version, listed, signing), tuple(by_model.get(version.model, ()))) for version in latest
    )


def version_rows(versions: Sequence[ModelVersion], listed: Listed, signing: SigningStatus) -> tuple[VersionRow, ...]:
    return tuple(_version_row(version, listed, signing) for version in versions)


def _version_row(version: ModelVersion, listed: Listed, signing: SigningStatus) -> VersionRow:
    names = {variant.manifest_digest: variant.variant for variant in version.variants}
    original = next((variant for variant in version.variants if variant.variant == ORIGINAL), None)
    staged = {role.role for role in signing.staged}
    rows = []
    for variant in version.variants:
        parent = variant.manifest.lineage.parent
        rows.append(
            VariantRow(
                variant,
                _signature(variant, listed, staged),
                None if parent is None else names.get(Digest(parent)),
                *_compared(variant, original),
            )
        )
    return VersionRow(version, tuple(rows))


def _signature(variant: Variant, listed: Listed, staged: set[str]) -> SignatureState:
    if listed.is_released(variant.manifest_digest):
        return "signed"
    return "waiting" if family_role(variant.model) in staged else "not listed"


def _compared(variant: Variant, original: Variant | None) -> tuple[float | None, float | None, float | None]:
    if original is None or original is variant:
        return None, None, None
    ours, theirs = variant.measured, original.measured
    loss = None
    if ours.accuracy_ratio is not None and theirs.accuracy_ratio is not None:
        loss = theirs.accuracy_ratio - ours.accuracy_ratio
    return ours.size_bytes / theirs.size_bytes, ours.latency_p50_us / max(theirs.latency_p50_us, 1e-9), loss
