"""What a machine tells of itself, and machines that tell little."""

from pathlib import Path

import pytest

from edge_agent.health.machine import machine_health


def machine(root: Path, *, meminfo: str | None = None, sensors: dict[str, str] | None = None) -> Path:
    if meminfo is not None:
        (root / "proc").mkdir()
        (root / "proc" / "meminfo").write_text(meminfo)
    for name, text in (sensors or {}).items():
        zone = root / "sys" / "class" / "thermal" / name
        zone.mkdir(parents=True)
        (zone / "temp").write_text(text)
    return root


def test_this_machine_tells_its_memory_and_load() -> None:
    health = machine_health()
    assert health.rss_bytes > 1 << 20
    assert health.available_bytes > 1 << 20
    assert health.load >= 0


def test_the_warmest_sensor_counts(tmp_path: Path) -> None:
    sensors = {"thermal_zone0": "41000\n", "thermal_zone1": "63500\n", "cooling_device0": "99000\n"}
    assert machine_health(root=machine(tmp_path, sensors=sensors)).temperature_c == 63.5


@pytest.mark.parametrize("reading", ["", "n/a", "255000000", "-274000"])
def test_a_sensor_that_makes_no_sense_is_left_out(tmp_path: Path, reading: str) -> None:
    health = machine_health(root=machine(tmp_path, sensors={"thermal_zone0": reading, "thermal_zone1": "40000"}))
    assert health.temperature_c == 40.0


def test_a_machine_without_sensors_has_no_temperature(tmp_path: Path) -> None:
    health = machine_health(root=machine(tmp_path, meminfo="MemTotal: 9 kB\nMemAvailable:    512 kB\n"))
    assert (health.temperature_c, health.available_bytes) == (None, 512 * 1024)


def test_a_system_without_proc_tells_no_memory(tmp_path: Path) -> None:
    assert machine_health(root=tmp_path).available_bytes == 0
