"""The transactions of the fleet: functions over records, pure apart from them. The store runs each as one unit.

An agent's position grows by one generation when its resolved slots change, and only then. It also passes whatever the
agent says it has applied: after a restore from an older copy, an agent refuses anything that is not newer than its own
(delivery.md, "Several controllers").
"""

import logging
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from datetime import datetime

from controller.fleet.heard import Heard, apply_heard
from controller.fleet.model import WHOLE_FLEET, Agent, Deployed, Deployment, Target
from controller.fleet.resolution import resolve, winners_of
from controller.fleet.restoration import Restoration
from controller.fleet.store import FleetReader, FleetRecords
from core.digest import Digest
from core.errors import Conflict
from core.fleet_state import NOWHERE, AgentHello, DesiredState, Position, ReportedState, Slot
from core.fleet_wire import MAX_SLOTS
from core.ids import AgentId, ModelName

_log = logging.getLogger(__name__)

# Restores from a backup raise it; until then every controller is at the first.
FIRST_EPOCH = 1
# Chosen: a few former variants of each model of an ordinary agent; without its entry a variant travels in full.
MAX_FORMER = 64


def greet(records: FleetRecords, hellos: Sequence[AgentHello], *, now: datetime) -> Sequence[Agent]:
    """Record hellos, in this order; a first one, or one from another site, resolves what the agent shall run.

    An agent that is ahead of us keeps what it has: we know less than it does, so we only watch. After a restore that
    nobody has confirmed yet, so do all. So does one that would
    get more models than it may have: refusing its hello would help nobody.
    """
    restoration = records.restoration()
    known = {agent.agent_id: agent for agent in records.agents({hello.agent_id for hello in hellos})}
    deployments = records.deployments()
    greeted = []
    for hello in hellos:
        agent = _introduced(known.get(hello.agent_id), hello, now)
        if not agent.is_ahead and (restoration is None or not restoration.is_open):
            agent = _settled_or_kept(agent, deployments, epoch=_epoch(restoration), now=now)
        known[hello.agent_id] = agent
        greeted.append(agent)
    records.save_agents(known.values())
    return greeted


def deploy(records: FleetRecords, deployment: Deployment, *, now: datetime) -> Deployed:
    """Record a deployment and give every covered agent its new desired state.

    Raises:
        UnknownModel: the registry does not hold the variant.
        Conflict: an agent, or any that may come, would have more models than one desired state may hold.
    """
    restoration = records.restoration()
    epoch = _epoch(restoration)
    records.save_deployment(deployment)
    deployments = records.deployments()
    _require_room(deployment.target, deployments)
    covered = [
        agent
        for agent in records.agents()
        if deployment.target.covers(agent.agent_id, agent.site) and not _is_held(agent, deployments, restoration)
    ]
    settled = [_settled(agent, deployments, epoch=epoch, now=now) for agent in covered]
    records.save_agents(after for before, after in zip(covered, settled, strict=True) if after is not before)
    # A more specific deployment of the same model may hide this one from some of them.
    affected = {agent.agent_id: agent.desired for agent in settled if deployment.slot in agent.desired.slots}
    return Deployed(deployment, affected, _replaced(covered, deployment.slot, set(affected)))


def mark_restored(records: FleetRecords, *, backup_at: datetime, now: datetime, above_epoch: int) -> Restoration:
    """Write down that these records came from a backup, with an epoch above all that they know and `above_epoch`."""
    restoration = Restoration(now, backup_at, max(highest_epoch(records), above_epoch) + 1)
    records.save_restoration(restoration)
    return restoration


def confirm_restored(records: FleetRecords, *, now: datetime) -> Restoration:
    """Let the fleet be told again what it shall run; agents that are ahead stay as they are until the next deployment.

    Raises:
        Conflict: no restore waits for that.
    """
    restoration = records.restoration()
    if restoration is None or not restoration.is_open:
        raise Conflict("restore: expected one that waits to be confirmed, there is none")
    # Agents may have told of later ones meanwhile: another restore, that this copy knows nothing of.
    epoch = max(restoration.epoch, _highest_told(records.agents()) + 1)
    records.save_restoration(replace(restoration, confirmed_at=now))
    confirmed = replace(restoration, epoch=epoch, confirmed_at=now)
    records.save_restoration(confirmed)
    deployments = records.deployments()
    behind = [agent for agent in records.agents() if not agent.is_ahead]
    records.save_agents(_settled_or_kept(agent, deployments, epoch=epoch, now=now) for agent in behind)
    return confirmed


def highest_epoch(records: FleetReader) -> int:
    """Return the highest epoch that was given or heard of."""
    return max(_epoch(records.restoration()), _highest_told(records.agents()))


def _highest_told(agents: Iterable[Agent]) -> int:
    positions = (position for agent in agents for position in (agent.desired.position, agent.reported.applied))
    return max((position.epoch for position in positions), default=0)


def _epoch(restoration: Restoration | None) -> int:
    return FIRST_EPOCH if restoration is None else restoration.epoch


def _is_held(agent: Agent, deployments: Iterable[Deployment], restoration: Restoration | None) -> bool:
    """Say whether a restore leaves open what an agent shall run, so that a deployment passes it by.

    One that was not heard of since may be ahead; its next hello tells. One that is ahead moves as a whole, so it waits
    until every model in which it differs from us was deployed after the restore: nothing is rolled back in passing.
    """
    if restoration is None:
        return False
    if agent.last_seen_at < restoration.restored_at:
        return True
    if not agent.is_ahead:
        return False
    winners = winners_of(deployments, agent.agent_id, agent.site)
    differing = {report.slot.model for report in agent.reported.slots if _wanted(winners, report.slot) != report.slot}
    decided = {model for model, winner in winners.items() if winner.created_at >= restoration.restored_at}
    return not differing <= decided


def _wanted(winners: Mapping[ModelName, Deployment], slot: Slot) -> Slot | None:
    winner = winners.get(slot.model)
    return None if winner is None else winner.slot


def _replaced(before: Iterable[Agent], slot: Slot, affected: Collection[AgentId]) -> tuple[Digest, ...]:
    counts = Counter(
        old.manifest_digest
        for agent in before
        if agent.agent_id in affected
        for old in agent.desired.slots
        if old.model == slot.model and old.manifest_digest != slot.manifest_digest
    )
    return tuple(digest for digest, _ in counts.most_common())


def record_heard(records: FleetRecords, words: Mapping[AgentId, Heard]) -> None:
    """Store what agents said."""
    records.save_agents([apply_heard(agent, words[agent.agent_id]) for agent in records.agents(words)])


def _introduced(known: Agent | None, hello: AgentHello, now: datetime) -> Agent:
    if known is None:
        known = Agent(
            agent_id=hello.agent_id,
            site=hello.site,
            software_version=hello.software_version,
            boot_id=hello.boot_id,
            tags=hello.tags,
            first_seen_at=now,
            last_seen_at=now,
            desired=DesiredState(hello.agent_id, NOWHERE, now, ()),
            reported=ReportedState(NOWHERE, ()),
        )
    return replace(
        known,
        site=hello.site,
        software_version=hello.software_version,
        boot_id=hello.boot_id,
        tags=hello.tags,
        last_seen_at=now,
        reported=replace(known.reported, applied=hello.applied),
    )


def _settled_or_kept(agent: Agent, deployments: Sequence[Deployment], *, epoch: int, now: datetime) -> Agent:
    try:
        return _settled(agent, deployments, epoch=epoch, now=now)
    except Conflict as error:
        _log.warning(
            "agent keeps its last desired state", extra={"agent": agent.agent_id, "site": agent.site}, exc_info=error
        )
        return agent


def _require_room(target: Target, deployments: Sequence[Deployment]) -> None:
    """Raise Conflict when what an agent of `target` certainly gets is too much, whether or not one has come yet.

    A fleet's deployments reach every site and every agent that was named, a site's reach agents that nobody has seen.
    """
    by_target: dict[Target, set[ModelName]] = {}
    for deployment in deployments:
        by_target.setdefault(deployment.target, set()).add(deployment.slot.model)
    everywhere = by_target.get(WHOLE_FLEET, set())
    reached = by_target if target == WHOLE_FLEET else (target,)
    for each in reached:
        place = each.kind if each == WHOLE_FLEET else f"{each.kind} {each.name}"
        _require_at_most_max_slots(place, len(everywhere | by_target[each]))


def _require_at_most_max_slots(place: str, count: int) -> None:
    if count > MAX_SLOTS:
        raise Conflict(f"{place}: expected at most {MAX_SLOTS} models, got {count}; deploy fewer to it and the fleet")


def _settled(agent: Agent, deployments: Iterable[Deployment], *, epoch: int, now: datetime) -> Agent:
    """Return the agent with the slots that are its due, at the next position; itself when it has them already.

    One that is ahead always moves: only beyond its own position does it listen again.
    """
    slots = resolve(deployments, agent.agent_id, agent.site)
    if slots == agent.desired.slots and not agent.is_ahead:
        return agent
    _require_at_most_max_slots(f"agent {agent.agent_id}", len(slots))
    newest = max(agent.desired.position, agent.reported.applied, Position(epoch, 0))
    desired = DesiredState(agent.agent_id, Position(newest.epoch, newest.generation + 1), now, slots)
    return replace(agent, desired=desired, rejection=None, former_manifests=_former(agent, slots))


def _former(agent: Agent, slots: Sequence[Slot]) -> tuple[Digest, ...]:
    """Return the manifests that the agent was given until now and that are not in `slots`, the latest last."""
    given = (*agent.former_manifests, *(slot.manifest_digest for slot in agent.desired.slots))
    staying = {slot.manifest_digest for slot in slots}
    # The last place of each counts: one that came back and left again is new among them.
    latest = [*dict.fromkeys(digest for digest in reversed(given) if digest not in staying)]
    return tuple(reversed(latest[:MAX_FORMER]))
