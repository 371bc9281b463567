"""`nanofleet deploy`: say what shall run where, then watch it arrive.

The controller answers at once with the agents that it concerns. Those that are online are watched until each is ready
or has failed; those that are offline get it when they connect, so nobody waits for them.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Literal

import typer
from rich.progress import BarColumn, Progress, TaskID, TextColumn

from controller.api import operator_views as views
from controller.cli import completion
from controller.cli.client import LONG_POLL_S, ControllerClient, Refused
from controller.cli.options import client_of, usage_errors
from controller.cli.screen import Output, OutputOption, progress_console, show

State = Literal["pushed", "fetching", "waiting", "self_test", "loading", "probation", "ready", "failed", "offline"]
# On probation it serves already; a metered agent waits for a person's word, not for time.
SERVING: frozenset[State] = frozenset({"probation", "ready"})
SETTLED: frozenset[State] = SERVING | {"waiting", "failed", "offline"}
# Chosen: as many bars as fit a small terminal; larger fleets get one bar in all.
MAX_BARS = 16
# As many as the largest version that the controller takes has.
MAX_VERSION_DIGITS = 10
# A slot that is fetched still has to be tested, loaded and warmed up.
_DONE_RATIO: dict[State, float] = {"self_test": 0.85, "loading": 0.95}
_FETCHED_RATIO = 0.8


@dataclass(frozen=True, slots=True)
class Standing:
    """How far one agent is with one deployment."""

    agent_id: str
    state: State
    done_ratio: float = 0.0
    reason: str = ""


def deploy(
    context: typer.Context,
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL[:VERSION]",
            help="Without a version: the latest, as of now.",
            autocompletion=completion.model_names,
        ),
    ],
    variant: Annotated[
        str,
        typer.Option(
            help="Which variant; `nanofleet models show MODEL` lists them.", autocompletion=completion.variant_names
        ),
    ],
    site: Annotated[
        str | None,
        typer.Option(help="Every agent of this site, those to come included.", autocompletion=completion.site_names),
    ] = None,
    agent: Annotated[str | None, typer.Option(help="This agent only.", autocompletion=completion.device_names)] = None,
    fleet: Annotated[bool, typer.Option("--fleet", help="Every agent.")] = False,
    wait: Annotated[bool, typer.Option(help="Watch until the agents that are online are ready.")] = True,
    timeout: Annotated[float, typer.Option(min=0, help="Seconds to watch.")] = 120.0,
    output: OutputOption = Output.TABLE,
) -> None:
    """Let a site, an agent or the whole fleet run a variant of a model."""
    body = _body(model, variant, site=site, agent=agent, fleet=fleet)
    with client_of(context) as client:
        deployed = client.deploy(body)
        standings = watch(client, deployed, timeout_s=timeout) if wait else []
    show(deployed, _summary(deployed, standings, is_watched=wait), output=output)
    _require_ready(standings, timeout_s=timeout)


def standing_of(agent: views.AgentView, target: views.AffectedAgentView, slot: views.SlotView) -> Standing:
    """Return how far `agent` is with `slot`, which it shall run since position `target.position`."""
    report = next((known for known in agent.slots if known.slot == slot), None)
    if report is not None and report.phase in SERVING:
        return Standing(agent.id, report.phase, 1.0)
    if _order(agent.desired) > _order(target.position) and slot not in agent.desired_slots:
        return Standing(agent.id, "failed", reason="a newer deployment took its place")
    if not agent.is_online:
        return Standing(agent.id, "offline")
    if agent.rejection is not None:
        return Standing(agent.id, "failed", reason=agent.rejection.message)
    if report is None:
        return Standing(agent.id, "pushed")
    reason = "" if report.problem is None else report.problem.message
    if report.phase in ("failed", "waiting"):
        return Standing(agent.id, report.phase, reason=reason)
    fetched_ratio = report.stored_bytes / report.total_bytes if report.total_bytes else 0.0
    return Standing(agent.id, report.phase, _DONE_RATIO.get(report.phase, _FETCHED_RATIO * fetched_ratio))


def watch(client: ControllerClient, deployed: views.DeployedView, *, timeout_s: float) -> list[Standing]:
    """Show a bar per agent until all have settled or the time is over; return how they stand then."""
    give_up_s = time.monotonic() + timeout_s
    found = client.agents()
    with _Bars(is_small=len(deployed.agents) <= MAX_BARS) as bars:
        while True:
            standings = _standings(found.agents, deployed)
            bars.update(standings)
            left_s = give_up_s - time.monotonic()
            if left_s <= 0 or all(standing.state in SETTLED for standing in standings):
                return standings
            found = client.agents_after(found.revision, wait_s=min(left_s, LONG_POLL_S))


class _Bars:
    """One bar per agent, or one in all for a large fleet."""

    def __init__(self, *, is_small: bool) -> None:
        self._is_small = is_small
        self._tasks: dict[str, TaskID] = {}
        columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[state]}"))
        self._progress = Progress(*columns, console=progress_console())

    def __enter__(self) -> "_Bars":
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def update(self, standings: Sequence[Standing]) -> None:
        if self._is_small:
            for standing in standings:
                self._set(standing.agent_id, standing.done_ratio, standing.state)
            return
        ready = sum(standing.state in SERVING for standing in standings)
        done_ratio = sum(standing.done_ratio for standing in standings) / len(standings)
        self._set("agents", done_ratio, f"{ready} of {len(standings)} ready")

    def _set(self, name: str, done_ratio: float, state: str) -> None:
        if name not in self._tasks:
            self._tasks[name] = self._progress.add_task(name, total=1.0, state=state)
        self._progress.update(self._tasks[name], completed=done_ratio, state=state)


def _standings(agents: Sequence[views.AgentView], deployed: views.DeployedView) -> list[Standing]:
    by_id = {agent.id: agent for agent in agents}
    slot = deployed.deployment.slot
    return [
        standing_of(by_id[target.id], target, slot) if target.id in by_id else Standing(target.id, "offline")
        for target in deployed.agents
    ]


def _body(model: str, variant: str, *, site: str | None, agent: str | None, fleet: bool) -> views.DeploymentBody:
    named: list[tuple[views.TargetKindText, str]] = []
    if site is not None:
        named.append(("site", site))
    if agent is not None:
        named.append(("agent", agent))
    if fleet:
        named.append(("fleet", ""))
    if len(named) != 1:
        raise typer.BadParameter("expected exactly one of --site, --agent and --fleet")
    [(kind, target)] = named
    name, separator, version = model.partition(":")
    # The length first: Python refuses to read a number of thousands of digits.
    if separator and not (version.isascii() and version.isdecimal() and len(version) <= MAX_VERSION_DIGITS):
        raise typer.BadParameter(f"expected MODEL or MODEL:VERSION with a number, got {model!r}")
    with usage_errors():
        return views.DeploymentBody(
            target_kind=kind, target=target, model=name, version=int(version) if separator else None, variant=variant
        )


def _summary(deployed: views.DeployedView, standings: Sequence[Standing], *, is_watched: bool) -> str:
    deployment = deployed.deployment
    where = "the fleet" if deployment.target_kind == "fleet" else f"{deployment.target_kind} {deployment.target}"
    what = f"{deployment.slot.model}:{deployment.slot.version} {deployment.slot.variant} for {where}"
    if not deployed.agents:
        return f"{what}: no agent there yet; the first that connects gets it"
    if not is_watched:
        return f"{what}: asked of {len(deployed.agents)} agents; `nanofleet devices list` shows how far they are"
    ready = sum(standing.state in SERVING for standing in standings)
    offline = [standing.agent_id for standing in standings if standing.state == "offline"]
    later = f"; {len(offline)} offline get it when they connect" if offline else ""
    return f"{what}: ready on {ready} of {len(standings)} agents{later}"


def _require_ready(standings: Sequence[Standing], *, timeout_s: float) -> None:
    """Raise Refused, naming the first few agents that are neither ready nor offline."""
    behind = [standing for standing in standings if standing.state not in SERVING | {"offline"}]
    if not behind:
        return
    reasons = [
        f"{standing.agent_id}: {standing.reason}"
        if standing.reason
        else f"{standing.agent_id}: still {standing.state} after {timeout_s:g} s; see `nanofleet devices show`"
        for standing in behind[:MAX_BARS]
    ]
    raise Refused("\n".join(reasons))


def _order(position: views.PositionView) -> tuple[int, int]:
    return position.epoch, position.generation
