"""The rest of the verification, where the manifest's bytes arrive: before any byte of the variant is fetched.

The catalogue vouches for a manifest by digest and length; what the manifest itself says (how new it is, which hardware
it is for) can only be judged once it is here.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass

from core.digest import Digest
from core.errors import Untrusted
from core.fleet_state import Slot
from core.manifest import Manifest


@dataclass(frozen=True, slots=True)
class ManifestTerms:
    """What was verified about a manifest, and what it has to fulfil on this machine."""

    length_bytes: int
    release_floor: int
    tags: frozenset[str]

    def require(self, manifest: Manifest) -> None:
        """Raise Untrusted unless `manifest` is recent enough and for this hardware."""
        name = f"{manifest.model} version {manifest.version} ({manifest.variant})"
        if manifest.release_counter is None or manifest.release_counter < self.release_floor:
            raise Untrusted(
                f"{name}: expected a release counter of at least {self.release_floor}, got {manifest.release_counter}; "
                "it was withdrawn, deploy a newer one"
            )
        if lacking := sorted(set(manifest.requires) - self.tags):
            raise Untrusted(f"{name}: expected an agent with the tags {lacking}, this one lacks them")


class AdmittedManifests:
    """Which manifests may be installed: those of the last admitted state, and those that were in force before it.

    The latter were verified when they came, and are only fetched again when the disk lost a part of them.
    """

    def __init__(self, *, in_force: Collection[Digest]) -> None:
        self._in_force = frozenset(in_force)
        self._terms: Mapping[Digest, ManifestTerms] = {}

    def admit(self, terms: Mapping[Digest, ManifestTerms], *, running: Collection[Digest]) -> None:
        """Replace what is admitted: `terms` for new manifests; those that are `running` were verified before."""
        self._in_force = frozenset(running)
        self._terms = dict(terms)

    def require(self, manifest: Manifest, slot: Slot) -> None:
        """Raise Untrusted unless the `manifest` of `slot`, whose bytes have its digest, may be installed here."""
        digest = slot.manifest_digest
        terms = self._terms.get(digest)
        if terms is not None:
            terms.require(manifest)
        elif digest not in self._in_force:
            raise Untrusted(f"{slot.model}: expected a manifest of the admitted assignment, got {digest}; deploy again")
