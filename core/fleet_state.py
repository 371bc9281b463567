"""What an agent shall run and what it says it runs, as values. `core.fleet_wire` carries them over gRPC."""

from dataclasses import dataclass
from datetime import datetime
from enum import Enum
from typing import NamedTuple

from core.digest import Digest
from core.ids import AgentId, ModelName, SiteId, VariantName


class Position(NamedTuple):
    """A place in the history of one agent's desired state; compares epoch first. (0, 0) is before everything."""

    epoch: int
    generation: int


NOWHERE = Position(0, 0)


@dataclass(frozen=True, slots=True)
class Slot:
    """One model that an agent shall run; the manifest digest identifies all of its bytes."""

    model: ModelName
    version: int
    variant: VariantName
    manifest_digest: Digest


@dataclass(frozen=True, slots=True)
class DesiredState:
    agent_id: AgentId
    position: Position
    issued_at: datetime
    slots: tuple[Slot, ...]


class SlotPhase(Enum):
    FETCHING = "fetching"
    LOADING = "loading"
    READY = "ready"
    FAILED = "failed"


@dataclass(frozen=True, slots=True)
class Problem:
    """An error as a value: `code` is a word of core.errors.ErrorCode, `message` says the remedy."""

    code: str
    message: str


@dataclass(frozen=True, slots=True)
class SlotReport:
    slot: Slot
    phase: SlotPhase
    stored_bytes: int
    total_bytes: int
    problem: Problem | None = None


@dataclass(frozen=True, slots=True)
class ReportedState:
    applied: Position
    slots: tuple[SlotReport, ...]


@dataclass(frozen=True, slots=True)
class AgentHello:
    """How an agent introduces itself on a new session; `boot_id` is new at every start of its process."""

    agent_id: AgentId
    site: SiteId
    software_version: str
    boot_id: str
    applied: Position
    tags: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class PushResult:
    """The agent's answer to one push; with a problem it keeps running its last good state."""

    position: Position
    problem: Problem | None = None
