"""How this machine is: memory, temperature, load. Read from /proc and /sys; what a system does not tell is left out."""

import math
import os
from pathlib import Path

from core.fleet_state import MachineHealth
from core.process_metrics import resident_bytes
from edge_agent.runtime.memory import mem_available_bytes

# Beyond it a sensor reports its own absence, not a temperature.
_PLAUSIBLE_C = 200.0


def machine_health(*, root: Path = Path("/")) -> MachineHealth:
    return MachineHealth(
        rss_bytes=_resident_bytes(),
        available_bytes=mem_available_bytes(root) or 0,
        temperature_c=_temperature_c(root / "sys" / "class" / "thermal"),
        load=os.getloadavg()[0],
    )


def _resident_bytes() -> int:
    try:
        return resident_bytes()
    except OSError:
        return 0


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
