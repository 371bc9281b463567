"""What the commands share of the terminal: consoles, table or JSON, and how quantities are written."""

from datetime import datetime
from enum import StrEnum
from typing import Annotated

import typer
from pydantic import BaseModel
from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

_AGES = ((86_400, "d"), (3_600, "h"), (60, "min"), (1, "s"))


class Output(StrEnum):
    TABLE = "table"
    JSON = "json"


OutputOption = Annotated[Output, typer.Option("--output", "-o", help="How to print the result.")]


class RemovedView(BaseModel):
    """What a command that removes something says of it as JSON: the REST answers without a body."""

    removed: str


def foldable(renderable: RenderableType) -> RenderableType:
    """Let tables fold what is too long: an id or a name that is cut off could be another."""
    if isinstance(renderable, Table):
        for column in renderable.columns:
            column.overflow = "fold"
    if isinstance(renderable, Group):
        for part in renderable.renderables:
            foldable(part)
    return renderable


def show(view: BaseModel, table: RenderableType, *, output: Output) -> None:
    """Print a result as JSON for programs or as `table` for people."""
    if output is Output.JSON:
        typer.echo(view.model_dump_json(indent=2))
    else:
        # A sentence is left to the terminal to wrap: a pipe gets it in one piece.
        Console().print(foldable(table), soft_wrap=isinstance(table, str | Text))


def progress_console() -> Console:
    """Return the console for progress and errors; results have standard output to themselves."""
    return Console(stderr=True)


def warn(text: str) -> None:
    console = progress_console()
    console.print("[bold yellow]warning:[/]", end=" ")
    console.print(peer_text(text), highlight=False, soft_wrap=True)


def complain(text: str) -> None:
    console = progress_console()
    console.print("[bold red]error:[/]", end=" ")
    # Not wrapped: somebody may copy it.
    console.print(peer_text(text), highlight=False, soft_wrap=True)


def peer_text(text: str, *, style: str = "") -> Text:
    """Return what a peer wrote, without markup and without control characters, which a terminal would obey."""
    return Text("".join(char if char.isprintable() or char == "\n" else "?" for char in text), style=style)


def bytes_text(size_bytes: int) -> str:
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if size_bytes >= scale:
            return f"{size_bytes / scale:.1f} {unit}"
    return f"{size_bytes} B"


def milliseconds_text(duration_us: float) -> str:
    return f"{duration_us / 1000:.3f} ms" if duration_us < 10_000 else f"{duration_us / 1000:.1f} ms"


def ratio_text(ratio: float | None) -> str:
    return "-" if ratio is None else f"{ratio:.2%}"


def age_text(at: datetime, *, now: datetime) -> str:
    seconds = max(0, int((now - at).total_seconds()))
    for scale, unit in _AGES:
        if seconds >= scale:
            return f"{seconds // scale} {unit} ago"
    return "now"
