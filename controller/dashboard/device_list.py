"""The fleet as the dashboard shows it: a line per device, counts per site, and what somebody should look at."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Literal, get_args
from urllib.parse import urlencode

from controller.fleet.model import AgentView
from controller.identity.model import AgentIdentity
from core.errors import InvalidRequest
from core.fleet_state import SlotPhase, SlotReport
from core.ids import AgentId, SiteId

PAGE_SIZE = 50
# Certificates renew at half of their week; one with less than this left did not.
CERTIFICATE_WARNING = timedelta(days=2)

StateWord = Literal["online", "offline", "attention", "fetching", "banned"]
STATES: tuple[StateWord, ...] = get_args(StateWord)
_MOVING = frozenset({SlotPhase.FETCHING, SlotPhase.SELF_TEST, SlotPhase.LOADING})


@dataclass(frozen=True, slots=True)
class Device:
    """An agent, with what its identity says; `None` of the latter: it was never enrolled here."""

    view: AgentView
    identity: AgentIdentity | None

    @property
    def id(self) -> AgentId:
        return self.view.agent.agent_id

    @property
    def site(self) -> SiteId:
        return self.view.agent.site

    @property
    def slots(self) -> tuple[SlotReport, ...]:
        return self.view.agent.reported.slots

    @property
    def is_banned(self) -> bool:
        return self.identity is not None and self.identity.ban is not None

    @property
    def failed(self) -> tuple[SlotReport, ...]:
        return tuple(slot for slot in self.slots if slot.phase is SlotPhase.FAILED)

    @property
    def waiting(self) -> tuple[SlotReport, ...]:
        return tuple(slot for slot in self.slots if slot.phase is SlotPhase.WAITING)

    @property
    def fetching(self) -> tuple[SlotReport, ...]:
        return tuple(slot for slot in self.slots if slot.phase in _MOVING)

    @property
    def needs_attention(self) -> bool:
        return bool(self.failed or self.waiting or self.view.agent.rejection)

    @property
    def state(self) -> StateWord:
        """The one word for it, the most urgent first."""
        if self.is_banned:
            return "banned"
        if self.needs_attention:
            return "attention"
        if not self.view.is_online:
            return "offline"
        return "fetching" if self.fetching else "online"

    def matches(self, state: str) -> bool:
        match state:
            case "":
                return True
            case "online":
                return self.view.is_online
            case "offline":
                return not self.view.is_online
            case "attention":
                return self.needs_attention
            case _:
                return self.state == state


@dataclass(frozen=True, slots=True)
class SiteRow:
    name: SiteId
    devices: int
    online: int
    attention: int


@dataclass(frozen=True, slots=True)
class FleetSnapshot:
    """Every device at one moment, by name."""

    devices: tuple[Device, ...]
    sites: tuple[SiteRow, ...]
    by_state: Mapping[str, int]

    @property
    def online(self) -> int:
        return sum(site.online for site in self.sites)


def snapshot_of(views: Sequence[AgentView], identities: Iterable[AgentIdentity]) -> FleetSnapshot:
    by_agent = {identity.agent: identity for identity in identities}
    devices = tuple(Device(view, by_agent.get(view.agent.agent_id)) for view in views)
    return FleetSnapshot(devices, _sites(devices), {state: _count(devices, state) for state in STATES})


def _sites(devices: Iterable[Device]) -> tuple[SiteRow, ...]:
    of_site: dict[SiteId, list[Device]] = {}
    for device in devices:
        of_site.setdefault(device.site, []).append(device)
    return tuple(
        SiteRow(site, len(there), _count(there, "online"), _count(there, "attention"))
        for site, there in sorted(of_site.items())
    )


def _count(devices: Iterable[Device], state: str) -> int:
    return sum(device.matches(state) for device in devices)


@dataclass(frozen=True, slots=True)
class DeviceQuery:
    """What the list is asked for; empty words take all."""

    text: str = ""
    site: str = ""
    state: str = ""
    page: int = 1

    @classmethod
    def parsed(cls, *, text: str, site: str, state: str, page: int) -> "DeviceQuery":
        if state and state not in STATES:
            raise InvalidRequest(f"state: expected one of {', '.join(STATES)}, got {state[:40]!r}")
        return cls(text.strip(), site, state, page)

    def link(self, page: int) -> str:
        words = {"q": self.text, "site": self.site, "state": self.state, "page": str(page) if page > 1 else ""}
        kept = {key: word for key, word in words.items() if word}
        return f"/devices?{urlencode(kept)}" if kept else "/devices"


@dataclass(frozen=True, slots=True)
class DevicePage:
    devices: tuple[Device, ...]
    found: int
    page: int
    pages: int

    @property
    def first(self) -> int:
        return (self.page - 1) * PAGE_SIZE + 1


def page_of(snapshot: FleetSnapshot, query: DeviceQuery) -> DevicePage:
    """Return one page of the devices that match; a page beyond the last is the last."""
    found = [device for device in snapshot.devices if _is_found(device, query)]
    pages = max(1, -(-len(found) // PAGE_SIZE))
    page = min(query.page, pages)
    start = (page - 1) * PAGE_SIZE
    return DevicePage(tuple(found[start : start + PAGE_SIZE]), len(found), page, pages)


def _is_found(device: Device, query: DeviceQuery) -> bool:
    if query.site and device.site != query.site:
        return False
    if not device.matches(query.state):
        return False
    return not query.text or query.text.lower() in _searched(device)


def _searched(device: Device) -> str:
    agent = device.view.agent
    words = (agent.agent_id, agent.site, *agent.tags, *(slot.model for slot in agent.desired.slots))
    return "\n".join(words).lower()


def expiring(devices: Iterable[Device], now: datetime) -> list[Device]:
    """Return those whose certificate ends soon although they are connected and could have renewed it."""
    return [
        device
        for device in devices
        if device.identity is not None
        and not device.is_banned
        and device.view.is_online
        and device.identity.not_after - now < CERTIFICATE_WARNING
    ]
