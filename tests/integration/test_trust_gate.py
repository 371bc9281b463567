"""The gate and its real child: what the agent's main process asks, and what becomes of a child that misbehaves."""

import asyncio
import os
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from core.errors import InternalError, InvalidRequest, Unavailable, Untrusted
from core.fleet_state import NO_CATALOGUE, SignedAssignment
from edge_agent.trust.admission import ROOT
from edge_agent.trust.gate import Admitted, TrustGate
from edge_agent.trust.question import CatalogueSource
from tests.support.catalogue_port import CataloguePort, catalogue_source
from tests.support.catalogue_side import CatalogueSide, DirectorKey
from tests.support.trusting_device import AGENT, desired_of, release_of

MADE = release_of()
TAGS = ("arch:x86_64",)


@pytest.fixture
def side() -> CatalogueSide:
    side = CatalogueSide()
    side.add_family("digits")
    side.release(MADE)
    side.publish()
    return side


@pytest.fixture
def folder(tmp_path: Path, side: CatalogueSide) -> Path:
    (tmp_path / ROOT).write_bytes(side.anchor)
    return tmp_path


async def admitted_by(gate: TrustGate, signed: SignedAssignment) -> Admitted:
    return await gate.admit(signed, agent_id=AGENT, tags=TAGS, running=())


def gate_with(folder: Path, script: str, *, timeout_s: float = 10.0) -> TrustGate:
    """Return a gate whose child runs `script` instead."""
    return TrustGate(folder, source=lambda: None, timeout_s=timeout_s, command=(sys.executable, "-c", script))


async def test_the_child_admits_what_is_signed_and_the_gate_knows_the_versions(
    side: CatalogueSide, folder: Path
) -> None:
    gate = TrustGate(folder, source=lambda: None)
    assert gate.versions() == NO_CATALOGUE
    admitted = await admitted_by(gate, side.assignment(desired_of(MADE, now=side.now)))
    assert admitted.desired == desired_of(MADE, now=side.now)
    assert admitted.allowed[MADE.digest].tags == frozenset(TAGS)
    assert gate.versions() == (1, side.timestamp.version)


async def test_the_child_asks_the_controller_over_mutual_tls(side: CatalogueSide, folder: Path) -> None:
    port = CataloguePort(side.files)
    signed = replace(side.assignment(desired_of(MADE, now=side.now)), catalogue=())
    async with catalogue_source(port, agent=AGENT) as source:
        admitted = await admitted_by(TrustGate(folder, source=lambda: source), signed)
    assert MADE.digest in admitted.allowed
    assert "timestamp.json" in port.asked


async def test_the_child_refuses_a_director_that_nobody_listed(side: CatalogueSide, folder: Path) -> None:
    forged = side.assignment(desired_of(MADE, now=side.now), by=DirectorKey())
    with pytest.raises(Untrusted, match="director keys"):
        await admitted_by(TrustGate(folder, source=lambda: None), forged)


async def test_what_cannot_be_fetched_is_unavailable(side: CatalogueSide, folder: Path) -> None:
    signed = replace(side.assignment(desired_of(MADE, now=side.now)), catalogue=())
    async with catalogue_source(CataloguePort({}), agent=AGENT) as reached:
        away = reached
    source: CatalogueSource = away
    with pytest.raises(Unavailable, match="unavailable"):
        await admitted_by(TrustGate(folder, source=lambda: source), signed)


async def test_nonsense_is_refused_without_a_child(folder: Path) -> None:
    gate = gate_with(folder, "raise SystemExit('started')")
    with pytest.raises(InvalidRequest, match="expected a desired state"):
        await admitted_by(gate, SignedAssignment(b"\xff\xff", b"", ""))


async def test_a_child_that_hangs_is_ended(side: CatalogueSide, folder: Path) -> None:
    script = f"import os, time; open({str(folder / 'pid')!r}, 'w').write(str(os.getpid())); time.sleep(60)"
    gate = gate_with(folder, script, timeout_s=1.0)
    with pytest.raises(Unavailable, match="longer than 1 s"):
        await admitted_by(gate, side.assignment(desired_of(MADE, now=side.now)))
    with pytest.raises(ProcessLookupError):
        os.kill(int((folder / "pid").read_text()), 0)


async def test_a_child_that_says_too_much_is_ended(side: CatalogueSide, folder: Path) -> None:
    gate = gate_with(folder, "import sys\nwhile True: sys.stdout.write('x' * 65536)")
    with pytest.raises(InternalError, match="got more"):
        await admitted_by(gate, side.assignment(desired_of(MADE, now=side.now)))


@pytest.mark.parametrize(
    ("script", "said"),
    [("raise SystemExit(3)", "code 3"), ("print('yes')", "answer"), ("print(7)", "answer")],
)
async def test_a_child_that_dies_or_talks_nonsense_admits_nothing(
    side: CatalogueSide, folder: Path, script: str, said: str
) -> None:
    with pytest.raises(InternalError, match=said):
        await admitted_by(gate_with(folder, script), side.assignment(desired_of(MADE, now=side.now)))


async def test_a_child_that_is_killed_for_want_of_memory_is_asked_again(side: CatalogueSide, folder: Path) -> None:
    gate = gate_with(folder, "import os, signal; os.kill(os.getpid(), signal.SIGKILL)")
    with pytest.raises(Unavailable, match="killed, as for want of memory"):
        await admitted_by(gate, side.assignment(desired_of(MADE, now=side.now)))


async def test_a_child_that_cannot_be_started_is_asked_again(side: CatalogueSide, folder: Path) -> None:
    gate = TrustGate(folder, source=lambda: None, command=(str(folder / "nothing"),))
    with pytest.raises(Unavailable, match="did not start: No such file"):
        await admitted_by(gate, side.assignment(desired_of(MADE, now=side.now)))


async def test_cancelling_ends_the_child(side: CatalogueSide, folder: Path) -> None:
    os.mkfifo(folder / "started")
    script = f"open({str(folder / 'started')!r}, 'w').write('x'); import time; time.sleep(60)"
    asking = asyncio.create_task(
        admitted_by(gate_with(folder, script), side.assignment(desired_of(MADE, now=side.now)))
    )
    await asyncio.to_thread((folder / "started").read_text)
    asking.cancel()
    with pytest.raises(asyncio.CancelledError):
        await asking
