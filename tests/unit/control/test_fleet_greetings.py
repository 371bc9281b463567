"""Hellos and signatures that are asked for together share a transaction, or a hop to the thread that signs."""

import asyncio
from collections.abc import Callable
from typing import TypeVar

from controller.fleet.greetings import Greetings
from controller.fleet.store import FleetRecords
from controller.signing.gathering import GatheringSigner
from controller.signing.keys import PrivateKey
from core.clock import SystemClock
from core.errors import Unavailable
from core.ids import AgentId
from tests.support.fleet_store import MemoryFleetStore
from tests.support.fleet_values import made_hello

T = TypeVar("T")
NAMES = [AgentId(f"cam-{number}") for number in range(20)]


class SlowStore(MemoryFleetStore):
    """Lets others run before it commits, as a disk does."""

    async def run(self, use_case: Callable[[FleetRecords], T]) -> T:
        await asyncio.sleep(0)
        return await super().run(use_case)


async def test_hellos_that_come_together_share_a_transaction() -> None:
    store = SlowStore()
    greetings = Greetings(store, clock=SystemClock())
    agents = await asyncio.gather(*(greetings.greet(made_hello(name)) for name in NAMES))
    assert [agent.agent_id for agent in agents] == NAMES
    # The first did not know of the others yet.
    assert store.transactions == 2


async def test_a_hello_that_cannot_be_recorded_fails_alone() -> None:
    store = SlowStore()
    store.fail_next = Unavailable("the disk is away")
    greetings = Greetings(store, clock=SystemClock())
    first, *others = await asyncio.gather(
        *(greetings.greet(made_hello(name)) for name in NAMES), return_exceptions=True
    )
    assert isinstance(first, Unavailable)
    assert not any(isinstance(other, BaseException) for other in others)


async def test_an_agent_that_leaves_while_its_hello_waits_takes_nobody_with_it() -> None:
    store = SlowStore()
    greetings = Greetings(store, clock=SystemClock())
    tasks = [asyncio.create_task(greetings.greet(made_hello(name)), name=name) for name in NAMES]
    await asyncio.sleep(0)
    for leaving in (tasks[0], tasks[7]):
        leaving.cancel()
    done = await asyncio.gather(*tasks, return_exceptions=True)
    assert [number for number, each in enumerate(done) if isinstance(each, asyncio.CancelledError)] == [0, 7]


async def test_each_caller_gets_the_signature_over_its_own_content() -> None:
    key = PrivateKey.generate()
    gathering = GatheringSigner()
    contents = [str(number).encode() for number in range(600)]
    signatures = await asyncio.gather(*(gathering.sign(key, content) for content in contents))
    assert signatures == [key.sign(content) for content in contents]
