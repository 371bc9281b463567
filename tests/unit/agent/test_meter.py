"""Progress is passed on seldom, but none of it is lost."""

import asyncio

import pytest

from edge_agent.sync import meter
from edge_agent.sync.meter import Throttle
from tests.support.fleet_values import HeldClock


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    monkeypatch.setattr(meter, "PROGRESS_INTERVAL_S", 0.02)
    return []


def throttle(told: list[float], clock: HeldClock) -> Throttle:
    return Throttle(lambda: told.append(clock.monotonic_s()), clock)


async def test_what_comes_too_soon_is_told_later_and_once(told: list[float]) -> None:
    with throttle(told, HeldClock()) as progress:
        for _ in range(5):
            progress.report()
        assert len(told) == 1
        async with asyncio.timeout(5):
            while len(told) < 2:
                await asyncio.sleep(0.005)
        await asyncio.sleep(0.05)
    assert len(told) == 2


async def test_what_comes_in_time_is_told_at_once(told: list[float]) -> None:
    clock = HeldClock()
    with throttle(told, clock) as progress:
        for _ in range(3):
            progress.report()
            clock.advance(0.02)
        assert len(told) == 3


async def test_what_is_left_is_told_at_the_end_whatever_ended_it(told: list[float]) -> None:
    async def broken_off() -> None:
        with throttle(told, HeldClock()) as progress:
            progress.report()
            progress.report()
            raise ConnectionError

    with pytest.raises(ConnectionError):
        await broken_off()
    assert len(told) == 2
    await asyncio.sleep(0.05)
    assert len(told) == 2


async def test_nothing_is_told_twice(told: list[float]) -> None:
    with throttle(told, HeldClock()) as progress:
        progress.report()
        progress.report()
        progress.tell()
    assert len(told) == 2
