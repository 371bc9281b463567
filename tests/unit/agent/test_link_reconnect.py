"""Link: when the next connection is made."""

import asyncio
from collections.abc import Callable
from datetime import UTC, datetime, timedelta

import pytest

from core.errors import Forbidden, NanofleetError, Unavailable, Untrusted
from edge_agent.link.reconnect import Link, ReconnectPolicy
from edge_agent.link.session import Replaced, SessionEnded, SessionState

START = datetime(2026, 1, 2, tzinfo=UTC)
AWAY = SessionEnded(Unavailable("connection refused"))


class HandClock:
    """A clock that moves when someone sleeps."""

    def __init__(self) -> None:
        self.at_s = 0.0
        self.slept: list[float] = []

    def now(self) -> datetime:
        return START + timedelta(seconds=self.at_s)

    def monotonic_s(self) -> float:
        return self.at_s

    async def sleep(self, delay_s: float) -> None:
        self.slept.append(delay_s)
        self.at_s += delay_s


class Attempt:
    """One connection of the script: open for `open_s`, or refused at once when None."""

    def __init__(self, ended: SessionEnded = AWAY, *, open_s: float | None = None) -> None:
        self.ended = ended
        self.open_s = open_s


class ScriptedSession:
    def __init__(self, attempt: Attempt, clock: HandClock, on_state: Callable[[SessionState], None]) -> None:
        self._attempt, self._clock, self._on_state = attempt, clock, on_state

    async def run(self) -> None:
        self._on_state(SessionState.CONNECTING)
        if self._attempt.open_s is not None:
            self._on_state(SessionState.OPEN)
            self._clock.at_s += self._attempt.open_s
        self._on_state(SessionState.CLOSED)
        raise self._attempt.ended


async def played(
    *attempts: Attempt, uniform: float = 1.0, policy: ReconnectPolicy | None = None
) -> tuple[HandClock, Link]:
    """Play the attempts to their end and return the clock, which holds the delays."""
    clock, script = HandClock(), list(attempts)
    over = asyncio.Event()

    def connect(on_state: Callable[[SessionState], None]) -> ScriptedSession:
        return ScriptedSession(script.pop(0), clock, on_state)

    async def sleep(delay_s: float) -> None:
        await clock.sleep(delay_s)
        if not script:
            over.set()
            await asyncio.Event().wait()

    link = Link(
        connect,
        policy=policy or ReconnectPolicy(base_s=1, cap_s=120, first_delay_s=5),
        clock=clock,
        uniform=lambda: uniform,
        sleep=sleep,
    )
    task = asyncio.create_task(link.run())
    await over.wait()
    task.cancel()
    return clock, link


async def test_the_first_connection_waits_a_random_part_of_the_first_delay() -> None:
    clock, _ = await played(Attempt(), uniform=0.5)
    assert clock.slept[0] == 2.5


async def test_delays_double_up_to_the_cap() -> None:
    clock, _ = await played(*[Attempt()] * 9)
    assert clock.slept[1:] == [1, 2, 4, 8, 16, 32, 64, 120, 120]


async def test_delays_have_full_jitter() -> None:
    clock, _ = await played(*[Attempt()] * 3, uniform=0.25)
    assert clock.slept[1:] == [0.25, 0.5, 1.0]


async def test_a_connection_that_held_starts_a_new_series() -> None:
    clock, _ = await played(Attempt(), Attempt(), Attempt(open_s=60))
    assert clock.slept[1:] == [1, 2, 1]


async def test_a_connection_that_breaks_at_once_does_not() -> None:
    clock, _ = await played(Attempt(), Attempt(), Attempt(open_s=0.1))
    assert clock.slept[1:] == [1, 2, 4]


async def test_a_controller_that_says_when_is_not_asked_before() -> None:
    clock, _ = await played(Attempt(SessionEnded(Unavailable("stopping"), retry_after_s=30)))
    assert clock.slept[1] == 31


@pytest.mark.parametrize(("uniform", "delay_s"), [(0.0, 60), (1.0, 120)])
async def test_a_controller_that_refuses_is_asked_seldom(uniform: float, delay_s: float) -> None:
    clock, _ = await played(Attempt(SessionEnded(Forbidden("banned"))), uniform=uniform)
    assert clock.slept[1] == delay_s


async def test_the_status_says_why_and_when_it_tries_again() -> None:
    _, link = await played(Attempt())
    assert link.status.state is SessionState.CLOSED
    assert link.status.last_error == "connection refused"
    assert link.status.retry_at == START + timedelta(seconds=6)


async def test_the_status_says_since_when_it_is_away_over_all_attempts() -> None:
    _, link = await played(Attempt(open_s=60), Attempt(), Attempt())
    assert link.status.since == START + timedelta(seconds=65)


async def test_an_outage_is_logged_once_as_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    await played(*[Attempt()] * 4)
    assert [record.levelname for record in caplog.records].count("WARNING") == 1


async def test_another_reason_is_logged_again(caplog: pytest.LogCaptureFixture) -> None:
    other: NanofleetError = Unavailable("the controller is stopping")
    await played(Attempt(), Attempt(SessionEnded(other)))
    assert [record.levelname for record in caplog.records].count("WARNING") == 2


async def test_a_connection_that_was_replaced_is_made_anew_without_a_word_of_failure(
    caplog: pytest.LogCaptureFixture,
) -> None:
    clock, link = await played(Attempt(), Attempt(), Attempt(Replaced(), open_s=60), uniform=0.5)
    assert clock.slept[-1] == 0.5
    assert link.status.last_error == "connection refused"
    assert [record.levelname for record in caplog.records].count("WARNING") == 1


async def test_a_peer_that_is_not_the_controller_is_no_refusal() -> None:
    clock, _ = await played(Attempt(SessionEnded(Untrusted("its certificate does not hold here"))))
    assert clock.slept[1] == 1


async def test_a_link_that_waits_can_be_told_to_try_at_once() -> None:
    clock, waits = HandClock(), asyncio.Event()
    attempts = [Attempt(), Attempt()]
    link = Link(
        lambda on_state: ScriptedSession(attempts.pop(), clock, on_state),
        policy=ReconnectPolicy(first_delay_s=0.0),
        clock=clock,
        sleep=lambda delay_s: asyncio.sleep(0) if delay_s == 0 else forever(waits),
    )
    task = asyncio.create_task(link.run())
    async with asyncio.timeout(5):
        await waits.wait()
        assert len(attempts) == 1
        waits.clear()
        link.retry_now()
        await waits.wait()
    task.cancel()
    assert attempts == []


async def forever(began: asyncio.Event) -> None:
    began.set()
    await asyncio.Event().wait()


async def test_a_link_that_shall_end_ends_when_its_session_fails_at_the_same_instant() -> None:
    class FailsWhenCancelled:
        async def run(self) -> None:
            try:
                await asyncio.Event().wait()
            except asyncio.CancelledError:
                raise AWAY from None

    link = Link(lambda _: FailsWhenCancelled(), policy=ReconnectPolicy(first_delay_s=0.0), clock=HandClock())
    running = asyncio.ensure_future(link.run())
    await asyncio.sleep(0.01)
    running.cancel()
    async with asyncio.timeout(5):
        await asyncio.wait([running])

    assert running.cancelled()
