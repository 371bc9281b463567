"""When a role must be signed again, and who is told that it was not."""

import logging
from datetime import datetime, timedelta

from controller.signing.edition import Edition
from controller.signing.model import Lifetimes

_log = logging.getLogger(__name__)

# Chosen: a third is left, which is a month for targets and four months for root.
_DUE_SHARE = 3
# Chosen: a week is enough to fetch keys from a safe; from then on it wakes somebody.
_URGENT = timedelta(days=7)
_ALARM_INTERVAL = timedelta(days=1)


class Expiries:
    def __init__(self, lifetimes: Lifetimes) -> None:
        self._lifetimes = lifetimes
        self._alarmed: dict[str, datetime] = {}

    def is_due(self, role: str, expires_at: datetime, *, now: datetime) -> bool:
        """Say whether a role that expires then should be signed again by now."""
        return expires_at - now <= self._lifetimes.of(role) / _DUE_SHARE

    def due(self, edition: Edition, *, now: datetime) -> set[str]:
        return {role for role in edition.files if self.is_due(role, edition.expires_at(role), now=now)}

    def alarm(self, edition: Edition, *, now: datetime) -> None:
        """Log, once a day each, the roles that are due although they were just to be renewed."""
        for role in sorted(self.due(edition, now=now)):
            last = self._alarmed.get(role)
            if last is None or now - last >= _ALARM_INTERVAL:
                self._alarmed[role] = now
                expires_at = edition.expires_at(role)
                _log.log(
                    logging.ERROR if expires_at - now <= _URGENT else logging.WARNING,
                    "catalogue role expires and its keys are elsewhere; run `nanofleet signing stage`",
                    extra={"role": role, "expires": expires_at.isoformat()},
                )
