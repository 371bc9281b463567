"""The token that lets one agent in: a secret, what to trust, and where to go, in one string without white space.

Whoever holds it may enrol once, so it is shown once and sent like a password. It pins the controller: the agent talks
only to a peer whose certificate chains to the authority with `authority_sha256`, and believes only a catalogue that
starts at the root with `root_sha256`; a stolen controller cannot hand out another.
"""

import base64
import binascii
from dataclasses import dataclass

import orjson

from core.addresses import Address, parse_address
from core.errors import InvalidRequest

PREFIX = "nft1."
SECRET_BYTES = 32
# Derived: three digests, two addresses with host names of 255 characters and a domain, in base64.
MAX_TOKEN_CHARS = 2048


@dataclass(frozen=True, slots=True)
class EnrolmentToken:
    """`controller` is the address for everything after enrolment, `enrolment` the one for enrolling and renewing."""

    secret: bytes
    authority_sha256: bytes
    root_sha256: bytes
    trust_domain: str
    controller: Address
    enrolment: Address

    def __str__(self) -> str:
        body = {
            "secret": _text(self.secret),
            "authority": _text(self.authority_sha256),
            "root": _text(self.root_sha256),
            "domain": self.trust_domain,
            "controller": str(self.controller),
            "enrolment": str(self.enrolment),
        }
        return PREFIX + _text(orjson.dumps(body))


def parse_token(text: str) -> EnrolmentToken:
    """Return the token in `text`.

    Raises:
        InvalidRequest: it is not a whole enrolment token.
    """
    if not text.startswith(PREFIX) or len(text) > MAX_TOKEN_CHARS:
        raise InvalidRequest(f"token: expected one that starts with {PREFIX}, as `nanofleet devices token` prints it")
    try:
        body = orjson.loads(_bytes(text.removeprefix(PREFIX)))
        token = EnrolmentToken(
            _bytes(body["secret"]),
            _bytes(body["authority"]),
            _bytes(body["root"]),
            str(body["domain"]),
            parse_address(body["controller"]),
            parse_address(body["enrolment"]),
        )
    except (ValueError, KeyError, TypeError, InvalidRequest) as error:
        raise InvalidRequest("token: a part of it is missing or changed; copy it whole, or make another") from error
    if {len(token.secret), len(token.authority_sha256), len(token.root_sha256)} != {SECRET_BYTES}:
        raise InvalidRequest("token: a part of it has another length; copy it whole, or make another")
    return token


def _text(content: bytes) -> str:
    return base64.urlsafe_b64encode(content).rstrip(b"=").decode()


def _bytes(text: str) -> bytes:
    try:
        return base64.b64decode(text + "=" * (-len(text) % 4), altchars=b"-_", validate=True)
    except binascii.Error as error:
        raise ValueError(str(error)) from error
