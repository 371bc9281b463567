"""What the root command hands to every other."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import typer
from pydantic import ValidationError

from controller.cli.client import ControllerClient

DEFAULT_CONTROLLER = "http://127.0.0.1:7080"


@dataclass(frozen=True, slots=True)
class Options:
    controller_url: str


def client_of(context: typer.Context) -> ControllerClient:
    """Return a client of the controller that the command line names; use it as a context manager."""
    options: Options = context.obj
    return ControllerClient(options.controller_url)


@contextmanager
def usage_errors() -> Iterator[None]:
    """Let a body that does not fit be an error of the command line, naming the field."""
    try:
        yield
    except ValidationError as error:
        fault = error.errors(include_url=False)[0]
        raise typer.BadParameter(f"{'.'.join(map(str, fault['loc']))}: {fault['msg']}") from error
