"""Values of the fleet, made up for tests, and what `Fleet` needs around it."""

from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

from controller.fleet.model import WHOLE_FLEET, Agent, Deployment, Target, TargetKind
from core.digest import Digest, digest_of
from core.errors import UnknownModel
from core.fleet_state import NOWHERE, AgentHello, DesiredState, Position, ReportedState, Slot, SlotPhase, SlotReport
from core.ids import AgentId, ModelName, SiteId, VariantName

NOON = datetime(2026, 3, 1, 12, 0, 0, 654321, tzinfo=UTC)
METER = ModelName("meter")
CAT = ModelName("cat")
INT8 = VariantName("int8-static")
FP16 = VariantName("fp16")
NORTH = SiteId("north")
SOUTH = SiteId("south")
CAM = AgentId("cam-1")


class HeldClock:
    """A clock that only moves when told to."""

    def __init__(self) -> None:
        self._passed_s = 0.0

    def now(self) -> datetime:
        return NOON + timedelta(seconds=self._passed_s)

    def monotonic_s(self) -> float:
        return self._passed_s

    def advance(self, seconds: float) -> None:
        self._passed_s += seconds


@dataclass(frozen=True, slots=True)
class CatalogueEntry:
    version: int
    manifest_digest: Digest


class FakeCatalogue:
    """A registry of `meter` and `cat`, both at version 2, in every variant."""

    def __init__(self) -> None:
        self.newest = 2

    async def variant(self, model: ModelName, version: int | None, variant: VariantName) -> CatalogueEntry:
        if model not in {METER, CAT} or (version or 1) > self.newest:
            raise UnknownModel(f"model {model!r}: not in the registry; publish it first")
        slot = made_slot(model, version or self.newest, variant)
        return CatalogueEntry(slot.version, slot.manifest_digest)


def made_slot(model: ModelName = METER, version: int = 1, variant: VariantName = INT8) -> Slot:
    return Slot(model, version, variant, digest_of(f"{model} {version} {variant}".encode()))


def at_site(site: SiteId) -> Target:
    return Target(TargetKind.SITE, site)


def at_agent(agent_id: AgentId) -> Target:
    return Target(TargetKind.AGENT, agent_id)


def made_deployment(target: Target = WHOLE_FLEET, slot: Slot | None = None) -> Deployment:
    return Deployment(target, slot or made_slot(), NOON)


def made_hello(
    agent_id: AgentId = CAM, *, site: SiteId = NORTH, boot_id: str = "boot-1", applied: Position = NOWHERE
) -> AgentHello:
    return AgentHello(agent_id, site, "0.1.0", boot_id, applied, ("arch:x86_64",))


def made_report(applied: Position, *slots: Slot, stored_bytes: int = 100) -> ReportedState:
    return ReportedState(applied, tuple(SlotReport(slot, SlotPhase.READY, stored_bytes, 100) for slot in slots))


def made_agent(agent_id: AgentId = CAM, *, site: SiteId = NORTH) -> Agent:
    return Agent(
        agent_id=agent_id,
        site=site,
        software_version="0.1.0",
        boot_id="boot-1",
        tags=("arch:x86_64", "camera"),
        first_seen_at=NOON,
        last_seen_at=NOON + timedelta(seconds=1),
        desired=DesiredState(agent_id, Position(1, 3), NOON, (made_slot(),)),
        reported=made_report(Position(1, 2), made_slot()),
    )
