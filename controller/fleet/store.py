"""The port from the fleet to a database; `controller.storage.fleet` implements it.

A use case is a function over `FleetRecords`, and the store runs it as one transaction: what it decides, it decides on
one consistent view, and what it saves is saved together or not at all.
"""

from collections.abc import Callable, Collection, Iterable, Sequence
from typing import Protocol, TypeVar

from controller.fleet.model import Agent, Deployment
from controller.fleet.restoration import Restoration
from core.ids import AgentId

T = TypeVar("T")


class FleetReader(Protocol):
    """What a query sees: one consistent view."""

    def agent(self, agent_id: AgentId) -> Agent | None: ...

    def agents(self, ids: Collection[AgentId] | None = None) -> Sequence[Agent]:
        """Return the known ones among `ids`, or all, by id."""
        ...

    def deployments(self) -> Sequence[Deployment]:
        """Return all, by target kind, target name and model."""
        ...

    def restoration(self) -> Restoration | None:
        """Return the newest, that with the highest epoch; None: this state never came from a backup."""
        ...


class FleetRecords(FleetReader, Protocol):
    """What a use case sees and may change."""

    def save_agents(self, agents: Iterable[Agent]) -> None:
        """Insert or replace."""
        ...

    def save_restoration(self, restoration: Restoration) -> None:
        """Insert, or replace the one of the same epoch."""
        ...

    def save_deployment(self, deployment: Deployment) -> None:
        """Insert, or replace the one of the same target and model.

        Raises:
            UnknownModel: the registry does not hold that variant.
        """
        ...


class FleetStore(Protocol):
    async def run(self, use_case: Callable[[FleetRecords], T]) -> T:
        """Run `use_case` as one transaction: kept when it returns, undone when it raises."""
        ...

    async def read(self, query: Callable[[FleetReader], T]) -> T: ...
