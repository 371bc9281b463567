"""Bytes that a hostile peer sends, and an end of a call that takes note of how it is answered."""

from collections.abc import Sequence
from typing import Never

import grpc
from google.protobuf.message import Message
from hypothesis import strategies as st


class Aborted(Exception):
    """The servicer ended the call."""


class OneCall:
    """A servicer's context: one message in, what is written and how it ended out."""

    def __init__(self, content: bytes = b"", *, peer: str = "ipv4:192.0.2.1:5000") -> None:
        self._content: bytes | None = content
        self._peer = peer
        self.code = grpc.StatusCode.OK
        self.details = ""
        self.written: list[object] = []

    def peer(self) -> str:
        return self._peer

    async def read(self) -> object:
        content, self._content = self._content, None
        return content

    async def write(self, message: object) -> None:
        self.written.append(message)

    async def abort(self, code: grpc.StatusCode, details: str = "") -> Never:
        self.code, self.details = code, details
        raise Aborted


@st.composite
def nearly(draw: st.DrawFn, genuine: Sequence[Message]) -> bytes:
    """Return one of `genuine` in its wire form with a few bytes changed, left out or put in; or bytes of no form."""
    if draw(st.booleans()):
        return draw(st.binary(max_size=300))
    content = bytearray(draw(st.sampled_from(genuine)).SerializeToString())
    for _ in range(draw(st.integers(0, 4))):
        at = draw(st.integers(0, len(content)))
        content[at : at + draw(st.integers(0, 3))] = draw(st.binary(max_size=4))
    return bytes(content)
