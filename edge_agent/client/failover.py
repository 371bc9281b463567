"""What to do next about one request: send it to an agent, wait, or give up; decided in virtual time.

An agent that refuses, goes away or stays silent longer than its share of the time is followed by the next one, under
the same correlation. All that were asked may still answer: the first answer counts. So one request may run on two
agents when the first was merely slow, and never twice on one: an agent knows a repeated correlation.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum

from edge_agent.client.ranking import ANY_AGENT, Sight, patience_s

# Chosen: bounds what one request costs a site whose agents are all at their limit.
MAX_SENT = 6


@dataclass(frozen=True, slots=True)
class Send:
    agent: str
    # The agent may have it already, and must be able to tell.
    is_repeat: bool = False


@dataclass(frozen=True, slots=True)
class Wait:
    until_s: float


class GiveUp:
    """Nobody is left to ask, and nobody that was asked may still answer; or the time is over."""


Step = Send | Wait | GiveUp


class _State(Enum):
    AWAITED = "awaited"
    REFUSED = "refused"
    GONE = "gone"


@dataclass(slots=True)
class _Asked:
    state: _State
    # Until then no other is asked for its silence.
    patient_until_s: float
    # Lost its connection, or we ours: what we sent may not have arrived.
    is_to_repeat: bool = False
    # Refused until then.
    free_from_s: float = 0.0
    # Nobody else was there to ask, so it was given all the time.
    is_alone: bool = False


class Attempts:
    """Of one request."""

    def __init__(self, *, ends_s: float) -> None:
        self._ends_s = ends_s
        self._asked: dict[str, _Asked] = {}
        self._sent = 0
        # An answer is there, though a better one may follow: nobody else need be asked for silence.
        self._is_answered = False

    @property
    def awaited(self) -> list[str]:
        """The agents that may still answer."""
        return [agent for agent, asked in self._asked.items() if asked.state is _State.AWAITED]

    def next_step(self, candidates: Sequence[Sight], *, now_s: float) -> Step:
        """Return what to do now; `candidates` in the order of `ranking.ranked`. A Send is taken as done."""
        if now_s >= self._ends_s:
            return GiveUp()
        self._share_with_newcomers(candidates, now_s)
        repeat = self._repeated(candidates, now_s)
        if repeat is not None:
            return repeat
        patient_until_s = self._patient_until_s(now_s)
        if patient_until_s > now_s:
            return Wait(patient_until_s)
        return self._another(candidates, now_s)

    def refused(self, agent: str, *, until_s: float) -> None:
        """`agent` does not take the request before `until_s`, which may be infinite."""
        self._leave(agent, _State.REFUSED, free_from_s=until_s)

    def gone(self, agent: str) -> None:
        self._leave(agent, _State.GONE)

    def born(self, agent: str) -> None:
        """`agent` has a new connection: what it was sent over the last one may be lost."""
        asked = self._asked.get(agent)
        if asked is not None and asked.state is _State.AWAITED:
            asked.is_to_repeat = True
        if ANY_AGENT in self._asked:
            # Nobody was known then; whom we know is asked without waiting for a stranger.
            self._asked[ANY_AGENT].patient_until_s = 0.0

    def reconnected(self) -> None:
        """This device has a new connection: whatever was under way, either way, may be lost."""
        for asked in self._asked.values():
            asked.is_to_repeat = asked.state is _State.AWAITED

    def answered_provisionally(self) -> None:
        self._is_answered = True

    def overdue(self, *, now_s: float) -> list[str]:
        """Return the agents whose silence has lasted longer than their share of the time."""
        return [
            agent
            for agent, asked in self._asked.items()
            if asked.state is _State.AWAITED and asked.patient_until_s <= now_s
        ]

    def _leave(self, agent: str, state: _State, *, free_from_s: float = 0.0) -> None:
        asked = self._asked.get(agent)
        if asked is not None:
            asked.state = state
            asked.is_to_repeat = False
            asked.free_from_s = free_from_s

    def _share_with_newcomers(self, candidates: Sequence[Sight], now_s: float) -> None:
        for sight in candidates:
            asked = self._asked.get(sight.agent)
            if asked is not None and asked.is_alone and self._others(sight, candidates):
                asked.is_alone = False
                patient_until_s = now_s + self._patience_s(sight, candidates, now_s)
                asked.patient_until_s = min(asked.patient_until_s, patient_until_s)

    def _repeated(self, candidates: Sequence[Sight], now_s: float) -> Send | None:
        for agent, asked in self._asked.items():
            if asked.is_to_repeat:
                asked.is_to_repeat = False
                sight = next((each for each in candidates if each.agent == agent), Sight(agent))
                asked.patient_until_s = now_s + self._patience_s(sight, candidates, now_s)
                return Send(agent, is_repeat=True)
        return None

    def _patient_until_s(self, now_s: float) -> float:
        if self._is_answered and self.awaited:
            return self._ends_s
        waits = [asked.patient_until_s for asked in self._asked.values() if asked.state is _State.AWAITED]
        return min(max(waits, default=now_s), self._ends_s)

    def _another(self, candidates: Sequence[Sight], now_s: float) -> Step:
        possible = [sight for sight in candidates if self._may_be_asked(sight)] if self._sent < MAX_SENT else []
        free = [sight for sight in possible if self._free_from_s(sight) <= now_s]
        if free:
            return self._send(free[0], candidates, now_s)
        freed_s = min((self._free_from_s(sight) for sight in possible), default=self._ends_s)
        if freed_s < self._ends_s or self.awaited:
            return Wait(min(freed_s, self._ends_s))
        # All ask to be left alone for longer than we can wait. Those that did not say it to this request may have room.
        fresh = [sight for sight in possible if sight.agent not in self._asked]
        return self._send(fresh[0], candidates, now_s) if fresh else GiveUp()

    def _may_be_asked(self, sight: Sight) -> bool:
        """Say whether a candidate is none of those that are waited for; one that was gone is back, since it is one."""
        asked = self._asked.get(sight.agent)
        return asked is None or asked.state is not _State.AWAITED

    def _free_from_s(self, sight: Sight) -> float:
        asked = self._asked.get(sight.agent)
        return sight.free_from_s if asked is None else max(sight.free_from_s, asked.free_from_s)

    def _send(self, sight: Sight, candidates: Sequence[Sight], now_s: float) -> Send:
        is_repeat = sight.agent in self._asked
        patient_until_s = now_s + self._patience_s(sight, candidates, now_s)
        is_alone = not self._others(sight, candidates)
        self._asked[sight.agent] = _Asked(_State.AWAITED, patient_until_s, is_alone=is_alone)
        self._sent += 1
        return Send(sight.agent, is_repeat)

    def _patience_s(self, sight: Sight, candidates: Sequence[Sight], now_s: float) -> float:
        others = self._others(sight, candidates)
        return patience_s(sight, left_s=self._ends_s - now_s, others=others)

    def _others(self, sight: Sight, candidates: Sequence[Sight]) -> int:
        return sum(each.agent != sight.agent and each.agent not in self._asked for each in candidates)
