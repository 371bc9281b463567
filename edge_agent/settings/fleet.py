"""The controller's side of an agent: the link, deliveries, and how a model comes into force."""

from typing import Annotated

from pydantic import Field

from core.settings import Count, Ratio, Seconds, Section
from edge_agent.settings.kinds import SecondsOrZero


class LinkSettings(Section):
    """The stream to the controller."""

    reconnect_base_s: Seconds = 1.0
    """Base of the full-jitter delay between connection attempts."""
    reconnect_cap_s: Seconds = 120.0
    """Longest delay between connection attempts."""
    first_delay_s: SecondsOrZero = 1.0
    """Upper bound of the random delay before the first connection, so that a power cut's end makes no stampede."""
    handshake_timeout_s: Seconds = 10.0
    """Seconds that the controller may take to answer the hello."""
    write_timeout_s: Seconds = 20.0
    """Seconds that the controller may take to accept one message."""


class SyncSettings(Section):
    """Fetching models from the controller."""

    chunk_timeout_s: Seconds = 120.0
    """Seconds without a word after which a transfer is given up, to be resumed later.

    A chunk of up to 1 MiB counts once it is here as a whole: within the default a link of 70 kbit/s brings it. Less
    notices sooner that a controller is stuck; a link that is down is noticed by pings.
    """
    reserve_bytes: Annotated[int, Field(ge=0)] = 64 << 20
    """Disk space that a fetch must leave free."""
    max_attempts: Count = 5
    """Attempts on a slot whose failures may pass before the push is answered with the problem; they go on after it."""
    retry_base_s: Seconds = 0.5
    """Base of the full-jitter delay between those attempts."""
    retry_cap_s: Seconds = 30.0
    """Longest delay between those attempts, and the pace of those after them."""


class ActivationSettings(Section):
    """Between a model's first request and the word that it stays."""

    probation_s: SecondsOrZero = 600.0
    """Seconds that a new model serves while the one before it is kept at hand."""
    probation_requests: Count = 1000
    """Requests that end the probation earlier."""
    max_error_ratio: Ratio = 0.05
    """Share of failed requests above which a model on probation is rolled back."""
    self_test_timeout_s: Seconds = 60.0
    """Seconds that the self-test of a variant may take."""
