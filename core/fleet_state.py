"""What an agent shall run and what it says it runs, as values. `core.fleet_wire` carries them over gRPC."""

from dataclasses import dataclass
from datetime import datetime
from enum import Enum, StrEnum
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
    # Set when it is signed; past it nothing new is installed by this state.
    expires_at: datetime | None = None


@dataclass(frozen=True, slots=True)
class MetadataFile:
    """A file of the catalogue's metadata, as TUF names it: `timestamp.json`, `3.snapshot.json`."""

    name: str
    content: bytes


@dataclass(frozen=True, slots=True)
class SignedAssignment:
    """A desired state on its way: bytes, the director's Ed25519 signature over them, and catalogue metadata beside it.

    The signature is over `ASSIGNMENT_CONTEXT + payload`; `key_id` is the SHA-256 of the raw public key in hexadecimal.
    """

    payload: bytes
    signature: bytes
    key_id: str
    catalogue: tuple[MetadataFile, ...] = ()


# Signed together with the payload, so that the signature is good for nothing else.
ASSIGNMENT_CONTEXT = b"nanofleet assignment v1\n"


class CatalogueVersions(NamedTuple):
    """The newest catalogue metadata that a machine holds; 0 stands for none."""

    root: int
    timestamp: int


NO_CATALOGUE = CatalogueVersions(0, 0)


class SlotPhase(Enum):
    """Where a slot stands. FAILED and WAITING come with a problem; PROBATION serves already."""

    FETCHING = "fetching"
    WAITING = "waiting"
    SELF_TEST = "self_test"
    LOADING = "loading"
    PROBATION = "probation"
    READY = "ready"
    FAILED = "failed"


@dataclass(frozen=True, slots=True)
class Problem:
    """An error as a value: `code` is a word of core.errors.ErrorCode, `message` says the remedy."""

    code: str
    message: str


@dataclass(frozen=True, slots=True)
class Transfer:
    """What bringing a variant in cost: encoded bytes received, bytes they stand for, chunks by how they came.

    `brought_bytes` includes chunks that were in the store already (`same_chunks`); what the deltas saved is
    `brought_bytes - wire_bytes`.
    """

    wire_bytes: int = 0
    brought_bytes: int = 0
    rate_bytes_per_s: int = 0
    same_chunks: int = 0
    raw_chunks: int = 0
    zstd_chunks: int = 0
    difference_chunks: int = 0


@dataclass(frozen=True, slots=True)
class SlotReport:
    slot: Slot
    phase: SlotPhase
    stored_bytes: int
    total_bytes: int
    problem: Problem | None = None
    transfer: Transfer | None = None


@dataclass(frozen=True, slots=True)
class ReportedState:
    applied: Position
    slots: tuple[SlotReport, ...]


@dataclass(frozen=True, slots=True)
class Usage:
    """What became of an agent's requests since its process began; `refused` counts those that came too late as well."""

    answered_edge: int = 0
    answered_heavy: int = 0
    refused: int = 0
    failed: int = 0

    @property
    def answered(self) -> int:
        return self.answered_edge + self.answered_heavy


@dataclass(frozen=True, slots=True)
class MachineHealth:
    """How an agent's machine is; `temperature_c` None where it has no sensor, `load` is that of the last minute."""

    rss_bytes: int
    available_bytes: int
    temperature_c: float | None
    load: float


class EnergyMethod(StrEnum):
    """How energy is known: counters of the processor, a battery's own figures, or an assumption that was set."""

    RAPL = "rapl"
    BATTERY = "battery"
    MODEL = "model"


@dataclass(frozen=True, slots=True)
class Energy:
    """What an agent took by one method since its process began; `recent` is about a minute, `watts` its average."""

    method: EnergyMethod
    joules: float
    answers: int
    watts: float = 0.0
    recent_joules: float = 0.0
    recent_answers: int = 0

    @property
    def j_per_answer(self) -> float | None:
        return self.joules / self.answers if self.answers else None

    @property
    def recent_j_per_answer(self) -> float | None:
        return self.recent_joules / self.recent_answers if self.recent_answers else None


@dataclass(frozen=True, slots=True)
class AgentVitals:
    """`uptime_s` are the seconds over which `usage` was counted; `energy` None where nothing is known of it."""

    usage: Usage
    uptime_s: float
    health: MachineHealth
    energy: Energy | None = None


@dataclass(frozen=True, slots=True)
class AgentHello:
    """How an agent introduces itself on a new session; `boot_id` is new at every start of its process."""

    agent_id: AgentId
    site: SiteId
    software_version: str
    boot_id: str
    applied: Position
    tags: tuple[str, ...]
    catalogue: CatalogueVersions = NO_CATALOGUE
    # Variants wholly in its store, by manifest: what differences can be taken from.
    held_manifests: tuple[Digest, ...] = ()
    # Its link costs money: whole chunks only with a person's word.
    is_metered: bool = False
    # SHA-256 of the trust bundle that it uses.
    trust_bundle_sha256: bytes = b""


@dataclass(frozen=True, slots=True)
class PushResult:
    """The agent's answer to one push; with a problem it keeps running its last good state."""

    position: Position
    problem: Problem | None = None
