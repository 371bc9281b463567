"""That a controller's state was brought back from a backup, and what follows until an operator has looked.

Agents may run what this database never heard of. So nothing is pushed that changes what an agent runs before an
operator confirms; no time-out does that for him, because time does not tell which side is right.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime

from controller.fleet.model import Agent
from core.ids import AgentId


@dataclass(frozen=True, slots=True)
class Restoration:
    restored_at: datetime
    # When the backup was made: what happened between then and the restore is not known here.
    backup_at: datetime
    # Above all that was ever given: what an agent was told meanwhile counts less than anything we say from now on.
    epoch: int
    confirmed_at: datetime | None = None

    @property
    def is_open(self) -> bool:
        return self.confirmed_at is None


@dataclass(frozen=True, slots=True)
class Drift:
    """What a restored controller finds: agents that are beyond it, and agents that were not heard of since."""

    restoration: Restoration | None
    ahead: tuple[Agent, ...]
    unheard: tuple[AgentId, ...]


def drift_of(restoration: Restoration | None, agents: Sequence[Agent]) -> Drift:
    """Return it; without a restoration there may still be agents that are ahead: somebody swapped the files."""
    ahead = tuple(agent for agent in agents if agent.is_ahead)
    if restoration is None:
        return Drift(None, ahead, ())
    unheard = tuple(agent.agent_id for agent in agents if agent.last_seen_at < restoration.restored_at)
    return Drift(restoration, ahead, unheard)
