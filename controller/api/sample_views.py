"""The bodies about hard examples, as the client and the server both know them; as light as `operator_views`."""

from datetime import datetime
from typing import Annotated, Literal

from pydantic import AwareDatetime, BaseModel, ConfigDict, Field

from core.ids import Name
from core.samples import MAX_LIMIT

DEFAULT_LIMIT = 200
# Chosen: a body of some 70 kB.
MAX_PAGE = 500
DEFAULT_LIFETIME_S = 86_400.0
MAX_LIFETIME_S = 30 * 86_400.0


class _View(BaseModel):
    model_config = ConfigDict(frozen=True, extra="ignore", use_attribute_docstrings=True)


class PullBody(BaseModel):
    """Which samples are wanted."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    agents: Annotated[tuple[Name, ...], Field(max_length=64)] = ()
    """Ask these; none: all that run the model or say that they have samples of it."""
    site: Name | None = None
    """Ask only those at this site; not together with `agents`."""
    limit: Annotated[int, Field(ge=1, le=MAX_LIMIT)] = DEFAULT_LIMIT
    """Most samples of each agent, the newest."""
    since: AwareDatetime | None = None
    """Only those taken then or later."""
    lifetime_s: Annotated[float, Field(ge=60, le=MAX_LIFETIME_S, allow_inf_nan=False)] = DEFAULT_LIFETIME_S
    """Seconds for which agents may still deliver, and for which what came is kept here."""
    allow_metered: bool = False
    """Let agents deliver whose link costs money."""


class DeliveryView(_View):
    agent: str
    is_online: bool
    state: Literal["waiting", "delivering", "delivered", "declined"]
    reason: str
    """Why it declined (`metered`, `off`), or why not all is here (`no_room`)."""
    offered: int
    """Samples that it said it has."""
    samples: int
    """Samples that are here."""
    size_bytes: int


class SamplePullView(_View):
    id: str
    model: str
    limit: int
    since: datetime | None
    allow_metered: bool
    asked_by: str
    created_at: datetime
    expires_at: datetime
    deliveries: tuple[DeliveryView, ...]


class SamplePullsView(_View):
    pulls: tuple[SamplePullView, ...]


class PulledSampleView(_View):
    agent: str
    digest: str
    size_bytes: int


class SamplePullDetailView(_View):
    revision: int
    """Grows whenever something changes; give it as `after` to wait for that."""
    pull: SamplePullView
    samples: tuple[PulledSampleView, ...]
    """What is here to be fetched, in the order in which it came: at most 500 from `start` on."""


class SampleCountView(_View):
    agent: str
    is_online: bool
    model: str
    label: int | None
    """The class that the edge model predicted; None: its outputs named none."""
    reason: str
    samples: int


class SampleCountsView(_View):
    counts: tuple[SampleCountView, ...]
    """What agents last said that they keep, since this controller started; at most 64 rows of each."""
    other: int
    """Samples beyond those rows."""
    size_bytes: int
