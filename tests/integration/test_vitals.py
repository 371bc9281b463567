"""Vitals over the session: from an agent's process to the controller, and from there to operators."""

import asyncio
import subprocess
import sys
from pathlib import Path
from typing import Any

from core.addresses import parse_address
from core.fleet_state import Energy, EnergyMethod, Usage
from core.spiffe import Role
from tests.support.controller_process import ControllerProcess
from tests.support.delivery_shelf import DeliveryShelf
from tests.support.enrolled import Realm
from tests.support.fake_agent import Dialler
from tests.support.fake_controller import running_controller
from tests.support.fleet_values import CAM, made_hello
from tests.support.local_agent import AgentProcess
from tests.support.vitals_values import made_vitals

TIMEOUT_S = 20.0


async def test_a_real_agent_says_how_it_is_when_its_session_opens_and_then_is_silent(tmp_path: Path) -> None:
    realm = Realm()
    async with running_controller(realm, DeliveryShelf()) as controller:
        agent = AgentProcess(tmp_path, realm=realm, controller=controller.address)
        await agent.start()
        try:
            await controller.fleet.until(lambda: bool(controller.fleet.vitals))
        finally:
            await agent.kill()
        (vitals,) = controller.fleet.vitals
    assert vitals.usage == Usage()
    assert 0 < vitals.uptime_s < 60
    assert vitals.health.rss_bytes > 10 << 20
    assert vitals.health.available_bytes > 0
    assert vitals.energy is None or vitals.energy.joules >= 0


async def say(controller: ControllerProcess) -> dict[str, Any]:
    address = parse_address(controller.endpoints()["controller_grpc"])
    dialler = Dialler(address, controller.tls(Role.AGENT, CAM))
    async with dialler.dial() as agent, controller.http() as http:
        await agent.hello(made_hello())
        silent = (await http.get(f"/api/agents/{CAM}")).json()
        assert (silent["usage"], silent["health"]) == (None, None)
        energy = Energy(EnergyMethod.MODEL, joules=50.0, answers=100, watts=0.5, recent_joules=8.0, recent_answers=10)
        await agent.say_vitals(made_vitals(90, 10, refused=3, failed=1, energy=energy))
        async with asyncio.timeout(TIMEOUT_S):
            while (shown := (await http.get(f"/api/agents/{CAM}")).json())["usage"] is None:
                await asyncio.sleep(0.05)
        await agent.leave()
    await dialler.close()
    return dict(shown)


def test_what_an_agent_says_is_shown_to_operators(tmp_path: Path) -> None:
    with ControllerProcess(tmp_path / "controller") as controller:
        shown = asyncio.run(say(controller))
        command = [sys.executable, "-m", "controller.cli.app", "--credential", str(controller.credential())]
        done = subprocess.run([*command, "devices", "show", CAM], check=True, capture_output=True, text=True)

    usage, health = shown["usage"], shown["health"]
    counts = {key: usage[key] for key in ("answered_edge", "answered_heavy", "refused", "failed")}
    assert counts == {"answered_edge": 90, "answered_heavy": 10, "refused": 3, "failed": 1}
    assert (usage["requests_per_s"], usage["escalated_ratio"]) == (0.0, None)
    assert (health["temperature_c"], health["load"], health["rss_bytes"]) == (48.5, 0.25, 80 << 20)
    assert "90 at the edge, 10 by the heavy tier, 3 refused, 1 failed" in done.stdout
    assert "load 0.25" in done.stdout
    energy = shown["energy"]
    assert (energy["method"], energy["joules"], energy["answers"], energy["watts"]) == ("model", 50.0, 100, 0.5)
    assert (energy["joules_per_answer"], energy["recent_joules_per_answer"]) == (0.5, 0.8)
    assert "model: 0.5 W, 0.8 J an answer over the last minute" in done.stdout
