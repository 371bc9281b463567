"""What the broker of a site calls its peers: the common name of their certificates, which it takes as the user name.

    an agent    agent:{agent}
    a device    {device}@{site}

The broker's access list names agents one by one and devices by a pattern, so the two must never be confused: neither
`:` nor `@` may stand in a name of `core.ids`. A device's name holds its site, because only agents' names are unique in
the fleet: the one of another site is another client.
"""

import re

from core.ids import NAME_PATTERN, AgentId, ClientId, SiteId

# X.520, ub-common-name: what a certificate has room for.
MAX_USERNAME_CHARS = 64
_CLIENT = re.compile(f"{NAME_PATTERN.pattern}(?:@{NAME_PATTERN.pattern})?")


def agent_username(agent: AgentId) -> str:
    return f"agent:{agent}"


def device_username(device: str, site: SiteId) -> ClientId:
    """Return what stands in a device's topics in the place of `{client}`."""
    return ClientId(f"{device}@{site}")


def is_client_name(text: str) -> bool:
    """Say whether `text` may stand in a topic in the place of `{client}`: a name, alone or at a site."""
    return _CLIENT.fullmatch(text) is not None
