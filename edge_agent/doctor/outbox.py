"""Whether what must wait for the controller or the heavy tier is kept on disk, and what became of it before."""

from core.doctor import Finding, ok, problem, skipped, warning
from edge_agent.health.state_folder import StateFolder
from edge_agent.health.status_file import OutboxView, read_status

_REMEDIES = {
    "full": "free some space, or lower [outbox] min_free_bytes; it goes on by itself within a minute",
    "read_only": "mount the state folder writable, or `chown` it to the user of the service",
    "faulty": "look into the kernel's log, and replace the disk or card",
}


def outbox_takes_rows(folder: StateFolder, *, is_running: bool) -> Finding:
    aside = sorted(folder.outbox.parent.glob(f"{folder.outbox.stem}.corrupt-*"))
    if is_running and folder.status.exists() and (found := _running(read_status(folder.status).outbox)) is not None:
        return found
    if aside:
        return warning(
            "outbox",
            f"{aside[0].name}: it was damaged once, and what waited in it is lost",
            expected="a disk that keeps what is written",
            remedy="look into the kernel's log for the disk; remove the file when it is not needed any more",
        )
    if not is_running:
        return skipped("outbox", "no agent runs here that could say")
    return ok("outbox", "what must wait is kept on disk")


def _running(outbox: OutboxView) -> Finding | None:
    """Return what a running agent has to complain of."""
    if outbox.trouble:
        return problem(
            "outbox",
            f"rows are kept in memory only: the disk is {outbox.trouble}",
            expected="a disk that takes them",
            remedy=_REMEDIES.get(outbox.trouble, "see the agent's log"),
        )
    lost = {kind: each.text for kind, each in outbox.kinds.items() if each.lost}
    if lost:
        kind, text = next(iter(lost.items()))
        return warning(
            "outbox",
            f"{kind}: {text}",
            expected="nothing lost since the process began",
            remedy="see docs/operations.md, Offline for days: raise the bounds of [outbox], or bring the link back",
        )
    return None
