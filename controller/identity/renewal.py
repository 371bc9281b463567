"""How an agent proves that it holds the key it was certified for last: it signs a value of ours, once.

The value (nonce) carries its own proof of coming from us, so nothing is kept for a challenge and a flood of them costs
no memory: random bytes, the time, and a MAC over both and the agent's name. Only those that were used well are kept,
until they are too old anyway. A restart forgets all; agents ask again.
"""

import hashlib
import hmac
import secrets
from collections import OrderedDict

from core.errors import Forbidden, InvalidRequest, Overloaded
from core.ids import AgentId

CONTEXT = b"nanofleet renew v1\n"
NONCE_LIFETIME_S = 60.0
_RANDOM_BYTES = 16
_TIME_BYTES = 8
_MAC_BYTES = 32
NONCE_BYTES = _RANDOM_BYTES + _TIME_BYTES + _MAC_BYTES
# DER of a P-256 signature has at most 72 bytes.
MAX_SIGNATURE_BYTES = 80
# Chosen: a thousand renewals a second for a minute.
_MAX_USED = 60_000


def signed_message(nonce: bytes, csr: bytes) -> bytes:
    """Return what the agent signs to renew."""
    return CONTEXT + nonce + hashlib.sha256(csr).digest()


class RenewalNonces:
    """Times are seconds of one monotonic clock."""

    def __init__(self) -> None:
        self._key = secrets.token_bytes(32)
        self._used: OrderedDict[bytes, float] = OrderedDict()

    def make(self, agent: AgentId, *, now_s: float) -> bytes:
        head = secrets.token_bytes(_RANDOM_BYTES) + int(now_s * 1e6).to_bytes(_TIME_BYTES, "big")
        return head + self._mac(head, agent)

    def require_fresh(self, nonce: bytes, agent: AgentId, *, now_s: float) -> None:
        """Let pass what was made for this agent, is recent and was not used.

        Raises:
            InvalidRequest: it has another length.
            Forbidden: it is not ours, not for this agent, too old or used.
        """
        if len(nonce) != NONCE_BYTES:
            raise InvalidRequest(f"renewal nonce: expected {NONCE_BYTES} bytes, got {len(nonce)}")
        head, mac = nonce[:-_MAC_BYTES], nonce[-_MAC_BYTES:]
        made_s = int.from_bytes(head[_RANDOM_BYTES:], "big") / 1e6
        is_ours = hmac.compare_digest(mac, self._mac(head, agent))
        if not is_ours or now_s - made_s > NONCE_LIFETIME_S or nonce in self._used:
            raise Forbidden(f"renewal nonce: expected one made within {NONCE_LIFETIME_S:g} s and not used; ask again")

    def use(self, nonce: bytes, *, now_s: float) -> None:
        """Use up a fresh nonce."""
        while self._used and next(iter(self._used.values())) < now_s - NONCE_LIFETIME_S:
            self._used.popitem(last=False)
        if len(self._used) >= _MAX_USED:
            raise Overloaded("renewal: too many at the same time; try again in a minute")
        self._used[nonce] = now_s

    def _mac(self, head: bytes, agent: AgentId) -> bytes:
        return hmac.digest(self._key, head + agent.encode(), "sha256")
