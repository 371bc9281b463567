"""How many files this process may have open: every connection is one, and shells give 1,024 of them."""

import logging
import resource

_log = logging.getLogger(__name__)

# Derived: the connections of all three ports together, and the database, blobs and packs beside them.
ENOUGH = 32_768
# Below it, connections of strangers on the enrolment port alone could take all that the fleet needs.
_FEW = 16_384


def allow_many() -> None:
    """Raise our own limit, as far as the system lets us; children inherit it."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    allowed = ENOUGH if hard == resource.RLIM_INFINITY else min(hard, ENOUGH)
    if soft == resource.RLIM_INFINITY or soft >= allowed:
        allowed = soft
    else:
        resource.setrlimit(resource.RLIMIT_NOFILE, (allowed, hard))
    if allowed != resource.RLIM_INFINITY and allowed < _FEW:
        _log.warning(
            "few files may be open, so connections of strangers can use them up: raise the hard limit (ulimit -Hn)",
            extra={"allowed": allowed, "wanted": _FEW},
        )
