"""Which boots of an agent were heard of: how a cloned disk is told from a restart.

A boot id is new at every start of an agent. When boot B follows boot A, that is a restart or a second machine. When A
then comes back, it is a second machine: nobody returns to a boot that is over. From then on neither is served until
only one of them has been heard of for QUIET_S, so that stopping one of the two is all that an operator has to do.
"""

from collections import OrderedDict

from core.ids import AgentId

# Chosen: five times the longest pause between two attempts of an agent to connect (120 s).
QUIET_S = 600.0
# Chosen: of an agent that restarts all the time the oldest boots are forgotten first.
MAX_BOOTS = 8


class BootHistory:
    """Of at most `max_agents` agents, when each of their last boots was heard of; the newest boot comes last."""

    def __init__(self, *, max_agents: int) -> None:
        self._max_agents = max_agents
        self._boots: OrderedDict[AgentId, dict[str, float]] = OrderedDict()
        self._split: set[AgentId] = set()

    def __len__(self) -> int:
        return len(self._boots)

    def is_single(self, agent_id: AgentId, boot_id: str, *, now_s: float) -> bool:
        """Take note of a boot; say whether it is the only machine that lives under its agent id."""
        boots = self._of(agent_id)
        is_newest = not boots or next(reversed(boots)) == boot_id
        if boot_id in boots and not is_newest and agent_id not in self._split:
            self._split.add(agent_id)
        elif agent_id in self._split and self._is_alone(boots, boot_id, now_s):
            self._split.discard(agent_id)
            boots.clear()
        boots[boot_id] = now_s
        while len(boots) > MAX_BOOTS:
            del boots[next(iter(boots))]
        return agent_id not in self._split

    def is_split(self, agent_id: AgentId) -> bool:
        """Say whether two machines are known to live under an agent id."""
        return agent_id in self._split

    def forget(self, agent_id: AgentId) -> None:
        self._boots.pop(agent_id, None)
        self._split.discard(agent_id)

    def _is_alone(self, boots: dict[str, float], boot_id: str, now_s: float) -> bool:
        return all(now_s - heard_s >= QUIET_S for other, heard_s in boots.items() if other != boot_id)

    def _of(self, agent_id: AgentId) -> dict[str, float]:
        boots = self._boots.setdefault(agent_id, {})
        self._boots.move_to_end(agent_id)
        while len(self._boots) > self._max_agents:
            oldest, _ = self._boots.popitem(last=False)
            self._split.discard(oldest)
        return boots
