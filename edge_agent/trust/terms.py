"""The rest of the verification, where the manifest's bytes arrive: before any byte of the variant is fetched.

The catalogue vouches for a manifest by digest and length; what the manifest itself says (how new it is, which hardware
it is for) can only be judged once it is here.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass

from core.digest import Digest, digest_of
from core.errors import InvalidManifest, Untrusted
from core.manifest import Manifest, parse_manifest


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
    """Which manifests may be brought in: those of the last admitted state, and those that were in force at start.

    The latter were verified when they came, and are only fetched again when the disk lost a part of them.
    """

    def __init__(self, *, in_force: Collection[Digest]) -> None:
        self._in_force = frozenset(in_force)
        self._terms: Mapping[Digest, ManifestTerms] = {}

    def admit(self, terms: Mapping[Digest, ManifestTerms], *, running: Collection[Digest]) -> None:
        """Replace what is admitted: `terms` for new manifests; those that are `running` were verified before."""
        self._in_force = frozenset(running)
        self._terms = dict(terms)

    def length_bytes(self, digest: Digest) -> int | None:
        """Return the exact length of a new manifest, None for one that was in force before.

        Raises:
            Untrusted: nobody vouches for it.
        """
        terms = self._terms_of(digest)
        return None if terms is None else terms.length_bytes

    def opened(self, digest: Digest, content: bytes) -> Manifest:
        """Return the manifest in `content`, as it may be installed here.

        Raises:
            Untrusted: nobody vouches for it, it is too old, or it is for other hardware.
            InvalidManifest: the bytes are not what the digest says, or no manifest.
        """
        terms = self._terms_of(digest)
        if (found := digest_of(content)) != digest:
            raise InvalidManifest(f"manifest: expected {digest}, got {found}")
        if terms is None:
            return parse_manifest(content)
        if len(content) != terms.length_bytes:
            raise InvalidManifest(f"manifest: expected {terms.length_bytes} bytes, got {len(content)}")
        manifest = parse_manifest(content)
        terms.require(manifest)
        return manifest

    def _terms_of(self, digest: Digest) -> ManifestTerms | None:
        terms = self._terms.get(digest)
        if terms is None and digest not in self._in_force:
            raise Untrusted(f"manifest {digest}: expected one of an admitted assignment; deploy it again")
        return terms
