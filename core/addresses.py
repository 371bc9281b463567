"""Where a part listens or dials: `host:port`, loopback only until peers prove who they are."""

import ipaddress
import re
from dataclasses import dataclass
from typing import Annotated

from pydantic import AfterValidator

from core.errors import InvalidRequest

# An IPv6 address stands in brackets, or its last group would be taken for a port.
_PATTERN = re.compile(r"(?:\[([0-9A-Fa-f:.]+)\]|([A-Za-z0-9._-]+)):([0-9]{1,5})")


@dataclass(frozen=True, slots=True)
class Address:
    host: str
    port: int

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


def parse_address(text: str) -> Address:
    """Return `host:port` or `[ipv6]:port` as an Address.

    Raises:
        InvalidRequest: it is not of that form, or the port is outside 0..65535.
    """
    match = _PATTERN.fullmatch(text)
    if match is None or int(match[3]) > 65535:
        raise InvalidRequest(f"expected host:port or [ipv6]:port with a port of 0 to 65535, got {text[:80]!r}")
    return Address(match[1] or match[2], int(match[3]))


def is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _parsed(text: str) -> str:
    try:
        parse_address(text)
    except InvalidRequest as error:
        raise ValueError(str(error)) from error
    return text


def _loopback(text: str) -> str:
    try:
        address = parse_address(text)
    except InvalidRequest as error:
        raise ValueError(str(error)) from error
    if not is_loopback(address.host):
        raise ValueError(
            f"expected a loopback address such as 127.0.0.1:{address.port}, got {text!r}: "
            "other addresses are refused as long as peers do not authenticate"
        )
    return text


# For settings: a bind address that nobody outside this machine can reach.
LoopbackAddress = Annotated[str, AfterValidator(_loopback)]
# One that may be reached from elsewhere, for ports where peers prove who they are.
BindAddress = Annotated[str, AfterValidator(_parsed)]
