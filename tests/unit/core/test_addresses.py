"""Addresses: host and port, and for what is bound, this machine only."""

import pytest
from pydantic import TypeAdapter, ValidationError

from core.addresses import Address, LoopbackAddress, is_loopback, parse_address
from core.errors import InvalidRequest

LOOPBACK = TypeAdapter(LoopbackAddress)


@pytest.mark.parametrize(
    ("text", "address"),
    [
        ("127.0.0.1:7443", Address("127.0.0.1", 7443)), ("localhost:0", Address("localhost", 0)),
        ("[::1]:65535", Address("::1", 65535)), ("edge-1.example:80", Address("edge-1.example", 80)),
    ],
)  # fmt: skip
def test_an_address_is_read_and_written_in_one_form(text: str, address: Address) -> None:
    assert parse_address(text) == address
    assert str(address) == text


@pytest.mark.parametrize(
    "text",
    [
        "", ":80", "host", "host:", "host:x", "host:-1", "host:65536", "host:" + "9" * 5000, "host:٤٢", "::1:80",
        "[::1]", "[[::1]]:80", "[host]:80x", "http://host:80", "a b:80", "host:80\n", "host:80/path",
    ],
)  # fmt: skip
def test_any_other_form_is_refused(text: str) -> None:
    with pytest.raises(InvalidRequest, match="expected host:port"):
        parse_address(text)


@pytest.mark.parametrize("host", ["127.0.0.1", "127.8.9.1", "::1", "localhost"])
def test_loopback_hosts_are_known(host: str) -> None:
    assert is_loopback(host)


@pytest.mark.parametrize(
    "text", ["0.0.0.0:80", "192.168.0.1:80", "[::]:80", "localhost.example:80", "127.1:80", "nonsense"]
)
def test_a_bind_address_that_others_can_reach_is_refused(text: str) -> None:
    with pytest.raises(ValidationError):
        LOOPBACK.validate_python(text)


@pytest.mark.parametrize("text", ["127.0.0.1:0", "[::1]:80", "localhost:80"])
def test_a_bind_address_on_loopback_is_kept_as_written(text: str) -> None:
    assert LOOPBACK.validate_python(text) == text
