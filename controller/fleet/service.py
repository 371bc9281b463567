"""`Fleet`: what the operator's API and the agents' streams may do with the fleet."""

import asyncio
import logging
from collections import Counter
from collections.abc import AsyncIterator, Collection, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace

from controller.fleet import use_cases
from controller.fleet.changes import Changes
from controller.fleet.greetings import Greetings
from controller.fleet.heard import Heard, HeardBuffer, apply_heard
from controller.fleet.model import Agent, AgentView, Deployed, Deployment, Target
from controller.fleet.ports import Catalogue, DecidedListener, DeployedListener, Releases
from controller.fleet.restoration import Drift, Restoration, drift_of
from controller.fleet.samples import SampleDesk
from controller.fleet.sessions import Expelled, Permitted, Session, Sessions, Stopping
from controller.fleet.store import FleetStore
from controller.fleet.vitals import VitalsBoard
from core.clock import Clock
from core.digest import Digest
from core.errors import Conflict, InvalidRequest, UnknownAgent, UnknownModel
from core.fleet_state import (
    NO_CATALOGUE,
    NOWHERE,
    AgentHello,
    AgentVitals,
    CatalogueVersions,
    Position,
    PushResult,
    ReportedState,
    Slot,
)
from core.ids import AgentId, ModelName, VariantName
from core.logs import peer_text

_log = logging.getLogger(__name__)

# Chosen: four transactions a second at most, however many agents report, and nobody sees the difference:
# readers of this class are shown what is not stored yet.
FLUSH_INTERVAL_S = 0.25


# Derived: a change every millisecond for 278 years. Beyond it there is room for our own counting in 64 bits.
MAX_PLAUSIBLE = 1 << 43


@dataclass(slots=True)
class PushCounts:
    """Assignments since this process began; a push that an agent is given twice counts twice."""

    sent: int = 0
    applied: int = 0
    rejected: int = 0


class Fleet:
    """Keep `run` running in a task of the owner: it stores what agents say."""

    def __init__(
        self,
        store: FleetStore,
        catalogue: Catalogue,
        *,
        releases: Releases,
        clock: Clock,
        max_sessions: int,
    ) -> None:
        self._store = store
        self._catalogue = catalogue
        self._releases = releases
        self._clock = clock
        self._sessions = Sessions(max_sessions=max_sessions, clock=clock)
        self._greetings = Greetings(store, clock=clock)
        self._heard = HeardBuffer()
        self._vitals = VitalsBoard(max_agents=2 * max_sessions, clock=clock)
        self.samples = SampleDesk(self._sessions, max_agents=2 * max_sessions)
        self._has_work = asyncio.Event()
        self._pushes_in_doubt = False
        # The last word for each model of each agent.
        self._permitted: dict[AgentId, dict[ModelName, Permitted]] = {}
        self._restoration: Restoration | None = None
        # The newest catalogue that any agent holds, as far as it said so.
        self._seen_catalogue = NO_CATALOGUE
        self._changes = Changes()
        self.pushes = PushCounts()
        self._deployed_listeners: list[DeployedListener] = []

    def on_deployed(self, listener: DeployedListener) -> None:
        """Have `listener` called with the manifest of every deployment, and those that it takes the place of."""
        self._deployed_listeners.append(listener)

    def on_decided(self, listener: DecidedListener) -> None:
        """Have `listener` called with what the fleet decides by itself: an action, its target, a short reason."""
        self._sessions.on_split = lambda agent_id: listener(
            "agent.quarantine", agent_id, "two machines use this name, neither is served"
        )

    async def prepare(self) -> None:
        """Learn whether this state came from a backup; then the fleet is only watched until that is confirmed."""
        self._restoration = await self._store.read(lambda records: records.restoration())
        if (found := self._restoration) is not None and found.is_open:
            _log.warning(
                "this state came from a backup and nobody has confirmed it: agents keep what they run, and nothing is "
                "deployed; see `nanofleet controller drift`, then run `nanofleet controller confirm-restore`",
                extra={"backup": found.backup_at.isoformat(), "epoch": found.epoch},
            )

    async def run(self) -> None:
        """Store what agents said, gathered over FLUSH_INTERVAL_S; for ever."""
        while True:
            await self._has_work.wait()
            await asyncio.sleep(FLUSH_INTERVAL_S)
            await self.flush()

    async def flush(self) -> None:
        """Store what agents said until now, in one transaction."""
        self._has_work.clear()
        words = self._heard.start_storing()
        try:
            await self._store.run(lambda records: use_cases.record_heard(records, words))
            self._heard.stored()
            await self._push_again()
        except BaseException:
            self._heard.not_stored()
            self._has_work.set()
            raise

    # ---- what operators do -----------------------------------------------------------------------------------

    async def deploy(self, target: Target, *, model: ModelName, version: int | None, variant: VariantName) -> Deployed:
        """Let every agent of `target` run a variant, and push it to those that are online; version None is the newest.

        Raises:
            UnknownModel: no such model, version or variant.
            Conflict: agents may not install it, because it is not in the signed catalogue; or an agent would have more
                models than one desired state may hold; or a restore waits to be confirmed.
        """
        self._require_confirmed()
        if self._restoration is not None:
            # What agents run decides whether they are moved.
            await self.flush()
        found = await self._catalogue.variant(model, version, variant)
        now = self._clock.now()
        slot = Slot(model, found.version, variant, found.manifest_digest)
        self._releases.require_released(slot)
        deployment = Deployment(target, slot, now)
        try:
            deployed = await self._store.run(lambda records: use_cases.deploy(records, deployment, now=now))
        except asyncio.CancelledError:
            # Our caller left, the transaction goes on: `run` pushes what it decides.
            self._pushes_in_doubt = True
            self._has_work.set()
            raise
        for desired in deployed.agents.values():
            self._sessions.offer(desired)
        self._changes.announce()
        for listener in self._deployed_listeners:
            listener(slot.manifest_digest, deployed.replaced)
        return deployed

    async def reissue(self) -> None:
        """Push to every live session again what it shall run: signed anew, with the catalogue of today.

        An agent that is ahead of us is left alone; one that was never asked for anything has nothing to be told.
        """
        if self.is_watching:
            return
        ids = self._sessions.agent_ids()
        for agent in await self._store.read(lambda records: records.agents(ids)):
            if not agent.is_ahead and agent.desired.position != NOWHERE:
                self._sessions.reissue(agent.desired)

    async def permit_transfer(self, agent_id: AgentId, model: ModelName) -> Slot:
        """Let a metered agent fetch whole chunks of the variant of `model` that it shall run; return that.

        The word is kept until this process ends, for an agent that is offline.

        Raises:
            UnknownAgent: it never said hello.
            UnknownModel: the agent shall not run that model.
        """
        agent = (await self.agent(agent_id)).agent
        slot = next((slot for slot in agent.desired.slots if slot.model == model), None)
        if slot is None:
            raise UnknownModel(f"agent {agent_id}: expected a model that it shall run, got {model}; deploy it first")
        permitted = Permitted(slot.manifest_digest)
        self._permitted.setdefault(agent_id, {})[model] = permitted
        self._sessions.permit(agent_id, permitted)
        return slot

    async def agents(self) -> Sequence[AgentView]:
        """Return every agent that ever said hello, by id."""
        return [self._view(agent) for agent in await self._store.read(lambda records: records.agents())]

    async def agent(self, agent_id: AgentId) -> AgentView:
        """Return one agent.

        Raises:
            UnknownAgent: it never said hello.
        """
        agent = await self._store.read(lambda records: records.agent(agent_id))
        if agent is None:
            raise UnknownAgent(f"agent {agent_id[:80]!r}: never seen here; check its id and the controller it dials")
        return self._view(agent)

    async def wanted_by(self, agent_id: AgentId) -> Collection[Digest]:
        """Return the manifests in the desired state of an agent; none for one that nobody knows."""
        agent = await self._store.read(lambda records: records.agent(agent_id))
        return () if agent is None else tuple(slot.manifest_digest for slot in agent.desired.slots)

    async def entitled_to(self, agent_id: AgentId) -> Collection[Digest]:
        """Return the manifests that stand in the desired state of an agent, or once did."""
        agent = await self._store.read(lambda records: records.agent(agent_id))
        if agent is None:
            return ()
        return {*agent.former_manifests, *(slot.manifest_digest for slot in agent.desired.slots)}

    async def deployments(self) -> Sequence[Deployment]:
        """Return what operators asked for, by target and model."""
        return await self._store.read(lambda records: records.deployments())

    # ---- after a restore -------------------------------------------------------------------------------------

    @property
    def is_watching(self) -> bool:
        """Say whether this state came from a backup and nobody has confirmed that yet: nothing is pushed."""
        return self._restoration is not None and self._restoration.is_open

    @property
    def restoration(self) -> Restoration | None:
        """The newest; None: this state never came from a backup."""
        return self._restoration

    @property
    def seen_catalogue(self) -> CatalogueVersions:
        """The newest versions that any agent said it holds since this process began."""
        return self._seen_catalogue

    async def drift(self) -> Drift:
        """Return which agents are beyond what this state knows."""
        await self.flush()
        return drift_of(self._restoration, await self._store.read(lambda records: records.agents()))

    async def confirm_restored(self) -> Restoration:
        """Let the fleet be told again what it shall run; agents that are ahead keep theirs until the next deployment.

        Raises:
            Conflict: no restore waits for that.
        """
        await self.flush()
        now = self._clock.now()
        self._restoration = await self._store.run(lambda records: use_cases.confirm_restored(records, now=now))
        self._pushes_in_doubt = True
        await self.flush()
        self._changes.announce()
        return self._restoration

    def _require_confirmed(self) -> None:
        if self.is_watching:
            raise Conflict(
                "deploy: this controller was restored from a backup and only watches: see what agents run with "
                "`nanofleet controller drift`, then run `nanofleet controller confirm-restore`"
            )

    @property
    def revision(self) -> int:
        """A number that grows whenever an agent, its presence or a deployment changes."""
        return self._changes.revision

    async def next_change(self, seen: int, *, timeout_s: float) -> int:
        """Wait until `revision` is not `seen`, or for `timeout_s`; return it."""
        return await self._changes.after(seen, timeout_s=timeout_s)

    # ---- what agents do --------------------------------------------------------------------------------------

    @asynccontextmanager
    async def session(self, hello: AgentHello) -> AsyncIterator[tuple[Session, Position]]:
        """Hold the session of an agent: online inside, offline after. Yields it and our position for the agent.

        Its outbox starts with the desired state, unless the agent has applied that already or is ahead of us.

        Raises:
            InvalidRequest: the agent claims a position that nobody can have reached.
            Overloaded: too many agents are connected, or the database is behind.
        """
        _require_plausible(hello.applied)
        # Live first, so that a deployment made while we wait for the database is offered to this session.
        session = self._sessions.open(hello)
        self._heard.forget(hello.agent_id)
        try:
            # Nothing else of the agent is kept here, for as long as the session lasts.
            position = (await self._greet(session, hello)).desired.position
            for permitted in self._permitted.get(hello.agent_id, {}).values():
                session.permit(permitted)
            self.samples.greet(session)
            yield session, position
        finally:
            if self._sessions.close(session):
                self._hear(session, Heard(self._clock.now()))

    def reported(self, session: Session, reported: ReportedState) -> None:
        """Take note of what an agent says that it runs."""
        if self._sessions.is_present(session):
            self._hear(session, Heard(self._clock.now(), reported=reported))

    def vitals(self, session: Session, vitals: AgentVitals) -> None:
        """Take note of what an agent did and how its machine is; nothing is stored, and nobody woken."""
        if self._sessions.is_present(session):
            self._vitals.note(session.agent_id, session.boot_id, vitals)

    def push_result(self, session: Session, result: PushResult) -> None:
        """Take note of how an agent took a push."""
        if not self._sessions.is_present(session):
            return
        if result.problem is None:
            self.pushes.applied += 1
        else:
            self.pushes.rejected += 1
            _log.warning(
                "agent refused a desired state",
                extra={"agent": session.agent_id, "code": peer_text(result.problem.code)},
            )
        self._hear(session, Heard(self._clock.now(), result=result))

    def is_online(self, agent_id: AgentId) -> bool:
        return agent_id in self._sessions

    @property
    def session_count(self) -> int:
        return len(self._sessions)

    def sites(self) -> Counter[str]:
        """Return how many agents are connected at each site."""
        return self._sessions.sites()

    def expel(self, agent_id: AgentId, reason: str) -> None:
        """End the session of an agent whose identity does not count any more; its name may go to another machine."""
        self._sessions.end(agent_id, Expelled(reason))
        self._sessions.forget_boots(agent_id)
        self._vitals.forget(agent_id)
        self.samples.forget(agent_id)

    def end_sessions(self) -> None:
        """Tell every agent to come back later; their streams end by themselves."""
        self._sessions.end_all(Stopping())

    # ---- inside ----------------------------------------------------------------------------------------------

    async def _greet(self, session: Session, hello: AgentHello) -> Agent:
        agent = await self._greetings.greet(hello)
        self._seen_catalogue = CatalogueVersions(
            max(self._seen_catalogue.root, hello.catalogue.root),
            max(self._seen_catalogue.timestamp, hello.catalogue.timestamp),
        )
        if agent.is_ahead:
            _log.warning(
                "agent is ahead of this database, perhaps an older copy; it keeps what it runs until the next deploy",
                extra={"agent": hello.agent_id, "applied": hello.applied, "desired": agent.desired.position},
            )
        elif not agent.is_in_sync and not self.is_watching:
            session.offer(agent.desired)
        self._changes.announce()
        return agent

    def _hear(self, session: Session, heard: Heard) -> None:
        self._heard.add(session.agent_id, heard)
        self._has_work.set()
        self._changes.announce()

    def _view(self, agent: Agent) -> AgentView:
        """Show an agent as of now, with what is not stored yet."""
        for heard in self._heard.of(agent.agent_id):
            agent = apply_heard(agent, heard)
        is_online = agent.agent_id in self._sessions
        shown = replace(agent, last_seen_at=self._clock.now()) if is_online else agent
        return AgentView(shown, is_online, self._vitals.of(agent.agent_id))

    async def _push_again(self) -> None:
        """Offer every live session its desired state, after a deployment whose caller left before the pushes."""
        if not self._pushes_in_doubt:
            return
        ids = self._sessions.agent_ids()
        # On the writer, behind the transaction in doubt.
        for agent in await self._store.run(lambda records: records.agents(ids)):
            if not agent.is_ahead and not agent.is_in_sync:
                self._sessions.offer(agent.desired)
        self._pushes_in_doubt = False


def _require_plausible(applied: Position) -> None:
    if max(applied) > MAX_PLAUSIBLE:
        raise InvalidRequest(f"hello: expected an applied position below {MAX_PLAUSIBLE}, got {max(applied)}")
