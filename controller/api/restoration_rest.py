"""The operator's REST for what follows a restore: what agents run that is not known here, and the word to go on."""

from typing import Any

from fastapi import APIRouter, Request

from controller.api import audited
from controller.api import restoration_views as views
from controller.api.http_bodies import BoundedRoute
from controller.api.operator_mapping import position_view, slot_view
from controller.fleet.model import Agent
from controller.fleet.service import Fleet
from controller.signing.model import KeyRole
from controller.signing.service import Catalogue

PREFIX = "/api"
# Chosen: a page; the count says how many there are.
MAX_SHOWN = 100

# The component is added by `http_app`, because no endpoint returns it.
_REFUSED: dict[str, Any] = {
    "description": "Refused; `detail` says why.",
    "content": {"application/problem+json": {"schema": {"$ref": "#/components/schemas/ProblemView"}}},
}


def router(fleet: Fleet, catalogue: Catalogue) -> APIRouter:
    """Return the endpoints about a restore, below /api."""
    api = APIRouter(prefix=PREFIX, responses={"default": _REFUSED}, route_class=BoundedRoute, tags=["restore"])
    face = _Restoration(fleet, catalogue)
    api.add_api_route("/restoration", face.drift, summary="Show what agents run that this state does not know")
    api.add_api_route(
        "/restoration/confirmation",
        face.confirm,
        methods=["POST"],
        summary="After a restore, tell agents again what they shall run",
        responses={409: _REFUSED},
    )
    return api


class _Restoration:
    def __init__(self, fleet: Fleet, catalogue: Catalogue) -> None:
        self._fleet = fleet
        self._catalogue = catalogue

    async def drift(self) -> views.RestorationView:
        drift = await self._fleet.drift()
        found, seen, ours = drift.restoration, self._fleet.seen_catalogue, self._catalogue.versions()
        return views.RestorationView(
            is_watching=self._fleet.is_watching,
            restored_at=None if found is None else found.restored_at,
            backup_at=None if found is None else found.backup_at,
            confirmed_at=None if found is None else found.confirmed_at,
            epoch=None if found is None else found.epoch,
            ahead_count=len(drift.ahead),
            ahead=tuple(map(_drifted_view, drift.ahead[:MAX_SHOWN])),
            unheard_count=len(drift.unheard),
            catalogue_is_behind=seen.timestamp > ours.timestamp,
            root_is_behind=seen.root > ours.root,
        )

    async def confirm(self, request: Request) -> views.ConfirmedView:
        """Replaces the keys that sign online too: agents then accept a catalogue that counts lower (TUF 5.3.11)."""
        text = await self._catalogue_text() if self._fleet.is_watching else ""
        confirmed = await self._fleet.confirm_restored()
        audited.add(request, target=f"epoch {confirmed.epoch}", detail=text)
        return views.ConfirmedView(epoch=confirmed.epoch, catalogue=text)

    async def _catalogue_text(self) -> str:
        """Let agents accept our catalogue, though they may have seen a later one; say how that stands."""
        if self._fleet.seen_catalogue.root > self._catalogue.versions().root:
            return (
                "Agents hold a newer root of trust than this backup: they accept nothing new before you bring back "
                "the keys and a state of after that rotation, or enrol them anew."
            )
        rotations = [await self._catalogue.rotate(role) for role in (KeyRole.SNAPSHOT, KeyRole.TIMESTAMP)]
        if all(rotation.is_published for rotation in rotations):
            return "The catalogue has new online keys, so that agents that saw a later one accept it."
        return (
            "The root keys are elsewhere: run `nanofleet signing stage`, sign where they are, and `nanofleet signing "
            "publish`; before that, agents that saw a later catalogue accept nothing new."
        )


def _drifted_view(agent: Agent) -> views.DriftedAgentView:
    return views.DriftedAgentView(
        id=agent.agent_id,
        site=agent.site,
        applied=position_view(agent.reported.applied),
        desired=position_view(agent.desired.position),
        runs=tuple(slot_view(report.slot) for report in agent.reported.slots),
        wants=tuple(map(slot_view, agent.desired.slots)),
    )
