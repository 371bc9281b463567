"""What both ends of gRPC are set up with must fit together."""

import grpc

from core.addresses import Address
from core.grpc_transport import CHANNEL_OPTIONS, MAX_MESSAGE_BYTES, SERVER_OPTIONS, TransportCredentials, open_channel
from core.open_inference.messages import DEFAULT_LIMITS


def test_both_ends_take_the_largest_body_and_state_the_same_bound() -> None:
    assert DEFAULT_LIMITS.max_body_bytes < MAX_MESSAGE_BYTES
    for options in (dict(CHANNEL_OPTIONS), dict(SERVER_OPTIONS)):
        assert options["grpc.max_receive_message_length"] == MAX_MESSAGE_BYTES
        assert options["grpc.max_send_message_length"] == MAX_MESSAGE_BYTES


def test_the_server_allows_twice_the_clients_keepalive() -> None:
    client, server = dict(CHANNEL_OPTIONS), dict(SERVER_OPTIONS)
    allowed_ms = server["grpc.http2.min_recv_ping_interval_without_data_ms"]
    assert allowed_ms * 2 <= client["grpc.keepalive_time_ms"]
    assert server["grpc.keepalive_permit_without_calls"] == 1


def test_two_servers_cannot_share_a_port_unnoticed() -> None:
    assert dict(SERVER_OPTIONS)["grpc.so_reuseport"] == 0


async def test_a_channel_opens_without_a_peer_and_closes() -> None:
    channel = open_channel(Address("127.0.0.1", 1), TransportCredentials.local())
    assert channel.get_state() is grpc.ChannelConnectivity.IDLE
    await channel.close()
    assert channel.get_state() is grpc.ChannelConnectivity.SHUTDOWN
