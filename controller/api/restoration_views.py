"""The bodies about a restore, as the client and the server both know them; as light as `operator_views`."""

from datetime import datetime

from pydantic import BaseModel, ConfigDict

from controller.api.operator_views import PositionView, SlotView

# On every answer while a restore is not confirmed, so that commands and pages can say so without asking.
NOTICE_HEADER = "x-nanofleet-notice"
RESTORED = "restored-unconfirmed"


class _View(BaseModel):
    model_config = ConfigDict(frozen=True, extra="ignore", use_attribute_docstrings=True)


class DriftedAgentView(_View):
    id: str
    site: str
    applied: PositionView
    """What it has applied: beyond anything that this controller knows to have given."""
    desired: PositionView
    runs: tuple[SlotView, ...]
    """What it says that it runs."""
    wants: tuple[SlotView, ...]
    """What this controller's state says that it shall run."""


class RestorationView(_View):
    is_watching: bool
    """This state came from a backup and nobody has confirmed that: nothing is pushed and nothing deployed."""
    restored_at: datetime | None
    backup_at: datetime | None
    confirmed_at: datetime | None
    epoch: int | None
    ahead_count: int
    """Agents that are beyond this state. They keep what they run until a deployment covers them."""
    ahead: tuple[DriftedAgentView, ...]
    """The first hundred of them."""
    unheard_count: int
    """Agents that were not heard of since the restore: whether they are ahead is not known."""
    catalogue_is_behind: bool
    """An agent holds newer catalogue metadata than this controller: it was restored, or its files were swapped."""
    root_is_behind: bool
    """An agent holds a newer root of trust: a rotation is missing here. Bring back its keys and a later backup."""


class ConfirmedView(_View):
    epoch: int
    catalogue: str
    """Whether agents can verify the catalogue from now on, or what must be done for that."""
