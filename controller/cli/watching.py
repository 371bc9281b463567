"""`--watch`: the same result again and again, until Ctrl-C, which ends it well.

    look(client, None) ─▶ draw ─▶ look(client, what was seen) ─▶ draw ─▶ …      a long poll, where the REST has one
                                  └─ controller away: say so, try again

On a terminal the table is drawn over the last one; into a pipe only what changed is printed. `--output json` prints one
document per line (NDJSON), each when it differs from the one before.
"""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Annotated, Protocol, TypeVar

import typer
from pydantic import BaseModel
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.text import Text

from controller.cli.client import Busy, ControllerAway, ControllerClient
from controller.cli.options import client_of
from controller.cli.screen import Output, complain, foldable, peer_text, show

View = TypeVar("View", bound=BaseModel)

# Chosen: as often as a person looks, for what has no long poll.
INTERVAL_S = 2.0
# Chosen: a controller that is started again answers within some seconds.
AWAY_INTERVAL_S = 1.0

WatchOption = Annotated[
    bool, typer.Option("--watch", "-w", help="Show it again whenever it changes, until Ctrl-C; JSON: one per line.")
]


def present(
    context: typer.Context,
    look: Callable[[ControllerClient, View | None], View],
    draw: Callable[[View], RenderableType],
    *,
    output: Output,
    is_watched: bool,
    interval_s: float = INTERVAL_S,
) -> None:
    """Show what `look` finds, once or for ever.

    Args:
        look: is given what it found last (None: nothing yet) and may wait for a change to that.
        interval_s: pause between two looks; 0 for a `look` that waits by itself.
    """
    with client_of(context) as client:
        if is_watched:
            _watch(client, look, draw, output=output, interval_s=interval_s)
            return
        found = look(client, None)
    show(found, draw(found), output=output)


def _watch(
    client: ControllerClient,
    look: Callable[[ControllerClient, View | None], View],
    draw: Callable[[View], RenderableType],
    *,
    output: Output,
    interval_s: float,
) -> None:
    seen = look(client, None)
    try:
        with _board(output) as board:
            board.show(seen, draw(seen))
            while True:
                time.sleep(interval_s)
                try:
                    seen = look(client, seen)
                except (ControllerAway, Busy) as error:
                    board.say_away(str(error))
                    time.sleep(AWAY_INTERVAL_S)
                    continue
                board.show(seen, draw(seen))
    except KeyboardInterrupt:
        # How a watch ends; elsewhere Ctrl-C stops something half way.
        return


class _Board(Protocol):
    def show(self, view: BaseModel, table: RenderableType) -> None: ...

    def say_away(self, reason: str) -> None: ...


@contextmanager
def _board(output: Output) -> Iterator[_Board]:
    if output is Output.JSON or not sys.stdout.isatty():
        yield _Lines(output)
        return
    with Live(console=Console(), auto_refresh=False) as live:
        yield _Terminal(live)


class _Terminal:
    """Draws over what it drew before."""

    def __init__(self, live: Live) -> None:
        self._live = live
        self._last: RenderableType = ""

    def show(self, _view: BaseModel, table: RenderableType) -> None:
        self._last = foldable(table)
        self._live.update(self._last, refresh=True)

    def say_away(self, reason: str) -> None:
        note = peer_text(f"as it was; trying again: {reason}", style="yellow")
        self._live.update(Group(self._last, Text(), note), refresh=True)


class _Lines:
    """Prints what differs from the last; who reads it is a program or a file."""

    def __init__(self, output: Output) -> None:
        self._output = output
        self._last = ""
        self._is_away = False

    def show(self, view: BaseModel, table: RenderableType) -> None:
        self._is_away = False
        document = view.model_dump_json()
        if document == self._last:
            return
        self._last = document
        if self._output is Output.JSON:
            typer.echo(document)
        else:
            show(view, table, output=self._output)

    def say_away(self, reason: str) -> None:
        if not self._is_away:
            complain(f"{reason}; trying again")
        self._is_away = True
