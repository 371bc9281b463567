"""What a fleet stands on, on a real disk: at which root new machines begin to trust."""

from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from hashlib import sha256
from pathlib import Path

import pytest

from controller.audit.model import Act, Actor, Filter
from controller.foundation import Foundation, lay
from controller.settings import Settings
from controller.signing.model import KeyRole
from core.clock import SystemClock
from core.errors import NotFound


@pytest.fixture
async def foundation(tmp_path: Path) -> AsyncIterator[Foundation]:
    async with AsyncExitStack() as stack:
        yield await lay(Settings(data_dir=tmp_path), stack, clock=SystemClock())


async def test_new_machines_begin_at_the_newest_root(foundation: Foundation) -> None:
    first = await foundation.trust_root()
    await foundation.catalogue.rotate(KeyRole.ROOT)

    assert await foundation.trust_root() == await foundation.catalogue.metadata("2.root.json")
    assert await foundation.trust_root() != first


async def test_a_token_from_before_a_rotation_still_gets_the_root_that_it_names(foundation: Foundation) -> None:
    first = await foundation.trust_root()
    await foundation.catalogue.rotate(KeyRole.ROOT)

    assert await foundation.trust_root(sha256(first).digest()) == first


@pytest.mark.parametrize("digest", [bytes(32), b"x"])
async def test_a_root_that_was_never_published_is_not_found(foundation: Foundation, digest: bytes) -> None:
    with pytest.raises(NotFound, match="make another token"):
        await foundation.trust_root(digest)


async def test_a_change_that_a_crash_cut_off_stands_in_the_record_after_the_next_start(tmp_path: Path) -> None:
    settings, clock = Settings(data_dir=tmp_path), SystemClock()
    async with AsyncExitStack() as stack:
        laid = await lay(settings, stack, clock=clock)
        await laid.audit.begin(Act(Actor("ada", "admin"), "agent.ban", "gate-1"))
    async with AsyncExitStack() as stack:
        laid = await lay(settings, stack, clock=clock)
        (entry,) = (await laid.audit.entries(Filter(10))).entries

    assert (entry.act.action, entry.act.target, entry.result.code) == ("agent.ban", "gate-1", "interrupted")
