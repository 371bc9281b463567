"""The energy meter: the agent's part of the machine's joules, per answer, under the name of the method."""

import shutil
from collections.abc import Iterator
from concurrent.futures import Executor, ThreadPoolExecutor
from pathlib import Path

import pytest

from core.exposition import written
from core.fleet_state import Energy, EnergyMethod, Usage
from core.metrics import Registry
from edge_agent.agent_metrics import register_energy
from edge_agent.energy.meter import INTERVAL_S, MIN_ANSWERS, EnergyMeter, Times, times_of
from edge_agent.settings import EnergySettings
from tests.support.clocks import HeldClock
from tests.support.exposed import numbers
from tests.support.sysfs import Sysfs


@pytest.fixture
def disk() -> Iterator[Executor]:
    with ThreadPoolExecutor(1) as executor:
        yield executor


class Machine:
    """An agent on a machine whose time, work and energy a test decides."""

    def __init__(self, root: Path, disk: Executor, *, settings: EnergySettings | None = None) -> None:
        self.sysfs = Sysfs(root)
        self.clock = HeldClock()
        self.times = Times(0.0, 0.0, agent_s=0.0, machine_busy_s=0.0, processors=4)
        self.answers = 0
        self.looks = 0
        self.told: list[float | None] = []
        self.meter = EnergyMeter(
            settings or EnergySettings(idle_watts=2.0, max_watts=10.0),
            usage=lambda: Usage(answered_edge=self.answers),
            tell=self.told.append,
            disk=disk,
            clock=self.clock,
            root=root,
            read_times=self.read,
        )

    @property
    def energy(self) -> Energy:
        energy = self.meter.energy
        assert energy is not None
        return energy

    def method(self) -> EnergyMethod:
        return self.energy.method

    def read(self) -> Times:
        self.looks += 1
        return self.times

    async def passes(
        self,
        *,
        agent_s: float = 1.0,
        busy_s: float | None = 4.0,
        answers: int = 0,
        seconds: float = INTERVAL_S,
        asleep_s: float = 0.0,
    ) -> None:
        """Let time pass in which the agent and the whole machine work for so many seconds, then look."""
        before = self.times
        busy = None if busy_s is None or before.machine_busy_s is None else before.machine_busy_s + busy_s
        self.times = Times(
            before.awake_s + seconds, before.passed_s + seconds + asleep_s, before.agent_s + agent_s, busy, 4
        )
        self.answers += answers
        self.clock.pass_s(seconds)
        await self.meter.refresh()


@pytest.fixture
async def machine(tmp_path: Path, disk: Executor) -> Machine:
    made = Machine(tmp_path, disk)
    await made.meter.refresh()
    return made


async def test_nothing_is_known_before_a_window_has_passed(machine: Machine) -> None:
    assert (machine.meter.energy, machine.meter.measured_j, machine.meter.totals()) == (None, None, ())


async def test_without_any_sensor_the_model_answers_by_its_name(machine: Machine) -> None:
    # 4 of 20 processor seconds are busy: 2 W + 0.2 * 8 W = 3.6 W for 5 s = 18 J, a quarter of it the agent's.
    await machine.passes(agent_s=1.0, busy_s=4.0, answers=9)
    energy = machine.energy
    assert (energy.method, energy.answers) == (EnergyMethod.MODEL, 9)
    assert energy.joules == pytest.approx(4.5)
    assert energy.watts == pytest.approx(0.9)
    assert energy.j_per_answer == pytest.approx(0.5)


async def test_a_counter_comes_before_a_battery_and_that_before_the_model(machine: Machine) -> None:
    machine.sysfs.supply("BAT0", status="Discharging", power_now=4_000_000)
    await machine.passes(agent_s=2.0, busy_s=4.0)
    assert machine.method() is EnergyMethod.BATTERY
    assert machine.energy.joules == pytest.approx(10.0)
    for micro_joules in (0, 8_000_000):
        machine.sysfs.zone("intel-rapl:0", micro_joules)
        await machine.passes(agent_s=2.0, busy_s=4.0)
    assert machine.method() is EnergyMethod.RAPL
    assert machine.energy.joules == pytest.approx(4.0)


async def test_figures_of_different_methods_are_never_added(machine: Machine) -> None:
    machine.sysfs.zone("intel-rapl:0", 0)
    await machine.passes(answers=1)
    machine.sysfs.zone("intel-rapl:0", 4_000_000)
    await machine.passes(answers=2)
    totals = {energy.method: energy for energy in machine.meter.totals()}
    assert (totals[EnergyMethod.MODEL].answers, totals[EnergyMethod.RAPL].answers) == (1, 2)
    assert totals[EnergyMethod.RAPL].joules == pytest.approx(1.0)
    assert totals[EnergyMethod.RAPL].recent_answers == 2


async def test_a_source_that_vanishes_gives_way_to_the_next(machine: Machine) -> None:
    zone = machine.sysfs.zone("intel-rapl:0", 0)
    await machine.passes()
    machine.sysfs.zone("intel-rapl:0", 4_000_000)
    await machine.passes()
    assert machine.method() is EnergyMethod.RAPL
    shutil.rmtree(zone)
    await machine.passes()
    assert machine.method() is EnergyMethod.MODEL


async def test_a_window_over_a_suspend_is_left_out(machine: Machine) -> None:
    await machine.passes(answers=1)
    before = machine.meter.energy
    await machine.passes(asleep_s=3600.0, answers=5)
    assert machine.meter.energy == before
    await machine.passes(answers=1)
    assert machine.energy.answers == 2


async def test_a_machine_that_tells_no_processor_time_charges_the_agent_with_what_it_used(machine: Machine) -> None:
    machine.times = machine.times._replace(machine_busy_s=None)
    await machine.passes(agent_s=2.0, busy_s=None)
    # 2 of 20 processor seconds: 2.8 W for 5 s.
    assert machine.energy.joules == pytest.approx(14.0)


async def test_the_agent_is_never_charged_with_more_than_the_machine_took(machine: Machine) -> None:
    machine.sysfs.supply("BAT0", status="Discharging", power_now=4_000_000)
    # The ticks of /proc/stat are coarser than the agent's own time.
    await machine.passes(agent_s=0.05, busy_s=0.04)
    assert machine.energy.joules == pytest.approx(20.0)


async def test_an_agent_that_did_nothing_took_nothing(machine: Machine) -> None:
    await machine.passes(agent_s=0.0)
    assert (machine.energy.joules, machine.energy.j_per_answer) == (0.0, None)


async def test_the_recent_figure_forgets_what_is_older_than_a_minute(machine: Machine) -> None:
    await machine.passes(answers=1000)
    for _ in range(12):
        await machine.passes(answers=1)
    assert (machine.energy.recent_answers, machine.energy.answers) == (12, 1012)


async def test_it_looks_no_more_often_than_it_must(machine: Machine) -> None:
    for _ in range(4):
        await machine.passes(seconds=1.0)
    assert machine.looks == 1


async def test_switched_off_it_reads_nothing(tmp_path: Path, disk: Executor) -> None:
    machine = Machine(tmp_path, disk, settings=EnergySettings(enabled=False))
    await machine.passes()
    assert (machine.looks, machine.meter.energy) == (0, None)


async def test_only_what_is_measured_and_often_enough_is_said_with_an_answer(machine: Machine) -> None:
    await machine.passes(answers=100)
    assert machine.meter.measured_j is None
    for micro_joules in (0, 4_000_000):
        machine.sysfs.zone("intel-rapl:0", micro_joules)
        await machine.passes(answers=MIN_ANSWERS - 1)
    assert machine.meter.measured_j is None
    machine.sysfs.zone("intel-rapl:0", 8_000_000)
    await machine.passes(answers=MIN_ANSWERS + 1)
    assert machine.meter.measured_j == pytest.approx(2.0 / (2 * MIN_ANSWERS))
    assert machine.told == [None, None, None, machine.meter.measured_j]


def test_the_processor_time_of_the_machine_is_what_is_neither_idle_nor_waiting(tmp_path: Path) -> None:
    sysfs = Sysfs(tmp_path)
    sysfs.processors(busy_ticks=300, idle_ticks=9000)
    assert times_of(tmp_path).machine_busy_s == pytest.approx(3.0)
    (tmp_path / "proc" / "stat").write_text("cpu  1 x\n")
    assert times_of(tmp_path).machine_busy_s is None
    (tmp_path / "proc" / "stat").unlink()
    assert times_of(tmp_path).machine_busy_s is None


def test_this_machine_can_be_read() -> None:
    times = times_of(Path("/"))
    assert times.agent_s > 0
    assert times.processors >= 1


async def test_scrapes_show_each_method_apart(machine: Machine) -> None:
    registry = Registry()
    register_energy(registry, machine.meter)
    machine.sysfs.zone("intel-rapl:0", 0)
    await machine.passes(answers=1)
    machine.sysfs.zone("intel-rapl:0", 4_000_000)
    await machine.passes(answers=2)
    shown = numbers(written(registry.families(), is_open_metrics=True))
    rapl, model = frozenset({("method", "rapl")}), frozenset({("method", "model")})
    assert shown["nanofleet_energy_joules_total", rapl] == pytest.approx(1.0)
    assert shown["nanofleet_energy_answers_total", model] == 1
    assert shown["nanofleet_energy_joules_per_answer", rapl] == pytest.approx(0.5)
    assert ("nanofleet_energy_joules_per_answer", model) not in shown
