"""`nanofleet audit`: who changed what, and whether the record of it is whole."""

from datetime import datetime
from typing import Annotated

import typer
from rich.table import Table

from controller.api import audit_views as views
from controller.cli.examples import examples
from controller.cli.options import client_of
from controller.cli.screen import Output, OutputOption, peer_text, show
from controller.cli.watching import WatchOption, present
from core.errors import IntegrityError

app = typer.Typer(help="See who changed what.", no_args_is_help=True)

_STYLE = {"ok": "", "refused": "yellow", "failed": "bold red"}


@app.command(
    "list", epilog=examples("nanofleet audit list", "nanofleet audit list --action agent. --since 2026-11-01 --watch")
)
def list_entries(
    context: typer.Context,
    limit: Annotated[int, typer.Option(min=1, max=500, help="How many, the newest first.")] = 50,
    before: Annotated[int | None, typer.Option(min=1, help="Only entries older than this one.")] = None,
    operator: Annotated[str | None, typer.Option(help="Only what this operator did.")] = None,
    action: Annotated[
        str | None, typer.Option(help="Only this action, such as deployment.put; `agent.` stands for all of agents.")
    ] = None,
    target: Annotated[str | None, typer.Option(help="Only what was done to this.")] = None,
    since: Annotated[datetime | None, typer.Option(help="Only from this instant on, in local time.")] = None,
    output: OutputOption = Output.TABLE,
    watch: WatchOption = False,
) -> None:
    """List who changed what, the newest first."""
    chosen = {
        "before": before,
        "operator": operator,
        "action": action,
        "target": target,
        "since": None if since is None else since.astimezone().isoformat(),
    }
    wanted = {"limit": limit, **{key: value for key, value in chosen.items() if value is not None}}
    present(context, lambda client, _seen: client.audit(wanted), _table, output=output, is_watched=watch)


@app.command(epilog=examples("nanofleet audit verify", "nanofleet audit verify --head 812:5b0c2f"))
def verify(
    context: typer.Context,
    head: Annotated[
        str | None, typer.Option(metavar="ID:SHA256", help="A head that was noted down before; see whether it stands.")
    ] = None,
    output: OutputOption = Output.TABLE,
) -> None:
    """Follow the chain of the whole record; exit code 1 when something was changed."""
    parameters = {} if head is None else _noted(head)
    with client_of(context) as client:
        found = client.verify_audit(parameters)
    show(found, _verdict(found), output=output)
    if found.problem is not None:
        raise IntegrityError(
            f"audit: {found.problem}; compare with a backup, and ask who could write the controller's database"
        )


def _noted(head: str) -> dict[str, str | int | float]:
    entry_id, colon, sha256 = head.partition(":")
    if not colon or not entry_id.isdecimal():
        raise typer.BadParameter(f"expected ID:SHA256 as `nanofleet audit verify` printed it, got {head[:80]!r}")
    return {"head_id": int(entry_id), "head_sha256": sha256}


def _table(found: views.AuditView) -> Table:
    table = Table("id", "when", "operator", "action", "target", "outcome", "detail")
    for entry in found.entries:
        outcome = f"{entry.outcome}: {entry.code}" if entry.code else entry.outcome
        table.add_row(
            str(entry.id),
            f"{entry.at.astimezone():%Y-%m-%d %H:%M:%S}",
            peer_text(f"{entry.operator} ({entry.role})" if entry.role else entry.operator),
            peer_text(entry.action),
            peer_text(entry.target),
            peer_text(outcome, style=_STYLE[entry.outcome]),
            peer_text(entry.detail),
        )
    return table


def _verdict(found: views.AuditVerificationView) -> str:
    if found.problem is not None:
        return f"{found.entries} entries are in order before that"
    if found.last is None:
        return "nothing is recorded yet"
    return (
        f"{found.entries} entries, every link holds; the head, to be noted elsewhere: {found.last.id}:"
        f"{found.last.sha256}"
    )
