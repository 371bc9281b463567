"""Tests on the event loop that agents run on, whose sockets and TLS are its own."""

import functools
from collections.abc import Awaitable, Callable
from typing import ParamSpec

import uvloop

P = ParamSpec("P")


def on_the_agents_loop(test: Callable[P, Awaitable[None]]) -> Callable[P, None]:
    @functools.wraps(test)
    def run(*args: P.args, **named: P.kwargs) -> None:
        async def scene() -> None:
            await test(*args, **named)

        uvloop.run(scene())

    return run
