"""What passes between agents and whoever pulls hard examples, on the streams that are there anyway.

What agents say that they keep is not stored: each says it again with its next session.
"""

from collections.abc import Callable, Mapping, Sequence

from controller.fleet.sessions import Session, Sessions
from core.ids import AgentId
from core.samples import SampleCounts, SampleOrder

OrderSource = Callable[[AgentId], Sequence[SampleOrder]]


class SampleDesk:
    def __init__(self, sessions: Sessions, *, max_agents: int) -> None:
        self._sessions = sessions
        self._max_agents = max_agents
        self._counts: dict[AgentId, SampleCounts] = {}
        self._orders_of: OrderSource = lambda _: ()

    def orders_from(self, source: OrderSource) -> None:
        """Ask `source` at the start of every session what its agent shall deliver."""
        self._orders_of = source

    def send(self, agent_id: AgentId, order: SampleOrder) -> None:
        """Tell an agent, if it is here."""
        self._sessions.order(agent_id, order)

    def greet(self, session: Session) -> None:
        """Tell an agent that has come what it shall deliver."""
        for order in self._orders_of(session.agent_id):
            session.order(order)

    def heard(self, session: Session, counts: SampleCounts) -> None:
        """Take note of what an agent keeps; beyond the bound the one that spoke longest ago is forgotten."""
        if not self._sessions.is_present(session):
            return
        self._counts.pop(session.agent_id, None)
        self._counts[session.agent_id] = counts
        if len(self._counts) > self._max_agents:
            del self._counts[next(iter(self._counts))]

    def counts(self) -> Mapping[AgentId, SampleCounts]:
        """Return what each agent last said."""
        return self._counts

    def forget(self, agent_id: AgentId) -> None:
        self._counts.pop(agent_id, None)
