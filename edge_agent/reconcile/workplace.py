"""What reconciling works with, and the one way to its disk."""

import asyncio
from collections.abc import Callable
from concurrent.futures import Executor
from dataclasses import dataclass
from functools import partial
from typing import ParamSpec, TypeVar

from edge_agent.activation.journal import Journal
from edge_agent.reconcile.ports import ModelHost, SelfTester, VariantSource
from edge_agent.sync.store import ContentStore

P = ParamSpec("P")
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Workplace:
    """`disk` is the one thread that works on `store` and `journal`."""

    store: ContentStore
    journal: Journal
    source: VariantSource
    tester: SelfTester
    host: ModelHost
    disk: Executor

    async def on_disk(self, work: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        return await asyncio.get_running_loop().run_in_executor(self.disk, partial(work, *args, **kwargs))
