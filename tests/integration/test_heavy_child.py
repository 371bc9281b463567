"""How the controller keeps the child of the embedded heavy tier, with children that do nothing."""

import asyncio
import os
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import psutil
import pytest

from controller.heavy.local import ChildPolicy, LocalHeavy
from controller.settings import HeavySettings
from core.addresses import Address
from core.backoff import BackoffPolicy
from core.clock import SystemClock

SETTLED_S = 20.0
QUICK = BackoffPolicy(base_s=0.01, cap_s=0.02)


class Answers:
    """A probe that gets `count` answers, 50 ms apart, and then no more."""

    def __init__(self, count: int = 0) -> None:
        self.left = count

    async def wait_answer(self) -> None:
        if self.left == 0:
            await asyncio.Event().wait()
        await asyncio.sleep(0.05)
        self.left -= 1


@asynccontextmanager
async def running(
    how: str, data_dir: Path, policy: ChildPolicy, *, probe: Answers | None = None
) -> AsyncIterator[None]:
    local = LocalHeavy(
        HeavySettings(),
        data_dir=data_dir,
        controller=Address("127.0.0.1", 1),
        tls_dir=data_dir / "tls",
        readiness=probe or Answers(),
        clock=SystemClock(),
        policy=policy,
        command=(sys.executable, "-m", "tests.support.heavy_child", how),
    )
    keeper = asyncio.create_task(local.run())
    try:
        yield
    finally:
        keeper.cancel()
        await asyncio.gather(keeper, return_exceptions=True)
    assert children() == []


def children() -> list[psutil.Process]:
    return [child for child in psutil.Process().children() if "tests.support.heavy_child" in child.cmdline()]


def starts_in(data_dir: Path) -> int:
    starts = data_dir / "heavy" / "starts"
    return len(starts.read_text().splitlines()) if starts.exists() else 0


async def until_started(data_dir: Path, times: int) -> None:
    async with asyncio.timeout(SETTLED_S):
        while starts_in(data_dir) < times:
            await asyncio.sleep(0.02)


async def test_a_child_that_ends_is_started_again(tmp_path: Path) -> None:
    async with running("brief", tmp_path, ChildPolicy(restart=QUICK)):
        await until_started(tmp_path, 3)


async def test_a_child_that_is_killed_is_started_again(tmp_path: Path) -> None:
    async with running("obedient", tmp_path, ChildPolicy(restart=QUICK)):
        await until_started(tmp_path, 1)
        (child,) = children()
        child.kill()
        await until_started(tmp_path, 2)


async def test_the_child_gets_no_setting_or_secret_of_ours(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NANOFLEET_SIGNING_KEY_TARGETS", "a key")
    monkeypatch.setenv("NANOFLEET_CREDENTIAL", "/home/ada/credential.json")
    async with running("obedient", tmp_path, ChildPolicy(restart=QUICK)):
        await until_started(tmp_path, 1)
        (child,) = children()
        environment = child.environ()

    assert not [name for name in environment if name.startswith("NANOFLEET_")]
    assert environment["PATH"] == os.environ["PATH"]


async def test_a_child_that_does_not_become_ready_is_started_again(tmp_path: Path) -> None:
    async with running("obedient", tmp_path, ChildPolicy(start_timeout_s=1.0, restart=QUICK)):
        await until_started(tmp_path, 2)


async def test_a_child_is_not_judged_ready_by_the_answers_of_the_one_before(tmp_path: Path) -> None:
    probe, policy = Answers(1), ChildPolicy(start_timeout_s=2.0, silent_timeout_s=SETTLED_S * 2, restart=QUICK)
    async with running("obedient", tmp_path, policy, probe=probe):
        await until_started(tmp_path, 1)
        (child,) = children()
        assert probe.left == 0
        child.kill()
        await until_started(tmp_path, 3)


async def test_a_child_that_lives_and_stops_answering_is_started_again(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    policy = ChildPolicy(start_timeout_s=SETTLED_S * 2, silent_timeout_s=2.0, restart=QUICK)
    async with running("obedient", tmp_path, policy, probe=Answers(1)):
        await until_started(tmp_path, 2)
    assert "heavy tier has stopped answering" in caplog.text


async def test_a_child_that_answers_is_left_alone(tmp_path: Path) -> None:
    probe, policy = Answers(50), ChildPolicy(start_timeout_s=1.0, silent_timeout_s=2.0, restart=QUICK)
    async with running("obedient", tmp_path, policy, probe=probe):
        await until_started(tmp_path, 1)
        async with asyncio.timeout(SETTLED_S):
            while probe.left:
                await asyncio.sleep(0.02)
        assert starts_in(tmp_path) == 1


@pytest.mark.parametrize("how", ["obedient", "stubborn"])
async def test_no_child_outlives_its_keeper(how: str, tmp_path: Path) -> None:
    async with running(how, tmp_path, ChildPolicy(stop_timeout_s=0.3)):
        await until_started(tmp_path, 1)


async def test_the_log_of_the_run_before_is_kept(tmp_path: Path) -> None:
    async with running("brief", tmp_path, ChildPolicy(restart=QUICK)):
        await until_started(tmp_path, 2)
    assert (tmp_path / "heavy" / "heavy.log").exists()
    assert (tmp_path / "heavy" / "heavy.log.1").exists()
