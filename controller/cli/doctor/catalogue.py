"""How long what was signed still holds."""

from collections.abc import Mapping
from datetime import UTC, datetime, timedelta

import orjson

from core.doctor import Finding, ok, problem, skipped, warning

# Signed by the controller itself, every few days.
_ONLINE = frozenset({"snapshot", "timestamp"})
# Chosen: a week is enough to fetch keys from a safe; what the controller signs itself is renewed days before.
_SPARE, _ONLINE_SPARE = timedelta(days=7), timedelta(days=1)
_SIGN = "`nanofleet signing stage FILE`, sign it where the keys are, `nanofleet signing publish FILE`"
_RUN = "run the controller: it signs these itself as long as their keys are in data_dir/keys"


def judge_catalogue(newest: Mapping[str, bytes], *, now: datetime) -> Finding:
    """Judge the role that expires first among those that are closest to their end.

    Args:
        newest: signed metadata by role, as TUF writes it.
    """
    if not newest:
        return skipped("catalogue", "there is none yet; `nanofleet controller init` makes it")
    expiries = {role: _expires_at(content) for role, content in newest.items()}
    late = [role for role, at in expiries.items() if at - now < (_ONLINE_SPARE if role in _ONLINE else _SPARE)]
    if not late:
        role, first = min(expiries.items(), key=lambda each: each[1])
        return ok("catalogue", f"{len(expiries)} roles; {role} is the first to expire, on {first:%Y-%m-%d}")
    role = min(late, key=lambda each: expiries[each])
    judged = problem if expiries[role] <= now else warning
    word = "expired" if expiries[role] <= now else "expires"
    return judged(
        "catalogue",
        f"{role} {word} on {expiries[role]:%Y-%m-%d %H:%M} UTC; agents install nothing new after that",
        expected="signatures that hold",
        remedy=_RUN if role in _ONLINE else _SIGN,
    )


def _expires_at(content: bytes) -> datetime:
    # TUF specification, section 4.2.1: ISO 8601 in UTC, to the second.
    return datetime.strptime(orjson.loads(content)["signed"]["expires"], "%Y-%m-%dT%H:%M:%SZ").replace(tzinfo=UTC)
