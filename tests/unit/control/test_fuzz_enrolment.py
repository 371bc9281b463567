"""Whatever bytes come to the enrolment port, they are answered or refused: never a defect, never a change."""

import asyncio
from collections.abc import Awaitable, Callable, Iterator, Mapping
from itertools import count
from pathlib import Path
from typing import Any

import grpc
import pytest
from hypothesis import given
from hypothesis import strategies as st

from controller.api.enrolment_grpc import EnrolmentServicer
from controller.identity.authority import new_key
from controller.identity.keys import AuthorityKeys
from controller.identity.renewal import NONCE_BYTES
from controller.identity.service import Identity
from core.ids import AgentId
from protos.identity.v1 import identity_pb2 as pb
from tests.support.fleet_values import NORTH, HeldClock
from tests.support.fuzzed import Aborted, OneCall, nearly
from tests.support.identity_store import MemoryIdentityStore
from tests.support.open_inference_strategies import PATIENT
from tests.support.trusted_controller import DOMAIN, Root, made_csr

CSR = made_csr(new_key())
REFUSALS = {
    grpc.StatusCode.INVALID_ARGUMENT,
    grpc.StatusCode.PERMISSION_DENIED,
    grpc.StatusCode.NOT_FOUND,
    grpc.StatusCode.RESOURCE_EXHAUSTED,
}
MAX_DETAILS_CHARS = 1000
ENROLS = (
    pb.EnrolRequest(secret=bytes(32), csr=CSR, wanted_id="cam-1"),
    pb.EnrolRequest(secret=bytes(32), root_sha256=bytes(32)),
)
RENEWS = (
    pb.RenewRequest(agent_id="cam-1", nonce=bytes(NONCE_BYTES), csr=CSR, signature=bytes(70)),
    pb.RenewRequest(agent_id="cam-1"),
)
CHALLENGES = (pb.ChallengeRequest(agent_id="cam-1"),)


class Methods:
    """Stands where the server would be, and keeps what is registered."""

    def __init__(self) -> None:
        self.handlers: Mapping[str, Any] = {}

    def add_registered_method_handlers(self, _service: str, handlers: Mapping[str, Any]) -> None:
        self.handlers = handlers


class Door:
    """The servicer over an identity in memory; every call comes a second later and from another address."""

    def __init__(self, folder: Path, runner: asyncio.Runner) -> None:
        self._runner = runner
        self._clock = HeldClock()
        self._callers = count()
        store = MemoryIdentityStore()
        self.identity = Identity(store, AuthorityKeys(folder), clock=self._clock, trust_domain=DOMAIN)
        self.run(self.identity.prepare)
        self.run(lambda: self.identity.create_token(NORTH, created_by="ada", agent=AgentId("cam-1")))
        methods = Methods()
        EnrolmentServicer(self.identity, Root(), clock=self._clock).add_to(methods)  # type: ignore[arg-type]  # a fake
        self._handlers = methods.handlers

    def run(self, work: Callable[[], Awaitable[object]]) -> object:
        async def working() -> object:
            return await work()

        return self._runner.run(working())

    def call(self, method: str, content: bytes) -> OneCall:
        self._clock.advance(1.0)
        context = OneCall(content, peer=f"ipv4:192.0.2.{next(self._callers) % 256}:5000")

        async def calling() -> None:
            try:
                await self._handlers[method].stream_unary(None, context)
            except Aborted:
                return

        self._runner.run(calling())
        return context


@pytest.fixture(scope="module")
def door(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Door]:
    with asyncio.Runner() as runner:
        yield Door(tmp_path_factory.mktemp("keys"), runner)


@PATIENT
@given(content=nearly(ENROLS))
def test_bytes_for_enrol_are_refused_and_enrol_nobody(door: Door, content: bytes) -> None:
    call = door.call("Enrol", content)

    assert call.code in REFUSALS, call.details
    assert len(call.details) < MAX_DETAILS_CHARS
    assert door.run(door.identity.identities) == []


@PATIENT
@given(content=nearly(RENEWS))
def test_bytes_for_renew_are_refused(door: Door, content: bytes) -> None:
    call = door.call("Renew", content)

    assert call.code in REFUSALS, call.details
    assert len(call.details) < MAX_DETAILS_CHARS


@PATIENT
@given(
    content=nearly(CHALLENGES) | st.text().map(lambda name: pb.ChallengeRequest(agent_id=name[:50]).SerializeToString())
)
def test_bytes_for_a_challenge_are_answered_or_refused(door: Door, content: bytes) -> None:
    call = door.call("Challenge", content)

    assert call.code in REFUSALS | {grpc.StatusCode.OK}, call.details
    assert len(call.details) < MAX_DETAILS_CHARS
