"""How gRPC is set up on both ends: message bounds, keepalive, credentials.

Credentials come from the composition roots. Between machines both ends show a certificate of the fleet's authority
(`TlsIdentity`). On an agent's local face, bound to loopback, `TransportCredentials.local()` proves only that the peer
is on this machine: gRPC itself refuses any other.
"""

from dataclasses import dataclass

import grpc
import grpc.aio

from core.addresses import Address
from core.spiffe import CONTROLLER_DNS_NAME

# Bound on one message in either direction: a request body of 16 MiB and its envelope.
MAX_MESSAGE_BYTES = 17 << 20
# Chosen: what a peer may send ahead of being read, per call: 40 MB/s over a link with a round trip of 50 ms. Left to
# itself gRPC announces 4 MiB and probes for more; whoever is granted more first is then served faster than the others:
# of 50 agents that fetch at once the slowest takes up to 1.9 times as long as the fastest, not 1.3 (measured,
# benchmarks.fetch). The price: one reply of 16 MiB over such a link takes 0.4 s, not 0.1 to 0.2 s (measured).
RECEIVE_WINDOW_BYTES = 2 << 20
# Chosen from 60 to 120 s: long enough for metered links, short enough for common NAT timeouts.
KEEPALIVE_S = 90

_BOUNDS = [
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
]
CHANNEL_OPTIONS = [
    *_BOUNDS,
    ("grpc.http2.bdp_probe", 0),
    ("grpc.http2.lookahead_bytes", RECEIVE_WINDOW_BYTES),
    ("grpc.keepalive_time_ms", KEEPALIVE_S * 1000),
    ("grpc.keepalive_timeout_ms", 20_000),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.max_pings_without_data", 0),
    # Reconnect pace is the link's decision; the channel itself must not wait up to two minutes.
    ("grpc.initial_reconnect_backoff_ms", 200),
    # To gRPC this is also the time that an attempt has to connect. Mobile links take seconds for TLS, and so does a
    # controller that comes back to thousands; giving up sooner only makes it shake hands again.
    ("grpc.min_reconnect_backoff_ms", 20_000),
    ("grpc.max_reconnect_backoff_ms", 2_000),
]
SERVER_OPTIONS = [
    *_BOUNDS,
    # Half the client's keepalive, or the server would close well-behaved clients with "too many pings".
    ("grpc.http2.min_recv_ping_interval_without_data_ms", KEEPALIVE_S * 500),
    ("grpc.keepalive_permit_without_calls", 1),
    # Two servers on one port would share it silently.
    ("grpc.so_reuseport", 0),
]


@dataclass(frozen=True, slots=True)
class TransportCredentials:
    """What a process shows to its gRPC peers, and what it asks of them."""

    channel: grpc.ChannelCredentials
    server: grpc.ServerCredentials

    @classmethod
    def local(cls) -> "TransportCredentials":
        return cls(grpc.local_channel_credentials(), grpc.local_server_credentials())


@dataclass(frozen=True, slots=True)
class TlsIdentity:
    """What a process of the fleet proves its identity with, and whom it believes; all three in PEM."""

    certificate_chain: bytes
    private_key: bytes
    trust_bundle: bytes

    def channel_credentials(self) -> grpc.ChannelCredentials:
        return grpc.ssl_channel_credentials(self.trust_bundle, self.private_key, self.certificate_chain)


# For channels with the credentials of a TlsIdentity: agents dial any address, and the peer must be the controller.
MUTUAL_TLS_OPTIONS = [("grpc.ssl_target_name_override", CONTROLLER_DNS_NAME)]


def open_channel(target: Address, credentials: TransportCredentials | TlsIdentity) -> grpc.aio.Channel:
    """Return the one channel to `target` that this process keeps for its life; the caller closes it.

    With a TlsIdentity the peer must be the fleet's controller, whatever its address.
    """
    if isinstance(credentials, TlsIdentity):
        options = [*CHANNEL_OPTIONS, *MUTUAL_TLS_OPTIONS]
        return grpc.aio.secure_channel(str(target), credentials.channel_credentials(), options=options)
    return grpc.aio.secure_channel(str(target), credentials.channel, options=CHANNEL_OPTIONS)
