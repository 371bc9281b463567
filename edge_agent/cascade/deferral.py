"""Escalations that wait until the heavy tier is back: who keeps them, and how a verdict finds its way to the asker.

    plane ─take→ Deferrals (durable) ─…hours…→ heavy tier ─deliver→ VerdictSink (the face) → the client's reply

Whoever keeps them knows nothing of faces: the address of a reply is bytes that only the face reads, and it reads them
after a restart as well as before.
"""

from typing import Protocol

from core.open_inference.messages import InferRequest, InferResponse
from edge_agent.cascade.policy import Reason


class Deferrals(Protocol):
    """Keeps escalations for a heavy tier that is away."""

    def take(self, request: InferRequest, *, dedupe_id: str, reply_to: bytes) -> bool:
        """Keep `request`, which is the one for the heavy tier; False: there is no room, it was not kept.

        Never called for data that may not leave the device or the site. One that is kept already under the same
        `dedupe_id` counts as taken. `reply_to` is what `VerdictSink.deliver` wants to have.
        """
        ...


class VerdictSink(Protocol):
    """A face that sends verdicts which come late; `front.mqtt.front.MqttFront` is one."""

    def deliver(self, reply_to: bytes, response: InferResponse) -> None:
        """Send the heavy tier's verdict to the one that `reply_to` names; never raises.

        An address that does not parse, for example because this agent belongs to another site now, is counted and
        dropped: nobody could be answered there.
        """
        ...


class Mailbox(Protocol):
    """Where the asker of one request takes more than one reply; a face without such a place has none."""

    def dedupe_id(self) -> str:
        """Return what tells this request from all others of the fleet."""
        ...

    def reply_to(self, reason: Reason, confidence: float | None) -> bytes | None:
        """Return where the verdict is to go, for `VerdictSink.deliver`; None: it has no durable form.

        `reason` and `confidence` say why the heavy tier is asked, as the reply will.
        """
        ...
