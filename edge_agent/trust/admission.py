"""Answer one question: metadata is brought up to date, then the verifier decides about every new slot.

What came with the assignment is tried first, since it costs no round trip and is all that is needed when the controller
is honest and quick. Whatever does not hold with it is tried once more with metadata asked for on the spot; only then is
the answer no. Metadata that TUF accepted is kept in either case: it can only be newer than what was held.
"""

import logging
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from datetime import datetime
from pathlib import Path

from tuf.api.metadata import Signed
from tuf.ngclient import FetcherInterface

from core.catalogue import family_role
from core.digest import Digest
from core.errors import Unavailable, Untrusted
from core.fleet_state import DesiredState
from edge_agent.trust.accepted import Accepted, load_accepted, save_accepted
from edge_agent.trust.catalogue import Catalogue, versions_of
from edge_agent.trust.fetchers import AtHand
from edge_agent.trust.question import Answer, Question, Statement
from edge_agent.trust.verifier import (
    TopLevel,
    decoded_assignment,
    issued_by,
    require_current,
    require_not_older,
    require_signed,
    require_unexpired,
    statement_on,
)

METADATA = "metadata"
# Written at enrolment, or by whoever makes the image of the device; the anchor of everything here.
ROOT = "root.json"

# How the controller is asked, opened only when it has to be.
Live = Callable[[], AbstractContextManager[FetcherInterface]]

_log = logging.getLogger(__name__)


def admit(question: Question, *, now: datetime, live: Live | None) -> Answer:
    """Return what the catalogue says about the slots that are new.

    Raises:
        Untrusted: the assignment or the catalogue does not hold.
        Unavailable: current metadata could not be had.
        DiskFull: there is no room to keep what was verified.
        InvalidRequest: the assignment makes no sense.
    """
    desired = decoded_assignment(question.signed, agent_id=question.agent_id)
    verification = _Verification(question, desired, now=now)
    at_hand = AtHand(question.signed.catalogue, timestamp=verification.catalogue.held_timestamp())
    try:
        allowed = verification.by(at_hand)
    except (Untrusted, Unavailable) as refused:
        if live is None:
            raise
        _log.debug("it does not hold with what is at hand", extra={"reason": str(refused)})
        with live() as fetcher:
            allowed = verification.by(fetcher)
    return Answer(allowed, verification.clock_behind_s)


class _Verification:
    """One question under way; `by` may be tried with several sources, and time never goes back between them."""

    def __init__(self, question: Question, desired: DesiredState, *, now: datetime) -> None:
        self._question = question
        self._desired = desired
        self._accepted = load_accepted(question.folder)
        self._clock = now
        self.catalogue = Catalogue(question.folder / METADATA, embedded_root(question.folder / ROOT))

    @property
    def now(self) -> datetime:
        return max(self._clock, self._accepted.time_floor)

    @property
    def clock_behind_s(self) -> float:
        return (self.now - self._clock).total_seconds()

    def by(self, fetcher: FetcherInterface) -> dict[Digest, Statement]:
        require_unexpired(self._desired, now=self.now)
        top = self._current_top_level(fetcher)
        require_signed(self._question.signed, top.targets)
        require_unexpired(self._desired, now=self.now)
        new = [slot for slot in self._desired.slots if slot.manifest_digest not in self._question.running]
        families = {slot: self.catalogue.family(slot) for slot in new}
        self.catalogue.keep()
        roles = {family_role(slot.model): role.signed for slot, role in families.items() if role is not None}
        self._accept(roles, top)
        require_current(roles, now=self.now)
        return {slot.manifest_digest: statement_on(slot, top, role) for slot, role in families.items()}

    def _current_top_level(self, fetcher: FetcherInterface) -> TopLevel:
        top = self.catalogue.refresh(fetcher)
        # A cache that lost its files cannot tell what is older; what was accepted stands beside it.
        require_not_older(versions_of(top), self._accepted.versions)
        self.catalogue.keep()
        self._accept({"root": top.root, "targets": top.targets}, top)
        roles = {"root": top.root, "timestamp": top.timestamp, "snapshot": top.snapshot, "targets": top.targets}
        require_current(roles, now=self.now)
        return top

    def _accept(self, offline_signed: Mapping[str, Signed], top: TopLevel) -> None:
        """Note which versions are held, and what time it is at least; a floor only ever rises."""
        issued_at = issued_by(offline_signed, timestamp=top.timestamp) or self._accepted.issued_at
        accepted = Accepted(versions_of(top), max(issued_at, self._accepted.issued_at))
        if accepted != self._accepted:
            save_accepted(self._question.folder, accepted)
            self._accepted = accepted


def embedded_root(path: Path) -> bytes:
    """Return the root that everything is verified from.

    Raises:
        Untrusted: there is none.
    """
    try:
        return path.read_bytes()
    except OSError as error:
        raise Untrusted(
            f"catalogue: expected the embedded root at {path}, got {error.strerror}; enrol again"
        ) from error
