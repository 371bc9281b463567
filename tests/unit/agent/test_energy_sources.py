"""Energy sources: counters that wrap, batteries that are used up, and a model that says that it is one."""

import shutil
from pathlib import Path

import pytest

from core.fleet_state import EnergyMethod
from edge_agent.energy.sources import Battery, Model, Rapl, Window
from tests.support.sysfs import Sysfs

WINDOW = Window(seconds=5.0, busy_share=0.5)


@pytest.fixture
def sysfs(tmp_path: Path) -> Sysfs:
    return Sysfs(tmp_path)


def test_rapl_counts_from_its_second_look(sysfs: Sysfs) -> None:
    sysfs.zone("intel-rapl:0", 1_000_000)
    rapl = Rapl(root=sysfs.root)
    assert rapl.joules(WINDOW) is None
    sysfs.zone("intel-rapl:0", 11_000_000)
    assert rapl.joules(WINDOW) == pytest.approx(10.0)


def test_packages_and_memory_are_added_and_parts_and_wholes_are_not(sysfs: Sysfs) -> None:
    zones = {
        "intel-rapl:0": "package-0",
        "intel-rapl:1": "package-1",
        "intel-rapl:0:0": "core",
        "intel-rapl:0:1": "dram",
        "intel-rapl:2": "psys",
    }
    rapl = Rapl(root=sysfs.root)
    for micro_joules in (0, 3_000_000):
        for zone, name in zones.items():
            sysfs.zone(zone, micro_joules, name=name)
        joules = rapl.joules(WINDOW)
    assert joules == pytest.approx(9.0)


def test_a_counter_that_wrapped_goes_on_from_its_range(sysfs: Sysfs) -> None:
    sysfs.zone("intel-rapl:0", 99_000_000, span=100_000_000)
    rapl = Rapl(root=sysfs.root)
    rapl.joules(WINDOW)
    sysfs.zone("intel-rapl:0", 4_000_000, span=100_000_000)
    assert rapl.joules(WINDOW) == pytest.approx(5.0)


def test_a_counter_that_was_reset_says_nothing_of_that_window(sysfs: Sysfs) -> None:
    """As after a suspend: a wrap would mean 200 kJ in five seconds."""
    sysfs.zone("intel-rapl:0", 50_000_000_000)
    rapl = Rapl(root=sysfs.root)
    rapl.joules(WINDOW)
    sysfs.zone("intel-rapl:0", 0)
    assert rapl.joules(WINDOW) is None
    sysfs.zone("intel-rapl:0", 2_000_000)
    assert rapl.joules(WINDOW) == pytest.approx(2.0)


def test_a_counter_without_a_range_that_went_back_says_nothing(sysfs: Sysfs) -> None:
    sysfs.zone("intel-rapl:0", 2_000_000, span=None)
    rapl = Rapl(root=sysfs.root)
    rapl.joules(WINDOW)
    sysfs.zone("intel-rapl:0", 1_000_000, span=None)
    assert rapl.joules(WINDOW) is None


def test_a_counter_that_may_not_be_read_is_none(sysfs: Sysfs) -> None:
    zone = sysfs.zone("intel-rapl:0", 1)
    (zone / "energy_uj").unlink()
    # What cannot be read as a file fails like one without the right to.
    (zone / "energy_uj").mkdir()
    rapl = Rapl(root=sysfs.root)
    assert [rapl.joules(WINDOW), rapl.joules(WINDOW)] == [None, None]


def test_one_package_of_two_that_cannot_be_read_leaves_no_half_figure(sysfs: Sysfs) -> None:
    sysfs.zone("intel-rapl:0", 0)
    (sysfs.zone("intel-rapl:1", 0, name="package-1") / "energy_uj").write_text("garbage")
    rapl = Rapl(root=sysfs.root)
    rapl.joules(WINDOW)
    sysfs.zone("intel-rapl:0", 1_000_000)
    assert rapl.joules(WINDOW) is None


def test_a_counter_that_vanishes_and_comes_back_counts_anew(sysfs: Sysfs) -> None:
    zone = sysfs.zone("intel-rapl:0", 1_000_000)
    rapl = Rapl(root=sysfs.root)
    rapl.joules(WINDOW)
    shutil.rmtree(zone)
    assert rapl.joules(WINDOW) is None
    sysfs.zone("intel-rapl:0", 9_000_000)
    assert rapl.joules(WINDOW) is None
    sysfs.zone("intel-rapl:0", 10_000_000)
    assert rapl.joules(WINDOW) == pytest.approx(1.0)


def test_a_machine_without_counters_says_nothing(sysfs: Sysfs) -> None:
    assert Rapl(root=sysfs.root).joules(WINDOW) is None


def test_a_battery_that_is_used_up_gives_its_power(sysfs: Sysfs) -> None:
    sysfs.supply("BAT0", status="Discharging", power_now=6_000_000)
    assert Battery(root=sysfs.root).joules(WINDOW) == pytest.approx(30.0)


@pytest.mark.parametrize("current", [500_000, -500_000])
def test_a_battery_that_gives_current_and_voltage_is_read_by_them(sysfs: Sysfs, current: int) -> None:
    sysfs.supply("BAT0", status="Discharging", current_now=current, voltage_now=12_000_000)
    assert Battery(root=sysfs.root).joules(WINDOW) == pytest.approx(30.0)


def test_a_battery_that_only_gives_what_is_left_is_read_by_the_difference(sysfs: Sysfs) -> None:
    battery = Battery(root=sysfs.root)
    sysfs.supply("BAT0", status="Discharging", energy_now=50_000_000)
    assert battery.joules(WINDOW) is None
    sysfs.supply("BAT0", status="Discharging", energy_now=49_990_000)
    assert battery.joules(WINDOW) == pytest.approx(36.0)


def test_two_batteries_are_added(sysfs: Sysfs) -> None:
    for name in ("BAT0", "BAT1"):
        sysfs.supply(name, status="Discharging", power_now=2_000_000)
    assert Battery(root=sysfs.root).joules(WINDOW) == pytest.approx(20.0)


@pytest.mark.parametrize(
    "files",
    [
        {"status": "Charging", "power_now": 6_000_000},
        {"status": "Full", "power_now": 6_000_000},
        {"status": "Discharging"},
        {"status": "Discharging", "power_now": "n/a"},
        {"status": "Discharging", "power_now": 6_000_000, "scope": "Device"},
        {"status": "Discharging", "power_now": 9_000_000_000_000},
        {"kind": "Mains", "status": "Discharging", "power_now": 6_000_000},
    ],
    ids=["charging", "full", "no figures", "no number", "of a mouse", "impossible", "no battery"],
)
def test_a_battery_that_tells_nothing_of_this_machine_says_nothing(sysfs: Sysfs, files: dict[str, str | int]) -> None:
    kind = str(files.pop("kind", "Battery"))
    sysfs.supply("BAT0", kind=kind, **files)
    assert Battery(root=sysfs.root).joules(WINDOW) is None


@pytest.mark.parametrize(("busy_share", "joules"), [(0.0, 10.0), (0.5, 22.5), (1.0, 35.0)])
def test_the_model_draws_a_line_between_rest_and_work(busy_share: float, joules: float) -> None:
    model = Model(idle_watts=2.0, max_watts=7.0)
    assert model.joules(Window(5.0, busy_share)) == pytest.approx(joules)
    assert model.method is EnergyMethod.MODEL
