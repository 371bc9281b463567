"""`nanofleet status` and `nanofleet whoami`: is the controller there, and who are we to it."""

import typer
from pydantic import BaseModel

from controller.api import access_views
from controller.cli.client import ControllerClient
from controller.cli.screen import Output, OutputOption, peer_text
from controller.cli.watching import WatchOption, present


class StatusView(BaseModel):
    controller: str
    status: str
    version: str


def status(context: typer.Context, output: OutputOption = Output.TABLE, watch: WatchOption = False) -> None:
    """Say whether the controller answers, and its version; needs no credential. `nanofleet doctor` looks closer."""

    def look(client: ControllerClient, _seen: StatusView | None) -> StatusView:
        found = client.health()
        return StatusView(controller=client.url, status=found.status, version=found.version)

    present(
        context,
        look,
        lambda found: peer_text(f"{found.controller}: {found.status}, version {found.version}"),
        output=output,
        is_watched=watch,
    )


def whoami(context: typer.Context, output: OutputOption = Output.TABLE, watch: WatchOption = False) -> None:
    """Say who we are to the controller, by our credential, and what we may do."""

    def look(client: ControllerClient, _seen: access_views.MeView | None) -> access_views.MeView:
        return client.me()

    present(context, look, lambda found: f"{found.name}, {found.role}", output=output, is_watched=watch)
