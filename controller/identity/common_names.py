"""Which common name a certificate gets, and what an admin must say of a peer that does not enrol.

Only brokers look at common names (`core.broker_names`); whoever has no business there gets none and is refused there.
"""

from collections.abc import Sequence

from core.broker_names import MAX_USERNAME_CHARS, agent_username, device_username
from core.errors import InvalidRequest
from core.ids import AgentId, SiteId, checked_name
from core.spiffe import Role

# Chosen: a machine has a few names and addresses.
MAX_HOSTS = 16
# Who is certified by an admin's word alone.
_BY_HAND = frozenset({Role.APPLICATION, Role.BROKER, Role.DEVICE, Role.HEAVY})


def agent_common_name(agent: AgentId) -> str:
    """Return an agent's; empty when it is too long: it serves as before, and only brokers with TLS refuse it."""
    username = agent_username(agent)
    return username if len(username) <= MAX_USERNAME_CHARS else ""


def common_name_for(role: Role, name: str, *, site: SiteId | None, hosts: Sequence[str]) -> str:
    """Return that of a peer that is certified by hand; empty for all but devices.

    Raises:
        InvalidRequest: the role is not given away like this, or needs another site or other hosts.
    """
    if role not in _BY_HAND:
        raise InvalidRequest(f"role: expected one of {', '.join(sorted(_BY_HAND))}, got {role}; agents enrol")
    if (site is not None) != (role is Role.DEVICE):
        raise InvalidRequest(f"site: expected one for a device and for nobody else, got {site} for the role {role}")
    _require_hosts(role, hosts)
    return "" if site is None else _device_name(name, SiteId(checked_name(site, kind="site")))


def _require_hosts(role: Role, hosts: Sequence[str]) -> None:
    if role is not Role.BROKER and hosts:
        raise InvalidRequest(f"hosts: expected none for the role {role}, got {len(hosts)}")
    if role is Role.BROKER and not 0 < len(hosts) <= MAX_HOSTS:
        raise InvalidRequest(f"hosts: expected 1 to {MAX_HOSTS} for a broker, got {len(hosts)}")


def _device_name(name: str, site: SiteId) -> str:
    username = device_username(name, site)
    if len(username) > MAX_USERNAME_CHARS:
        raise InvalidRequest(
            f"device: expected at most {MAX_USERNAME_CHARS - 1} characters of name and site together, "
            f"got {len(username) - 1}"
        )
    return username
