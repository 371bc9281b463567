"""A device that verifies: its trust folder, what it runs, and one model family that it may install from."""

from collections.abc import Callable, Collection, Iterator
from contextlib import AbstractContextManager, contextmanager
from datetime import datetime, timedelta
from pathlib import Path

from tuf.ngclient import FetcherInterface

from core.digest import Digest
from core.fleet_state import DesiredState, Position, SignedAssignment
from core.ids import AgentId
from edge_agent.trust.admission import ROOT, admit
from edge_agent.trust.question import Answer, Question
from tests.support.catalogue_side import CatalogueSide, released
from tests.support.variants import MadeVariant, made_variant

AGENT = AgentId("gate-1")


class TrustingDevice:
    """Asks in this process what the child would be asked."""

    def __init__(self, folder: Path, side: CatalogueSide) -> None:
        self.folder = folder
        self.side = side
        folder.mkdir(parents=True, exist_ok=True)
        (folder / ROOT).write_bytes(side.anchor)

    def admits(
        self,
        signed: SignedAssignment,
        *,
        running: Collection[Digest] = (),
        after: timedelta = timedelta(),
        live: FetcherInterface | None = None,
    ) -> Answer:
        question = Question(self.folder, AGENT, signed, frozenset(running))
        return admit(question, now=self.side.now + after, live=None if live is None else opened(live))

    def admits_served(self, signed: SignedAssignment, *, after: timedelta = timedelta()) -> Answer:
        """Ask with what rides along at hand and, when that does not do, every file as the server has it now."""
        return self.admits(signed, after=after, live=self.side)


def opened(fetcher: FetcherInterface) -> Callable[[], AbstractContextManager[FetcherInterface]]:
    @contextmanager
    def open_it() -> Iterator[FetcherInterface]:
        yield fetcher

    return open_it


def release_of(version: int = 1, *, model: str = "digits", counter: int | None = None, **fields: object) -> MadeVariant:
    made = made_variant(model=model, version=version)
    return released(made, release_counter=counter or version, **fields)


def desired_of(*made: MadeVariant, now: datetime, generation: int = 1, agent: AgentId = AGENT) -> DesiredState:
    slots = tuple(variant.slot for variant in made)
    return DesiredState(agent, Position(1, generation), now, slots, now + timedelta(days=1))


def asks_for(side: CatalogueSide, *made: MadeVariant, generation: int = 1) -> SignedAssignment:
    return side.assignment(desired_of(*made, now=side.now, generation=generation))


ROLES = ["timestamp", "snapshot", "targets", "family-digits"]


def name_of(side: CatalogueSide, role: str) -> str:
    if role == "timestamp":
        return "timestamp.json"
    version = side.snapshot.version if role == "snapshot" else side.snapshot.meta[f"{role}.json"].version
    return f"{version}.{role}.json"
