"""`SamplePulls`: what operators and agents may do with hard examples.

Everything about pulls is in memory and in the spool; one thread writes the spool. A pull ends by its time, and all that
came for it is then removed: the spool is a way, no archive.
"""

import asyncio
import logging
import uuid
from collections import Counter
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from datetime import timedelta
from functools import partial
from typing import Protocol, TypeVar

from controller.fleet.changes import Changes
from controller.fleet.model import AgentView
from controller.samples.model import Delivery, DeliveryState, Pull, PulledSample, PullRequest, PullView
from controller.samples.spool import Spool
from core.clock import Clock
from core.digest import Digest, Hasher
from core.errors import DiskFull, InvalidRequest, NotFound, Overloaded, Unavailable, UnknownAgent, UnknownModel
from core.ids import AgentId
from core.samples import SampleCounts, SampleName, SampleOffer, SampleOrder

# Chosen: more people than retrain at one time.
MAX_PULLS = 32
# Chosen: memory for what is being received, of all agents together.
MAX_RECEIVING_BYTES = 64 << 20
# Chosen: as an agent does with what is too old.
TIDY_INTERVAL_S = 60.0
NO_ROOM = "no_room"

T = TypeVar("T")

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class PullBounds:
    # Bytes that wait in the spool: of one pull, and of all.
    pull_bytes: int = 256 << 20
    spool_bytes: int = 1 << 30


class Agents(Protocol):
    """Who is in the fleet; `controller.fleet.service.Fleet`."""

    async def agents(self) -> Sequence[AgentView]: ...


class Desk(Protocol):
    """The way to the agents; `controller.fleet.samples.SampleDesk`."""

    def send(self, agent_id: AgentId, order: SampleOrder) -> None: ...

    def counts(self) -> Mapping[AgentId, SampleCounts]: ...

    def orders_from(self, source: "Callable[[AgentId], Sequence[SampleOrder]]") -> None: ...


class SamplePulls:
    """Call `prepare` once, then keep `run` running."""

    def __init__(
        self,
        spool: Spool,
        agents: Agents,
        desk: Desk,
        *,
        clock: Clock,
        bounds: PullBounds = PullBounds(),
    ) -> None:
        self._spool = spool
        self._agents = agents
        self._desk = desk
        self._clock = clock
        self._bounds = bounds
        self._pulls: dict[str, Pull] = {}
        self._deliveries: dict[str, dict[AgentId, Delivery]] = {}
        # What is here, in the order in which it came, and its bytes; of each pull.
        self._arrived: dict[str, list[PulledSample]] = {}
        self._sizes: Counter[str] = Counter()
        # What agents said they have, of those whose delivery goes on; lost when this process ends, they say it again.
        self._offered: dict[tuple[str, AgentId], Mapping[Digest, int]] = {}
        self._receiving_bytes = 0
        self._receiving: Counter[AgentId] = Counter()
        self._disk = ThreadPoolExecutor(1, thread_name_prefix="samples")
        self._changes = Changes()

    async def prepare(self) -> None:
        """Learn what is in the spool."""
        for view in await self._on_disk(self._spool.load):
            self._pulls[view.pull.pull_id] = view.pull
            self._deliveries[view.pull.pull_id] = dict(view.deliveries)
            self._arrived[view.pull.pull_id] = [
                PulledSample(agent_id, *sample)
                for agent_id, delivery in view.deliveries.items()
                for sample in delivery.samples.items()
            ]
            self._sizes[view.pull.pull_id] = sum(each.size_bytes for each in view.deliveries.values())
        self._desk.orders_from(self.orders_for)
        await self.tidy()

    async def run(self) -> None:
        """Remove what is over; for ever."""
        while True:
            await asyncio.sleep(TIDY_INTERVAL_S)
            await self.tidy()

    async def tidy(self) -> None:
        for pull_id in [each.pull_id for each in self._pulls.values() if self._is_over(each)]:
            await self._remove(pull_id)

    def close(self) -> None:
        self._disk.shutdown()

    # ---- what operators do -----------------------------------------------------------------------------------

    async def create(self, request: PullRequest, *, asked_by: str) -> PullView:
        """Ask agents for samples; those that are offline are asked when they return.

        Raises:
            UnknownModel: nobody who was named runs that model or has samples of it.
            UnknownAgent: an agent that was named never said hello.
            Overloaded: too many pulls wait to be fetched or dropped.
        """
        if len(self._pulls) >= MAX_PULLS:
            raise Overloaded(f"pull: expected at most {MAX_PULLS} at a time; drop one with `nanofleet samples drop`")
        agents = self._chosen(request, await self._agents.agents())
        now = self._clock.now()
        pull = Pull(
            uuid.uuid4().hex,
            request.model,
            request.limit,
            request.since,
            request.permits_metered,
            asked_by,
            now,
            now + timedelta(seconds=request.lifetime_s),
            agents,
        )
        await self._on_disk(partial(self._spool.create, pull))
        self._pulls[pull.pull_id] = pull
        self._deliveries[pull.pull_id] = dict.fromkeys(agents, Delivery())
        for agent_id in agents:
            self._desk.send(agent_id, pull.order())
        self._changes.announce()
        return self.pull(pull.pull_id)

    def pulls(self) -> Sequence[PullView]:
        """Return every pull that is not over, the newest first."""
        pulls = sorted(self._pulls.values(), key=lambda pull: pull.created_at, reverse=True)
        return [PullView(pull, self._deliveries[pull.pull_id]) for pull in pulls if not self._is_over(pull)]

    def pull(self, pull_id: str) -> PullView:
        """Return one pull.

        Raises:
            NotFound: there is none of that id, or it is over.
        """
        pull = self._pulls.get(pull_id)
        if pull is None or self._is_over(pull):
            raise NotFound(f"pull {pull_id[:80]!r}: is over or never was; pull again")
        return PullView(pull, dict(self._deliveries[pull_id]))

    def samples(self, pull_id: str, *, start: int, limit: int) -> Sequence[PulledSample]:
        """Return what came for a pull, in the order in which it did, from the `start`-th on. Raises NotFound."""
        self.pull(pull_id)
        return self._arrived.get(pull_id, [])[start : start + limit]

    async def content(self, pull_id: str, agent_id: AgentId, digest: Digest) -> bytes:
        """Return a sample that came.

        Raises:
            NotFound: it did not, or the pull is over.
        """
        delivery = self.pull(pull_id).deliveries.get(agent_id, Delivery())
        if digest not in delivery.samples:
            raise NotFound(f"sample {digest}: is not in this pull")
        return await self._on_disk(partial(self._spool.read, pull_id, agent_id, digest))

    async def drop(self, pull_id: str) -> None:
        """End a pull and remove what came for it. Raises NotFound."""
        await self._remove(self.pull(pull_id).pull.pull_id)

    def counts(self) -> Mapping[AgentId, SampleCounts]:
        """Return what agents last said that they keep."""
        return self._desk.counts()

    @property
    def revision(self) -> int:
        """A number that grows whenever a pull or a delivery changes."""
        return self._changes.revision

    async def next_change(self, seen: int, *, timeout_s: float) -> int:
        return await self._changes.after(seen, timeout_s=timeout_s)

    # ---- what agents do --------------------------------------------------------------------------------------

    def orders_for(self, agent_id: AgentId) -> Sequence[SampleOrder]:
        """Return what an agent has not delivered yet."""
        return [
            pull.order()
            for pull in self._pulls.values()
            if not self._is_over(pull) and not self._deliveries[pull.pull_id].get(agent_id, _ENDED).is_over
        ]

    async def offer(self, agent_id: AgentId, offer: SampleOffer) -> Sequence[Digest]:
        """Take note of what an agent has; return what is still wanted. Nothing wanted ends its part.

        Raises:
            NotFound: nobody asks it for that, or not any more.
            InvalidRequest: more than was asked for.
        """
        pull, delivery = self._part(agent_id, offer.pull_id)
        if len(offer.samples) > pull.limit:
            raise InvalidRequest(f"offer: expected at most {pull.limit} samples, got {len(offer.samples)}")
        if offer.declined:
            await self._end(pull, agent_id, replace(delivery, state=DeliveryState.DECLINED, reason=offer.declined))
            return ()
        offered = dict(offer.samples)
        missing = [SampleName(*item) for item in offered.items() if item[0] not in delivery.samples]
        wanted = self._fitting(pull, missing)
        delivery = replace(delivery, offered=max(len(offered), delivery.offered), state=DeliveryState.DELIVERING)
        if wanted:
            self._offered[pull.pull_id, agent_id] = {name.digest: name.size_bytes for name in wanted}
            self._note(pull, agent_id, delivery)
        else:
            reason = NO_ROOM if missing else ""
            await self._end(pull, agent_id, replace(delivery, state=DeliveryState.DELIVERED, reason=reason))
        return [name.digest for name in wanted]

    async def receive(self, agent_id: AgentId, pull_id: str, name: SampleName, chunks: AsyncIterator[bytes]) -> None:
        """Take a sample that was wanted; one that is here already counts as taken.

        Raises:
            NotFound: nobody asks the agent for it, or not any more.
            Unavailable: it was not wanted; it must be offered first.
            Overloaded: too much is being received; try again later.
            DiskFull: the spool has no room.
            InvalidRequest: more or fewer bytes than were announced.
            IntegrityError: other bytes.
        """
        pull, delivery = self._part(agent_id, pull_id)
        if name.digest in delivery.samples:
            return
        if self._offered.get((pull_id, agent_id), {}).get(name.digest) != name.size_bytes:
            raise Unavailable(f"sample {name.digest}: is not wanted; offer it first")
        content = await self._received(agent_id, name, chunks)
        # It may have ended, or been dropped with its folder, meanwhile.
        self._part(agent_id, pull_id)
        try:
            await self._on_disk(partial(self._spool.keep, pull_id, agent_id, name.digest, content))
        except OSError as error:
            _log.warning("a sample could not be spooled", extra={"reason": str(error)})
            raise DiskFull("the controller's disk takes no more samples; try again later") from error
        pull, delivery = self._part(agent_id, pull_id)
        self._arrived.setdefault(pull_id, []).append(PulledSample(agent_id, *name))
        self._sizes[pull_id] += name.size_bytes
        self._note(pull, agent_id, delivery.with_sample(*name))

    # ---- inside ----------------------------------------------------------------------------------------------

    def _chosen(self, request: PullRequest, agents: Sequence[AgentView]) -> tuple[AgentId, ...]:
        known = {view.agent.agent_id for view in agents}
        if unknown := [agent_id for agent_id in request.agents if agent_id not in known]:
            raise UnknownAgent(f"agent {unknown[0][:80]!r}: never seen here; check its id")
        chosen = tuple(view.agent.agent_id for view in agents if self._is_meant(request, view))
        if not chosen:
            raise UnknownModel(
                f"model {request.model[:80]!r}: no agent that was named runs it or says that it has samples of it"
            )
        return chosen

    def _is_meant(self, request: PullRequest, view: AgentView) -> bool:
        agent = view.agent
        if request.agents:
            return agent.agent_id in request.agents
        if request.site not in (None, agent.site):
            return False
        counts = self._desk.counts().get(agent.agent_id)
        slots = (*agent.desired.slots, *(report.slot for report in agent.reported.slots))
        return any(slot.model == request.model for slot in slots) or (
            counts is not None and any(row.model == request.model for row in counts.rows)
        )

    def _part(self, agent_id: AgentId, pull_id: str) -> tuple[Pull, Delivery]:
        """Return a pull and what an agent made of it so far."""
        pull = self._pulls.get(pull_id)
        if pull is None or self._is_over(pull) or agent_id not in self._deliveries[pull_id]:
            raise NotFound("pull: nobody asks this agent for samples, or not any more")
        return pull, self._deliveries[pull_id][agent_id]

    def _fitting(self, pull: Pull, missing: Sequence[SampleName]) -> Sequence[SampleName]:
        """Return the first of `missing` for which there is room."""
        room_bytes = min(
            self._bounds.pull_bytes - self._sizes[pull.pull_id], self._bounds.spool_bytes - self._sizes.total()
        )
        fitting = []
        for name in missing:
            room_bytes -= name.size_bytes
            if room_bytes < 0:
                break
            fitting.append(name)
        return fitting

    async def _received(self, agent_id: AgentId, name: SampleName, chunks: AsyncIterator[bytes]) -> bytes:
        """Return the bytes of a sample, within the memory for all of them together."""
        if self._receiving[agent_id] or self._receiving_bytes + name.size_bytes > MAX_RECEIVING_BYTES:
            raise Overloaded("samples: too many are being received; try again later")
        self._receiving_bytes += name.size_bytes
        self._receiving[agent_id] += 1
        try:
            return await _collected(name, chunks)
        finally:
            self._receiving_bytes -= name.size_bytes
            del self._receiving[agent_id]

    def _note(self, pull: Pull, agent_id: AgentId, delivery: Delivery) -> None:
        self._deliveries[pull.pull_id][agent_id] = delivery
        self._changes.announce()

    async def _end(self, pull: Pull, agent_id: AgentId, delivery: Delivery) -> None:
        self._offered.pop((pull.pull_id, agent_id), None)
        self._note(pull, agent_id, delivery)
        await self._on_disk(partial(self._spool.end, pull.pull_id, agent_id, delivery))

    async def _remove(self, pull_id: str) -> None:
        pull = self._pulls.pop(pull_id, None)
        self._deliveries.pop(pull_id, None)
        self._arrived.pop(pull_id, None)
        del self._sizes[pull_id]
        for agent_id in () if pull is None else pull.agents:
            self._offered.pop((pull_id, agent_id), None)
        await self._on_disk(partial(self._spool.drop, pull_id))
        self._changes.announce()

    def _is_over(self, pull: Pull) -> bool:
        return pull.expires_at <= self._clock.now()

    async def _on_disk(self, work: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._disk, work)


# What an agent that nobody asked has to deliver: nothing.
_ENDED = Delivery(DeliveryState.DECLINED)


async def _collected(name: SampleName, chunks: AsyncIterator[bytes]) -> bytes:
    content, hasher = bytearray(), Hasher()
    async for chunk in chunks:
        content += chunk
        hasher.update(chunk)
        if len(content) > name.size_bytes:
            break
    if len(content) != name.size_bytes:
        raise InvalidRequest(f"sample {name.digest}: expected {name.size_bytes} bytes, got another number")
    hasher.require(name.digest)
    return bytes(content)
