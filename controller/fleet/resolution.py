"""What an agent shall run, from what operators asked for. Pure.

For each model the most specific target decides: the agent itself, then its site, then the whole fleet.
"""

from collections.abc import Iterable, Mapping

from controller.fleet.model import Deployment, TargetKind
from core.fleet_state import Slot
from core.ids import AgentId, ModelName, SiteId

_RANK = {TargetKind.FLEET: 0, TargetKind.SITE: 1, TargetKind.AGENT: 2}


def resolve(deployments: Iterable[Deployment], agent_id: AgentId, site: SiteId) -> tuple[Slot, ...]:
    """Return the slots of one agent, sorted by model; the order of `deployments` does not matter."""
    found = winners_of(deployments, agent_id, site)
    return tuple(found[model].slot for model in sorted(found))


def winners_of(deployments: Iterable[Deployment], agent_id: AgentId, site: SiteId) -> Mapping[ModelName, Deployment]:
    """Return the deployment that decides for each model of one agent."""
    winners: dict[ModelName, Deployment] = {}
    for deployment in deployments:
        if not deployment.target.covers(agent_id, site):
            continue
        winner = winners.get(deployment.slot.model)
        if winner is None or _RANK[deployment.target.kind] > _RANK[winner.target.kind]:
            winners[deployment.slot.model] = deployment
    return winners
