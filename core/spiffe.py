"""Who a peer is, as its certificate says: `spiffe://<trust domain>/<role>/<name>` (SPIFFE-ID 1.0, section 2).

The trust domain is the fleet's. One certificate names one role; what a role may call stands in one table
(`controller.api.policy`).
"""

import re
from dataclasses import dataclass
from enum import StrEnum

from core.errors import Untrusted
from core.ids import checked_name

# DNS names in certificates, in a domain that nobody resolves: who dials an address asks for the name of whom it means.
# Brokers have the names of their machines instead.
INTERNAL_DNS_DOMAIN = "nanofleet.internal"
CONTROLLER_DNS_NAME = f"controller.{INTERNAL_DNS_DOMAIN}"
_AGENTS_DNS_DOMAIN = f"agents.{INTERNAL_DNS_DOMAIN}"
# RFC 1123, section 2.1. Lower case only: DNS names that differ in case are one.
_DNS_LABEL = re.compile(r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?")
# SPIFFE-ID 1.0, section 2.1: lower-case letters, digits, dots, dashes, underscores; at most 255 bytes.
_PATTERN = re.compile(r"spiffe://([a-z0-9._-]{1,255})/([a-z]{1,32})/([^/]{1,64})")


class Role(StrEnum):
    AGENT = "agent"
    # A replica of the heavy tier.
    HEAVY = "heavy"
    # A program that asks the gateway or sends spans: an application, a device's gateway.
    APPLICATION = "application"
    # A sensor or camera at the broker of its site; it may call nothing of ours.
    DEVICE = "device"
    # The MQTT broker of a site, which agents and devices dial by the name of its machine.
    BROKER = "broker"
    CONTROLLER = "controller"


@dataclass(frozen=True, slots=True)
class Peer:
    domain: str
    role: Role
    name: str

    def __str__(self) -> str:
        return f"spiffe://{self.domain}/{self.role}/{self.name}"


def agent_dns_name(agent_id: str) -> str | None:
    """Return the name that clients of an agent's own faces ask for; None: its id is no label of a DNS name."""
    return f"{agent_id}.{_AGENTS_DNS_DOMAIN}" if _DNS_LABEL.fullmatch(agent_id) else None


def parse_spiffe(uri: str) -> Peer:
    """Return who `uri` names.

    Raises:
        Untrusted: it is no SPIFFE id of ours.
        InvalidName: the name is not well formed.
    """
    match = _PATTERN.fullmatch(uri)
    if match is None or match[2] not in set(Role):
        raise Untrusted(f"certificate: expected spiffe://<domain>/<role>/<name>, got {uri[:120]!r}")
    return Peer(match[1], Role(match[2]), checked_name(match[3], kind="certificate"))
