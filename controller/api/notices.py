"""What every answer of the operator's REST says beside what was asked: that this controller waits for a person.

A header, so that each command and page can show it without asking for it.
"""

from typing import Protocol

from starlette.datastructures import MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from controller.api.restoration_views import NOTICE_HEADER, RESTORED


class Watching(Protocol):
    @property
    def is_watching(self) -> bool: ...


class Noticed:
    """Adds the notice to the answers of `app`, while there is one."""

    def __init__(self, app: ASGIApp, fleet: Watching) -> None:
        self._app = app
        self._fleet = fleet

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def send_noticed(message: Message) -> None:
            if message["type"] == "http.response.start" and self._fleet.is_watching:
                headers = MutableHeaders(raw=list(message.get("headers", ())))
                headers[NOTICE_HEADER] = RESTORED
                message = {**message, "headers": headers.raw}
            await send(message)

        await self._app(scope, receive, send_noticed)
