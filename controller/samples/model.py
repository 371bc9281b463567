"""The values of pulls: what a person asked for, and what each agent made of it."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from datetime import datetime
from enum import StrEnum

from core.digest import Digest
from core.ids import AgentId, ModelName, SiteId
from core.samples import SampleOrder


class DeliveryState(StrEnum):
    WAITING = "waiting"
    """The agent has said nothing yet; it may be offline."""
    DELIVERING = "delivering"
    DELIVERED = "delivered"
    DECLINED = "declined"


@dataclass(frozen=True, slots=True)
class PullRequest:
    """What a person wants: of `agents`, or of those at `site`, or of the fleet where neither is named."""

    model: ModelName
    limit: int
    lifetime_s: float
    agents: tuple[AgentId, ...] = ()
    site: SiteId | None = None
    since: datetime | None = None
    permits_metered: bool = False


@dataclass(frozen=True, slots=True)
class Pull:
    pull_id: str
    model: ModelName
    limit: int
    since: datetime | None
    permits_metered: bool
    asked_by: str
    created_at: datetime
    expires_at: datetime
    # Who is expected to deliver; decided when it was asked for.
    agents: tuple[AgentId, ...]

    def order(self) -> SampleOrder:
        return SampleOrder(
            self.pull_id, self.model, self.limit, self.since, self.expires_at, permits_metered=self.permits_metered
        )


@dataclass(frozen=True, slots=True)
class Delivery:
    """What one agent made of a pull; `reason` says why it declined, or why less is here than it offered."""

    state: DeliveryState = DeliveryState.WAITING
    reason: str = ""
    # Samples that it said it has.
    offered: int = 0
    # What is here, with its bytes.
    samples: Mapping[Digest, int] = field(default_factory=dict)
    # Of all of them.
    size_bytes: int = 0

    @property
    def is_over(self) -> bool:
        return self.state in {DeliveryState.DELIVERED, DeliveryState.DECLINED}

    def with_sample(self, digest: Digest, size_bytes: int) -> "Delivery":
        return replace(self, samples={**self.samples, digest: size_bytes}, size_bytes=self.size_bytes + size_bytes)


@dataclass(frozen=True, slots=True)
class PulledSample:
    agent_id: AgentId
    digest: Digest
    size_bytes: int


@dataclass(frozen=True, slots=True)
class PullView:
    """A pull as it stands."""

    pull: Pull
    deliveries: Mapping[AgentId, Delivery]
