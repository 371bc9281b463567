"""What verification leaves on disk besides the metadata itself: the versions accepted last, and the floor under time.

The floor is the latest instant that is certain to have passed: when this software was built, or when the newest
offline-signed metadata that was accepted says it was signed. A clock that lies before it (a board without a battery
boots in 1970) would make every expired signature valid again, so expiry is judged at the floor instead.
"""

import logging
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import orjson

from core.atomic_files import write_atomically
from core.fleet_state import NO_CATALOGUE, CatalogueVersions

# Set with every release; this software did not exist earlier.
BUILT_AT = datetime(2026, 10, 1, tzinfo=UTC)

_FILE = "accepted.json"
_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Accepted:
    versions: CatalogueVersions = NO_CATALOGUE
    issued_at: datetime = BUILT_AT

    @property
    def time_floor(self) -> datetime:
        return max(BUILT_AT, self.issued_at)


def load_accepted(folder: Path) -> Accepted:
    """Return what was saved in `folder`; a missing or broken file says nothing, and costs one download."""
    path = folder / _FILE
    try:
        fields = orjson.loads(path.read_bytes())
        versions = CatalogueVersions(int(fields["root"]), int(fields["timestamp"]))
        return Accepted(versions, datetime.fromisoformat(fields["issued_at"]).astimezone(UTC))
    except FileNotFoundError:
        return Accepted()
    except (OSError, ValueError, KeyError, TypeError, OverflowError) as error:
        _log.warning("the versions of the catalogue could not be read", extra={"path": str(path), "reason": str(error)})
        return Accepted()


def save_accepted(folder: Path, accepted: Accepted) -> None:
    root, timestamp = accepted.versions
    fields = {"root": root, "timestamp": timestamp, "issued_at": accepted.issued_at.isoformat()}
    write_atomically(folder / _FILE, orjson.dumps(fields))
