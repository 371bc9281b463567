"""The file that says what this agent runs, so that a restart needs nobody: the bytes and their meaning.

First line: the digest of everything after it. Then JSON: the state in force and the one before it, each in the JSON
form of its protobuf message, so that reading checks names, digests and bounds like a push from the controller.
"""

from dataclasses import dataclass

import orjson
from google.protobuf import json_format

from core.digest import digest_of
from core.errors import IntegrityError, InvalidRequest
from core.fleet_state import DesiredState
from core.fleet_wire import decode_desired, encode_desired
from protos.fleet.v1 import fleet_pb2 as pb


@dataclass(frozen=True, slots=True)
class ActiveStates:
    current: DesiredState
    previous: DesiredState | None


def encode_active(states: ActiveStates) -> bytes:
    previous = states.previous
    body = orjson.dumps(
        {
            "current": _to_json(states.current),
            "previous": None if previous is None else _to_json(previous),
        }
    )
    return f"{digest_of(body)}\n".encode() + body


def decode_active(content: bytes) -> ActiveStates:
    """Return the states in `content`.

    Raises:
        IntegrityError: truncated or changed since it was written.
        InvalidRequest: whole, but not a state that this version understands.
    """
    checksum, _, body = content.partition(b"\n")
    if checksum != digest_of(body).encode():
        raise IntegrityError(f"active state: expected {digest_of(body)}, got {checksum[:80]!r} over {len(body)} bytes")
    try:
        document = orjson.loads(body)
        previous = document["previous"]
        return ActiveStates(_from_json(document["current"]), None if previous is None else _from_json(previous))
    except (ValueError, KeyError, TypeError, json_format.ParseError) as error:
        raise InvalidRequest(f"active state: expected current and previous, got {error!r}") from error


def _to_json(state: DesiredState) -> object:
    return json_format.MessageToDict(encode_desired(state))


def _from_json(document: dict[str, object]) -> DesiredState:
    return decode_desired(json_format.ParseDict(document, pb.DesiredState()))
