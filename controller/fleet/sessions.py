"""The live streams: at most one per agent, each with an outbox that holds only the newest desired state.

State is level-triggered, so a peer that reads slowly never makes a queue grow: what it has not read yet is replaced by
what is true now. All of this runs on the event loop; nothing here waits for a database.
"""

import asyncio
import logging
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

from controller.fleet.boots import BootHistory
from core.clock import Clock
from core.digest import Digest
from core.errors import NanofleetError, Overloaded, Quarantined
from core.fleet_state import NOWHERE, AgentHello, DesiredState
from core.ids import AgentId
from core.samples import SampleOrder

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Left:
    """The agent closed its stream."""


@dataclass(frozen=True, slots=True)
class Replaced:
    """A newer stream of the same agent id took over."""


@dataclass(frozen=True, slots=True)
class Stopping:
    """The controller stops."""


@dataclass(frozen=True, slots=True)
class Faulty:
    """The agent sent or did something that the stream does not survive."""

    error: NanofleetError


@dataclass(frozen=True, slots=True)
class Expelled:
    """The agent's identity does not count any more: it was banned, or its name was given to another key."""

    reason: str


@dataclass(frozen=True, slots=True)
class Permitted:
    """A person's word that a metered agent may fetch whole chunks of a variant."""

    manifest_digest: Digest


# What a stream carries once, beside the newest desired state.
Word: TypeAlias = Permitted | SampleOrder
Ended: TypeAlias = Left | Replaced | Stopping | Faulty | Expelled


class Session:
    """The outbox of one stream. One task takes from it, anybody may offer or end."""

    def __init__(self, hello: AgentHello) -> None:
        self.agent_id = hello.agent_id
        self.site = hello.site
        self.boot_id = hello.boot_id
        self.trust_bundle_sha256 = hello.trust_bundle_sha256
        self._newest: DesiredState | None = None
        self._taken = NOWHERE
        self._words: list[Word] = []
        self._ended: Ended | None = None
        self._changed = asyncio.Event()

    def offer(self, desired: DesiredState) -> None:
        """Put `desired` in the outbox unless one as new was put there before; positions only grow on a stream."""
        newest = self._taken if self._newest is None else self._newest.position
        if desired.position > newest:
            self._newest = desired
            self._changed.set()

    def reissue(self, desired: DesiredState) -> None:
        """Put `desired` in the outbox, also when it was taken before: it goes out signed anew. Never an older one."""
        newest = self._taken if self._newest is None else self._newest.position
        if desired.position >= newest:
            self._newest = desired
            self._changed.set()

    def permit(self, permitted: Permitted) -> None:
        self._say(permitted)

    def order(self, order: SampleOrder) -> None:
        self._say(order)

    def end(self, ended: Ended) -> None:
        """End the stream; the first reason stays."""
        if self._ended is None:
            self._ended = ended
            self._changed.set()

    async def take(self) -> DesiredState | Word | Ended:
        """Wait for the newest state not yet taken, for a word, or for the end."""
        await self._changed.wait()
        if self._ended is not None:
            return self._ended
        if (desired := self._newest) is not None:
            self._newest, self._taken = None, desired.position
        taken = desired or self._words.pop(0)
        if not self._words:
            self._changed.clear()
        return taken

    def _say(self, word: Word) -> None:
        if word not in self._words:
            self._words.append(word)
            self._changed.set()


class Sessions:
    """Every live session by its agent."""

    def __init__(self, *, max_sessions: int, clock: Clock) -> None:
        self._max_sessions = max_sessions
        self._clock = clock
        self._live: dict[AgentId, Session] = {}
        self._boots = BootHistory(max_agents=2 * max_sessions)
        # Told when two machines were found to use one agent id.
        self.on_split: Callable[[AgentId], None] | None = None

    def __len__(self) -> int:
        return len(self._live)

    def __contains__(self, agent_id: AgentId) -> bool:
        return agent_id in self._live

    def is_present(self, session: Session) -> bool:
        """Say whether `session` is still the one of its agent."""
        return self._live.get(session.agent_id) is session

    def sites(self) -> Counter[str]:
        """Return how many are live at each site."""
        return Counter(str(session.site) for session in self._live.values())

    def agent_ids(self) -> list[AgentId]:
        return list(self._live)

    def open(self, hello: AgentHello) -> Session:
        """Return the new session of an agent; one it still has is ended.

        The newer stream wins: usually it is the same agent, whose old stream is dead but not yet noticed. Two machines
        with one identity are told apart by their boot ids, see `BootHistory`; neither of them gets a session.

        Raises:
            Overloaded: `max_sessions` others are live.
            Quarantined: another machine lives under the same agent id.
        """
        old = self._live.get(hello.agent_id)
        if old is None and len(self._live) >= self._max_sessions:
            raise Overloaded(f"expected at most {self._max_sessions} sessions, all are taken; try again later")
        self._require_single(hello, old)
        session = Session(hello)
        self._live[hello.agent_id] = session
        if old is not None:
            _log.warning(
                "session replaced by a newer one of the same agent id",
                extra={"agent": hello.agent_id, "is_same_boot": old.boot_id == hello.boot_id},
            )
            old.end(Replaced())
        return session

    def _require_single(self, hello: AgentHello, old: Session | None) -> None:
        was_known = self._boots.is_split(hello.agent_id)
        if self._boots.is_single(hello.agent_id, hello.boot_id, now_s=self._clock.monotonic_s()):
            return
        duplicate = Quarantined(
            f"agent id {hello.agent_id}: two machines use it at the same time, so neither is served; "
            "stop one of them, ban the name and enrol both anew"
        )
        level = logging.DEBUG if was_known else logging.ERROR
        _log.log(level, "two machines use one agent id, both are refused", extra={"agent": hello.agent_id})
        if self.on_split is not None and not was_known:
            self.on_split(hello.agent_id)
        if old is not None:
            old.end(Faulty(duplicate))
        raise duplicate

    def close(self, session: Session) -> bool:
        """Forget a session; return whether it was the agent's present one."""
        if is_present := self.is_present(session):
            del self._live[session.agent_id]
        return is_present

    def offer(self, desired: DesiredState) -> None:
        """Push to the agent that `desired` is for, if it is here."""
        if (session := self._live.get(desired.agent_id)) is not None:
            session.offer(desired)

    def permit(self, agent_id: AgentId, permitted: Permitted) -> None:
        """Tell an agent, if it is here."""
        if (session := self._live.get(agent_id)) is not None:
            session.permit(permitted)

    def order(self, agent_id: AgentId, order: SampleOrder) -> None:
        """Tell an agent, if it is here."""
        if (session := self._live.get(agent_id)) is not None:
            session.order(order)

    def end(self, agent_id: AgentId, ended: Ended) -> None:
        """End the session of an agent, if it is here."""
        if (session := self._live.get(agent_id)) is not None:
            session.end(ended)

    def forget_boots(self, agent_id: AgentId) -> None:
        """Start anew with an agent id that was given to another machine."""
        self._boots.forget(agent_id)

    def reissue(self, desired: DesiredState) -> None:
        """Push to the agent that `desired` is for, if it is here, although it may have it already."""
        if (session := self._live.get(desired.agent_id)) is not None:
            session.reissue(desired)

    def end_all(self, ended: Ended) -> None:
        for session in self._live.values():
            session.end(ended)
