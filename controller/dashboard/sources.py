"""What the dashboard shows: the features it asks, each by the part that it needs."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Protocol

from controller.fleet.service import Fleet
from controller.identity.model import AgentIdentity
from controller.registry.service import Registry
from controller.signing.model import SigningStatus
from controller.traces.model import SpanRecord, TraceSummary
from controller.traces.statistics import Statistics
from core.clock import Clock
from core.digest import Digest
from core.ids import AgentId


class Identities(Protocol):
    """What is asked of `controller.identity.service.Identity`."""

    async def identities(self) -> Sequence[AgentIdentity]: ...

    async def identity(self, agent: AgentId) -> AgentIdentity: ...


class Signing(Protocol):
    """What is asked of `controller.signing.service.Catalogue`."""

    def is_released(self, manifest_digest: Digest) -> bool: ...

    async def status(self) -> SigningStatus: ...


class TraceReader(Protocol):
    """What is asked of `controller.traces.service.Traces`."""

    @property
    def revision(self) -> int: ...

    async def trace(self, trace_id: str) -> Sequence[SpanRecord]: ...

    async def summaries(self, trace_ids: Collection[str]) -> Sequence[TraceSummary]: ...


@dataclass(frozen=True, slots=True)
class Sources:
    fleet: Fleet
    registry: Registry
    traces: TraceReader
    statistics: Statistics
    identities: Identities
    signing: Signing
    clock: Clock
