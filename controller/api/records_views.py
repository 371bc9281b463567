"""The bodies of agents' records, as the client and the server both know them; as light as `operator_views`."""

from datetime import date, datetime
from typing import Literal

from pydantic import BaseModel, ConfigDict

PerText = Literal["model", "agent", "both", "fleet"]


class _View(BaseModel):
    model_config = ConfigDict(frozen=True, extra="ignore", use_attribute_docstrings=True)


class DayUsageView(_View):
    day: date
    """In UTC."""
    agent: str | None
    """null: all of them."""
    model: str | None
    """null: all of them; empty: requests for models that were not there."""
    answered_edge: int
    answered_heavy: int
    refused: int
    failed: int


class UsageReportView(_View):
    days: tuple[DayUsageView, ...]
    """The newest first."""


class AgentEventView(_View):
    id: int
    at: datetime
    """When it happened, as far as the agent's clock is believed."""
    received_at: datetime
    action: str
    """Noun and verb, such as `variant.rolled_back`."""
    target: str
    detail: str
    count: int
    """How many times, where several are told as one."""


class AgentEventsView(_View):
    events: tuple[AgentEventView, ...]
    """The newest first."""
    next: int | None
    """`before` of the page of older events; null: there are none."""
