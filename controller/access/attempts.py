"""How often one source may show a credential that is not known here before it is told to wait.

A secret of 256 bits is not found by trying, so a good one is let in whatever else came from its address: a forgotten
script behind the same router must not lock people out. What is bounded is the noise that trying makes.
"""

import ipaddress
from collections import OrderedDict

from core.clock import Clock
from core.errors import Overloaded

# Chosen: somebody who pastes the wrong secret ten times in a row can wait.
BURST = 10
REFILL_S = 6.0
# Chosen: some 500 kB when all are taken; the source that was quiet the longest is forgotten first.
MAX_SOURCES = 4096


class FailedAttempts:
    """Every source may fail BURST times at once, then once in REFILL_S.

    Source: the generic cell rate algorithm, ITU-T I.371; one number per source, the time at which its debt is paid.
    """

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._paid_s: OrderedDict[str, float] = OrderedDict()

    def count(self, source: str) -> None:
        """Count a failed attempt.

        Raises:
            Overloaded: the source has failed too often; this one is not counted.
        """
        network, now_s = _network(source), self._clock.monotonic_s()
        debt_s = max(self._paid_s.get(network, now_s) - now_s, 0.0)
        if debt_s > (BURST - 1) * REFILL_S:
            raise Overloaded(f"credential: refused too often from here; try another one in {REFILL_S:.0f} s")
        self._paid_s[network] = now_s + debt_s + REFILL_S
        self._paid_s.move_to_end(network)
        if len(self._paid_s) > MAX_SOURCES:
            self._paid_s.popitem(last=False)


def _network(source: str) -> str:
    """Return what stands for one customer: an IPv4 address, or 64 bits of an IPv6 address (RFC 6177)."""
    try:
        address = ipaddress.ip_address(source)
    except ValueError:
        return source
    if address.version == 4:
        return source
    return str(ipaddress.ip_network((int(address) >> 64 << 64, 64)))
