"""What one device knows of the agents of its site: who is there, how far away, how busy, and who let it down.

Time comes in as an argument. Not safe for several threads: its owner locks.
"""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, field

from edge_agent.client.directory import MAX_AGENTS, AgentStatus, Directory, News
from edge_agent.client.measurements import RoundTrips
from edge_agent.client.ranking import ANY_AGENT, Sight, ranked

# How long a silent agent is asked last; doubled with every further silence. Chosen: a restart, and a short outage.
_SILENCE_BASE_S = 1.0
_SILENCE_CAP_S = 30.0
# Whatever an agent asks for, it is looked at again after this; chosen.
_MAX_PENALTY_S = 60.0
# All devices that were refused at once must not come back at once: up to a half is added.
_PENALTY_JITTER = 0.5


@dataclass(slots=True)
class _Known:
    """What is known of an agent beyond its own words; kept while it is away."""

    round_trips: RoundTrips = field(default_factory=RoundTrips)
    silences: int = 0
    silent_until_s: float = 0.0
    free_from_s: float = 0.0
    # Newer than what its status says; None: no probe has told.
    room: int | None = None


class Survey:
    """`client_id` gives this device an order of its own among agents that nothing tells apart."""

    def __init__(self, client_id: str, *, uniform: Callable[[], float]) -> None:
        self._client_id = client_id
        self._uniform = uniform
        self._directory = Directory()
        self._known: dict[str, _Known] = {}
        # By model: who was asked last.
        self._current: dict[str, str] = {}

    def hear(self, agent: str, payload: bytes, *, is_retained: bool) -> News:
        """Take a status message; return what it changed."""
        news = self._directory.hear(agent, payload, is_retained=is_retained)
        if news is News.BORN:
            known = self._of(agent)
            known.silences, known.silent_until_s, known.free_from_s = 0, 0.0, 0.0
        if news is not News.NOTHING:
            self._of(agent).room = None
            self._forget_strangers()
        return news

    def candidates(self, model: str, *, now_s: float) -> list[Sight]:
        """Return who is to be asked about `model`, in order; `any` where no agent is known to have it."""
        sights = [
            self._sight(agent, status, model, now_s)
            for agent, status in self._directory.online().items()
            if model in status.models
        ]
        if not sights:
            return [Sight(ANY_AGENT)]
        return ranked(sights, current=self._current.get(model), spread=self._spread, now_s=now_s)

    def online(self) -> list[str]:
        return list(self._directory.online())

    def model_of(self, agent: str) -> str | None:
        """Return a model of an agent that is there; None: it has none, or is away."""
        status = self._directory.online().get(agent)
        return None if status is None else next(iter(status.models), None)

    def chose(self, model: str, agent: str) -> None:
        self._current[model] = agent

    def answered(self, agent: str, round_trip_s: float | None, *, now_s: float) -> None:
        """`agent` answered; None: nobody can tell to which of several messages."""
        known = self._alive(agent)
        if known is not None and round_trip_s is not None:
            known.round_trips.note_answer(round_trip_s, now_s=now_s)

    def probed(self, agent: str, round_trip_s: float, *, room: int | None) -> None:
        known = self._alive(agent)
        if known is not None:
            known.round_trips.note_probe(round_trip_s)
            known.room = room

    def refused(self, agent: str, *, for_s: float, now_s: float) -> float:
        """`agent` wants to be left alone for a while; return until when it is."""
        free_from_s = now_s + min(for_s, _MAX_PENALTY_S) * (1 + _PENALTY_JITTER * self._uniform())
        known = self._alive(agent)
        if known is not None:
            known.free_from_s = free_from_s
        return free_from_s

    def silent(self, agent: str, *, now_s: float) -> None:
        """`agent` did not answer for longer than it may take: it is asked last for a while."""
        known = self._known.get(agent)
        if known is not None and known.silent_until_s <= now_s:
            lasts_s = min(_SILENCE_BASE_S * 2.0 ** min(known.silences, 16), _SILENCE_CAP_S)
            known.silent_until_s = now_s + lasts_s
            known.silences += 1

    def _alive(self, agent: str) -> _Known | None:
        """Return an agent that has just said something, if it is one of those that a status named."""
        known = self._known.get(agent)
        if known is not None:
            known.silences, known.silent_until_s = 0, 0.0
        return known

    def _forget_strangers(self) -> None:
        """Keep only what is known of agents that the directory, which has a bound, still has."""
        if len(self._known) > MAX_AGENTS:
            self._known = {agent: known for agent, known in self._known.items() if agent in self._directory}

    def _of(self, agent: str) -> _Known:
        return self._known.setdefault(agent, _Known())

    def _sight(self, agent: str, status: AgentStatus, model: str, now_s: float) -> Sight:
        known = self._of(agent)
        room = status.room if known.room is None else known.room
        return Sight(
            agent,
            network_s=known.round_trips.network_s,
            answer_s=known.round_trips.answer_s(now_s),
            slow_s=known.round_trips.slow_s,
            has_room=room is None or room > 0,
            is_loaded=status.models[model],
            is_silent=known.silent_until_s > now_s,
            free_from_s=known.free_from_s,
        )

    def _spread(self, agent: str) -> float:
        digest = hashlib.blake2b(f"{self._client_id}/{agent}".encode(), digest_size=8).digest()
        return int.from_bytes(digest, "big") / 2.0**64
