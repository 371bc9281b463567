"""The fleet on SQL; see the port `controller.fleet.store` for what each method promises."""

from collections.abc import Callable, Collection, Iterable, Sequence
from typing import Any, TypeVar

import orjson
from sqlalchemy import Connection, RowMapping, select
from sqlalchemy.exc import IntegrityError

from controller.fleet.model import Agent, Deployment, Target, TargetKind
from controller.fleet.restoration import Restoration
from controller.fleet.store import FleetReader, FleetRecords
from controller.storage import tables
from controller.storage.database import Database
from controller.storage.instants import instant_of, microseconds_of
from controller.storage.tables import agents, deployments, restorations, variants
from controller.storage.upserts import save
from core.digest import Digest
from core.errors import UnknownModel
from core.fleet_state import DesiredState, Position, Problem, ReportedState, Slot, SlotPhase, SlotReport, Transfer
from core.ids import AgentId, ModelName, SiteId, VariantName

T = TypeVar("T")

# SQLite takes 32,766 parameters in one statement; chosen well below.
_IDS_PER_QUERY = 1000


class SqlFleetStore:
    def __init__(self, database: Database) -> None:
        self._database = database

    async def run(self, use_case: Callable[[FleetRecords], T]) -> T:
        return await self._database.run(lambda connection: use_case(_SqlFleetRecords(connection)))

    async def read(self, query: Callable[[FleetReader], T]) -> T:
        return await self._database.read(lambda connection: query(_SqlFleetRecords(connection)))


def fleet_records(connection: Connection) -> FleetRecords:
    """Return the view of one transaction."""
    return _SqlFleetRecords(connection)


class _SqlFleetRecords:
    """One transaction's view."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection

    def agent(self, agent_id: AgentId) -> Agent | None:
        row = self._connection.execute(select(agents).where(agents.c.id == agent_id)).mappings().one_or_none()
        return None if row is None else _agent(row)

    def agents(self, ids: Collection[AgentId] | None = None) -> Sequence[Agent]:
        if ids is None:
            return [_agent(row) for row in self._connection.execute(select(agents).order_by(agents.c.id)).mappings()]
        wanted = sorted(ids)
        return [
            agent
            for start in range(0, len(wanted), _IDS_PER_QUERY)
            for agent in self._agents_among(wanted[start : start + _IDS_PER_QUERY])
        ]

    def _agents_among(self, ids: Sequence[AgentId]) -> list[Agent]:
        statement = select(agents).where(agents.c.id.in_(ids)).order_by(agents.c.id)
        return [_agent(row) for row in self._connection.execute(statement).mappings()]

    def deployments(self) -> Sequence[Deployment]:
        return [_deployment(row) for row in self._connection.execute(_DEPLOYMENTS).mappings()]

    def restoration(self) -> Restoration | None:
        statement = select(restorations).order_by(restorations.c.epoch.desc()).limit(1)
        row = self._connection.execute(statement).mappings().one_or_none()
        return None if row is None else _restoration(row)

    def save_restoration(self, restoration: Restoration) -> None:
        save(self._connection, tables.restorations, [_restoration_row(restoration)])

    def save_agents(self, agents: Iterable[Agent]) -> None:
        save(self._connection, tables.agents, [_agent_row(agent) for agent in agents])

    def save_deployment(self, deployment: Deployment) -> None:
        try:
            save(self._connection, deployments, [_deployment_row(deployment)])
        except IntegrityError as error:
            slot = deployment.slot
            raise UnknownModel(
                f"model {slot.model} version {slot.version}: no variant {slot.variant}; publish it first"
            ) from error


# ---- statements -----------------------------------------------------------------------------------------------

_DEPLOYMENTS = (
    select(deployments, variants.c.manifest_digest)
    .join_from(
        deployments,
        variants,
        (variants.c.model == deployments.c.model)
        & (variants.c.version == deployments.c.version)
        & (variants.c.variant == deployments.c.variant),
    )
    .order_by(deployments.c.target_kind, deployments.c.target, deployments.c.model)
)


# ---- rows -----------------------------------------------------------------------------------------------------


def _agent(row: RowMapping) -> Agent:
    agent_id = AgentId(row["id"])
    return Agent(
        agent_id=agent_id,
        site=SiteId(row["site"]),
        software_version=row["software_version"],
        boot_id=row["boot_id"],
        tags=tuple(orjson.loads(row["tags"])),
        first_seen_at=instant_of(row["first_seen_us"]),
        last_seen_at=instant_of(row["last_seen_us"]),
        desired=DesiredState(
            agent_id,
            Position(row["epoch"], row["generation"]),
            instant_of(row["issued_us"]),
            tuple(_slot(item) for item in orjson.loads(row["desired_slots"])),
        ),
        reported=ReportedState(
            Position(row["applied_epoch"], row["applied_generation"]),
            tuple(_report(item) for item in orjson.loads(row["reported_slots"])),
        ),
        rejection=None if row["rejection"] is None else Problem(**orjson.loads(row["rejection"])),
        former_manifests=tuple(Digest(item) for item in orjson.loads(row["former_manifests"])),
    )


def _agent_row(agent: Agent) -> dict[str, Any]:
    return {
        "id": agent.agent_id,
        "site": agent.site,
        "software_version": agent.software_version,
        "boot_id": agent.boot_id,
        "tags": _json(agent.tags),
        "first_seen_us": microseconds_of(agent.first_seen_at),
        "last_seen_us": microseconds_of(agent.last_seen_at),
        "epoch": agent.desired.position.epoch,
        "generation": agent.desired.position.generation,
        "issued_us": microseconds_of(agent.desired.issued_at),
        "desired_slots": _json(agent.desired.slots),
        "applied_epoch": agent.reported.applied.epoch,
        "applied_generation": agent.reported.applied.generation,
        "reported_slots": _json(agent.reported.slots),
        "rejection": None if agent.rejection is None else _json(agent.rejection),
        "former_manifests": _json(agent.former_manifests),
    }


def _deployment(row: RowMapping) -> Deployment:
    return Deployment(
        Target(TargetKind(row["target_kind"]), row["target"]),
        _slot(row),
        instant_of(row["created_us"]),
    )


def _deployment_row(deployment: Deployment) -> dict[str, Any]:
    return {
        "target_kind": deployment.target.kind.value,
        "target": deployment.target.name,
        "model": deployment.slot.model,
        "version": deployment.slot.version,
        "variant": deployment.slot.variant,
        "created_us": microseconds_of(deployment.created_at),
    }


def _restoration(row: RowMapping) -> Restoration:
    confirmed_us = row["confirmed_us"]
    return Restoration(
        restored_at=instant_of(row["restored_us"]),
        backup_at=instant_of(row["backup_us"]),
        epoch=row["epoch"],
        confirmed_at=None if confirmed_us is None else instant_of(confirmed_us),
    )


def _restoration_row(restoration: Restoration) -> dict[str, Any]:
    confirmed_at = restoration.confirmed_at
    return {
        "epoch": restoration.epoch,
        "restored_us": microseconds_of(restoration.restored_at),
        "backup_us": microseconds_of(restoration.backup_at),
        "confirmed_us": None if confirmed_at is None else microseconds_of(confirmed_at),
    }


def _slot(fields: Any) -> Slot:
    return Slot(
        ModelName(fields["model"]),
        fields["version"],
        VariantName(fields["variant"]),
        Digest(fields["manifest_digest"]),
    )


def _report(fields: Any) -> SlotReport:
    problem, transfer = fields["problem"], fields.get("transfer")
    return SlotReport(
        _slot(fields["slot"]),
        SlotPhase(fields["phase"]),
        fields["stored_bytes"],
        fields["total_bytes"],
        None if problem is None else Problem(**problem),
        None if transfer is None else Transfer(**transfer),
    )


def _json(value: object) -> str:
    """Return dataclasses, enums and tuples of them as JSON, by the names of their fields."""
    return orjson.dumps(value).decode()
