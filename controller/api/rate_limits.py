"""How often somebody may call: token buckets, one for all and one per peer address.

An address is a whole IPv6 /64, which one subscriber has; for IPv4 it is the address itself, which a site may share, so
its share is chosen for a site. Memory is bounded: the address that was quiet longest is forgotten first, which gives it
no more than a full bucket.
"""

import ipaddress
from collections import OrderedDict
from urllib.parse import unquote

from core.errors import Overloaded
from core.token_bucket import Rate, TokenBucket

MAX_ADDRESSES = 4096
_IPV6_PREFIX = 64


class RateLimiter:
    """One kind of call; what is refused for its address takes nothing from the others."""

    def __init__(self, *, overall: Rate, per_address: Rate, now_s: float) -> None:
        self._overall = TokenBucket(overall, now_s=now_s)
        self._per_address = per_address
        self._addresses: OrderedDict[str, TokenBucket] = OrderedDict()

    def __len__(self) -> int:
        return len(self._addresses)

    def take(self, peer: str, *, now_s: float) -> None:
        """Count one call of a gRPC peer such as `ipv4:192.0.2.1:5000`.

        Raises:
            Overloaded: its address, or all together, call too often.
        """
        if not (self._bucket(network_of(peer), now_s).take(now_s) and self._overall.take(now_s)):
            raise Overloaded("too many calls; try again later, with backoff")

    def _bucket(self, network: str, now_s: float) -> TokenBucket:
        bucket = self._addresses.get(network)
        if bucket is None:
            bucket = self._addresses[network] = TokenBucket(self._per_address, now_s=now_s)
        self._addresses.move_to_end(network)
        if len(self._addresses) > MAX_ADDRESSES:
            self._addresses.popitem(last=False)
        return bucket


def network_of(peer: str) -> str:
    """Return what stands for whoever calls: the IPv4 address, the IPv6 /64, or the peer as it is."""
    host = unquote(peer).partition(":")[2].rpartition(":")[0].strip("[]").partition("%")[0]
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return peer
    if isinstance(address, ipaddress.IPv6Address):
        mapped = address.ipv4_mapped
        if mapped is None:
            return str(ipaddress.ip_network((address, _IPV6_PREFIX), strict=False))
        address = mapped
    return str(address)
