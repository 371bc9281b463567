"""How this machine is: memory, temperature, load. Read from /proc and /sys; what a system does not tell is left out."""

import math
import os
from pathlib import Path

from core.fleet_state import MachineHealth
from core.process_metrics import resident_bytes

# Beyond it a sensor reports its own absence, not a temperature.
_PLAUSIBLE_C = 200.0


def machine_health(*, root: Path = Path("/")) -> MachineHealth:
    return MachineHealth(
        rss_bytes=_resident_bytes(),
        available_bytes=_available_bytes(root / "proc" / "meminfo"),
        temperature_c=_temperature_c(root / "sys" / "class" / "thermal"),
        load=os.getloadavg()[0],
    )


def _resident_bytes() -> int:
    try:
        return resident_bytes()
    except OSError:
        return 0


def _available_bytes(meminfo: Path) -> int:
    """Return what programs may still take, as the kernel estimates it; 0 where it does not."""
    try:
        lines = meminfo.read_text().splitlines()
    except OSError:
        return 0
    found = [line.split()[1] for line in lines if line.startswith("MemAvailable:")]
    return int(found[0]) * 1024 if found else 0


def _temperature_c(zones: Path) -> float | None:
    """Return that of the warmest sensor."""
    readings = [_reading_c(zone / "temp") for zone in zones.glob("thermal_zone*")]
    warmest = max((reading for reading in readings if -_PLAUSIBLE_C < reading < _PLAUSIBLE_C), default=math.nan)
    return None if math.isnan(warmest) else warmest


def _reading_c(sensor: Path) -> float:
    # A sensor that is switched off answers with an error.
    try:
        return int(sensor.read_text()) / 1000
    except (OSError, ValueError):
        return math.inf
