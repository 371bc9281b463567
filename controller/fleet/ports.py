"""What the fleet asks of others, and whom it tells."""

from collections.abc import Callable, Sequence
from typing import Protocol

from core.digest import Digest
from core.fleet_state import Slot
from core.ids import ModelName, VariantName

# Called with the manifest of a deployment, and those that it takes the place of.
DeployedListener = Callable[[Digest, Sequence[Digest]], None]
# Called with what the fleet decides by itself: an action, its target, a short reason.
DecidedListener = Callable[[str, str, str], None]


class FoundVariant(Protocol):
    @property
    def version(self) -> int: ...
    @property
    def manifest_digest(self) -> Digest: ...


class Catalogue(Protocol):
    """What the fleet asks of the registry."""

    async def variant(self, model: ModelName, version: int | None, variant: VariantName) -> FoundVariant:
        """Return one variant; version None stands for the newest. Raises UnknownModel."""
        ...


class Releases(Protocol):
    """What the fleet asks of the signed catalogue."""

    def require_released(self, slot: Slot) -> None:
        """Raise Conflict, saying what to do, unless agents may install the slot's variant."""
        ...
