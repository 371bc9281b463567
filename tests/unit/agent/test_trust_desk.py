"""TrustDesk: every push is verified first, the newest overtakes, and what could not be verified is tried again."""

import asyncio
from collections.abc import Collection, Mapping
from contextlib import suppress
from dataclasses import replace
from datetime import UTC, datetime, timedelta

import pytest

from core.digest import Digest
from core.errors import Conflict, ErrorCode, NanofleetError, Unavailable, Untrusted
from core.fleet_state import NOWHERE, DesiredState, Position, PushResult, SignedAssignment
from core.fleet_wire import encode_desired
from core.ids import AgentId
from edge_agent.trust.desk import TrustDesk
from edge_agent.trust.gate import Admitted, decoded
from edge_agent.trust.terms import ManifestTerms
from tests.support.variants import made_variant

AGENT = AgentId("gate-1")
NOW = datetime(2026, 11, 1, tzinfo=UTC)
MADE = made_variant()
TERMS = {MADE.digest: ManifestTerms(100, 1, frozenset({"arch:x86_64"}))}


def signed_state(generation: int = 1, *, issued_at: datetime = NOW) -> SignedAssignment:
    desired = DesiredState(
        AGENT, Position(1, generation), issued_at, (MADE.slot,), expires_at=issued_at + timedelta(days=1)
    )
    return SignedAssignment(encode_desired(desired).SerializeToString(), b"", "")


class FakeGate:
    """Admits everything, or answers the next questions with `refusals`; waits while `opens` is clear."""

    def __init__(self) -> None:
        self.asked: list[SignedAssignment] = []
        self.refusals: list[NanofleetError] = []
        self.opens = asyncio.Event()
        self.opens.set()
        self.is_asked = asyncio.Event()

    async def admit(
        self, signed: SignedAssignment, *, agent_id: AgentId, tags: Collection[str], running: Collection[Digest]
    ) -> Admitted:
        self.asked.append(signed)
        self.is_asked.set()
        await self.opens.wait()
        if self.refusals:
            raise self.refusals.pop(0)
        return Admitted(decoded(signed), TERMS)


class FakeReconciler:
    """Applies at once, or when `answer` is set; `conflict` refuses."""

    def __init__(self) -> None:
        self.applied = NOWHERE
        self.answer: asyncio.Future[PushResult] | None = None
        self.submitted: list[DesiredState] = []
        self.conflict: Conflict | None = None
        self.is_submitted = asyncio.Event()

    def submit(self, desired: DesiredState) -> "asyncio.Future[PushResult]":
        if self.conflict is not None:
            raise self.conflict
        self.submitted.append(desired)
        self.is_submitted.set()
        if self.answer is not None:
            return self.answer
        answer: asyncio.Future[PushResult] = asyncio.get_running_loop().create_future()
        answer.set_result(PushResult(desired.position))
        return answer


class Admissions:
    def __init__(self) -> None:
        self.terms: list[Mapping[Digest, ManifestTerms]] = []

    def admit(self, terms: Mapping[Digest, ManifestTerms], *, running: Collection[Digest]) -> None:
        self.terms.append(terms)


class Office:
    """A desk and everything around it; `pause` holds the retries back until it is released."""

    def __init__(self) -> None:
        self.gate, self.reconciler, self.admissions = FakeGate(), FakeReconciler(), Admissions()
        self.pauses: asyncio.Queue[float] = asyncio.Queue()
        self.pause = asyncio.Semaphore(0)
        self.desk = TrustDesk(
            self.gate,
            self.reconciler,
            self.admissions,
            agent_id=AGENT,
            tags=["arch:x86_64"],
            in_force=tuple,
            uniform=lambda: 1.0,
            sleep=self._sleep,
        )

    async def _sleep(self, delay_s: float) -> None:
        self.pauses.put_nowait(delay_s)
        await self.pause.acquire()


@pytest.fixture
async def office() -> Office:
    return Office()


async def test_a_push_is_verified_then_submitted_then_answered(office: Office) -> None:
    assert await office.desk.push(signed_state()) == PushResult(Position(1, 1))
    assert [state.position for state in office.reconciler.submitted] == [Position(1, 1)]
    assert office.admissions.terms == [TERMS]


async def test_what_is_not_trusted_is_answered_and_never_submitted(office: Office) -> None:
    office.gate.refusals.append(Untrusted("the signature does not hold"))
    result = await office.desk.push(signed_state())
    assert result is not None
    assert result.problem is not None
    assert result.problem.code == ErrorCode.FORBIDDEN
    assert office.reconciler.submitted == []
    assert office.admissions.terms == []


async def test_what_does_not_parse_is_answered_without_a_position(office: Office) -> None:
    result = await office.desk.push(SignedAssignment(b"\xff", b"", ""))
    assert result is not None
    assert result.position == NOWHERE
    assert result.problem is not None
    assert result.problem.code == ErrorCode.INVALID_REQUEST
    assert office.gate.asked == []


async def test_a_newer_push_overtakes_a_verification_under_way(office: Office) -> None:
    office.gate.opens.clear()
    first = asyncio.create_task(office.desk.push(signed_state(1)))
    await office.gate.is_asked.wait()
    second = asyncio.create_task(office.desk.push(signed_state(2)))
    overtaken = await first
    assert overtaken is not None
    office.gate.opens.set()
    assert overtaken.problem is not None
    assert overtaken.problem.code == ErrorCode.CONFLICT
    assert await second == PushResult(Position(1, 2))
    assert [state.position for state in office.reconciler.submitted] == [Position(1, 2)]


async def test_a_push_whose_session_ends_is_not_submitted(office: Office) -> None:
    office.gate.opens.clear()
    push = asyncio.create_task(office.desk.push(signed_state()))
    await office.gate.is_asked.wait()
    push.cancel()
    with pytest.raises(asyncio.CancelledError):
        await push
    office.gate.opens.set()
    await asyncio.sleep(0)
    assert office.reconciler.submitted == []


async def test_what_the_reconciler_refuses_is_answered(office: Office) -> None:
    office.reconciler.conflict = Conflict("it is older")
    result = await office.desk.push(signed_state())
    assert result is not None
    assert result.problem is not None
    assert result.problem.message == "it is older"
    assert office.admissions.terms == []


async def test_without_metadata_it_is_answered_at_once_and_verified_again_by_itself(office: Office) -> None:
    office.gate.refusals += [Unavailable("away"), Unavailable("still away")]
    result = await office.desk.push(signed_state())
    assert result is not None
    assert result.problem is not None
    assert result.problem.code == ErrorCode.UNAVAILABLE
    retrying = asyncio.create_task(office.desk.run())
    delays_s = []
    for _ in range(2):
        delays_s.append(await office.pauses.get())
        office.pause.release()
    await office.reconciler.is_submitted.wait()
    assert delays_s == [2.0, 4.0]
    assert len(office.gate.asked) == 3
    await ended(retrying)


async def test_what_turns_out_untrusted_is_not_tried_again(office: Office) -> None:
    office.gate.refusals += [Unavailable("away"), Untrusted("no")]
    await office.desk.push(signed_state())
    retrying = asyncio.create_task(office.desk.run())
    office.pause.release()
    office.pause.release()
    while len(office.gate.asked) < 2:
        await asyncio.sleep(0)
    await office.desk.push(signed_state(2))
    assert [decoded(signed).position.generation for signed in office.gate.asked] == [1, 1, 2]
    assert [state.position.generation for state in office.reconciler.submitted] == [2]
    await ended(retrying)


async def test_a_newer_push_takes_the_place_of_what_waits_to_be_verified_again(office: Office) -> None:
    office.gate.refusals.append(Unavailable("away"))
    await office.desk.push(signed_state(1))
    retrying = asyncio.create_task(office.desk.run())
    await office.pauses.get()
    await office.desk.push(signed_state(2))
    office.pause.release()
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    assert [state.position.generation for state in office.reconciler.submitted] == [2]
    assert len(office.gate.asked) == 2
    await ended(retrying)


async def test_a_state_stated_anew_is_the_same_to_the_reconciler(office: Office) -> None:
    await office.desk.push(signed_state())
    await office.desk.push(signed_state(issued_at=NOW + timedelta(hours=1)))
    first, second = office.reconciler.submitted
    assert first == second


async def test_a_state_stated_anew_while_it_is_worked_on_waits_for_no_answer_of_its_own(office: Office) -> None:
    office.reconciler.answer = asyncio.get_running_loop().create_future()
    first = asyncio.create_task(office.desk.push(signed_state()))
    await office.reconciler.is_submitted.wait()
    async with asyncio.timeout(5):
        for hours in range(1, 21):
            assert await office.desk.push(signed_state(issued_at=NOW + timedelta(hours=hours))) is None
    under_way, office.reconciler.answer = office.reconciler.answer, None
    assert await office.desk.push(signed_state(2)) == PushResult(Position(1, 2))
    under_way.set_result(PushResult(Position(1, 1)))
    assert await first == PushResult(Position(1, 1))


async def test_a_state_stated_anew_to_the_next_session_is_answered_there(office: Office) -> None:
    office.reconciler.answer = asyncio.get_running_loop().create_future()
    first = asyncio.create_task(office.desk.push(signed_state()))
    await office.reconciler.is_submitted.wait()
    await ended(first)
    second = asyncio.create_task(office.desk.push(signed_state(issued_at=NOW + timedelta(hours=1))))
    office.reconciler.answer.set_result(PushResult(Position(1, 1)))
    assert await second == PushResult(Position(1, 1))


async def test_an_applied_state_stated_anew_is_applied(office: Office) -> None:
    office.reconciler.applied = Position(1, 1)
    assert await office.desk.push(signed_state()) == PushResult(Position(1, 1))
    assert office.reconciler.submitted == []


async def test_an_admitted_state_that_is_refused_when_stated_anew_is_admitted_no_more(office: Office) -> None:
    await office.desk.push(signed_state())
    office.gate.refusals.append(Untrusted("withdrawn"))
    await office.desk.push(signed_state(issued_at=NOW + timedelta(hours=1)))
    assert office.admissions.terms == [TERMS, {}]


async def test_another_state_that_is_refused_leaves_the_admitted_one(office: Office) -> None:
    await office.desk.push(signed_state())
    office.gate.refusals.append(Untrusted("forged"))
    await office.desk.push(replace(signed_state(2)))
    assert office.admissions.terms == [TERMS]


async def ended(task: "asyncio.Task[PushResult | None] | asyncio.Task[None]") -> None:
    task.cancel()
    with suppress(asyncio.CancelledError):
        await task
