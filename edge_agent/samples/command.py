"""`nanofleet-agent samples list|export|purge`: the samples on this machine, whether an agent runs on them or not.

What may not leave the site is exported too, by whoever is at the site already: that is what it was kept for.
"""

import sys
from pathlib import Path

import orjson

from core.errors import IntegrityError, NotFound
from core.ids import checked_name
from core.sample_folder import SampleFolder
from edge_agent.samples.store import SampleStore, description_of

# As whose samples exported ones are named, on a machine that was never enrolled.
NOBODY = "agent"


def list_samples(folder: Path, *, as_json: bool) -> int:
    """Print how many there are by model, class, reason and privacy class."""
    store = _opened(folder)
    groups: dict[tuple[str, int | None, str, str], int] = {}
    for kept in store.all():
        group = (kept.model, kept.label, kept.reason, kept.privacy)
        groups[group] = groups.get(group, 0) + 1
    rows = [
        {"model": model, "label": label, "reason": reason, "privacy": privacy, "samples": samples}
        for (model, label, reason, privacy), samples in sorted(groups.items(), key=lambda item: -item[1])
    ]
    if as_json:
        sys.stdout.write(orjson.dumps({"samples": rows, "size_bytes": store.size_bytes}).decode() + "\n")
        return 0
    for row in rows:
        label = "-" if row["label"] is None else row["label"]
        sys.stdout.write(
            f"{row['samples']:>6}  {row['model']}  class {label}  {row['reason']}  privacy {row['privacy']}\n"
        )
    sys.stdout.write(f"{len(store.all())} samples, {store.size_bytes} bytes in {folder}\n")
    return 0


def export_samples(folder: Path, out: Path, *, agent: str, model: str | None) -> int:
    """Copy samples into `out`, with an index; damaged ones are left out, and said."""
    store, target = _opened(folder), SampleFolder(out)
    written = damaged = 0
    for kept in store.all():
        if model not in (None, kept.model):
            continue
        try:
            content = store.read(kept)
            description_of(content, kept)
            target.add(agent, kept.digest, content)
            written += 1
        except IntegrityError as error:
            damaged += 1
            sys.stderr.write(f"nanofleet-agent: {error}\n")
        except NotFound:
            # The agent that runs here shed it meanwhile.
            continue
    in_folder = target.write_index()
    sys.stdout.write(f"{written} samples exported, {in_folder} are in {out}\n")
    return 1 if damaged else 0


def purge_samples(folder: Path, *, model: str | None) -> int:
    """Remove samples from this machine; an agent that runs here notices within a minute."""
    removed = _opened(folder).purge(None if model is None else checked_name(model, kind="model"))
    sys.stdout.write(f"{removed} samples removed\n")
    return 0


def _opened(folder: Path) -> SampleStore:
    store = SampleStore(folder)
    store.look(removes_leftovers=False)
    return store
