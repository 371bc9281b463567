"""The fleet's store in memory: a full one, for tests of what stands on top of it."""

import asyncio
from collections.abc import Callable, Collection, Iterable, Sequence
from typing import TypeVar

from controller.fleet.model import Agent, Deployment, Target
from controller.fleet.restoration import Restoration
from controller.fleet.store import FleetReader, FleetRecords
from core.errors import UnknownModel
from core.fleet_state import Slot
from core.ids import AgentId, ModelName

T = TypeVar("T")


class MemoryFleetStore:
    """`published` are the variants that the registry holds; None stands for all.

    `fail_next` breaks one use case; while `stalled`, a use case commits and its caller waits on.
    """

    def __init__(self, published: Collection[Slot] | None = None) -> None:
        self._published = published
        self._agents: dict[AgentId, Agent] = {}
        self._deployments: dict[tuple[Target, ModelName], Deployment] = {}
        self._restorations: dict[int, Restoration] = {}
        self.transactions = 0
        self.fail_next: Exception | None = None
        self.stalled = False
        self.committed = asyncio.Event()

    async def run(self, use_case: Callable[[FleetRecords], T]) -> T:
        if self.fail_next is not None:
            error, self.fail_next = self.fail_next, None
            raise error
        self.transactions += 1
        records = self._records()
        result = use_case(records)
        self._agents, self._deployments, self._restorations = records.by_id, records.by_target, records.by_epoch
        self.committed.set()
        if self.stalled:
            await asyncio.Event().wait()
        return result

    async def read(self, query: Callable[[FleetReader], T]) -> T:
        return query(self._records())

    def _records(self) -> "_MemoryFleetRecords":
        return _MemoryFleetRecords(
            dict(self._agents), dict(self._deployments), dict(self._restorations), self._published
        )


class _MemoryFleetRecords:
    def __init__(
        self,
        by_id: dict[AgentId, Agent],
        by_target: dict[tuple[Target, ModelName], Deployment],
        by_epoch: dict[int, Restoration],
        published: Collection[Slot] | None,
    ) -> None:
        self.by_id = by_id
        self.by_target = by_target
        self.by_epoch = by_epoch
        self._published = published

    def agent(self, agent_id: AgentId) -> Agent | None:
        return self.by_id.get(agent_id)

    def agents(self, ids: Collection[AgentId] | None = None) -> Sequence[Agent]:
        wanted = self.by_id.keys() if ids is None else self.by_id.keys() & set(ids)
        return [self.by_id[agent_id] for agent_id in sorted(wanted)]

    def deployments(self) -> Sequence[Deployment]:
        return sorted(self.by_target.values(), key=lambda each: (each.target.kind, each.target.name, each.slot.model))

    def restoration(self) -> Restoration | None:
        return self.by_epoch[max(self.by_epoch)] if self.by_epoch else None

    def save_restoration(self, restoration: Restoration) -> None:
        self.by_epoch[restoration.epoch] = restoration

    def save_agents(self, agents: Iterable[Agent]) -> None:
        self.by_id.update({agent.agent_id: agent for agent in agents})

    def save_deployment(self, deployment: Deployment) -> None:
        if self._published is not None and deployment.slot not in self._published:
            raise UnknownModel(f"model {deployment.slot.model}: not published")
        self.by_target[deployment.target, deployment.slot.model] = deployment
