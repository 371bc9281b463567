"""What agents said on their streams and the database does not know yet: the newest word of each, never a queue.

Two thousand agents that report progress ten times a second become one entry each here and one transaction per flush.
Nothing is lost by a crash in between: an agent says it all again on its next session.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from datetime import datetime

from controller.fleet.model import Agent
from core.fleet_state import NOWHERE, Position, Problem, PushResult, ReportedState
from core.ids import AgentId


@dataclass(frozen=True, slots=True)
class Heard:
    """The newest word of one agent."""

    seen_at: datetime
    reported: ReportedState | None = None
    result: PushResult | None = None

    def followed_by(self, later: "Heard") -> "Heard":
        return Heard(later.seen_at, later.reported or self.reported, later.result or self.result)


def apply_heard(agent: Agent, heard: Heard) -> Agent:
    """Return the agent as it is after `heard`."""
    reported = heard.reported or agent.reported
    # A report and a result may overtake each other; within a session the applied position only grows, and not beyond
    # what was ever given: that would be a claim, not a fact.
    ceiling = max(agent.reported.applied, agent.desired.position)
    applied = max(agent.reported.applied, reported.applied, _applied_by(heard.result))
    return replace(
        agent,
        last_seen_at=max(agent.last_seen_at, heard.seen_at),
        reported=replace(reported, applied=min(applied, ceiling)),
        rejection=_rejection(agent, heard.result),
    )


def _applied_by(result: PushResult | None) -> Position:
    return result.position if result is not None and result.problem is None else NOWHERE


def _rejection(agent: Agent, result: PushResult | None) -> Problem | None:
    """Return why the present desired state is refused; a word about an overtaken one changes nothing."""
    if result is None or result.position != agent.desired.position:
        return agent.rejection
    return result.problem


class HeardBuffer:
    """The newest word of each agent, waiting to be stored."""

    def __init__(self) -> None:
        self._waiting: dict[AgentId, Heard] = {}
        self._being_stored: dict[AgentId, Heard] = {}

    def add(self, agent_id: AgentId, heard: Heard) -> None:
        earlier = self._waiting.get(agent_id)
        self._waiting[agent_id] = heard if earlier is None else earlier.followed_by(heard)

    def forget(self, agent_id: AgentId) -> None:
        """Drop what a new hello of the agent has made untrue."""
        self._waiting.pop(agent_id, None)
        self._being_stored.pop(agent_id, None)

    def of(self, agent_id: AgentId) -> list[Heard]:
        """Return what the database may not show yet, oldest first."""
        found = (words.get(agent_id) for words in (self._being_stored, self._waiting))
        return [heard for heard in found if heard is not None]

    def start_storing(self) -> Mapping[AgentId, Heard]:
        """Hand out everything; it stays visible through `of` until `stored` or `not_stored`. One at a time."""
        self._being_stored, self._waiting = self._waiting, {}
        return dict(self._being_stored)

    def stored(self) -> None:
        self._being_stored = {}

    def not_stored(self) -> None:
        """Take everything back, below what came meanwhile."""
        for agent_id, heard in self._being_stored.items():
            later = self._waiting.get(agent_id)
            self._waiting[agent_id] = heard if later is None else heard.followed_by(later)
        self._being_stored = {}
