"""How nanofleet uses The Update Framework (TUF 1.0): names and our own fields, in one place for both sides.

    root ─▶ targets (director keys) ─▶ family-<model> (floor) ─▶ <model>/<version>/<variant>.json = a manifest's bytes
        └─▶ snapshot ─▶ timestamp

One role delegated per model; never per device. Fields of ours start with `x-nanofleet-`, stand in the signed part and
are therefore covered by the role's signatures; TUF clients that do not know them leave them alone (TUF 4.1).
"""

from core.ids import ModelName, VariantName

# TUF recommends few delegations: each is a line of every snapshot, and clients give up on large ones.
MAX_FAMILIES = 200
# In `targets`: {key id: raw Ed25519 public key in hexadecimal}, the keys by which assignments may be signed.
DIRECTOR_KEYS = "x-nanofleet-director-keys"
# In a family's role: the smallest release counter that may still be installed.
RELEASE_FLOOR = "x-nanofleet-release-floor"
# In a family's role: [versions] above the floor that were taken back and never come again.
REVOKED = "x-nanofleet-revoked"
# In root, targets and families: when it was signed, ISO 8601 in UTC; what a machine's clock may not lie before.
ISSUED = "x-nanofleet-issued"


def family_role(model: ModelName) -> str:
    return f"family-{model}"


def family_paths(model: ModelName) -> str:
    """Return the pattern of target paths that the family's role may sign."""
    return f"{model}/*/*.json"


def target_path(model: ModelName, version: int, variant: VariantName) -> str:
    """Return the target path of a variant; the target's content is the manifest's canonical bytes."""
    return f"{model}/{version}/{variant}.json"
