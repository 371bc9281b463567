"""The agents of a site, by their retained status messages.

Each connection of an agent has an epoch that is greater than all before it; it stands in the birth message and in the
Will. A Will that comes late, after the agent is back, has a smaller epoch and is no news. An agent whose clock was set
back begins with a smaller epoch too: what says that it lives, and is not retained, is believed whatever its epoch.

What agents say is bounded here: so many agents, models and bytes are taken, and no more.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

# Chosen: above any site. A broker without an access list lets anybody claim to be an agent.
MAX_AGENTS = 256
MAX_MODELS = 1024
MAX_STATUS_BYTES = 256 << 10
_MAX_NAME_CHARS = 64


class News(Enum):
    """What a status message changed."""

    NOTHING = "nothing"
    # Another connection than before: what the agent had not answered may be lost.
    BORN = "born"
    # The same connection, with other models or another load.
    CHANGED = "changed"
    GONE = "gone"


@dataclass(frozen=True, slots=True)
class AgentStatus:
    """The last word of one agent."""

    epoch: int
    is_online: bool
    # By name: whether the model is in memory, so that its first answer is as quick as the next.
    models: Mapping[str, bool] = field(default_factory=dict)
    # How many more requests it takes now; None: it does not say.
    room: int | None = None


class Directory:
    """Not safe for several threads: its owner locks."""

    def __init__(self) -> None:
        self._agents: dict[str, AgentStatus] = {}

    def hear(self, agent: str, payload: bytes, *, is_retained: bool = False) -> News:
        """Take one status message; what is malformed, old or too much is no news."""
        if len(payload) > MAX_STATUS_BYTES or len(agent) > _MAX_NAME_CHARS:
            return News.NOTHING
        if not payload:
            # A retained message is taken away with an empty one.
            return News.GONE if self._agents.pop(agent, None) else News.NOTHING
        status = _parsed(payload)
        known = self._agents.get(agent)
        if status is None or (known is None and not self._has_room()):
            return News.NOTHING
        if known is not None and _is_old(status, known, is_retained=is_retained):
            return News.NOTHING
        self._agents[agent] = status
        return _news(status, known)

    def __contains__(self, agent: str) -> bool:
        return agent in self._agents

    def _has_room(self) -> bool:
        """Say whether one more agent may be known, after the first that is away made room for it."""
        if len(self._agents) < MAX_AGENTS:
            return True
        away = next((agent for agent, status in self._agents.items() if not status.is_online), None)
        if away is not None:
            del self._agents[away]
        return away is not None

    def online(self) -> Mapping[str, AgentStatus]:
        return {agent: status for agent, status in self._agents.items() if status.is_online}


def room_of(load: object) -> int | None:
    """Return the `room` of a load, as status messages and replies to probes have it; None: it does not say."""
    room = load.get("room") if isinstance(load, dict) else None
    return room if isinstance(room, int) else None


def _is_old(status: AgentStatus, known: AgentStatus, *, is_retained: bool) -> bool:
    if status.epoch == known.epoch:
        # After the goodbye or the Will nothing of that connection counts any more.
        return not known.is_online
    return status.epoch < known.epoch and (is_retained or not status.is_online)


def _news(status: AgentStatus, known: AgentStatus | None) -> News:
    if not status.is_online:
        return News.GONE if known is not None and known.is_online else News.NOTHING
    if known is None or not known.is_online or status.epoch != known.epoch:
        return News.BORN
    return News.NOTHING if status == known else News.CHANGED


def _parsed(payload: bytes) -> AgentStatus | None:
    try:
        document = json.loads(payload)
    except (ValueError, RecursionError):
        return None
    if not isinstance(document, dict) or not isinstance(document.get("epoch"), int):
        return None
    is_online = document.get("state") == "online"
    return AgentStatus(document["epoch"], is_online, _models(document.get("models")), room_of(document.get("load")))


def _models(entries: Any) -> Mapping[str, bool]:
    if not isinstance(entries, list):
        return {}
    return {
        entry["name"]: entry.get("resident") is not False
        for entry in entries[:MAX_MODELS]
        if isinstance(entry, dict) and isinstance(entry.get("name"), str)
    }
