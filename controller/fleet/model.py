"""The values of the fleet: agents as the controller knows them, and the deployments that operators asked for."""

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from enum import StrEnum
from typing import Self

from controller.fleet.vitals import SeenVitals
from core.digest import Digest
from core.errors import InvalidName
from core.fleet_state import DesiredState, Problem, ReportedState, Slot
from core.ids import AgentId, SiteId, checked_name


class TargetKind(StrEnum):
    FLEET = "fleet"
    SITE = "site"
    AGENT = "agent"


@dataclass(frozen=True, slots=True)
class Target:
    """Where a deployment applies. `name` is a site or an agent, and empty for the fleet.

    A site or an agent may be named before it was ever seen: what is asked for waits for its first hello.
    """

    kind: TargetKind
    name: str = ""

    @classmethod
    def checked(cls, kind: TargetKind, name: str) -> Self:
        """Return the target.

        Raises:
            InvalidName: the fleet was given a name, or a site or agent a malformed one.
        """
        if kind is not TargetKind.FLEET:
            return cls(kind, checked_name(name, kind=kind))
        if name:
            raise InvalidName(f"target: expected no name with kind fleet, got {name[:80]!r}")
        return cls(kind)

    def covers(self, agent_id: AgentId, site: SiteId) -> bool:
        match self.kind:
            case TargetKind.FLEET:
                return True
            case TargetKind.SITE:
                return self.name == site
            case TargetKind.AGENT:
                return self.name == agent_id


WHOLE_FLEET = Target(TargetKind.FLEET)


@dataclass(frozen=True, slots=True)
class Deployment:
    """What an operator asked for: run `slot` everywhere in `target`. One per target and model; the newest stays.

    The version was resolved when it was asked for: publishing a newer one moves nothing.
    """

    target: Target
    slot: Slot
    created_at: datetime


@dataclass(frozen=True, slots=True)
class Agent:
    """One agent as the store knows it."""

    agent_id: AgentId
    site: SiteId
    software_version: str
    boot_id: str
    tags: tuple[str, ...]
    first_seen_at: datetime
    last_seen_at: datetime
    desired: DesiredState
    reported: ReportedState
    # Why the agent refused the push of the present desired position; it keeps running its last good state.
    rejection: Problem | None = None
    # Manifests that stood in its desired state and no longer do, the latest last: what else it may have come by here.
    former_manifests: tuple[Digest, ...] = ()

    @property
    def is_in_sync(self) -> bool:
        return self.reported.applied == self.desired.position

    @property
    def is_ahead(self) -> bool:
        """Say whether the agent has applied a position that this controller never gave: our database is an older copy.

        Nothing is pushed to such an agent until the next deployment that covers it, which then goes beyond it.
        """
        return self.reported.applied > self.desired.position


@dataclass(frozen=True, slots=True)
class AgentView:
    """An agent with its presence. While it is online, `agent.last_seen_at` is the present."""

    agent: Agent
    is_online: bool
    # None: it never said anything of them to this process.
    vitals: SeenVitals | None = None


@dataclass(frozen=True, slots=True)
class Deployed:
    """A deployment just made, and the desired state of every agent that runs the model because of it."""

    deployment: Deployment
    agents: Mapping[AgentId, DesiredState]
    # Manifests of the model that agents had until now, the most widespread first.
    replaced: tuple[Digest, ...] = ()
