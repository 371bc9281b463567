"""`nanofleet controller drift`: what agents run that the controller's state does not know."""

from collections.abc import Sequence

import typer
from rich.console import Group
from rich.table import Table

from controller.api import operator_views, restoration_views
from controller.cli.options import client_of
from controller.cli.screen import Output, OutputOption, peer_text, show


def show_drift(context: typer.Context, output: OutputOption = Output.TABLE) -> None:
    """Show which agents are beyond the controller's state, as after a restore."""
    with client_of(context) as client:
        found = client.restoration()
    table = Table("agent", "site", "runs", "the controller's state says")
    for agent in found.ahead:
        table.add_row(agent.id, peer_text(agent.site), _slots_text(agent.runs), _slots_text(agent.wants))
    show(found, Group(*_lines(found), table), output=output)


def _lines(found: restoration_views.RestorationView) -> Sequence[str]:
    lines = []
    if found.is_watching and found.backup_at is not None:
        lines.append(
            f"restored from a backup of {found.backup_at.astimezone():%Y-%m-%d %H:%M:%S}; nothing is pushed until "
            "`nanofleet controller confirm-restore`"
        )
    lines.append(f"{found.ahead_count} agents are ahead, {found.unheard_count} were not heard of since the restore")
    if found.root_is_behind:
        lines.append("an agent holds a newer root of trust: bring back the keys and a state of after that rotation")
    elif found.catalogue_is_behind:
        lines.append("an agent holds a newer catalogue than this controller")
    return lines


def _slots_text(slots: Sequence[operator_views.SlotView]) -> str:
    return ", ".join(f"{slot.model} {slot.version} {slot.variant}" for slot in slots) or "-"
