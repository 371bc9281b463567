"""Paths → routes of the agent's HTTP face; what is awaited runs in tasks that are owned here."""

import asyncio
import logging
from collections.abc import Awaitable, Callable, Mapping
from functools import partial
from typing import TypeAlias

from core.errors import NanofleetError
from core.logs import withheld
from core.status import STATUS
from edge_agent.front.http.messages import TEXT, Answer, Cancel, Methods, Request, Respond, Route, Serve
from edge_agent.front.http.reading import defect_answer

_log = logging.getLogger(__name__)

Awaited: TypeAlias = Callable[[Request], Awaitable[Answer]]


class Tasks:
    """Requests whose answer is awaited; `close` gives up those under way."""

    def __init__(self) -> None:
        self._tasks: set[asyncio.Task[None]] = set()

    def serve(self, answer: Awaited, refuse: Callable[[NanofleetError], Answer]) -> Serve:
        """Return what serves a route by awaiting `answer`."""

        def serve(request: Request, respond: Respond) -> Cancel:
            task = asyncio.get_running_loop().create_task(self._run(answer, refuse, request, respond), name="http")
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)
            return task.cancel

        return serve

    async def close(self) -> None:
        tasks = tuple(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _run(
        self, answer: Awaited, refuse: Callable[[NanofleetError], Answer], request: Request, respond: Respond
    ) -> None:
        try:
            found = await answer(request)
        except NanofleetError as error:
            found = refuse(error)
        except Exception as error:
            _log.error("an HTTP request failed by a defect", exc_info=withheld(error))
            found = defect_answer(None)
        respond(found)


def get_route(path: str, answer: Awaited, tasks: Tasks) -> tuple[str, Methods]:
    """Return the entry of a path that is read only, and refuses in plain text."""
    return path, {"GET": Route(path, tasks.serve(answer, text_of), text_of)}


def text_of(error: NanofleetError) -> Answer:
    return Answer(f"{error}\n".encode(), STATUS[error.code].http, TEXT)


def routing(*sources: Callable[[str], Methods | None], fixed: Mapping[str, Methods]) -> Callable[[str], Methods | None]:
    """Return what finds a path in `fixed`, or in the first of `sources` that knows it."""
    return partial(_find, fixed, sources)


def _find(
    fixed: Mapping[str, Methods], sources: tuple[Callable[[str], Methods | None], ...], path: str
) -> Methods | None:
    found = fixed.get(path)
    if found is not None:
        return found
    return next((methods for source in sources if (methods := source(path)) is not None), None)
