"""The topics of one agent (wire contract, section 2.1).

    nf/v1/{site}/infer/{agent}/{model}                  a request over MQTT 5, where everybody is trusted
    nf/v1/{site}/infer/{agent}/{model}/{client}         a request over MQTT 5 that says who asks
    nf/v1/{site}/infer/{agent}/{model}/{client}/{id}    a request over MQTT 3.1.1
    nf/v1/{site}/clients/{client}/replies[/…]           where its replies go
    nf/v1/{site}/agents/{agent}/status                  what the agent says of itself, retained

`any` in the agent's place is whichever agent of the site takes it. Every identity is one whole segment made of the
alphabet of `core.ids`, so a topic from outside can neither climb out of a client's own subtree nor hold a wildcard. A
client that shows a certificate is called `{device}@{site}` (`core.broker_names`).

A broker with an access list lets a client publish only what has its own name in the topic; it does not see the Response
Topic. So where clients are not trusted (`requires_client`) a request must name its client in both, and the same one.
"""

from enum import Enum
from typing import NamedTuple, TypeVar

from core.broker_names import is_client_name
from core.errors import InvalidName, NanofleetError
from core.ids import ANY_AGENT, NAME_PATTERN, AgentId, SiteId, checked_name

PREFIX = "nf/v1"
SHARED_BY = "nf"
# Chosen: a reply topic with every segment at its longest.
_MAX_TOPIC_BYTES = 512
# Devices repeat their topics; looking them up is quicker than checking them anew. Chosen: well above a site's devices.
_MAX_REMEMBERED = 4096


_Value = TypeVar("_Value")


class DropCause(Enum):
    """Why a message is dropped without a reply: there is nobody whom we may answer."""

    MALFORMED_TOPIC = "malformed_topic"
    MISSING_RESPONSE_TOPIC = "missing_response_topic"
    FOREIGN_RESPONSE_TOPIC = "foreign_response_topic"
    UNNAMED_CLIENT = "unnamed_client"
    RETAINED = "retained"


class Undeliverable(NanofleetError):
    """A message that cannot be answered."""

    def __init__(self, cause: DropCause, message: str) -> None:
        super().__init__(message)
        self.cause = cause


class Target(NamedTuple):
    """What a request topic names; `client` not in the shortest form, `request_id` only in that of 3.1.1."""

    model: str
    client: str | None = None
    request_id: str | None = None


class Topics:
    def __init__(
        self, site: SiteId, agent: AgentId, *, requires_client: bool = False, shared_by: str = SHARED_BY
    ) -> None:
        self.status = f"{PREFIX}/{site}/agents/{agent}/status"
        self._site = site
        self._requires_client = requires_client
        self._shared_by = shared_by
        self._own = f"{PREFIX}/{site}/infer/{agent}/"
        self._any = f"{PREFIX}/{site}/infer/{ANY_AGENT}/"
        self._clients = f"{PREFIX}/{site}/clients/"
        self._targets: dict[bytes, Target] = {}
        self._clients_by_topic: dict[bytes, tuple[str, str]] = {}

    def filters(self, *, is_v5: bool) -> list[tuple[str, int]]:
        """Return what to subscribe to, and at which QoS.

        The 3.1.1 form carries no expiry, so the broker must not keep it for an agent that is away: QoS 0. `any` needs
        shared subscriptions, which only MQTT 5 has; without them every agent of the site would answer.
        """
        if not is_v5:
            return [(self._own + "+/+/+", 0)]
        shared = f"$share/{self._shared_by}/{self._any}"
        forms = [("+/+", 1), ("+/+/+", 0)]
        if not self._requires_client:
            forms.insert(0, ("+", 1))
        return [(base + form, qos) for base in (self._own, shared) for form, qos in forms]

    def target_of(self, topic: bytes) -> Target:
        """Return what a request's topic names.

        Raises:
            Undeliverable: it is of no form, or does not name a client that must be named.
        """
        target = self._targets.get(topic)
        if target is None:
            target = self._parse_target(topic)
            self._require_client(target.client)
            # Those with an id never come again.
            if target.request_id is None:
                _remember(self._targets, topic, target)
        return target

    def reply_topic_of(self, client: str, request_id: str) -> str:
        """Return where a 3.1.1 request is answered."""
        return f"{self._clients}{client}/replies/{request_id}"

    def client_of(self, response_topic: bytes) -> tuple[str, str]:
        """Return the client that an MQTT 5 Response Topic belongs to, and the topic as text.

        Raises:
            Undeliverable: it is not below `clients/{client}/replies` of this site.
        """
        found = self._clients_by_topic.get(response_topic)
        if found is None:
            found = self._parse_response_topic(response_topic)
            _remember(self._clients_by_topic, response_topic, found)
        return found

    def _require_client(self, client: str | None) -> None:
        """Let pass a client of this site, named or, where everybody is trusted, not."""
        if not self._requires_client:
            return
        _, at, site = (client or "").partition("@")
        # Not left to the filters: a session may hold those of earlier settings.
        if client is None or (at and site != self._site):
            raise Undeliverable(
                DropCause.UNNAMED_CLIENT,
                f"expected a topic {self._own}{{model}}/{{client}} that names a client of site {self._site}, "
                f"got the client {client}",
            )

    def _parse_target(self, topic: bytes) -> Target:
        try:
            text = topic.decode()
            base = next(base for base in (self._own, self._any) if text.startswith(base))
            model, *client_and_id = text.removeprefix(base).split("/")
            target = Target(checked_name(model), *client_and_id)
        except (UnicodeDecodeError, StopIteration, InvalidName, TypeError):
            target = None
        if target is None or not _is_well_formed(target):
            raise Undeliverable(
                DropCause.MALFORMED_TOPIC,
                f"expected a topic {self._own}{{model}}, {{model}}/{{client}} or {{model}}/{{client}}/{{id}}, "
                f"got {_shown(topic)}",
            )
        return target

    def _parse_response_topic(self, topic: bytes) -> tuple[str, str]:
        try:
            text = topic[: _MAX_TOPIC_BYTES + 1].decode()
            client, replies, *below = text.removeprefix(self._clients).split("/")
            is_well_formed = is_client_name(client) and all(checked_name(segment) for segment in below)
        except (ValueError, InvalidName):
            is_well_formed = False
        if (
            not is_well_formed
            or replies != "replies"
            or not text.startswith(self._clients)
            or len(topic) > _MAX_TOPIC_BYTES
        ):
            raise Undeliverable(
                DropCause.FOREIGN_RESPONSE_TOPIC,
                f"expected a response topic {self._clients}{{client}}/replies, got {topic[:160]!r}",
            )
        return client, text


def _shown(topic: bytes) -> str:
    """Return a topic of no form for the log, without what stands in the place of a request's id."""
    segments = topic.split(b"/", 7)
    return repr(b"/".join(segments[:7])[:160]) + ("/…" if len(segments) > 7 else "")


def template_of(topic: bytes) -> str:
    """Return the form of a request's topic, for spans."""
    forms = ("", "/{client}", "/{client}/{id}")
    return f"{PREFIX}/{{site}}/infer/{{agent}}/{{model}}{forms[min(topic.count(b'/') - 5, 2)]}"


def _is_well_formed(target: Target) -> bool:
    is_client = target.client is None or is_client_name(target.client)
    return is_client and (target.request_id is None or NAME_PATTERN.fullmatch(target.request_id) is not None)


def _remember(memory: dict[bytes, _Value], key: bytes, value: _Value) -> None:
    if len(memory) >= _MAX_REMEMBERED:
        memory.clear()
    memory[key] = value
