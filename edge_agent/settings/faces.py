"""Who may ask this agent, and how: over the broker, and over faces of its own."""

from typing import Annotated, Literal, Self

from pydantic import BeforeValidator, Field, model_validator

from core.addresses import is_loopback
from core.ids import Name
from core.settings import Count, Port, Seconds, Section
from edge_agent.settings.kinds import Bytes, OptionalName, OptionalPath, none_when_empty


class MqttTlsSettings(Section):
    """How this agent and its broker prove to each other who they are."""

    enabled: bool = False
    """True: TLS with the agent's own certificate; needed on every host but loopback."""
    ca_file: OptionalPath = None
    """Authorities that may vouch for the broker, in PEM; those of the fleet when it is not set."""
    server_name: OptionalName = None
    """The name or address that the broker's certificate must be for; `host` when it is not set."""


class MqttSettings(Section):
    """The broker through which devices reach this agent."""

    enabled: bool = True
    """False: no broker; requests come over the local gRPC face only."""
    host: Annotated[str, Field(min_length=1, max_length=253)] = "127.0.0.1"
    """Where the broker listens; without TLS on loopback only."""
    port: Port = 1883
    """Port of the broker; 8883 is the usual one for TLS."""
    tls: MqttTlsSettings = MqttTlsSettings()
    """How this agent and its broker prove to each other who they are."""
    require_client_topic: Annotated[bool | None, BeforeValidator(none_when_empty)] = None
    """True: only requests whose topic names the client that asks, which the broker's access list vouches for.

    When it is not set: with TLS yes, without it no. Set it where devices reach the same broker over TLS.
    """
    share_group: Name = "nf"
    """Under which name the agents of a site share requests to `any`; the same for all of them.

    Whoever joins the group takes requests from the others, though a broker with our access list lets nobody else read
    them: where devices are not trusted, make it a word that they do not know.
    """
    protocol: Literal[5, 4] = 5
    """MQTT version towards the broker: 5, or 4 for a broker that speaks 3.1.1 only."""
    keepalive_s: Annotated[int, Field(ge=5, le=3600)] = 30
    """Seconds of silence after which either end takes the connection for dead (times 1.5)."""
    reconnect_base_s: Seconds = 0.5
    """Base of the full-jitter delay between attempts to reach the broker."""
    reconnect_cap_s: Seconds = 15.0
    """Longest delay between attempts to reach the broker."""
    max_in_flight: Count = 512
    """Requests from devices under way at one time; more are refused with status 429."""
    max_body_bytes: Bytes = 4 << 20
    """Largest request body; larger ones are refused with status 413."""
    remembered_replies: Count = 4096
    """Replies kept until their request expires, to answer redeliveries without running the model again."""
    remembered_bytes: Bytes = 16 << 20
    """Memory that the remembered replies may take."""
    verdict_expiry_s: Seconds = 3600.0
    """How long the broker keeps the reply to a deferred escalation for a client that is away when it comes."""

    @model_validator(mode="after")
    def _tls_beyond_loopback(self) -> Self:
        if not self.tls.enabled and not is_loopback(self.host):
            raise ValueError(
                f"host: expected a loopback host such as 127.0.0.1 without TLS, got {self.host!r}; "
                "set [mqtt.tls] enabled = true"
            )
        return self

    @property
    def requires_client(self) -> bool:
        """Whether a request must name its client in its topic."""
        return self.tls.enabled if self.require_client_topic is None else self.require_client_topic


class FacesSettings(Section):
    """The agent's own faces, for programs beside it: Open Inference over HTTP (`http_bind`) and gRPC (`grpc_bind`)."""

    tls: bool = False
    """True: both speak TLS only, with the agent's certificate, to devices and applications that show one of the fleet.

    Needed to bind them beyond loopback.
    """
